// The gradients of query, key, log_decay and beta once the states and their gradients are known, chunk by
// chunk. Two by two warps share every product: half of its rows and half of its columns each.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;

// Two blocks of threads fit on a multiprocessor, so what is used late takes the place of what was used early.
template <int key_dim, int value_dim>
struct InputGradientsMemory {
  Tile<key_dim> key{nullptr}, query{nullptr};
  Tile<value_dim> d_output{nullptr};
  Tile<64> d_surprise{nullptr};  // Yᵀ, in the place of dO
  Tile<64> surprise{nullptr};    // Nᵀ
  Tile<key_dim> state{nullptr};  // Sᵀ
  Tile<key_dim> d_state[2];      // dS'ᵀ in halves of its rows, in the places of Q and of half of Sᵀ
  Tile<64> square{nullptr};      // dQK of each reader, then R + Rᵀ
  float *gates, *rows, *columns, *totals;

  static constexpr int floats = kGates + 2 * kChunk + 2 * kChunk + 8;
  static constexpr size_t bytes = 2 * Tile<key_dim>::bytes(kChunk) + Tile<value_dim>::bytes(kChunk) +
                                  Tile<64>::bytes(value_dim) + Tile<key_dim>::bytes(value_dim) +
                                  Tile<64>::bytes(kChunk) + floats * sizeof(float);

  __device__ explicit InputGradientsMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    query.base = d_state[0].base = key.base + kChunk * key_dim;
    d_output.base = d_surprise.base = query.base + kChunk * key_dim;
    surprise.base = d_output.base + kChunk * value_dim;
    state.base = d_state[1].base = surprise.base + kChunk * value_dim;
    square.base = state.base + value_dim * key_dim;
    gates = reinterpret_cast<float*>(square.base + kChunk * kChunk);
    rows = gates + kGates;          // [2, 64]: the share of dG of each half of the columns
    columns = rows + 2 * kChunk;    // [2, 64]: what it loses, by halves of the rows
    totals = columns + 2 * kChunk;  // [2, 4]: of a warp, Σ x and ⟨dS', S⟩
  }
};

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

// Writes a warp's rows of a gradient; place(row) is the element its first column goes to, or −1.
template <int column_tiles, typename Place>
__device__ inline void write_gradient(const Accumulator<2, column_tiles>& sum, void* data, bool wide,
                                      Place place) {
  if (!wide) {
    return write_rows(sum, [&](int row) {
      const int64_t at = place(row);
      return at < 0 ? nullptr : static_cast<bf16*>(data) + at;
    });
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t at = place(16 * i + lane / 4 + 8 * below);
      if (at < 0) continue;
      float* to = static_cast<float*>(data) + at + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
        *reinterpret_cast<float2*>(to + 8 * j) = {sum.value[i][j][2 * below], sum.value[i][j][2 * below + 1]};
    }
}

// What a thread knows of the sums that make dG: of its four rows row0 + lane / 4 + 8 r and its eight columns
// column0 + 8 (e / 2) + 2 (lane % 4) + e % 2 of squares.
struct DecaySums {
  float row[4] = {}, column[8] = {}, x = 0.0f;

  // One element of H below the diagonal.
  __device__ void add(int r, int e, float h) { row[r] += h, column[e] += h; }
};

// x ⊙ factor by rows, and what it has with another tile by rows, added to dots.
template <int column_tiles, int columns>
__device__ inline void scale_rows(Accumulator<2, column_tiles>& x, const float (&factor)[4],
                                  Tile<columns> with, int row0, int column0, float (&dots)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int j = 0; j < column_tiles; ++j) {
      float &first = x.value[r / 2][j][r % 2 * 2], &second = x.value[r / 2][j][r % 2 * 2 + 1];
      first *= factor[r], second *= factor[r];
      const float2 other = with.load2(row0 + lane / 4 + 8 * r, column0 + 8 * j + 2 * (lane % 4));
      dots[r] += first * other.x + second * other.y;
    }
}

