#include "operators/device/device_test_kernels.h"

#include "operators/device/warpgroup.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) tile_product_kernel(const TileProduct p) {
  char* shared = shared_memory();
  const Tile<64> a{reinterpret_cast<bf16*>(shared)}, b{a.base + 64 * 64};
  const auto rows_of = [](const void* matrix) {
    return [matrix](int row) { return static_cast<const bf16*>(matrix) + row * 64; };
  };
  load_tile<64, 64, kThreads>(a, 64, rows_of(p.a));
  load_tile<64, 64, kThreads>(b, 64, rows_of(p.b));
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32, m0 = 16 * warp;
  Accumulator<1, 8> sum;
  sum.clear();
  if (p.registers) {
    Accumulator<1, 8> left;
    left.for_pairs([&](int row, int column, float& first, float& second) {
      const float2 pair = a.load2(m0 + row, column);
      first = pair.x, second = pair.y;
    });
    multiply_registers<Layout::transposed, 4>(sum, left, b, 0, 0);
  } else if (p.transpose_a && p.transpose_b) {
    multiply<Layout::transposed, Layout::transposed>(sum, a, m0, b, 0, 0, 64);
  } else if (p.transpose_a) {
    multiply<Layout::transposed, Layout::plain>(sum, a, m0, b, 0, 0, 64);
  } else if (p.transpose_b) {
    multiply<Layout::plain, Layout::transposed>(sum, a, m0, b, 0, 0, 64);
  } else {
    multiply<Layout::plain, Layout::plain>(sum, a, m0, b, 0, 0, 64);
  }
  sum.for_pairs([&](int row, int column, float& first, float& second) {
    p.c[(m0 + row) * 64 + column] = first;
    p.c[(m0 + row) * 64 + column + 1] = second;
  });
}

__global__ void __launch_bounds__(256) warpgroup_products_kernel(const WarpgroupProducts p) {
  const Panels<128, 128> a{reinterpret_cast<bf16*>(shared_memory())};
  const Panels<64, 128> b{a.base + 128 * 128};
  const auto load = [](auto tile, int rows, const void* matrix) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * 16; i += 256)
      copy_async(tile.unit(i / 16, i % 16 * 8), static_cast<const bf16*>(matrix) + i * 8);
  };
  load(a, 128, p.a);
  load(b, 64, p.b);
  commit_copies();
  wait_copies<0>();
  publish_to_products();
  __syncthreads();

  const int m0 = warpgroup() * 64;
  Accumulator<1, 8> rows;
  Accumulator<1, 16> columns;
  columns.clear();
  warpgroup_fence();
  multiply_rows(rows, a, m0, b);
  warpgroup_commit();
  warpgroup_wait<0>();
  settle(rows);
  uint32_t left[4][4];
  as_operand(left, rows);
  warpgroup_fence();
  multiply_columns(columns, left, b);
  warpgroup_commit();
  warpgroup_wait<0>();
  settle(columns);
  // The same rows with A in registers, the first of them in a narrow product, and transposed in registers.
  uint32_t operand[8][4];
  const int lane = static_cast<int>(threadIdx.x) % 32, row0 = m0 + 16 * warp_of_group();
#pragma unroll
  for (int k = 0; k < 8; ++k) load_matrices(operand[k], a.unit(row0 + lane % 16, 16 * k + lane / 16 * 8));
  Accumulator<1, 8> from_registers;
  Accumulator<1, 4> narrow;
  warpgroup_fence();
  multiply_rows(from_registers, operand, b);
  multiply_rows(narrow, a, m0, b);
  warpgroup_commit();
  warpgroup_wait<0>();
  settle(from_registers);
  settle(narrow);
  for (int j = 0; j < 8; ++j) {
    for (int half = 0; half < 2; ++half) {
      const float2 pair = unpack(transpose_matrix(left[j / 2][j % 2 * 2 + half]));
      float* target = p.transposed + (8 * j + lane / 4) * 128 + row0 + 8 * half + lane % 4 * 2;
      target[0] = pair.x, target[1] = pair.y;
    }
  }
  const auto store = [&](auto& sum, float* c, int width) {
    sum.for_pairs([&](int row, int column, float& first, float& second) {
      float* target = c + (m0 + 16 * warp_of_group() + row) * width + column;
      target[0] = first, target[1] = second;
    });
  };
  store(rows, p.rows, 64);
  store(columns, p.columns, 128);
  store(from_registers, p.from_registers, 64);
  store(narrow, p.narrow, 32);
}

__global__ void __launch_bounds__(32) tf32_product_kernel(const Tf32Product p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t a[4];
  for (int j = 0; j < 4; ++j) a[j] = to_tf32(p.a[(g + 8 * (j % 2)) * 8 + t + 4 * (j / 2)]);
  float c[4] = {};
  multiply_add_tf32(c, a, to_tf32(p.b[t * 8 + g]), to_tf32(p.b[(t + 4) * 8 + g]));
  for (int j = 0; j < 4; ++j) p.c[(g + 8 * (j / 2)) * 8 + 2 * t + j % 2] = c[j];
}

}  // namespace

void tile_product(const TileProduct& arguments, void* stream) {
  launch<tile_product_kernel>(dim3(1), kThreads, 2 * Tile<64>::bytes(64), stream, arguments);
}

void warpgroup_products(const WarpgroupProducts& arguments, void* stream) {
  launch<warpgroup_products_kernel>(dim3(1), 256, Panels<128, 128>::bytes + Panels<64, 128>::bytes, stream,
                                    arguments);
}

void tf32_product(const Tf32Product& arguments, void* stream) {
  launch<tf32_product_kernel>(dim3(1), 32, 0, stream, arguments);
}

}  // namespace oryx::cuda
