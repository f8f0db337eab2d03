#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "operators/device/device_test_kernels.h"
#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;

TEST(TileProduct, EveryLayout) {
  at::manual_seed(1);
  const at::Tensor a = at::randn({64, 64}).to(at::kBFloat16), b = at::randn({64, 64}).to(at::kBFloat16);
  for (const bool registers : {false, true}) {
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        if (registers && (transpose_a || !transpose_b)) continue;
        const at::Tensor da = a.to(kernel_device()), db = b.to(kernel_device());
        at::Tensor c = at::full({64, 64}, NAN, da.options().dtype(at::kFloat));
        cuda::tile_product(
            {da.data_ptr(), db.data_ptr(), c.data_ptr<float>(), transpose_a, transpose_b, registers},
            cuda::stream(da));
        const at::Tensor wide_a = a.to(at::kDouble), wide_b = b.to(at::kDouble);
        const at::Tensor want = at::mm(transpose_a ? wide_a.t() : wide_a, transpose_b ? wide_b : wide_b.t());
        EXPECT_LE(testing::relative_error(c.cpu(), want), 1e-6) << registers << transpose_a << transpose_b;
      }
    }
  }
}

TEST(WarpgroupProducts, EqualTheReference) {
  at::manual_seed(2);
  const at::Tensor a = at::randn({128, 128}).to(at::kBFloat16), b = at::randn({64, 128}).to(at::kBFloat16);
  const at::Tensor da = a.to(kernel_device()), db = b.to(kernel_device());
  const auto result = [&](int64_t height, int64_t width) {
    return at::full({height, width}, NAN, da.options().dtype(at::kFloat));
  };
  const at::Tensor rows = result(128, 64), columns = result(128, 128), from_registers = result(128, 64),
                   narrow = result(128, 32), transposed = result(64, 128);
  cuda::warpgroup_products(
      {da.data_ptr(), db.data_ptr(), rows.data_ptr<float>(), columns.data_ptr<float>(),
       from_registers.data_ptr<float>(), narrow.data_ptr<float>(), transposed.data_ptr<float>()},
      cuda::stream(da));
  const at::Tensor wide = b.to(at::kDouble);
  EXPECT_LE(testing::relative_error(rows.cpu(), at::mm(a.to(at::kDouble), wide.t())), 1e-6);
  EXPECT_LE(
      testing::relative_error(columns.cpu(), at::mm(rows.cpu().to(at::kBFloat16).to(at::kDouble), wide)),
      1e-6);
  EXPECT_LE(testing::relative_error(from_registers.cpu(), rows.cpu()), 1e-6);
  EXPECT_LE(testing::relative_error(narrow.cpu(), rows.cpu().slice(1, 0, 32)), 1e-6);
  EXPECT_TRUE(at::equal(transposed.cpu(), rows.cpu().to(at::kBFloat16).to(at::kFloat).t()));
}

TEST(Tf32Product, Fragments) {
  const at::Tensor a = at::randn({16, 8}), b = at::randn({8, 8});
  const at::Tensor da = a.to(kernel_device()), db = b.to(kernel_device());
  at::Tensor c = at::full({16, 8}, NAN, da.options());
  cuda::tf32_product({da.data_ptr<float>(), db.data_ptr<float>(), c.data_ptr<float>()}, cuda::stream(da));
  EXPECT_LE(testing::relative_error(c.cpu(), at::mm(a.to(at::kDouble), b.to(at::kDouble))), 1e-3);
}

}  // namespace
}  // namespace oryx::operators
