// Pieces of the serial passes: their loads, what loaders make of them, and the steps of the recurrence over
// chunks.
#pragma once

#include <cmath>

#include "operators/gated_delta_rule/gated_delta_rule_passes.h"

namespace oryx::cuda {

// As multiply_rows() of a product with A in registers, added to `sum`.
template <int depth, int column_tiles, int rows, int columns>
__device__ inline void add_rows(Accumulator<1, column_tiles>& sum, const uint32_t (&a)[depth][4],
                                Panels<rows, columns> b) {
  static_assert(columns == 16 * depth && 8 * column_tiles <= rows);
  if (has_warpgroup_products) {
    const uint64_t first = operand_descriptor(b.base, 16, 1024);
#pragma unroll
    for (int k = 0; k < depth; ++k)
      wgmma_registers<false>(sum.value[0], a[k], first + (k % 4 * 32 + k / 4 * b.panel_bytes) / 16, true);
    return;
  }
  Accumulator<1, column_tiles> product;
  multiply_rows(product, a, b);
#pragma unroll
  for (int j = 0; j < column_tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.value[0][j][e] += product.value[0][j][e];
}

// By the loaders: scale · P of a reader.
template <int key_dim>
__device__ inline void make_scores(Panels<kChunk, kChunk> scores, Panels<kChunk, key_dim> query,
                                   Panels<kChunk, key_dim> key, const float* log_gamma, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32, m0 = 16 * warp_of_group(), row = m0 + lane / 4;
  const float of_row[2] = {log_gamma[row], log_gamma[row + 8]};
#pragma unroll 1
  for (int n0 = 0; n0 < kChunk; n0 += 32) {  // in halves for the sake of registers
    Accumulator<1, 4> product;
    begin_products([&] { multiply_rows(product, query, 0, Panels<kChunk, key_dim>{key.base + n0 * 64}); });
    warpgroup_wait<0>();
    settle(product);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const int j = n0 + 8 * tile + 2 * (lane % 4);
      const float2 of_column = *reinterpret_cast<const float2*>(log_gamma + j);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int i = row + 8 * below;
        const float first = exp2_fast(i >= j ? of_row[below] - of_column.x : -INFINITY),
                    second = exp2_fast(i > j ? of_row[below] - of_column.y : -INFINITY);
        scores.store2(i, j, scale * first * product.value[0][tile][2 * below],
                      scale * second * product.value[0][tile][2 * below + 1]);
      }
    }
  }
  publish_to_products();
}

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
      const float2 gamma = *reinterpret_cast<const float2*>(gates.gamma + i),
                   beta = *reinterpret_cast<const float2*>(gates.beta + i);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        float &first = residual.value[0][2 * k + tile][2 * below],
              &second = residual.value[0][2 * k + tile][2 * below + 1];
        const float2 v = unpack(values[2 * tile + below]);
        first = v.x - gamma.x * first, second = v.y - gamma.y * second;
        weighted[k][2 * tile + below] = pack(beta.x * first, beta.y * second);
      }
    }
  }
}
// Makes of Wᵀ, with β ⊙ W, Nᵀ = (W + C (β ⊙ W))ᵀ; by the transposed C of dUᵀ, with β ⊙ dU,
// Yᵀ = (dU + Cᵀ (β ⊙ dU))ᵀ.
template <Layout layout>
__device__ inline void add_inverse(Accumulator<1, 8>& rows, const uint32_t (&weighted)[4][4],
                                   Panels<kChunk, kChunk> inverse) {
  const FragmentsB<layout, 64> fragments(inverse.panel(0));
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const int to = layout == Layout::plain ? i : j, from = layout == Layout::plain ? j : i;
      uint32_t b[4];
      fragments.load(b, to, from);
      multiply_add(rows.value[0][2 * to], weighted[from], b[0], b[1]);
      multiply_add(rows.value[0][2 * to + 1], weighted[from], b[2], b[3]);
    }
}
// x ⊙ factor_of_all · `factors` of the tokens, of columns by tokens.
__device__ inline void scale_by_token(Accumulator<1, 8>& x, const float* factors, float factor_of_all) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * tile + 2 * t);
    const float first = factor_of_all * factor.x, second = factor_of_all * factor.y;
