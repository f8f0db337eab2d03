#include "operators/device/device_testing.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

TEST(MergeRowsKernels, ScatterAndGather) {
  at::manual_seed(1);
  const int64_t large = testing::wants_small_cases() ? 40 : 16384;
  const struct {
    int64_t count, heads, dim, parts;
  } cases[] = {{large, 2, 64, 3}, {17, 1, 4, 2}, {17, 1, 2, 2}, {9, 3, 1, 1},
               {33, 1, 16, 18},   {5, 1, 0, 2},  {0, 2, 8, 2}};
  for (const auto& c : cases) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const at::Tensor order = at::randperm(c.count, at::kLong).to(kernel_device());
      Tensors rows, parts;
      int64_t first = 0;
      for (int64_t i = 0; i < c.parts; ++i) {  // the second part is empty where there are three or more
        const int64_t last = i + 1 == c.parts ? c.count
                             : i == 1         ? first
                                              : std::min(c.count, first + 1 + c.count / c.parts);
        rows.push_back(order.slice(0, first, last));
        parts.push_back(at::randn({last - first, c.heads, c.dim}, options).requires_grad_());
        first = last;
      }
      const at::Tensor upstream = at::randn({c.count, c.heads, c.dim}, options);
      const Tensors got = testing::with_kernels([&] {
        const at::Tensor whole = merge_rows(parts, rows, c.count);
        Tensors results = testing::gradients({whole}, parts, {upstream});
        results.push_back(whole.detach());
        return results;
      });
      for (size_t i = 0; i < parts.size(); ++i) {
        EXPECT_TRUE(at::equal(got[i], upstream.index_select(0, rows[i])));
        EXPECT_TRUE(at::equal(got.back().index_select(0, rows[i]), parts[i]));
      }
      const at::Tensor part = parts[0].detach();
      const Tensors written = testing::with_kernels([&] {
        const at::Tensor whole = at::ones({c.count, c.heads, c.dim}, options);
        write_rows(whole, rows[0], part);
        return Tensors{whole};
      });
      const at::Tensor wanted = at::ones({c.count, c.heads, c.dim}, options).index_copy_(0, rows[0], part);
      EXPECT_TRUE(at::equal(written[0], wanted));
    }
  }
}

}  // namespace
}  // namespace oryx::operators
