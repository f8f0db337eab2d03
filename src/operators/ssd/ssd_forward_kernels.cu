#include <type_traits>

#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kChunk = kSsdChunk;
constexpr int kWarps = 4;  // a warp for 16 rows of scores, and for a quarter of the state's columns
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kStages = 2;
static_assert(kChunk == 16 * kWarps);

// The inputs of one chunk in shared memory.
template <int key_dim, int value_dim>
struct ForwardStage {
  static constexpr size_t key_bytes = Tile<key_dim>::bytes(kChunk),
                          value_bytes = Tile<value_dim>::bytes(kChunk);
  static constexpr size_t bytes = 2 * key_bytes + value_bytes + 5 * kChunk * sizeof(float);
  Tile<key_dim> query, key;
  Tile<value_dim> value;
  float *cumulative, *step, *weight, *gamma;  // SsdDecay

  __device__ explicit ForwardStage(char* base)
      : query{reinterpret_cast<bf16*>(base)},
        key{reinterpret_cast<bf16*>(base + key_bytes)},
        value{reinterpret_cast<bf16*>(base + 2 * key_bytes)},
        cumulative(reinterpret_cast<float*>(base + 2 * key_bytes + value_bytes)),
        step(cumulative + 2 * kChunk),
        weight(step + kChunk),
        gamma(weight + kChunk) {}
};

// Shared memory of a block. Rows are found one chunk ahead of the copies, which run one chunk ahead of the
// products.
template <int key_dim, int value_dim>
struct ForwardTiles {
  using Stage = ForwardStage<key_dim, value_dim>;
  static constexpr size_t bytes =
      kStages * Stage::bytes + Tile<kChunk>::bytes(kChunk) + 3 * kChunk * sizeof(int32_t);
  static_assert(bytes <= kMostSharedBytes);
  char* base;

  __device__ Stage stage(unsigned item) const { return Stage(base + item % kStages * Stage::bytes); }
  __device__ Tile<kChunk> scores() const {  // M
    return {reinterpret_cast<bf16*>(base + kStages * Stage::bytes)};
  }
  __device__ int32_t* rows(unsigned item) const {
    return reinterpret_cast<int32_t*>(base + kStages * Stage::bytes + Tile<kChunk>::bytes(kChunk)) +
           item % 3 * kChunk;
  }
};

// Rows m0 … m0 + 15 of M = (Q Kᵀ) ⊙ Γ ⊙ (1 Δᵀ), up to the block of 32 columns with the diagonal.
template <int key_dim, int value_dim>
__device__ inline void make_scores(const ForwardStage<key_dim, value_dim>& stage, Tile<kChunk> scores,
                                   int m0) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float2* cumulative = reinterpret_cast<const float2*>(stage.cumulative);
  const float2 own[2] = {cumulative[m0 + lane / 4], cumulative[m0 + lane / 4 + 8]};
#pragma unroll
  for (int n0 = 0; n0 < kChunk; n0 += 32) {
    if (n0 > m0) break;
    Accumulator<1, 4> product;
    product.clear();
    add_product<Layout::plain, Layout::plain>(product, stage.query, m0, stage.key, n0, 0, key_dim);
    product.for_pairs([&](int row, int column, float& first, float& second) {
      const int j = n0 + column, i = m0 + row;
      const float4 other = *reinterpret_cast<const float4*>(stage.cumulative + 2 * j);
      const float2 step = *reinterpret_cast<const float2*>(stage.step + j);
      const float2 mine = row < 8 ? own[0] : own[1];
      const float x = first * step.x * exp2_fast((mine.x - other.x) + (mine.y - other.y));
      const float y = second * step.y * exp2_fast((mine.x - other.z) + (mine.y - other.w));
      first = j <= i ? x : 0.0f;
      second = j + 1 <= i ? y : 0.0f;
    });
    product.store(scores, m0, n0);
  }
}

