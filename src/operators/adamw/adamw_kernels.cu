#include "operators/adamw/adamw_kernels.h"

#include "operators/device/pointwise.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 2;  // vectors of a thread whose loads are under way together

static_assert(sizeof(AdamwBatch) <= 4096 && sizeof(SquaresBatch) <= 4096, "the arguments of a launch");

// Elements of a block of adamw_kernel.
template <typename T>
constexpr int adamw_block = kThreads* kAhead* lanes_of<T> * 4;

// The tensor that this block works on: the last whose first block is not past it.
template <typename Batch>
__device__ inline int tensor_of_block(const Batch& p) {
  int low = 0, high = p.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.first_block[middle] <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  return low;
}

template <typename T>
struct AdamwFactors {
  T beta1, rest1, beta2, rest2, eps, scale, step_size, correction, decay;
};

template <typename T>
__device__ inline void update(const AdamwFactors<T>& f, T& p, T g, T& m, T& v) {
  g *= f.scale;
  m = f.beta1 * m + f.rest1 * g;
  v = f.beta2 * v + f.rest2 * g * g;
  p = p * f.decay - f.step_size * m / (::sqrt(v) * f.correction + f.eps);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const AdamwBatch p) {
  constexpr int n = lanes_of<T>;
  const int index = tensor_of_block(p);
  const AdamwTensor& tensor = p.tensor[index];
  T *parameter = static_cast<T*>(tensor.parameter), *first = static_cast<T*>(tensor.first_moment),
    *second = static_cast<T*>(tensor.second_moment);
  const T* gradient = static_cast<const T*>(tensor.gradient);
  double scale = p.gradient_scale;
  if (p.device_scale != nullptr) {
    scale *= p.device_scale_type == Element::float64 ? *static_cast<const double*>(p.device_scale)
                                                     : *static_cast<const float*>(p.device_scale);
  }
  const AdamwFactors<T> factors{
      static_cast<T>(p.beta1),     static_cast<T>(1 - p.beta1),  static_cast<T>(p.beta2),
      static_cast<T>(1 - p.beta2), static_cast<T>(p.eps),        static_cast<T>(scale),
      static_cast<T>(p.step_size), static_cast<T>(p.correction), static_cast<T>(tensor.decay)};
  const int64_t begin = static_cast<int64_t>(blockIdx.x - p.first_block[index]) * adamw_block<T>;
  const int64_t end = begin + adamw_block<T> < tensor.count ? begin + adamw_block<T> : tensor.count;
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool aligned = (address(parameter) | address(gradient) | address(first) | address(second)) % 16 == 0;
  const int64_t whole = aligned ? begin + (end - begin) / n * n : begin;  // the rest goes element by element
  for (int64_t i = begin + threadIdx.x * n; i < whole; i += kAhead * kThreads * n) {
    Vector<T, n> w[kAhead], g[kAhead], m[kAhead], v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = i + k * kThreads * n;
      if (at >= whole) continue;
      g[k] = gradient != nullptr ? load<n>(gradient + at) : Vector<T, n>{};
      w[k] = load<n>(parameter + at);
      m[k] = load<n>(first + at);
      v[k] = load<n>(second + at);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = i + k * kThreads * n;
      if (at >= whole) continue;
#pragma unroll
      for (int e = 0; e < n; ++e) update<T>(factors, w[k][e], g[k][e], m[k][e], v[k][e]);
      store(first + at, m[k]);
      store(second + at, v[k]);
      store(parameter + at, w[k]);
    }
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads)
    update<T>(factors, parameter[i], gradient != nullptr ? gradient[i] : T(0), first[i], second[i]);
}

// The sum of x over the block, in thread 0.
__device__ inline double block_sum(double x) {
  __shared__ double sums[kThreads / 32];
  x = sum_in_warp(x, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const SquaresBatch p) {
  constexpr int n = lanes_of<T>;
  const int index = tensor_of_block(p);
  const T* gradient = static_cast<const T*>(p.tensor[index].gradient);
  const int64_t count = p.tensor[index].count;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - p.first_block[index]) * norm_chunk;
  const int64_t end = begin + norm_chunk < count ? begin + norm_chunk : count;
  const bool aligned = reinterpret_cast<uintptr_t>(gradient) % 16 == 0;
  const int64_t whole = aligned ? begin + (end - begin) / n * n : begin;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * n; i < whole; i += kThreads * n) {
    const Vector<T, n> g = load<n>(gradient + i);
#pragma unroll
    for (int e = 0; e < n; ++e) sum += static_cast<double>(g[e]) * static_cast<double>(g[e]);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    const double g = static_cast<double>(load<1>(gradient + i)[0]);
    sum += g * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) root_kernel(const SquareRoot p) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) sum += p.partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *p.norm = ::sqrt(sum);
}

}  // namespace

void adamw_update(AdamwBatch& batch, void* stream) {
  const auto run = [&]<typename T>() {
    int blocks = 0;
    for (int i = 0; i < batch.tensors; ++i) {
      batch.first_block[i] = blocks;
      blocks += static_cast<int>((batch.tensor[i].count + adamw_block<T> - 1) / adamw_block<T>);
    }
    batch.first_block[batch.tensors] = blocks;
    launch<adamw_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, batch);
  };
  batch.element == Element::float64 ? run.template operator()<double>() : run.template operator()<float>();
}

void sum_squares(SquaresBatch& batch, void* stream) {
  int64_t blocks = 0;
  for (int i = 0; i < batch.tensors; ++i) {
    batch.first_block[i] = static_cast<int>(blocks);
    blocks += norm_blocks_of(batch.tensor[i].count);
  }
  batch.first_block[batch.tensors] = static_cast<int>(blocks);
  with_element(batch.element, [&]<typename T>() {
    launch<squares_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, batch);
  });
}

void root_of_sum(const SquareRoot& arguments, void* stream) {
  launch<root_kernel>(dim3(1), kThreads, 0, stream, arguments);
}

}  // namespace oryx::cuda