#pragma unroll
    for (int below = 0; below < 2; ++below)
      x.value[0][tile][2 * below] *= first, x.value[0][tile][2 * below + 1] *= second;
  }
}
// `factors` of the tokens ⊙ x rounded, of columns by tokens.
__device__ inline void weigh_tokens(uint32_t (&weighed)[4][4], const Accumulator<1, 8>& x,
                                    const float* factors) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * tile + 2 * t);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      weighed[tile / 2][tile % 2 * 2 + below] =
          pack(factor.x * x.value[0][tile][2 * below], factor.y * x.value[0][tile][2 * below + 1]);
    }
  }
}
// The same of an operand A.
__device__ inline void weigh_tokens(uint32_t (&weighed)[4][4], const uint32_t (&x)[4][4],
                                    const float* factors, float factor_of_all = 1.0f) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * tile + 2 * t);
    const float first = factor_of_all * factor.x, second = factor_of_all * factor.y;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float2 pair = unpack(x[tile / 2][tile % 2 * 2 + below]);
      weighed[tile / 2][tile % 2 * 2 + below] = pack(first * pair.x, second * pair.y);
    }
  }
}

// The step of a state without outputs, S' = γ_C S + Kᵀ (ρ ⊙ U). keep_state(S before it, rounded) and
// keep_surprises(Nᵀ) run beside products.
template <int key_dim, typename Stage, typename KeepState, typename KeepSurprises>
__device__ inline void take_step(StateRows<key_dim>& state, const Stage& stage, bool has_value,
                                 KeepState keep_state, KeepSurprises keep_surprises) {
  const Gates gates(stage.gates);
  typename StateRows<key_dim>::Operand rounded;
  as_operand(rounded, state.values);
  state.scale(gates.total());
  Accumulator<1, 8> residual;
  begin_products([&] { multiply_rows(residual, rounded, stage.key); });
  keep_state(rounded);
  finish_products<0>(residual);
  uint32_t weighted[4][4], carried[4][4];
  has_value ? find_residual<true>(residual, weighted, state.column0(), stage.slice, gates)
            : find_residual<false>(residual, weighted, state.column0(), stage.slice, gates);
  add_inverse<Layout::plain>(residual, weighted, stage.inverse);
  weigh_tokens(carried, residual, gates.beta_rho);
  begin_products([&] { multiply_columns(state.values, carried, stage.key); });
  keep_surprises(residual);
  finish_products<0>(state.values);
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

// The steps of a walk: every reader (output head) of every chunk.
struct Steps {
  int readers;

  __device__ int chunk(int step) const { return readers == 1 ? step : step / readers; }
  __device__ int reader(int step) const { return readers == 1 ? 0 : step % readers; }
};

// A loader's share of tiles of 64 rows: some columns of every few rows. All that differs between tiles is a
// base, for a loader is one warp of four that must keep up with all walkers.
template <int width>
struct Share {
  static constexpr int units = width / 8, row_step = kLoaders / units, count = kChunk / row_step;
  static_assert(row_step % 8 == 0);  // rows that many apart have their units in the same order
  int row, column;

  __device__ explicit Share(int thread) : row(thread / units), column(thread % units * 8) {}

  // From rows that lie `pitch` elements apart; those at and past valid_rows become zero.
  __device__ void load(Panels<kChunk, width> tile, const bf16* first, int64_t pitch,
                       int valid_rows = kChunk) const {
    const bf16* from = first + row * pitch + column;
    bf16* to = tile.unit(row, column);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      copy_async(to + n * row_step * 64, from, row + n * row_step < valid_rows);
      from += row_step * pitch;
    }
  }
  // By a table of packed rows, in which −1 stands for a row of zeros.
  __device__ void load_packed(Panels<kChunk, width> tile, const bf16* first, int64_t pitch,
                              const int32_t* rows) const {
    const bf16* from = first + column;
    bf16* to = tile.unit(row, column);
    int32_t packed[count];
#pragma unroll
    for (int n = 0; n < count; ++n) packed[n] = rows[row + n * row_step];
#pragma unroll
    for (int n = 0; n < count; ++n)
      copy_async(to + n * row_step * 64, from + packed[n] * pitch, packed[n] >= 0);
  }
};

