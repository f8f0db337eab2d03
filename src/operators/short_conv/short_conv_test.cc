#include "operators/short_conv/short_conv.h"

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
using Optional = std::optional<at::Tensor>;

struct Case {
  int64_t batch, time, channels, width;
  bool bias, tail;
  const char* activation;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.batch << "x" << c.time << "x" << c.channels << " width " << c.width << " " << c.activation;
}

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  for (int64_t time : {1, 2, 3, 4, 5, 63, 64, 65})
    for (const char* activation : {"none", "silu"}) cases.push_back({2, time, 37, 4, true, true, activation});
  for (int64_t width : {1, 2, 3, 5, 7}) cases.push_back({2, 9, 19, width, true, true, "silu"});
  cases.push_back({1, 600, 300, 4, false, false, "silu"});  // several blocks and slices
  cases.push_back({3, 257, 64, 4, false, true, "none"});
  cases.push_back({2, 300, 20, 3, false, false, "none"});
  cases.push_back({2, 0, 8, 4, true, true, "silu"});
  return cases;
}

// x, weight, then bias and tail where the case has them.
Tensors make_inputs(const Case& c) {
  Tensors inputs = {random_normal({c.batch, c.time, c.channels}), random_normal({c.channels, c.width})};
  if (c.bias) inputs.push_back(random_normal({c.channels}));
  if (c.tail) inputs.push_back(random_normal({c.batch, c.width - 1, c.channels}));
  return inputs;
}

template <typename Function>
Tensors call(Function function, const Case& c, const Tensors& inputs) {
  const Optional bias = c.bias ? Optional(inputs[2]) : std::nullopt;
  const Optional tail = c.tail ? Optional(inputs.back()) : std::nullopt;
  const auto [y, new_tail] = function(inputs[0], inputs[1], bias, tail, c.activation, std::nullopt);
  return {y, new_tail};
}

class ShortConv : public ::testing::TestWithParam<Case> {};

TEST_P(ShortConv, MatchesReference) {
  const Case c = GetParam();
  at::manual_seed(1);
  const Tensors inputs = make_inputs(c);
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}}) {
    Tensors given, truth;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const bool parameter = i == 1 || (c.bias && i == 2);
      given.push_back(leaves({inputs[i]}, parameter && dtype == at::kBFloat16 ? at::kFloat : dtype)[0]);
      truth.push_back(leaves({given[i]}, at::kDouble)[0]);
    }
    const Tensors out = call(short_conv, c, given), want = call(short_conv_reference, c, truth);
    EXPECT_LE(relative_error(out[0].detach(), want[0].detach()), tolerance);
    EXPECT_TRUE(at::equal(out[1].to(at::kDouble), want[1]));
    Tensors cotangents, wide;
    for (const at::Tensor& y : out) {
      EXPECT_EQ(y.scalar_type(), dtype);
      cotangents.push_back(random_normal(y.sizes(), dtype));
      wide.push_back(cotangents.back().to(at::kDouble));
    }
    const Tensors got = gradients(out, given, cotangents), expected = gradients(want, truth, wide);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_LE(relative_error(got[i], expected[i]), tolerance) << "gradient " << i;
    c10::NoGradGuard no_grad;
    EXPECT_TRUE(at::equal(call(short_conv, c, given)[0], out[0]));
  }
}

TEST_P(ShortConv, GradientsMatchFiniteDifferences) {
  const Case c = GetParam();
  at::manual_seed(2);
  EXPECT_LE(
      testing::directional_error([&](const Tensors& t) { return call(short_conv, c, t); }, make_inputs(c)),
      1e-6);
}

