// Forward pass: a block of threads takes items of 128 rows and a query head (192 rows where heads are narrow
// and there is work enough) and walks their keys in tiles of 128 (FlashAttention-3, arXiv 2407.08608); of 64
// on GPUs with little shared memory. Four warps load the tiles into a ring; warpgroups of 64 rows each
// multiply. While the weights of one tile are made, those of the tile before are multiplied by its values;
// and the warpgroups take turns at issuing products, so that one makes weights while the others' products
// run.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

constexpr int kLoaders = 4;  // warps that load
// The running maximum is raised only by at least this many powers of two; until then probabilities exceed 1,
// which changes nothing but their common factor.
constexpr float kSlack = 8.0f;
// Wide items are taken where every multiprocessor has at least so many.
constexpr int kWideRounds = 2;

template <int dim, int keys, int groups>
struct ForwardPass {
  static constexpr int item_rows = 64 * groups, consumers = 128 * groups, threads = consumers + 32 * kLoaders;
  static constexpr int stages = 2, row_stages = keys == 128 ? 2 : 1;
  using Rows = Panels<item_rows, dim>;
  using Keys = Panels<keys, dim>;
  struct Gates {
    Gate rows_full[row_stages], rows_empty[row_stages], keys_full[stages], keys_empty[stages],
        values_full[stages], values_empty[stages];
  };
  static constexpr size_t tiles_bytes = row_stages * Rows::bytes + 2 * stages * Keys::bytes;
  static constexpr size_t bytes = tiles_bytes + sizeof(Gates);

  Gates& gates = *reinterpret_cast<Gates*>(shared_memory() + tiles_bytes);

  __device__ bf16* base() const { return reinterpret_cast<bf16*>(shared_memory()); }
  __device__ Rows rows(int stage) const { return {base() + stage * item_rows * dim}; }
  __device__ Keys keys_of(int stage) const {
    return {base() + (row_stages * item_rows + 2 * stage * keys) * dim};
  }
  __device__ Keys values_of(int stage) const { return {keys_of(stage).base + keys * dim}; }
};

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

template <int dim, int keys, int groups>
__device__ void load_items(const AttentionForward& p, const ForwardPass<dim, keys, groups>& block) {
  using Pass = ForwardPass<dim, keys, groups>;
  const int heads = p.in.query_heads, loader = (static_cast<int>(threadIdx.x) - Pass::consumers) / 32;
  RingPlace<Pass::row_stages> rows_at;
  RingPlace<Pass::stages> keys_at, values_at;
  for (Share share(static_cast<int>(p.in.item_count) * heads); share.has_work(); share.next()) {
    const int head = share.index() % heads, key_head = head / (heads / p.in.key_heads);
    const QueryItem item = p.in.items[share.index() / heads];
    const bf16* const first_key = rows_of(p.in.key, p.in.key_strides, item.sequence, key_head);
    const bf16* const first_value = rows_of(p.in.value, p.in.value_strides, item.sequence, key_head);
    block.gates.rows_empty[rows_at.stage].wait(rows_at.parity ^ 1);
    load_rows_by_warps<kLoaders>(loader, block.rows(rows_at.stage), item.rows,
                                 packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, heads, head),
                                 static_cast<int64_t>(heads) * dim);
    block.gates.rows_full[rows_at.stage].arrive_after_copies();
    rows_at.next();
    const int tiles = item.last / keys + 1;
    for (int n = 0; n <= tiles; ++n) {
      if (n < tiles) {
        const int key0 = n * keys;
        block.gates.keys_empty[keys_at.stage].wait(keys_at.parity ^ 1);
        load_rows_by_warps<kLoaders>(loader, block.keys_of(keys_at.stage), item.last + 1 - key0,
                                     first_key + key0 * p.in.key_strides[1], p.in.key_strides[1]);
        block.gates.keys_full[keys_at.stage].arrive_after_copies();
        keys_at.next();
      }
      if (n > 0) {  // a tile's values are read after the next one's keys
        const int key0 = (n - 1) * keys;
        block.gates.values_empty[values_at.stage].wait(values_at.parity ^ 1);
        load_rows_by_warps<kLoaders>(loader, block.values_of(values_at.stage), item.last + 1 - key0,
                                     first_value + key0 * p.in.value_strides[1], p.in.value_strides[1]);
        block.gates.values_full[values_at.stage].arrive_after_copies();
        values_at.next();
      }
    }
  }
}

