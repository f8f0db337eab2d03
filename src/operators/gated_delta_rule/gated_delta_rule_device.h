// What the CUDA kernels of gated_delta_rule share.
#pragma once

#include "operators/device/tile.h"
#include "operators/gated_delta_rule/gated_delta_rule_kernels.h"

namespace oryx::cuda {

using namespace device;

constexpr int kChunk = gated_delta_chunk;

// One chunk of a stream.
struct Block {
  int64_t index;
  int batch, head, chunk;
  int valid;  // tokens

  __device__ Block(const GatedDeltaArguments& p, int batch_of_block, int head_of_block, int chunk_of_stream)
      : index((static_cast<int64_t>(batch_of_block) * p.state_heads + head_of_block) * p.chunks +
              chunk_of_stream),
        batch(batch_of_block),
        head(head_of_block),
        chunk(chunk_of_stream) {
    const int64_t left = p.time - static_cast<int64_t>(chunk) * kChunk;
    valid = left < kChunk ? static_cast<int>(left) : kChunk;
  }
  __device__ Block(const GatedDeltaArguments& p, int64_t stream, int chunk_of_stream)
      : Block(p, static_cast<int>(static_cast<uint32_t>(stream) / static_cast<uint32_t>(p.state_heads)),
              static_cast<int>(static_cast<uint32_t>(stream) % static_cast<uint32_t>(p.state_heads)),
              chunk_of_stream) {}
  // Position of the chunk's first token in [batch, time].
  __device__ int64_t token(const GatedDeltaArguments& p) const {
    return batch * p.time + static_cast<int64_t>(chunk) * kChunk;
  }
  // The chunk's first row in a tensor [batch, time, heads, dim].
  __device__ bf16* rows_of(const GatedDeltaRows& x, int head_of_x) const {
    return static_cast<bf16*>(x.data) + batch * x.batch + static_cast<int64_t>(chunk) * kChunk * x.time +
           head_of_x * x.head;
  }
  __device__ bf16* key_rows(const GatedDeltaArguments& p) const {
    return rows_of(p.key, head / (p.state_heads / p.key_heads));
  }
  __device__ const int32_t* row_table(const GatedDeltaArguments& p) const {
    return p.rows + (static_cast<int64_t>(batch) * p.chunks + chunk) * gated_delta_row_table;
  }
};

__device__ inline bf16* packed_row(const GatedDeltaRows& x, int row, int head) {
  return static_cast<bf16*>(x.data) + row * x.time + head * x.head;
}

// Two registers of neighbouring tiles of 8 columns, each the lane's pair of a row, as four columns that lie
// together, from pair_column() on in the two tiles' 16.
__device__ inline uint2 pair_up(uint32_t first, uint32_t second) {
  const bool odd = threadIdx.x % 2 != 0;
  const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  return odd ? uint2{got, second} : uint2{first, got};
}
__device__ inline int pair_column() {
  const int t = static_cast<int>(threadIdx.x) % 4;
  return t % 2 == 0 ? 2 * t : 2 * t + 6;
}

// Writes an accumulator's rows to global memory as bf16; row_pointer(row) is the place of its first column,
// or null where the row is not wanted. The order of `columns` is that of the accumulator.
template <int row_tiles, int column_tiles, typename RowPointer>
__device__ inline void write_rows(const Accumulator<row_tiles, column_tiles>& sum, RowPointer row_pointer) {
  const int row = static_cast<int>(threadIdx.x) % 32 / 4, column = pair_column();
#pragma unroll
  for (int i = 0; i < row_tiles; ++i)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      bf16* to = row_pointer(16 * i + row + 8 * below);
#pragma unroll
      for (int j = 0; j < column_tiles; j += 2) {
        const uint2 four = pair_up(pack(sum.value[i][j][2 * below], sum.value[i][j][2 * below + 1]),
                                   pack(sum.value[i][j + 1][2 * below], sum.value[i][j + 1][2 * below + 1]));
        if (to != nullptr) *reinterpret_cast<uint2*>(to + 8 * j + column) = four;
      }
    }
}

