// The outputs of the tokens that want one, chunk by chunk: O = scale · (γ ⊙ (Q S) + P U), U = A (β ⊙ W).
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;

template <int key_dim, int value_dim>
struct OutputsMemory {
  static constexpr int widest = key_dim > value_dim ? key_dim : value_dim;
  Tile<key_dim> key{nullptr}, query{nullptr};
  Tile<value_dim> update{nullptr}, state{nullptr};
  Tile<value_dim> output{nullptr};  // in the query's place
  Tile<64> inverse{nullptr};
  float* gates;

  static constexpr size_t bytes = Tile<key_dim>::bytes(kChunk) + Tile<widest>::bytes(kChunk) +
                                  Tile<value_dim>::bytes(kChunk) + Tile<value_dim>::bytes(key_dim) +
                                  Tile<64>::bytes(kChunk) + kGates * sizeof(float);

  __device__ explicit OutputsMemory(char* shared) {
    const auto take = [&](size_t size) {
      char* at = shared;
      shared += size;
      return reinterpret_cast<bf16*>(at);
    };
    key.base = take(Tile<key_dim>::bytes(kChunk));
    query.base = output.base = take(Tile<widest>::bytes(kChunk));
    update.base = take(Tile<value_dim>::bytes(kChunk));
    state.base = take(Tile<value_dim>::bytes(key_dim));
    inverse.base = take(Tile<64>::bytes(kChunk));
    gates = reinterpret_cast<float*>(shared);
  }
};

template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads, 2) outputs_kernel(const GatedDeltaArguments p) {
  const Block block = Block::of_grid(p);
  const int32_t* rows = block.row_table(p);
  if (rows[kChunk] == 0) return;
  const OutputsMemory<key_dim, value_dim> memory(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, m0 = static_cast<int>(threadIdx.x) / 32 * 16;

  const bf16* inverse = static_cast<const bf16*>(p.inverse) + block.index * kChunk * kChunk;
  const bf16* residual = static_cast<const bf16*>(p.residual) + block.index * kChunk * value_dim;
  const bf16* states = static_cast<const bf16*>(p.states) + block.index * key_dim * value_dim;
  const bf16* key = block.key_rows(p);
  load_gates(memory.gates, p, block.index);
  load_tile<64, kChunk, kThreads>(memory.inverse, kChunk, [&](int row) { return inverse + row * kChunk; });
  load_tile<value_dim, kChunk, kThreads>(memory.update, kChunk,
                                         [&](int row) { return residual + row * value_dim; });
  commit_copies();
  load_tile<key_dim, kChunk, kThreads>(memory.key, block.valid,
                                       [&](int row) { return key + row * p.key.time; });
  load_tile<value_dim, key_dim, kThreads>(memory.state, key_dim,
                                          [&](int row) { return states + row * value_dim; });

  const int readers = p.output_heads / p.state_heads;
  for (int reader = 0; reader < readers; ++reader) {
    const int output_head = block.head * readers + reader;
    if (reader > 0) __syncthreads();
    load_packed<key_dim, kThreads>(memory.query, rows, p.query,
                                   output_head / (p.output_heads / p.query_heads), 0, key_dim);
    commit_copies();
    if (reader == 0) {
      wait_copies<1>();
      __syncthreads();
      Accumulator<1, value_dim / 8> update;
      update.clear();
      multiply<Layout::plain, Layout::transposed>(update, memory.inverse, m0, memory.update, 0, 0, kChunk);
      __syncthreads();
      update.store(memory.update, m0, 0);
    }
    wait_copies<0>();
    __syncthreads();
    const Gates gates(memory.gates);

    Accumulator<1, value_dim / 8> output;
    output.clear();
    multiply<Layout::plain, Layout::transposed>(output, memory.query, m0, memory.state, 0, 0, key_dim);
    output.for_pairs([&](int row, int, float& first, float& second) {
      const float gamma = gates.gamma(m0 + row);
      first *= gamma, second *= gamma;
    });
    Accumulator<1, 8> weights;
    weights.clear();
    multiply<Layout::plain, Layout::plain>(weights, memory.query, m0, memory.key, 0, 0, key_dim);
    weights.for_pairs([&](int row, int column, float& first, float& second) {
      first *= gates.between(m0 + row, column);
      second *= gates.between(m0 + row, column + 1);
    });
    multiply_registers<Layout::transposed, 4>(output, weights, memory.update, 0, 0);

    // Through the rows of the query's tile that only this warp reads, unless rows of the two differ in
    // length.
    if constexpr (key_dim == value_dim) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    output.for_pairs([&](int row, int column, float& first, float& second) {
      memory.output.store2(m0 + row, column, p.scale * first, p.scale * second);
    });
    __syncwarp();
    constexpr int units = value_dim / 8;
    for (int i = lane; i < 16 * units; i += 32) {
      const int row = m0 + i / units, column = i % units * 8, packed = rows[row];
      if (packed >= 0) {
        *reinterpret_cast<uint4*>(packed_row(p.output, packed, output_head) + column) =
            *reinterpret_cast<const uint4*>(memory.output.unit(row, column));
      }
    }
  }
}

}  // namespace

void gated_delta_outputs(const GatedDeltaArguments& p, void* stream) {
  with_dims(p, [&]<int key_dim, int value_dim>() {
    launch<outputs_kernel<key_dim, value_dim>>(dim3(static_cast<unsigned>(blocks_of(p))), kThreads,
                                               OutputsMemory<key_dim, value_dim>::bytes, stream, p);
  });
}

}  // namespace oryx::cuda
