// Outputs and the final state, serial over chunks: O = scale · (γ ⊙ (Q S) + P U) for the chunks with rows. A
// step is one reader (output head) of one chunk; where the chunk has no rows, the first reader's takes the
// state over it and the others' do nothing.
#include "operators/gated_delta_rule/gated_delta_rule_walk.h"

namespace oryx::cuda {
namespace {

template <int key_dim, int width>
using Memory = PassMemory<key_dim, width, true>;

template <int key_dim, int width>
__global__ void __launch_bounds__(Memory<key_dim, width>::threads, 1)
    outputs_kernel(const GatedDeltaArguments p) {
  using Memory = oryx::cuda::Memory<key_dim, width>;
  const Memory memory{shared_memory()};
  const Segment segment(p, static_cast<int>(blockIdx.x), p.value_dim / width);
  const int part_column = segment.part * width;
  const int readers = p.output_heads / p.state_heads, steps = segment.chunks * readers;
  const Steps of{readers};

  if (is_loader<Memory>()) {
    begin_loads<Memory>();
    const StreamLoads<key_dim, width> loads(p, segment.stream, part_column);
    return load_steps<Memory>(
        steps, [&](int step) { loads.load_table(memory.rows(step), segment.first + of.chunk(step)); },
        [&](int step) {
          const auto stage = memory.stage(step);
          const int32_t* rows = memory.rows(step);
          const int reader = of.reader(step), chunk = segment.first + of.chunk(step);
          const bool has_rows = rows[kChunk] > 0;
          if (reader > 0 && !has_rows) return;
          loads.load_keys(stage.key, chunk);
          loads.load_gates(stage.gates, chunk);
          if (reader == 0) {
            loads.load_values(stage.slice, chunk);
            loads.load_inverse(stage.inverse, chunk);
          }
          if (has_rows) loads.load_queries(stage.query, reader, rows);
        },
        [&](int step) {
          const auto stage = memory.stage(step);
          if (same_in_warp(memory.rows(step)[kChunk] > 0))
            make_scores(memory.scores(step), stage.query, stage.key, stage.gates, p.scale);
        });
  }
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.read(segment.start(p), part_column, p.value_dim);
  const int first_head = static_cast<int>(segment.stream % p.state_heads) * readers;
  typename StateRows<key_dim>::Operand rounded;
  uint32_t added[4][4];  // Uᵀ
  walk_steps<Memory>(steps, [&](int step) {
    const auto stage = memory.stage(step);
    const int32_t* rows = memory.rows(step);
    const Gates gates(stage.gates);
    const int reader = of.reader(step);
    if (!same_in_warp(rows[kChunk] > 0)) {
      const auto keep_nothing = [](const auto&) {};
      if (reader == 0) take_step(state, stage, true, keep_nothing, keep_nothing);
      return;
    }
    Accumulator<1, 8> output;  // Oᵀ
    if (reader == 0) {
      as_operand(rounded, state.values);
      state.scale(gates.total());
      Accumulator<1, 8> residual;
      begin_products([&] { multiply_rows(residual, rounded, stage.key); });
      begin_products([&] { multiply_rows(output, rounded, stage.query); });
      finish_products<1>(residual);
      uint32_t weighted[4][4];
      find_residual(residual, weighted, state.column0(), stage.slice, gates);
      add_inverse<Layout::plain>(residual, weighted, stage.inverse);
      weigh_tokens(added, residual, gates.beta);
    } else {
      begin_products([&] { multiply_rows(output, rounded, stage.query); });
    }
    uint32_t carried[4][4];  // (ρ ⊙ U)ᵀ, for the chunk's last reader
    weigh_tokens(carried, added, gates.rho, reader == readers - 1 ? 1.0f : 0.0f);
    finish_products<0>(output);
    scale_by_token(output, gates.gamma, p.scale);
    begin_products([&] { add_rows(output, added, memory.scores(step)); });
    begin_products([&] { multiply_columns(state.values, carried, stage.key); });
    finish_products<1>(output);
    bf16* to = packed_row(p.output, 0, first_head + reader) + part_column + state.column0();
    write_by_token(
        [&](int tile, int below) {
          const float* pair = output.value[0][tile] + 2 * below;
          return pack(pair[0], pair[1]);
        },
        [&](int token) {
          const int packed = rows[token];
          return packed < 0 ? nullptr : to + packed * p.output.time;
        });
    finish_products<0>(state.values);
  });
  if (p.final_state != nullptr && segment.index == p.segments - 1)
    state.write(p.final_state + segment.stream_at(p) + part_column, p.value_dim);
}

}  // namespace

bool gated_delta_fits() { return largest_shared_memory() >= Memory<128, 128>::bytes; }

void gated_delta_outputs(const GatedDeltaArguments& p, void* stream) {
  with_width(p, 1, [&]<int key_dim, int width>() {
    const auto grid = static_cast<unsigned>(p.batch * p.state_heads * p.segments * (p.value_dim / width));
    launch<outputs_kernel<key_dim, width>>(dim3(grid), Memory<key_dim, width>::threads,
                                           Memory<key_dim, width>::bytes, stream, p);
  });
}

}  // namespace oryx::cuda
