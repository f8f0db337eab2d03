#include "operators/attention/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <random>

#include "base/error.h"

namespace oryx::operators {
namespace {

using Spans = std::vector<std::array<int64_t, 3>>;

at::Tensor tensor_of(const Spans& spans) {
  at::Tensor result = at::empty({static_cast<int64_t>(spans.size()), 3}, at::kLong);
  for (size_t i = 0; i < spans.size(); ++i) {
    for (int64_t j = 0; j < 3; ++j) result[i][j] = spans[i][j];
  }
  return result;
}

struct Case {
  const char* name;
  int64_t batch, capacity, query_heads, key_heads, key_dim, value_dim;
  Spans spans;

  int64_t rows() const {
    int64_t total = 0;
    for (const auto& span : spans) total += span[2] - span[1];
    return total;
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(key_dim)); }
};

struct Inputs {
  at::Tensor query, key, value, output_grad;

  Inputs to(at::ScalarType dtype) const {
    return {query.to(dtype), key.to(dtype), value.to(dtype), output_grad.to(dtype)};
  }
};

// In float64, rounded through `through`, so that every dtype sees the same numbers.
Inputs inputs_of(const Case& c, at::ScalarType through = at::kDouble, uint64_t seed = 1) {
  at::manual_seed(seed);
  const auto make = [&](at::IntArrayRef sizes) {
    return at::randn(sizes, at::kDouble).to(through).to(at::kDouble);
  };
  return {make({c.rows(), c.query_heads, c.key_dim}), make({c.batch, c.capacity, c.key_heads, c.key_dim}),
          make({c.batch, c.capacity, c.key_heads, c.value_dim}),
          make({c.rows(), c.query_heads, c.value_dim})};
}

using Function = at::Tensor (*)(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                double);

// Output and the gradients of query, key and value.
std::vector<at::Tensor> run(Function function, const Inputs& in, const Case& c) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().clone().requires_grad_(true); };
  const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
  const at::Tensor output = function(q, k, v, tensor_of(c.spans), c.scale());
  auto grads = torch::autograd::grad({output}, {q, k, v}, {in.output_grad});
  return {output.detach(), grads[0], grads[1], grads[2]};
}

double error(const at::Tensor& x, const at::Tensor& reference) {
  if (x.numel() == 0 && reference.numel() == 0) return 0;
  const double scale = reference.norm().item<double>();
  const double difference = (x.to(at::kDouble) - reference.to(at::kDouble)).norm().item<double>();
  return scale == 0 ? difference : difference / scale;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"all", 2, 70, 2, 2, 16, 16, {{0, 0, 70}, {1, 0, 70}}},
      {"long", 1, 600, 2, 2, 32, 32, {{0, 0, 600}}},
      {"none", 2, 70, 2, 2, 16, 16, {}},
      {"empty_span", 1, 9, 1, 1, 8, 8, {{0, 4, 4}, {0, 6, 9}}},
      {"last_token", 3, 300, 2, 2, 16, 16, {{0, 299, 300}, {1, 299, 300}, {2, 299, 300}}},
      {"first_token", 1, 4, 2, 2, 8, 8, {{0, 0, 1}}},
      {"one_of_two_rows_in_key_block", 1, 257, 1, 1, 8, 8, {{0, 0, 1}, {0, 256, 257}}},
      {"chunks", 2, 640, 2, 1, 16, 16, {{0, 128, 256}, {0, 512, 640}, {1, 0, 128}, {1, 256, 384}}},
      {"different", 3, 333, 3, 3, 24, 24, {{0, 17, 40}, {0, 41, 42}, {0, 100, 333}, {2, 332, 333}}},
      {"out_of_order", 2, 90, 2, 2, 8, 8, {{1, 60, 90}, {0, 5, 20}, {1, 0, 12}, {0, 50, 51}}},
      {"grouped", 2, 150, 6, 2, 16, 16, {{0, 0, 150}, {1, 149, 150}}},
      {"one_key_head", 2, 140, 5, 1, 16, 16, {{0, 70, 140}, {1, 100, 103}}},
      {"wide_group", 1, 30, 72, 1, 8, 8, {{0, 10, 30}}},
      {"unequal_dims", 2, 130, 2, 2, 24, 40, {{0, 0, 130}, {1, 129, 130}}},
      {"odd_dims", 2, 300, 4, 2, 13, 7, {{0, 250, 300}, {1, 280, 281}}},
  };
  return all;
}

class AttentionCase : public testing::TestWithParam<Case> {};

TEST_P(AttentionCase, EqualsTheReferenceInFloat64) {
  const Case& c = GetParam();
  const Inputs in = inputs_of(c);
  const auto got = run(attention, in, c), expected = run(attention_reference, in, c);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].sizes(), expected[i].sizes());
    EXPECT_LT(error(got[i], expected[i]), 1e-12) << "tensor " << i;
  }
  // Without autograd the same numbers come out.
  EXPECT_TRUE(at::equal(attention(in.query, in.key, in.value, tensor_of(c.spans), c.scale()), got[0]));
}

