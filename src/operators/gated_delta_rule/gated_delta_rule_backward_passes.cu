// The serial passes of backward: the states before every chunk, and their gradients from the last. Neither
// needs the other, so one launch runs both side by side.
#include "operators/gated_delta_rule/gated_delta_rule_walk.h"

namespace oryx::cuda {
namespace {

// Leaves S before every chunk and N, of which U = β ⊙ N are the rows that the chunk adds.
template <int key_dim, int width>
__device__ void walk_states(const GatedDeltaArguments& p, int index) {
  using Memory = PassMemory<key_dim, width, false>;
  const Memory memory{shared_memory()};
  const Segment segment(p, index, p.value_dim / width);
  const int part_column = segment.part * width;

  if (is_loader<Memory>()) {
    begin_loads<Memory>();
    const StreamLoads<key_dim, width> loads(p, segment.stream, part_column);
    return load_steps<Memory>(
        segment.chunks, [](int) {},
        [&](int step) {
          const auto stage = memory.stage(step);
          const int chunk = segment.first + step;
          loads.load_keys(stage.key, chunk);
          loads.load_values(stage.slice, chunk);
          loads.load_gates(stage.gates, chunk);
          loads.load_inverse(stage.inverse, chunk);
        },
        [](int) {});
  }
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.read(segment.start(p), part_column, p.value_dim);
  walk_steps<Memory>(segment.chunks, [&](int step) {
    const int64_t first_row =
        (segment.stream * p.chunks + segment.first + step) * p.value_dim + part_column + state.column0();
    take_step(
        state, memory.stage(step), true,
        [&](const auto& rounded) {
          state.write_rounded(rounded, static_cast<bf16*>(p.states) + first_row * key_dim);
        },
        [&](const auto& surprises) {
          bf16* kept = static_cast<bf16*>(p.surprises) + first_row * kChunk;
          write_rows(surprises, [&](int row) { return kept + row * kChunk; });
        });
  });
}

// From the last chunk: dU = (scale · P)ᵀ dO + ρ ⊙ (K dS'), Y = dU + Cᵀ (β ⊙ dU), dV = β ⊙ Y,
// dS = γ_C dS' − Kᵀ (γ ⊙ dV) + scale · Qᵀ (γ ⊙ dO). A step is one reader (output head) of one chunk. Where it
// does not keep, it starts from dS = 0 and leaves only dS before the segment, for what comes before.
template <int key_dim, int width, bool keeps>
__device__ void walk_gradients(const GatedDeltaArguments& p, int index) {
  using Memory = PassMemory<key_dim, width, true>;
  const Memory memory{shared_memory()};
  const Segment segment(p, index, p.value_dim / width);
  if (!keeps && segment.index == 0) return;
  const int part_column = segment.part * width, last = segment.first + segment.chunks - 1;
  const int readers = p.output_heads / p.state_heads, steps = segment.chunks * readers;
  const Steps of{readers};
  const auto has_rows = [&](int step) { return p.d_output.data != nullptr && memory.rows(step)[kChunk] > 0; };

  if (is_loader<Memory>()) {
    begin_loads<Memory>();
    const StreamLoads<key_dim, width> loads(p, segment.stream, part_column);
    return load_steps<Memory>(
        steps, [&](int step) { loads.load_table(memory.rows(step), last - of.chunk(step)); },
        [&](int step) {
          const auto stage = memory.stage(step);
          const int reader = of.reader(step), chunk = last - of.chunk(step);
          loads.load_keys(stage.key, chunk);
          loads.load_gates(stage.gates, chunk);
          if (has_rows(step)) {
            loads.load_queries(stage.query, reader, memory.rows(step));
            loads.load_d_output(stage.slice, reader, memory.rows(step));
          }
          if (reader == readers - 1) loads.load_inverse(stage.inverse, chunk);
        },
        [&](int step) {
          const auto stage = memory.stage(step);
          if (same_in_warp(has_rows(step)))
            make_scores(memory.scores(step), stage.query, stage.key, stage.gates, p.scale);
        });
  }
  begin_walk<Memory>();
  StateRows<key_dim> d_state;
  d_state.read(keeps ? segment.d_end(p) : nullptr, part_column, p.value_dim);
  Accumulator<1, 8> d_surprise;  // dUᵀ, then Yᵀ
  const Block origin(p, segment.stream, 0);
  bf16* d_values = origin.rows_of(p.d_value, origin.head) + part_column + d_state.column0();
  walk_steps<Memory>(steps, [&](int step) {
    const auto stage = memory.stage(step);
    const int chunk = last - of.chunk(step), reader = of.reader(step);
    const int64_t first_row = (origin.index + chunk) * p.value_dim + part_column + d_state.column0();
    const Gates gates(stage.gates);
    if (reader == 0) {
      typename StateRows<key_dim>::Operand rounded;
      as_operand(rounded, d_state.values);
      d_state.scale(gates.total());
      begin_products([&] { multiply_rows(d_surprise, rounded, stage.key); });
      if (keeps) d_state.write_rounded(rounded, static_cast<bf16*>(p.d_states) + first_row * key_dim);
      finish_products<0>(d_surprise);
      scale_by_token(d_surprise, gates.rho, 1.0f);
    }
    // What the reader adds: (scale · P)ᵀ dO to dU and scale · Qᵀ (γ ⊙ dO) to dS, both transposed.
    uint32_t d_output[4][4], scaled[4][4];
    if (same_in_warp(has_rows(step))) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        load_a<Layout::transposed>(d_output[k], stage.slice.panel(d_state.column0()), d_state.column0() % 64,
                                   16 * k);
      }
      weigh_tokens(scaled, d_output, gates.gamma, p.scale);
      begin_products([&] {
        multiply_columns(d_surprise, d_output, memory.scores(step));
        multiply_columns(d_state.values, scaled, stage.query);
      });
      finish_products<0>(d_surprise);
      settle(d_state.values);
    }
    uint32_t weighted[4][4], d_value[4][4], from_keys[4][4];
    if (reader == readers - 1) {
      weigh_tokens(weighted, d_surprise, gates.beta);
      add_inverse<Layout::transposed>(d_surprise, weighted, stage.inverse);
      weigh_tokens(d_value, d_surprise, gates.beta);
      weigh_tokens(from_keys, d_value, gates.gamma, -1.0f);
      begin_products([&] { multiply_columns(d_state.values, from_keys, stage.key); });
      if (keeps) {
        bf16* kept = static_cast<bf16*>(p.d_surprises) + first_row * kChunk;
        write_rows(d_surprise, [&](int row) { return kept + row * kChunk; });
        const int64_t first_token = int64_t{kChunk} * chunk;
        bf16* to = d_values + first_token * p.d_value.time;
        const int64_t valid = p.time - first_token;
        write_by_token([&](int tile, int below) { return d_value[tile / 2][tile % 2 * 2 + below]; },
                       [&](int token) { return token < valid ? to + token * p.d_value.time : nullptr; });
      }
      finish_products<0>(d_state.values);
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
  static_assert(PassMemory<key_dim, width, false>::bytes <= PassMemory<key_dim, width, true>::bytes);
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