TEST_P(ShortConv, PiecesEqualTheWhole) {
  const Case c = GetParam();
  at::manual_seed(3);
  const at::Tensor weight = random_normal({c.channels, c.width}, at::kFloat);
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = random_normal({c.batch, c.time, c.channels}, dtype);
    const auto [whole, end] = short_conv(x, weight, std::nullopt, std::nullopt, c.activation);
    for (int64_t piece : {1, 2, 3, 64}) {
      Optional tail;
      for (int64_t t = 0; t < c.time; t += piece) {
        const int64_t stop = std::min(c.time, t + piece);
        const auto [y, next] = short_conv(x.slice(1, t, stop), weight, std::nullopt, tail, c.activation);
        ASSERT_TRUE(at::equal(y, whole.slice(1, t, stop))) << "piece of " << piece << " at " << t;
        tail = next;
      }
      if (tail) {
        EXPECT_TRUE(at::equal(*tail, end));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ShortConv, ::testing::ValuesIn(make_cases()));

TEST(ShortConvTest, OnlyOneOutputMayBeUsed) {
  at::manual_seed(4);
  const Case c = {2, 2, 5, 4, true, true, "silu"};
  for (int used : {0, 1}) {
    const Tensors given = leaves(make_inputs(c), at::kDouble), truth = leaves(given, at::kDouble);
    const at::Tensor y = call(short_conv, c, given)[used], want = call(short_conv_reference, c, truth)[used];
    const at::Tensor dy = random_normal(y.sizes());
    const Tensors got = gradients({y}, {given[0], given.back()}, {dy});
    const Tensors expected = gradients({want}, {truth[0], truth.back()}, {dy});
    for (int i : {0, 1}) EXPECT_LE(relative_error(got[i], expected[i]), 1e-13);
  }
}

TEST(ShortConvTest, TakesStridedTime) {
  at::manual_seed(5);
  const at::Tensor wide = random_normal({2, 70, 96}, at::kFloat), weight = random_normal({32, 4}, at::kFloat);
  const at::Tensor x = wide.slice(2, 32, 64), every_other = wide.slice(1, 0, 70, 2).slice(2, 0, 32);
  for (const at::Tensor& view : {x, every_other, x.transpose(0, 1)}) {
    const auto [y, tail] = short_conv(view, weight, std::nullopt, std::nullopt, "silu");
    const auto [same, same_tail] = short_conv(view.contiguous(), weight, std::nullopt, std::nullopt, "silu");
    EXPECT_TRUE(at::equal(y, same));
    EXPECT_TRUE(at::equal(tail, same_tail));
  }
}

TEST(ShortConvTest, ExtremesStayFinite) {
  at::Tensor x = at::zeros({1, 12, 8});
  x.select(1, 3).fill_(1e4);
  x.select(1, 7).fill_(-1e4);
  x.set_requires_grad(true);
  const at::Tensor weight = at::ones({8, 4}).set_requires_grad(true);
  const auto [y, tail] = short_conv(x, weight, std::nullopt, std::nullopt, "silu");
  EXPECT_TRUE(y.isfinite().all().item<bool>());
  for (const at::Tensor& g : gradients({y}, {x, weight}, {at::ones_like(y)}))
    EXPECT_TRUE(g.isfinite().all().item<bool>());
}

TEST(ShortConvTest, TwoReadersFlowBackTogether) {
  at::manual_seed(7);
  const Tensors inputs = leaves({random_normal({2, 9, 8}), random_normal({8, 4})}, at::kDouble);
  const at::Tensor dy = random_normal({2, 9, 8}), dy_again = random_normal({2, 9, 8});
  const auto one = [&](const at::Tensor& cotangent) {
    const auto [y, tail] = short_conv(inputs[0], inputs[1], std::nullopt, std::nullopt, "silu");
    return gradients({y}, inputs, {cotangent});
  };
  const auto two = [&] {
    auto [y, again, tail] =
        short_conv_for_two(inputs[0], inputs[1], std::nullopt, std::nullopt, "silu", std::nullopt);
    EXPECT_TRUE(at::equal(y, again));
    return Tensors{y, again};
  };
  const Tensors both = gradients(two(), inputs, {dy, dy_again}), want = one(dy + dy_again),
                second = gradients({two()[1]}, inputs, {dy}), alone = one(dy);
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(at::equal(both[i], want[i]));
    EXPECT_TRUE(at::equal(second[i], alone[i]));
  }
}

TEST(ShortConvTest, RowsMayLieInAnotherOrder) {
  at::manual_seed(8);
  const at::Tensor rows = at::randperm(18, at::kLong).view({2, 9});
  const Tensors tokens =
      leaves({random_normal({2, 9, 8}), random_normal({8, 4}), random_normal({2, 3, 8})}, at::kFloat);
  const at::Tensor x = at::empty({18, 8}).index_copy(0, rows.flatten(), tokens[0].detach().flatten(0, 1));
  const Tensors packed = {leaves({x}, at::kFloat)[0], tokens[1], tokens[2]};
  const auto run = [&](const Tensors& t, const Optional& order) {
    const auto [y, tail] = short_conv(t[0], t[1], std::nullopt, t[2], "silu", order);
    Tensors results = gradients({y, tail}, t, {at::ones_like(y) * y.detach(), tail.detach()});
    results.insert(results.end(), {y, tail});
    return results;
  };
  const Tensors want = run(tokens, std::nullopt), got = run(packed, rows);
  EXPECT_TRUE(at::equal(got[0].index_select(0, rows.flatten()).view({2, 9, 8}), want[0]));
  for (size_t i = 1; i < want.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
}

TEST(ShortConvTest, DoesNotDependOnThreads) {
  at::manual_seed(6);
  const int threads = at::get_num_threads();
  const Tensors inputs = leaves({random_normal({2, 600, 300}), random_normal({300, 4})}, at::kFloat);
  const at::Tensor dy = random_normal({2, 600, 300}, at::kFloat);
  Tensors results[2];
  for (int run : {0, 1}) {
    at::set_num_threads(run + 1);
    const auto [y, tail] = short_conv(inputs[0], inputs[1], std::nullopt, std::nullopt, "silu");
    results[run] = gradients({y}, inputs, {dy});
    results[run].push_back(y);
  }
  at::set_num_threads(threads);
  for (size_t i = 0; i < results[0].size(); ++i) EXPECT_TRUE(at::equal(results[0][i], results[1][i]));
}

TEST(ShortConvTest, RejectsWhatItCannotRead) {
  const at::Tensor x = at::ones({2, 5, 8}), weight = at::ones({8, 4});
  EXPECT_THROW(short_conv(x[0], weight, std::nullopt, std::nullopt, "none"), Error);
  EXPECT_THROW(short_conv(x, at::ones({7, 4}), std::nullopt, std::nullopt, "none"), Error);
  EXPECT_THROW(short_conv(x, weight, at::ones({7}), std::nullopt, "none"), Error);
  EXPECT_THROW(short_conv(x, weight, std::nullopt, at::ones({2, 4, 8}), "none"), Error);
  EXPECT_THROW(short_conv(x, weight, std::nullopt, at::ones({2, 3, 8}, at::kDouble), "none"), Error);
  EXPECT_THROW(short_conv(x, weight, std::nullopt, std::nullopt, "relu"), Error);
  const at::Tensor rows = at::arange(10, at::kLong).view({2, 5});
  EXPECT_THROW(short_conv(x, weight, std::nullopt, std::nullopt, "none", rows), Error);
  const at::Tensor packed = x.flatten(0, 1);
  EXPECT_THROW(short_conv(packed, weight, std::nullopt, std::nullopt, "none", rows.flatten()), Error);
  EXPECT_THROW(short_conv(packed, weight, std::nullopt, std::nullopt, "none", rows.to(at::kInt)), Error);
  EXPECT_THROW(short_conv(packed, weight, std::nullopt, std::nullopt, "none", rows.narrow(1, 0, 4)), Error);
}

}  // namespace
}  // namespace oryx::operators
