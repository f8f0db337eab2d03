#include "operators/device/warpgroup.h"
#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kChunk = kSsdChunk;

// Shared memory of a block that holds `columns` columns of the state, a warpgroup for every 64. The inputs of
// chunks lie in a ring of stages.
template <int key_dim, int columns, int stages>
struct ForwardTiles {
  using Keys = Panels<kChunk, key_dim>;
  using Values = Panels<kChunk, columns>;
  using Scores = Panels<kChunk, kChunk>;
  static constexpr int threads = 2 * columns, groups = columns / 64;
  static constexpr unsigned row_lists = 8;  // at least stages + 1
  static constexpr size_t stage_bytes = 2 * Keys::bytes + Values::bytes, decay_floats = 5 * kChunk;
  static constexpr size_t decay_at = stages * stage_bytes + Scores::bytes,
                          rows_at = decay_at + stages * decay_floats * sizeof(float);
  static constexpr size_t bytes = rows_at + row_lists * kChunk * sizeof(int32_t);
  char* base;

  __device__ bf16* stage(int item) const {
    return reinterpret_cast<bf16*>(base + static_cast<unsigned>(item) % stages * stage_bytes);
  }
  __device__ Keys query(int item) const { return {stage(item)}; }
  __device__ Keys key(int item) const { return {stage(item) + kChunk * key_dim}; }
  __device__ Values value(int item) const { return {stage(item) + 2 * kChunk * key_dim}; }
  __device__ Scores scores() const { return {reinterpret_cast<bf16*>(base + stages * stage_bytes)}; }  // M
  __device__ float* cumulative(int item) const {  // SsdDecay
    return reinterpret_cast<float*>(base + decay_at) + static_cast<unsigned>(item) % stages * decay_floats;
  }
  __device__ float* step(int item) const { return cumulative(item) + 2 * kChunk; }
  __device__ float* weight(int item) const { return cumulative(item) + 3 * kChunk; }
  __device__ float* gamma(int item) const { return cumulative(item) + 4 * kChunk; }
  __device__ int32_t* rows(int item) const {
    return reinterpret_cast<int32_t*>(base + rows_at) + static_cast<unsigned>(item) % row_lists * kChunk;
  }
};

// Copies the rows of a chunk with all threads of a block. row_pointer(row) is null where a row is zero.
template <int threads, int columns, typename RowPointer>
__device__ inline void load_chunk(Panels<kChunk, columns> tile, const void* anywhere,
                                  RowPointer row_pointer) {
  constexpr int units = columns / 8, apart = threads / units;
  static_assert(kChunk % apart == 0 && apart % 8 == 0);  // a thread keeps its place in the swizzle
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  bf16* const to = tile.unit(row, column);
#pragma unroll 2  // more would take registers
  for (int pass = 0; pass < kChunk / apart; ++pass) {
    const bf16* from = row_pointer(row + pass * apart);
    copy_async(to + pass * apart * 64, from != nullptr ? from + column : static_cast<const bf16*>(anywhere),
               from != nullptr);
  }
}

// The same for `valid` rows that lie `stride` elements apart.
template <int threads, int columns>
__device__ inline void load_even_chunk(Panels<kChunk, columns> tile, const bf16* first, int64_t stride,
                                       int64_t valid) {
  constexpr int units = columns / 8, apart = threads / units;
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  bf16* const to = tile.unit(row, column);
  const bf16* from = first + row * stride + column;
#pragma unroll 2
  for (int pass = 0; pass < kChunk / apart; ++pass, from += apart * stride) {
    const bool is_valid = row + pass * apart < valid;
    copy_async(to + pass * apart * 64, is_valid ? from : first, is_valid);
  }
}

// Of M = (Q Kᵀ) ⊙ Γ ⊙ (1 Δᵀ), from rows m0 and columns n0 of Q Kᵀ on.
template <int column_tiles>
__device__ inline void store_scores(Accumulator<1, column_tiles>& product, Panels<kChunk, kChunk> scores,
                                    int m0, int n0, const float* cumulative, const float* step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  float2 own[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    own[half] = *reinterpret_cast<const float2*>(cumulative + 2 * (m0 + lane / 4 + 8 * half));
#pragma unroll
  for (int tile = 0; tile < column_tiles; ++tile) {
    const int j = n0 + 8 * tile + 2 * t;
    if (n0 + 8 * tile > m0 + 15) {  // after every row of the warp
      for (int half = 0; half < 2; ++half) scores.store2(m0 + lane / 4 + 8 * half, j, 0.0f, 0.0f);
      continue;
    }
    const float4 other = *reinterpret_cast<const float4*>(cumulative + 2 * j);
    const float2 size = *reinterpret_cast<const float2*>(step + j);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = m0 + lane / 4 + 8 * half;
      const float first = product.value[0][tile][2 * half] * size.x *
                          exp2_fast((own[half].x - other.x) + (own[half].y - other.y)),
                  second = product.value[0][tile][2 * half + 1] * size.y *
                           exp2_fast((own[half].x - other.z) + (own[half].y - other.w));
      scores.store2(i, j, j <= i ? first : 0.0f, j + 1 <= i ? second : 0.0f);
    }
  }
}

