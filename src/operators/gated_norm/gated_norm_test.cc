#include "operators/gated_norm/gated_norm.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::gradients;
using testing::leaves;
using testing::random_normal;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

struct Case {
  const char* name;
  int64_t rows, channels, group;  // group 0: no weight
  bool gate;
  const char* order;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

const Case cases[] = {
    {"after_gate", 130, 256, 256, true, "after_gate"},
    {"after_gate_heads", 65, 192, 64, true, "after_gate"},
    {"after_gate_odd", 7, 37, 37, true, "after_gate"},
    {"before_gate", 129, 128, 128, true, "before_gate"},
    {"before_gate_heads", 64, 96, 24, true, "before_gate"},
    {"before_gate_odd", 3, 35, 7, true, "before_gate"},
    {"plain", 67, 129, 129, false, "before_gate"},
    {"plain_heads", 5, 64, 16, false, "after_gate"},
    {"product", 33, 101, 0, true, "before_gate"},
    {"one_row", 1, 3, 3, true, "after_gate"},
    {"no_rows", 0, 16, 16, true, "after_gate"},
};

// x, then gate and weight where the case has them.
Tensors make_inputs(const Case& c) {
  Tensors inputs = {random_normal({c.rows, c.channels})};
  if (c.gate) inputs.push_back(random_normal({c.rows, c.channels}) * 2);
  if (c.group > 0) inputs.push_back(random_normal({c.group}));
  return inputs;
}

template <typename Function>
at::Tensor call(Function function, const Case& c, const Tensors& inputs) {
  std::optional<at::Tensor> gate, weight;
  if (c.gate) gate = inputs[1];
  if (c.group > 0) weight = inputs.back();
  return function(inputs[0], gate, weight, 1e-5, c.order);
}

// Activations in `dtype`, the weight in its accumulate type.
Tensors cast(const Case& c, Tensors inputs, at::ScalarType dtype) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool weight = c.group > 0 && i + 1 == inputs.size();
    inputs[i] = inputs[i].to(weight && dtype == at::kBFloat16 ? at::kFloat : dtype);
  }
  return inputs;
}

class GatedNorm : public ::testing::TestWithParam<Case> {};

TEST_P(GatedNorm, MatchesReference) {
  const Case c = GetParam();
  at::manual_seed(1);
  const Tensors inputs = make_inputs(c);
  const struct {
    at::ScalarType dtype;
    double tolerance;
  } kinds[] = {{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}};
  for (const auto& [dtype, tolerance] : kinds) {
    Tensors given, truth;
    for (const at::Tensor& t : cast(c, inputs, dtype)) {
      given.push_back(t.detach().clone().set_requires_grad(true));
      truth.push_back(t.detach().to(at::kDouble).set_requires_grad(true));
    }
    const at::Tensor y = call(gated_norm, c, given), want = call(gated_norm_reference, c, truth);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_LE(relative_error(y.detach(), want.detach()), tolerance);
    const at::Tensor dy = random_normal(y.sizes(), dtype);
    const Tensors got = gradients({y}, given, {dy}),
                  expected = gradients({want}, truth, {dy.to(at::kDouble)});
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), given[i].scalar_type());
      EXPECT_LE(relative_error(got[i], expected[i]), tolerance) << "gradient " << i;
    }
    c10::NoGradGuard no_grad;
    EXPECT_TRUE(at::equal(call(gated_norm, c, given), y));
  }
}

TEST_P(GatedNorm, GradientsMatchFiniteDifferences) {
  const Case c = GetParam();
  at::manual_seed(2);
  EXPECT_LE(testing::directional_error([&](const Tensors& t) { return Tensors{call(gated_norm, c, t)}; },
                                       make_inputs(c)),
            1e-6);
}

INSTANTIATE_TEST_SUITE_P(Cases, GatedNorm, ::testing::ValuesIn(cases),
                         [](const auto& c) { return c.param.name; });

