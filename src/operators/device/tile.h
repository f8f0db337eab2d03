// Tiles of bf16 in shared memory and the products of a warp that read them.
#pragma once

#include "operators/device/mma.h"

namespace oryx::device {

// `columns` is a multiple of 64; rows are 2·columns bytes. Units of 16 bytes are swizzled within a row by the
// row number, so that eight rows of one column of units lie in different banks: neither ldmatrix nor 16-byte
// copies conflict. The base is aligned to 128 bytes.
template <int columns>
struct Tile {
  static_assert(columns % 64 == 0);
  bf16* base;

  static constexpr size_t bytes(int rows) { return static_cast<size_t>(rows) * columns * sizeof(bf16); }

  // `column` is a multiple of 8: the start of 8 elements that lie together.
  __device__ bf16* unit(int row, int column) const {
    return base + row * columns + ((column / 8) ^ (row & 7)) * 8;
  }
  __device__ bf16* at(int row, int column) const { return unit(row, column & ~7) + (column & 7); }
  // Two neighbouring elements, `column` even.
  __device__ void store2(int row, int column, float first, float second) const {
    *reinterpret_cast<uint32_t*>(at(row, column)) = pack(first, second);
  }
  __device__ float2 load2(int row, int column) const {
    return unpack(*reinterpret_cast<const uint32_t*>(at(row, column)));
  }
};

// Copies rows [0, rows) × [0, columns) from global memory with all `threads` threads of the block; rows at
// and past `valid_rows` become zero (and are not read). row_pointer(row) gives the address of the first
// element of a row, 16-byte aligned. Asynchronous: commit and wait.
template <int columns, int rows, int threads, typename RowPointer>
__device__ inline void load_tile(Tile<columns> tile, int valid_rows, RowPointer row_pointer) {
  constexpr int units = columns / 8;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < rows * units; i += threads) {
    const int row = i / units, column = i % units * 8;
    const bool valid = row < valid_rows;
    copy_async(tile.unit(row, column), row_pointer(valid ? row : 0) + column, valid);
  }
}

// How an operand lies in its tile: `plain` is A as [m][k] and B as [n][k] (both run along the summed index
// k), `transposed` is A as [k][m] and B as [k][n].
enum class Layout { plain, transposed };

// A fragment of 16 rows (m0 …) by 16 summed columns (k0 …).
template <Layout layout, int columns>
__device__ inline void load_a(uint32_t (&a)[4], Tile<columns> tile, int m0, int k0) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (layout == Layout::plain) {
    load_matrices(a, tile.unit(m0 + lane % 16, k0 + lane / 16 * 8));
  } else {
    load_matrices_transposed(a, tile.unit(k0 + lane % 8 + lane / 16 * 8, m0 + lane / 8 % 2 * 8));
  }
}

// Fragments of two neighbouring groups of 8 columns (n0 …, n0 + 8 …): b[0], b[1] are the first, b[2], b[3]
// the second.
template <Layout layout, int columns>
__device__ inline void load_b(uint32_t (&b)[4], Tile<columns> tile, int n0, int k0) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (layout == Layout::plain) {
    load_matrices(b, tile.unit(n0 + lane % 8 + lane / 16 * 8, k0 + lane / 8 % 2 * 8));
  } else {
    load_matrices_transposed(b, tile.unit(k0 + lane % 8 + lane / 8 % 2 * 8, n0 + lane / 16 * 8));
  }
}

// A warp's accumulator: 16·row_tiles rows by 8·column_tiles columns. Of value[i][j]: [0], [1] are row
// 16i + lane / 4 and columns 8j + 2(lane % 4), + 1; [2], [3] the same columns 8 rows below.
template <int row_tiles, int column_tiles>
struct Accumulator {
  float value[row_tiles][column_tiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i][j][e] = 0.0f;
  }

  // function(row, column, first, second) for pairs of neighbouring columns, by reference; row and column are
  // relative to the accumulator's corner.
  template <typename Function>
  __device__ void for_pairs(Function function) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          function(16 * i + lane / 4 + 8 * half, 8 * j + 2 * (lane % 4), value[i][j][2 * half],
                   value[i][j][2 * half + 1]);
        }
  }

  template <int columns>
  __device__ void store(Tile<columns> tile, int row0, int column0) {
    for_pairs([&](int row, int column, float& first, float& second) {
      tile.store2(row0 + row, column0 + column, first, second);
    });
  }

  // Row tile i, columns 16k … 16k + 15, rounded to bf16 as an A operand: no exchange between lanes is needed.
  __device__ void as_a(uint32_t (&a)[4], int i, int k) const {
    a[0] = pack(value[i][2 * k][0], value[i][2 * k][1]);
    a[1] = pack(value[i][2 * k][2], value[i][2 * k][3]);
    a[2] = pack(value[i][2 * k + 1][0], value[i][2 * k + 1][1]);
    a[3] = pack(value[i][2 * k + 1][2], value[i][2 * k + 1][3]);
  }
};

// sum += A B over k in [k0, k1) (multiples of 16), for rows m0 … of A and columns n0 … of B. column_tiles is
// even.
template <Layout layout_a, Layout layout_b, int row_tiles, int column_tiles, int columns_a, int columns_b>
__device__ inline void multiply(Accumulator<row_tiles, column_tiles>& sum, Tile<columns_a> a_tile, int m0,
                                Tile<columns_b> b_tile, int n0, int k0, int k1) {
  static_assert(column_tiles % 2 == 0);
#pragma unroll
  for (int k = k0; k < k1; k += 16) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) load_a<layout_a>(a[i], a_tile, m0 + 16 * i, k);
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t b[4];
      load_b<layout_b>(b, b_tile, n0 + 8 * j, k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// The same with A in registers: columns 16·k of `a` against rows k0 + 16·k of B, for the `depth` tiles of k.
template <Layout layout_b, int depth, int row_tiles, int column_tiles, int a_column_tiles, int columns_b>
__device__ inline void multiply_registers(Accumulator<row_tiles, column_tiles>& sum,
                                          const Accumulator<row_tiles, a_column_tiles>& a_values,
                                          Tile<columns_b> b_tile, int n0, int k0) {
  static_assert(column_tiles % 2 == 0 && 2 * depth <= a_column_tiles);
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) a_values.as_a(a[i], i, k);
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t b[4];
      load_b<layout_b>(b, b_tile, n0 + 8 * j, k0 + 16 * k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

}  // namespace oryx::device
