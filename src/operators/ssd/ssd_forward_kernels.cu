#include <cmath>

#include "operators/device/pipeline.h"
#include "operators/device/warpgroup.h"
#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kChunk = kSsdChunk;

constexpr int kHelpers = 128;  // threads that load and make the scores

// Shared memory of a block that holds `columns` columns of the state, a warpgroup for every 64. The inputs of
// chunks lie in a ring of stages.
template <int key_dim, int columns, int stages>
struct ForwardTiles {
  using Keys = Panels<kChunk, key_dim>;
  using Values = Panels<kChunk, columns>;
  using Scores = Panels<kChunk, kChunk>;
  static constexpr int walkers = 2 * columns, threads = walkers + kHelpers;
  static constexpr unsigned row_lists = 8;  // at least stages
  static constexpr int row_pitch = kChunk + 4;
  static constexpr size_t stage_bytes = 2 * Keys::bytes + Values::bytes, decay_floats = 5 * kChunk;
  static constexpr size_t scores_at = stages * stage_bytes, decay_at = scores_at + 2 * Scores::bytes,
                          rows_at = decay_at + stages * decay_floats * sizeof(float);
  static constexpr size_t bytes = rows_at + row_lists * row_pitch * sizeof(int32_t);
  char* base;

  __device__ bf16* stage(int item) const {
    return reinterpret_cast<bf16*>(base + static_cast<unsigned>(item) % stages * stage_bytes);
  }
  __device__ Keys query(int item) const { return {stage(item)}; }
  __device__ Keys key(int item) const { return {stage(item) + kChunk * key_dim}; }
  __device__ Values value(int item) const { return {stage(item) + 2 * kChunk * key_dim}; }
  __device__ Scores scores(int item) const {  // M
    return {reinterpret_cast<bf16*>(base + scores_at + static_cast<unsigned>(item) % 2 * Scores::bytes)};
  }
  __device__ float* cumulative(int item) const {  // SsdDecay
    return reinterpret_cast<float*>(base + decay_at) + static_cast<unsigned>(item) % stages * decay_floats;
  }
  __device__ float* step(int item) const { return cumulative(item) + 2 * kChunk; }
  __device__ float* weight(int item) const { return cumulative(item) + 3 * kChunk; }
  __device__ float* gamma(int item) const { return cumulative(item) + 4 * kChunk; }
  // The packed row of every token or −1, then whether the chunk has rows.
  __device__ int32_t* rows(int item) const {
    return reinterpret_cast<int32_t*>(base + rows_at) + static_cast<unsigned>(item) % row_lists * row_pitch;
  }
};

// A helper's share of the copies of a chunk: some columns of every few rows. Rows of zeros are not read.
template <int columns>
struct ChunkShare {
  static constexpr int units = columns / 8, apart = kHelpers / units, count = kChunk / apart;
  static_assert(kChunk % apart == 0 && apart % 8 == 0);  // a thread keeps its place in the swizzle
  int row, column;

  __device__ explicit ChunkShare(int helper) : row(helper / units), column(helper % units * 8) {}

  // Of rows that lie `stride` elements apart; those at and past `valid` are zero.
  __device__ void load(Panels<kChunk, columns> tile, const bf16* first, int64_t stride, int valid) const {
    const bf16* from = first + row * stride + column;
    bf16* to = tile.unit(row, column);
#pragma unroll
    for (int n = 0; n < count; ++n, from += apart * stride)
      copy_async(to + n * apart * 64, from, row + n * apart < valid);
  }
  // Of packed rows; −1 stands for a row of zeros.
  __device__ void load_packed(Panels<kChunk, columns> tile, const bf16* first, int32_t stride,
                              const int32_t* rows) const {
    int32_t packed[count];  // all before the first copy: none waits for its row
#pragma unroll
    for (int n = 0; n < count; ++n) packed[n] = rows[row + n * apart];
    first += column;
    bf16* to = tile.unit(row, column);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      copy_async(to + n * apart * 64, first + static_cast<int64_t>(packed[n] < 0 ? 0 : packed[n]) * stride,
                 packed[n] >= 0);
    }
  }
};