TEST(GatedNormTest, TakesStridedRowsAndExtraDimensions) {
  at::manual_seed(3);
  const at::Tensor wide = random_normal({2, 9, 3 * 40}, at::kFloat), weight = random_normal({8}, at::kFloat);
  const at::Tensor x = wide.slice(-1, 0, 40), gate = wide.slice(-1, 80, 120);
  const at::Tensor y = gated_norm(x, gate, weight, 1e-5, "after_gate");
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_TRUE(at::equal(y, gated_norm(x.contiguous(), gate.contiguous(), weight, 1e-5, "after_gate")));
  EXPECT_TRUE(at::equal(gated_norm(x.transpose(0, 1), gate.transpose(0, 1), weight, 1e-5, "before_gate"),
                        gated_norm(x, gate, weight, 1e-5, "before_gate").transpose(0, 1)));
}

TEST(GatedNormTest, ExtremeGatesAndZeroRowsStayFinite) {
  for (const char* order : {"after_gate", "before_gate"}) {
    for (at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
      at::Tensor x = at::randn({4, 32}, dtype), gate = at::zeros({4, 32}, dtype);
      x[0].zero_();
      gate[1].fill_(-1e4);
      gate[2].fill_(1e4);
      gate[3].fill_(-100);
      x.set_requires_grad(true), gate.set_requires_grad(true);
      const at::Tensor weight =
          at::ones({32}, dtype == at::kDouble ? at::kDouble : at::kFloat).set_requires_grad(true);
      const at::Tensor y = gated_norm(x, gate, weight, 1e-5, order);
      EXPECT_TRUE(y.isfinite().all().item<bool>());
      for (const at::Tensor& g : gradients({y}, {x, gate, weight}, {at::ones_like(y)}))
        EXPECT_TRUE(g.isfinite().all().item<bool>());
      EXPECT_EQ(y[0].abs().max().item<double>(), 0);
    }
  }
  const at::Tensor broken = at::full({1, 16}, NAN);
  EXPECT_TRUE(
      gated_norm(at::ones({1, 16}), broken, std::nullopt, 0, "after_gate").isnan().all().item<bool>());
}

TEST(GatedNormTest, DoesNotDependOnThreads) {
  at::manual_seed(4);
  const int threads = at::get_num_threads();
  Tensors results[2];
  const Tensors inputs =
      leaves({random_normal({300, 512}), random_normal({300, 512}), random_normal({512})}, at::kFloat);
  const at::Tensor dy = random_normal({300, 512}, at::kFloat);
  for (int run = 0; run < 2; ++run) {
    at::set_num_threads(run == 0 ? 1 : 2);
    const at::Tensor y = gated_norm(inputs[0], inputs[1], inputs[2], 1e-5, "after_gate");
    results[run] = gradients({y}, inputs, {dy});
    results[run].push_back(y);
  }
  at::set_num_threads(threads);
  for (size_t i = 0; i < results[0].size(); ++i) EXPECT_TRUE(at::equal(results[0][i], results[1][i]));
}

TEST(GatedNormTest, GradientsWithoutAGraph) {
  at::manual_seed(5);
  for (const Case& c : cases) {
    const Tensors x = leaves({at::randn({c.rows, c.channels}), at::randn({c.rows, c.channels})}, at::kFloat);
    const at::Tensor factor = at::randn({std::max<int64_t>(c.group, 1)}).set_requires_grad(true);
    const at::Tensor dy = at::randn({c.rows, c.channels});
    const auto gate = c.gate ? std::optional(x[1]) : std::nullopt;
    const auto weight = c.group > 0 ? std::optional(factor) : std::nullopt;
    Tensors inputs = {x[0]};
    if (gate) inputs.push_back(*gate);
    if (weight) inputs.push_back(*weight);
    const at::Tensor y = gated_norm(x[0], gate, weight, 1e-5, c.order);
    const Tensors want = gradients({y}, inputs, {dy});
    const GatedNormGradients got = gated_norm_gradients(x[0], gate, weight, 1e-5, c.order, dy);
    EXPECT_TRUE(at::equal(got.y, y) && at::equal(got.dx, want[0])) << c.name;
    EXPECT_TRUE(!gate || at::equal(got.dgate, want[1])) << c.name;
    EXPECT_TRUE(!weight || at::equal(got.dweight, want.back())) << c.name;
  }
}