// A block walks over the chunks of a segment of one output head: O = γ ⊙ (Q S) + M V + D ⊙ V where there are
// rows, then S ← γ_C S + Kᵀ (ρ Δ ⊙ V). A warp holds 16 · row_tiles columns of S, as rows of Sᵀ: in this
// layout an accumulator is, rounded, the second operand of Q S.
template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const SsdForward p) {
  constexpr int row_tiles = value_dim / 64;
  const ForwardTiles<key_dim, value_dim> tiles{shared_memory()};
  const cpu::MixerShape& shape = p.shape;
  const int state_heads = static_cast<int>(shape.state_heads);
  const int readers = p.is_local ? 1 : static_cast<int>(shape.output_heads) / state_heads;
  const int output_head = static_cast<int>(blockIdx.x) % (state_heads * readers),
            head = output_head / readers;
  const int key_head = head / (state_heads / static_cast<int>(shape.key_heads));
  const int query_head = output_head / static_cast<int>(shape.output_heads / shape.query_heads);
  const int64_t batch = static_cast<int>(blockIdx.x) / (state_heads * readers), segment = blockIdx.y;
  const int64_t stream = batch * state_heads + head;
  const int chunks = static_cast<int>(shape.chunks), begin = static_cast<int>(segment * p.segment_chunks);
  const int items = static_cast<int>(p.segment_chunks) < chunks - begin ? static_cast<int>(p.segment_chunks)
                                                                        : chunks - begin;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, t = lane % 4;
  const auto has_rows = [&](int item) {
    return !p.is_local && p.has_rows[batch * chunks + begin + item] != 0;
  };
  const auto find_row = [&](int item) {
    const int64_t time = static_cast<int64_t>(begin + item) * kChunk + thread;
    const bool is_token = !p.is_local && thread < kChunk && item < items && time < shape.time;
    return is_token ? p.row_of[batch * shape.time + time] : -1;
  };
  // A warp copies each of the four arrays.
  const auto load_decay = [&](const auto& stage, int64_t at) {
    const int warp = thread / 32, count = warp == 0 ? 2 : 1;
    const float* from = warp == 0   ? p.decay.cumulative
                        : warp == 1 ? p.decay.step
                        : warp == 2 ? p.decay.weight
                                    : p.decay.gamma;
    float* to = stage.cumulative + (warp == 0 ? 0 : (warp + 1) * kChunk);
    if (4 * lane < count * kChunk) copy_async(to + 4 * lane, from + count * at + 4 * lane);
  };
  const auto load = [&](int item) {
    if (item < items) {
      const auto stage = tiles.stage(item);
      const int64_t time = static_cast<int64_t>(begin + item) * kChunk, left = shape.time - time;
      const int count = left < kChunk ? static_cast<int>(left) : kChunk;
      load_even_rows<key_dim, kChunk, kThreads>(stage.key, count, token_row(p.key, batch, time, key_head),
                                                p.key.time);
      load_even_rows<value_dim, kChunk, kThreads>(stage.value, count, token_row(p.value, batch, time, head),
                                                  p.value.time);
      const int64_t at = (stream * chunks + begin + item) * kChunk;
      load_decay(stage, at);
      if (has_rows(item)) {
        const int32_t* rows = tiles.rows(item);
        load_rows<key_dim, kChunk, kThreads>(stage.query, p.query.data, [&](int row, int) -> const bf16* {
          return rows[row] >= 0 ? packed_row(p.query, rows[row], query_head) : nullptr;
        });
      }
    }
    commit_copies();
  };

  const int own0 = thread / 32 * 16, m0 = own0 * row_tiles;  // the warp's rows of M, and of Sᵀ
  constexpr int state_size = key_dim * value_dim;
  Accumulator<row_tiles, key_dim / 8> state;
  state.clear();
  if (p.first_state != nullptr) {
    const float* from = p.first_state + (stream * p.segments + segment) * state_size + m0;
    state.for_pairs([&](int row, int column, float& first, float& second) {
      first = from[column * value_dim + row], second = from[(column + 1) * value_dim + row];
    });
  }
  // D as a diagonal of bf16, and what that leaves of it.
  const float skip = p.skip != nullptr ? p.skip[output_head] : 0.0f, rest = skip - unpack(pack(skip, 0.0f)).x;
  const bool is_first = lane / 4 == 2 * t, is_second = lane / 4 == 2 * t + 1;
  const uint32_t skip_high = pack(is_first ? skip : 0.0f, is_second ? skip : 0.0f);
  const uint32_t skip_low = pack(is_first ? rest : 0.0f, is_second ? rest : 0.0f);
  float total = 1.0f;  // decay over the segment

  if (thread < kChunk) tiles.rows(0)[thread] = find_row(0);
  __syncthreads();
  load(0);
  int32_t next_row = find_row(1);
  for (int item = 0; item < items; ++item) {
    wait_copies<0>();
    if (thread < kChunk) tiles.rows(item + 1)[thread] = next_row;
    __syncthreads();  // the stage is here, and the last one is read
    load(item + 1);
    next_row = find_row(item + 2);
    const auto stage = tiles.stage(item);
    const auto value = Fragments<Layout::transposed, value_dim>::left(stage.value, m0);

    if (has_rows(item)) {
      make_scores(stage, tiles.scores(), own0);
      __syncthreads();
      Accumulator<kChunk / 16, 2 * row_tiles> output;
      output.clear();
      const auto query = Fragments<Layout::plain, key_dim>::left(stage.query, 0);
#pragma unroll
      for (int k = 0; k < key_dim / 16; ++k) {
        uint32_t s[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) state.as_a(s[i], i, k);
#pragma unroll
        for (int m = 0; m < kChunk / 16; ++m) {
          uint32_t a[4];
          query.load(a, 16 * m, 16 * k);
#pragma unroll
          for (int i = 0; i < row_tiles; ++i) {
            multiply_add(output.value[m][2 * i], a, s[i][0], s[i][2]);
            multiply_add(output.value[m][2 * i + 1], a, s[i][1], s[i][3]);
          }
        }
      }
      output.for_pairs([&](int row, int, float& first, float& second) {
        const float gamma = stage.gamma[row];
        first *= gamma, second *= gamma;
      });
      const auto scores = Fragments<Layout::plain, kChunk>::left(tiles.scores(), 0);
#pragma unroll
      for (int k = 0; k < kChunk; k += 16) {
        uint32_t v[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) value.load(v[i], 16 * i, k);
        const auto add = [&](int m, const uint32_t(&a)[4]) {
#pragma unroll
          for (int i = 0; i < row_tiles; ++i) {
            multiply_add(output.value[m][2 * i], a, v[i][0], v[i][2]);
            multiply_add(output.value[m][2 * i + 1], a, v[i][1], v[i][3]);
          }
        };
        add(k / 16, {skip_high, 0, 0, skip_high});
        add(k / 16, {skip_low, 0, 0, skip_low});
#pragma unroll
        for (int m = k / 16; m < kChunk / 16; ++m) {
          uint32_t a[4];
          scores.load(a, 16 * m, k);
          add(m, a);
        }
      }
      const int32_t* rows = tiles.rows(item);
      store_rows(output, [&](int row) -> bf16* {
        return rows[row] >= 0 ? const_cast<bf16*>(packed_row(p.output, rows[row], output_head)) + m0
                              : nullptr;
      });
    }

    const float factor = stage.gamma[kChunk - 1];
    total *= factor;
    state.for_pairs([&](int, int, float& first, float& second) { first *= factor, second *= factor; });
    const auto key = Fragments<Layout::transposed, key_dim>::right(stage.key, 0);
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      const float2 weight[2] = {*reinterpret_cast<const float2*>(stage.weight + k + 2 * t),
                                *reinterpret_cast<const float2*>(stage.weight + k + 2 * t + 8)};
      uint32_t v[row_tiles][4];
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        value.load(v[i], 16 * i, k);
        scale_a(v[i], weight);
      }
#pragma unroll
      for (int j = 0; j < key_dim / 8; j += 2) {
        uint32_t b[4];
        key.load(b, 8 * j, k);
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          multiply_add(state.value[i][j], v[i], b[0], b[1]);
          multiply_add(state.value[i][j + 1], v[i], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
  if (p.is_local || (segment == p.segments - 1 && output_head % readers == 0)) {
    float* to = p.last_state + (p.is_local ? stream * p.segments + segment : stream) * state_size + m0;
    state.for_pairs([&](int row, int column, float& first, float& second) {
      to[column * value_dim + row] = first, to[(column + 1) * value_dim + row] = second;
    });
  }
  if (p.is_local && thread == 0) p.last_factor[stream * p.segments + segment] = total;
}

}  // namespace

void ssd_forward(const SsdForward& a, void* stream) {
  const dim3 grid(
      static_cast<unsigned>(a.shape.batch * (a.is_local ? a.shape.state_heads : a.shape.output_heads)),
      static_cast<unsigned>(a.is_local ? a.segments - 1 : a.segments));
  with_dimensions(a.shape, [&](auto key_dim, auto value_dim) {
    launch<forward_kernel<key_dim, value_dim>>(grid, kThreads, ForwardTiles<key_dim, value_dim>::bytes,
                                               stream, a);
  });
}

}  // namespace oryx::cuda
