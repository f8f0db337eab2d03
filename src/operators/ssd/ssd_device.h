// What the CUDA kernels of ssd share.
#pragma once

#include "operators/cpu/mixer_arguments.h"
#include "operators/device/tile.h"

namespace oryx::cuda {

using namespace device;

// Of a block of any chunk kernel.
constexpr size_t kMostSharedBytes = 114 * 1024;

// Row heads of a stream; strides in elements.
__device__ inline const bf16* token_row(const cpu::RowView& view, int64_t batch, int64_t time, int64_t head) {
  return static_cast<const bf16*>(view.data) + batch * view.batch + time * view.time + head * view.head;
}
__device__ inline const bf16* packed_row(const cpu::RowView& view, int64_t row, int64_t head) {
  return static_cast<const bf16*>(view.data) + row * view.time + head * view.head;
}

// As load_tile, for rows that lie `stride` elements apart. A pass of the block over rows takes a multiple of
// the tile's swizzle: all addresses of a thread are constants away from the first.
template <int columns, int rows, int threads>
__device__ inline void load_even_rows(Tile<columns> tile, int valid_rows, const bf16* first, int64_t stride) {
  constexpr int units = columns / 8, apart = threads / units;
  static_assert(threads % (8 * units) == 0 && rows % apart == 0);
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  bf16* to = tile.unit(row, column);
  const bf16* from = first + row * stride + column;
#pragma unroll
  for (int pass = 0; pass < rows / apart; ++pass) {
    const bool valid = row + pass * apart < valid_rows;
    copy_async(to + pass * apart * columns, valid ? from : first, valid);
    from += apart * stride;
  }
}

// The same for rows that lie anywhere: row_pointer(row, pass) is null where the row is zero, `pass` counts
// the calls of a thread. `anywhere` is an address that may be read.
template <int columns, int rows, int threads, typename RowPointer>
__device__ inline void load_rows(Tile<columns> tile, const void* anywhere, RowPointer row_pointer) {
  constexpr int units = columns / 8, apart = threads / units;
  static_assert(threads % (8 * units) == 0 && rows % apart == 0);
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  bf16* to = tile.unit(row, column);
#pragma unroll
  for (int pass = 0; pass < rows / apart; ++pass) {
    const bf16* source = row_pointer(row + pass * apart, pass);
    copy_async(to + pass * apart * columns,
               source != nullptr ? source + column : static_cast<const bf16*>(anywhere), source != nullptr);
  }
}

// What load_a and load_b read, from one address of a lane: a tile's swizzle turns steps along a row, of an
// even number of units, into an exclusive or. Takes fewer registers than one address for every step. The tile
// is aligned to its rows.
template <Layout layout, int columns>
class Fragments {
 public:
  // Of the left operand from row m0 on, or of the right operand from column n0 on.
  __device__ static Fragments left(Tile<columns> tile, int m0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return Fragments(is_plain ? tile.unit(m0 + lane % 16, lane / 16 * 8)
                              : tile.unit(lane % 8 + lane / 16 * 8, m0 + lane / 8 % 2 * 8));
  }
  __device__ static Fragments right(Tile<columns> tile, int n0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return Fragments(is_plain ? tile.unit(n0 + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)
                              : tile.unit(lane % 8 + lane / 8 % 2 * 8, n0 + lane / 16 * 8));
  }
  // As load_a(.., m0 + m, k) or load_b(.., n0 + m, k); m and k are multiples of 16.
  __device__ void load(uint32_t (&fragment)[4], int m, int k) const {
    const SharedAddress row = is_plain ? m : k, column = is_plain ? k : m;
    const SharedAddress at = (base_ ^ (column * sizeof(bf16))) + row * (columns * sizeof(bf16));
    if constexpr (is_plain) {
      load_matrices(fragment, at);
    } else {
      load_matrices_transposed(fragment, at);
    }
  }