TEST(AddNorm, MatchesReference) {
  at::manual_seed(5);
  const Tensors inputs = {random_normal({70, 129}), random_normal({70, 129}), random_normal({129})};
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}}) {
    Tensors given = leaves({inputs[0], inputs[1]}, dtype);
    given.push_back(leaves({inputs[2]}, dtype == at::kDouble ? at::kDouble : at::kFloat)[0]);
    const auto [sum, normed] = add_norm(given[0], given[1], given[2], 1e-5);
    EXPECT_TRUE(at::equal(sum, given[0] + given[1]));
    EXPECT_TRUE(at::equal(normed, gated_norm(sum, std::nullopt, given[2], 1e-5, "after_gate")));
    // From the sum as rounded, so that bfloat16 is judged by its own rounding and not by cancellation.
    const Tensors truth = leaves({sum, given[2]}, at::kDouble);
    const at::Tensor want = gated_norm_reference(truth[0], std::nullopt, truth[1], 1e-5, "after_gate");
    const at::Tensor dsum = random_normal(sum.sizes(), dtype), dnormed = random_normal(sum.sizes(), dtype);
    const Tensors got = gradients({sum, normed}, given, {dsum, dnormed});
    const Tensors expected =
        gradients({truth[0] * 1, want}, truth, {dsum.to(at::kDouble), dnormed.to(at::kDouble)});
    EXPECT_LE(relative_error(got[0], expected[0]), tolerance);
    EXPECT_LE(relative_error(got[2], expected[1]), tolerance);
    EXPECT_TRUE(at::equal(got[0], got[1]));
  }
  EXPECT_LE(testing::directional_error(
                [](const Tensors& t) {
                  const auto [sum, normed] = add_norm(t[0], t[1], t[2], 1e-5);
                  return Tensors{sum, normed};
                },
                inputs),
            1e-6);
}

TEST(AddNorm, UnusedOutputsHaveZeroGradient) {
  at::manual_seed(6);
  const Tensors inputs =
      leaves({random_normal({5, 24}), random_normal({5, 24}), random_normal({24})}, at::kDouble);
  const auto [sum, normed] = add_norm(inputs[0], inputs[1], inputs[2], 1e-5);
  const at::Tensor cotangent = random_normal({5, 24});
  EXPECT_TRUE(at::equal(gradients({sum}, {inputs[0]}, {cotangent})[0], cotangent));
}

TEST(GatedNormTest, RejectsWhatItCannotRead) {
  const at::Tensor x = at::ones({2, 12});
  EXPECT_THROW(gated_norm(x, std::nullopt, std::nullopt, 1e-5, "after_gate"), Error);
  EXPECT_THROW(gated_norm(x, std::nullopt, at::ones({5}), 1e-5, "after_gate"), Error);
  EXPECT_THROW(gated_norm(x, at::ones({2, 11}), std::nullopt, 1e-5, "after_gate"), Error);
  EXPECT_THROW(gated_norm(x, at::ones({2, 12}, at::kDouble), std::nullopt, 1e-5, "after_gate"), Error);
  EXPECT_THROW(gated_norm(x, x, std::nullopt, 1e-5, "sideways"), Error);
  EXPECT_THROW(gated_norm(x.to(at::kInt), x.to(at::kInt), std::nullopt, 1e-5, "after_gate"), Error);
  EXPECT_THROW(add_norm(x, x, at::ones({6}), 1e-5), Error);
}

}  // namespace
}  // namespace oryx::operators
