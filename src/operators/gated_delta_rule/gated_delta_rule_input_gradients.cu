// The gradients of query, key, log_decay and beta once the states and their gradients are known, chunk by
// chunk. Two groups of four warps share the columns of every product; a warp has 16 rows.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 256;

template <int key_dim, int value_dim>
struct InputGradientsMemory {
  Tile<key_dim> key{nullptr}, query{nullptr};
  Tile<value_dim> d_output{nullptr};  // later Y
  Tile<value_dim> update{nullptr};    // W, then U
  Tile<value_dim> state{nullptr};     // S, then dS'
  Tile<64> square{nullptr};           // A, then dQK of each reader, then R + Rᵀ
  float *gates, *rows, *columns, *y_w, *y_u, *beta_rows, *totals;

  static constexpr int floats = kGates + 2 * kChunk + 4 * kChunk + 2 * kChunk + 2 * kChunk + 16;
  static constexpr size_t bytes = 2 * Tile<key_dim>::bytes(kChunk) + 2 * Tile<value_dim>::bytes(kChunk) +
                                  Tile<value_dim>::bytes(key_dim) + Tile<64>::bytes(kChunk) +
                                  floats * sizeof(float);

  __device__ explicit InputGradientsMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    query.base = key.base + kChunk * key_dim;
    d_output.base = query.base + kChunk * key_dim;
    update.base = d_output.base + kChunk * value_dim;
    state.base = update.base + kChunk * value_dim;
    square.base = state.base + key_dim * value_dim;
    gates = reinterpret_cast<float*>(square.base + kChunk * kChunk);
    rows = gates + kGates;            // [2, 64]: a group's share of dG
    columns = rows + 2 * kChunk;      // [4, 64]: a row of warps' share of what dG loses
    y_w = columns + 4 * kChunk;       // [64]: Y · W
    y_u = y_w + kChunk;               // [64]: Y · U
    beta_rows = y_u + kChunk;         // [2, 64]: a group's share of what L gives dβ
    totals = beta_rows + 2 * kChunk;  // [2, 8]: of a warp, Σ x and ⟨dS', S⟩
  }
};

// Writes the lane's part of row `below` (0, or 1 for the one 8 further down) of a gradient from `at` on.
template <int column_tiles>
__device__ inline void store_row(const Accumulator<1, column_tiles>& sum, int below, void* data, int64_t at,
                                 bool wide) {
  if (wide) {
    float* to = static_cast<float*>(data) + at;
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {sum.value[0][j][2 * below], sum.value[0][j][2 * below + 1]};
    }
  } else {
    bf16* to = static_cast<bf16*>(data) + at;
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
      *reinterpret_cast<uint32_t*>(to + 8 * j) =
          pack(sum.value[0][j][2 * below], sum.value[0][j][2 * below + 1]);
    }
  }
}

// The sum of the products of the eight bf16 of two units.
__device__ inline float dot_units(const uint4& x, const uint4& y) {
  float sum = 0.0f;
  const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float2 a = unpack(left[e]), b = unpack(right[e]);
    sum += a.x * b.x + a.y * b.y;
  }
  return sum;
}

