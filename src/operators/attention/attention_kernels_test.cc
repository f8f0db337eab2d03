#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "operators/attention/attention.h"
#include "operators/attention/attention_cuda.h"
#include "operators/device/device_testing.h"
#include "operators/testing.h"
#ifdef ORYX_EMULATED
#include "operators/device/warpgroup.h"
#endif

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Spans = std::vector<std::array<int64_t, 3>>;

at::Tensor tensor_of(const Spans& spans) {
  at::Tensor result = at::empty({static_cast<int64_t>(spans.size()), 3}, at::kLong);
  for (size_t i = 0; i < spans.size(); ++i) {
    for (int64_t j = 0; j < 3; ++j) result[i][j] = spans[i][j];
  }
  return result;
}

// While it lives, at::empty() gives NaN.
class PoisonedMemory {
 public:
  PoisonedMemory() { at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true); }
  ~PoisonedMemory() { at::globalContext().setDeterministicAlgorithms(false, false); }
};

struct Case {
  const char* name;
  int64_t batch, capacity, query_heads, key_heads, dim;
  Spans spans;

  int64_t rows() const {
    int64_t total = 0;
    for (const auto& span : spans) total += span[2] - span[1];
    return total;
  }
  std::vector<int64_t> ends() const {
    std::vector<int64_t> result(batch, 0);
    for (const auto& span : spans) {
      if (span[2] > span[1]) result[span[0]] = std::max(result[span[0]], span[2]);
    }
    return result;
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(dim)); }
};

struct Inputs {
  at::Tensor query, key, value, output_grad;
};

// bfloat16 on the kernels' device; keys and values hold NaN past the end of what is used.
Inputs inputs_of(const Case& c, uint64_t seed = 1) {
  at::manual_seed(seed);
  const auto make = [&](at::IntArrayRef sizes) {
    return at::randn(sizes, at::kDouble).to(at::kBFloat16).to(kernel_device());
  };
  Inputs in{make({c.rows(), c.query_heads, c.dim}), make({c.batch, c.capacity, c.key_heads, c.dim}),
            make({c.batch, c.capacity, c.key_heads, c.dim}), make({c.rows(), c.query_heads, c.dim})};
  const std::vector<int64_t> ends = c.ends();
  for (int64_t b = 0; b < c.batch; ++b) {
    in.key[b].slice(0, ends[b]).fill_(NAN);
    in.value[b].slice(0, ends[b]).fill_(NAN);
  }
  return in;
}

