// Backward pass where a block has much shared memory and the gradients of the
// scores have room: the pass by keys makes dK and dV and leaves dS in scratch,
// from which a second pass sums dQ. Five products and no exponential twice, for
// two bytes per pair of tokens written and read.
//
// dS lies in images of a tile of query rows by a block of keys, as fragments
// that a product of dQ takes from registers: [16 rows][16 keys][lane] of four
// registers.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "operators/attention/attention_device.h"

namespace oryx::cuda {

namespace {

// Key heads [first_head, first_head + heads) of a backward pass, whose dS fits
// the scratch.
struct HeadSlice {
  AttentionBackward pass;
  int first_head, heads;
};

constexpr int kLoaders = 4;  // warps that load
constexpr int kImageUnits = kTileRows * kBlockKeys / 8;

// Of a tile that sees these keys, where one of its heads has its image: `image`
// is the tile's number.
__device__ inline uint4* image_at(const HeadSlice& slice, int head, int64_t image) {
  const int first = slice.first_head * (slice.pass.in.query_heads / slice.pass.in.key_heads);
  return static_cast<uint4*>(slice.pass.score_grads) +
         ((head - first) * slice.pass.images + image) * kImageUnits;
}

// ---- dK, dV and dS

// Two warpgroups of 64 keys each share the tiles of query rows. The next
// block's keys are loaded while one still computes.
template <int dim>
struct KeyBlocks {
  static constexpr int consumers = 2 * kBlockKeys, threads = consumers + 32 * kLoaders;
  // Where registers suffice, the next tile's products are under way before this
  // one's have finished.
  static constexpr bool runs_ahead = dim == 64;
  static constexpr int stages = runs_ahead ? 4 : 3, key_stages = 2;
  using Keys = Panels<kBlockKeys, dim>;
  using Rows = Panels<kTileRows, dim>;
  struct Gates {
    Gate keys_full[key_stages], keys_empty[key_stages], rows_full[stages], rows_empty[stages];
  };
  static constexpr size_t gates_at = 2 * key_stages * Keys::bytes + 2 * stages * Rows::bytes,
                          bytes = gates_at + sizeof(Gates);

  Gates& gates = *reinterpret_cast<Gates*>(shared_memory() + gates_at);

