// dQ where the gradients of scores were not kept: a block of threads takes items of 128 rows and a query
// head, as the forward pass does, and computes their scores and the gradients of their weights again. The
// products of a tile of keys run while the tile before is turned into gradients of scores, and the two
// warpgroups take turns at issuing products, so that one has exponentials to make while the other's products
// run.
#include <algorithm>
#include <cmath>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

// Threads that compute; warps that load.
constexpr int kConsumers = 256, kLoaders = 4;

template <int dim>
struct QueryItems {
  static constexpr int threads = kConsumers + 32 * kLoaders;
  static constexpr int tile = dim == 64 ? 128 : 64;  // keys
  static constexpr int stages = 4, row_stages = dim == 64 ? 2 : 1;
  using Rows = Panels<kItemRows, dim>;
  using Keys = Panels<tile, dim>;
  struct Gates {
    Gate rows_full[row_stages], rows_empty[row_stages], full[stages], empty[stages];
  };
  static constexpr size_t gates_at = 2 * row_stages * Rows::bytes + 2 * stages * Keys::bytes,
                          bytes = gates_at + sizeof(Gates);

  Gates& gates = *reinterpret_cast<Gates*>(shared_memory() + gates_at);

  __device__ bf16* base() const { return reinterpret_cast<bf16*>(shared_memory()); }
  __device__ Rows rows(int stage) const { return {base() + 2 * stage * kItemRows * dim}; }
  __device__ Rows grads(int stage) const { return {rows(stage).base + kItemRows * dim}; }
  __device__ Keys keys(int stage) const {
    return {base() + 2 * (row_stages * kItemRows + stage * tile) * dim};
  }
  __device__ Keys values(int stage) const { return {keys(stage).base + tile * dim}; }
};

template <int dim>
__device__ void load_items(const AttentionBackward& p, const QueryItems<dim>& shared) {
  using Items = QueryItems<dim>;
  const int heads = p.in.query_heads, loader = (static_cast<int>(threadIdx.x) - kConsumers) / 32;
  const int64_t stride = static_cast<int64_t>(heads) * dim;
  RingPlace<Items::row_stages> rows_at;
  RingPlace<Items::stages> keys_at;
  for (Share share(static_cast<int>(p.in.item_count) * heads); share.has_work(); share.next()) {
    const int head = share.index() % heads, key_head = head / (heads / p.in.key_heads);
    const QueryItem item = p.in.items[share.index() / heads];
    shared.gates.rows_empty[rows_at.stage].wait(rows_at.parity ^ 1);
    load_rows_by_warps<kLoaders>(loader, shared.rows(rows_at.stage), item.rows,
                                 packed_row<dim>(static_cast<const bf16*>(p.in.query), item.row, heads, head),
                                 stride);
    load_rows_by_warps<kLoaders>(
        loader, shared.grads(rows_at.stage), item.rows,
        packed_row<dim>(static_cast<const bf16*>(p.output_grad), item.row, heads, head), stride);
    shared.gates.rows_full[rows_at.stage].arrive_after_copies();
    rows_at.next();
    const bf16* const keys = rows_of(p.in.key, p.in.key_strides, item.sequence, key_head);
    const bf16* const values = rows_of(p.in.value, p.in.value_strides, item.sequence, key_head);
    for (int key0 = 0; key0 <= item.last; key0 += Items::tile) {
      const int valid = item.last + 1 - key0;
      shared.gates.empty[keys_at.stage].wait(keys_at.parity ^ 1);
      load_rows_by_warps<kLoaders>(loader, shared.keys(keys_at.stage), valid,
                                   keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
      load_rows_by_warps<kLoaders>(loader, shared.values(keys_at.stage), valid,
                                   values + key0 * p.in.value_strides[1], p.in.value_strides[1]);
      shared.gates.full[keys_at.stage].arrive_after_copies();
      keys_at.next();
    }
  }
}

// Log-sum-exp in powers of two and ⟨dO, O⟩ of a thread's rows, lane / 4 and lane / 4 + 8 of its warp's. Rows
// past the item's end get no weight.
struct RowStatistics {
  float2 of[2];

  __device__ RowStatistics(const AttentionBackward& p, const QueryItem& item, int head, int row0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + 8 * i + static_cast<int>(threadIdx.x) % 32 / 4;
      of[i] = {INFINITY, 0.0f};
      if (row < item.rows)
        of[i] = reinterpret_cast<const float2*>(
            p.statistics)[static_cast<int64_t>(item.row + row) * p.in.query_heads + head];
    }
  }
};