// Of M = (Q Kᵀ) ⊙ Γ ⊙ (1 Δᵀ), the warp's 16 rows and columns n0 … of Q Kᵀ.
template <int column_tiles>
__device__ inline void store_scores(const Accumulator<1, column_tiles>& product,
                                    Panels<kChunk, kChunk> scores, int n0, const float* cumulative,
                                    const float* step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4, m0 = 16 * warp_of_group();
  float2 own[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    own[half] = *reinterpret_cast<const float2*>(cumulative + 2 * (m0 + lane / 4 + 8 * half));
#pragma unroll
  for (int tile = 0; tile < column_tiles; ++tile) {
    const int j = n0 + 8 * tile + 2 * t;
    const float4 other = *reinterpret_cast<const float4*>(cumulative + 2 * j);
    const float2 size = *reinterpret_cast<const float2*>(step + j);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = m0 + lane / 4 + 8 * half;
      // Masked before the exponential, which may overflow after the staircase.
      const float first = exp2_fast(j <= i ? (own[half].x - other.x) + (own[half].y - other.y) : -INFINITY),
                  second = exp2_fast(j < i ? (own[half].x - other.z) + (own[half].y - other.w) : -INFINITY);
      scores.store2(i, j, product.value[0][tile][2 * half] * size.x * first,
                    product.value[0][tile][2 * half + 1] * size.y * second);
    }
  }
}

// Where a block of the forward kernel is.
struct ForwardPlace {
  int batch, head, output_head, key_head, query_head, stream, segment;
  int begin, items;  // the first chunk of the segment, and how many it has
  bool is_first_reader;

  __device__ explicit ForwardPlace(const SsdForward& p) {
    const cpu::MixerShape& shape = p.shape;
    const int state_heads = static_cast<int>(shape.state_heads),
              output_heads = static_cast<int>(shape.output_heads), readers = output_heads / state_heads;
    output_head = static_cast<int>(blockIdx.x) % output_heads, head = output_head / readers;
    is_first_reader = output_head % readers == 0;
    key_head = head / (state_heads / static_cast<int>(shape.key_heads));
    query_head = output_head / (output_heads / static_cast<int>(shape.query_heads));
    batch = static_cast<int>(blockIdx.x) / output_heads;
    stream = batch * state_heads + head;
    segment = static_cast<int>(blockIdx.y);
    const int chunks = static_cast<int>(shape.chunks), length = static_cast<int>(p.segment_chunks);
    begin = segment * length;
    items = length < chunks - begin ? length : chunks - begin;
  }
};

