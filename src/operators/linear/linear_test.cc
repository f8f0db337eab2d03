#include "operators/linear/linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "base/error.h"

namespace oryx::operators {
namespace {

using Rows = std::vector<RowRange>;

struct Case {
  const char* name;
  int64_t rows, inputs;
  std::vector<int64_t> outputs;
  Rows selected;
};

std::vector<Case> cases() {
  return {
      {"one_row", 1, 40, {24}, {{0, 1}}},
      {"no_rows", 0, 16, {8, 4}, {{0, 0}, {0, 0}}},
      {"three_rows_odd", 3, 37, {5, 3, 11}, {{0, 3}, {0, 3}, {0, 3}}},
      {"sixteen_rows", 16, 100, {33}, {{0, 16}}},
      {"seventeen_rows", 17, 100, {33}, {{0, 17}}},
      {"block", 90, 64, {64, 64, 64, 64, 64, 2}, {{0, 90}, {0, 90}, {0, 90}, {0, 37}, {37, 53}, {0, 90}}},
      {"only_subsets", 50, 32, {16, 8}, {{27, 23}, {10, 30}}},
      {"empty_and_all", 20, 8, {8, 8}, {{20, 0}, {0, 20}}},
      {"few_of_few", 5, 48, {16, 24}, {{3, 2}, {0, 0}}},
      {"few_of_many", 50, 48, {16, 24}, {{3, 7}, {40, 10}}},
      {"wide", 33, 300, {257}, {{1, 32}}},
  };
}

struct Inputs {
  at::Tensor x;
  std::vector<at::Tensor> weights, upstream;
};

// In float64, rounded through `x_dtype` and `weight_dtype`, so that every dtype sees the same numbers.
Inputs inputs_of(const Case& c, at::ScalarType x_dtype = at::kDouble,
                 at::ScalarType weight_dtype = at::kDouble) {
  at::manual_seed(5);
  const auto make = [](int64_t m, int64_t n, at::ScalarType dtype) {
    return at::randn({m, n}, at::kDouble).to(dtype).to(at::kDouble);
  };
  Inputs result{make(c.rows, c.inputs, x_dtype), {}, {}};
  for (size_t i = 0; i < c.outputs.size(); ++i) {
    result.weights.push_back(make(c.outputs[i], c.inputs, weight_dtype));
    result.upstream.push_back(make(c.selected[i].count, c.outputs[i], x_dtype));
  }
  return result;
}

Inputs cast(const Inputs& in, at::ScalarType x_dtype, at::ScalarType weight_dtype) {
  Inputs result{in.x.to(x_dtype), {}, {}};
  for (const at::Tensor& weight : in.weights) result.weights.push_back(weight.to(weight_dtype));
  for (const at::Tensor& grad : in.upstream) result.upstream.push_back(grad.to(x_dtype));
  return result;
}

using Function = std::vector<at::Tensor> (*)(const at::Tensor&, const std::vector<at::Tensor>&, const Rows&);

// Outputs, then the gradients of x and of each weight.
std::vector<at::Tensor> run(Function function, const Inputs& in, const Rows& selected) {
  const at::Tensor x = in.x.detach().clone().requires_grad_(true);
  std::vector<at::Tensor> leaves = {x}, weights;
  for (const at::Tensor& weight : in.weights) weights.push_back(weight.detach().clone().requires_grad_(true));
  leaves.insert(leaves.end(), weights.begin(), weights.end());
  std::vector<at::Tensor> result = function(x, weights, selected);
  const auto grads = torch::autograd::grad(result, leaves, in.upstream);
  for (at::Tensor& y : result) y = y.detach();
  result.insert(result.end(), grads.begin(), grads.end());
  return result;
}

double error(const at::Tensor& x, const at::Tensor& reference) {
  if (reference.numel() == 0) return 0;
  const double scale = reference.norm().item<double>();
  const double difference = (x.to(at::kDouble) - reference).norm().item<double>();
  return scale == 0 ? difference : difference / scale;
}

TEST(Linear, EqualsTheReferenceInFloat64) {
  for (const Case& c : cases()) {
    const Inputs in = inputs_of(c);
    const auto got = run(projections, in, c.selected), expected = run(projections_reference, in, c.selected);
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i].sizes(), expected[i].sizes()) << c.name << " tensor " << i;
      EXPECT_LT(error(got[i], expected[i]), 1e-13) << c.name << " tensor " << i;
    }
    const auto plain = projections(in.x, in.weights, c.selected);
    for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(at::equal(plain[i], got[i])) << c.name;
  }
}

