// Forward pass: one block of threads per item of 128 rows and query head walks the keys in tiles of 64
// (FlashAttention-3); of 32 on GPUs with little shared memory. Two warpgroups of 64 rows each share the
// tiles; while the weights of one tile are made, those of the tile before are multiplied by its values, which
// takes three stages.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

constexpr int kThreads = 256, kStages = 3;
// The running maximum is raised only by at least this many powers of two; until then probabilities exceed 1,
// which changes nothing but their common factor.
constexpr float kSlack = 8.0f;

template <int dim, int keys>
constexpr size_t forward_bytes() {
  return Panels<kItemRows, dim>::bytes + 2 * kStages * Panels<keys, dim>::bytes;
}

// What a thread knows of its two rows, lane / 4 and lane / 4 + 8 of its warp's.
struct RowStates {
  int position[2];
  float maximum[2], sum[2];
};

// Turns scores into weights relative to the running maximum. Returns by what sums over earlier tiles are to
// be multiplied.
template <int keys>
__device__ inline float2 weigh(Accumulator<1, keys / 8>& s, RowStates& rows, int key0, int first,
                               float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (key0 + keys - 1 > first) {  // the warp's first position
      const int seen = rows.position[half] - key0 - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < keys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e > seen) s.value[0][j][2 * half + e] = -INFINITY;
    }
    float largest = fmaxf(s.value[0][0][2 * half], s.value[0][0][2 * half + 1]);
#pragma unroll
    for (int j = 1; j < keys / 8; ++j)
      largest = fmaxf(largest, fmaxf(s.value[0][j][2 * half], s.value[0][j][2 * half + 1]));
    largest = max_over_lanes<4>(largest);
    factor[half] = 1.0f;
    if (largest > rows.maximum[half] + kSlack / scale) {
      factor[half] = exp2_fast((rows.maximum[half] - largest) * scale);
      rows.maximum[half] = largest;
    }
    const float shift = rows.maximum[half] * scale;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < keys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.value[0][j][2 * half + e];
        x = exp2_fast(x * scale - shift);
        sum += x;
      }
    rows.sum[half] = rows.sum[half] * factor[half] + sum;
  }
  return {factor[0], factor[1]};
}