// What the helpers do: the inputs of chunks come into the ring ahead of their use, and the scores of the
// chunk that is next.
template <int key_dim, int columns, int stages>
__device__ void prepare_chunks(const SsdForward& p, const ForwardTiles<key_dim, columns, stages>& tiles,
                               const ForwardPlace& place, int column0) {
  using Tiles = ForwardTiles<key_dim, columns, stages>;
  const cpu::MixerShape& shape = p.shape;
  const int helper = static_cast<int>(threadIdx.x) - Tiles::walkers, lane = helper % 32;
  const auto find_row = [&](int item) {
    const int64_t chunk = place.begin + item, time = chunk * kChunk + helper;
    if (item >= place.items) return helper < kChunk ? -1 : 0;
    if (helper == kChunk) return p.has_rows[place.batch * shape.chunks + chunk];
    return helper < kChunk && time < shape.time ? p.row_of[place.batch * shape.time + time] : -1;
  };
  const auto list_row = [&](int item, int32_t row) {
    if (helper <= kChunk) tiles.rows(item)[helper] = row;
  };
  const bf16 *keys = token_row(p.key, place.batch, 0, place.key_head),
             *values = token_row(p.value, place.batch, 0, place.head) + column0,
             *queries = packed_row(p.query, 0, place.query_head);
  const ChunkShare<key_dim> key_share(helper);
  const ChunkShare<columns> value_share(helper);
  // A warp copies each of the four arrays.
  const int of_warp = helper / 32, per_token = of_warp == 0 ? 2 : 1;
  const float* const decay = of_warp == 0   ? p.decay.cumulative
                             : of_warp == 1 ? p.decay.step
                             : of_warp == 2 ? p.decay.weight
                                            : p.decay.gamma;
  const auto load = [&](int item) {
    if (item < place.items) {
      const int64_t chunk = place.begin + item, time = chunk * kChunk, left = shape.time - time;
      const int valid = left < kChunk ? static_cast<int>(left) : kChunk;
      key_share.load(tiles.key(item), keys + time * p.key.time, p.key.time, valid);
      value_share.load(tiles.value(item), values + time * p.value.time, p.value.time, valid);
      float* to = tiles.cumulative(item) + (of_warp == 0 ? 0 : (of_warp + 1) * kChunk);
      const int64_t at = (place.stream * shape.chunks + chunk) * kChunk;
      if (4 * lane < per_token * kChunk) copy_async(to + 4 * lane, decay + per_token * at + 4 * lane);
      const int32_t* rows = tiles.rows(item);
      if (rows[kChunk] != 0)
        key_share.load_packed(tiles.query(item), queries, static_cast<int32_t>(p.query.time), rows);
    }
    commit_copies();
  };

  // Copies are issued before the scores are made and not after, when the next thing would be to publish what
  // has come: that waits for them too. The chunk before this one is still being read, so the place of the one
  // before that is taken.
  constexpr int ahead = stages - 2;
  static_assert(ahead > 0);
#pragma unroll 1
  for (int item = 0; item < ahead; ++item) list_row(item, find_row(item));
  named_barrier(2, kHelpers);
#pragma unroll 1
  for (int item = 0; item < ahead; ++item) load(item);
  int32_t next_row = find_row(ahead);
#pragma unroll 1
  for (int item = 0; item < place.items; ++item) {
    wait_copies<ahead - 1>();
    publish_to_products();
    list_row(item + ahead, next_row);
    named_barrier(2, kHelpers);  // the chunk is here
    load(item + ahead);
    next_row = find_row(item + ahead + 1);
    if (__shfl_sync(0xffffffffu, tiles.rows(item)[kChunk], 0) != 0) {
#pragma unroll 1
      for (int n0 = 0; n0 < kChunk; n0 += 32) {  // in halves for the sake of registers
        Accumulator<1, 4> product;
        warpgroup_fence();
        multiply_rows(product, tiles.query(item), 0, typename Tiles::Keys{tiles.key(item).base + n0 * 64});
        warpgroup_commit();
        warpgroup_wait<0>();
        settle(product);
        store_scores(product, tiles.scores(item), n0, tiles.cumulative(item), tiles.step(item));
      }
      publish_to_products();
    }
    named_barrier(1, Tiles::threads);  // for those who walk; they have read the last chunk
  }
  wait_copies<0>();
}

