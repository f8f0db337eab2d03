// Outputs and the final state, serial over chunks: O = scale · γ ⊙ (Q S) + (scale · P A) (β ⊙ W) for the
// chunks with rows. A step is one reader (output head) of one chunk.
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
  const auto block_of = [&](int step) { return Block(p, segment.stream, segment.first + step / readers); };

  const auto table = [&](int step, int thread) {
    load_table(memory.rows(step), block_of(step).row_table(p), thread);
  };
  const auto load = [&](int step, int thread) {
    const Block block = block_of(step);
    const auto stage = memory.stage(step);
    const int32_t* rows = memory.rows(step);
    const int reader = step % readers;
    if (reader == 0) {
      load_keys(p, block, stage.key, thread);
      load_values<width>(p, block, stage.slice, part_column, thread);
    }
    load_gates(p, block, stage.gates, thread);
    if (rows[kChunk] > 0) {
      const int head = block.head * readers + reader;
      load_packed<key_dim, key_dim, kLoaders>(stage.query, thread, rows, p.query,
                                              head / (p.output_heads / p.query_heads), 0);
      load_square(p.weights, block.index * readers + reader, stage.square, thread);
    }
    if (reader == readers - 1) load_transfer(p, block, stage.transfer, thread);
  };

  if (threadIdx.x >= Memory::walkers) return load_chunks<Memory>(steps, table, load);
  begin_walk<Memory>();
  StateRows<key_dim> state;
  state.read(segment.start(p), part_column, p.value_dim);
  uint32_t weighted[4][4];
  walk_chunks<Memory>(steps, [&](int step) {
    const auto stage = memory.stage(step);
    const int32_t* rows = memory.rows(step);
    const Gates gates(stage.gates);
    const int reader = step % readers;
    if (reader == 0) {
      Accumulator<1, 8> residual;
      find_residual(residual, weighted, state, stage.key, stage.slice, gates);
    }
    if (rows[kChunk] > 0) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      Accumulator<4, 2> output;
      output.clear();
      const FragmentsA<Layout::plain, key_dim> query(stage.query);
#pragma unroll
      for (int k = 0; k < key_dim / 16; ++k) {
        uint32_t s[4];
        state.values.as_a(s, 0, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t a[4];
          query.load(a, i, k);
          multiply_add(output.value[i][0], a, s[0], s[2]);
          multiply_add(output.value[i][1], a, s[1], s[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const float gamma = p.scale * gates.gamma(16 * i + lane / 4 + 8 * below);
#pragma unroll
          for (int j = 0; j < 2; ++j)
            output.value[i][j][2 * below] *= gamma, output.value[i][j][2 * below + 1] *= gamma;
        }
      const FragmentsA<Layout::plain, 64> weights(stage.square);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k <= i; ++k) {
          uint32_t a[4];
          weights.load(a, i, k);
          multiply_add(output.value[i][0], a, weighted[k][0], weighted[k][2]);
          multiply_add(output.value[i][1], a, weighted[k][1], weighted[k][3]);
        }
      const int head = static_cast<int>(segment.stream % p.state_heads) * readers + reader;
      const int64_t column = part_column + state.column0();
      write_rows(output, [&](int row) {
        const int packed = rows[row];
        return packed < 0 ? nullptr : packed_row(p.output, packed, head) + column;
      });
    }
    if (reader == readers - 1) {
      state.scale(gates.total());
      const FragmentsB<Layout::transposed, key_dim> transfer(stage.transfer);
#pragma unroll
      for (int k = 0; k < 4; ++k) state.add(weighted[k], transfer, k);
    }
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
