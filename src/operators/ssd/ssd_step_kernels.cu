#include <type_traits>

#include "operators/ssd/ssd_device.h"
#include "operators/ssd/ssd_kernels.h"

namespace oryx::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 32;                         // of the state that a block holds
constexpr int kColumnLanes = kColumns / 4;           // four columns a thread
constexpr int kRowGroups = kThreads / kColumnLanes;  // rows that lie between two rows of a thread
constexpr int kWarps = kThreads / 32;

template <typename Element>
__device__ inline float load(const cpu::RowView& view, int64_t offset) {
  return static_cast<float>(static_cast<const Element*>(view.data)[offset]);
}

// One state head, kColumns columns of its state in registers, token after token.
template <typename Element, int key_dim>
__global__ void __launch_bounds__(kThreads) step_kernel(const SsdSteps p) {
  constexpr int rows = key_dim / kRowGroups;
  __shared__ float parts[2][kWarps][kColumns];
  const cpu::MixerShape& shape = p.shape;
  const int64_t stream = blockIdx.x, batch = stream / shape.state_heads, head = stream % shape.state_heads;
  const int64_t key_head = head / (shape.state_heads / shape.key_heads);
  const int group = static_cast<int>(shape.output_heads / shape.state_heads);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row0 = thread / kColumnLanes;
  const int column = static_cast<int>(blockIdx.y) * kColumns + thread % kColumnLanes * 4;
  const int64_t state_at = stream * key_dim * shape.value_dim + column;
  float state[rows][4] = {};
  if (p.initial_state != nullptr) {
    const int64_t from =
        p.initial_rows == nullptr ? stream : p.initial_rows[batch] * shape.state_heads + head;
    const float* initial = p.initial_state + from * key_dim * shape.value_dim + column;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(initial + (row0 + i * kRowGroups) * shape.value_dim);
      state[i][0] = x.x, state[i][1] = x.y, state[i][2] = x.z, state[i][3] = x.w;
    }
  }
  int buffer = 0;
  for (int64_t time = 0; time < shape.time; ++time) {
    const int64_t token = batch * shape.time + time, at = token * shape.state_heads + head;
    const float decay = expf(p.log_decay[at]), step = p.step[at];
    const int64_t key_at = batch * p.key.batch + time * p.key.time + key_head * p.key.head;
    const int64_t value_at = batch * p.value.batch + time * p.value.time + head * p.value.head + column;
    float value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = step * load<Element>(p.value, value_at + j);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float key = load<Element>(p.key, key_at + row0 + i * kRowGroups);
#pragma unroll
      for (int j = 0; j < 4; ++j) state[i][j] = decay * state[i][j] + key * value[j];
    }
    const int64_t packed = p.row_of[token];
    if (packed < 0) continue;
    for (int reader = 0; reader < group; ++reader) {
      const int64_t output_head = head * group + reader;
      const int64_t query_head = output_head / (shape.output_heads / shape.query_heads);
      const int64_t query_at = packed * p.query.time + query_head * p.query.head;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const float query = load<Element>(p.query, query_at + row0 + i * kRowGroups);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += query * state[i][j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int mask = kColumnLanes; mask < 32; mask *= 2)
          sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], mask);
        if (lane < kColumnLanes) parts[buffer][warp][lane * 4 + j] = sum[j];
      }
      __syncthreads();
      if (thread < kColumns) {
        float total = 0.0f;
        for (int i = 0; i < kWarps; ++i) total += parts[buffer][i][thread];
        const int64_t at_column = static_cast<int64_t>(blockIdx.y) * kColumns + thread;
        if (p.skip != nullptr) {
          total += p.skip[output_head] * load<Element>(p.value, value_at - column + at_column);
        }
        static_cast<Element*>(
            p.output.data)[packed * p.output.time + output_head * p.output.head + at_column] =
            static_cast<Element>(total);
      }
      buffer ^= 1;  // the next sums may come before these are read
    }
  }
  if (p.final_state == nullptr) return;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    *reinterpret_cast<float4*>(p.final_state + state_at + (row0 + i * kRowGroups) * shape.value_dim) = {
        state[i][0], state[i][1], state[i][2], state[i][3]};
  }
}

}  // namespace

void ssd_steps(const SsdSteps& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.shape.batch * a.shape.state_heads),
                  static_cast<unsigned>(a.shape.value_dim / kColumns));
  with_dimensions(a.shape, [&](auto key_dim, auto) {
    if (a.is_float) {
      launch<step_kernel<float, key_dim>>(grid, kThreads, 0, stream, a);
    } else {
      launch<step_kernel<bf16, key_dim>>(grid, kThreads, 0, stream, a);
    }
  });
}

}  // namespace oryx::cuda
