// Backward pass: probabilities are recomputed twice, once by blocks of keys for dK and dV and once by items
// of query rows for dQ. That is 7 products where one pass would take 5, but no block adds into another's
// sums.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

// ---- log-sum-exp in powers of two and ⟨dO, O⟩ of each row and head

constexpr int kStatisticsThreads = 256;

// Blocks of threads by tiles, kStatisticsThreads units of eight columns each.
template <int dim>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics_kernel(const AttentionBackward p) {
  constexpr int lanes = dim / 8;  // of a row and head
  const int tile = static_cast<int>(blockIdx.x), heads = p.in.query_heads,
            unit = static_cast<int>(blockIdx.y * kStatisticsThreads + threadIdx.x),
            slot = unit / lanes / heads, head = unit / lanes % heads;
  const QueryItem rows = p.tiles[tile];
  const bool has_row = slot < rows.rows;
  float sum = 0.0f;
  if (has_row) {
    const int64_t at = static_cast<int64_t>(rows.row) * heads * lanes + unit;
    const uint4 gradient = static_cast<const uint4*>(p.output_grad)[at],
                output = static_cast<const uint4*>(p.output)[at];
    const uint32_t g[4] = {gradient.x, gradient.y, gradient.z, gradient.w},
                   o[4] = {output.x, output.y, output.z, output.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack(g[i]), b = unpack(o[i]);
      sum += a.x * b.x + a.y * b.y;
    }
  }
  sum = sum_over_lanes<lanes>(sum);
  if (unit % lanes != 0 || slot >= kTileRows) return;
  float2 statistics{};
  if (has_row) {
    const int64_t row = static_cast<int64_t>(rows.row + slot) * heads + head;
    statistics = {p.logsumexp[row] * log2_of_e, sum};
    reinterpret_cast<float2*>(p.statistics)[row] = statistics;
  }
  const int place = tile_place(slot);
  float* const of_tile =
      p.tile_statistics + (head * p.tile_count + tile) * (2 * kTileRows) + place / 4 * 8 + place % 4;
  of_tile[0] = statistics.x, of_tile[4] = statistics.y;
}

// ---- dK and dV

// A block of `groups` warpgroups, each of which owns kGroupKeys keys, takes tiles of kTileRows query rows, as
// many between two barriers as there are groups. Two groups fill a multiprocessor and read every tile once
// for both; where there are few tiles, or little shared memory, two blocks of one group hide each other's
// beginnings and ends.
constexpr int kGroupKeys = 64, kManySteps = 8;
template <int dim, int group_count>
struct KeyPass {
  static constexpr int groups = group_count, threads = 128 * groups, blocks = 3 - groups;
  static constexpr int keys = kGroupKeys * groups, stages = 2 * groups;
  using Keys = Panels<keys, dim>;
  using Rows = Panels<kTileRows, dim>;
  // K, V; Q and dO of the stages; of each stage the rows' statistics and positions.
  static constexpr size_t tiles_bytes = 2 * Keys::bytes + 2 * stages * Rows::bytes;
  static constexpr size_t bytes = tiles_bytes + stages * kTileRows * (sizeof(float2) + sizeof(int));
};

