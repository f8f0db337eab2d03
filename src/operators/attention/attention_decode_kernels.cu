// Decoding: one row against a long cache, at memory speed. A block of threads reads a split of the keys of
// one key head for all query heads of its group; a second kernel joins the splits. How the keys are split
// depends on the row's position alone, so that its neighbours change no bit of it.
#include <cmath>

#include "operators/attention/attention_kernels.h"
#include "operators/device/mma.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;      // keys that a thread has under way
constexpr int kMostHeads = 8;  // query heads of one pass over the keys

// 16 bytes as float32.
__device__ inline void unpack16(const uint4& bits, float (&x)[8]) {
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ inline void unpack16(const uint4& bits, float (&x)[4]) {
  x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
  x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
}

__device__ inline void round_to(float x, float* target) { *target = x; }
__device__ inline void round_to(float x, bf16* target) { *target = __float2bfloat16_rn(x); }

// 2^(x − largest), and 0 where there is nothing yet.
__device__ inline float weight_of(float x, float largest) {
  return largest == -INFINITY ? 0.0f : exp2_fast(x - largest);
}

template <typename T, int dim, int heads>
__global__ void __launch_bounds__(kThreads) attention_decode_kernel(const AttentionDecode p) {
  constexpr int per = 16 / static_cast<int>(sizeof(T)), lanes = dim / per;  // of one key
  constexpr int slots = kThreads / lanes;                                   // keys side by side
  const int group = p.in.query_heads / p.in.key_heads, passes = (group + heads - 1) / heads;
  const int pass = static_cast<int>(blockIdx.x % passes),
            key_head = static_cast<int>(blockIdx.x / passes % p.in.key_heads);
  const int64_t split_index = blockIdx.x / passes / p.in.key_heads;
  const DecodeSplit split = p.splits[split_index];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32,
            column = thread % lanes * per, slot = thread / lanes;
  const int head0 = key_head * group + pass * heads,
            count = group - pass * heads;  // heads of this pass, at most
  const T* const keys = static_cast<const T*>(p.in.key) + split.sequence * p.in.key_strides[0] +
                        key_head * p.in.key_strides[2] + column;
  const T* const values = static_cast<const T*>(p.in.value) + split.sequence * p.in.value_strides[0] +
                          key_head * p.in.value_strides[2] + column;

  float query[heads][per], output[heads][per], largest[heads], sum[heads];
#pragma unroll
  for (int h = 0; h < heads; ++h) {
    const bool valid = h < count;
    const T* const row =
        static_cast<const T*>(p.in.query) +
        (static_cast<int64_t>(split.row) * p.in.query_heads + head0 + (valid ? h : 0)) * dim + column;
    unpack16(*reinterpret_cast<const uint4*>(row), query[h]);
    largest[h] = -INFINITY, sum[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < per; ++i) query[h][i] *= p.in.scale * log2_of_e, output[h][i] = 0.0f;
  }

  for (int key0 = split.begin; key0 < split.end; key0 += kAhead * slots) {
    uint4 key[kAhead], value[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = key0 + u * slots + slot;
      key[u] = value[u] = {0, 0, 0, 0};
      if (at < split.end) {
        key[u] = *reinterpret_cast<const uint4*>(keys + at * p.in.key_strides[1]);
        value[u] = *reinterpret_cast<const uint4*>(values + at * p.in.value_strides[1]);
      }
    }
    float score[kAhead][heads];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float k[per];
      unpack16(key[u], k);
#pragma unroll
      for (int h = 0; h < heads; ++h) {
        float x = 0.0f;
#pragma unroll
        for (int i = 0; i < per; ++i) x += query[h][i] * k[i];
        x = sum_over_lanes<lanes>(x);
        score[u][h] = key0 + u * slots + slot < split.end ? x : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < heads; ++h) {
      float raised = largest[h];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) raised = fmaxf(raised, score[u][h]);
      const float factor = weight_of(largest[h], raised);
      largest[h] = raised;
      sum[h] *= factor;
#pragma unroll
      for (int i = 0; i < per; ++i) output[h][i] *= factor;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        score[u][h] = weight_of(score[u][h], raised);
        sum[h] += score[u][h];
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float v[per];
      unpack16(value[u], v);
#pragma unroll
      for (int h = 0; h < heads; ++h)
#pragma unroll
        for (int i = 0; i < per; ++i) output[h][i] += score[u][h] * v[i];
    }
  }

  // Join the keys of a warp, then the warps.
  auto* const shared = reinterpret_cast<float*>(shared_memory());  // [warps, heads, dim + 2]
#pragma unroll
  for (int h = 0; h < heads; ++h) {
    float raised = largest[h];
#pragma unroll
    for (int mask = lanes; mask < 32; mask *= 2)
      raised = fmaxf(raised, __shfl_xor_sync(0xffffffffu, raised, mask));
    const float factor = weight_of(largest[h], raised);
    sum[h] *= factor;
#pragma unroll
    for (int i = 0; i < per; ++i) output[h][i] *= factor;
#pragma unroll
    for (int mask = lanes; mask < 32; mask *= 2) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], mask);
