// What the outputs of a chunk ask of the rows that it adds to the state: Aᵀ (Pᵀ dO), chunk by chunk.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 128;

template <int key_dim, int value_dim>
__global__ void __launch_bounds__(kThreads) output_gradients_kernel(const GatedDeltaArguments p) {
  const Block block = Block::of_grid(p);
  const int32_t* rows = block.row_table(p);
  if (rows[kChunk] == 0) return;
  char* shared = shared_memory();
  const Tile<key_dim> key{reinterpret_cast<bf16*>(shared)}, query{key.base + kChunk * key_dim};
  const Tile<value_dim> d_output{query.base + kChunk * key_dim};
  const Tile<64> inverse{d_output.base + kChunk * value_dim};
  auto* shared_gates = reinterpret_cast<float*>(inverse.base + kChunk * kChunk);
  const int lane = static_cast<int>(threadIdx.x) % 32, m0 = static_cast<int>(threadIdx.x) / 32 * 16;

  const bf16* kept_inverse = static_cast<const bf16*>(p.inverse) + block.index * kChunk * kChunk;
  const bf16* keys = block.key_rows(p);
  load_gates(shared_gates, p, block.index);
  load_tile<key_dim, kChunk, kThreads>(key, block.valid, [&](int row) { return keys + row * p.key.time; });
  load_tile<64, kChunk, kThreads>(inverse, kChunk, [&](int row) { return kept_inverse + row * kChunk; });
  const Gates gates(shared_gates);

  Accumulator<1, value_dim / 8> sum;
  sum.clear();
  const int readers = p.output_heads / p.state_heads;
  for (int reader = 0; reader < readers; ++reader) {
    const int head = block.head * readers + reader;
    if (reader > 0) __syncthreads();
    load_packed<key_dim, kThreads>(query, rows, p.query, head / (p.output_heads / p.query_heads), 0, key_dim);
    load_packed<value_dim, kThreads>(d_output, rows, p.d_output, head, 0, value_dim);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Accumulator<1, 8> weights;  // Pᵀ
    weights.clear();
    multiply<Layout::plain, Layout::plain>(weights, key, m0, query, 0, 0, key_dim);
    weights.for_pairs([&](int row, int column, float& first, float& second) {
      first *= p.scale * gates.between(column, m0 + row);
      second *= p.scale * gates.between(column + 1, m0 + row);
    });
    multiply_registers<Layout::transposed, 4>(sum, weights, d_output, 0, 0);
  }
  __syncthreads();
  sum.store(d_output, m0, 0);
  __syncthreads();
  sum.clear();
  multiply<Layout::transposed, Layout::transposed>(sum, inverse, m0, d_output, 0, 0, kChunk);
  __syncthreads();
  sum.store(d_output, m0, 0);
  __syncwarp();
  constexpr int units = value_dim / 8;
  bf16* out = static_cast<bf16*>(p.d_update) + (block.index * kChunk + m0) * value_dim;
  for (int i = lane; i < 16 * units; i += 32) {
    const int row = i / units, column = i % units * 8;
    *reinterpret_cast<uint4*>(out + row * value_dim + column) =
        *reinterpret_cast<const uint4*>(d_output.unit(m0 + row, column));
  }
}

}  // namespace

void gated_delta_output_gradients(const GatedDeltaArguments& p, void* stream) {
  with_dims(p, [&]<int key_dim, int value_dim>() {
    constexpr size_t bytes = 2 * Tile<key_dim>::bytes(kChunk) + Tile<value_dim>::bytes(kChunk) +
                             Tile<64>::bytes(kChunk) + kGates * sizeof(float);
    launch<output_gradients_kernel<key_dim, value_dim>>(dim3(static_cast<unsigned>(blocks_of(p))), kThreads,
                                                        bytes, stream, p);
  });
}

}  // namespace oryx::cuda