// Barriers: whose turn it is to issue products (a warpgroup each), and one for each warpgroup alone.
enum { kTurn = 1, kGroup = 3 };

template <int dim>
__device__ void sum_over_keys(const AttentionBackward& p, const QueryItems<dim>& shared) {
  using Items = QueryItems<dim>;
  constexpr int tile = Items::tile;
  const int heads = p.in.query_heads, lane = static_cast<int>(threadIdx.x) % 32, group = warpgroup(),
            group_row0 = group * 64, row0 = group_row0 + warp_of_group() * 16;
  const float scale = p.in.scale * log2_of_e;
  const auto await_turn = [&] { named_barrier(kTurn + group, kConsumers); };
  const auto pass_turn = [&] { named_arrive(kTurn + 1 - group, kConsumers); };
  const auto release = [&](Gate& gate) {  // by this warp; its products that read the stage are finished
    if (lane == 0) gate.arrive();
  };
  if (group == 1) pass_turn();
  RingPlace<Items::row_stages> rows_at;
  RingPlace<Items::stages> keys_at;
  // Computed, not remembered: a variable would not be known to be the same in all lanes.
  const auto stage_before = [&] { return (keys_at.stage + Items::stages - 1) % Items::stages; };

  Share share(static_cast<int>(p.in.item_count) * heads);
  // Read ahead, so that nobody waits for them between two items.
  QueryItem coming = p.in.items[share.index() / heads];
  RowPositions coming_at(p.in.positions, coming, group_row0, row0);
  RowStatistics coming_statistics(p, coming, share.index() % heads, row0);
  for (; share.has_work(); share.next()) {
    const int head = share.index() % heads;
    const QueryItem item = coming;
    const RowPositions at = coming_at;
    const RowStatistics statistics = coming_statistics;
    Share after = share;
    after.next();
    if (after.has_work()) coming = p.in.items[after.index() / heads];
    Accumulator<1, dim / 8> q_grad;
    q_grad.clear();
    Accumulator<1, tile / 8> s, ds;
    uint32_t score_grads[tile / 16][4];  // of the tile before
    const auto weigh = [&](int key0) {
#pragma unroll
      for (int j = 0; j < tile / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s.value[0][j][e] = exp2_fast(s.value[0][j][e] * scale - statistics.of[e / 2].x);
      if (key0 + tile - 1 > at.first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int seen = at.position[i] - key0 - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < tile / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * j + e > seen) s.value[0][j][2 * i + e] = 0.0f;
        }
      }
    };
    const auto make_score_grads = [&] {
      settle(ds);
#pragma unroll
      for (int j = 0; j < tile / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds.value[0][j][e] = s.value[0][j][e] * (ds.value[0][j][e] - statistics.of[e / 2].y);
      as_operand(score_grads, ds);
    };
    const int tiles = item.last / tile + 1, own_tiles = (at.last + tile) / tile;
    shared.gates.rows_full[rows_at.stage].wait(rows_at.parity);
    if (own_tiles > 0) {
      shared.gates.full[keys_at.stage].wait(keys_at.parity);
      publish_to_products();
      await_turn();
      warpgroup_fence();
      multiply_rows(s, shared.rows(rows_at.stage), group_row0, shared.keys(keys_at.stage));
      warpgroup_commit();
      multiply_rows(ds, shared.grads(rows_at.stage), group_row0, shared.values(keys_at.stage));
      warpgroup_commit();
      pass_turn();
      warpgroup_wait<1>();
      settle(s);
      weigh(0);
      warpgroup_wait<0>();
      make_score_grads();
      keys_at.next();
      for (int n = 1; n < own_tiles; ++n) {
        shared.gates.full[keys_at.stage].wait(keys_at.parity);
        publish_to_products();
        await_turn();
        warpgroup_fence();
        multiply_rows(s, shared.rows(rows_at.stage), group_row0, shared.keys(keys_at.stage));
        warpgroup_commit();
        multiply_columns(q_grad, score_grads, shared.keys(stage_before()));
        warpgroup_commit();
        multiply_rows(ds, shared.grads(rows_at.stage), group_row0, shared.values(keys_at.stage));
        warpgroup_commit();
        pass_turn();
        warpgroup_wait<2>();
        settle(s);
        weigh(n * tile);
        warpgroup_wait<0>();
        settle(q_grad);
        release(shared.gates.empty[stage_before()]);
        make_score_grads();
        keys_at.next();
      }
      warpgroup_fence();
      multiply_columns(q_grad, score_grads, shared.keys(stage_before()));
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(q_grad);
      release(shared.gates.empty[stage_before()]);
    }
    if (after.has_work()) {
      coming_at = RowPositions(p.in.positions, coming, group_row0, row0);
      coming_statistics = RowStatistics(p, coming, after.index() % heads, row0);
    }
    for (int n = own_tiles; n < tiles; ++n) {  // tiles that only the other warpgroup sees
      shared.gates.full[keys_at.stage].wait(keys_at.parity);
      await_turn();
      pass_turn();
      release(shared.gates.empty[keys_at.stage]);
      keys_at.next();
    }

    q_grad.for_pairs([&](int, int, float& a, float& b) { a *= p.in.scale, b *= p.in.scale; });
    named_barrier(kGroup + group, 128);  // all warps have read their rows of Q
    store_rows(q_grad, shared.rows(rows_at.stage), row0, [&](int row) -> bf16* {
      if (row >= item.rows) return nullptr;
      return packed_row<dim>(static_cast<bf16*>(p.query_grad), item.row + row, heads, head);
    });
    __syncwarp();
    release(shared.gates.rows_empty[rows_at.stage]);
    rows_at.next();
  }
}