 private:
  static constexpr bool is_plain = layout == Layout::plain;
  __device__ explicit Fragments(const bf16* base) : base_(shared_address(base)) {}
  SharedAddress base_;
};

// As multiply(), by Fragments.
template <Layout layout_a, Layout layout_b, int row_tiles, int column_tiles, int columns_a, int columns_b>
__device__ inline void add_product(Accumulator<row_tiles, column_tiles>& sum, Tile<columns_a> a_tile, int m0,
                                   Tile<columns_b> b_tile, int n0, int k0, int k1) {
  static_assert(column_tiles % 2 == 0);
  const auto left = Fragments<layout_a, columns_a>::left(a_tile, m0);
  const auto right = Fragments<layout_b, columns_b>::right(b_tile, n0);
#pragma unroll
  for (int k = k0; k < k1; k += 16) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) left.load(a[i], 16 * i, k);
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t b[4];
      right.load(b, 8 * j, k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// An A operand with its summed columns scaled: weight[0] for columns 2t and 2t + 1, weight[1] for those 8
// further.
__device__ inline void scale_a(uint32_t (&a)[4], const float2 (&weight)[2]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack(a[j]);
    a[j] = pack(pair.x * weight[j / 2].x, pair.y * weight[j / 2].y);
  }
}

// Copies `count` floats (a multiple of 4, at most 4 · threads) to shared memory, asynchronously.
__device__ inline void load_floats(float* shared, const float* global, int count) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i < count) copy_async(shared + i, global + i);
}

// Of four neighbouring lanes t, each with one register of units 0 … 3: afterwards lane t has register n of
// unit t from lane n.
__device__ inline void trade_pairs(uint32_t (&p)[4]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int n = 0; n < 4; n += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, t & 1 ? p[n] : p[n + 1], 1);
    (t & 1 ? p[n] : p[n + 1]) = other;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, t & 2 ? p[n] : p[n + 2], 2);
    (t & 2 ? p[n] : p[n + 2]) = other;
  }
}

// Stores an accumulator as bf16 rows: row_pointer(row) is the address of the accumulator's first column in
// its row, or null. Four lanes trade pairs of columns first, so that each stores 16 bytes.
template <int row_tiles, int column_tiles, typename RowPointer>
__device__ inline void store_rows(const Accumulator<row_tiles, column_tiles>& sum, RowPointer row_pointer) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bf16* row = row_pointer(16 * i + lane / 4 + 8 * half);
      if constexpr (column_tiles % 4 != 0) {
#pragma unroll
        for (int j = 0; j < column_tiles; ++j) {
          const uint32_t pair = pack(sum.value[i][j][2 * half], sum.value[i][j][2 * half + 1]);
          if (row != nullptr) *reinterpret_cast<uint32_t*>(row + 8 * j + 2 * t) = pair;
        }
      } else {
#pragma unroll
        for (int j = 0; j < column_tiles; j += 4) {
          uint32_t p[4];  // of tile j + n, pair t; afterwards of tile j + t, pair n
#pragma unroll
          for (int n = 0; n < 4; ++n)
            p[n] = pack(sum.value[i][j + n][2 * half], sum.value[i][j + n][2 * half + 1]);
          trade_pairs(p);
          if (row != nullptr) *reinterpret_cast<uint4*>(row + 8 * (j + t)) = {p[0], p[1], p[2], p[3]};
        }
      }
    }
  }
}

// Calls f with the head dimensions as constants.
template <typename Function>
void with_dimensions(const cpu::MixerShape& shape, Function f) {
  const auto with_value_dim = [&](auto key_dim) {
    if (shape.value_dim == 64) {
      f(key_dim, std::integral_constant<int, 64>());
    } else {
      f(key_dim, std::integral_constant<int, 128>());
    }
  };
  if (shape.key_dim == 64) {
    with_value_dim(std::integral_constant<int, 64>());
  } else {
    with_value_dim(std::integral_constant<int, 128>());
  }
}

}  // namespace oryx::cuda