// Output, log-sum-exp and gradients in float64.
std::vector<at::Tensor> expected(const Case& c, const Inputs& in, bool with_gradients) {
  const auto leaf = [&](const at::Tensor& x) {
    return x.to(at::kDouble).nan_to_num(0).detach().set_requires_grad(with_gradients);
  };
  const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value), spans = tensor_of(c.spans);
  std::vector<at::Tensor> sums;
  int64_t row = 0;
  for (const auto& [sequence, begin, end] : c.spans) {
    const at::Tensor scores =
        c.scale() * at::matmul(q.detach().slice(0, row, row + end - begin).transpose(0, 1),
                               k.detach()[sequence].slice(0, 0, end).permute({1, 2, 0}).repeat_interleave(
                                   c.query_heads / c.key_heads, 0));
    const at::Tensor later = at::ones({end - begin, end}, q.options().dtype(at::kBool)).triu(begin + 1);
    sums.push_back(scores.masked_fill(later, -INFINITY).logsumexp(-1).t());
    row += end - begin;
  }
  const at::Tensor output = attention_reference(q, k, v, spans, c.scale());
  std::vector<at::Tensor> result{output.detach(),
                                 sums.empty() ? at::empty({0, c.query_heads}, q.options()) : at::cat(sums)};
  if (with_gradients) {
    for (const at::Tensor& grad : testing::gradients({output}, {q, k, v}, {in.output_grad.to(at::kDouble)}))
      result.push_back(grad);
  }
  return result;
}

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"none", 2, 70, 1, 1, 64, {}},
      {"all", 1, 200, 1, 1, 128, {{0, 0, 200}}},
      {"all_of_dim_64", 2, 130, 2, 1, 64, {{0, 0, 130}, {1, 0, 130}}},
      {"last_chunk", 2, 384, 1, 1, 128, {{0, 256, 384}, {1, 256, 384}}},
      {"chunks", 2, 512, 1, 1, 64, {{0, 128, 256}, {0, 384, 512}, {1, 0, 128}}},
      {"odd_cuts", 2, 200, 2, 2, 64, {{0, 3, 20}, {0, 31, 32}, {0, 100, 171}, {1, 63, 66}, {1, 127, 130}}},
      {"out_of_order", 2, 90, 1, 1, 64, {{1, 60, 90}, {0, 5, 20}, {1, 0, 12}, {0, 50, 51}, {0, 0, 3}}},
      {"grouped", 1, 140, 6, 2, 64, {{0, 70, 140}}},
      {"many_steps_of_a_key", 1, 200, 9, 1, 64, {{0, 10, 131}}},
      {"spare_room", 3, 300, 1, 1, 128, {{0, 0, 65}, {2, 80, 100}}},
      {"one_row", 2, 70, 2, 1, 128, {{0, 63, 64}, {1, 64, 65}}},
      {"decode_groups_of_3", 3, 600, 6, 2, 64, {{0, 599, 600}, {1, 0, 1}, {2, 255, 256}}},
      {"decode_groups_of_9", 1, 300, 9, 1, 128, {{0, 260, 261}}},
      {"decode_long", 1, 8300, 1, 1, 64, {{0, 8192, 8193}}},
      {"decode_beside_a_prompt", 3, 300, 2, 2, 64, {{0, 270, 271}, {1, 17, 60}, {2, 0, 1}}},
  };
  if (!testing::wants_small_cases()) {
    std::mt19937 random(5);
    const auto chunks = [&](const char* name, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                            int one_in) {
      Case c{name, batch, time, heads, heads, dim, {}};
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t t = 0; t < time; t += 128) {
          if (random() % one_in == 0) c.spans.push_back({b, t, std::min(t + 128, time)});
        }
      }
      all.push_back(c);
    };
    chunks("training_128", 8, 2048, 16, 128, 4);
    chunks("training_64", 8, 2048, 16, 64, 4);
    chunks("long", 1, 8192, 2, 128, 4);
    chunks("everything", 2, 2048, 4, 128, 1);
    chunks("odd_time", 3, 333, 16, 128, 1);
  }
  return all;
}

// While it lives, backward has this much room for the gradients of scores.
class ScoreGradientRoom {
 public:
  explicit ScoreGradientRoom(int64_t bytes) : usual_(std::exchange(most_score_gradient_bytes, bytes)) {}
  ~ScoreGradientRoom() { most_score_gradient_bytes = usual_; }

 private:
  int64_t usual_;
};

class AttentionKernels : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionKernels, ForwardEqualsTheReference) {
  const Case& c = GetParam();
  const Inputs in = inputs_of(c);
  const at::Tensor spans = tensor_of(c.spans);
  const auto want = expected(c, in, false);
  const auto got = testing::with_kernels([&] {
    const PoisonedMemory poisoned;
    const auto [output, logsumexp] = attention_rows(in.query, in.key, in.value, spans, c.scale(), true);
    return std::vector<at::Tensor>{output, logsumexp};
  });
  EXPECT_LE(relative_error(got[0], want[0]), 4e-3);
  if (c.rows() == 0) return;
  EXPECT_LE((got[1].to(at::kDouble) - want[1]).abs().max().item<double>(), 1e-3);
}

