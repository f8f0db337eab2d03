// Backward pass: probabilities are recomputed twice, once by blocks of keys for dK and dV and once by items
// of query rows for dQ. That is 7 products where one pass would take 5, but no block adds into another's
// sums.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

__device__ inline const bf16* rows_of(const void* tensor, const int64_t (&strides)[3], int64_t sequence,
                                      int64_t head) {
  return static_cast<const bf16*>(tensor) + sequence * strides[0] + head * strides[2];
}

// ---- log-sum-exp in powers of two and ⟨dO, O⟩ of each row and head

constexpr int kStatisticsThreads = 256;

template <int dim>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics_kernel(const AttentionBackward p) {
  constexpr int lanes = dim / 8;  // of a row and head
  const int64_t all = p.rows * p.in.query_heads,
                unit = static_cast<int64_t>(blockIdx.x) * kStatisticsThreads + threadIdx.x,
                row = unit / lanes;
  float sum = 0.0f;
  if (row < all) {
    const uint4 gradient = static_cast<const uint4*>(p.output_grad)[unit],
                output = static_cast<const uint4*>(p.output)[unit];
    const uint32_t g[4] = {gradient.x, gradient.y, gradient.z, gradient.w},
                   o[4] = {output.x, output.y, output.z, output.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack(g[i]), b = unpack(o[i]);
      sum += a.x * b.x + a.y * b.y;
    }
  }
  sum = sum_over_lanes<lanes>(sum);
  if (row < all && unit % lanes == 0)
    reinterpret_cast<float2*>(p.statistics)[row] = {p.logsumexp[row] * log2_of_e, sum};
}

// ---- dK and dV

// A warp owns `tiles` · 16 keys and takes `columns` query rows at a time, so that both gradients and both
// products fit its registers.
template <int dim>
struct KeyPass {
  static constexpr int tiles = dim == 128 ? 1 : 2, columns = dim == 128 ? 64 : 32;
  static constexpr int keys = key_block(dim), warp_keys = 16 * tiles;
  static_assert(keys == kAttentionWarps * warp_keys);

  // K, V; Q and dO of two stages; of each stage the rows' statistics and positions.
  static constexpr size_t tiles_bytes = 2 * Tile<dim>::bytes(keys) + 4 * Tile<dim>::bytes(kTileRows);
  static constexpr size_t bytes = tiles_bytes + 2 * kTileRows * (sizeof(float2) + sizeof(int));
};

