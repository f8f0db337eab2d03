// The gradients of the states, serial over chunks from the last: Y = Aᵀ (Pᵀ dO) + E dS', dV = β ⊙ Y,
// dS = γ_C dS' − Kᵀ (γ ⊙ dV) + scale · Qᵀ (γ ⊙ dO).
#include <algorithm>

#include "operators/gated_delta_rule/gated_delta_rule_passes.h"

namespace oryx::cuda {
namespace {

template <int key_dim, int width>
struct GradientsMemory : PassShape<width> {
  using typename PassShape<width>::Slice;
  struct Stage {
    Tile<key_dim> key, transfer, query;
    Slice update, d_output;
    float* gates;
  };
  static constexpr size_t key_bytes = Tile<key_dim>::bytes(kChunk), slice_bytes = Slice::bytes(kChunk);
  static constexpr size_t stage_bytes = 3 * key_bytes + 2 * slice_bytes + kGates * sizeof(float);
  static constexpr size_t state_bytes = Slice::bytes(key_dim);
  static constexpr size_t row_bytes = gated_delta_row_table * sizeof(int32_t);
  static constexpr int stages = width <= 32 ? 3 : 2;
  static constexpr size_t bytes = state_bytes + slice_bytes + stages * (stage_bytes + row_bytes);

