#include <type_traits>

#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kChunk = kSsdChunk;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpColumns = 4;  // warps form a 2 × 4 grid over every product; each takes 32 rows

// Shared memory of a block. `state` is first S, then dS'; `scores` is first dQK, then M.
template <int key_dim, int value_dim>
struct GradientTiles {
  static constexpr size_t key_bytes = Tile<key_dim>::bytes(kChunk),
                          value_bytes = Tile<value_dim>::bytes(kChunk);
  static constexpr size_t state_bytes = Tile<value_dim>::bytes(key_dim),
                          scores_bytes = Tile<64>::bytes(kChunk);
  static constexpr size_t tile_bytes = 2 * key_bytes + 2 * value_bytes + state_bytes + scores_bytes;
  static constexpr size_t bytes = tile_bytes + (21 * kChunk + 2 * kWarps) * sizeof(float);
  static_assert(bytes <= kMostSharedBytes);
  Tile<key_dim> query, key;
  Tile<value_dim> value, d_output, state;
  Tile<64> scores;
  float *cumulative, *step, *weight, *gamma;  // SsdDecay
  int32_t* row;
  float* diagonal;              // of Z = dO Vᵀ ⊙ Q Kᵀ ⊙ Γ
  float* column_sums;           // [2, kChunk] of Z without the diagonal, by warp row
  float* row_sums;              // [4, kChunk] of Z Δ without the diagonal, by warp column
  float* query_dots;            // [4, kChunk] q · γ (dO Sᵀ)
  float* key_dots;              // [4, kChunk] k · (V dS'ᵀ)
  float *state_dot, *skip_dot;  // [kWarps] ⟨dS', S⟩ and ⟨dO, V⟩

  __device__ explicit GradientTiles(char* base)
      : query{reinterpret_cast<bf16*>(base)},
        key{reinterpret_cast<bf16*>(base + key_bytes)},
        value{reinterpret_cast<bf16*>(base + 2 * key_bytes)},
        d_output{reinterpret_cast<bf16*>(base + 2 * key_bytes + value_bytes)},
        state{reinterpret_cast<bf16*>(base + 2 * key_bytes + 2 * value_bytes)},
        scores{reinterpret_cast<bf16*>(base + tile_bytes - scores_bytes)},
        cumulative(reinterpret_cast<float*>(base + tile_bytes)),
        step(cumulative + 2 * kChunk),
        weight(step + kChunk),
        gamma(weight + kChunk),
        row(reinterpret_cast<int32_t*>(gamma + kChunk)),
        diagonal(gamma + 2 * kChunk),
        column_sums(diagonal + kChunk),
        row_sums(column_sums + 2 * kChunk),
        query_dots(row_sums + 4 * kChunk),
        key_dots(query_dots + 4 * kChunk),
        state_dot(key_dots + 4 * kChunk),
        skip_dot(state_dot + kWarps) {}
};

__device__ inline float sum_over_chunk(const float* parts, int count, int i) {
  float sum = 0.0f;
  for (int part = 0; part < count; ++part) sum += parts[part * kChunk + i];
  return sum;
}

// dots[row] = Σ over the warp's columns of sum ⊙ tile, before `sum` is scaled by scale[row].
template <bool scale_first, int row_tiles, int column_tiles, int columns>
__device__ inline void dot_and_scale(Accumulator<row_tiles, column_tiles>& sum, Tile<columns> tile, int m0,
                                     int n0, const float* scale, float* dots) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + 16 * i + g + 8 * half;
      const float factor = scale[row];
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < column_tiles; ++j) {
        float &first = sum.value[i][j][2 * half], &second = sum.value[i][j][2 * half + 1];
        const float2 other = tile.load2(row, n0 + 8 * j + 2 * t);
        dot += first * other.x + second * other.y;
        first *= factor, second *= factor;
      }
      dot = sum_over_lanes<4>(dot);
      if (t == 0) dots[row] = scale_first ? factor * dot : dot;
    }
  }
}

// Rows of a gradient in its view's type; row_pointer(row) is the offset of the row's first column or
// negative.
template <int row_tiles, int column_tiles, typename RowOffset>
__device__ inline void store_gradient(Accumulator<row_tiles, column_tiles>& sum, const cpu::RowView& view,
                                      int column0, RowOffset row_offset) {
  if (view.wide) {
    sum.for_pairs([&](int row, int column, float& first, float& second) {
      const int64_t offset = row_offset(row);
      if (offset < 0) return;
      *reinterpret_cast<float2*>(static_cast<float*>(view.data) + offset + column0 + column) = {first,
                                                                                                second};
    });
  } else {
    store_rows(sum, [&](int row) -> bf16* {
      const int64_t offset = row_offset(row);
      return offset < 0 ? nullptr : static_cast<bf16*>(view.data) + offset + column0;
    });
  }
}

