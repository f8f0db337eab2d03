// Forward pass: one block of threads per item of 128 rows and query head walks the keys in tiles of 64
// (FlashAttention-2). A warp owns 32 rows: fewer would read K and V from shared memory more often than the
// tensor cores can use them.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

constexpr int kKeys = 64;
constexpr int kWarpRows = kItemRows / kAttentionWarps;
// The running maximum is raised only by at least this many powers of two; until then probabilities exceed 1,
// which changes nothing but their common factor.
constexpr float kSlack = 8.0f;

template <int dim>
constexpr size_t forward_bytes() {
  return Tile<dim>::bytes(kItemRows) + 4 * Tile<dim>::bytes(kKeys);
}

template <int dim>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention_forward_kernel(const AttentionForward p) {
  const int head = static_cast<int>(blockIdx.x % p.in.query_heads);
  const QueryItem item = p.in.items[blockIdx.x / p.in.query_heads];
  const int key_head = head / (p.in.query_heads / p.in.key_heads);
  const Tile<dim> q{reinterpret_cast<bf16*>(shared_memory())};
  bf16* const ring = q.base + kItemRows * dim;  // K of two stages, then V of two stages
  const bf16* const keys = static_cast<const bf16*>(p.in.key) + item.sequence * p.in.key_strides[0] +
                           key_head * p.in.key_strides[2];
  const bf16* const values = static_cast<const bf16*>(p.in.value) + item.sequence * p.in.value_strides[0] +
                             key_head * p.in.value_strides[2];
  const auto k_tile = [&](int n) { return Tile<dim>{ring + n % 2 * kKeys * dim}; };
  const auto v_tile = [&](int n) { return Tile<dim>{ring + (2 + n % 2) * kKeys * dim}; };
  const auto load = [&](int n) {
    const int key0 = n * kKeys, valid = item.last + 1 - key0;
    load_rows<kKeys>(k_tile(n), valid, keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
    load_rows<kKeys>(v_tile(n), valid, values + key0 * p.in.value_strides[1], p.in.value_strides[1]);
    commit_copies();
  };
  load_rows<kItemRows>(
      q, item.rows, packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, p.in.query_heads, head),
      static_cast<int64_t>(p.in.query_heads) * dim);
  load(0);

  const int lane = static_cast<int>(threadIdx.x) % 32, row0 = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  // Positions of the warp's rows; rows past the item's end stand where its first row does.
  const int* const positions = p.in.positions + item.row;
  const int first = row0 < item.rows ? positions[row0] : -1;
  const int last = row0 < item.rows ? positions[std::min(row0 + kWarpRows, item.rows) - 1] : -1;
  float maximum[2][2], sum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[i][half] = -INFINITY;
      sum[i][half] = 0.0f;
    }
  const float scale = p.in.scale * log2_of_e, slack = kSlack / scale;

  Accumulator<2, dim / 8> o;
  o.clear();
  const int tiles = item.last / kKeys + 1;
  for (int n = 0; n < tiles; ++n) {
    wait_copies<0>();
    __syncthreads();
    if (n + 1 < tiles) load(n + 1);
    const int key0 = n * kKeys;
    if (key0 > last) continue;  // never the first tile, unless the warp has no row

    Accumulator<2, kKeys / 8> s;
    s.clear();
    multiply<dim>(s, Fragments<dim>::a(q, row0), Fragments<dim>::b(k_tile(n), 0));
    if (key0 + kKeys - 1 > first) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + 16 * i + 8 * half + lane / 4;
          const int seen = (row < item.rows ? positions[row] : first) - key0 - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * j + e > seen) s.value[i][j][2 * half + e] = -INFINITY;
        }
    }

    float largest[2][2];
    bool raise = false;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(s.value[i][0][2 * half], s.value[i][0][2 * half + 1]);
#pragma unroll
        for (int j = 1; j < kKeys / 8; ++j)
          x = fmaxf(x, fmaxf(s.value[i][j][2 * half], s.value[i][j][2 * half + 1]));
        largest[i][half] = max_over_lanes<4>(x);
        raise |= largest[i][half] > maximum[i][half] + slack;
      }
    if (__any_sync(0xffffffffu, raise)) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!(largest[i][half] > maximum[i][half] + slack)) continue;
          const float factor = exp2_fast((maximum[i][half] - largest[i][half]) * scale);
          maximum[i][half] = largest[i][half];
          sum[i][half] *= factor;
#pragma unroll
          for (int j = 0; j < dim / 8; ++j) {
            o.value[i][j][2 * half] *= factor;
            o.value[i][j][2 * half + 1] *= factor;
          }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = maximum[i][half] * scale;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s.value[i][j][2 * half + e];
            x = exp2_fast(x * scale - shift);
            sum[i][half] += x;
          }
      }
    multiply(o, s, Fragments<dim>::b_transposed(v_tile(n), 0));
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_over_lanes<4>(sum[i][half]);
      const float inverse = 1.0f / total;
#pragma unroll
      for (int j = 0; j < dim / 8; ++j) {
        o.value[i][j][2 * half] *= inverse;
        o.value[i][j][2 * half + 1] *= inverse;
      }
      const int row = row0 + 16 * i + 8 * half + lane / 4;
      if (p.logsumexp && lane % 4 == 0 && row < item.rows) {
        p.logsumexp[static_cast<int64_t>(item.row + row) * p.in.query_heads + head] =
            maximum[i][half] * p.in.scale + logf(total);
      }
    }
  // Through the warp's own rows of Q, which only it reads, so that rows are written whole.
  __syncwarp();
  o.store(q, row0, 0);
  __syncwarp();
  store_rows<kWarpRows>(q, row0, [&](int row) -> bf16* {
    if (row >= item.rows) return nullptr;
    return packed_row<dim>(static_cast<bf16*>(p.output), item.row + row, p.in.query_heads, head);
  });
}

}  // namespace

void attention_forward(const AttentionForward& arguments, void* stream) {
  const dim3 grid(static_cast<unsigned>(arguments.in.item_count * arguments.in.query_heads));
  if (arguments.in.dim == 128) {
    launch<attention_forward_kernel<128>>(grid, kAttentionThreads, forward_bytes<128>(), stream, arguments);
  } else {
    launch<attention_forward_kernel<64>>(grid, kAttentionThreads, forward_bytes<64>(), stream, arguments);
  }
}

}  // namespace oryx::cuda
