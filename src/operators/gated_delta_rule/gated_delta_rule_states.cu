// For backward, serial over chunks: the states before every chunk and N = W + C (β ⊙ W), of which β ⊙ N are
// the rows that the chunk adds.
#include "operators/gated_delta_rule/gated_delta_rule_walk.h"

namespace oryx::cuda {
namespace {

template <int key_dim, int width>
__global__ void __launch_bounds__(PassMemory<key_dim, width, false>::threads, 1)
    states_kernel(const GatedDeltaArguments p) {
  using Memory = PassMemory<key_dim, width, false>;
  const Memory memory{shared_memory()};
  const int parts = p.value_dim / width, part_column = static_cast<int>(blockIdx.x) % parts * width;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;

  const auto load = [&](int chunk, int thread) {
    const Block block(p, stream, chunk);
    const auto stage = memory.stage(chunk);
    load_keys(p, block, stage.key, thread);
    load_values<width>(p, block, stage.slice, part_column, thread);
    load_gates(p, block, stage.gates, thread);
    load_square(p.inverse, block.index, stage.square, thread);
    load_transfer(p, block, stage.transfer, thread);
  };

  StateRows<key_dim> state;
  if (threadIdx.x < Memory::walkers) {
    state.read(
        p.initial_state == nullptr ? nullptr : p.initial_state + stream * key_dim * p.value_dim + part_column,
        p.value_dim);
  }
  walk_chunks<Memory>(
      p.chunks, [](int, int) {}, load,
      [&](int chunk) {
        const auto stage = memory.stage(chunk);
        const int64_t first_row = (stream * p.chunks + chunk) * p.value_dim + part_column + state.column0();
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

}  // namespace

void gated_delta_states(const GatedDeltaArguments& p, void* stream) {
  with_width(p, [&]<int key_dim, int width>() {
    using Memory = PassMemory<key_dim, width, false>;
    const auto grid = static_cast<unsigned>(p.batch * p.state_heads * (p.value_dim / width));
    launch<states_kernel<key_dim, width>>(dim3(grid), Memory::threads, Memory::bytes, stream, p);
  });
}

}  // namespace oryx::cuda