// A block walks over the chunks of a segment of one output head: O = γ ⊙ (Q S) + M V + D ⊙ V where there are
// rows, then S ← γ_C S + Kᵀ (ρ Δ ⊙ V). A warpgroup holds 64 columns of S as rows of Sᵀ: its accumulator is,
// rounded, the left operand of Sᵀ Qᵀ.
template <int key_dim, int columns, int stages>
__global__ void __launch_bounds__(2 * columns, 1) forward_kernel(const SsdForward p) {
  using Tiles = ForwardTiles<key_dim, columns, stages>;
  const Tiles tiles{shared_memory()};
  const cpu::MixerShape& shape = p.shape;
  const int state_heads = static_cast<int>(shape.state_heads);
  const int readers = static_cast<int>(shape.output_heads) / state_heads;
  const int output_head = static_cast<int>(blockIdx.x) % (state_heads * readers),
            head = output_head / readers;
  const int key_head = head / (state_heads / static_cast<int>(shape.key_heads));
  const int query_head = output_head / static_cast<int>(shape.output_heads / shape.query_heads);
  const int batch = static_cast<int>(blockIdx.x) / (state_heads * readers),
            segment = static_cast<int>(blockIdx.y), stream = batch * state_heads + head;
  const int column0 = static_cast<int>(blockIdx.z) * columns;
  const int chunks = static_cast<int>(shape.chunks), begin = segment * static_cast<int>(p.segment_chunks);
  const int items = static_cast<int>(p.segment_chunks) < chunks - begin ? static_cast<int>(p.segment_chunks)
                                                                        : chunks - begin;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, t = lane % 4;
  const int group = warpgroup(), m0 = 16 * warp_of_group();
  const auto has_rows = [&](int item) {
    return item < items && p.has_rows[static_cast<int64_t>(batch) * chunks + begin + item] != 0;
  };
  const auto find_row = [&](int item) {
    const int64_t time = static_cast<int64_t>(begin + item) * kChunk + thread;
    const bool is_token = thread < kChunk && item < items && time < shape.time;
    return is_token ? p.row_of[batch * shape.time + time] : -1;
  };
  const auto load_decay = [&](int item) {  // a warp copies each of the four arrays
    const int warp = thread / 32, count = warp == 0 ? 2 : 1;
    const float* from = warp == 0   ? p.decay.cumulative
                        : warp == 1 ? p.decay.step
                        : warp == 2 ? p.decay.weight
                                    : p.decay.gamma;
    const int64_t at = (static_cast<int64_t>(stream) * chunks + begin + item) * kChunk;
    float* to = tiles.cumulative(item) + (warp == 0 ? 0 : (warp + 1) * kChunk);
    if (warp < 4 && 4 * lane < count * kChunk) copy_async(to + 4 * lane, from + count * at + 4 * lane);
  };
  const auto load = [&](int item, bool with_query) {
    if (item < items) {
      const int64_t time = static_cast<int64_t>(begin + item) * kChunk, left = shape.time - time;
      load_even_chunk<Tiles::threads>(tiles.key(item), token_row(p.key, batch, time, key_head), p.key.time,
                                      left);
      load_even_chunk<Tiles::threads>(tiles.value(item), token_row(p.value, batch, time, head) + column0,
                                      p.value.time, left);
      load_decay(item);
      if (with_query) {
        const int32_t* rows = tiles.rows(item);
        load_chunk<Tiles::threads>(tiles.query(item), p.query.data, [&](int row) -> const bf16* {
          return rows[row] >= 0 ? packed_row(p.query, rows[row], query_head) : nullptr;
        });
      }
    }
    commit_copies();
  };

#pragma unroll
  for (int item = 0; item < stages - 1; ++item)
    if (thread < kChunk) tiles.rows(item)[thread] = find_row(item);
  __syncthreads();
  unsigned present = 0;  // bit i: whether the chunk i after this one has rows
#pragma unroll
  for (int item = 0; item < stages - 1; ++item) {
    const bool has = has_rows(item);
    present |= static_cast<unsigned>(has) << item;
    load(item, has);
  }
  int32_t next_row = find_row(stages - 1);
  bool next_has = has_rows(stages - 1);

  const int column = column0 + group * 64 + m0;  // of the value, the warp's first
  const int value_dim = static_cast<int>(shape.value_dim);
  Accumulator<1, key_dim / 8> state;
  state.clear();
  if (p.first_state != nullptr) {
    const float* from = p.first_state + (stream * p.segments + segment) * key_dim * value_dim + column;
    state.for_pairs([&](int row, int key, float& first, float& second) {
      first = from[key * value_dim + row], second = from[(key + 1) * value_dim + row];
    });
  }
  const float skip = p.skip != nullptr ? p.skip[output_head] : 0.0f;

  // A warpgroup makes every other 32 columns of the scores.
  Accumulator<1, 4> product;
  const auto multiply_scores = [&](int item, int n0) {
    warpgroup_fence();
    multiply_rows(product, tiles.query(item), 0, typename Tiles::Keys{tiles.key(item).base + n0 * 64});
    warpgroup_commit();
  };
  const auto finish_scores = [&](int item, int n0) {
    warpgroup_wait<0>();
    settle(product);
    if (present & 1) store_scores(product, tiles.scores(), m0, n0, tiles.cumulative(item), tiles.step(item));
  };
  const auto factor_of = [&](int item) {  // γ_C
    const int64_t chunk = static_cast<int64_t>(stream) * chunks + begin + item;
    return item < items ? p.decay.gamma[(chunk + 1) * kChunk - 1] : 0.0f;
  };
  float factor = factor_of(0);
  for (int item = 0; item < items; ++item) {
    uint32_t s[key_dim / 16][4];
    as_operand(s, state);
    state.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
    wait_copies<stages - 2>();
    publish_to_products();
    if (thread < kChunk) tiles.rows(item + stages - 1)[thread] = next_row;
    __syncthreads();  // the chunk is here, and the last one is read
    multiply_scores(item, 32 * group);

    present |= static_cast<unsigned>(next_has) << (stages - 1);
    load(item + stages - 1, next_has);
    next_row = find_row(item + stages);
    next_has = has_rows(item + stages);
    factor = factor_of(item + 1);
    const float* const gamma = tiles.gamma(item);
    uint32_t v[kChunk / 16][4];
    const Tile<64> values = tiles.value(item).panel(group * 64);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) load_a<Layout::transposed>(v[k], values, m0, 16 * k);
    finish_scores(item, 32 * group);
    if constexpr (Tiles::groups == 1) {
      multiply_scores(item, 32);
      finish_scores(item, 32);
    }
    publish_to_products();
    __syncthreads();

    Accumulator<1, kChunk / 8> from_state, from_chunk;  // of Oᵀ; of whatever lies there where no row is
    warpgroup_fence();
    multiply_rows(from_state, s, tiles.query(item));
    multiply_rows(from_chunk, v, tiles.scores());
    warpgroup_commit();
    warpgroup_wait<0>();
    settle(from_state);
    settle(from_chunk);

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
    warpgroup_fence();
    multiply_columns(state, weighted, tiles.key(item));
    warpgroup_commit();
    if (present & 1) {
      const int32_t* const rows = tiles.rows(item);
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
          bf16* to = const_cast<bf16*>(packed_row(p.output, row, output_head)) + column + 8 * (t % 2);
          *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
      }
    }
    present >>= 1;
    warpgroup_wait<0>();
    settle(state);
  }
  wait_copies<0>();
  if (segment == p.segments - 1 && output_head % readers == 0) {
    float* to = p.last_state + static_cast<int64_t>(stream) * key_dim * value_dim + column;
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

bool ssd_forward_fits() { return largest_shared_memory() >= ForwardTiles<128, 64, 2>::bytes; }

void ssd_forward(const SsdForward& a, void* stream) {
  with_dimensions(a.shape, [&](auto key_dim, auto value_dim) {
    if (largest_shared_memory() >= ForwardTiles<key_dim, value_dim, 4>::bytes) {
      run<key_dim, value_dim, 4>(a, stream);
    } else {
      run<key_dim, 64, 2>(a, stream);
    }
  });
}

}  // namespace oryx::cuda
