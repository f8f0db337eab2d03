// The states before every chunk: S' = γ_C S + Eᵀ (β ⊙ W), W = V − γ ⊙ (K S). Serial over chunks; columns of
// the state do not meet, so several blocks of threads share a stream where streams are few.
#include "operators/gated_delta_rule/gated_delta_rule_passes.h"

namespace oryx::cuda {
namespace {

template <int key_dim, int width>
struct StatesMemory : PassShape<width> {
  using typename PassShape<width>::Slice;
  struct Stage {
    Tile<key_dim> key, transfer;
    Slice value;
    float* gates;
  };
  static constexpr size_t stage_bytes =
      2 * Tile<key_dim>::bytes(kChunk) + Slice::bytes(kChunk) + kGates * sizeof(float);
  static constexpr size_t state_bytes = Slice::bytes(key_dim),
                          fixed_bytes = state_bytes + Slice::bytes(kChunk);
  // A short chunk takes less time than its loads: then more of them are under way.
  static constexpr int stages = width <= 32 ? 4 : 2;
  static constexpr size_t bytes = fixed_bytes + stages * stage_bytes;

  char* shared;
  __device__ Slice state() const { return {reinterpret_cast<bf16*>(shared)}; }
  __device__ Slice update() const { return {reinterpret_cast<bf16*>(shared + state_bytes)}; }
  __device__ Stage stage(int index) const {
    char* at = shared + fixed_bytes + index * stage_bytes;
    Stage s;
    s.key.base = reinterpret_cast<bf16*>(at);
    s.transfer.base = reinterpret_cast<bf16*>(at + Tile<key_dim>::bytes(kChunk));
    s.value.base = reinterpret_cast<bf16*>(at + 2 * Tile<key_dim>::bytes(kChunk));
    s.gates = reinterpret_cast<float*>(at + 2 * Tile<key_dim>::bytes(kChunk) + Slice::bytes(kChunk));
    return s;
  }
};

template <int key_dim, int width>
__global__ void __launch_bounds__(PassShape<width>::threads) states_kernel(const GatedDeltaArguments p) {
  using Memory = StatesMemory<key_dim, width>;
  constexpr int threads = Memory::threads, stages = Memory::stages, columns = Memory::columns;
  const Memory memory{{}, shared_memory()};
  const int parts = p.value_dim / width, part_column = static_cast<int>(blockIdx.x) % parts * width;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;
  const int warp = static_cast<int>(threadIdx.x) / 32, row_warp = warp % 4, column0 = warp / 4 * columns;

  const auto load = [&](int chunk) {
    if (chunk < p.chunks) {
      const Block block(p, stream, chunk);
      const auto stage = memory.stage(chunk % stages);
      const bf16 *key = block.key_rows(p), *value = block.rows_of(p.value, block.head) + part_column;
      const bf16* transfer = static_cast<const bf16*>(p.transfer) + block.index * kChunk * key_dim;
      load_tile<key_dim, kChunk, threads>(stage.key, block.valid,
                                          [&](int row) { return key + row * p.key.time; });
      load_slice<Memory::Slice::width, kChunk, width, threads>(
          stage.value, block.valid, [&](int row) { return value + row * p.value.time; });
      load_gates(stage.gates, p, block.index);
      load_tile<key_dim, kChunk, threads>(stage.transfer, kChunk,
                                          [&](int row) { return transfer + row * key_dim; });
    }
    commit_copies();
  };
  for (int chunk = 0; chunk < stages - 1; ++chunk) load(chunk);

  StateAccumulator<key_dim, width> state;
  const int64_t state_at = stream * key_dim * p.value_dim + part_column;
  state.read(p.initial_state == nullptr ? nullptr : p.initial_state + state_at, p.value_dim);
  state.round(memory.state());

  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    wait_copies<stages - 2>();
    __syncthreads();  // the stage and the rounded state are there, and the stage to be loaded has been read
    load(chunk + stages - 1);
    const auto stage = memory.stage(chunk % stages);
    const Gates gates(stage.gates);
    const int64_t index = stream * p.chunks + chunk;
    store_state<key_dim, width>(memory.state(), static_cast<bf16*>(p.states), index, p.value_dim,
                                part_column);

    Accumulator<1, columns / 8> residual;
    residual.clear();
    multiply_latency<Layout::plain, Layout::transposed, key_dim>(residual, stage.key, 16 * row_warp,
                                                                 memory.state(), column0);
    bf16* kept = static_cast<bf16*>(p.residual) + index * kChunk * p.value_dim + part_column;
    residual.for_pairs([&](int row, int column, float& first, float& second) {
      const int i = 16 * row_warp + row, j = column0 + column;
      const float gamma = gates.gamma(i), beta = gates.beta[i];
      const float2 value = stage.value.load2(i, j);
      first = value.x - gamma * first, second = value.y - gamma * second;
      memory.update().store2(i, j, beta * first, beta * second);
      const float factor = p.scaled_residual ? beta : 1.0f;
      *reinterpret_cast<uint32_t*>(kept + i * p.value_dim + j) = pack(factor * first, factor * second);
    });
    const float total = gates.total();
    __syncthreads();
    state.scale(total);
    state.add(stage.transfer, memory.update());
    state.round(memory.state());
  }
  wait_copies<0>();
  if (p.final_state != nullptr) state.write(p.final_state + state_at, p.value_dim);
}

template <int key_dim, int width>
void run(const GatedDeltaArguments& p, void* stream) {
  const auto grid = static_cast<unsigned>(p.batch * p.state_heads * (p.value_dim / width));
  launch<states_kernel<key_dim, width>>(dim3(grid), PassShape<width>::threads,
                                        StatesMemory<key_dim, width>::bytes, stream, p);
}

}  // namespace

void gated_delta_states(const GatedDeltaArguments& p, void* stream) {
  with_width(p, 64, [&]<int key_dim, int width>() { run<key_dim, width>(p, stream); });
}

}  // namespace oryx::cuda
