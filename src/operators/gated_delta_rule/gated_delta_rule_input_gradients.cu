// The gradients of query, key, log_decay and beta once the states and their gradients are known, chunk by
// chunk. A warpgroup has 64 of their columns.
//
// The sums over rows and columns of dQK ⊙ (Q Kᵀ), for the gradient of log_decay, are those of q_i · [dQK K]_i
// and k_j · [dQKᵀ Q]_j.
#include <cmath>

#include "operators/gated_delta_rule/gated_delta_rule_device.h"
#include "operators/gated_delta_rule/gated_delta_rule_products.h"

namespace oryx::cuda {
namespace {

// Two blocks of threads fit on a multiprocessor, so what is used late takes the place of what was used early.
template <int key_dim, int value_dim>
struct InputGradientsMemory {
  static constexpr int groups = key_dim / 64, threads = 128 * groups, warps = threads / 32;
  using Keys = Panels<kChunk, key_dim>;
  using Values = Panels<kChunk, value_dim>;
  using Surprises = Panels<value_dim, kChunk>;
  using States = Panels<value_dim, key_dim>;
  using HalfStates = Panels<value_dim / 2, key_dim>;
  Keys key{nullptr}, query{nullptr};
  Values d_output{nullptr};
  Surprises d_surprise{nullptr};                   // Yᵀ, in the place of dO
  Surprises surprise{nullptr};                     // Nᵀ
  States state{nullptr};                           // Sᵀ
  HalfStates d_state[2] = {{nullptr}, {nullptr}};  // dS'ᵀ in halves of its rows, in the places of Q and Yᵀ
  Panels<kChunk, kChunk> square{nullptr};          // dQKᵀ of each reader, then R
  float *gates, *rows, *columns, *diagonal, *totals;

  static constexpr int floats = kGates + groups * kChunk + 5 * kChunk + 2 * warps;
  static constexpr size_t bytes = 2 * Keys::bytes + Values::bytes + Surprises::bytes + States::bytes +
                                  sizeof(bf16) * kChunk * kChunk + floats * sizeof(float);

  __device__ explicit InputGradientsMemory(char* shared) {
    key.base = reinterpret_cast<bf16*>(shared);
    query.base = d_state[0].base = key.base + kChunk * key_dim;
    d_output.base = d_surprise.base = d_state[1].base = query.base + kChunk * key_dim;
    surprise.base = d_output.base + kChunk * value_dim;
    state.base = surprise.base + kChunk * value_dim;
    square.base = state.base + value_dim * key_dim;
    gates = reinterpret_cast<float*>(square.base + kChunk * kChunk);
    rows = gates + kGates;             // [groups, 64]: the share of dG of each group's columns
    columns = rows + groups * kChunk;  // [4, 64]: what it loses, by sixteens of the rows
    diagonal = columns + 4 * kChunk;   // of Y Nᵀ
    totals = diagonal + kChunk;        // [2, warps]: of a warp, Σ x and ⟨dS', S⟩
  }
};

using Rows = Accumulator<1, 8>;  // a warp's 16 rows of 64 columns

// Writes a warp's rows of a gradient; place(row) is the element its first column goes to, or −1.
template <typename Place>
__device__ inline void write_gradient(const Rows& sum, void* data, bool wide, Place place) {
  if (!wide) {
    return write_rows(sum, [&](int row) {
      const int64_t at = place(row);
      return at < 0 ? nullptr : static_cast<bf16*>(data) + at;
    });
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int64_t at = place(lane / 4 + 8 * below);
    if (at < 0) continue;
    float* to = static_cast<float*>(data) + at + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      *reinterpret_cast<float2*>(to + 8 * j) = {sum.value[0][j][2 * below], sum.value[0][j][2 * below + 1]};
  }
}

// Calls function(below, other, first, second) with the lane's pairs of a result, in row lane / 4 + 8 · below
// of the warp's, and what a tile has in their place from row0 and column0 on.
template <int rows, int columns, typename Function>
__device__ inline void beside(Rows& x, Panels<rows, columns> tile, int row0, int column0, Function function) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const float2 other = tile.panel(column0).load2(row0 + lane / 4 + 8 * below, 8 * j + 2 * (lane % 4));
      function(below, j, other, x.value[0][j][2 * below], x.value[0][j][2 * below + 1]);
    }
}

__device__ inline void scale_rows(Rows& x, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) x.value[0][j][e] *= factor[e / 2];
}