template <int dim, int keys, int groups>
__device__ void attend(const AttentionForward& p, const ForwardPass<dim, keys, groups>& block) {
  using Pass = ForwardPass<dim, keys, groups>;
  // Barriers: whose turn it is to issue products (a warpgroup each, which meets the one before it), and one
  // for each warpgroup alone.
  enum { kTurn = 1, kGroup = 1 + groups };
  const int heads = p.in.query_heads, lane = static_cast<int>(threadIdx.x) % 32, group = warpgroup(),
            group_row0 = group * 64, row0 = group_row0 + warp_of_group() * 16;
  const float scale = p.in.scale * log2_of_e;
  const auto await_turn = [&] { named_barrier(kTurn + group, 256); };
  const auto pass_turn = [&] { named_arrive(kTurn + (group + 1) % groups, 256); };
  const auto release = [&](Gate& gate) {  // by this warp; its products that read the stage are finished
    if (lane == 0) gate.arrive();
  };
  if (group == groups - 1) pass_turn();
  RingPlace<Pass::row_stages> rows_at;
  RingPlace<Pass::stages> keys_at, values_at;
  const auto await_keys = [&] { block.gates.keys_full[keys_at.stage].wait(keys_at.parity); };
  const auto await_values = [&] { block.gates.values_full[values_at.stage].wait(values_at.parity); };
  const auto release_keys = [&] {
    release(block.gates.keys_empty[keys_at.stage]);
    keys_at.next();
  };
  const auto release_values = [&] {
    release(block.gates.values_empty[values_at.stage]);
    values_at.next();
  };

  Share share(static_cast<int>(p.in.item_count) * heads);
  // Read ahead, so that nobody waits for them between two items.
  QueryItem coming = p.in.items[share.index() / heads];
  RowPositions coming_at(p.in.positions, coming, group_row0, row0);
  for (; share.has_work(); share.next()) {
    const int head = share.index() % heads;
    const QueryItem item = coming;
    const RowPositions at = coming_at;
    Share after = share;
    after.next();
    if (after.has_work()) coming = p.in.items[after.index() / heads];
    RowStates rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.position[half] = at.position[half];
      rows.maximum[half] = -INFINITY;
      rows.sum[half] = 0.0f;
    }
    Accumulator<1, dim / 8> o;
    o.clear();
    Accumulator<1, keys / 8> s;
    const int tiles = item.last / keys + 1, own_tiles = (at.last + keys) / keys;
    block.gates.rows_full[rows_at.stage].wait(rows_at.parity);
    if (own_tiles > 0) {
      uint32_t weights[keys / 16][4];  // of the tile before
      await_keys();
      publish_to_products();
      await_turn();
      warpgroup_fence();
      multiply_rows(s, block.rows(rows_at.stage), group_row0, block.keys_of(keys_at.stage));
      warpgroup_commit();
      pass_turn();
      warpgroup_wait<0>();
      settle(s);
      release_keys();
      weigh<keys>(s, rows, 0, at.first, scale);
      as_operand(weights, s);
      for (int n = 1; n < own_tiles; ++n) {
        await_keys();
        await_values();
        publish_to_products();
        await_turn();
        warpgroup_fence();
        multiply_rows(s, block.rows(rows_at.stage), group_row0, block.keys_of(keys_at.stage));
        warpgroup_commit();
        multiply_columns(o, weights, block.values_of(values_at.stage));
        warpgroup_commit();
        pass_turn();
        warpgroup_wait<1>();
        settle(s);
        release_keys();
        const float2 factor = weigh<keys>(s, rows, n * keys, at.first, scale);
        warpgroup_wait<0>();
        settle(o);
        release_values();
        if (__any_sync(0xffffffffu, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
          for (int j = 0; j < dim / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) o.value[0][j][e] *= e < 2 ? factor.x : factor.y;
        }
        as_operand(weights, s);
      }
      await_values();
      publish_to_products();
      warpgroup_fence();
      multiply_columns(o, weights, block.values_of(values_at.stage));
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(o);
      release_values();
    }
    if (after.has_work()) coming_at = RowPositions(p.in.positions, coming, group_row0, row0);
    for (int n = own_tiles; n < tiles; ++n) {  // tiles that only other warpgroups see
      await_keys();
      await_turn();
      pass_turn();
      release_keys();
      await_values();
      release_values();
    }

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
        p.logsumexp[static_cast<int64_t>(item.row + row) * heads + head] =
            rows.maximum[half] * p.in.scale + logf(total);
      }
    }
    named_barrier(kGroup + group, 128);  // all warps have read their rows of Q
    store_rows(o, block.rows(rows_at.stage), row0, [&](int row) -> bf16* {
      if (row >= item.rows) return nullptr;
      return packed_row<dim>(static_cast<bf16*>(p.output), item.row + row, heads, head);
    });
    __syncwarp();
    release(block.gates.rows_empty[rows_at.stage]);
    rows_at.next();
  }
}