// A block walks over the chunks of a segment of one output head: O = γ ⊙ (Q S) + M V + D ⊙ V where there are
// rows, then S ← γ_C S + Kᵀ (ρ Δ ⊙ V). A warpgroup holds 64 columns of S as rows of Sᵀ: its accumulator is,
// rounded, the left operand of Sᵀ Qᵀ. One more warpgroup prepares chunks, and the two sides meet once a
// chunk.
template <int key_dim, int columns, int stages>
__global__ void __launch_bounds__(ForwardTiles<key_dim, columns, stages>::threads, 1)
    forward_kernel(const SsdForward p) {
  using Tiles = ForwardTiles<key_dim, columns, stages>;
  const Tiles tiles{shared_memory()};
  const ForwardPlace place(p);
  const int column0 = static_cast<int>(blockIdx.z) * columns;
  if (warpgroup() == Tiles::walkers / 128) {
    if constexpr (Tiles::walkers == 256) set_registers<72, false>();
    return prepare_chunks(p, tiles, place, column0);
  }
  if constexpr (Tiles::walkers == 256) set_registers<216, true>();

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, t = lane % 4;
  const int group = warpgroup(), m0 = 16 * warp_of_group();
  const int column = column0 + group * 64 + m0;  // of the value, the warp's first
  const int value_dim = static_cast<int>(p.shape.value_dim);
  Accumulator<1, key_dim / 8> state;
  state.clear();
  if (p.first_state != nullptr) {
    const int64_t stream =
        p.first_rows == nullptr ? place.stream : p.first_rows[place.batch] * p.shape.state_heads + place.head;
    const float* from = p.first_state + (stream * p.segments + place.segment) * key_dim * value_dim + column;
    state.for_pairs([&](int row, int key, float& first, float& second) {
      first = from[key * value_dim + row], second = from[(key + 1) * value_dim + row];
    });
  }
  const float skip = p.skip != nullptr ? p.skip[place.output_head] : 0.0f;
  bf16* const outputs = const_cast<bf16*>(packed_row(p.output, 0, place.output_head)) + column + 8 * (t % 2);

  const float* const factors =
      p.decay.gamma + (place.stream * p.shape.chunks + place.begin) * kChunk + kChunk - 1;
  const auto factor_of = [&](int item) { return item < place.items ? factors[item * kChunk] : 0.0f; };  // γ_C
  float factor = factor_of(0), next_factor = factor_of(1);
#pragma unroll 1
  for (int item = 0; item < place.items; ++item) {
    uint32_t s[key_dim / 16][4];
    as_operand(s, state);
    state.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
    named_barrier(1, Tiles::threads);  // the chunk and its scores are here

    uint32_t v[kChunk / 16][4];
    const Tile<64> values = tiles.value(item).panel(group * 64);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) load_a<Layout::transposed>(v[k], values, m0, 16 * k);
    Accumulator<1, kChunk / 8> from_state, from_chunk;  // of Oᵀ; of whatever lies there where no row is
    warpgroup_fence();
    multiply_rows(from_state, s, tiles.query(item));
    multiply_rows(from_chunk, v, tiles.scores(item));
    warpgroup_commit();
    const float* const gamma = tiles.gamma(item);
    factor = next_factor, next_factor = factor_of(item + 2);
    uint32_t weighted[kChunk / 16][4];
    const float* const weights = tiles.weight(item) + 2 * t;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      const float2 weight[2] = {*reinterpret_cast<const float2*>(weights + 16 * k),
                                *reinterpret_cast<const float2*>(weights + 16 * k + 8)};
#pragma unroll
      for (int e = 0; e < 4; ++e) weighted[k][e] = v[k][e];
      scale_a(weighted[k], weight);
    }
    warpgroup_wait<0>();
    settle(from_state);
    settle(from_chunk);
    warpgroup_fence();
    multiply_columns(state, weighted, tiles.key(item));
    warpgroup_commit();
    const int32_t* const rows = tiles.rows(item);
    if (rows[kChunk] != 0) {
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        uint32_t pairs[4];  // 8 tokens by 8 values each
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 scale = *reinterpret_cast<const float2*>(gamma + 16 * k + 8 * (e / 2) + 2 * t);
          const float2 value = unpack(v[k][e]);
          const int tile = 2 * k + e / 2, half = e % 2;
          const float first = scale.x * from_state.value[0][tile][2 * half] +
                              (from_chunk.value[0][tile][2 * half] + skip * value.x),
                      second = scale.y * from_state.value[0][tile][2 * half + 1] +
                               (from_chunk.value[0][tile][2 * half + 1] + skip * value.y);
          pairs[e] = transpose_matrix(pack(first, second));
        }
        trade_pairs(pairs);  // this lane's is now matrix t
        const int row = rows[16 * k + 8 * (t / 2) + lane / 4];
        if (row >= 0) {
          *reinterpret_cast<uint4*>(outputs + row * p.output.time) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
      }
    }
    warpgroup_wait<0>();
    settle(state);
  }
  if (p.last_state != nullptr && place.segment == p.segments - 1 && place.is_first_reader) {
    float* to = p.last_state + static_cast<int64_t>(place.stream) * key_dim * value_dim + column;
    state.for_pairs([&](int row, int key, float& first, float& second) {
      to[key * value_dim + row] = first, to[(key + 1) * value_dim + row] = second;
    });
  }
}

template <int key_dim, int columns, int stages>
void run(const SsdForward& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.shape.batch * a.shape.output_heads),
                  static_cast<unsigned>(a.segments), static_cast<unsigned>(a.shape.value_dim / columns));
  using Tiles = ForwardTiles<key_dim, columns, stages>;
  launch<forward_kernel<key_dim, columns, stages>>(grid, Tiles::threads, Tiles::bytes, stream, a);
}

}  // namespace

bool ssd_forward_fits() { return largest_shared_memory() >= ForwardTiles<128, 64, 3>::bytes; }

void ssd_forward(const SsdForward& a, void* stream) {
  with_dimensions(a.shape, [&](auto key_dim, auto value_dim) {
    if (largest_shared_memory() >= ForwardTiles<key_dim, value_dim, 4>::bytes) {
      run<key_dim, value_dim, 4>(a, stream);
    } else {
      run<key_dim, 64, 3>(a, stream);
    }
  });
}

}  // namespace oryx::cuda