// Where the chunks of a stream lie, for the loaders of a walk with `width` columns from part_column on.
template <int key_dim, int width>
struct StreamLoads {
  const GatedDeltaArguments& p;
  Share<key_dim> key_share;
  Share<width> value_share;
  Share<kChunk> square_share;
  int thread, part_column, head, readers, query_sharers, last_valid;
  int64_t first_block;
  const bf16 *keys, *values, *inverses;
  const int32_t* tables;

  __device__ StreamLoads(const GatedDeltaArguments& arguments, int64_t stream, int first_column)
      : p(arguments),
        key_share(static_cast<int>(threadIdx.x) % kLoaders),
        value_share(static_cast<int>(threadIdx.x) % kLoaders),
        square_share(static_cast<int>(threadIdx.x) % kLoaders),
        thread(static_cast<int>(threadIdx.x) % kLoaders),
        part_column(first_column),
        readers(p.output_heads / p.state_heads),
        query_sharers(p.output_heads / p.query_heads) {
    const Block first(p, stream, 0), last(p, stream, p.chunks - 1);
    head = first.head, last_valid = last.valid, first_block = first.index;
    keys = first.key_rows(p);
    values = first.rows_of(p.value, head) + part_column;
    inverses = static_cast<const bf16*>(p.inverse) + first_block * kChunk * kChunk;
    tables = first.row_table(p);
  }
  __device__ int valid(int chunk) const { return chunk == p.chunks - 1 ? last_valid : kChunk; }
  __device__ void load_keys(Panels<kChunk, key_dim> tile, int chunk) const {
    key_share.load(tile, keys + int64_t{kChunk} * chunk * p.key.time, p.key.time, valid(chunk));
  }
  __device__ void load_values(Panels<kChunk, width> tile, int chunk) const {
    value_share.load(tile, values + int64_t{kChunk} * chunk * p.value.time, p.value.time, valid(chunk));
  }
  __device__ void load_inverse(Panels<kChunk, kChunk> tile, int chunk) const {
    square_share.load(tile, inverses + int64_t{kChunk} * kChunk * chunk, kChunk);
  }
  __device__ void load_gates(float* gates, int chunk) const {
    if (thread < kGates / 4)
      copy_async(gates + 4 * thread, p.gates + (first_block + chunk) * kGates + 4 * thread);
  }
  __device__ void load_table(int32_t* to, int chunk) const {
    if (thread < gated_delta_row_table / 4)
      copy_async(to + 4 * thread, tables + int64_t{gated_delta_row_table} * chunk + 4 * thread);
  }
  __device__ void load_queries(Panels<kChunk, key_dim> tile, int reader, const int32_t* rows) const {
    const int of_output = head * readers + reader;
    const int query_head = query_sharers == 1 ? of_output : of_output / query_sharers;
    key_share.load_packed(tile, packed_row(p.query, 0, query_head), p.query.time, rows);
  }
  __device__ void load_d_output(Panels<kChunk, width> tile, int reader, const int32_t* rows) const {
    value_share.load_packed(tile, packed_row(p.d_output, 0, head * readers + reader) + part_column,
                            p.d_output.time, rows);
  }
};

}  // namespace oryx::cuda