TEST_P(AttentionKernels, GradientsEqualTheReference) {
  const Case& c = GetParam();
  const Inputs in = inputs_of(c);
  const at::Tensor spans = tensor_of(c.spans);
  const auto want = expected(c, in, true);
  for (const auto& [way, room] :
       {std::pair{AttentionWay::rows, most_score_gradient_bytes}, std::pair{AttentionWay::rows, int64_t{0}},
        std::pair{AttentionWay::dense, most_score_gradient_bytes}}) {
    const ScoreGradientRoom score_gradient_room(room);
    const std::vector<int64_t> ends = c.ends();
    const bool is_alike = std::count(ends.begin(), ends.end(), ends[0]) == c.batch;
    // Decoding never takes the dense way.
    if (way == AttentionWay::dense && (!is_alike || c.rows() <= c.batch)) continue;
    const auto got = testing::with_kernels([&, chosen = way] {
      const PoisonedMemory poisoned;
      const auto leaf = [](const at::Tensor& x) { return x.detach().set_requires_grad(true); };
      const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
      const at::Tensor output = attention_cuda(q, k, v, spans, c.scale(), chosen);
      std::vector<at::Tensor> result = testing::gradients({output}, {q, k, v}, {in.output_grad});
      result.push_back(output.detach());
      return result;
    });
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(got[i].sizes(), want[i + 2].sizes());
      EXPECT_LE(relative_error(got[i], want[i + 2]), 5e-3)
          << "gradient " << i << ", dense: " << (way == AttentionWay::dense) << ", room " << room;
    }
    EXPECT_LE(relative_error(got[3], want[0]), 4e-3);
  }
}

// Without gradients, through the operator: the same bits as with, cache views included.
TEST_P(AttentionKernels, TakesViewsOfACache) {
  const Case& c = GetParam();
  const Inputs in = inputs_of(c);
  const at::Tensor spans = tensor_of(c.spans);
  const auto view = [&](const at::Tensor& x) {  // head-major, with room for more positions and heads
    at::Tensor room = at::full({c.batch, c.key_heads + 1, c.capacity + 9, c.dim}, NAN, x.options());
    at::Tensor result = room.slice(1, 1).permute({0, 2, 1, 3}).slice(1, 0, c.capacity);
    return result.copy_(x);
  };
  const at::Tensor key = view(in.key), value = view(in.value);
  const auto got = testing::with_kernels([&] {
    return std::vector<at::Tensor>{
        attention_cuda(in.query, in.key, in.value, spans, c.scale(), AttentionWay::rows),
        attention_cuda(in.query, key, value, spans, c.scale(), AttentionWay::rows)};
  });
  EXPECT_TRUE(at::equal(got[0], got[1]));
}

// Backward with room for the gradients of the scores of all heads (the other tests), of one at a time, of
// none.
TEST(AttentionScratch, ChangesOnlyRounding) {
  for (const int64_t dim : {64, 128}) {
    const Case c{"", 2, 300, 4, 2, dim, {{0, 40, 300}, {1, 100, 171}, {1, 200, 201}}};
    const Inputs in = inputs_of(c);
    const auto want = expected(c, in, true);
    for (const int64_t bytes : {600 * 1024, 0}) {
      const ScoreGradientRoom room(bytes);
      const auto got = testing::with_kernels([&] {
        const PoisonedMemory poisoned;
        const auto leaf = [](const at::Tensor& x) { return x.detach().set_requires_grad(true); };
        const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
        const at::Tensor output = attention_cuda(q, k, v, tensor_of(c.spans), c.scale(), AttentionWay::rows);
        return testing::gradients({output}, {q, k, v}, {in.output_grad});
      });
      for (int i = 0; i < 3; ++i)
        EXPECT_LE(relative_error(got[i], want[i + 2]), 5e-3) << dim << " " << bytes << " " << i;
    }
  }
}

#ifdef ORYX_EMULATED
// As on a GPU without wgmma.
TEST(AttentionWithoutWarpgroupProducts, EqualsTheReference) {
  for (const int64_t dim : {64, 128}) {
    const Case c{"", 2, 280, 2, 1, dim, {{0, 70, 270}, {1, 0, 3}, {1, 128, 140}}};
    const Inputs in = inputs_of(c);
    const auto want = expected(c, in, true);
    device::has_warpgroup_products = false;
    device::emulator::largest_shared_memory = 99 * 1024;
    const auto got = testing::with_kernels([&] {
      const auto leaf = [](const at::Tensor& x) { return x.detach().set_requires_grad(true); };
      const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
      const at::Tensor output = attention_cuda(q, k, v, tensor_of(c.spans), c.scale(), AttentionWay::rows);
      std::vector<at::Tensor> result = testing::gradients({output}, {q, k, v}, {in.output_grad});
      result.push_back(output.detach());
      return result;
    });
    device::has_warpgroup_products = true;
    device::emulator::largest_shared_memory = 227 * 1024;
    for (int i = 0; i < 3; ++i) EXPECT_LE(relative_error(got[i], want[i + 2]), 5e-3) << "gradient " << i;
    EXPECT_LE(relative_error(got[3], want[0]), 4e-3);
  }
}
#endif