template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) input_gradients_kernel(const GatedDeltaArguments p) {
  const Block block = Block::of_grid(p);
  const InputGradientsMemory<key_dim, value_dim> memory(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = warp % 4 * 16, group = warp / 4;
  const int square0 = group * 32, key0 = group * (key_dim / 2), value0 = group * (value_dim / 2);
  const int32_t* rows = block.row_table(p);
  const bool has_rows = p.d_output.data != nullptr && rows[kChunk] > 0;
  const int readers = p.output_heads / p.state_heads;
  const Gates gates(memory.gates);

  const auto load_reader = [&](int reader) {
    const int head = block.head * readers + reader;
    load_packed<key_dim, kThreads, 1>(memory.query, rows, p.query, head / (p.output_heads / p.query_heads), 0,
                                      key_dim);
    load_packed<value_dim, kThreads, 1>(memory.d_output, rows, p.d_output, head, 0, value_dim);
  };
  const bf16* y_rows = static_cast<const bf16*>(p.d_update) + block.index * kChunk * value_dim;
  {
    const bf16* inverse = static_cast<const bf16*>(p.inverse) + block.index * kChunk * kChunk;
    const bf16* residual = static_cast<const bf16*>(p.residual) + block.index * kChunk * value_dim;
    const bf16* state = static_cast<const bf16*>(p.states) + block.index * key_dim * value_dim;
    const bf16* key = block.key_rows(p);
    load_gates(memory.gates, p, block.index);
    load_tile<64, kChunk, kThreads>(memory.square, kChunk, [&](int row) { return inverse + row * kChunk; });
    load_tile<value_dim, kChunk, kThreads>(memory.update, kChunk,
                                           [&](int row) { return residual + row * value_dim; });
    commit_copies();
    load_tile<key_dim, kChunk, kThreads>(memory.key, block.valid,
                                         [&](int row) { return key + row * p.key.time; });
    if (has_rows) load_reader(0);
    load_tile<value_dim, key_dim, kThreads>(memory.state, key_dim,
                                            [&](int row) { return state + row * value_dim; });
    commit_copies();
  }
  wait_copies<1>();
  __syncthreads();

  // Y · W, before U takes the place of W; and A ⊙ β.
  constexpr int value_units = value_dim / 8;
  const auto multiply_rows = [&](float* dots) {
#pragma unroll 2
    for (int i = thread; i < kChunk * value_units; i += kThreads) {
      const int row = i / value_units, column = i % value_units * 8;
      const float sum = sum_over_lanes<value_units>(
          dot_units(*reinterpret_cast<const uint4*>(y_rows + row * value_dim + column),
                    *reinterpret_cast<const uint4*>(memory.update.unit(row, column))));
      if (i % value_units == 0) dots[row] = sum;
    }
  };
  multiply_rows(memory.y_w);
  for (int i = thread; i < kChunk * kChunk / 2; i += kThreads) {
    const int row = i / 32, column = i % 32 * 2;
    const float2 a = memory.square.load2(row, column);
    memory.square.store2(row, column, gates.beta[column] * a.x, gates.beta[column + 1] * a.y);
  }
  __syncthreads();
  {
    Accumulator<1, value_dim / 16> update;
    update.clear();
    multiply_rolled<Layout::plain, Layout::transposed>(update, memory.square, m0, memory.update, value0,
                                                       kChunk);
    __syncthreads();
    update.store(memory.update, m0, value0);
  }
  wait_copies<0>();
  __syncthreads();
  multiply_rows(memory.y_u);

  float row_sum[2] = {}, beta_sum[2] = {}, x_sum = 0.0f;  // the lane's rows m0 + lane / 4 and 8 below
  float column_sum[8] = {};  // of column square0 + 8 (e / 2) + 2 (lane % 4) + e % 2
  Accumulator<1, key_dim / 16> d_key;
  d_key.clear();
  const auto add_product = [&](int j, int below, const float(&product)[2]) {  // of H, below the diagonal
    row_sum[below] += product[0] + product[1];
    column_sum[2 * j] += product[0];
    column_sum[2 * j + 1] += product[1];
  };

  if (has_rows) {
    for (int reader = 0; reader < readers; ++reader) {
      if (reader > 0) {
        __syncthreads();
        load_reader(reader);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
      }
      {
        Accumulator<1, 4> scores, d_weights;
        scores.clear();
        multiply_rolled<Layout::plain, Layout::plain>(scores, memory.query, m0, memory.key, square0, key_dim);
        d_weights.clear();
        multiply_rolled<Layout::plain, Layout::plain>(d_weights, memory.d_output, m0, memory.update, square0,
                                                      value_dim);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const int column = 8 * j + 2 * (lane % 4), i = m0 + lane / 4 + 8 * below;
            float d_score[2], product[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              d_score[e] =
                  d_weights.value[0][j][2 * below + e] * p.scale * gates.between(i, square0 + column + e);
              // The diagonal of H adds to dG what it takes away.
              product[e] = i > square0 + column + e ? d_score[e] * scores.value[0][j][2 * below + e] : 0.0f;
            }
            add_product(j, below, product);
            memory.square.store2(i, square0 + column, d_score[0], d_score[1]);
          }
      }
      __syncthreads();
      // In two parts: beside d_key there are registers for half of it.
#pragma unroll 1
      for (int column0 = key0; column0 < key0 + key_dim / 2; column0 += key_dim / 4) {
        Accumulator<1, key_dim / 32> d_query;
        d_query.clear();
        multiply_rolled<Layout::plain, Layout::plain>(d_query, memory.d_output, m0, memory.state, column0,
                                                      value_dim);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int i = m0 + lane / 4 + 8 * below;
          const float factor = p.scale * gates.gamma(i);
#pragma unroll
          for (int j = 0; j < key_dim / 32; ++j) {
            float &first = d_query.value[0][j][2 * below], &second = d_query.value[0][j][2 * below + 1];
            first *= factor, second *= factor;
            const float2 q = memory.query.load2(i, column0 + 8 * j + 2 * (lane % 4));
            row_sum[below] += first * q.x + second * q.y;
          }
        }
        multiply_rolled<Layout::plain, Layout::transposed>(d_query, memory.square, m0, memory.key, column0,
                                                           kChunk);
        const int head = block.head * readers + reader;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int packed = rows[m0 + lane / 4 + 8 * below];
          if (packed < 0) continue;
          const int64_t at = packed * p.d_query.time + head * p.d_query.head + column0 + 2 * (lane % 4);
          store_row(d_query, below, p.d_query.data, at, p.wide_d_query);
        }
      }
      multiply_rolled<Layout::transposed, Layout::transposed>(d_key, memory.square, m0, memory.query, key0,
                                                              kChunk);
    }
  }

  __syncthreads();
  load_tile<value_dim, kChunk, kThreads>(memory.d_output, kChunk,
                                         [&](int row) { return y_rows + row * value_dim; });
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  {
    Accumulator<1, 4> products, d_lower;
    products.clear();
    multiply_rolled<Layout::plain, Layout::plain>(products, memory.key, m0, memory.key, square0, key_dim);
    d_lower.clear();
    multiply_rolled<Layout::plain, Layout::plain>(d_lower, memory.d_output, m0, memory.update, square0,
                                                  value_dim);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int column = 8 * j + 2 * (lane % 4), i = m0 + lane / 4 + 8 * below;
        const float beta = gates.beta[i];
        float product[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = square0 + column + e;
          const bool is_lower = i > k;
          const float decayed = is_lower ? -d_lower.value[0][j][2 * below + e] * gates.between(i, k) : 0.0f;
          product[e] = decayed * products.value[0][j][2 * below + e];
          beta_sum[below] += product[e];
          product[e] *= beta;
          if (i >= k) {
            const bf16 r = __float2bfloat16_rn(beta * decayed);
            *memory.square.at(i, k) = r;
            *memory.square.at(k, i) = r;
          }
        }
        add_product(j, below, product);
      }
  }
  __syncthreads();
  multiply_rolled<Layout::plain, Layout::transposed>(d_key, memory.square, m0, memory.key, key0, kChunk);

  // dK += factor ⊙ (left Sᵀ), where S is what lies in the state's place; dot += that by rows with K. In two
  // parts.
  const auto add_bracket = [&](Tile<value_dim> left, const float(&factor)[2], float(&dot)[2]) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      constexpr int tiles = key_dim / 32;
      const int column0 = key0 + 8 * tiles * part;
      Accumulator<1, tiles> bracket;
      bracket.clear();
      multiply_rolled<Layout::plain, Layout::plain>(bracket, left, m0, memory.state, column0, value_dim);
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const float2 k = memory.key.load2(m0 + lane / 4 + 4 * e, column0 + 8 * j + 2 * (lane % 4));
          float(&sum)[4] = d_key.value[0][tiles * part + j];
          const float first = factor[e / 2] * bracket.value[0][j][e];
          const float second = factor[e / 2] * bracket.value[0][j][e + 1];
          dot[e / 2] += first * k.x + second * k.y;
          sum[e] += first, sum[e + 1] += second;
        }
    }
  };
  const int lane_row[2] = {m0 + lane / 4, m0 + lane / 4 + 8};
  {
    const float factor[2] = {-gates.gamma(lane_row[0]) * gates.beta[lane_row[0]],
                             -gates.gamma(lane_row[1]) * gates.beta[lane_row[1]]};
    add_bracket(memory.d_output, factor, row_sum);  // Y Sᵀ
  }

  // dS' takes the place of S, unit by unit: the product of the two is wanted too.
  float state_dot = 0.0f;
  __syncthreads();
  {
    const bf16* d_state = static_cast<const bf16*>(p.d_states) + block.index * key_dim * value_dim;
#pragma unroll 2
    for (int i = thread; i < key_dim * value_units; i += kThreads) {
      const uint4 unit = *reinterpret_cast<const uint4*>(d_state + 8 * i);
      auto* place = reinterpret_cast<uint4*>(memory.state.unit(i / value_units, i % value_units * 8));
      state_dot += dot_units(unit, *place);
      *place = unit;
    }
  }
  __syncthreads();
  {
    const float factor[2] = {gates.rho(lane_row[0]), gates.rho(lane_row[1])};
    float x[2] = {};
    add_bracket(memory.update, factor, x);  // U dS'ᵀ
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      if (lane_row[below] == block.valid - 1) continue;  // the last token's share leaves dG as it came
      row_sum[below] -= x[below];
      x_sum += x[below];
    }
  }
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    if (lane_row[below] >= block.valid) continue;
    const int64_t token = static_cast<int64_t>(block.chunk) * kChunk + lane_row[below];
    const int64_t at = block.batch * p.d_key.batch + token * p.d_key.time + block.head * p.d_key.head;
    store_row(d_key, below, p.d_key.data, at + key0 + 2 * (lane % 4), p.wide_d_key);
  }

  // Sums over lanes, then over warps.
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    row_sum[below] = sum_over_lanes<4>(row_sum[below]);
    beta_sum[below] = sum_over_lanes<4>(beta_sum[below]);
    if (lane % 4 == 0) {
      memory.rows[group * kChunk + lane_row[below]] = row_sum[below];
      memory.beta_rows[group * kChunk + lane_row[below]] = beta_sum[below];
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    for (int mask = 4; mask < 32; mask *= 2)
      column_sum[e] += __shfl_xor_sync(0xffffffffu, column_sum[e], mask);
    if (lane < 4)
      memory.columns[warp % 4 * kChunk + square0 + 8 * (e / 2) + 2 * lane + e % 2] = column_sum[e];
  }
  x_sum = sum_over_lanes<32>(x_sum);
  state_dot = sum_over_lanes<32>(state_dot);
  if (lane == 0) memory.totals[warp] = x_sum, memory.totals[8 + warp] = state_dot;
  __syncthreads();
  if (warp > 0) return;

  // Two tokens a lane: dG, then its sum over the tokens from each to the chunk's end.
  float d_log_gamma[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    float sum = memory.rows[i] + memory.rows[kChunk + i];
    for (int part = 0; part < 4; ++part) sum -= memory.columns[part * kChunk + i];
    if (i == kChunk - 1) {
      for (int part = 0; part < 8; ++part)
        sum += memory.totals[part] + gates.total() * memory.totals[8 + part];
    }
    d_log_gamma[e] = sum;
  }
  float from_here = d_log_gamma[0] + d_log_gamma[1];
  for (int distance = 1; distance < 32; distance *= 2) {
    const float after = __shfl_down_sync(0xffffffffu, from_here, distance);
    if (lane + distance < 32) from_here += after;
  }
  const float after = __shfl_down_sync(0xffffffffu, from_here, 1);
  const float second = (lane < 31 ? after : 0.0f) + d_log_gamma[1];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i >= block.valid) continue;
    const int64_t at = (block.token(p) + i) * p.state_heads + block.head;
    p.d_log_decay[at] = e == 0 ? from_here : second;
    // Both are Y · (U / β); where β allows the division, nothing large cancels.
    const float beta = gates.beta[i];
    p.d_beta[at] = fabsf(beta) > 1e-20f ? memory.y_u[i] / beta
                                        : memory.y_w[i] + memory.beta_rows[i] + memory.beta_rows[kChunk + i];
  }
}

}  // namespace

void gated_delta_input_gradients(const GatedDeltaArguments& p, void* stream) {
  with_dims(p, [&]<int key_dim, int value_dim>() {
    launch<input_gradients_kernel<key_dim, value_dim>>(dim3(static_cast<unsigned>(blocks_of(p))), kThreads,
                                                       InputGradientsMemory<key_dim, value_dim>::bytes,
                                                       stream, p);
  });
}

}  // namespace oryx::cuda
