// What the two serial passes share: how a state [key_dim, width] of float32 lies over the warps of a block,
// with a copy rounded to bf16 in shared memory as the operand of products.
#pragma once

#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {

// `width` columns of the state belong to a block of threads. Four warps share the rows; from 128 columns on
// there are two such groups, a half of the columns each.
template <int width_>
struct PassShape {
  static constexpr int width = width_;
  static constexpr int groups = width > 64 ? width / 64 : 1;
  static constexpr int threads = 128 * groups;
  static constexpr int columns = width / groups;  // of a warp
  // A tile of at least `width` columns; the others are never touched.
  struct Slice : Tile<(width > 64 ? width : 64)> {
    static constexpr int width = PassShape::width > 64 ? PassShape::width : 64;
  };
};

template <int key_dim, int width>
struct StateAccumulator {
  using Shape = PassShape<width>;
  Accumulator<key_dim / 64, Shape::columns / 8> values;

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int row0() { return warp() % 4 * (key_dim / 4); }
  __device__ static int column0() { return warp() / 4 * Shape::columns; }

  __device__ void read(const float* from, int pitch) {
    values.for_pairs([&](int row, int column, float& first, float& second) {
      float2 pair{0.0f, 0.0f};
      if (from != nullptr) {
        pair = *reinterpret_cast<const float2*>(from + static_cast<int64_t>(row0() + row) * pitch +
                                                column0() + column);
      }
      first = pair.x, second = pair.y;
    });
  }
  __device__ void write(float* to, int pitch) {
    values.for_pairs([&](int row, int column, float& first, float& second) {
      *reinterpret_cast<float2*>(to + static_cast<int64_t>(row0() + row) * pitch + column0() + column) = {
          first, second};
    });
  }
  __device__ void scale(float factor) {
    values.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
  }
  // += leftᵀ right over the rows of a chunk, for tiles [64, key_dim] and [64, width].
  __device__ void add(Tile<key_dim> left, typename Shape::Slice right) {
    if constexpr (Shape::columns >= 64) {
      multiply_rolled<Layout::transposed, Layout::transposed, 2>(values, left, row0(), right, column0(),
                                                                 kChunk);
    } else {
      multiply<Layout::transposed, Layout::transposed>(values, left, row0(), right, column0(), 0, kChunk);
    }
  }
  template <typename Target>
  __device__ void round(Target tile) {
    values.store(tile, row0(), column0());
  }
};

// Writes the rounded state to a block's place in [blocks, key_dim, value_dim].
template <int key_dim, int width, typename Tile>
__device__ inline void store_state(Tile tile, bf16* states, int64_t block, int value_dim, int part_column) {
  bf16* to = states + block * key_dim * value_dim + part_column;
  constexpr int units = width / 8;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < key_dim * units; i += PassShape<width>::threads) {
    const int row = i / units, column = i % units * 8;
    *reinterpret_cast<uint4*>(to + row * value_dim + column) =
        *reinterpret_cast<const uint4*>(tile.unit(row, column));
  }
}

// sum += A B over all of `depth`. A narrow product is two chains of dependent instructions; halving the depth
// makes them four.
template <Layout layout_a, Layout layout_b, int depth, int column_tiles, int columns_a, int columns_b>
__device__ inline void multiply_latency(Accumulator<1, column_tiles>& sum, Tile<columns_a> a_tile, int m0,
                                        Tile<columns_b> b_tile, int n0) {
  if constexpr (column_tiles <= 4) {
    Accumulator<1, column_tiles> other;
    other.clear();
#pragma unroll
    for (int k = 0; k < depth / 2; k += 16) {
      multiply<layout_a, layout_b>(sum, a_tile, m0, b_tile, n0, k, k + 16);
      multiply<layout_a, layout_b>(other, a_tile, m0, b_tile, n0, depth / 2 + k, depth / 2 + k + 16);
    }
#pragma unroll
    for (int j = 0; j < column_tiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.value[0][j][e] += other.value[0][j][e];
  } else {
    multiply_rolled<layout_a, layout_b, 2>(sum, a_tile, m0, b_tile, n0, depth);
  }
}

// Calls function.template operator()<key_dim, width>() with the widest part of the columns, up to `widest`,
// that still gives most multiprocessors work, but in at most 4 parts: each reads all of K and E again.
template <typename Function>
void with_width(const GatedDeltaArguments& p, int widest, Function function) {
  const int64_t streams = static_cast<int64_t>(p.batch) * p.state_heads;
  int width = widest < p.value_dim ? widest : p.value_dim;
  while (width * 4 > p.value_dim && streams * (p.value_dim / width) < p.multiprocessors * 3 / 4) width /= 2;
  const auto with_key_dim = [&]<int key_dim>() {
    switch (width) {
      case 128:
        return function.template operator()<key_dim, 128>();
      case 64:
        return function.template operator()<key_dim, 64>();
      case 32:
        return function.template operator()<key_dim, 32>();
      default:
        return function.template operator()<key_dim, 16>();
    }
  };
  p.key_dim == 128 ? with_key_dim.template operator()<128>() : with_key_dim.template operator()<64>();
}

}  // namespace oryx::cuda