INSTANTIATE_TEST_SUITE_P(Cases, AttentionKernels, ::testing::ValuesIn(cases()),
                         [](const auto& each) { return std::string(each.param.name); });

// float32 decodes by a kernel too.
TEST(AttentionDecode, Float32) {
  for (const int64_t dim : {64, 128}) {
    const Case c{"", 3, 700, 4, 2, dim, {{0, 699, 700}, {1, 3, 4}, {2, 256, 257}}};
    Inputs in = inputs_of(c);
    const auto want = expected(c, in, false);
    const auto got = testing::with_kernels([&] {
      return std::vector<at::Tensor>{attention_cuda(in.query.to(at::kFloat), in.key.to(at::kFloat),
                                                    in.value.to(at::kFloat), tensor_of(c.spans), c.scale())};
    });
    EXPECT_LE(relative_error(got[0], want[0]), 2e-6);
  }
}

// Other dtypes, head dimensions and unequal ones take composed operations.
TEST(AttentionComposed, EqualsTheReference) {
  const Case c{"", 3, 90, 4, 2, 24, {{2, 60, 90}, {0, 5, 20}, {2, 0, 12}, {0, 50, 51}}};
  const Inputs in = inputs_of(c);
  const auto want = expected(c, in, true);
  for (const auto& [dtype, limit] :
       {std::pair{at::kDouble, 1e-12}, std::pair{at::kFloat, 1e-5}, std::pair{at::kBFloat16, 5e-3}}) {
    const auto leaf = [type = dtype](const at::Tensor& x) {
      return x.to(type).detach().set_requires_grad(true);
    };
    const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
    const at::Tensor output = attention_composed(q, k, v, tensor_of(c.spans), c.scale());
    EXPECT_EQ(output.scalar_type(), dtype);
    EXPECT_LE(relative_error(output.detach(), want[0]), limit);
    const auto grads = testing::gradients({output}, {q, k, v}, {in.output_grad.to(dtype)});
    for (int i = 0; i < 3; ++i) EXPECT_LE(relative_error(grads[i], want[i + 2]), limit) << i;
  }
}

// A row's bits depend neither on how its sequence was cut nor on its neighbours.
TEST(AttentionForward, CutsChangeNothing) {
  const Case c{"", 1, 200, 1, 1, 64, {{0, 0, 200}}};
  const Inputs in = inputs_of(c);
  const auto got = testing::with_kernels([&] {
    const auto part = [&](int64_t begin, int64_t end) {
      return attention_cuda(in.query.slice(0, begin, end), in.key, in.value, tensor_of({{0, begin, end}}),
                            c.scale(), AttentionWay::rows);
    };
    return std::vector<at::Tensor>{part(0, 200), at::cat({part(0, 37), part(37, 130), part(130, 200)})};
  });
  EXPECT_TRUE(at::equal(got[0], got[1]));
}

// … nor on how many heads there are, and with them how wide the items are.
TEST(AttentionForward, HeadsChangeNothing) {
  const Case c{"", 2, 400, 8, 8, 64, {{0, 0, 130}, {0, 260, 400}, {1, 20, 90}}};
  const Inputs in = inputs_of(c);
  const auto got = testing::with_kernels([&] {
    const auto heads = [&](int64_t begin, int64_t end) {
      const auto part = [&](const at::Tensor& x) { return x.slice(-2, begin, end).contiguous(); };
      return attention_cuda(part(in.query), part(in.key), part(in.value), tensor_of(c.spans), c.scale(),
                            AttentionWay::rows);
    };
    return std::vector<at::Tensor>{heads(0, 8).slice(1, 0, 3), heads(0, 1), heads(1, 2), heads(2, 3)};
  });
  EXPECT_TRUE(at::equal(got[0], at::cat({got[1], got[2], got[3]}, 1)));
}