#pragma unroll
      for (int i = 0; i < per; ++i) output[h][i] += __shfl_xor_sync(0xffffffffu, output[h][i], mask);
    }
    float* const own = shared + (warp * heads + h) * (dim + 2);
    if (lane < lanes) {
#pragma unroll
      for (int i = 0; i < per; ++i) own[column + i] = output[h][i];
    }
    if (lane == 0) own[dim] = raised, own[dim + 1] = sum[h];
  }
  __syncthreads();
  for (int h = 0; h < heads && h < count; ++h) {
    const auto of = [&](int w, int i) { return shared[(w * heads + h) * (dim + 2) + i]; };
    float raised = -INFINITY;
    for (int w = 0; w < kWarps; ++w) raised = fmaxf(raised, of(w, dim));
    float* const partial = p.partials + (split_index * p.in.query_heads + head0 + h) * (dim + 2);
    for (int i = thread; i < dim + 2; i += kThreads) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += weight_of(of(w, dim), raised) * of(w, i);
      partial[i] = i == dim ? raised : total;
    }
  }
}

constexpr int kJoinThreads = 256;

// One block per row and head; groups of `dim` threads take the splits in turn.
template <typename T, int dim>
__global__ void __launch_bounds__(kJoinThreads) attention_join_kernel(const AttentionDecode p) {
  constexpr int groups = kJoinThreads / dim;
  const int head = static_cast<int>(blockIdx.x % p.in.query_heads),
            column = static_cast<int>(threadIdx.x) % dim, group = static_cast<int>(threadIdx.x) / dim;
  const DecodeRow row = p.rows[blockIdx.x / p.in.query_heads];
  const int64_t step = static_cast<int64_t>(p.in.query_heads) * (dim + 2);
  const float* const partial = p.partials + row.first_split * step + head * (dim + 2);
  auto* const shared = reinterpret_cast<float*>(shared_memory());  // [groups, dim + 1]
  static_assert(kMostSplits == 64);                                // two for each lane
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMostSplits; i += 32)
    if (lane + i < row.splits) largest = fmaxf(largest, partial[(lane + i) * step + dim]);
  largest = max_over_lanes<32>(largest);

  float sum = 0.0f, output = 0.0f;
#pragma unroll 8
  for (int i = group; i < row.splits; i += groups) {
    const float weight = exp2_fast(partial[i * step + dim] - largest);
    sum += weight * partial[i * step + dim + 1];
    output += weight * partial[i * step + column];
  }
  shared[group * (dim + 1) + column] = output;
  if (column == 0) shared[group * (dim + 1) + dim] = sum;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < groups; ++g) {
    output += shared[g * (dim + 1) + column];
    sum += shared[g * (dim + 1) + dim];
  }
  const int64_t index = static_cast<int64_t>(row.row) * p.in.query_heads + head;
  round_to(output / sum, static_cast<T*>(p.output) + index * dim + column);
  if (p.logsumexp && column == 0) p.logsumexp[index] = largest / log2_of_e + logf(sum);
}

template <typename T, int dim, int heads>
void run_pass(const AttentionDecode& p, void* stream) {
  const int group = p.in.query_heads / p.in.key_heads, passes = (group + heads - 1) / heads;
  launch<attention_decode_kernel<T, dim, heads>>(
      dim3(static_cast<unsigned>(p.split_count * p.in.key_heads * passes)), kThreads,
      sizeof(float) * kWarps * heads * (dim + 2), stream, p);
}

template <typename T, int dim>
void run(const AttentionDecode& p, void* stream) {
  const int group = p.in.query_heads / p.in.key_heads;
  if (group == 1) {
    run_pass<T, dim, 1>(p, stream);
  } else if (group == 2) {
    run_pass<T, dim, 2>(p, stream);
  } else if (group <= 4) {
    run_pass<T, dim, 4>(p, stream);
  } else {
    run_pass<T, dim, kMostHeads>(p, stream);
  }
  launch<attention_join_kernel<T, dim>>(dim3(static_cast<unsigned>(p.row_count * p.in.query_heads)),
                                        kJoinThreads, sizeof(float) * (kJoinThreads / dim) * (dim + 1),
                                        stream, p);
}

}  // namespace

void attention_decode(const AttentionDecode& arguments, void* stream) {
  if (arguments.is_float32) {
    arguments.in.dim == 128 ? run<float, 128>(arguments, stream) : run<float, 64>(arguments, stream);
  } else {
    arguments.in.dim == 128 ? run<bf16, 128>(arguments, stream) : run<bf16, 64>(arguments, stream);
  }
}

}  // namespace oryx::cuda
