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

  __device__ Block(const GatedDeltaArguments& p, int64_t stream, int chunk_of_stream)
      : index(stream * p.chunks + chunk_of_stream),
        batch(static_cast<int>(stream / p.state_heads)),
        head(static_cast<int>(stream % p.state_heads)),
        chunk(chunk_of_stream) {
    const int64_t left = p.time - static_cast<int64_t>(chunk) * kChunk;
    valid = left < kChunk ? static_cast<int>(left) : kChunk;
  }
  __device__ static Block of_grid(const GatedDeltaArguments& p) {
    return Block(p, static_cast<int64_t>(blockIdx.x) / p.chunks, static_cast<int>(blockIdx.x % p.chunks));
  }
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

// Loads rows by a table of packed rows, in which −1 stands for a row of zeros.
template <int columns, int threads, int at_once = 2>
__device__ inline void load_packed(Tile<columns> tile, const int32_t* rows, const GatedDeltaRows& x, int head,
                                   int column0, int width) {
  const int units = width / 8;
#pragma unroll at_once
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * units; i += threads) {
    const int row = i / units, column = i % units * 8, packed = rows[row];
    copy_async(tile.unit(row, column), packed_row(x, packed < 0 ? 0 : packed, head) + column0 + column,
               packed >= 0);
  }
}

// Loads `width` ≤ columns columns of `rows` rows.
template <int columns, int rows, int width, int threads, typename RowPointer>
__device__ inline void load_slice(Tile<columns> tile, int valid_rows, RowPointer row_pointer) {
  constexpr int units = width / 8;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < rows * units; i += threads) {
    const int row = i / units, column = i % units * 8;
    const bool valid = row < valid_rows;
    copy_async(tile.unit(row, column), row_pointer(valid ? row : 0) + column, valid);
  }
}

// As multiply() from 0 to depth, `tiles` tiles of the summed index at a time: unrolled whole, kernels with
// many or wide products keep more addresses than there are registers.
template <Layout layout_a, Layout layout_b, int tiles = 1, int row_tiles, int column_tiles, int columns_a,
          int columns_b>
__device__ inline void multiply_rolled(Accumulator<row_tiles, column_tiles>& sum, Tile<columns_a> a, int m0,
                                       Tile<columns_b> b, int n0, int depth) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 16 * tiles)
    multiply<layout_a, layout_b>(sum, a, m0, b, n0, k, k + 16 * tiles);
}

// gates of a block as they lie in shared memory.
struct Gates {
  const float* log_gamma;  // G · log₂e
  const float* beta;

  __device__ explicit Gates(const float* base) : log_gamma(base), beta(base + kChunk) {}
  __device__ float gamma(int i) const { return exp2_fast(log_gamma[i]); }
  __device__ float rho(int i) const { return exp2_fast(log_gamma[kChunk - 1] - log_gamma[i]); }
  __device__ float total() const { return exp2_fast(log_gamma[kChunk - 1]); }
  // Γ; masked before the exponential, which may overflow above the diagonal.
  __device__ float between(int i, int j) const {
    return i >= j ? exp2_fast(log_gamma[i] - log_gamma[j]) : 0.0f;
  }
};
constexpr int kGates = 2 * kChunk;

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