  char* shared;
  __device__ Slice state() const { return {reinterpret_cast<bf16*>(shared)}; }
  __device__ Slice update() const { return {reinterpret_cast<bf16*>(shared + state_bytes)}; }
  __device__ Stage stage(int index) const {
    char* at = shared + state_bytes + slice_bytes + index * stage_bytes;
    Stage s;
    s.key.base = reinterpret_cast<bf16*>(at);
    s.transfer.base = reinterpret_cast<bf16*>(at + key_bytes);
    s.query.base = reinterpret_cast<bf16*>(at + 2 * key_bytes);
    s.update.base = reinterpret_cast<bf16*>(at + 3 * key_bytes);
    s.d_output.base = reinterpret_cast<bf16*>(at + 3 * key_bytes + slice_bytes);
    s.gates = reinterpret_cast<float*>(at + 3 * key_bytes + 2 * slice_bytes);
    return s;
  }
  __device__ int32_t* rows(int index) const {
    return reinterpret_cast<int32_t*>(shared + state_bytes + slice_bytes + stages * stage_bytes +
                                      index * row_bytes);
  }
};

// A step is one reader of one chunk; the first reader's brings the chunk itself.
template <int key_dim, int width>
__global__ void __launch_bounds__(PassShape<width>::threads)
    state_gradients_kernel(const GatedDeltaArguments p) {
  using Memory = GradientsMemory<key_dim, width>;
  constexpr int threads = Memory::threads, stages = Memory::stages, columns = Memory::columns;
  constexpr int slice_width = Memory::Slice::width;
  const Memory memory{{}, shared_memory()};
  const int parts = p.value_dim / width, part_column = static_cast<int>(blockIdx.x) % parts * width;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;
  const int warp = static_cast<int>(threadIdx.x) / 32, row_warp = warp % 4, column0 = warp / 4 * columns;
  const int readers = p.output_heads / p.state_heads, steps = p.chunks * readers;

  const auto block_of = [&](int step) { return Block(p, stream, p.chunks - 1 - step / readers); };
  const auto slice_of = [&](void* scratch, int64_t block) {
    return static_cast<bf16*>(scratch) + block * kChunk * p.value_dim + part_column;
  };
  const auto load_rows = [&](int step) {
    if (step < steps && threadIdx.x < gated_delta_row_table / 4) {
      copy_async(memory.rows(step % stages) + 4 * threadIdx.x, block_of(step).row_table(p) + 4 * threadIdx.x);
    }
  };
  uint32_t with_rows = 0;  // of the steps whose loads are under way, by stage
  const auto load = [&](int step) {
    if (step < steps) {
      const Block block = block_of(step);
      const auto stage = memory.stage(step % stages);
      const int32_t* rows = memory.rows(step % stages);
      const bool has_rows = p.d_output.data != nullptr && rows[kChunk] > 0;
      const uint32_t bit = 1u << (step % stages);
      with_rows = has_rows ? with_rows | bit : with_rows & ~bit;
      if (step % readers == 0) {
        const bf16* transfer = static_cast<const bf16*>(p.transfer) + block.index * kChunk * key_dim;
        const bf16 *key = block.key_rows(p), *update = slice_of(p.d_update, block.index);
        load_tile<key_dim, kChunk, threads>(stage.transfer, kChunk,
                                            [&](int row) { return transfer + row * key_dim; });
        if (has_rows) {
          load_slice<slice_width, kChunk, width, threads>(
              stage.update, kChunk, [&](int row) { return update + row * p.value_dim; });
        }
        load_tile<key_dim, kChunk, threads>(stage.key, block.valid,
                                            [&](int row) { return key + row * p.key.time; });
      }
      if (has_rows) {
        const int head = block.head * readers + step % readers;
        load_packed<key_dim, threads>(stage.query, rows, p.query, head / (p.output_heads / p.query_heads), 0,
                                      key_dim);
        load_packed<slice_width, threads>(stage.d_output, rows, p.d_output, head, part_column, width);
      }
      load_gates(stage.gates, p, block.index);
    }
    load_rows(step + stages - 1);  // for the load that is issued when this one has landed
    commit_copies();
  };
  for (int step = 0; step < stages - 1; ++step) load_rows(step);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  for (int step = 0; step < stages - 1; ++step) load(step);

  StateAccumulator<key_dim, width> d_state;
  const int64_t state_at = stream * key_dim * p.value_dim + part_column;
  d_state.read(p.d_final_state == nullptr ? nullptr : p.d_final_state + state_at, p.value_dim);
  d_state.round(memory.state());

  for (int step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();  // the stage and the rounded state are there, and the stage to be loaded has been read
    load(step + stages - 1);
    const auto stage = memory.stage(step % stages);
    const bool is_first = step % readers == 0, has_rows = (with_rows >> (step % stages) & 1) != 0;
    const Block block = block_of(step);
    const Gates gates(stage.gates);
    if (is_first) {
      store_state<key_dim, width>(memory.state(), static_cast<bf16*>(p.d_states), block.index, p.value_dim,
                                  part_column);
      Accumulator<1, columns / 8> update;
      update.clear();
      multiply_latency<Layout::plain, Layout::transposed, key_dim>(update, stage.transfer, 16 * row_warp,
                                                                   memory.state(), column0);
      bf16* kept = slice_of(p.d_update, block.index);
      bf16* d_value = block.rows_of(p.d_value, block.head) + part_column;
      update.for_pairs([&](int row, int column, float& first, float& second) {
        const int i = 16 * row_warp + row, j = column0 + column;
        if (has_rows) {
          const float2 from_outputs = stage.update.load2(i, j);
          first += from_outputs.x, second += from_outputs.y;
        }
        *reinterpret_cast<uint32_t*>(kept + i * p.value_dim + j) = pack(first, second);
        const float beta = gates.beta[i];
        first *= beta, second *= beta;
        if (i < block.valid)
          *reinterpret_cast<uint32_t*>(d_value + i * p.d_value.time + j) = pack(first, second);
        const float gamma = gates.gamma(i);
        memory.update().store2(i, j, -gamma * first, -gamma * second);
      });
    }
    if (has_rows) {
      for (int i = static_cast<int>(threadIdx.x); i < kChunk * width / 2; i += threads) {
        const int row = i / (width / 2), column = i % (width / 2) * 2;
        const float factor = p.scale * gates.gamma(row);
        const float2 pair = stage.d_output.load2(row, column);
        stage.d_output.store2(row, column, factor * pair.x, factor * pair.y);
      }
    }
    const float total = gates.total();
    __syncthreads();
    if (is_first) {
      d_state.scale(total);
      d_state.add(stage.key, memory.update());
    }
    if (has_rows) {
      d_state.add(stage.query, stage.d_output);
    }
    if (step % readers == readers - 1) d_state.round(memory.state());
  }
  wait_copies<0>();
  if (p.d_initial_state != nullptr) d_state.write(p.d_initial_state + state_at, p.value_dim);
}

template <int key_dim, int width>
void run(const GatedDeltaArguments& p, void* stream) {
  const auto grid = static_cast<unsigned>(p.batch * p.state_heads * (p.value_dim / width));
  launch<state_gradients_kernel<key_dim, width>>(dim3(grid), PassShape<width>::threads,
                                                 GradientsMemory<key_dim, width>::bytes, stream, p);
}

}  // namespace

bool gated_delta_fits() {
#ifdef ORYX_EMULATED
  return true;
#else
  int device = 0, bytes = 0;
  expect_success(cudaGetDevice(&device), "the current device");
  expect_success(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                 "shared memory of the device");
  constexpr size_t most = std::max({GradientsMemory<128, 16>::bytes, GradientsMemory<128, 128>::bytes});
  return bytes >= static_cast<int>(most);
#endif
}

void gated_delta_state_gradients(const GatedDeltaArguments& p, void* stream) {
  with_width(p, 128, [&]<int key_dim, int width>() { run<key_dim, width>(p, stream); });
}

}  // namespace oryx::cuda
