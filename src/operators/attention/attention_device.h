// What the kernels of attention share.
#pragma once

#include "operators/attention/attention_kernels.h"
#include "operators/device/tile.h"

namespace oryx::cuda {

using namespace device;

// Every block has four warps; two blocks fit a multiprocessor, so that one works while the other waits.
constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / 32;

// The first element of a row of the packed tensors.
template <int dim, typename T>
__device__ inline T* packed_row(T* tensor, int64_t row, int heads, int head) {
  return tensor + (row * heads + head) * dim;
}

// Where this lane reads the fragments of an operand: the address of the first one, from which every other
// follows by constants. multiply() of tile.h computes the swizzle of each, and the compiler keeps all of them
// in registers, which the accumulators need.
template <int columns>
class Fragments {
 public:
  // Of an operand that runs along its rows: A [m][k] from row m0, B [n][k] from row n0.
  static __device__ Fragments a(Tile<columns> tile, int m0) {
    return {tile, m0 + lane() % 16, lane() / 16 * 8};
  }
  static __device__ Fragments b(Tile<columns> tile, int n0) {
    return {tile, n0 + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8};
  }
  // B as [k][n], from row k0: read by load_transposed().
  static __device__ Fragments b_transposed(Tile<columns> tile, int k0) {
    return {tile, k0 + lane() % 8 + lane() / 8 % 2 * 8, lane() / 16 * 8};
  }

  // The fragment `row` rows down and `column` columns right, multiples of 16.
  __device__ void load(uint32_t (&fragment)[4], int row, int column) const {
    load_matrices(fragment, address(row, column));
  }
  __device__ void load_transposed(uint32_t (&fragment)[4], int row, int column) const {
    load_matrices_transposed(fragment, address(row, column));
  }

 private:
  __device__ Fragments(Tile<columns> tile, int row, int column)
      : first_(shared_address(tile.unit(row, column))) {}
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  // The place of a unit among the eight of 128 bytes is an exclusive or: bits 4 to 6 of the address.
  __device__ SharedAddress address(int row, int column) const {
    return (first_ ^ (column % 64 * 2)) + (row * columns + column / 64 * 64) * 2;
  }

  SharedAddress first_;
};

// sum += A B over `depth` summed columns, both operands along their rows.
template <int depth, int row_tiles, int column_tiles, int columns>
__device__ inline void multiply(Accumulator<row_tiles, column_tiles>& sum, Fragments<columns> a_rows,
                                Fragments<columns> b_rows) {
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) a_rows.load(a[i], 16 * i, k);
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t b[4];
      b_rows.load(b, 8 * j, k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// sum += A B with A in registers, rounded to bf16, and B as [k][n].
template <int row_tiles, int column_tiles, int a_column_tiles, int columns>
__device__ inline void multiply(Accumulator<row_tiles, column_tiles>& sum,
                                const Accumulator<row_tiles, a_column_tiles>& a_values,
                                Fragments<columns> b_columns) {
#pragma unroll
  for (int k = 0; k < a_column_tiles / 2; ++k) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) a_values.as_a(a[i], i, k);
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t b[4];
      b_columns.load_transposed(b, 16 * k, 8 * j);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Copies rows that lie `stride` elements apart with all threads of the block; those at and past `valid`
// become zero. Asynchronous: commit and wait.
template <int rows, int columns>
__device__ inline void load_rows(Tile<columns> tile, int valid, const bf16* first, int64_t stride) {
  constexpr int units = columns / 8, step = kAttentionThreads / units;
  static_assert(rows % step == 0 && step % 8 == 0);  // so a thread's units keep their place in the swizzle
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  const bf16* source = first + row * stride + column;
  bf16* const target = tile.unit(row, column);
#pragma unroll
  for (int i = 0; i < rows / step; ++i, source += step * stride)
    copy_async(target + i * step * columns, source, row + i * step < valid);
}

// Copies a warp's own rows of a tile to global memory; row_pointer(row) is null where nothing is to be
// written.
template <int rows, int columns, typename RowPointer>
__device__ inline void store_rows(Tile<columns> tile, int row0, RowPointer row_pointer) {
  constexpr int units = columns / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = lane; i < rows * units; i += 32) {
    const int row = row0 + i / units, column = i % units * 8;
    bf16* target = row_pointer(row);
    if (target)
      *reinterpret_cast<uint4*>(target + column) = *reinterpret_cast<const uint4*>(tile.unit(row, column));
  }
}

}  // namespace oryx::cuda