template <int dim, int tile_keys>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(const AttentionForward p) {
  const int head = static_cast<int>(blockIdx.x % p.in.query_heads);
  const QueryItem item = p.in.items[blockIdx.x / p.in.query_heads];
  const int key_head = head / (p.in.query_heads / p.in.key_heads);
  const Panels<kItemRows, dim> q{reinterpret_cast<bf16*>(shared_memory())};
  bf16* const ring = q.base + kItemRows * dim;
  const bf16* const keys = rows_of(p.in.key, p.in.key_strides, item.sequence, key_head);
  const bf16* const values = rows_of(p.in.value, p.in.value_strides, item.sequence, key_head);
  const auto k_tile = [&](int stage) { return Panels<tile_keys, dim>{ring + 2 * stage * tile_keys * dim}; };
  const auto v_tile = [&](int stage) {
    return Panels<tile_keys, dim>{ring + (2 * stage + 1) * tile_keys * dim};
  };
  const auto load = [&](int n, int stage) {
    const int key0 = n * tile_keys, valid = item.last + 1 - key0;
    load_rows<kThreads>(k_tile(stage), valid, keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
    load_rows<kThreads>(v_tile(stage), valid, values + key0 * p.in.value_strides[1], p.in.value_strides[1]);
    commit_copies();
  };
  load_rows<kThreads>(q, item.rows,
                      packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, p.in.query_heads, head),
                      static_cast<int64_t>(p.in.query_heads) * dim);
  load(0, 0);

  const int lane = static_cast<int>(threadIdx.x) % 32, group_row0 = warpgroup() * 64,
            row0 = group_row0 + warp_of_group() * 16;
  const int* const positions = p.in.positions + item.row;
  // The last position of the warpgroup's rows and the first of the warp's. Rows past the item's end stand
  // where its last row does.
  const int last = group_row0 < item.rows ? positions[std::min(group_row0 + 64, item.rows) - 1] : -1;
  const int first = row0 < item.rows ? positions[row0] : item.last;
  RowStates rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half + lane / 4;
    rows.position[half] = row < item.rows ? positions[row] : item.last;
    rows.maximum[half] = -INFINITY;
    rows.sum[half] = 0.0f;
  }
  const float scale = p.in.scale * log2_of_e;

  Accumulator<1, dim / 8> o;
  o.clear();
  const int tiles = item.last / tile_keys + 1, own_tiles = (last + tile_keys) / tile_keys;
  int n = 0, stage = 0;
  const auto advance = [&] {  // to tile n; returns its stage
    const int now = stage;
    stage = stage + 1 < kStages ? stage + 1 : 0;
    wait_copies<0>();
    publish_to_products();
    __syncthreads();  // and every warpgroup is done with the tile before the last
    if (n + 1 < tiles) load(n + 1, stage);
    return now;
  };
  if (own_tiles > 0) {
    uint32_t weights[tile_keys / 16][4];  // of the tile before
    int before = advance();
    {
      Accumulator<1, tile_keys / 8> s;
      warpgroup_fence();
      multiply_rows(s, q, group_row0, k_tile(before));
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(s);
      weigh<tile_keys>(s, rows, 0, first, scale);
      as_operand(weights, s);
    }
    for (n = 1; n < own_tiles; ++n) {
      const int now = advance();
      Accumulator<1, tile_keys / 8> s;
      warpgroup_fence();
      multiply_rows(s, q, group_row0, k_tile(now));
      warpgroup_commit();
      multiply_columns(o, weights, v_tile(before));
      warpgroup_commit();
      warpgroup_wait<1>();
      settle(s);
      const float2 factor = weigh<tile_keys>(s, rows, n * tile_keys, first, scale);
      warpgroup_wait<0>();
      settle(o);
      if (__any_sync(0xffffffffu, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
        for (int j = 0; j < dim / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) o.value[0][j][e] *= e < 2 ? factor.x : factor.y;
      }
      as_operand(weights, s);
      before = now;
    }
    warpgroup_fence();
    multiply_columns(o, weights, v_tile(before));
    warpgroup_commit();
    warpgroup_wait<0>();
    settle(o);
  }
  for (; n < tiles; ++n) advance();  // tiles that only the other warpgroup sees

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_over_lanes<4>(rows.sum[half]);
    const float inverse = 1.0f / total;
#pragma unroll
    for (int j = 0; j < dim / 8; ++j) {
      o.value[0][j][2 * half] *= inverse;
      o.value[0][j][2 * half + 1] *= inverse;
    }
    const int row = row0 + 8 * half + lane / 4;
    if (p.logsumexp && lane % 4 == 0 && row < item.rows) {
      p.logsumexp[static_cast<int64_t>(item.row + row) * p.in.query_heads + head] =
          rows.maximum[half] * p.in.scale + logf(total);
    }
  }
  __syncthreads();  // all warps have read Q
  store_rows(o, q, row0, [&](int row) -> bf16* {
    if (row >= item.rows) return nullptr;
    return packed_row<dim>(static_cast<bf16*>(p.output), item.row + row, p.in.query_heads, head);
  });
}

template <int dim>
void run(const AttentionForward& arguments, void* stream) {
  const dim3 grid(static_cast<unsigned>(arguments.in.item_count * arguments.in.query_heads));
  constexpr size_t bytes = forward_bytes<dim, 64>();
  if (bytes <= largest_shared_memory()) {
    launch<attention_forward_kernel<dim, 64>>(grid, kThreads, bytes, stream, arguments);
  } else {
    launch<attention_forward_kernel<dim, 32>>(grid, kThreads, forward_bytes<dim, 32>(), stream, arguments);
  }
}

}  // namespace

void attention_forward(const AttentionForward& arguments, void* stream) {
  if (arguments.in.dim == 128) {
    run<128>(arguments, stream);
  } else {
    run<64>(arguments, stream);
  }
}

}  // namespace oryx::cuda
