// The serial passes of backward: the states before every chunk, and their gradients from the last. Neither
// needs the other, so one launch runs both side by side.
#include "operators/gated_delta_rule/gated_delta_rule_walk.h"

namespace oryx::cuda {
namespace {

// Leaves S before every chunk and N = W + C (β ⊙ W), of which β ⊙ N are the rows that the chunk adds.
template <int key_dim, int width>
__device__ void walk_states(const GatedDeltaArguments& p, int index) {
  using Memory = PassMemory<key_dim, width, false>;
  const Memory memory{shared_memory()};
  const Segment segment(p, index, p.value_dim / width);
  const int part_column = segment.part * width;

  const auto load = [&](int step, int thread) {
    const Block block(p, segment.stream, segment.first + step);
    const auto stage = memory.stage(step);
    load_keys(p, block, stage.key, thread);
    load_values<width>(p, block, stage.slice, part_column, thread);
    load_gates(p, block, stage.gates, thread);
    load_square(p.inverse, block.index, stage.square, thread);
    load_transfer(p, block, stage.transfer, thread);
  };

  if (threadIdx.x >= Memory::walkers)
    return load_chunks<Memory>(
        segment.chunks, [](int, int) {}, load);
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.read(segment.start(p), part_column, p.value_dim);
  walk_chunks<Memory>(segment.chunks, [&](int step) {
    const auto stage = memory.stage(step);
    const int64_t first_row =
        (segment.stream * p.chunks + segment.first + step) * p.value_dim + part_column + state.column0();
    const Gates gates(stage.gates);
    Accumulator<1, 8> residual;
    uint32_t weighted[4][4];
    state.write_rounded(static_cast<bf16*>(p.states) + first_row * key_dim);
    find_residual(residual, weighted, state, stage.key, stage.slice, gates);
    const FragmentsB<Layout::plain, 64> inverse(stage.square);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j <= i; ++j) {
        uint32_t b[4];
        load_inverse_transposed_b(b, inverse, i, j);
        multiply_add(residual.value[0][2 * i], weighted[j], b[0], b[1]);
        multiply_add(residual.value[0][2 * i + 1], weighted[j], b[2], b[3]);
      }
    bf16* surprises = static_cast<bf16*>(p.surprises) + first_row * kChunk;
    write_rows(residual, [&](int row) { return surprises + row * kChunk; });
    state.scale(gates.total());
    const FragmentsB<Layout::transposed, key_dim> transfer(stage.transfer);
#pragma unroll
    for (int k = 0; k < 4; ++k) state.add(weighted[k], transfer, k);
  });
}

// What a reader of the chunk adds: (P A)ᵀ dO to Y and scale · Qᵀ (γ ⊙ dO) to dS, both transposed.
template <int key_dim, int slice_width>
__device__ inline void add_reader(StateRows<key_dim>& d_state, Accumulator<1, 8>& d_surprise,
                                  Tile<slice_width> d_output, Tile<key_dim> query, Tile<64> weights,
                                  const Gates& gates, float scale) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  const FragmentsB<Layout::transposed, key_dim> queries(query);
  const FragmentsB<Layout::transposed, 64> mixing(weights);
  const FragmentsA<Layout::transposed, slice_width> outputs(d_output);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4];
    outputs.load(a, d_state.column0() / 16, k);
#pragma unroll
    for (int j = 0; j <= k; ++j) {
      uint32_t b[4];
      mixing.load(b, j, k);
      multiply_add(d_surprise.value[0][2 * j], a, b[0], b[1]);
      multiply_add(d_surprise.value[0][2 * j + 1], a, b[2], b[3]);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int i = 16 * k + 8 * tile + 2 * t;
      const float gamma0 = scale * gates.gamma(i), gamma1 = scale * gates.gamma(i + 1);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float2 pair = unpack(a[2 * tile + below]);
        a[2 * tile + below] = pack(gamma0 * pair.x, gamma1 * pair.y);
      }
    }
    d_state.add(a, queries, k);
  }
}