// One chunk of one output head. The first output head of a state also takes the gradient through the state.
template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(const SsdGradient p) {
  using Tiles = GradientTiles<key_dim, value_dim>;
  const Tiles tiles(shared_memory());
  const cpu::MixerShape& shape = p.shape;
  const int output_heads = static_cast<int>(shape.output_heads),
            state_heads = static_cast<int>(shape.state_heads);
  const int chunks = static_cast<int>(shape.chunks), group = output_heads / state_heads;
  const int output_head = static_cast<int>(blockIdx.x), head = output_head / group;
  const int key_head = head / (state_heads / static_cast<int>(shape.key_heads));
  const int query_head = output_head / (output_heads / static_cast<int>(shape.query_heads));
  const int batch = static_cast<int>(blockIdx.y), chunk = static_cast<int>(blockIdx.z),
            place = batch * chunks + chunk, time = chunk * kChunk;
  const int64_t state_index = static_cast<int64_t>(batch * state_heads + head) * chunks + chunk;
  const int64_t at = state_index * kChunk;
  const int count =
      static_cast<int>(shape.time) - time < kChunk ? static_cast<int>(shape.time) - time : kChunk;
  const bool through_state = output_head % group == 0;
  const bool has_rows = p.has_rows[place] != 0;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  load_even_rows<key_dim, kChunk, kThreads>(tiles.key, count, token_row(p.key, batch, time, key_head),
                                            p.key.time);
  load_even_rows<value_dim, kChunk, kThreads>(tiles.value, count, token_row(p.value, batch, time, head),
                                              p.value.time);
  load_floats(tiles.cumulative, p.decay.cumulative + 2 * at, 2 * kChunk);
  load_floats(tiles.step, p.decay.step + at, kChunk);
  load_floats(tiles.weight, p.decay.weight + at, kChunk);
  load_floats(tiles.gamma, p.decay.gamma + at, kChunk);
  if (has_rows) {
    if (thread < kChunk)
      tiles.row[thread] = thread < count ? p.row_of[batch * shape.time + time + thread] : -1;
    __syncthreads();
    load_rows<key_dim, kChunk, kThreads>(tiles.query, p.query.data, [&](int row, int) -> const bf16* {
      return tiles.row[row] >= 0 ? packed_row(p.query, tiles.row[row], query_head) : nullptr;
    });
    load_rows<value_dim, kChunk, kThreads>(tiles.d_output, p.d_output.data, [&](int row, int) -> const bf16* {
      return tiles.row[row] >= 0 ? packed_row(p.d_output, tiles.row[row], output_head) : nullptr;
    });
  }
  commit_copies();
  const bf16* state = static_cast<const bf16*>(p.states) + state_index * (key_dim * value_dim);
  load_even_rows<value_dim, key_dim, kThreads>(tiles.state, key_dim, state, value_dim);
  commit_copies();
  wait_copies<1>();
  __syncthreads();

  const int warp_row = warp / kWarpColumns, warp_column = warp % kWarpColumns;
  const int m0 = 32 * warp_row, g = lane / 4, t = lane % 4;
  const int key0 = key_dim / kWarpColumns * warp_column, value0 = value_dim / kWarpColumns * warp_column;
  uint32_t scores_kept[2][2][2];  // M of the warp, as pairs
  if (has_rows) {
    const int n0 = kChunk / kWarpColumns * warp_column;
    Accumulator<2, 2> scores, products;  // Q Kᵀ, then M; dO Vᵀ, then dQK
    scores.clear();
    products.clear();
    if (n0 < m0 + 32) {
      add_product<Layout::plain, Layout::plain>(scores, tiles.query, m0, tiles.key, n0, 0, key_dim);
      add_product<Layout::plain, Layout::plain>(products, tiles.d_output, m0, tiles.value, n0, 0, value_dim);
    }
    float column_sums[2][2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m0 + 16 * i + g + 8 * half;
        const float2 mine = *reinterpret_cast<const float2*>(tiles.cumulative + 2 * row);
        float row_sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = n0 + 8 * j + 2 * t + e;
            const float2 other = *reinterpret_cast<const float2*>(tiles.cumulative + 2 * column);
            const float step = tiles.step[column];
            const float between = exp2_fast((mine.x - other.x) + (mine.y - other.y));
            const float gamma = column <= row ? between : 0.0f;
            float& score = scores.value[i][j][2 * half + e];
            float& product = products.value[i][j][2 * half + e];
            product *= gamma;
            const float z = product * score;
            const float below = column < row ? z : 0.0f;
            row_sum += below * step;
            column_sums[j][e] += below;
            if (column == row) tiles.diagonal[row] = z;
            score *= gamma * step;
            product *= step;
          }
          scores_kept[i][half][j] = pack(scores.value[i][j][2 * half], scores.value[i][j][2 * half + 1]);
        }
        row_sum = sum_over_lanes<4>(row_sum);
        if (t == 0) tiles.row_sums[warp_column * kChunk + row] = row_sum;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = column_sums[j][e];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
        if (g == 0) tiles.column_sums[warp_row * kChunk + n0 + 8 * j + 2 * t + e] = sum;
      }
    }
    products.store(tiles.scores, m0, n0);
  }
  // dS' comes into the place of S: on its way in registers while S is read.
  constexpr int state_units = value_dim / 8, own_units = key_dim * state_units / kThreads;
  uint4 d_state[own_units];
  if (through_state) {
    const auto* from = static_cast<const bf16*>(p.d_states) + state_index * (key_dim * value_dim);
#pragma unroll
    for (int pass = 0; pass < own_units; ++pass)
      d_state[pass] = *reinterpret_cast<const uint4*>(from + 8 * (thread + pass * kThreads));
  }
  wait_copies<0>();
  __syncthreads();

  if (has_rows) {  // γ ⊙ (dO Sᵀ) + dQK K
    Accumulator<2, key_dim / 8 / kWarpColumns> d_query;
    d_query.clear();
    add_product<Layout::plain, Layout::plain>(d_query, tiles.d_output, m0, tiles.state, key0, 0, value_dim);
    dot_and_scale<true>(d_query, tiles.query, m0, key0, tiles.gamma, tiles.query_dots + warp_column * kChunk);
    add_product<Layout::plain, Layout::transposed>(d_query, tiles.scores, m0, tiles.key, key0, 0, 32);
    if (warp_row == 1)
      add_product<Layout::plain, Layout::transposed>(d_query, tiles.scores, m0, tiles.key, key0, 32, 64);
    store_gradient(d_query, p.d_query, key0, [&](int row) -> int64_t {
      const int64_t packed = tiles.row[m0 + row];
      return packed < 0 ? -1 : packed * p.d_query.time + output_head * p.d_query.head;
    });
  }
  float state_dot = 0.0f;
  if (through_state) {
    __syncthreads();  // S is read
    bf16* own = tiles.state.unit(thread / state_units, thread % state_units * 8);
#pragma unroll
    for (int pass = 0; pass < own_units; ++pass) {
      auto* unit = reinterpret_cast<uint4*>(own + 8 * pass * kThreads);
      const uint4 before = *unit, after = d_state[pass];
      const uint32_t x[4] = {before.x, before.y, before.z, before.w},
                     y[4] = {after.x, after.y, after.z, after.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 first = unpack(x[e]), second = unpack(y[e]);
        state_dot += first.x * second.x + first.y * second.y;
      }
      *unit = after;
    }
    __syncthreads();
  }

  const auto token_offset = [&](const cpu::RowView& view) {
    return [&](int row) -> int64_t {
      return m0 + row < count ? batch * view.batch + (time + m0 + row) * view.time + output_head * view.head
                              : -1;
    };
  };
  {  // (ρ Δ) ⊙ (V dS'ᵀ) + dQKᵀ Q
    Accumulator<2, key_dim / 8 / kWarpColumns> d_key;
    d_key.clear();
    if (through_state) {
      add_product<Layout::plain, Layout::plain>(d_key, tiles.value, m0, tiles.state, key0, 0, value_dim);
      dot_and_scale<false>(d_key, tiles.key, m0, key0, tiles.weight, tiles.key_dots + warp_column * kChunk);
    }
    if (has_rows) {
      if (warp_row == 0)
        add_product<Layout::transposed, Layout::transposed>(d_key, tiles.scores, m0, tiles.query, key0, 0,
                                                            32);
      add_product<Layout::transposed, Layout::transposed>(d_key, tiles.scores, m0, tiles.query, key0, 32, 64);
    }
    store_gradient(d_key, p.d_key, key0, token_offset(p.d_key));
  }
  if (has_rows) {
    __syncthreads();  // dQK is read
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = m0 + 16 * i + g + 8 * half,
                    column = kChunk / kWarpColumns * warp_column + 8 * j + 2 * t;
          *reinterpret_cast<uint32_t*>(tiles.scores.at(row, column)) = scores_kept[i][half][j];
        }
    __syncthreads();
  }
  float skip_dot = 0.0f;
  {  // (ρ Δ) ⊙ (K dS') + Mᵀ dO + D dO
    Accumulator<2, value_dim / 8 / kWarpColumns> d_value;
    d_value.clear();
    if (through_state) {
      add_product<Layout::plain, Layout::transposed>(d_value, tiles.key, m0, tiles.state, value0, 0, key_dim);
      d_value.for_pairs([&](int row, int, float& first, float& second) {
        const float weight = tiles.weight[m0 + row];
        first *= weight, second *= weight;
      });
    }
    if (has_rows) {
      if (warp_row == 0)
        add_product<Layout::transposed, Layout::transposed>(d_value, tiles.scores, m0, tiles.d_output, value0,
                                                            0, 32);
      add_product<Layout::transposed, Layout::transposed>(d_value, tiles.scores, m0, tiles.d_output, value0,
                                                          32, 64);
      if (p.skip != nullptr) {
        const float skip = p.skip[output_head];
        d_value.for_pairs([&](int row, int column, float& first, float& second) {
          const float2 gradient = tiles.d_output.load2(m0 + row, value0 + column);
          const float2 value = tiles.value.load2(m0 + row, value0 + column);
          first += skip * gradient.x, second += skip * gradient.y;
          skip_dot += value.x * gradient.x + value.y * gradient.y;
        });
      }
    }
    store_gradient(d_value, p.d_value, value0, token_offset(p.d_value));
  }

  state_dot = sum_over_lanes<32>(state_dot);
  skip_dot = sum_over_lanes<32>(skip_dot);
  if (lane == 0) tiles.state_dot[warp] = state_dot, tiles.skip_dot[warp] = skip_dot;
  __syncthreads();
  if (warp != 0) return;
  // Two tokens a lane. The diagonal of H and the last token's ρ Δ x cancel exactly and are left out.
  float later[2] = {}, earlier[2] = {}, d_step[2] = {};  // parts of dG that sum over i ≥ j, and over i < j
  const float end = tiles.cumulative[2 * kChunk - 2], end_low = tiles.cumulative[2 * kChunk - 1];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (has_rows) {
      const float column = sum_over_chunk(tiles.column_sums, 2, i);
      later[e] = sum_over_chunk(tiles.row_sums, 4, i) - tiles.step[i] * column +
                 sum_over_chunk(tiles.query_dots, 4, i);
      d_step[e] = column + tiles.diagonal[i];
    }
    if (through_state) {
      const float x = sum_over_chunk(tiles.key_dots, 4, i);
      earlier[e] = tiles.weight[i] * x;
      d_step[e] += x * exp2_fast((end - tiles.cumulative[2 * i]) + (end_low - tiles.cumulative[2 * i + 1]));
    }
  }
  float suffix = later[0] + later[1], prefix = earlier[0] + earlier[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_down_sync(0xffffffffu, suffix, distance);
    const float above = __shfl_up_sync(0xffffffffu, prefix, distance);
    if (lane + distance < 32) suffix += below;
    if (lane >= distance) prefix += above;
  }
  prefix -= earlier[0] + earlier[1];
  float total = 0.0f, skip_total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += tiles.state_dot[i], skip_total += tiles.skip_dot[i];
  total *= tiles.gamma[kChunk - 1];
  const float d_log_decay[2] = {suffix + prefix + total, suffix - later[0] + prefix + earlier[0] + total};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i >= count) continue;
    const int64_t to = (batch * shape.time + (time + i)) * output_heads + output_head;
    p.d_log_decay[to] = d_log_decay[e];
    p.d_step[to] = d_step[e];
  }
  if (lane == 0 && p.d_skip != nullptr)
    p.d_skip[static_cast<int64_t>(place) * output_heads + output_head] = skip_total;
}

}  // namespace

bool ssd_gradient_fits(const cpu::MixerShape& shape) {
  constexpr int64_t most_blocks = 65535;  // along the second and third dimension of a grid
  return largest_shared_memory() >= kMostSharedBytes && shape.batch <= most_blocks &&
         shape.time <= most_blocks * kChunk;
}

void ssd_gradient(const SsdGradient& a, void* stream) {
  // Chunk by chunk of all streams: it begins with the chunks that the walk in reverse has just left in the
  // cache.
  const dim3 grid(static_cast<unsigned>(a.shape.output_heads), static_cast<unsigned>(a.shape.batch),
                  static_cast<unsigned>(a.shape.chunks));
  with_dimensions(a.shape, [&](auto key_dim, auto value_dim) {
    launch<gradient_kernel<key_dim, value_dim>>(grid, kThreads, GradientTiles<key_dim, value_dim>::bytes,
                                                stream, a);
  });
}

}  // namespace oryx::cuda