template <int dim, int keys, int groups>
__global__ void __launch_bounds__(ForwardPass<dim, keys, groups>::threads, 1)
    attention_forward_kernel(const AttentionForward p) {
  using Pass = ForwardPass<dim, keys, groups>;
  const Pass block;
  if (threadIdx.x == 0) {
    const auto open = [](auto& full, auto& empty) {
      for (Gate& gate : full) gate.open(32 * kLoaders);
      for (Gate& gate : empty) gate.open(Pass::consumers / 32);
    };
    open(block.gates.rows_full, block.gates.rows_empty);
    open(block.gates.keys_full, block.gates.keys_empty);
    open(block.gates.values_full, block.gates.values_empty);
  }
  __syncthreads();
  if (warpgroup() == groups) {
    set_registers<groups == 3 ? 32 : 40, false>();
    load_items(p, block);
  } else {
    set_registers<groups == 3 ? 160 : 232, true>();
    attend(p, block);
  }
}

template <int dim, int keys, int groups>
void run(const AttentionForward& arguments, void* stream) {
  using Pass = ForwardPass<dim, keys, groups>;
  const int64_t blocks =
      std::min<int64_t>(arguments.in.item_count * arguments.in.query_heads, multiprocessors());
  launch<attention_forward_kernel<dim, keys, groups>>(dim3(static_cast<unsigned>(blocks)), Pass::threads,
                                                      Pass::bytes, stream, arguments);
}

template <int dim>
void run(const AttentionForward& arguments, void* stream) {
  if (ForwardPass<dim, 128, 2>::bytes > largest_shared_memory()) return run<dim, 64, 2>(arguments, stream);
  if constexpr (dim == 64) {
    // A third warpgroup fills what two leave of products and exponentials, which take as long as each other,
    // and shares their tiles.
    if (ForwardPass<dim, 128, 3>::bytes <= largest_shared_memory() &&
        arguments.wide_item_count * arguments.in.query_heads >= kWideRounds * multiprocessors()) {
      AttentionForward wide = arguments;
      wide.in.items = arguments.wide_items, wide.in.item_count = arguments.wide_item_count;
      return run<dim, 128, 3>(wide, stream);
    }
  }
  run<dim, 128, 2>(arguments, stream);
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