  __device__ bf16* base() const { return reinterpret_cast<bf16*>(shared_memory()); }
  __device__ Keys keys(int stage) const { return {base() + 2 * stage * kBlockKeys * dim}; }
  __device__ Keys values(int stage) const { return {keys(stage).base + kBlockKeys * dim}; }
  __device__ Rows rows(int stage) const {
    return {base() + (2 * key_stages * kBlockKeys + 2 * stage * kTileRows) * dim};
  }
  __device__ Rows grads(int stage) const { return {rows(stage).base + kTileRows * dim}; }
};

template <int dim>
__device__ void load_blocks(const HeadSlice& slice, const KeyBlocks<dim>& shared) {
  using Blocks = KeyBlocks<dim>;
  const AttentionBackward& p = slice.pass;
  const int heads = p.in.query_heads, readers = heads / p.in.key_heads,
            loader = (static_cast<int>(threadIdx.x) - Blocks::consumers) / 32;
  const int64_t stride = static_cast<int64_t>(heads) * dim;
  RingPlace<Blocks::key_stages> keys_at;
  RingPlace<Blocks::stages> rows_at;
  for (Share share(static_cast<int>(p.block_count) * slice.heads); share.has_work(); share.next()) {
    const int key_head = slice.first_head + share.index() % slice.heads;
    const KeyBlock block = p.blocks[share.index() / slice.heads];
    const int valid = block.end - block.begin, past = block.first_tile + block.tiles;
    QueryItem coming{};  // read ahead, so that no copy waits for it
    if (block.tiles > 0) coming = p.tiles[block.first_tile];
    shared.gates.keys_empty[keys_at.stage].wait(keys_at.parity ^ 1);
    load_rows_by_warps<kLoaders>(
        loader, shared.keys(keys_at.stage), valid,
        rows_of(p.in.key, p.in.key_strides, block.sequence, key_head) + block.begin * p.in.key_strides[1],
        p.in.key_strides[1]);
    load_rows_by_warps<kLoaders>(loader, shared.values(keys_at.stage), valid,
                                 rows_of(p.in.value, p.in.value_strides, block.sequence, key_head) +
                                     block.begin * p.in.value_strides[1],
                                 p.in.value_strides[1]);
    shared.gates.keys_full[keys_at.stage].arrive_after_copies();
    keys_at.next();
    for (int tile = block.first_tile; tile < past; ++tile) {
      const QueryItem rows = coming;
      if (tile + 1 < past) coming = p.tiles[tile + 1];
      for (int reader = 0; reader < readers; ++reader) {
        const int head = key_head * readers + reader;
        shared.gates.rows_empty[rows_at.stage].wait(rows_at.parity ^ 1);
        load_rows_by_warps<kLoaders>(
            loader, shared.rows(rows_at.stage), rows.rows,
            packed_row<dim>(static_cast<const bf16*>(p.in.query), rows.row, heads, head), stride);
        load_rows_by_warps<kLoaders>(
            loader, shared.grads(rows_at.stage), rows.rows,
            packed_row<dim>(static_cast<const bf16*>(p.output_grad), rows.row, heads, head), stride);
        shared.gates.rows_full[rows_at.stage].arrive_after_copies();
        rows_at.next();
      }
    }
  }
}

// One of four, by a number that is known when compiling.
template <typename Four>
__device__ inline auto element(const Four& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// What passes through the gates is read by products alone: the rows' statistics
// and positions come straight from global memory, to the threads that need
// them.
template <int dim, bool keeps>
__device__ void sum_over_rows(const HeadSlice& slice, const KeyBlocks<dim>& shared) {
  using Blocks = KeyBlocks<dim>;
  constexpr int quads = kTileRows / 16;  // of a thread's places in a tile
  const AttentionBackward& p = slice.pass;
  const int readers = p.in.query_heads / p.in.key_heads, lane = static_cast<int>(threadIdx.x) % 32,
            group = warpgroup(), row0 = group * 64 + warp_of_group() * 16;
  const float scale = p.in.scale * log2_of_e;
  const auto release = [&](Gate& gate) {  // by this warp, all of which is done with the stage
    __syncwarp();
    if (lane == 0) gate.arrive();
  };
  RingPlace<Blocks::key_stages> keys_at;
  RingPlace<Blocks::stages> rows_at;
  Share share(static_cast<int>(p.block_count) * slice.heads);
  KeyBlock coming = p.blocks[share.index() / slice.heads];
  for (; share.has_work(); share.next()) {
    const int key_head = slice.first_head + share.index() % slice.heads;
    const KeyBlock block = coming;
    Share after = share;
    after.next();
    if (after.has_work()) coming = p.blocks[after.index() / slice.heads];
    const int first_key = block.begin + row0, steps = block.tiles * readers,
              past = block.first_tile + block.tiles;
    Accumulator<1, dim / 8> k_grad, v_grad;
    k_grad.clear();
    v_grad.clear();

    // The step that is worked on and the next one, of which is read, each a
    // step ahead: log-sum-exps and ⟨dO, O⟩ (all that the thread needs where
    // registers suffice; else two places of each a lane, given to the others by
    // shuffles), the first position and the number of the first image.
    struct Step {
      int tile, reader;
    };
    constexpr int held = Blocks::runs_ahead ? quads : 1;
    Step now{block.first_tile, 0}, next = now;
    int first_position = 0, image = 0;
    float4 logsumexp[held], output_dot[held];
    const auto read = [&](float4(&of_thread)[held], int which) {
      const int head = key_head * readers + next.reader;
      const float4* from = reinterpret_cast<const float4*>(p.tile_statistics) +
                           (head * p.tile_count + next.tile) * (kTileRows / 2) + lane % 4 * (2 * quads) +
                           which;
      if constexpr (Blocks::runs_ahead) {
#pragma unroll
        for (int i = 0; i < quads; ++i) of_thread[i] = from[2 * i];
      } else {
        const float* const of_lane = reinterpret_cast<const float*>(from + lane / 16 * 2) + lane / 4 % 4;
        of_thread[0] = {of_lane[0], of_lane[16], 0.0f, 0.0f};
      }
    };
    const auto read_logsumexp = [&] {
      if (next.tile == past) return;
      read(logsumexp, 0);
      first_position = p.tiles[next.tile].first;
    };
    const auto read_output_dot = [&] {
      if (next.tile < past) read(output_dot, 1);
    };
    const auto read_image = [&] {
      if (keeps && next.tile < past) image = p.tile_images[next.tile];
    };
    const auto quad_of = [&](const float4(&own)[held], int i) {
      if constexpr (Blocks::runs_ahead) return own[i];
      const int source = lane % 4 + i % 2 * 16;
      const float value = i < 2 ? own[0].x : own[0].y;
      return float4{__shfl_sync(0xffffffffu, value, source), __shfl_sync(0xffffffffu, value, source + 4),
                    __shfl_sync(0xffffffffu, value, source + 8),
                    __shfl_sync(0xffffffffu, value, source + 12)};
    };
    read_logsumexp();
    read_output_dot();
    read_image();

    shared.gates.keys_full[keys_at.stage].wait(keys_at.parity);
    // Transposed: rows are keys, columns are query rows.
    Accumulator<1, kTileRows / 8> s, ds;
    const auto begin_step = [&](const RingPlace<Blocks::stages>& at) {
      shared.gates.rows_full[at.stage].wait(at.parity);
      publish_to_products();
      const int keys_stage = keys_at.stage + hidden_zero();
      warpgroup_fence();
      multiply_rows(s, shared.keys(keys_stage), group * 64, shared.rows(at.stage));
      warpgroup_commit();
      multiply_rows(ds, shared.values(keys_stage), group * 64, shared.grads(at.stage));
      warpgroup_commit();
    };
    const auto weigh = [&] {
      const bool is_masked = first_position < first_key + 15;
      warpgroup_wait<1>();
      settle(s);
#pragma unroll
      for (int i = 0; i < quads; ++i) {
        const float4 four = quad_of(logsumexp, i);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& weight = s.value[0][2 * i + e / 4][e % 4];
          weight = exp2_fast(weight * scale - element(four, e / 4 * 2 + e % 2));
        }
      }
      if (is_masked) {
        const int4* const positions =
            reinterpret_cast<const int4*>(p.tile_positions) + now.tile * (kTileRows / 4) + lane % 4 * quads;
#pragma unroll
        for (int i = 0; i < quads; ++i) {
          const int4 four = positions[i];
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int key = first_key + lane / 4 + 8 * (e / 2 % 2);
            if (key > element(four, e / 4 * 2 + e % 2)) s.value[0][2 * i + e / 4][e % 4] = 0.0f;
          }
        }
      }
      next = now.reader + 1 < readers ? Step{now.tile, now.reader + 1} : Step{now.tile + 1, 0};
      read_logsumexp();
    };
    const auto finish_step = [&]<bool begins_next>(std::bool_constant<begins_next>) {
      uint32_t weights[kTileRows / 16][4], score_grads[kTileRows / 16][4];
      as_operand(weights, s);
      warpgroup_fence();
      multiply_columns(v_grad, weights, shared.grads(rows_at.stage));
      warpgroup_commit();
      if constexpr (!Blocks::runs_ahead) {
        warpgroup_wait<1>();
        settle(ds);
      }
#pragma unroll
      for (int i = 0; i < quads; ++i) {
        const float4 four = quad_of(output_dot, i);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& gradient = ds.value[0][2 * i + e / 4][e % 4];
          gradient = s.value[0][2 * i + e / 4][e % 4] * (gradient - element(four, e / 4 * 2 + e % 2));
        }
      }
      as_operand(score_grads, ds);
      warpgroup_fence();
      multiply_columns(k_grad, score_grads, shared.rows(rows_at.stage));
      warpgroup_commit();
      if constexpr (begins_next) {
        RingPlace<Blocks::stages> next_at = rows_at;
        next_at.next();
        begin_step(next_at);
      }
      read_output_dot();
      if constexpr (keeps) {
        uint4* const images =
            image_at(slice, key_head * readers + now.reader, image + block.begin / kBlockKeys) + lane;
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k) {
          const uint32_t(&a)[4] = score_grads[k];
          images[(k * (kBlockKeys / 16) + row0 / 16) * 32] = {transpose_matrix(a[0]), transpose_matrix(a[2]),
                                                              transpose_matrix(a[1]), transpose_matrix(a[3])};
        }
      }
      read_image();
      now = next;
      warpgroup_wait<begins_next ? 2 : 0>();
      settle(v_grad);
      settle(k_grad);
      release(shared.gates.rows_empty[rows_at.stage]);
      rows_at.next();
    };
    if constexpr (Blocks::runs_ahead) {
      // Products that are under way from one pass of the loop to the next would
      // make the compiler wait for every single one.
      const auto prepare = [&] {
        weigh();
        warpgroup_wait<0>();
        settle(ds);
      };
      if (steps > 0) {
        begin_step(rows_at);
        prepare();
        for (int step = 1; step < steps; ++step) {
          finish_step(std::true_type{});
          prepare();
        }
        finish_step(std::false_type{});
      }
    } else {
      for (int step = 0; step < steps; ++step) {
        begin_step(rows_at);
        weigh();
        finish_step(std::false_type{});
      }
    }

