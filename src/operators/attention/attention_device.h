// What the kernels of attention share.
#pragma once

#include "operators/attention/attention_kernels.h"
#include "operators/device/warpgroup.h"

namespace oryx::cuda {

using namespace device;

// The first element of a row of the packed tensors.
template <int dim, typename T>
__device__ inline T* packed_row(T* tensor, int64_t row, int heads, int head) {
  return tensor + (row * heads + head) * dim;
}

// Copies rows that lie `stride` elements apart with all `threads` threads of the block; those at and past
// `valid` become zero. Asynchronous: commit and wait.
template <int threads, int rows, int columns>
__device__ inline void load_rows(Panels<rows, columns> tile, int valid, const bf16* first, int64_t stride) {
  constexpr int units = columns / 8, step = threads / units;
  static_assert(rows % step == 0 && step % 8 == 0);  // so a thread's units keep their place in the swizzle
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  const bf16* source = first + row * stride + column;
  bf16* const target = tile.unit(row, column);
#pragma unroll
  for (int i = 0; i < rows / step; ++i, source += step * stride)
    copy_async(target + i * step * 64, source, row + i * step < valid);
}

// Rounds a warp's 16 rows of a result and copies them to global memory, through the same rows of a tile that
// nobody reads any more, so that rows are written whole. row_pointer(row) is null where nothing is to be
// written.
template <int rows, int columns, typename RowPointer>
__device__ inline void store_rows(const Accumulator<1, columns / 8>& values, Panels<rows, columns> tile,
                                  int row0, RowPointer row_pointer) {
  constexpr int units = columns / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < units; ++j) {
    tile.store2(row0 + lane / 4, 8 * j + lane % 4 * 2, values.value[0][j][0], values.value[0][j][1]);
    tile.store2(row0 + lane / 4 + 8, 8 * j + lane % 4 * 2, values.value[0][j][2], values.value[0][j][3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * units; i += 32) {
    const int row = row0 + i / units, column = i % units * 8;
    bf16* target = row_pointer(row);
    if (target)
      *reinterpret_cast<uint4*>(target + column) = *reinterpret_cast<const uint4*>(tile.unit(row, column));
  }
}

// Rows of a strided tensor of keys or values.
__device__ inline const bf16* rows_of(const void* tensor, const int64_t (&strides)[3], int64_t sequence,
                                      int64_t head) {
  return static_cast<const bf16*>(tensor) + sequence * strides[0] + head * strides[2];
}

}  // namespace oryx::cuda