template <int dim, int groups>
__global__ void __launch_bounds__(KeyPass<dim, groups>::threads, KeyPass<dim, groups>::blocks)
    attention_key_gradients_kernel(const AttentionBackward p) {
  using Pass = KeyPass<dim, groups>;
  const int key_head = static_cast<int>(blockIdx.x % p.in.key_heads), heads = p.in.query_heads,
            readers = heads / p.in.key_heads;
  const KeyBlock block = p.blocks[blockIdx.x / p.in.key_heads];
  const int begin = block.begin + static_cast<int>(blockIdx.y) * Pass::keys;
  char* const shared = shared_memory();
  const typename Pass::Keys k{reinterpret_cast<bf16*>(shared)}, v{k.base + Pass::keys * dim};
  bf16* const ring = v.base + Pass::keys * dim;
  auto* const statistics = reinterpret_cast<float2*>(shared + Pass::tiles_bytes);
  auto* const positions = reinterpret_cast<int*>(statistics + Pass::stages * kTileRows);
  const auto q_tile = [&](int n) {
    return typename Pass::Rows{ring + 2 * (n % Pass::stages) * kTileRows * dim};
  };
  const auto grad_tile = [&](int n) {
    return typename Pass::Rows{ring + (2 * (n % Pass::stages) + 1) * kTileRows * dim};
  };

  // A step is a tile and one of the query heads that read this key head; its number gives its stage.
  int tile = block.first_tile, reader = 0, steps = block.tiles * readers;  // of the next step to load
  for (; steps > 0 && p.tiles[tile].last < begin; ++tile) steps -= readers;
  // What this thread brings for a group of steps: the first half the rows' statistics, the second their
  // positions (as bits). Rows past a tile's end get no weight.
  constexpr int slots = groups * kTileRows;
  const int slot = static_cast<int>(threadIdx.x) % slots;
  const bool has_statistics = threadIdx.x < slots;
  float2 brought = {INFINITY, 0.0f};
  const auto load = [&](int n) {  // of steps n …
#pragma unroll
    for (int i = 0; i < groups; ++i) {
      if (n + i >= steps) break;
      const QueryItem rows = p.tiles[tile];
      const int head = key_head * readers + reader;
      if (++reader == readers) reader = 0, ++tile;
      const int64_t stride = static_cast<int64_t>(heads) * dim;
      load_rows<Pass::threads>(q_tile(n + i), rows.rows,
                               packed_row<dim>(static_cast<const bf16*>(p.in.query), rows.row, heads, head),
                               stride);
      load_rows<Pass::threads>(
          grad_tile(n + i), rows.rows,
          packed_row<dim>(static_cast<const bf16*>(p.output_grad), rows.row, heads, head), stride);
      const int row = slot - i * kTileRows;
      if (row < 0 || row >= kTileRows) continue;
      const int64_t at = rows.row + row;
      if (has_statistics) {
        brought = {INFINITY, 0.0f};
        if (row < rows.rows) brought = reinterpret_cast<const float2*>(p.statistics)[at * heads + head];
      } else {
        brought.x = __uint_as_float(row < rows.rows ? static_cast<uint32_t>(p.in.positions[at]) : 0u);
      }
    }
    commit_copies();
  };
  const auto deposit = [&](int n) {
    const int at = n % Pass::stages * kTileRows + slot;
    if (has_statistics) {
      statistics[at] = brought;
    } else {
      positions[at] = static_cast<int>(__float_as_uint(brought.x));
    }
  };

  if (steps > 0) {
    const int valid = block.end - begin;
    load_rows<Pass::threads>(
        k, valid, rows_of(p.in.key, p.in.key_strides, block.sequence, key_head) + begin * p.in.key_strides[1],
        p.in.key_strides[1]);
    load_rows<Pass::threads>(
        v, valid,
        rows_of(p.in.value, p.in.value_strides, block.sequence, key_head) + begin * p.in.value_strides[1],
        p.in.value_strides[1]);
    load(0);
    deposit(0);
  }

  const int lane = static_cast<int>(threadIdx.x) % 32,
            group_row0 = groups == 1 ? 0 : warpgroup() * kGroupKeys,
            row0 = group_row0 + warp_of_group() * 16,  // this warp's first key in the block
      first_key = begin + row0;
  const float scale = p.in.scale * log2_of_e;
  Accumulator<1, dim / 8> k_grad, v_grad;
  k_grad.clear();
  v_grad.clear();
  for (int first = 0; first < steps; first += groups) {
    wait_copies<0>();
    publish_to_products();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < groups; ++i) {
      const int n = first + i;
      if (n >= steps) break;
      // Transposed: rows are keys, columns are query rows.
      Accumulator<1, kTileRows / 8> s, ds;
      warpgroup_fence();
      multiply_rows(s, k, group_row0, q_tile(n));
      warpgroup_commit();
      multiply_rows(ds, v, group_row0, grad_tile(n));
      warpgroup_commit();
      if (i == 0 && first + groups < steps) load(first + groups);
      const int at = n % Pass::stages * kTileRows;
      const float2* const of_column = statistics + at + lane % 4 * 2;
      const int* const position_of = positions + at + lane % 4 * 2;
      warpgroup_wait<1>();
      settle(s);
#pragma unroll
      for (int j = 0; j < kTileRows / 8; ++j) {
        const float4 pair = *reinterpret_cast<const float4*>(of_column + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s.value[0][j][e] = exp2_fast(s.value[0][j][e] * scale - (e % 2 == 0 ? pair.x : pair.z));
      }
      if (positions[at] < first_key + 15) {
#pragma unroll
        for (int j = 0; j < kTileRows / 8; ++j) {
          const int2 pair = *reinterpret_cast<const int2*>(position_of + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = first_key + lane / 4 + 8 * (e / 2);
            if (key > (e % 2 == 0 ? pair.x : pair.y)) s.value[0][j][e] = 0.0f;
          }
        }
      }
      uint32_t weights[kTileRows / 16][4], weight_grads[kTileRows / 16][4];
      as_operand(weights, s);
      warpgroup_fence();
      multiply_columns(v_grad, weights, grad_tile(n));
      warpgroup_commit();
      warpgroup_wait<1>();
      settle(ds);
#pragma unroll
      for (int j = 0; j < kTileRows / 8; ++j) {
        const float4 pair = *reinterpret_cast<const float4*>(of_column + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds.value[0][j][e] = s.value[0][j][e] * (ds.value[0][j][e] - (e % 2 == 0 ? pair.y : pair.w));
      }
      as_operand(weight_grads, ds);
      warpgroup_fence();
      multiply_columns(k_grad, weight_grads, q_tile(n));
      warpgroup_commit();
      if (i == groups - 1 && first + groups < steps) deposit(first + groups);
      warpgroup_wait<0>();
      settle(v_grad);
      settle(k_grad);
    }
  }

  k_grad.for_pairs([&](int, int, float& first, float& second) { first *= p.in.scale, second *= p.in.scale; });
  __syncthreads();  // all warps have read K and V
  const auto target = [&](void* gradient) {
    return [&, gradient](int row) -> bf16* {
      const int64_t token = block.sequence * p.capacity + begin + row;
      if (begin + row >= p.capacity) return nullptr;
      return packed_row<dim>(static_cast<bf16*>(gradient), token, p.in.key_heads, key_head);
    };
  };
  store_rows(k_grad, k, row0, target(p.key_grad));
  store_rows(v_grad, v, row0, target(p.value_grad));
}

// ---- dQ

// A block takes an item: two warpgroups of 64 rows each share the tiles of keys. Three stages, so that the
// last product of a tile may still run while the next begins; GPUs with little shared memory, none of which
// has wgmma, do with two stages of 32 keys.
template <int dim, int tile_keys>
struct QueryPass {
  static constexpr int threads = 256, keys = tile_keys, stages = keys == 64 ? 3 : 2;
  using Rows = Panels<kItemRows, dim>;
  using Keys = Panels<keys, dim>;
  static constexpr size_t bytes = 2 * Rows::bytes + 2 * stages * Keys::bytes;  // Q, dO; K and V
};

template <int dim, int tile_keys>
__global__ void __launch_bounds__(QueryPass<dim, tile_keys>::threads, 1)
    attention_query_gradients_kernel(const AttentionBackward p) {
  using Pass = QueryPass<dim, tile_keys>;
  const int heads = p.in.query_heads, head = static_cast<int>(blockIdx.x % heads),
            key_head = head / (heads / p.in.key_heads);
  const QueryItem item = p.in.items[blockIdx.x / heads];
  const typename Pass::Rows q{reinterpret_cast<bf16*>(shared_memory())}, grad{q.base + kItemRows * dim};
  bf16* const ring = grad.base + kItemRows * dim;
  const bf16* const keys = rows_of(p.in.key, p.in.key_strides, item.sequence, key_head);
  const bf16* const values = rows_of(p.in.value, p.in.value_strides, item.sequence, key_head);
  const auto k_tile = [&](int stage) { return typename Pass::Keys{ring + 2 * stage * Pass::keys * dim}; };
  const auto v_tile = [&](int stage) {
    return typename Pass::Keys{ring + (2 * stage + 1) * Pass::keys * dim};
  };
  const auto load = [&](int n, int stage) {
    const int key0 = n * Pass::keys, valid = item.last + 1 - key0;
    load_rows<Pass::threads>(k_tile(stage), valid, keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
    load_rows<Pass::threads>(v_tile(stage), valid, values + key0 * p.in.value_strides[1],
                             p.in.value_strides[1]);
    commit_copies();
  };
  const int64_t stride = static_cast<int64_t>(heads) * dim;
  load_rows<Pass::threads>(
      q, item.rows, packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, heads, head), stride);
  load_rows<Pass::threads>(grad, item.rows,
                           packed_row<dim>(static_cast<const bf16*>(p.output_grad), item.row, heads, head),
                           stride);
  load(0, 0);

  const int lane = static_cast<int>(threadIdx.x) % 32, group_row0 = warpgroup() * 64,
            row0 = group_row0 + warp_of_group() * 16;
  const int* const positions = p.in.positions + item.row;
  // The last position of the warpgroup's rows and the first of the warp's.
  const int last = group_row0 < item.rows ? positions[std::min(group_row0 + 64, item.rows) - 1] : -1;
  const int first = row0 < item.rows ? positions[row0] : item.last;
  float2 statistic[2];
  int position[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half + lane / 4;
    statistic[half] = {INFINITY, 0.0f};
    position[half] = item.last;
    if (row < item.rows) {
      statistic[half] =
          reinterpret_cast<const float2*>(p.statistics)[static_cast<int64_t>(item.row + row) * heads + head];
      position[half] = positions[row];
    }
  }
  const float scale = p.in.scale * log2_of_e;

  Accumulator<1, dim / 8> q_grad;
  q_grad.clear();
  uint32_t weight_grads[Pass::keys / 16][4];
  const int tiles = item.last / Pass::keys + 1, own_tiles = (last + Pass::keys) / Pass::keys;
  int n = 0, stage = 0;
  const auto advance = [&] {  // to tile n; returns its stage
    const int next_stage = stage + 1 < Pass::stages ? stage + 1 : 0;
    wait_copies<0>();
    publish_to_products();
    __syncthreads();  // and every warpgroup is done with the tile before the last
    if (n + 1 < tiles) load(n + 1, next_stage);
    const int now = stage;
    stage = next_stage;
    return now;
  };
  for (; n < own_tiles; ++n) {
    const int now = advance(), key0 = n * Pass::keys;
    Accumulator<1, Pass::keys / 8> s, ds;
    warpgroup_fence();
    multiply_rows(s, q, group_row0, k_tile(now));
    warpgroup_commit();
    multiply_rows(ds, grad, group_row0, v_tile(now));
    warpgroup_commit();
    warpgroup_wait<1>();
    settle(s);
#pragma unroll
    for (int j = 0; j < Pass::keys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.value[0][j][e] = exp2_fast(s.value[0][j][e] * scale - statistic[e / 2].x);
    if (key0 + Pass::keys - 1 > first) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int seen = position[half] - key0 - lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < Pass::keys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * j + e > seen) s.value[0][j][2 * half + e] = 0.0f;
      }
    }
    warpgroup_wait<0>();
    settle(ds);
#pragma unroll
    for (int j = 0; j < Pass::keys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        ds.value[0][j][e] = s.value[0][j][e] * (ds.value[0][j][e] - statistic[e / 2].y);
    as_operand(weight_grads, ds);
    warpgroup_fence();
    multiply_columns(q_grad, weight_grads, k_tile(now));
    warpgroup_commit();
  }
  warpgroup_wait<0>();
  settle(q_grad);
  for (; n < tiles; ++n) advance();  // tiles that only the other warpgroup sees

  q_grad.for_pairs([&](int, int, float& a, float& b) { a *= p.in.scale, b *= p.in.scale; });
  __syncthreads();  // all warps have read Q
  store_rows(q_grad, q, row0, [&](int row) -> bf16* {
    if (row >= item.rows) return nullptr;
    return packed_row<dim>(static_cast<bf16*>(p.query_grad), item.row + row, heads, head);
  });
}