    k_grad.for_pairs(
        [&](int, int, float& first, float& second) { first *= p.in.scale, second *= p.in.scale; });
    named_barrier(1 + group, 128);  // all warps have read their rows of K and V
    const auto target = [&](void* gradient) {
      return [&, gradient](int row) -> bf16* {
        const int64_t token = block.sequence * p.capacity + block.begin + row;
        if (block.begin + row >= p.capacity) return nullptr;
        return packed_row<dim>(static_cast<bf16*>(gradient), token, p.in.key_heads, key_head);
      };
    };
    store_rows(k_grad, shared.keys(keys_at.stage), row0, target(p.key_grad));
    store_rows(v_grad, shared.values(keys_at.stage), row0, target(p.value_grad));
    release(shared.gates.keys_empty[keys_at.stage]);
    keys_at.next();
  }
}

template <int dim, bool keeps>
__global__ void __launch_bounds__(KeyBlocks<dim>::threads, 1)
    attention_key_blocks_kernel(const HeadSlice slice) {
  using Blocks = KeyBlocks<dim>;
  const Blocks shared;
  if (threadIdx.x == 0) {
    for (Gate& gate : shared.gates.keys_full) gate.open(32 * kLoaders);
    for (Gate& gate : shared.gates.keys_empty) gate.open(Blocks::consumers / 32);
    for (Gate& gate : shared.gates.rows_full) gate.open(32 * kLoaders);
    for (Gate& gate : shared.gates.rows_empty) gate.open(Blocks::consumers / 32);
  }
  __syncthreads();
  if (warpgroup() == Blocks::consumers / 128) {
    set_registers<24, false>();
    load_blocks(slice, shared);
  } else {
    set_registers<240, true>();
    sum_over_rows<dim, keeps>(slice, shared);
  }
}

