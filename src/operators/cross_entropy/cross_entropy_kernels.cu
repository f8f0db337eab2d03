#include "operators/cross_entropy/cross_entropy_kernels.h"

#include <algorithm>
#include <cfloat>

#include "operators/device/pointwise.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 4;  // vectors of a thread whose loads are under way together

template <typename A>
constexpr A lowest_value = std::is_same_v<A, double> ? A(-DBL_MAX) : A(-FLT_MAX);

// Σ exp(x − largest) over some values x.
template <typename T>
struct ExponentialSum {
  using A = Wide<T>;
  A largest = lowest_value<A>, sum = 0;

  __device__ void add(const ExponentialSum& other) {
    const A top = other.largest > largest ? other.largest : largest;
    sum = sum * exponential<T>(largest - top) + other.sum * exponential<T>(other.largest - top);
    largest = top;
  }
  template <int n>
  __device__ void add(const Vector<T, n>& x) {
    A top = x[0];
#pragma unroll
    for (int i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
    if (top > largest) {
      sum *= exponential<T>(largest - top);
      largest = top;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) sum += exponential<T>(x[i] - largest);
  }
};

// A block a row. With `cached` the row waits in shared memory, so that the logits are read once.
template <typename T, int n, bool cached>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) row_losses_kernel(const RowLosses p) {
  using A = Wide<T>;
  __shared__ A largest[kWarps], sums[kWarps];
  const int64_t row = blockIdx.x, target = p.targets[row];
  const int columns = static_cast<int>(p.columns), thread = static_cast<int>(threadIdx.x);
  T* logits = static_cast<T*>(p.logits) + row * p.columns;
  A* loss = static_cast<A*>(p.losses) + row;
  if (target < 0 || target >= p.columns) {
    Vector<T, n> fill;
#pragma unroll
    for (int i = 0; i < n; ++i) fill[i] = target < 0 ? A(0) : A(NAN);
    if (thread == 0) *loss = fill[0];
    if (!p.gradient) return;
    for (int c = thread * n; c < columns; c += kThreads * n) store(logits + c, fill);
    return;
  }

  T* kept = cached ? reinterpret_cast<T*>(shared_memory()) : logits;
  // Before anyone overwrites it: the barrier below stands between.
  const A of_target = load<1>(logits + target)[0];
  ExponentialSum<T> own;
  for (int first = thread * n; first < columns; first += kAhead * kThreads * n) {
    Raw<T, n> x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int c = first + k * kThreads * n;
      if (c < columns) x[k] = load_raw<n>(logits + c);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int c = first + k * kThreads * n;
      if (c >= columns) break;
      if constexpr (cached) store_raw<T, n>(kept + c, x[k]);  // read again by this thread only
      own.add(widen<T, n>(x[k]));
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    ExponentialSum<T> other;
    other.largest = __shfl_xor_sync(0xffffffffu, own.largest, mask);
    other.sum = __shfl_xor_sync(0xffffffffu, own.sum, mask);
    own.add(other);
  }
  if (thread % 32 == 0) {
    largest[thread / 32] = own.largest;
    sums[thread / 32] = own.sum;
  }
  __syncthreads();
  ExponentialSum<T> total;
  for (int i = 0; i < kWarps; ++i) {
    ExponentialSum<T> other;
    other.largest = largest[i], other.sum = sums[i];
    total.add(other);
  }
  const A log_sum = total.largest + ::log(total.sum), scale = static_cast<A>(p.scale);
  if (thread == 0) *loss = log_sum - of_target;
  if (!p.gradient) return;
  for (int c = thread * n; c < columns; c += kThreads * n) {
    Vector<T, n> x = load<n>(kept + c);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A probability = exponential<T>(x[i] - log_sum);
      x[i] = (c + i == target ? probability - A(1) : probability) * scale;
    }
    store(logits + c, x);
  }
}

template <typename T, int n>
__global__ void __launch_bounds__(256) scale_kernel(const Scaling p) {
  using A = Wide<T>;
  const A factor = *static_cast<const A*>(p.factor);
  if (factor == A(1)) return;
  T* values = static_cast<T*>(p.values);
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256 * n;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * n; i < p.count; i += step) {
    Vector<T, n> x = load<n>(values + i);
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] *= factor;
    store(values + i, x);
  }
}

// function.operator()<T, n>() with vectors of 16 bytes where rows of `columns` elements allow them.
template <typename Function>
void with_vectors(Element element, const void* pointer, int64_t columns, Function function) {
  with_element(element, [&]<typename T>() {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && columns % lanes_of<T> == 0) {
      function.template operator()<T, lanes_of<T>>();
    } else {
      function.template operator()<T, 1>();
    }
  });
}

}  // namespace

void row_losses(const RowLosses& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.rows));
  const size_t bytes = static_cast<size_t>(p.columns) * bytes_of(p.element);
  const bool cached = p.gradient && bytes + 1024 <= largest_shared_memory();
  with_vectors(p.element, p.logits, p.columns, [&]<typename T, int n>() {
    cached ? launch<row_losses_kernel<T, n, true>>(grid, kThreads, bytes, stream, p)
           : launch<row_losses_kernel<T, n, false>>(grid, kThreads, 0, stream, p);
  });
}

void scale_in_place(const Scaling& p, int multiprocessors, void* stream) {
  with_vectors(p.element, p.values, p.count, [&]<typename T, int n>() {
    const int64_t blocks =
        std::min<int64_t>((p.count + 256 * n - 1) / (256 * n), int64_t{8} * multiprocessors);
    launch<scale_kernel<T, n>>(dim3(static_cast<unsigned>(blocks)), 256, 0, stream, p);
  });
}

}  // namespace oryx::cuda