template <int dim, int tile_keys>
void run_query_pass(const AttentionBackward& p, void* stream) {
  using Pass = QueryPass<dim, tile_keys>;
  launch<attention_query_gradients_kernel<dim, tile_keys>>(
      dim3(static_cast<unsigned>(p.in.item_count * p.in.query_heads)), Pass::threads, Pass::bytes, stream, p);
}

template <int dim, int groups>
void run_key_pass(const AttentionBackward& p, void* stream) {
  using Pass = KeyPass<dim, groups>;
  static_assert(kBlockKeys % Pass::keys == 0);
  launch<attention_key_gradients_kernel<dim, groups>>(
      dim3(static_cast<unsigned>(p.block_count * p.in.key_heads), kBlockKeys / Pass::keys), Pass::threads,
      Pass::bytes, stream, p);
}

template <int dim>
void run(const AttentionBackward& p, void* stream) {
  const int units = kTileRows * p.in.query_heads * (dim / 8);
  launch<attention_statistics_kernel<dim>>(
      dim3(static_cast<unsigned>(p.tile_count), (units + kStatisticsThreads - 1) / kStatisticsThreads),
      kStatisticsThreads, 0, stream, p);
  if (p.score_grads != nullptr) return attention_backward_kept(p, stream);
  if (has_backward_rings(dim)) {
    attention_key_gradients(p, stream);
    attention_query_gradients(p, stream);
    return;
  }
  // A key sees about half of its sequence's rows.
  const int64_t sequences = p.block_count / ((p.capacity + kBlockKeys - 1) / kBlockKeys);
  const bool has_many_steps =
      p.rows * (p.in.query_heads / p.in.key_heads) >= sequences * kManySteps * 2 * kTileRows;
  if (has_many_steps && KeyPass<dim, 2>::bytes <= largest_shared_memory()) {
    run_key_pass<dim, 2>(p, stream);
  } else {
    run_key_pass<dim, 1>(p, stream);
  }
  if (QueryPass<dim, 64>::bytes <= largest_shared_memory()) {
    run_query_pass<dim, 64>(p, stream);
  } else {
    run_query_pass<dim, 32>(p, stream);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& arguments, void* stream) {
  if (arguments.in.dim == 128) {
    run<128>(arguments, stream);
  } else {
    run<64>(arguments, stream);
  }
}

}  // namespace oryx::cuda