template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) input_gradients_kernel(const GatedDeltaArguments p) {
  using Rows = Accumulator<2, key_dim / 16>;
  constexpr Layout plain = Layout::plain, transposed = Layout::transposed;
  const Block block = Block::of_grid(p, /*from_last=*/true);
  const InputGradientsMemory<key_dim, value_dim> memory(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row_half = warp / 2, column_half = warp % 2;
  const int row0 = 32 * row_half, square0 = 32 * column_half, key0 = column_half * (key_dim / 2);
  const int row = row0 + lane / 4;  // the thread's first of four
  const int32_t* rows = block.row_table(p);
  const bool has_rows = p.d_output.data != nullptr && rows[kChunk] > 0;
  const int readers = p.output_heads / p.state_heads;
  const Gates gates(memory.gates);

  const auto load_reader = [&](int reader) {
    const int head = block.head * readers + reader;
    load_packed<key_dim, key_dim, kThreads>(memory.query, thread, rows, p.query,
                                            head / (p.output_heads / p.query_heads), 0);
    load_packed<value_dim, value_dim, kThreads>(memory.d_output, thread, rows, p.d_output, head, 0);
  };
  const auto load_whole = [&]<int columns, int count>(Tile<columns> tile, const void* from,
                                                      int64_t first_row) {
    const bf16* data = static_cast<const bf16*>(from) + first_row * columns;
    load_rows<columns, columns, count, kThreads>(tile, thread, count,
                                                 [&](int i) { return data + i * columns; });
  };
  const int64_t value_row = block.index * value_dim;
  const auto load_d_surprise = [&] {
    load_whole.template operator()<64, value_dim>(memory.d_surprise, p.d_surprises, value_row);
    commit_copies();
  };
  const auto load_d_state = [&](int part) {
    load_whole.template operator()<key_dim, value_dim / 2>(memory.d_state[part], p.d_states,
                                                           value_row + part * (value_dim / 2));
    commit_copies();
  };
  {
    const bf16* key = block.key_rows(p);
    load_gates(memory.gates, p, block.index);
    load_rows<key_dim, key_dim, kChunk, kThreads>(memory.key, thread, block.valid,
                                                  [&](int i) { return key + i * p.key.time; });
    if (has_rows) load_reader(0);
    load_whole.template operator()<64, value_dim>(memory.surprise, p.surprises, value_row);
    commit_copies();
    load_whole.template operator()<key_dim, value_dim>(memory.state, p.states, value_row);
    commit_copies();
    if (!has_rows) load_d_surprise();
  }

  DecaySums sums;
  Rows d_key;
  d_key.clear();
  // function(i, k, r, e, value) for the elements of a warp's square: row i, column k.
  const auto for_square = [&](auto function) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) function(row + 8 * r, square0 + 8 * j + 2 * (lane % 4), r, j);
  };
  for (int reader = 0; has_rows && reader < readers; ++reader) {
    if (reader == 0) {
      wait_copies<1>();
    } else {
      __syncthreads();
      load_reader(reader);
      commit_copies();
      wait_copies<0>();
    }
    __syncthreads();
    {
      Accumulator<2, 4> scores, d_weights;
      scores.clear(), d_weights.clear();
      multiply_tiles<plain, plain, key_dim>(scores, memory.query, 2 * row_half, memory.key, 2 * column_half);
      multiply_tiles<plain, transposed, value_dim>(d_weights, memory.d_output, 2 * row_half, memory.surprise,
                                                   2 * column_half);
      for_square([&](int i, int k, int r, int j) {
        float d_score[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          d_score[e] = d_weights.value[r / 2][j][r % 2 * 2 + e] * p.scale * gates.beta[k + e] *
                       gates.between(i, k + e);
          // The diagonal of H adds to dG what it takes away.
          if (i > k + e) sums.add(r, 2 * j + e, d_score[e] * scores.value[r / 2][j][r % 2 * 2 + e]);
        }
        memory.square.store2(i, k, d_score[0], d_score[1]);
      });
    }
    wait_copies<0>();
    __syncthreads();
    {
      Rows d_query;
      d_query.clear();
      multiply_tiles<plain, transposed, value_dim>(d_query, memory.d_output, 2 * row_half, memory.state,
                                                   key0 / 16);
      float factor[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) factor[r] = p.scale * gates.gamma(row + 8 * r);
      scale_rows(d_query, factor, memory.query, row0, key0, sums.row);
      if (reader == readers - 1) {
        __syncthreads();  // dO has been read
        load_d_surprise();
      }
      multiply_tiles<plain, transposed, kChunk>(d_query, memory.square, 2 * row_half, memory.key, key0 / 16);
      const int64_t head_at = (block.head * readers + reader) * p.d_query.head + key0;
      write_gradient(d_query, p.d_query.data, p.wide_d_query, [&](int i) {
        const int packed = rows[row0 + i];
        return packed < 0 ? int64_t{-1} : packed * p.d_query.time + head_at;
      });
    }
    multiply_tiles<transposed, transposed, kChunk>(d_key, memory.square, 2 * row_half, memory.query,
                                                   key0 / 16);
  }
  wait_copies<0>();
  __syncthreads();
  load_d_state(0);
  {
    Accumulator<2, 4> products, d_lower;
    products.clear(), d_lower.clear();
    multiply_tiles<plain, plain, key_dim>(products, memory.key, 2 * row_half, memory.key, 2 * column_half);
    multiply_tiles<transposed, transposed, value_dim>(d_lower, memory.d_surprise, 2 * row_half,
                                                      memory.surprise, 2 * column_half);
    for_square([&](int i, int k, int r, int j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float y_n = d_lower.value[r / 2][j][r % 2 * 2 + e];
        if (i == k + e && i < block.valid) p.d_beta[(block.token(p) + i) * p.state_heads + block.head] = y_n;
        if (i < k + e) continue;
        const float ratio =
            i > k + e ? -gates.beta[i] * gates.beta[k + e] * gates.between(i, k + e) * y_n : 0.0f;
        sums.add(r, 2 * j + e, ratio * products.value[r / 2][j][r % 2 * 2 + e]);
        const bf16 rounded = __float2bfloat16_rn(ratio);
        *memory.square.at(i, k + e) = rounded;
        *memory.square.at(k + e, i) = rounded;
      }
    });
  }
  __syncthreads();
  multiply_tiles<plain, transposed, kChunk>(d_key, memory.square, 2 * row_half, memory.key, key0 / 16);
  const auto add_to_d_key = [&](const Rows& bracket) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < key_dim / 16; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) d_key.value[i][j][e] += bracket.value[i][j][e];
  };
  {
    Rows bracket;  // Y Sᵀ
    bracket.clear();
    multiply_tiles<transposed, transposed, value_dim>(bracket, memory.d_surprise, 2 * row_half, memory.state,
                                                      key0 / 16);
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) factor[r] = -gates.gamma(row + 8 * r) * gates.beta[row + 8 * r];
    scale_rows(bracket, factor, memory.key, row0, key0, sums.row);
    add_to_d_key(bracket);
  }

  float state_dot = 0.0f;
  const auto add_state_dot = [&](int part) {
#pragma unroll 4
    for (int i = thread; i < value_dim / 2 * key_dim / 8; i += kThreads) {
      const int v = i / (key_dim / 8), column = i % (key_dim / 8) * 8;
      state_dot +=
          dot_units(*reinterpret_cast<const uint4*>(memory.d_state[part].unit(v, column)),
                    *reinterpret_cast<const uint4*>(memory.state.unit(part * (value_dim / 2) + v, column)));
    }
  };
  wait_copies<0>();
  __syncthreads();
  add_state_dot(0);
  __syncthreads();
  load_d_state(1);
  {
    Rows bracket;  // N dS'ᵀ
    bracket.clear();
    multiply_tiles<transposed, transposed, value_dim / 2>(bracket, memory.surprise, 2 * row_half,
                                                          memory.d_state[0], key0 / 16);
    wait_copies<0>();
    __syncthreads();
    add_state_dot(1);
    multiply_tiles<transposed, transposed, value_dim / 2>(
        bracket, Tile<64>{memory.surprise.base + value_dim / 2 * kChunk}, 2 * row_half, memory.d_state[1],
        key0 / 16);
    float factor[4], x[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) factor[r] = gates.rho(row + 8 * r) * gates.beta[row + 8 * r];
    scale_rows(bracket, factor, memory.key, row0, key0, x);
    add_to_d_key(bracket);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row + 8 * r == block.valid - 1) continue;  // the last token's share leaves dG as it came
      sums.row[r] -= x[r];
      sums.x += x[r];
    }
  }
  {
    const int64_t at = block.batch * p.d_key.batch +
                       static_cast<int64_t>(block.chunk) * kChunk * p.d_key.time + block.head * p.d_key.head +
                       key0;
    write_gradient(d_key, p.d_key.data, p.wide_d_key, [&](int i) {
      return row0 + i < block.valid ? at + (row0 + i) * p.d_key.time : int64_t{-1};
    });
  }

  // Sums over lanes, then over warps.
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float sum = sum_over_lanes<4>(sums.row[r]);
    if (lane % 4 == 0) memory.rows[column_half * kChunk + row + 8 * r] = sum;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float sum = sums.column[e];
    for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane < 4) memory.columns[row_half * kChunk + square0 + 8 * (e / 2) + 2 * lane + e % 2] = sum;
  }
  const float x_sum = sum_over_lanes<32>(sums.x);
  state_dot = sum_over_lanes<32>(state_dot);
  if (lane == 0) memory.totals[warp] = x_sum, memory.totals[4 + warp] = state_dot;
  __syncthreads();
  if (warp > 0) return;

  // Two tokens a lane: dG, then its sum over the tokens from each to the chunk's end.
  float d_log_gamma[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    float sum = memory.rows[i] + memory.rows[kChunk + i] - memory.columns[i] - memory.columns[kChunk + i];
    if (i == kChunk - 1) {
      for (int part = 0; part < 4; ++part)
        sum += memory.totals[part] + gates.total() * memory.totals[4 + part];
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
    if (i < block.valid)
      p.d_log_decay[(block.token(p) + i) * p.state_heads + block.head] = e == 0 ? from_here : second;
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
