// Pieces of the serial passes: their loads, and the step S' = γ_C S + Eᵀ (β ⊙ W), W = V − γ ⊙ (K S), of the
// recurrence over chunks.
#pragma once

#include "operators/gated_delta_rule/gated_delta_rule_passes.h"

namespace oryx::cuda {

// Makes of (K S)ᵀ, in the warp's columns, Wᵀ (for a V that is 0 where it has none), and β ⊙ W rounded as
// operand A, 16 columns by tokens 16 k …
template <bool has_value = true, int width>
__device__ inline void find_residual(Accumulator<1, 8>& residual, uint32_t (&weighted)[4][4], int column0,
                                     Panels<kChunk, width> value, const Gates& gates) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t values[4] = {};
    if (has_value) load_a<Layout::transposed>(values, value.panel(column0), column0 % 64, 16 * k);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int i = 16 * k + 8 * tile + 2 * t;
      const float gamma0 = gates.gamma(i), gamma1 = gates.gamma(i + 1);
      const float2 beta = *reinterpret_cast<const float2*>(gates.beta + i);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        float &first = residual.value[0][2 * k + tile][2 * below],
              &second = residual.value[0][2 * k + tile][2 * below + 1];
        const float2 v = unpack(values[2 * tile + below]);
        first = v.x - gamma0 * first, second = v.y - gamma1 * second;
        weighted[k][2 * tile + below] = pack(beta.x * first, beta.y * second);
      }
    }
  }
}

// Writes 16 columns by 64 tokens of bf16 pairs of tokens, pair(token tile, below) as in an accumulator, to
// the tokens' rows; row_pointer(token) is the place of the first column, or null where the row is not wanted.
template <typename Pair, typename RowPointer>
__device__ inline void write_by_token(Pair pair, RowPointer row_pointer) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const uint2 four = pair_up(transpose_matrix(pair(tile, 0)), transpose_matrix(pair(tile, 1)));
    bf16* to = row_pointer(8 * tile + static_cast<int>(threadIdx.x) % 32 / 4);
    if (to != nullptr) *reinterpret_cast<uint2*>(to + pair_column()) = four;
  }
}

template <int key_dim>
__device__ inline void load_keys(const GatedDeltaArguments& p, const Block& block,
                                 Panels<kChunk, key_dim> tile, int thread) {
  const bf16* key = block.key_rows(p);
  load_rows<key_dim, key_dim, kChunk, kLoaders>(tile, thread, block.valid,
                                                [&](int row) { return key + row * p.key.time; });
}

template <int width>
__device__ inline void load_values(const GatedDeltaArguments& p, const Block& block,
                                   Panels<kChunk, width> tile, int part_column, int thread) {
  const bf16* value = block.rows_of(p.value, block.head) + part_column;
  load_rows<width, width, kChunk, kLoaders>(tile, thread, block.valid,
                                            [&](int row) { return value + row * p.value.time; });
}

template <int key_dim>
__device__ inline void load_transfer(const GatedDeltaArguments& p, const Block& block,
                                     Panels<kChunk, key_dim> tile, int thread) {
  const bf16* transfer = static_cast<const bf16*>(p.transfer) + block.index * kChunk * key_dim;
  load_rows<key_dim, key_dim, kChunk, kLoaders>(tile, thread, kChunk,
                                                [&](int row) { return transfer + row * key_dim; });
}

__device__ inline void load_gates(const GatedDeltaArguments& p, const Block& block, float* gates,
                                  int thread) {
  if (thread < kGates / 4) copy_async(gates + 4 * thread, p.gates + block.index * kGates + 4 * thread);
}

__device__ inline void load_square(const void* squares, int64_t index, Panels<kChunk, kChunk> tile,
                                   int thread) {
  const bf16* square = static_cast<const bf16*>(squares) + index * kChunk * kChunk;
  load_rows<kChunk, kChunk, kChunk, kLoaders>(tile, thread, kChunk,
                                              [&](int row) { return square + row * kChunk; });
}

}  // namespace oryx::cuda