// ---- dQ

// Warpgroups of a tile each share the tiles of keys; dS comes from its images
// straight to registers.
template <int dim>
struct TileGroups {
  static constexpr int consumers = 128 * kGroupTiles, threads = consumers + 32 * kLoaders, stages = 5;
  using Keys = Panels<kBlockKeys, dim>;
  using Rows = Panels<kTileRows, dim>;
  struct Gates {
    Gate full[stages], empty[stages];
  };
  static constexpr size_t gates_at = stages * Keys::bytes + kGroupTiles * Rows::bytes,
                          bytes = gates_at + sizeof(Gates);

  Gates& gates = *reinterpret_cast<Gates*>(shared_memory() + gates_at);

  __device__ bf16* base() const { return reinterpret_cast<bf16*>(shared_memory()); }
  __device__ Keys keys(int stage) const { return {base() + stage * kBlockKeys * dim}; }
  __device__ Rows results(int group) const {
    return {base() + (stages * kBlockKeys + group * kTileRows) * dim};
  }
};

template <int dim>
__device__ void load_keys(const HeadSlice& slice, const TileGroups<dim>& shared) {
  using Groups = TileGroups<dim>;
  const AttentionBackward& p = slice.pass;
  const int readers = p.in.query_heads / p.in.key_heads, heads = slice.heads * readers,
            loader = (static_cast<int>(threadIdx.x) - Groups::consumers) / 32;
  RingPlace<Groups::stages> keys_at;
  for (Share share(static_cast<int>(p.group_count) * heads); share.has_work(); share.next()) {
    const int key_head = slice.first_head + share.index() % heads / readers;
    const TileGroup& group = p.groups[share.index() / heads];
    const bf16* const keys = rows_of(p.in.key, p.in.key_strides, group.sequence, key_head);
    for (int key0 = 0; key0 <= group.last; key0 += kBlockKeys) {
      shared.gates.empty[keys_at.stage].wait(keys_at.parity ^ 1);
      load_rows_by_warps<kLoaders>(loader, shared.keys(keys_at.stage), group.last + 1 - key0,
                                   keys + key0 * p.in.key_strides[1], p.in.key_strides[1]);
      shared.gates.full[keys_at.stage].arrive_after_copies();
      keys_at.next();
    }
  }
}