TEST_P(AttentionCase, Float32AndBfloat16AreWithinTheirRounding) {
  const Case& c = GetParam();
  for (const auto& [dtype, limit] : {std::pair{at::kFloat, 2e-6}, std::pair{at::kBFloat16, 4e-3}}) {
    const Inputs in = inputs_of(c, dtype);
    const auto got = run(attention, in.to(dtype), c), expected = run(attention_reference, in, c);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].scalar_type(), dtype);
      EXPECT_LT(error(got[i], expected[i]), limit) << "tensor " << i << ", " << c10::toString(dtype);
    }
  }
}

// Keys past the largest end hold NaN; all tensors are views with odd strides.
TEST_P(AttentionCase, ReadsNothingPastTheEndAndTakesAnyStrides) {
  const Case& c = GetParam();
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Inputs in = inputs_of(c, dtype).to(dtype);
    const auto expected = run(attention, in, c);
    std::vector<int64_t> ends(c.batch, 0);
    for (const auto& span : c.spans) {
      if (span[2] > span[1]) ends[span[0]] = std::max(ends[span[0]], span[2]);
    }
    const auto strided = [&](const at::Tensor& x) {  // head-major, spare capacity, wider rows
      at::Tensor room = at::full({c.batch, c.key_heads, c.capacity + 50, x.size(3) + 3}, NAN, x.options());
      at::Tensor view = room.permute({0, 2, 1, 3}).slice(3, 0, x.size(3));
      for (int64_t b = 0; b < c.batch; ++b) view[b].slice(0, 0, ends[b]).copy_(x[b].slice(0, 0, ends[b]));
      return view;
    };
    const at::Tensor q = in.query.clone().requires_grad_(true), k = strided(in.key).requires_grad_(true),
                     v = strided(in.value).requires_grad_(true);
    const at::Tensor output = attention(q, k, v, tensor_of(c.spans), c.scale());
    EXPECT_TRUE(at::equal(output, expected[0])) << c10::toString(dtype);
    const auto grads = torch::autograd::grad({output}, {q, k, v}, {in.output_grad});
    EXPECT_TRUE(at::equal(grads[0], expected[1]));
    for (int i : {1, 2}) {
      EXPECT_TRUE(at::equal(grads[i].slice(1, 0, c.capacity), expected[i + 1]));
      EXPECT_EQ(grads[i].slice(1, c.capacity).abs().max().item<double>(), 0);
    }
  }
}

TEST_P(AttentionCase, RepeatsBitwiseForAnyNumberOfThreads) {
  const Case& c = GetParam();
  const int threads = at::get_num_threads();
  const Inputs in = inputs_of(c, at::kFloat).to(at::kFloat);
  const auto once = run(attention, in, c), again = run(attention, in, c);
  at::set_num_threads(1);
  const auto alone = run(attention, in, c);
  at::set_num_threads(threads);
  for (size_t i = 0; i < once.size(); ++i) {
    EXPECT_TRUE(at::equal(once[i], again[i])) << "tensor " << i;
    // More threads than sequences and heads split the sums of the key gradients.
    EXPECT_LT(error(once[i], alone[i]), 2e-6) << "tensor " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, AttentionCase, testing::ValuesIn(cases()),
                         [](const auto& each) { return std::string(each.param.name); });

// Many threads on one key head: every thread sums key gradients of its own.
TEST(Attention, SplitsTheBackwardPassWhenThreadsWouldIdle) {
  const Case c = {"", 1, 500, 2, 1, 16, 16, {{0, 0, 200}, {0, 300, 500}}};
  const int threads = at::get_num_threads();
  at::set_num_threads(5);
  const Inputs in = inputs_of(c);
  const auto got = run(attention, in, c), again = run(attention, in, c);
  at::set_num_threads(threads);
  const auto expected = run(attention_reference, in, c);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LT(error(got[i], expected[i]), 1e-12) << "tensor " << i;
    EXPECT_TRUE(at::equal(got[i], again[i]));
  }
}

TEST(Attention, ReferenceAgreesWithFiniteDifferences) {
  const Case c = {"", 2, 11, 4, 2, 6, 5, {{0, 3, 11}, {1, 10, 11}}};
  const Inputs in = inputs_of(c);
  for (const Function function : {attention, attention_reference}) {
    const auto grads = run(function, in, c);
    const auto loss = [&](const Inputs& x) {
      return (function(x.query, x.key, x.value, tensor_of(c.spans), c.scale()) * in.output_grad)
          .sum()
          .item<double>();
    };
    const double step = 1e-5;
    at::Tensor Inputs::*const members[] = {&Inputs::query, &Inputs::key, &Inputs::value};
    for (int i = 0; i < 3; ++i) {
      const at::Tensor direction = at::randn_like(in.*members[i]);
      Inputs up = in, down = in;
      up.*members[i] = in.*members[i] + step * direction;
      down.*members[i] = in.*members[i] - step * direction;
      const double slope = (grads[i + 1] * direction).sum().item<double>();
      EXPECT_NEAR((loss(up) - loss(down)) / (2 * step), slope, 1e-6 * (1 + std::abs(slope)));
    }
  }
}

