// What the kernels of attention share.
#pragma once

#include <algorithm>

#include "operators/attention/attention_kernels.h"
#include "operators/device/pipeline.h"
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

// Zero, which the compiler does not know: what is computed from it stays where it is used instead of filling
// registers throughout a loop.
__device__ inline int hidden_zero() {
  int zero = 0;
#ifndef ORYX_EMULATED
  asm volatile("" : "+r"(zero));
#endif
  return zero;
}

// The same by warp `warp` of `warps`, lane by lane: eight lanes a row of a panel.
template <int warps, int rows, int columns>
__device__ inline void load_rows_by_warps(int warp, Panels<rows, columns> tile, int valid, const bf16* first,
                                          int64_t stride) {
  constexpr int step = 4 * warps;
  static_assert(rows % (2 * step) == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32 + hidden_zero(), row = 4 * warp + lane / 8,
            column = lane % 8 * 8;
  const bf16* source = first + row * stride + column;
  // Rows `step` apart, and again: where they are four apart the swizzle goes back and forth.
  bf16* const targets[2] = {tile.unit(row, column), tile.unit(row + step, column)};
#pragma unroll
  for (int i = 0; i < rows / step; ++i, source += step * stride)
#pragma unroll
    for (int panel = 0; panel < columns / 64; ++panel) {
      copy_async(targets[i % 2] + (i / 2 * 2 * step + panel * rows) * 64, source + panel * 64,
                 row + i * step < valid);
    }
}

// The pieces of work, longest first, that a block of a grid of so many takes: rounds of one each, every other
// one backwards, so that the sums are even.
struct Share {
  int total, block, blocks, begin = 0;
  bool is_backward = false;

  __device__ explicit Share(int all)
      : total(all), block(static_cast<int>(blockIdx.x)), blocks(static_cast<int>(gridDim.x)) {}
  __device__ int index() const { return begin + (is_backward ? blocks - 1 - block : block); }
  __device__ bool has_work() const { return index() < total; }
  __device__ void next() { begin += blocks, is_backward = !is_backward; }
};

// Rounds a warp's 16 rows of a result and copies them to global memory, through the same rows of a tile that
// nobody reads any more, so that rows are written whole. row_pointer(row) is null where nothing is to be
// written.
template <int rows, int columns, typename RowPointer>
__device__ inline void store_rows(const Accumulator<1, columns / 8>& values, Panels<rows, columns> tile,
                                  int row0, RowPointer row_pointer) {
  constexpr int units = columns / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32 + hidden_zero();
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

// Where a thread's rows and their neighbours stand. Rows past the item's end stand where its last row does.
struct RowPositions {
  int position[2];
  int first, last;  // the first of the warp's rows and the last of the warpgroup's, or -1 if that has none

  __device__ RowPositions(const int* positions, const QueryItem& item, int group_row0, int row0) {
    positions += item.row;
    first = row0 < item.rows ? positions[row0] : item.last;
    last = group_row0 < item.rows ? positions[std::min(group_row0 + 64, item.rows) - 1] : -1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
      position[half] = row < item.rows ? positions[row] : item.last;
    }
  }
};

// Rows of a strided tensor of keys or values.
__device__ inline const bf16* rows_of(const void* tensor, const int64_t (&strides)[3], int64_t sequence,
                                      int64_t head) {
  return static_cast<const bf16*>(tensor) + sequence * strides[0] + head * strides[2];
}

}  // namespace oryx::cuda