template <int dim>
__device__ void sum_over_keys(const HeadSlice& slice, const TileGroups<dim>& shared) {
  using Groups = TileGroups<dim>;
  const AttentionBackward& p = slice.pass;
  const int readers = p.in.query_heads / p.in.key_heads, heads = slice.heads * readers,
            lane = static_cast<int>(threadIdx.x) % 32, place = warpgroup(), row0 = warp_of_group() * 16;
  constexpr int depth = kBlockKeys / 16;
  RingPlace<Groups::stages> keys_at;
  Share share(static_cast<int>(p.group_count) * heads);
  const auto read = [&](int index, int& last, TileGroup::Tile& tile) {
    const TileGroup& group = p.groups[index / heads];
    last = group.last, tile = group.tiles[place];
  };
  int coming_last;
  TileGroup::Tile coming;
  read(share.index(), coming_last, coming);
  for (; share.has_work(); share.next()) {
    const int head = slice.first_head * readers + share.index() % heads;
    const int blocks = coming_last / kBlockKeys + 1;
    const TileGroup::Tile tile = coming;
    Share after = share;
    after.next();
    if (after.has_work()) read(after.index(), coming_last, coming);
    const uint4* const image = image_at(slice, head, tile.image) + row0 / 16 * depth * 32 + lane;
    const int own_blocks = (tile.last + kBlockKeys) / kBlockKeys;
    Accumulator<1, dim / 8> q_grad;
    q_grad.clear();
    uint32_t score_grads[2][depth][4];
    const auto fetch = [&](uint32_t(&a)[depth][4], int n) {
      if (n >= own_blocks) return;
#pragma unroll
      for (int k = 0; k < depth; ++k) {
        const uint4 four = image[static_cast<int64_t>(n) * kImageUnits + k * 32];
        a[k][0] = four.x, a[k][1] = four.y, a[k][2] = four.z, a[k][3] = four.w;
      }
    };
    const auto add = [&](const uint32_t(&a)[depth][4], int n) {
      if (n >= blocks) return;
      shared.gates.full[keys_at.stage].wait(keys_at.parity);
      if (n < own_blocks) {
        publish_to_products();
        warpgroup_fence();
        multiply_columns(q_grad, a, shared.keys(keys_at.stage));
        warpgroup_commit();
        warpgroup_wait<0>();
        settle(q_grad);
      }
      if (lane == 0) shared.gates.empty[keys_at.stage].arrive();
      keys_at.next();
    };
    fetch(score_grads[0], 0);
    for (int n = 0; n < blocks; n += 2) {
      fetch(score_grads[1], n + 1);
      add(score_grads[0], n);
      fetch(score_grads[0], n + 2);
      add(score_grads[1], n + 1);
    }
    q_grad.for_pairs([&](int, int, float& a, float& b) { a *= p.in.scale, b *= p.in.scale; });
    store_rows(q_grad, shared.results(place), row0, [&](int row) -> bf16* {
      if (row >= tile.rows) return nullptr;
      return packed_row<dim>(static_cast<bf16*>(p.query_grad), tile.row + row, p.in.query_heads, head);
    });
    __syncwarp();
  }
}