template <int dim>
__global__ void __launch_bounds__(QueryItems<dim>::threads, 1)
    attention_query_items_kernel(const AttentionBackward p) {
  using Items = QueryItems<dim>;
  const Items shared;
  if (threadIdx.x == 0) {
    const auto open = [](auto& full, auto& empty) {
      for (Gate& gate : full) gate.open(32 * kLoaders);
      for (Gate& gate : empty) gate.open(kConsumers / 32);
    };
    open(shared.gates.rows_full, shared.gates.rows_empty);
    open(shared.gates.full, shared.gates.empty);
  }
  __syncthreads();
  if (warpgroup() == kConsumers / 128) {
    set_registers<24, false>();
    load_items(p, shared);
  } else {
    set_registers<240, true>();
    sum_over_keys(p, shared);
  }
}

template <int dim>
void run(const AttentionBackward& p, void* stream) {
  using Items = QueryItems<dim>;
  const int64_t blocks = std::min<int64_t>(p.in.item_count * p.in.query_heads, multiprocessors());
  launch<attention_query_items_kernel<dim>>(dim3(static_cast<unsigned>(blocks)), Items::threads, Items::bytes,
                                            stream, p);
}

}  // namespace

size_t query_ring_bytes(int dim) { return dim == 128 ? QueryItems<128>::bytes : QueryItems<64>::bytes; }

void attention_query_gradients(const AttentionBackward& arguments, void* stream) {
  if (arguments.in.dim == 128) {
    run<128>(arguments, stream);
  } else {
    run<64>(arguments, stream);
  }
}

}  // namespace oryx::cuda
