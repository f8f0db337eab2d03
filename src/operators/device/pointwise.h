// What kernels that read every element once are made of: vectors of 16 bytes, their arithmetic type, sums
// over a team of threads, and the functions of the CPU kernels' vectors.h.
#pragma once

#include <type_traits>

#include "operators/device/element.h"
#include "operators/device/mma.h"

namespace oryx::device {

// The accumulate type of operators/activations.h.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int lanes_of = 16 / static_cast<int>(sizeof(T));

// function.operator()<T>() for the C++ type of an element type.
template <typename Function>
void with_element(Element element, Function function) {
  switch (element) {
    case Element::bfloat16:
      return function.template operator()<bf16>();
    case Element::float32:
      return function.template operator()<float>();
    case Element::float64:
      return function.template operator()<double>();
  }
}

// n neighbouring elements as they lie in memory, read and written by one instruction.
template <typename T, int n>
struct alignas(n * sizeof(T)) Raw {
  T value[n];
};
template <int n>
struct alignas(2 * n) Raw<bf16, n> {
  static_assert(n % 2 == 0);
  uint32_t pair[n / 2];
};
template <>
struct Raw<bf16, 1> {
  bf16 value[1];
};

template <typename T, int n>
struct Vector {
  using A = Wide<T>;
  A value[n];
  __device__ A& operator[](int i) { return value[i]; }
  __device__ A operator[](int i) const { return value[i]; }
};

template <int n, typename T>
__device__ inline Raw<T, n> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T, n>*>(from);
}
template <typename T, int n>
__device__ inline Vector<T, n> widen(const Raw<T, n>& raw) {
  Vector<T, n> result;
  if constexpr (std::is_same_v<T, bf16> && n > 1) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float2 pair = unpack(raw.pair[i]);
      result.value[2 * i] = pair.x;
      result.value[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) result.value[i] = static_cast<Wide<T>>(raw.value[i]);
  }
  return result;
}
template <typename T, int n>
__device__ inline Raw<T, n> narrow(const Vector<T, n>& vector) {
  Raw<T, n> raw;
  if constexpr (std::is_same_v<T, bf16> && n > 1) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) raw.pair[i] = pack(vector.value[2 * i], vector.value[2 * i + 1]);
  } else if constexpr (std::is_same_v<T, bf16>) {
    raw.value[0] = __float2bfloat16_rn(vector.value[0]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) raw.value[i] = vector.value[i];
  }
  return raw;
}
template <typename T, int n>
__device__ inline void store_raw(T* to, const Raw<T, n>& raw) {
  *reinterpret_cast<Raw<T, n>*>(to) = raw;
}
template <int n, typename T>
__device__ inline Vector<T, n> load(const T* from) {
  return widen<T, n>(load_raw<n>(from));
}
template <typename T, int n>
__device__ inline void store(T* to, const Vector<T, n>& vector) {
  store_raw<T, n>(to, narrow<T, n>(vector));
}

// n parameters of the accumulate type; n of them are a multiple of 16 bytes, and so is their address.
template <typename T, int n>
__device__ inline Vector<T, n> load_wide(const Wide<T>* from) {
  constexpr int step = lanes_of<Wide<T>>;
  Vector<T, n> result;
#pragma unroll
  for (int i = 0; i < n; i += step) {
    const Raw<Wide<T>, step> raw = load_raw<step>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) result.value[i + j] = raw.value[j];
  }
  return result;
}

// Functions for values that came from elements of T: bfloat16 takes the fast ones (a few ulp of float32).
template <typename T>
__device__ inline Wide<T> exponential(Wide<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __expf(x);
  } else if constexpr (std::is_same_v<T, float>) {
    return ::expf(x);
  } else {
    return ::exp(x);
  }
}
// For x far below zero 0.
template <typename T>
__device__ inline Wide<T> sigmoid(Wide<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return reciprocal_fast(1.0f + exp2_fast(-log2_of_e * x));
  } else {
    return Wide<T>(1) / (Wide<T>(1) + exponential<T>(-x));
  }
}
template <typename T>
__device__ inline Wide<T> silu(Wide<T> x) {
  return x * sigmoid<T>(x);
}
// The derivative of SiLU from s = sigmoid(x).
template <typename A>
__device__ inline A silu_slope(A x, A s) {
  return s * (x * (A(1) - s) + A(1));
}

// 1 / √x, correctly rounded but for the division: one a row, so that it may cost something.
__device__ inline float reciprocal_root(float x) { return 1.0f / ::sqrtf(x); }
__device__ inline double reciprocal_root(double x) { return 1.0 / ::sqrt(x); }

// The sum of x over `lanes` neighbouring lanes of a warp (a power of two ≤ 32), in all of them. Called by
// whole warps.
template <typename A>
__device__ inline A sum_in_warp(A x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// A block cut into teams of `size` neighbouring threads (a power of two ≤ the block's), each of which sums on
// its own. `scratch` is shared memory for 2 · (warps of the block) values of A.
template <typename A>
struct Team {
  int size, index, lane;
  A* scratch;
  int turn = 0;

  __device__ Team(int team_size, A* shared_scratch)
      : size(team_size),
        index(static_cast<int>(threadIdx.x) / team_size),
        lane(static_cast<int>(threadIdx.x) % team_size),
        scratch(shared_scratch) {}

  // The sum over the team, in all its threads. Every thread of the team's warps calls it equally often.
  __device__ A sum(A x) {
    add<1>(&x);
    return x;
  }
  // Two at once; `scratch` holds twice as many values.
  __device__ void sum(A& x, A& y) {
    A values[2] = {x, y};
    add<2>(values);
    x = values[0], y = values[1];
  }

 private:
  template <int count>
  __device__ void add(A* x) {
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = sum_in_warp(x[i], size < 32 ? size : 32);
    if (size <= 32) return;
    const int warps = size / 32, warp = static_cast<int>(threadIdx.x) / 32;
    // Two buffers in turn: whoever writes one again has passed the other's barrier, so that all have read the
    // first.
    A* mine = scratch + turn * count * (static_cast<int>(blockDim.x) / 32);
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (threadIdx.x % 32 == 0) mine[warp * count + i] = x[i];
    }
    named_barrier(1 + index, size);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      x[i] = 0;
      for (int w = 0; w < warps; ++w) x[i] += mine[(index * warps + w) * count + i];
    }
  }
};

// columns[c] = Σ_r rows[r, c] in a fixed order.
template <typename A>
struct ColumnSums {
  const A* rows;
  int64_t count, columns;
  A* sums;
};

// 32 columns a block of 256 threads: eight threads a column take every eighth row, and are added in order.
template <typename A>
__global__ void __launch_bounds__(256) column_sums_kernel(const ColumnSums<A> p) {
  A* parts = reinterpret_cast<A*>(shared_memory());  // [8, 32]
  const int part = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t r = part; r < p.count; r += 8) sum += p.rows[r * p.columns + column];
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || column >= p.columns) return;
  A total = 0;
  for (int i = 0; i < 8; ++i) total += parts[i * 32 + lane];
  p.sums[column] = total;
}

template <typename A>
void column_sums(const ColumnSums<A>& arguments, void* stream) {
  launch<column_sums_kernel<A>>(dim3(static_cast<unsigned>((arguments.columns + 31) / 32)), 256,
                                256 * sizeof(A), stream, arguments);
}

}  // namespace oryx::device
