// Vector helpers for elementwise CPU kernels: one vector of the accumulate type at a time, loaded from and
// rounded to float, double or bfloat16 memory. For files compiled by oryx_cpu_kernels() only.
#pragma once

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake of ours (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdlib>
#include <type_traits>

namespace oryx::ORYX_CPU_ISA {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename A>
using Vec = at::vec::Vectorized<A>;

// How many lanes a load or store touches. Loops end with one partial vector; missing lanes read as zero.
struct Full {};
struct Part {
  int64_t lanes;
};

// Calls body(i, Full) for whole vectors of A in [0, n), then body(i, Part) for what is left.
template <typename A, typename Body>
inline void for_vectors(int64_t n, Body body) {
  constexpr int64_t step = Vec<A>::size();
  int64_t i = 0;
  for (; i + step <= n; i += step) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

inline Vec<float> load(const float* p, Full) { return Vec<float>::loadu(p); }
inline Vec<float> load(const float* p, Part part) { return Vec<float>::loadu(p, part.lanes); }
inline Vec<double> load(const double* p, Full) { return Vec<double>::loadu(p); }
inline Vec<double> load(const double* p, Part part) { return Vec<double>::loadu(p, part.lanes); }
inline Vec<float> load(const c10::BFloat16* p, Full) {
  Vec<float> result;
  at::vec::load_fp32_from_bf16(p, result);
  return result;
}
inline Vec<float> load(const c10::BFloat16* p, Part part) {
  alignas(64) c10::BFloat16 lanes[Vec<float>::size()] = {};
  std::memcpy(lanes, p, part.lanes * sizeof(c10::BFloat16));
  return load(lanes, Full{});
}

template <typename A>
inline void store(A* p, Vec<A> v, Full) {
  v.store(p);
}
template <typename A>
inline void store(A* p, Vec<A> v, Part part) {
  v.store(p, static_cast<int>(part.lanes));
}
inline void store(c10::BFloat16* p, Vec<float> v, Full) {
#ifdef CPU_CAPABILITY_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(v));
#endif
}
inline void store(c10::BFloat16* p, Vec<float> v, Part part) {
  alignas(64) c10::BFloat16 lanes[Vec<float>::size()];
  store(lanes, v, Full{});
  std::memcpy(p, lanes, part.lanes * sizeof(c10::BFloat16));
}

// Sums and maxima over the lanes, in one fixed order.
inline float sum(Vec<float> v) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_reduce_add_ps(v);
#else
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#endif
}
inline double sum(Vec<double> v) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_reduce_add_pd(v);
#else
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
#endif
}
template <typename A>
inline A lane_max(Vec<A> v) {
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  A result = lanes[0];
  for (int i = 1; i < Vec<A>::size(); ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// e^x within 1.5 ulp (Cephes' reduction and polynomial); overflows to inf, underflows to zero, keeps NaN.
// The library's vector exp is a call that spills every register.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
#ifdef CPU_CAPABILITY_AVX512
  const V bounded = _mm512_max_ps(_mm512_set1_ps(-150.f), _mm512_min_ps(_mm512_set1_ps(150.f), x));
  const V n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504088896341f)), 0);
#else
  const V bounded = _mm256_max_ps(_mm256_set1_ps(-150.f), _mm256_min_ps(_mm256_set1_ps(150.f), x));
  const V n = _mm256_round_ps(_mm256_mul_ps(bounded, _mm256_set1_ps(1.44269504088896341f)), 0);
#endif
  const V r = at::vec::fmadd(n, V(2.12194440e-4f), at::vec::fmadd(n, V(-0.693359375f), bounded));
  V p = at::vec::fmadd(V(1.9875691500e-4f), r, V(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, V(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, V(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, V(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, V(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r) + V(1.f);
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors, so that n down to -149 and up to 128 need no special case.
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 high =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(p, low), high);
#endif
}
inline Vec<double> exp(Vec<double> x) { return x.exp(); }

template <typename A>
inline Vec<A> sigmoid(Vec<A> x) {
  return Vec<A>(A(1)) / (Vec<A>(A(1)) + exp(Vec<A>(A(0)) - x));
}

// SiLU and its derivative from s = sigmoid(x). For x far below zero s is 0 and so are both.
template <typename A>
inline Vec<A> silu(Vec<A> x) {
  return x * sigmoid(x);
}
template <typename A>
inline Vec<A> silu_slope(Vec<A> x, Vec<A> s) {
  return s * at::vec::fmadd(x, Vec<A>(A(1)) - s, Vec<A>(A(1)));
}

// Memory of one task, aligned to a cache line, uninitialised.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<A*>(std::aligned_alloc(64, (n * sizeof(A) + 64) / 64 * 64))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// out[i] = Σ_r partials[r, i], rows in order: the sum does not depend on the number of threads.
template <typename A>
inline void sum_rows(const A* partials, int64_t rows, int64_t n, A* out) {
  at::parallel_for(0, n, 4096, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = A(0);
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = partials + r * n;
      for (int64_t i = begin; i < end; ++i) out[i] += row[i];
    }
  });
}

// Calls body.template operator()<T>() for the element type of the tensors.
template <typename Body>
inline void dispatch(at::ScalarType dtype, Body body) {
  if (dtype == at::kDouble) {
    body.template operator()<double>();
  } else if (dtype == at::kFloat) {
    body.template operator()<float>();
  } else {
    body.template operator()<c10::BFloat16>();
  }
}

}  // namespace oryx::ORYX_CPU_ISA