template <int dim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_key_gradients_kernel(const AttentionBackward p) {
  using Pass = KeyPass<dim>;
  const int key_head = static_cast<int>(blockIdx.x % p.in.key_heads), heads = p.in.query_heads,
            group = heads / p.in.key_heads;
  const KeyBlock block = p.blocks[blockIdx.x / p.in.key_heads];
  char* const shared = shared_memory();
  const Tile<dim> k{reinterpret_cast<bf16*>(shared)}, v{k.base + Pass::keys * dim};
  bf16* const ring = v.base + Pass::keys * dim;
  auto* const statistics = reinterpret_cast<float2*>(shared + Pass::tiles_bytes);
  auto* const positions = reinterpret_cast<int*>(statistics + 2 * kTileRows);
  const auto q_tile = [&](int n) { return Tile<dim>{ring + n % 2 * kTileRows * dim}; };
  const auto grad_tile = [&](int n) { return Tile<dim>{ring + (2 + n % 2) * kTileRows * dim}; };

  // A step is a tile and one of the query heads that read this key head; the parity of its number is its
  // stage.
  struct Step {
    int tile, head;
  };
  const auto after = [&](Step step) {
    return step.head + 1 < group ? Step{step.tile, step.head + 1} : Step{step.tile + 1, 0};
  };
  // What this thread brings for the next step: the first half the rows' statistics, the second their
  // positions (as bits). Rows past the tile's end get no weight.
  const int slot = static_cast<int>(threadIdx.x) % kTileRows;
  const bool has_statistics = threadIdx.x < kTileRows;
  float2 brought;
  const auto load = [&](int n, Step step) {
    const QueryItem tile = p.tiles[step.tile];
    const int head = key_head * group + step.head;
    const int64_t stride = static_cast<int64_t>(heads) * dim;
    load_rows<kTileRows>(q_tile(n), tile.rows,
                         packed_row<dim>(static_cast<const bf16*>(p.in.query), tile.row, heads, head),
                         stride);
    load_rows<kTileRows>(grad_tile(n), tile.rows,
                         packed_row<dim>(static_cast<const bf16*>(p.output_grad), tile.row, heads, head),
                         stride);
    commit_copies();
    const int64_t row = tile.row + slot;
    if (has_statistics) {
      brought = {INFINITY, 0.0f};
      if (slot < tile.rows) brought = reinterpret_cast<const float2*>(p.statistics)[row * heads + head];
    } else {
      brought.x = __uint_as_float(slot < tile.rows ? static_cast<uint32_t>(p.in.positions[row]) : 0u);
    }
  };
  const auto deposit = [&](int n) {
    if (has_statistics) {
      statistics[n % 2 * kTileRows + slot] = brought;
    } else {
      positions[n % 2 * kTileRows + slot] = static_cast<int>(__float_as_uint(brought.x));
    }
  };

  Step step{block.first_tile, 0};
  const int steps = block.tiles * group;
  if (steps > 0) {
    const int valid = block.end - block.begin;
    load_rows<Pass::keys>(
        k, valid,
        rows_of(p.in.key, p.in.key_strides, block.sequence, key_head) + block.begin * p.in.key_strides[1],
        p.in.key_strides[1]);
    load_rows<Pass::keys>(v, valid,
                          rows_of(p.in.value, p.in.value_strides, block.sequence, key_head) +
                              block.begin * p.in.value_strides[1],
                          p.in.value_strides[1]);
    load(0, step);
    deposit(0);
  }

  const int lane = static_cast<int>(threadIdx.x) % 32,
            row0 =
                static_cast<int>(threadIdx.x) / 32 * Pass::warp_keys,  // this warp's first key in the block
      first_key = block.begin + row0;
  const float scale = p.in.scale * log2_of_e;
  Accumulator<Pass::tiles, dim / 8> k_grad, v_grad;
  k_grad.clear();
  v_grad.clear();
  for (int n = 0; n < steps; ++n) {
    wait_copies<0>();
    __syncthreads();
    const QueryItem tile = p.tiles[step.tile];
    step = after(step);
    if (n + 1 < steps) load(n + 1, step);
    if (tile.last >= first_key) {
      const bool is_masked = tile.first < first_key + Pass::warp_keys - 1;
#pragma unroll 1
      for (int column0 = 0; column0 < kTileRows; column0 += Pass::columns) {
        // Transposed: rows are keys, columns are query rows.
        Accumulator<Pass::tiles, Pass::columns / 8> s, ds;
        s.clear();
        multiply<dim>(s, Fragments<dim>::a(k, row0), Fragments<dim>::b(q_tile(n), column0));
        const float2* const of_column = statistics + n % 2 * kTileRows + column0 + lane % 4 * 2;
        const int* const position_of = positions + n % 2 * kTileRows + column0 + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < Pass::columns / 8; ++j) {
          const float4 pair = *reinterpret_cast<const float4*>(of_column + 8 * j);
#pragma unroll
          for (int i = 0; i < Pass::tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              s.value[i][j][e] = exp2_fast(s.value[i][j][e] * scale - (e % 2 == 0 ? pair.x : pair.z));
        }
        if (is_masked) {
#pragma unroll
          for (int j = 0; j < Pass::columns / 8; ++j) {
            const int2 pair = *reinterpret_cast<const int2*>(position_of + 8 * j);
#pragma unroll
            for (int i = 0; i < Pass::tiles; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int key = first_key + 16 * i + lane / 4 + 8 * (e / 2);
                if (key > (e % 2 == 0 ? pair.x : pair.y)) s.value[i][j][e] = 0.0f;
              }
          }
        }
        multiply(v_grad, s, Fragments<dim>::b_transposed(grad_tile(n), column0));
        ds.clear();
        multiply<dim>(ds, Fragments<dim>::a(v, row0), Fragments<dim>::b(grad_tile(n), column0));
#pragma unroll
        for (int j = 0; j < Pass::columns / 8; ++j) {
          const float4 pair = *reinterpret_cast<const float4*>(of_column + 8 * j);
#pragma unroll
          for (int i = 0; i < Pass::tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              ds.value[i][j][e] = s.value[i][j][e] * (ds.value[i][j][e] - (e % 2 == 0 ? pair.y : pair.w));
        }
        multiply(k_grad, ds, Fragments<dim>::b_transposed(q_tile(n), column0));
      }
    }
    if (n + 1 < steps) deposit(n + 1);
  }

  // Through the warp's own rows of K and V, so that rows are written whole.
  k_grad.for_pairs([&](int, int, float& first, float& second) { first *= p.in.scale, second *= p.in.scale; });
  __syncwarp();
  k_grad.store(k, row0, 0);
  v_grad.store(v, row0, 0);
  __syncwarp();
  const auto target = [&](void* gradient) {
    return [&, gradient](int row) -> bf16* {
      const int64_t token = block.sequence * p.capacity + block.begin + row;
      if (block.begin + row >= p.capacity) return nullptr;
      return packed_row<dim>(static_cast<bf16*>(gradient), token, p.in.key_heads, key_head);
    };
  };
  store_rows<Pass::warp_keys>(k, row0, target(p.key_grad));
  store_rows<Pass::warp_keys>(v, row0, target(p.value_grad));
}

// ---- dQ

template <int dim>
struct QueryPass {
  static constexpr int keys = dim == 128 ? 32 : 64, columns = 32, warp_rows = kItemRows / kAttentionWarps;
  // Q, dO; K and V of two stages.
  static constexpr size_t bytes = 2 * Tile<dim>::bytes(kItemRows) + 4 * Tile<dim>::bytes(keys);
};

template <int dim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_query_gradients_kernel(const AttentionBackward p) {
  using Pass = QueryPass<dim>;
  const int heads = p.in.query_heads, head = static_cast<int>(blockIdx.x % heads),
            key_head = head / (heads / p.in.key_heads);
  const QueryItem item = p.in.items[blockIdx.x / heads];
  const Tile<dim> q{reinterpret_cast<bf16*>(shared_memory())}, grad{q.base + kItemRows * dim};
  bf16* const ring = grad.base + kItemRows * dim;
  const bf16* const keys = rows_of(p.in.key, p.in.key_strides, item.sequence, key_head);
  const bf16* const values = rows_of(p.in.value, p.in.value_strides, item.sequence, key_head);
  const auto k_tile = [&](int n) { return Tile<dim>{ring + n % 2 * Pass::keys * dim}; };
  const auto v_tile = [&](int n) { return Tile<dim>{ring + (2 + n % 2) * Pass::keys * dim}; };
  const auto load = [&](int n) {
    const int key0 = n * Pass::keys, valid = item.last + 1 - key0;
    load_rows<Pass::keys>(k_tile(n), valid, keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
    load_rows<Pass::keys>(v_tile(n), valid, values + key0 * p.in.value_strides[1], p.in.value_strides[1]);
    commit_copies();
  };
  const int64_t stride = static_cast<int64_t>(heads) * dim;
  load_rows<kItemRows>(q, item.rows,
                       packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, heads, head), stride);
  load_rows<kItemRows>(grad, item.rows,
                       packed_row<dim>(static_cast<const bf16*>(p.output_grad), item.row, heads, head),
                       stride);
  load(0);

  const int lane = static_cast<int>(threadIdx.x) % 32,
            row0 = static_cast<int>(threadIdx.x) / 32 * Pass::warp_rows;
  const int* const positions = p.in.positions + item.row;
  const int first = row0 < item.rows ? positions[row0] : -1;
  const int last = row0 < item.rows ? positions[std::min(row0 + Pass::warp_rows, item.rows) - 1] : -1;
  float2 statistic[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * i + 8 * half + lane / 4;
      statistic[i][half] = {INFINITY, 0.0f};
      if (row < item.rows) {
        statistic[i][half] = reinterpret_cast<const float2*>(
            p.statistics)[static_cast<int64_t>(item.row + row) * heads + head];
      }
    }
  const float scale = p.in.scale * log2_of_e;

  Accumulator<2, dim / 8> q_grad;
  q_grad.clear();
  const int tiles = item.last / Pass::keys + 1;
  for (int n = 0; n < tiles; ++n) {
    wait_copies<0>();
    __syncthreads();
    if (n + 1 < tiles) load(n + 1);
#pragma unroll 1
    for (int column0 = 0; column0 < Pass::keys; column0 += Pass::columns) {
      const int key0 = n * Pass::keys + column0;
      if (key0 > last) break;
      Accumulator<2, Pass::columns / 8> s, ds;
      s.clear();
      multiply<dim>(s, Fragments<dim>::a(q, row0), Fragments<dim>::b(k_tile(n), column0));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < Pass::columns / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            s.value[i][j][e] = exp2_fast(s.value[i][j][e] * scale - statistic[i][e / 2].x);
      if (key0 + Pass::columns - 1 > first) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = row0 + 16 * i + 8 * half + lane / 4;
            const int seen = (row < item.rows ? positions[row] : first) - key0 - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < Pass::columns / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (8 * j + e > seen) s.value[i][j][2 * half + e] = 0.0f;
          }
      }
      ds.clear();
      multiply<dim>(ds, Fragments<dim>::a(grad, row0), Fragments<dim>::b(v_tile(n), column0));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < Pass::columns / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            ds.value[i][j][e] = s.value[i][j][e] * (ds.value[i][j][e] - statistic[i][e / 2].y);
      multiply(q_grad, ds, Fragments<dim>::b_transposed(k_tile(n), column0));
    }
  }

  q_grad.for_pairs([&](int, int, float& a, float& b) { a *= p.in.scale, b *= p.in.scale; });
  __syncwarp();
  q_grad.store(q, row0, 0);
  __syncwarp();
  store_rows<Pass::warp_rows>(q, row0, [&](int row) -> bf16* {
    if (row >= item.rows) return nullptr;
    return packed_row<dim>(static_cast<bf16*>(p.query_grad), item.row + row, heads, head);
  });
}

template <int dim>
void run(const AttentionBackward& p, void* stream) {
  const int64_t units = p.rows * p.in.query_heads * (dim / 8);
  launch<attention_statistics_kernel<dim>>(
      dim3(static_cast<unsigned>((units + kStatisticsThreads - 1) / kStatisticsThreads)), kStatisticsThreads,
      0, stream, p);
  launch<attention_key_gradients_kernel<dim>>(dim3(static_cast<unsigned>(p.block_count * p.in.key_heads)),
                                              kAttentionThreads, KeyPass<dim>::bytes, stream, p);
  launch<attention_query_gradients_kernel<dim>>(
      dim3(static_cast<unsigned>(p.in.item_count * p.in.query_heads)), kAttentionThreads,
      QueryPass<dim>::bytes, stream, p);
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
