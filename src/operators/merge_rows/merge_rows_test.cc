#include "operators/merge_rows/merge_rows.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace oryx::operators {
namespace {

TEST(MergeRows, InvertsSelection) {
  const at::Tensor whole = at::randn({7, 2, 3}, at::kDouble);
  const at::Tensor first = at::tensor({5, 0, 2}, at::kLong), second = at::tensor({1, 3, 4, 6}, at::kLong);
  const at::Tensor merged =
      merge_rows({whole.index_select(0, first), whole.index_select(0, second)}, {first, second}, 7);
  EXPECT_TRUE(merged.equal(whole));
}

TEST(MergeRows, GradientsGoBackToTheirRows) {
  const at::Tensor first = at::tensor({2, 0}, at::kLong), second = at::tensor({1}, at::kLong);
  at::Tensor a = at::randn({2, 3}, at::kDouble).requires_grad_(), b = at::randn({1, 3}, at::kDouble);
  b.requires_grad_();
  const at::Tensor upstream = at::randn({3, 3}, at::kDouble);
  merge_rows({a, b}, {first, second}, 3).backward(upstream);
  EXPECT_TRUE(a.grad().equal(upstream.index_select(0, first)));
  EXPECT_TRUE(b.grad().equal(upstream.index_select(0, second)));
}

TEST(MergeRows, RejectsMissingRows) {
  const at::Tensor rows = at::tensor({0, 1}, at::kLong);
  EXPECT_THROW(merge_rows({at::zeros({2, 3})}, {rows}, 3), Error);
}

TEST(WriteRows, WritesItsRowsAlone) {
  const at::Tensor before = at::randn({5, 2}), part = at::randn({2, 2});
  const at::Tensor rows = at::tensor({3, 0}, at::kLong);
  const at::Tensor whole = before.clone();
  write_rows(whole, rows, part);
  EXPECT_TRUE(whole.index_select(0, rows).equal(part));
  const at::Tensor others = at::tensor({1, 2, 4}, at::kLong);
  EXPECT_TRUE(whole.index_select(0, others).equal(before.index_select(0, others)));
}

TEST(WriteRows, RejectsOtherShapes) {
  const at::Tensor rows = at::tensor({0, 1}, at::kLong);
  EXPECT_THROW(write_rows(at::zeros({4, 3}), rows, at::zeros({3, 3})), Error);
  EXPECT_THROW(write_rows(at::zeros({4, 3}), rows, at::zeros({2, 2})), Error);
  EXPECT_THROW(write_rows(at::zeros({3, 4}).t(), rows, at::zeros({2, 3})), Error);
}

}  // namespace
}  // namespace oryx::operators