TEST(Linear, OtherTypesAreWithinTheirRounding) {
  struct Types {
    at::ScalarType x, weight;
    double limit;
  };
  for (const Types& types : {Types{at::kFloat, at::kFloat, 2e-6}, Types{at::kBFloat16, at::kBFloat16, 4e-3},
                             Types{at::kBFloat16, at::kFloat, 4e-3}}) {
    for (const Case& c : cases()) {
      // A master weight is rounded to bfloat16 for the product: give the reference the rounded one.
      const Inputs in = inputs_of(c, types.x, types.x);
      const auto got = run(projections, cast(in, types.x, types.weight), c.selected);
      const auto expected = run(projections_reference, in, c.selected);
      for (size_t i = 0; i < got.size(); ++i) {
        const size_t first_weight = c.outputs.size() + 1;
        ASSERT_EQ(got[i].scalar_type(), i < first_weight ? types.x : types.weight);
        // The gradient of a float32 weight is not rounded to bfloat16 on its way.
        const bool exact = i >= first_weight && types.weight == at::kFloat;
        EXPECT_LT(error(got[i], expected[i]), exact ? 2e-6 : types.limit)
            << c.name << " tensor " << i << " x " << c10::toString(types.x);
      }
    }
  }
}

TEST(Linear, RoundsAMasterWeightOnce) {
  const Inputs in = inputs_of({"", 7, 50, {20}, {{0, 7}}});
  for (const int64_t rows : {7, 40}) {
    const at::Tensor x = at::randn({rows, 50}, at::kBFloat16), weight = at::randn({20, 50}, at::kFloat);
    EXPECT_TRUE(at::equal(operators::linear(x, weight), operators::linear(x, weight.to(at::kBFloat16))));
  }
}

// A bfloat16 leaf that collects float32 gradients is to autograd what its float32 original is.
TEST(Linear, ARoundedLeafGetsTheGradientOfItsMaster) {
  for (const Case& c : cases()) {
    const Inputs in = cast(inputs_of(c), at::kBFloat16, at::kFloat);
    std::vector<std::vector<at::Tensor>> results;
    for (const bool rounded : {false, true}) {
      const at::Tensor x = in.x.detach().clone().requires_grad_(true);
      std::vector<at::Tensor> weights, leaves = {x};
      for (const at::Tensor& master : in.weights) {
        weights.push_back((rounded ? master.to(at::kBFloat16) : master.clone()).requires_grad_(true));
        weights.back().set_grad_dtype(at::kFloat);
        leaves.push_back(weights.back());
      }
      results.push_back(projections(x, weights, c.selected));
      // Twice, as over two micro-batches.
      for (int pass = 0; pass < 2; ++pass) {
        torch::autograd::backward(projections(x, weights, c.selected), in.upstream);
      }
      for (const at::Tensor& leaf : leaves) results.back().push_back(leaf.grad());
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      EXPECT_EQ(results[0][i].scalar_type(), results[1][i].scalar_type()) << c.name << " tensor " << i;
      EXPECT_TRUE(at::equal(results[0][i], results[1][i])) << c.name << " tensor " << i;
    }
  }
}

TEST(Linear, AgreesWithFiniteDifferences) {
  const Case c = {"", 9, 6, {4, 5, 3}, {{0, 9}, {6, 3}, {0, 9}}};
  const Inputs in = inputs_of(c);
  const auto grads = run(projections, in, c.selected);
  const auto loss = [&](const Inputs& at) {
    const auto y = projections(at.x, at.weights, c.selected);
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += (y[i] * in.upstream[i]).sum().item<double>();
    return sum;
  };
  const double step = 1e-5;
  for (size_t i = 0; i <= c.outputs.size(); ++i) {
    Inputs up = in, down = in;
    at::Tensor& above = i == 0 ? up.x : up.weights[i - 1];
    at::Tensor& below = i == 0 ? down.x : down.weights[i - 1];
    const at::Tensor direction = at::randn_like(above);
    above = above + step * direction;
    below = below - step * direction;
    const double slope = (grads[c.outputs.size() + i] * direction).sum().item<double>();
    EXPECT_NEAR((loss(up) - loss(down)) / (2 * step), slope, 1e-6 * (1 + std::abs(slope)));
  }
}