template <int dim>
__global__ void __launch_bounds__(TileGroups<dim>::threads, 1)
    attention_tile_groups_kernel(const HeadSlice slice) {
  using Groups = TileGroups<dim>;
  const Groups shared;
  if (threadIdx.x == 0) {
    for (Gate& gate : shared.gates.full) gate.open(32 * kLoaders);
    for (Gate& gate : shared.gates.empty) gate.open(Groups::consumers / 32);
  }
  __syncthreads();
  if (warpgroup() == kGroupTiles) {
    set_registers<32, false>();
    load_keys(slice, shared);
  } else {
    set_registers<160, true>();
    sum_over_keys(slice, shared);
  }
}

dim3 blocks_for(int64_t work) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(work, multiprocessors())));
}

template <int dim, bool keeps>
void run_keys(const HeadSlice& slice, void* stream) {
  using Blocks = KeyBlocks<dim>;
  launch<attention_key_blocks_kernel<dim, keeps>>(blocks_for(slice.pass.block_count * slice.heads),
                                                  Blocks::threads, Blocks::bytes, stream, slice);
}

template <int dim>
void run_kept(const AttentionBackward& p, void* stream) {
  for (int first = 0; first < p.in.key_heads; first += p.slice_heads) {
    const HeadSlice slice{p, first, std::min(p.slice_heads, p.in.key_heads - first)};
    run_keys<dim, true>(slice, stream);
    const int query_heads = slice.heads * (p.in.query_heads / p.in.key_heads);
    launch<attention_tile_groups_kernel<dim>>(blocks_for(p.group_count * query_heads),
                                              TileGroups<dim>::threads, TileGroups<dim>::bytes, stream,
                                              slice);
  }
}

}  // namespace

bool has_backward_rings(int dim) {
  const size_t others =
      dim == 128 ? std::max(KeyBlocks<128>::bytes, TileGroups<128>::bytes) : KeyBlocks<64>::bytes;
  return std::max(others, query_ring_bytes(dim)) <= largest_shared_memory();
}

void attention_backward_kept(const AttentionBackward& arguments, void* stream) {
  run_kept<128>(arguments, stream);
}

void attention_key_gradients(const AttentionBackward& arguments, void* stream) {
  const HeadSlice slice{arguments, 0, arguments.in.key_heads};
  if (arguments.in.dim == 128) {
    run_keys<128, false>(slice, stream);
  } else {
    run_keys<64, false>(slice, stream);
  }
}

}  // namespace oryx::cuda
