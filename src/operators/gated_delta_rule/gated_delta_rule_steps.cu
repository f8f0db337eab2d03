// Token by token, for decoding: bound by reading and writing the state once.
#include "operators/gated_delta_rule/gated_delta_rule_device.h"

namespace oryx::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 32;  // columns of the state that belong to a block of threads

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(bf16& to, float x) { to = __float2bfloat16_rn(x); }

__device__ inline void add_scaled(float4& sum, float factor, const float4& x) {
  sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
}

// A thread holds 4 columns of every 32nd row.
template <int key_dim>
struct StepState {
  static constexpr int rows = key_dim / 32;
  float4 value[rows];

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / 8 + 32 * i; }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % 8 * 4; }

  // vector · S for the thread's columns, in all threads; `vector` and `partial` (8 · kColumns) lie in shared
  // memory.
  __device__ float4 product(const float* vector, float* partial) const {
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < rows; ++i) add_scaled(sum, vector[row(i)], value[i]);
    for (int mask = 8; mask < 32; mask *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, mask);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, mask);
      sum.z += __shfl_xor_sync(0xffffffffu, sum.z, mask);
      sum.w += __shfl_xor_sync(0xffffffffu, sum.w, mask);
    }
    __syncthreads();  // the last use of `partial` is over
    if (threadIdx.x % 32 < 8)
      *reinterpret_cast<float4*>(partial + threadIdx.x / 32 * kColumns + column()) = sum;
    __syncthreads();
    float4 total{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      add_scaled(total, 1.0f, *reinterpret_cast<const float4*>(partial + warp * kColumns + column()));
    }
    return total;
  }
};

template <typename Element, int key_dim>
__global__ void __launch_bounds__(kThreads) steps_kernel(const GatedDeltaArguments p) {
  __shared__ __align__(16) float key[128], query[128], partial[kThreads / 32 * kColumns];
  const int parts = p.value_dim / kColumns, thread = static_cast<int>(threadIdx.x);
  const int64_t stream = static_cast<int64_t>(blockIdx.x) / parts;
  const Block block(p, stream, 0);
  const int32_t* rows = block.row_table(p);
  const int readers = p.output_heads / p.state_heads;
  StepState<key_dim> state;
  const int column = static_cast<int>(blockIdx.x) % parts * kColumns + state.column();
  const int64_t state_at = stream * key_dim * p.value_dim + column;
  const int64_t first = p.initial_rows == nullptr
                            ? stream
                            : p.initial_rows[stream / p.state_heads] * p.state_heads + block.head;
  const float* initial = p.initial_state + first * key_dim * p.value_dim + column;
#pragma unroll
  for (int i = 0; i < state.rows; ++i) {
    state.value[i] = p.initial_state == nullptr
                         ? float4{0.0f, 0.0f, 0.0f, 0.0f}
                         : *reinterpret_cast<const float4*>(initial + state.row(i) * p.value_dim);
  }
  const auto row_of = [](const GatedDeltaRows& x, int64_t batch, int64_t time, int head) {
    return static_cast<Element*>(x.data) + batch * x.batch + time * x.time + head * x.head;
  };
  for (int t = 0; t < block.valid; ++t) {
    const Element* key_row = row_of(p.key, block.batch, t, block.head / (p.state_heads / p.key_heads));
    const Element* value_row = row_of(p.value, block.batch, t, block.head) + column;
    const int64_t at = (block.token(p) + t) * p.state_heads + block.head;
    const float decay = exp2_fast(p.log_decay[at] * log2_of_e), beta = p.beta[at];
    float4 update{wide(value_row[0]), wide(value_row[1]), wide(value_row[2]), wide(value_row[3])};
    const int packed = rows[t];
    __syncthreads();  // the last token's key has been read
    if (thread < key_dim) key[thread] = wide(key_row[thread]);
    __syncthreads();
    const float4 read = state.product(key, partial);
    update = {beta * (update.x - decay * read.x), beta * (update.y - decay * read.y),
              beta * (update.z - decay * read.z), beta * (update.w - decay * read.w)};
#pragma unroll
    for (int i = 0; i < state.rows; ++i) {
      float4& s = state.value[i];
      s = {decay * s.x, decay * s.y, decay * s.z, decay * s.w};
      add_scaled(s, key[state.row(i)], update);
    }
    if (packed < 0) continue;
    for (int reader = 0; reader < readers; ++reader) {
      const int head = block.head * readers + reader;
      const Element* query_row = row_of(p.query, 0, packed, head / (p.output_heads / p.query_heads));
      __syncthreads();
      if (thread < key_dim) query[thread] = p.scale * wide(query_row[thread]);
      __syncthreads();
      const float4 output = state.product(query, partial);
      if (thread < 8) {
        Element* to = row_of(p.output, 0, packed, head) + column;
        narrow(to[0], output.x), narrow(to[1], output.y), narrow(to[2], output.z), narrow(to[3], output.w);
      }
    }
  }
  if (p.final_state == nullptr) return;
#pragma unroll
  for (int i = 0; i < state.rows; ++i) {
    *reinterpret_cast<float4*>(p.final_state + state_at + state.row(i) * p.value_dim) = state.value[i];
  }
}

template <typename Element>
void steps(const GatedDeltaArguments& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.batch * p.state_heads * (p.value_dim / kColumns)));
  if (p.key_dim == 128) {
    launch<steps_kernel<Element, 128>>(grid, kThreads, 0, stream, p);
  } else {
    launch<steps_kernel<Element, 64>>(grid, kThreads, 0, stream, p);
  }
}

}  // namespace

void gated_delta_steps(const GatedDeltaArguments& p, bool wide, void* stream) {
  wide ? steps<float>(p, stream) : steps<bf16>(p, stream);
}

}  // namespace oryx::cuda