// Only some outputs used, only some inputs trained.
TEST(Linear, SkipsWhatNobodyAsksFor) {
  const Case c = {"", 40, 12, {8, 6}, {{0, 40}, {2, 37}}};
  const Inputs in = inputs_of(c);
  const auto full = run(projections, in, c.selected);
  const at::Tensor x = in.x.clone().requires_grad_(true), weight = in.weights[0].clone().requires_grad_(true);
  const auto y = projections(x, {weight, in.weights[1]}, c.selected);
  const auto grads = torch::autograd::grad({y[0]}, {x, weight}, {in.upstream[0]});
  EXPECT_LT(error(grads[0], at::mm(in.upstream[0], in.weights[0])), 1e-13);
  EXPECT_TRUE(at::equal(grads[1], full[3]));
  const auto frozen = projections(in.x, {weight}, {{0, 40}});  // x needs no gradient
  EXPECT_TRUE(at::equal(torch::autograd::grad({frozen[0]}, {weight}, {in.upstream[0]})[0], full[3]));
}

// In the kernel for few rows a row's result is the same bits alone, among others, in any company.
TEST(Linear, FewRowsAreIndependent) {
  const int threads = at::get_num_threads();
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    at::manual_seed(2);
    const at::Tensor x = at::randn({16, 771}, dtype), weight = at::randn({133, 771}, dtype),
                     other = at::randn({5, 771}, dtype);
    const at::Tensor all = operators::linear(x, weight);
    for (int64_t row = 0; row < 16; ++row) {
      EXPECT_TRUE(at::equal(operators::linear(x.slice(0, row, row + 1), weight), all.slice(0, row, row + 1)));
    }
    EXPECT_TRUE(at::equal(operators::linear(x.slice(0, 3, 10), weight), all.slice(0, 3, 10)));
    const auto several = projections(x, {other, weight}, {{0, 16}, {11, 5}});
    EXPECT_TRUE(at::equal(several[1], all.narrow(0, 11, 5)));
    at::set_num_threads(1);
    EXPECT_TRUE(at::equal(operators::linear(x, weight), all));
    at::set_num_threads(threads);
  }
}

TEST(Linear, TakesAnyStrides) {
  for (const int64_t rows : {3, 50}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor x = at::randn({24, rows}, dtype).t(),
                       weight = at::randn({10, 48}, dtype).slice(1, 0, 48, 2);
      const Case c = {"", rows, 24, {10}, {{1, rows / 2}}};
      const Inputs strided{x, {weight}, {at::randn({10, rows / 2}, dtype).t()}};
      const Inputs packed{x.contiguous(), {weight.contiguous()}, {strided.upstream[0].contiguous()}};
      const auto got = run(projections, strided, c.selected), expected = run(projections, packed, c.selected);
      for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(error(got[i], expected[i].to(at::kDouble)), 1e-6);
    }
  }
}

TEST(Linear, IsRegistered) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const at::Tensor x = at::randn({20, 8}), a = at::randn({4, 8}), b = at::randn({6, 8});
  const auto op = dispatcher.findSchemaOrThrow("oryx::linear", "")
                      .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  EXPECT_TRUE(at::equal(op.call(x, a), operators::linear(x, a)));
  const auto several = dispatcher.findSchemaOrThrow("oryx::projections", "")
                           .typed<std::vector<at::Tensor>(const at::Tensor&, at::TensorList, at::IntArrayRef,
                                                          at::IntArrayRef)>();
  const auto y =
      several.call(x, std::vector<at::Tensor>{a, b}, std::vector<int64_t>{0, 7}, std::vector<int64_t>{20, 3});
  const auto expected = projections(x, {a, b}, {{0, 20}, {7, 3}});
  EXPECT_TRUE(at::equal(y[0], expected[0]) && at::equal(y[1], expected[1]));
}

TEST(Linear, NamesWhatIsWrong) {
  const at::Tensor x = at::randn({3, 8}), weight = at::randn({4, 8});
  const auto message = [&](const at::Tensor& input, const at::Tensor& w, const RowRange& rows) {
    try {
      projections(input, {w}, {rows});
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(message(x, weight.slice(1, 0, 7), {0, 3}).find("[out, 8], got [4, 7]"), std::string::npos);
  EXPECT_NE(message(x, weight.to(at::kBFloat16), {0, 3}).find("weight of"), std::string::npos);
  EXPECT_NE(message(x.view({1, 3, 8}), weight, {0, 3}).find("x [N, in]"), std::string::npos);
  EXPECT_NE(message(x, weight, {1, 3}).find("rows within 3, got 3 from row 1 on"), std::string::npos);
  EXPECT_NE(message(x, weight, {-1, 1}).find("from row -1"), std::string::npos);
  EXPECT_NE(message(x, weight, {3, -1}).find("got -1"), std::string::npos);
}

}  // namespace
}  // namespace oryx::operators