// A sequence computed whole, in random pieces and token by token.
TEST(Attention, WholeEqualsPieces) {
  std::mt19937 random(3);
  for (const auto& [dtype, limit] :
       {std::pair{at::kDouble, 1e-13}, std::pair{at::kFloat, 2e-6}, std::pair{at::kBFloat16, 4e-3}}) {
    const Case c = {"", 1, 400, 4, 2, 16, 16, {{0, 0, 400}}};
    const Inputs in = inputs_of(c, dtype).to(dtype);
    const auto part = [&](int64_t begin, int64_t end) {
      return attention(in.query.slice(0, begin, end), in.key, in.value, tensor_of({{0, begin, end}}),
                       c.scale());
    };
    const at::Tensor whole = part(0, 400);
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::vector<at::Tensor> pieces;
      for (int64_t begin = repeat == 2 ? 250 : 0; begin < 400;) {
        const int64_t end = std::min<int64_t>(
            400, begin + 1 + random() % (repeat == 2 ? 1 : 150));  // the third time row by row
        pieces.push_back(part(begin, end));
        begin = end;
      }
      EXPECT_LT(error(at::cat(pieces), whole.slice(0, repeat == 2 ? 250 : 0)), limit);
    }
  }
}

// Neighbours in the batch change nothing, whatever path they take.
TEST(Attention, BatchedEqualsAlone) {
  const Case c = {"", 3, 310, 2, 2, 16, 16, {{0, 20, 300}, {1, 309, 310}, {2, 0, 64}, {2, 200, 203}}};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Inputs in = inputs_of(c, dtype).to(dtype);
    const at::Tensor together = attention(in.query, in.key, in.value, tensor_of(c.spans), c.scale());
    int64_t row = 0;
    for (int64_t b = 0; b < 3; ++b) {
      Spans own;
      int64_t rows = 0;
      for (const auto& span : c.spans) {
        if (span[0] == b) own.push_back({0, span[1], span[2]}), rows += span[2] - span[1];
      }
      const at::Tensor alone = attention(in.query.slice(0, row, row + rows), in.key.slice(0, b, b + 1),
                                         in.value.slice(0, b, b + 1), tensor_of(own), c.scale());
      EXPECT_TRUE(at::equal(alone, together.slice(0, row, row + rows)));
      row += rows;
    }
  }
}

// Scores far apart: the running maximum rises by hundreds from one key block to the next, or falls.
TEST(Attention, SurvivesExtremeScores) {
  for (const double sign : {1.0, -1.0}) {
    const Case c = {"", 1, 700, 1, 1, 8, 8, {{0, 0, 699}, {0, 699, 700}}};
    Inputs in = inputs_of(c, at::kFloat);
    in.query.fill_(30);
    in.key.mul_(0.01).add_(sign * at::linspace(0, 10, 700, at::kDouble).view({1, 700, 1, 1}));
    in.key = in.key.to(at::kFloat).to(at::kDouble);
    const auto got = run(attention, in.to(at::kFloat), c), expected = run(attention_reference, in, c);
    EXPECT_LT(error(got[0], expected[0]), 1e-4);  // scores near 850 carry 5e-5 in float32
    EXPECT_TRUE(at::isfinite(got[0]).all().item<bool>());
    for (size_t i = 1; i < 4; ++i) EXPECT_TRUE(at::isfinite(got[i]).all().item<bool>());
  }
}

TEST(Attention, IsRegistered) {
  const Case& c = cases()[0];
  const Inputs in = inputs_of(c);
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("oryx::attention", "")
                      .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                        const at::Tensor&, double)>();
  const at::Tensor spans = tensor_of(c.spans);
  EXPECT_TRUE(at::equal(op.call(in.query, in.key, in.value, spans, c.scale()),
                        attention(in.query, in.key, in.value, spans, c.scale())));
}

TEST(Attention, NamesWhatIsWrong) {
  const Case& c = cases()[0];
  const Inputs in = inputs_of(c);
  const auto message = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const Spans& spans) {
    try {
      attention(q, k, v, tensor_of(spans), 1.0);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(message(in.query, in.key, in.value, {{0, 0, 71}}).find("(0, 0, 71)"), std::string::npos);
  EXPECT_NE(message(in.query, in.key, in.value, {{2, 0, 70}}).find("(2, 0, 70)"), std::string::npos);
  EXPECT_NE(message(in.query, in.key, in.value, {{0, 0, 70}}).find("70 query rows"), std::string::npos);
  EXPECT_NE(message(in.query, in.key.to(at::kFloat), in.value, c.spans).find("one dtype"), std::string::npos);
  EXPECT_NE(message(in.query, in.key.slice(3, 0, 8), in.value, c.spans).find("expected key"),
            std::string::npos);
  EXPECT_NE(message(in.query.slice(1, 0, 1), in.key, in.value, c.spans).find("multiple of the 2"),
            std::string::npos);
}

}  // namespace
}  // namespace oryx::operators
