#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "operators/attention/attention.h"
#include "operators/attention/attention_staircase.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

at::Tensor spans_of(const std::vector<std::array<int64_t, 3>>& rows) {
  at::Tensor spans = at::empty({static_cast<int64_t>(rows.size()), 3}, at::kLong);
  for (size_t i = 0; i < rows.size(); ++i)
    for (int j = 0; j < 3; ++j) spans[static_cast<int64_t>(i)][j] = rows[i][static_cast<size_t>(j)];
  return spans;
}

void expect_reference(const at::Tensor& spans, int64_t batch, int64_t time) {
  at::manual_seed(3);
  const int64_t heads = 2, dim = 8;
  const int64_t rows = (spans.select(1, 2) - spans.select(1, 1)).sum().item<int64_t>();
  ASSERT_TRUE(fits_staircase(spans, batch, time));
  const std::vector<at::Tensor> x = testing::leaves(
      {at::randn({rows, heads, dim}, at::kDouble), at::randn({batch, time, heads, dim}, at::kDouble),
       at::randn({batch, time, heads, dim}, at::kDouble)},
      at::kDouble);
  const at::Tensor want = attention_reference(x[0], x[1], x[2], spans, 0.3);
  const at::Tensor cotangent = at::randn(want.sizes(), at::kDouble);
  const std::vector<at::Tensor> gradients = testing::gradients({want}, x, {cotangent});

  const c10::NoGradGuard no_grad;
  const auto [output, logsumexp] = staircase_attention(x[0], x[1], x[2], spans, 0.3);
  EXPECT_LE(testing::relative_error(output, want.detach()), 1e-12);
  const auto [dq, dk, dv] =
      staircase_attention_backward(cotangent, x[0], x[1], x[2], output, logsumexp, spans, 0.3);
  EXPECT_LE(testing::relative_error(dq, gradients[0]), 1e-12);
  EXPECT_LE(testing::relative_error(dk, gradients[1]), 1e-12);
  EXPECT_LE(testing::relative_error(dv, gradients[2]), 1e-12);
}

TEST(Staircase, ChunksThatDifferBetweenSequences) {
  expect_reference(
      spans_of(
          {{0, 128, 256}, {0, 1024, 1152}, {0, 1920, 2048}, {1, 0, 128}, {1, 512, 640}, {1, 1536, 1664}}),
      2, 2048);
}

TEST(Staircase, OddCuts) { expect_reference(spans_of({{0, 3, 5}, {0, 511, 514}, {0, 2000, 2048}}), 1, 2048); }

TEST(Staircase, NobodyInTheRightHalves) { expect_reference(spans_of({{0, 0, 300}}), 1, 2048); }

TEST(Staircase, RefusesShortSequencesAndTokensTwice) {
  EXPECT_FALSE(fits_staircase(spans_of({{0, 0, 128}}), 1, 1024));
  EXPECT_FALSE(fits_staircase(spans_of({{0, 0, 128}, {0, 100, 200}}), 1, 2048));
}

}  // namespace
}  // namespace oryx::operators