// The thread's part of ⟨x, y⟩, for tiles of equal shape.
template <int threads, int rows, int columns>
__device__ inline float dot(Panels<rows, columns> x, const bf16* y_first_unit) {
  constexpr int units = columns / 8, step = threads / units;
  const int row = static_cast<int>(threadIdx.x) / units, column = static_cast<int>(threadIdx.x) % units * 8;
  const bf16* x_first_unit = x.unit(row, column);
  float sum[4] = {};
#pragma unroll 2
  for (int i = 0; i < rows / step; ++i) {
    const auto a = *reinterpret_cast<const uint4*>(x_first_unit + i * step * 64),
               b = *reinterpret_cast<const uint4*>(y_first_unit + i * step * 64);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 l = unpack(left[e]), r = unpack(right[e]);
      sum[e] += l.x * r.x;
      sum[e] += l.y * r.y;
    }
  }
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

template <int key_dim, int value_dim>
__global__ void __launch_bounds__(2 * key_dim, key_dim == 128 ? 2 : 3)
    input_gradients_kernel(const ChunkArguments p) {
  using Memory = InputGradientsMemory<key_dim, value_dim>;
  constexpr Layout plain = Layout::plain, transposed = Layout::transposed;
  constexpr int threads = Memory::threads;
  constexpr int square_columns = kChunk / Memory::groups;  // of a group in a square
  using Square = Accumulator<1, square_columns / 8>;
  const Block block = p.block(/*from_last=*/true);
  const Memory memory(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, group = warpgroup();
  const int row0 = 16 * warp_of_group(), row = row0 + lane / 4;  // the thread's first row, the other 8 below
  const int key0 = 64 * group, square0 = square_columns * group;
  const int32_t* rows = block.row_table(p);
  const int readers = p.readers;
  const Gates gates(memory.gates);

  using QueryRows = RowsOfThread<threads, key_dim>;
  using OutputRows = RowsOfThread<threads, value_dim>;
  const auto load_reader = [&](int reader, const QueryRows& of_query, const OutputRows& of_output) {
    const int head = block.head * readers + reader;
    of_query.copy(memory.query, p.query, p.query_head(head));
    of_output.copy(memory.d_output, p.d_output, head);
  };
  const int index = static_cast<int>(block.index);  // where registers are scarce
  // The block's in a tensor of `size` elements for each.
  const auto own = [&](const void* data, int size) {
    return static_cast<const bf16*>(data) + static_cast<int64_t>(index) * size;
  };
  const auto load_d_surprise = [&] {
    load_whole<threads>(memory.d_surprise, own(p.d_surprises, value_dim * kChunk));
    commit_copies();
  };
  const auto load_d_state = [&](int part) {
    load_whole<threads>(memory.d_state[part],
                        own(p.d_states, value_dim * key_dim) + part * (value_dim / 2 * key_dim));
    commit_copies();
  };
  const auto share = [&] {  // what has been written and loaded, with all warps and their products
    publish_to_products();
    __syncthreads();
  };

  const bool has_rows = p.d_output.data != nullptr && rows[kChunk] > 0;
  const QueryRows first_of_query(rows);
  const OutputRows first_of_output(rows);
  load_gates(memory.gates, p, block.index);
  load_rows<threads>(memory.key, p.key_rows(block), p.key.time, block.valid);
  load_whole<threads>(memory.surprise, own(p.surprises, value_dim * kChunk));
  if (has_rows) {
    load_reader(0, first_of_query, first_of_output);
    commit_copies();
  } else {
    load_d_surprise();
  }
  load_whole<threads>(memory.state, own(p.states, value_dim * key_dim));
  commit_copies();
  if (has_rows) {
    if (thread == 0) {
      prefetch<Memory::Surprises::bytes>(own(p.d_surprises, value_dim * kChunk));
      prefetch<Memory::States::bytes>(own(p.d_states, value_dim * key_dim));
    }
  } else {
    load_d_state(0);
  }

  float row_sum[2] = {}, x_sum = 0.0f, state_dot = 0.0f;
  Rows d_key;
  d_key.clear();
  // function(n, e, row, column, value) for the elements of a warp's part of a square.
  const auto for_square = [&](Square& x, auto function) {
#pragma unroll
    for (int n = 0; n < square_columns / 8; ++n)
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int column = square0 + 8 * n + 2 * (lane % 4);
        function(row + 8 * below, column, x.value[0][n][2 * below], x.value[0][n][2 * below + 1]);
      }
  };
  const float2* const column_gates = reinterpret_cast<const float2*>(memory.gates);
  for (int reader = 0; has_rows && reader < readers; ++reader) {
    if (reader == 0) {
      wait_copies<1>();
    } else {
      __syncthreads();
      load_reader(reader, QueryRows(rows), OutputRows(rows));
      commit_copies();
      wait_copies<0>();
    }
    share();
    {
      // (dO Nᵀ)ᵀ: rows are those of K.
      Square d_scores, factor;
      warpgroup_fence();
      multiply_group<transposed, plain, value_dim>(d_scores, memory.surprise, memory.d_output, square0,
                                                   false);
      warpgroup_commit();
      for_square(factor, [&](int k, int i, float& first, float& second) {
        const float2 log_gamma = column_gates[i / 2];
        const float of_k = p.scale * gates.beta[k], before = gates.log_gamma[k];
        first = of_k * exp2_fast(i >= k ? log_gamma.x - before : -INFINITY);
        second = of_k * exp2_fast(i + 1 >= k ? log_gamma.y - before : -INFINITY);
      });
      warpgroup_wait<0>();
      settle(d_scores);
#pragma unroll
      for (int n = 0; n < square_columns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d_scores.value[0][n][e] *= factor.value[0][n][e];
      d_scores.store(memory.square.panel(0), row0, square0);
    }
    wait_copies<0>();
    share();
    Rows d_query;
    warpgroup_fence();
    multiply_group<plain, transposed, value_dim>(d_query, memory.d_output, memory.state, key0, false);
    warpgroup_commit();
    multiply_group<plain, transposed, kChunk>(d_key, memory.square, memory.query, key0, true);
    warpgroup_commit();
    const float factor[2] = {p.scale * gates.gamma[row], p.scale * gates.gamma[row + 8]};
    warpgroup_wait<1>();
    settle(d_query);
    scale_rows(d_query, factor);
    warpgroup_fence();
    multiply_group<transposed, transposed, kChunk>(d_query, memory.square, memory.key, key0, true);
    warpgroup_commit();
    warpgroup_wait<0>();
    settle(d_query), settle(d_key);
    beside(d_query, memory.query, row0, key0, [&](int below, int, float2 query, float& first, float& second) {
      row_sum[below] += first * query.x;
      row_sum[below] += second * query.y;
    });
    if (reader == readers - 1) {
      __syncthreads();  // Q and dO have been read
      load_d_surprise();
      load_d_state(0);
    }
    const int64_t head_at = (block.head * readers + reader) * p.d_query.head + key0;
    write_gradient(d_query, p.d_query.data, p.wide_d_query, [&](int i) {
      const int packed = rows[row0 + i];
      return packed < 0 ? int64_t{-1} : packed * p.d_query.time + head_at;
    });
  }

  has_rows ? wait_copies<1>() : wait_copies<2>();  // for Y
  share();
  // What dQK ⊙ (Q Kᵀ) takes from dG.
  beside(d_key, memory.key, row0, key0, [&](int below, int, float2 key, float& first, float& second) {
    row_sum[below] -= first * key.x;
    row_sum[below] -= second * key.y;
  });
  {
    Square products, y_n;
    warpgroup_fence();
    multiply_group<plain, plain, key_dim>(products, memory.key, memory.key, square0, false);
    warpgroup_commit();
    // Y Nᵀ by mma.sync: wgmma wants whole panels of an operand that lies along its columns.
    y_n.clear();
    multiply_tiles<transposed, transposed, value_dim>(y_n, memory.d_surprise.panel(0), row0 / 16,
                                                      memory.surprise.panel(0), square0 / 16);
    warpgroup_wait<0>();
    settle(products);
    const float beta[2] = {gates.beta[row], gates.beta[row + 8]},
                after[2] = {gates.log_gamma[row], gates.log_gamma[row + 8]};
#pragma unroll
    for (int n = 0; n < square_columns / 8; ++n) {
      const int k = square0 + 8 * n + 2 * (lane % 4);
      const float2 log_gamma = column_gates[k / 2], of_k = column_gates[(kChunk + k) / 2];
      float lost[2] = {};
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int i = row + 8 * below;
        float *value = &y_n.value[0][n][2 * below], *product = &products.value[0][n][2 * below];
        if (i == k || i == k + 1) memory.diagonal[i] = i == k ? value[0] : value[1];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float difference = after[below] - (e == 0 ? log_gamma.x : log_gamma.y);
          value[e] *=
              -beta[below] * (e == 0 ? of_k.x : of_k.y) * exp2_fast(i > k + e ? difference : -INFINITY);
          row_sum[below] += value[e] * product[e];
          lost[e] += value[e] * product[e];
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        for (int mask = 4; mask < 32; mask *= 2) lost[e] += __shfl_xor_sync(0xffffffffu, lost[e], mask);
        if (lane < 4) memory.columns[warp_of_group() * kChunk + k + e] = lost[e];
      }
    }
    y_n.store(memory.square.panel(0), row0, square0);
  }
  wait_copies<1>();  // for S
  share();
  Rows bracket;  // Y Sᵀ
  warpgroup_fence();
  multiply_group<transposed, transposed, value_dim>(bracket, memory.d_surprise, memory.state, key0, false);
  warpgroup_commit();
  multiply_group<plain, transposed, kChunk>(d_key, memory.square, memory.key, key0, true);
  multiply_group<transposed, transposed, kChunk>(d_key, memory.square, memory.key, key0, true);
  warpgroup_commit();
  const float of_y[2] = {-gates.gamma[row] * gates.beta[row], -gates.gamma[row + 8] * gates.beta[row + 8]};
  warpgroup_wait<1>();
  __syncthreads();  // Y has been read
  load_d_state(1);
  settle(bracket);
  beside(bracket, memory.key, row0, key0, [&](int below, int, float2 key, float& first, float& second) {
    first *= of_y[below], second *= of_y[below];
    row_sum[below] += first * key.x;
    row_sum[below] += second * key.y;
  });
  warpgroup_wait<0>();
  settle(d_key);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) d_key.value[0][j][e] += bracket.value[0][j][e];

  // N dS'ᵀ, and meanwhile ⟨dS', S⟩.
  const bf16* state_unit = memory.state.unit(thread / (key_dim / 8), thread % (key_dim / 8) * 8);
  wait_copies<1>();
  share();
  warpgroup_fence();
  using HalfSurprises = Panels<value_dim / 2, kChunk>;
  multiply_group<transposed, transposed, value_dim / 2>(bracket, HalfSurprises{memory.surprise.base},
                                                        memory.d_state[0], key0, false);
  warpgroup_commit();
  state_dot += dot<threads>(memory.d_state[0], state_unit);
  wait_copies<0>();
  share();
  warpgroup_fence();
  multiply_group<transposed, transposed, value_dim / 2>(
      bracket, HalfSurprises{memory.surprise.base + value_dim / 2 * kChunk}, memory.d_state[1], key0, true);
  warpgroup_commit();
  state_dot += dot<threads>(memory.d_state[1], state_unit + value_dim / 2 * 64);
  warpgroup_wait<0>();
  settle(bracket);
  {
    const float factor[2] = {gates.beta_rho[row], gates.beta_rho[row + 8]};
    float x[2] = {};
    beside(bracket, memory.key, row0, key0, [&](int below, int j, float2 key, float& first, float& second) {
      first *= factor[below], second *= factor[below];
      x[below] += first * key.x;
      x[below] += second * key.y;
      d_key.value[0][j][2 * below] += first, d_key.value[0][j][2 * below + 1] += second;
    });
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      if (row + 8 * below == block.valid - 1) continue;  // the last token's share leaves dG as it came
      row_sum[below] -= x[below];
      x_sum += x[below];
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
  for (int below = 0; below < 2; ++below) {
    const float sum = sum_over_lanes<4>(row_sum[below]);
    if (lane % 4 == 0) memory.rows[group * kChunk + row + 8 * below] = sum;
  }
  x_sum = sum_over_lanes<32>(x_sum);
  state_dot = sum_over_lanes<32>(state_dot);
  if (lane == 0) memory.totals[thread / 32] = x_sum, memory.totals[Memory::warps + thread / 32] = state_dot;
  __syncthreads();
  if (thread >= 32) return;

  // Two tokens a lane: dG, then its sum over the tokens from each to the chunk's end.
  float d_log_gamma[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    float sum = 0.0f;
    for (int part = 0; part < Memory::groups; ++part) sum += memory.rows[part * kChunk + i];
    for (int part = 0; part < 4; ++part) sum -= memory.columns[part * kChunk + i];
    if (i == kChunk - 1) {
      for (int part = 0; part < Memory::warps; ++part)
        sum += memory.totals[part] + gates.total() * memory.totals[Memory::warps + part];
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
    p.d_beta[at] = memory.diagonal[i];
  }
}

}  // namespace

void gated_delta_input_gradients(const GatedDeltaArguments& p, void* stream) {
  with_dims(p, [&]<int key_dim, int value_dim>() {
    using Memory = InputGradientsMemory<key_dim, value_dim>;
    launch<input_gradients_kernel<key_dim, value_dim>>(
        dim3(static_cast<unsigned>(blocks_of(p))), Memory::threads, Memory::bytes, stream, ChunkArguments(p));
  });
}

}  // namespace oryx::cuda