// From the last chunk: Y = (P A)ᵀ dO + E dS', dV = β ⊙ Y, dS = γ_C dS' − Kᵀ (γ ⊙ dV) + scale · Qᵀ (γ ⊙ dO). A
// step is one reader (output head) of one chunk. Where it does not keep, it starts from dS = 0 and leaves
// only dS before the segment, for what comes before.
template <int key_dim, int width, bool keeps>
__device__ void walk_gradients(const GatedDeltaArguments& p, int index) {
  using Memory = PassMemory<key_dim, width, true>;
  const Memory memory{shared_memory()};
  const Segment segment(p, index, p.value_dim / width);
  if (!keeps && segment.index == 0) return;
  const int part_column = segment.part * width, last = segment.first + segment.chunks - 1;
  const int readers = p.output_heads / p.state_heads, steps = segment.chunks * readers;
  const auto block_of = [&](int step) { return Block(p, segment.stream, last - step / readers); };

  const auto table = [&](int step, int thread) {
    load_table(memory.rows(step), block_of(step).row_table(p), thread);
  };
  const auto load = [&](int step, int thread) {
    const Block block = block_of(step);
    const auto stage = memory.stage(step);
    const int32_t* rows = memory.rows(step);
    const int reader = step % readers;
    if (reader == 0) load_transfer(p, block, stage.transfer, thread);
    load_gates(p, block, stage.gates, thread);
    if (p.d_output.data != nullptr && rows[kChunk] > 0) {
      const int head = block.head * readers + reader;
      load_packed<(width > 64 ? width : 64), width, kLoaders>(stage.slice, thread, rows, p.d_output, head,
                                                              part_column);
      load_square(p.weights, block.index * readers + reader, stage.square, thread);
      load_packed<key_dim, key_dim, kLoaders>(stage.query, thread, rows, p.query,
                                              head / (p.output_heads / p.query_heads), 0);
    }
    if (reader == readers - 1) load_keys(p, block, stage.key, thread);
  };

  if (threadIdx.x >= Memory::walkers) return load_chunks<Memory>(steps, table, load);
  begin_walk<Memory>();
  StateRows<key_dim> d_state;
  d_state.read(keeps ? segment.d_end(p) : nullptr, part_column, p.value_dim);
  Accumulator<1, 8> d_surprise;  // Yᵀ
  walk_chunks<Memory>(steps, [&](int step) {
    const auto stage = memory.stage(step);
    const Block block = block_of(step);
    const int64_t first_row = block.index * p.value_dim + part_column + d_state.column0();
    const Gates gates(stage.gates);
    const int reader = step % readers;
    if (reader == 0) {
      d_surprise.clear();
      if (keeps) d_state.write_rounded(static_cast<bf16*>(p.d_states) + first_row * key_dim);
      d_state.multiply(d_surprise, stage.transfer);
      d_state.scale(gates.total());
    }
    if (p.d_output.data != nullptr && memory.rows(step)[kChunk] > 0)
      add_reader(d_state, d_surprise, stage.slice, stage.query, stage.square, gates, p.scale);
    if (reader == readers - 1) {
      if (keeps) {
        bf16* kept = static_cast<bf16*>(p.d_surprises) + first_row * kChunk;
        write_rows(d_surprise, [&](int row) { return kept + row * kChunk; });
      }
      const int lane = static_cast<int>(threadIdx.x) % 32;
      bf16* d_value = block.rows_of(p.d_value, block.head) + part_column + d_state.column0() + pair_column();
      const FragmentsB<Layout::transposed, key_dim> keys(stage.key);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int i = 16 * k + 8 * tile + 2 * (lane % 4);
          const float2 beta = *reinterpret_cast<const float2*>(gates.beta + i);
          const float gamma0 = -gates.gamma(i), gamma1 = -gates.gamma(i + 1);
          uint32_t by_token[2];  // dV of token 16 k + 8 tile + lane / 4, two columns and two from the 8th on
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const float first = beta.x * d_surprise.value[0][2 * k + tile][2 * below];
            const float second = beta.y * d_surprise.value[0][2 * k + tile][2 * below + 1];
            if (keeps) by_token[below] = transpose_matrix(pack(first, second));
            a[2 * tile + below] = pack(gamma0 * first, gamma1 * second);
          }
          if (!keeps) continue;
          const uint2 four = pair_up(by_token[0], by_token[1]);
          const int token = 16 * k + 8 * tile + lane / 4;
          if (token < block.valid) *reinterpret_cast<uint2*>(d_value + token * p.d_value.time) = four;
        }
        d_state.add(a, keys, k);
      }
    }
  });
  if (!keeps) {
    d_state.write(p.d_segment_states + segment.state_at(p) - key_dim * p.value_dim + part_column,
                  p.value_dim);
  } else if (p.d_initial_state != nullptr && segment.index == 0) {
    d_state.write(p.d_initial_state + segment.stream_at(p) + part_column, p.value_dim);
  }
}

// The longer pass first.
template <int key_dim, int width>
__global__ void __launch_bounds__(PassMemory<key_dim, width, true>::threads, 1)
    backward_passes_kernel(const GatedDeltaArguments p) {
  const int index = static_cast<int>(blockIdx.x), of_each = static_cast<int>(gridDim.x) / 2;
  if (index < of_each) {
    walk_gradients<key_dim, width, true>(p, index);
  } else {
    walk_states<key_dim, width>(p, index - of_each);
  }
}

template <int key_dim, int width>
__global__ void __launch_bounds__(PassMemory<key_dim, width, true>::threads, 1)
    split_gradients_kernel(const GatedDeltaArguments p) {
  walk_gradients<key_dim, width, false>(p, static_cast<int>(blockIdx.x));
}

}  // namespace

void gated_delta_backward_passes(const GatedDeltaArguments& p, void* stream) {
  if (p.segments > 1) {
    with_width(p, 1, [&]<int key_dim, int width>() {
      using Memory = PassMemory<key_dim, width, true>;
      const auto grid = static_cast<unsigned>(p.batch * p.state_heads * p.segments * (p.value_dim / width));
      launch<split_gradients_kernel<key_dim, width>>(dim3(grid), Memory::threads, Memory::bytes, stream, p);
    });
    join_segments(p, /*reverse=*/true, stream);
  }
  with_width(p, 2, [&]<int key_dim, int width>() {
    using Memory = PassMemory<key_dim, width, true>;
    const auto grid = static_cast<unsigned>(2 * p.batch * p.state_heads * p.segments * (p.value_dim / width));
    launch<backward_passes_kernel<key_dim, width>>(dim3(grid), Memory::threads, Memory::bytes, stream, p);
  });
}

}  // namespace oryx::cuda