// Scores far apart: the running maximum rises by hundreds from one tile of keys to the next, or falls.
TEST(AttentionForward, SurvivesExtremeScores) {
  for (const double sign : {1.0, -1.0}) {
    const Case c{"", 1, 260, 1, 1, 64, {{0, 100, 259}, {0, 259, 260}}};
    Inputs in = inputs_of(c);
    in.query.fill_(8);
    in.key.mul_(0.01).add_(
        (sign * at::linspace(0, 10, 260)).to(kernel_device()).to(at::kBFloat16).view({1, 260, 1, 1}));
    const auto want = expected(c, in, false);
    const auto got = testing::with_kernels([&] {
      const auto [output, logsumexp] =
          attention_rows(in.query, in.key, in.value, tensor_of(c.spans), c.scale(), true);
      return std::vector<at::Tensor>{output, logsumexp};
    });
    EXPECT_LE(relative_error(got[0], want[0]), 4e-3);
    EXPECT_LE(relative_error(got[1], want[1]), 1e-5);
  }
}

// In training, most of the tokens of sequences of one length: all are computed. A few, or sequences of
// different lengths, or no gradients: rows.
TEST(AttentionWays, TheFasterIsTaken) {
  const auto same_as = [](const Spans& spans, AttentionWay way, bool needs_grad = true) {
    const Case c{"", 2, 256, 1, 1, 64, spans};
    Inputs in = inputs_of(c);
    in.query.set_requires_grad(needs_grad);
    const auto got = testing::with_kernels([&] {
      const at::Tensor table = tensor_of(spans);
      return std::vector<at::Tensor>{attention_cuda(in.query, in.key, in.value, table, c.scale()),
                                     attention_cuda(in.query, in.key, in.value, table, c.scale(), way)};
    });
    return at::equal(got[0], got[1]);
  };
  EXPECT_TRUE(same_as({{0, 0, 200}, {1, 0, 200}}, AttentionWay::dense));
  EXPECT_TRUE(same_as({{0, 0, 256}, {1, 128, 256}}, AttentionWay::dense));
  EXPECT_TRUE(same_as({{0, 0, 256}, {1, 128, 256}}, AttentionWay::rows, /*needs_grad=*/false));
  EXPECT_TRUE(same_as({{0, 0, 128}, {0, 128, 256}, {1, 0, 128}}, AttentionWay::rows));
  EXPECT_TRUE(same_as({{0, 128, 256}, {1, 255, 256}}, AttentionWay::rows));
  EXPECT_TRUE(same_as({{0, 0, 200}, {0, 0, 200}, {1, 0, 200}}, AttentionWay::rows));  // tokens twice
}

#ifndef ORYX_EMULATED
void expect_same_bits(const Case& c) {
  const Inputs in = inputs_of(c);
  const at::Tensor spans = tensor_of(c.spans);
  std::vector<at::Tensor> first;
  for (int repeat = 0; repeat < 200; ++repeat) {
    const auto leaf = [](const at::Tensor& x) { return x.nan_to_num(0).detach().set_requires_grad(true); };
    const at::Tensor q = leaf(in.query), k = leaf(in.key), v = leaf(in.value);
    const at::Tensor output = attention_cuda(q, k, v, spans, c.scale(), AttentionWay::rows);
    std::vector<at::Tensor> got = testing::gradients({output}, {q, k, v}, {in.output_grad});
    got.push_back(output.detach());
    if (repeat == 0) first = got;
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_TRUE(at::equal(got[i], first[i])) << repeat << ", tensor " << i;
  }
}
TEST(AttentionKernelsOnGpu, RepeatBitwise) {
  for (const int64_t room : {most_score_gradient_bytes, int64_t{0}}) {
    const ScoreGradientRoom score_gradient_room(room);
    for (const int64_t dim : {64, 128}) {
      expect_same_bits({"", 4, 1024, 8, 4, dim, {{0, 128, 512}, {1, 0, 1024}, {2, 896, 1024}, {3, 77, 78}}});
      expect_same_bits({"many steps", 1, 2048, 8, 4, dim, {{0, 128, 512}, {0, 700, 1900}}});
    }
  }
}
#endif

}  // namespace
}  // namespace oryx::operators