// Addresses of the lane's part of fragments of a tile, from that of the tile's first: columns on by 16 flip
// bits of it, rows on add to it. That costs no register per address, unlike Tile::unit().
template <Layout layout, int columns>
struct FragmentsB {
  SharedAddress first;

  __device__ explicit FragmentsB(Tile<columns> tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32, low = lane % 8, middle = lane / 8 % 2 * 8,
              high = lane / 16 * 8;
    first = shared_address(layout == Layout::plain ? tile.unit(low + high, middle)
                                                   : tile.unit(low + middle, high));
  }
  // Columns 16 n … of B, summed rows 16 k …, as load_b().
  __device__ void load(uint32_t (&b)[4], int n, int k) const {
    if constexpr (layout == Layout::plain) {
      load_matrices(b, (first ^ static_cast<SharedAddress>(32 * k)) + 32 * columns * n);
    } else {
      load_matrices_transposed(b, (first ^ static_cast<SharedAddress>(32 * n)) + 32 * columns * k);
    }
  }
};
template <Layout layout, int columns>
struct FragmentsA {
  SharedAddress first;

  __device__ explicit FragmentsA(Tile<columns> tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32, low = lane % 8, middle = lane / 8 % 2 * 8,
              high = lane / 16 * 8;
    first = shared_address(layout == Layout::plain ? tile.unit(low + middle, high)
                                                   : tile.unit(low + high, middle));
  }
  // Rows 16 m … of A, summed columns 16 k …, as load_a().
  __device__ void load(uint32_t (&a)[4], int m, int k) const {
    if constexpr (layout == Layout::plain) {
      load_matrices(a, (first ^ static_cast<SharedAddress>(32 * k)) + 32 * columns * m);
    } else {
      load_matrices_transposed(a, (first ^ static_cast<SharedAddress>(32 * m)) + 32 * columns * k);
    }
  }
};

// sum += A B over `depth`, for rows 16 m … of A and columns 16 n … of B.
template <Layout layout_a, Layout layout_b, int depth, int row_tiles, int column_tiles, int columns_a,
          int columns_b>
__device__ inline void multiply_tiles(Accumulator<row_tiles, column_tiles>& sum, Tile<columns_a> a_tile,
                                      int m, Tile<columns_b> b_tile, int n) {
  const FragmentsA<layout_a, columns_a> left(a_tile);
  const FragmentsB<layout_b, columns_b> right(b_tile);
#pragma unroll 2  // more take registers that the kernels lack
  for (int k = 0; k < depth / 16; ++k) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) left.load(a[i], m + i, k);
#pragma unroll
    for (int j = 0; j < column_tiles / 2; ++j) {
      uint32_t b[4];
      right.load(b, n + j, k);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        multiply_add(sum.value[i][2 * j], a[i], b[0], b[1]);
        multiply_add(sum.value[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// gates of a block as they lie in memory, global or shared.
struct Gates {
  float *log_gamma, *beta, *gamma, *rho, *beta_rho;  // log_gamma is G · log₂e

  __device__ explicit Gates(float* base)
      : log_gamma(base),
        beta(base + kChunk),
        gamma(base + 2 * kChunk),
        rho(base + 3 * kChunk),
        beta_rho(base + 4 * kChunk) {}
  __device__ float total() const { return gamma[kChunk - 1]; }
};
constexpr int kGates = gated_delta_gate_rows * kChunk;

__device__ inline void load_gates(float* gates, const GatedDeltaArguments& p, int64_t block) {
  if (threadIdx.x < kGates / 4)
    copy_async(gates + 4 * threadIdx.x, p.gates + block * kGates + 4 * threadIdx.x);
}

// Calls launch_for.template operator()<key_dim, value_dim>() for the sizes of the call.
template <typename Function>
void with_dims(const GatedDeltaArguments& p, Function function) {
  if (p.key_dim == 128) {
    p.value_dim == 128 ? function.template operator()<128, 128>() : function.template operator()<128, 64>();
  } else {
    p.value_dim == 128 ? function.template operator()<64, 128>() : function.template operator()<64, 64>();
  }
}

inline int64_t blocks_of(const GatedDeltaArguments& p) {
  return static_cast<int64_t>(p.batch) * p.state_heads * p.chunks;
}

}  // namespace oryx::cuda
