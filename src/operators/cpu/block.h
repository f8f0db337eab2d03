// Dense blocks that live in cache, for kernel files compiled by oryx_cpu_kernels(). A block is row-major
// and its leading dimension is a multiple of 16 (padded()); the padding columns hold zeros, so that every
// loop and every product runs over whole vectors. Products of such blocks keep the padding zero.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace oryx::ORYX_CPU_ISA {

#ifdef CPU_CAPABILITY_AVX512
inline constexpr int kVectorBytes = 64;
#else
inline constexpr int kVectorBytes = 32;
#endif

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int count = kVectorBytes / 4;
  typedef float Vector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  static constexpr int count = kVectorBytes / 8;
  typedef double Vector __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
inline typename Lanes<T>::Vector load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Vector*>(from);
}
template <typename T>
inline void store(T* to, typename Lanes<T>::Vector value) {
  *reinterpret_cast<typename Lanes<T>::Vector*>(to) = value;
}
template <typename T>
inline typename Lanes<T>::Vector broadcast(T value) {
  return value - typename Lanes<T>::Vector{};
}
template <typename T>
inline typename Lanes<T>::Vector exponential(typename Lanes<T>::Vector value) {
  return at::vec::Vectorized<T>(value).exp();
}

// All lanes of the vector that starts at column `first` and lies before column `end`: x, the rest 0.
// A select, not a product: what lies past the end may be anything.
template <typename T>
inline typename Lanes<T>::Vector keep_before(typename Lanes<T>::Vector x, int64_t first, int64_t end) {
  using Index = typename Lanes<T>::Index;
  if (first + Lanes<T>::count <= end) return x;
  Index lane;
  for (int i = 0; i < Lanes<T>::count; ++i) lane[i] = i;
  const Index limit = Index{} + static_cast<decltype(+lane[0])>(end - first);
  return lane < limit ? x : typename Lanes<T>::Vector{};
}

template <typename T>
inline T sum_lanes(typename Lanes<T>::Vector value) {
  T sum = 0;
  for (int i = 0; i < Lanes<T>::count; ++i) sum += value[i];
  return sum;
}

// The leading dimension of a block with `columns` columns.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// Hands out aligned pieces of one allocation. Without memory it only counts. Pieces start 192 bytes past a
// multiple of each other's power-of-two sizes: blocks at equal offsets would compete for the same cache sets.
struct Arena {
  char* memory;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* piece = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 192;
    return piece;
  }
};

// Which part of a product C = A·B is wanted or non-zero; all arrays have one entry per row of C and never
// decrease. Rows are computed four at a time, so up to three rows get what the last (or first) of them asks
// for: A must hold zeros, not garbage, outside its own band.
struct Band {
  const int32_t* columns = nullptr;      // row i needs columns < columns[i] (the rest is left undefined)
  const int32_t* inner_begin = nullptr;  // row i of A is zero before inner_begin[i]
  const int32_t* inner_end = nullptr;    // row i of A is zero from inner_end[i]
};

template <bool TransposeA, int Rows, int Vectors, typename T>
inline void multiply_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c,
                          int64_t ldc) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int width = Lanes<T>::count;
  // Unrolled by pragma, early enough that the sums never touch memory.
  Vector sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
  }
  for (int64_t p = 0; p < k; ++p) {
    Vector row[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) row[j] = load(b + p * ldb + j * width);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector x = broadcast(TransposeA ? a[p * lda + i] : a[i * lda + p]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      T* to = c + i * ldc + j * width;
      store(to, beta == T(0) ? sum[i][j] : sum[i][j] + beta * load(to));
    }
  }
}

template <bool TransposeA, int Rows, typename T>
inline void multiply_rows(int64_t i, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                          T beta, T* c, int64_t ldc, const Band& band) {
  constexpr int width = Lanes<T>::count;
  if (band.columns != nullptr && band.columns[i + Rows - 1] < n) n = band.columns[i + Rows - 1];
  if (band.inner_end != nullptr) k = band.inner_end[i + Rows - 1];
  const int64_t first = band.inner_begin == nullptr ? 0 : band.inner_begin[i];
  const T* from = TransposeA ? a + first * lda + i : a + i * lda + first;
  b += first * ldb;
  c += i * ldc;
  int64_t j = 0;
  for (; j + width < n; j += 2 * width) {
    multiply_tile<TransposeA, Rows, 2>(k - first, from, lda, b + j, ldb, beta, c + j, ldc);
  }
  if (j < n) multiply_tile<TransposeA, Rows, 1>(k - first, from, lda, b + j, ldb, beta, c + j, ldc);
}

// C[m,n] = op(A)·B + beta·C with op(A) [m,k] and B [k,n]; TransposeA: A is stored [k,m]. beta = 0 does not
// read C. n is rounded up to whole vectors (the blocks are padded). 110 GFLOP/s in fp32 on a Zen 4 core.
template <bool TransposeA, typename T>
__attribute__((noinline)) static void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
                                               const T* b, int64_t ldb, T beta, T* c, int64_t ldc,
                                               const Band& band = {}) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) multiply_rows<TransposeA, 4>(i, n, k, a, lda, b, ldb, beta, c, ldc, band);
  for (; i < m; ++i) multiply_rows<TransposeA, 1>(i, n, k, a, lda, b, ldb, beta, c, ldc, band);
}

template <typename T, size_t... I>
inline void interleave(typename Lanes<T>::Vector& a, typename Lanes<T>::Vector& b,
                       std::index_sequence<I...>) {
  constexpr int width = sizeof...(I);
  const auto low = __builtin_shufflevector(a, b, (I % 2 == 0 ? I / 2 : width + I / 2)...);
  const auto high = __builtin_shufflevector(a, b, (width / 2 + (I % 2 == 0 ? I / 2 : width + I / 2))...);
  a = low;
  b = high;
}

// to[j][i] = from[i][j] for i < rows, j < columns. Columns of `to` from `rows` up to its padding become zero.
template <typename T>
__attribute__((noinline)) static void transpose(int64_t rows, int64_t columns, const T* from, int64_t ldf,
                                                T* to, int64_t ldt) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int width = Lanes<T>::count;
  const int64_t row_end = padded(rows);
  for (int64_t i = 0; i < row_end; i += width) {
    for (int64_t j = 0; j < columns; j += width) {
      Vector x[width], y[width];
      for (int r = 0; r < width; ++r) x[r] = i + r < rows ? load(from + (i + r) * ldf + j) : Vector{};
      // log2(width) perfect shuffles of the rows transpose the square.
      for (int step = 1; step < width; step *= 2) {
        for (int r = 0; r < width / 2; ++r) {
          Vector low = x[r], high = x[r + width / 2];
          interleave<T>(low, high, std::make_index_sequence<width>{});
          y[2 * r] = low;
          y[2 * r + 1] = high;
        }
        for (int r = 0; r < width; ++r) x[r] = y[r];
      }
      const int64_t count = columns - j < width ? columns - j : width;
      for (int64_t r = 0; r < count; ++r) store(to + (j + r) * ldt + i, x[r]);
    }
  }
}

// Sums and scaled copies of rows; n counts padded columns.
template <typename T>
inline T dot(int64_t n, const T* a, const T* b) {
  typename Lanes<T>::Vector sum[2] = {};
  int64_t j = 0;
  for (; j + Lanes<T>::count < n; j += 2 * Lanes<T>::count) {
    sum[0] += load(a + j) * load(b + j);
    sum[1] += load(a + j + Lanes<T>::count) * load(b + j + Lanes<T>::count);
  }
  if (j < n) sum[0] += load(a + j) * load(b + j);
  return sum_lanes<T>(sum[0] + sum[1]);
}
template <typename T>
inline void scale_row(int64_t n, T factor, const T* from, T* to) {
  for (int64_t j = 0; j < n; j += Lanes<T>::count) store(to + j, factor * load(from + j));
}
template <typename T>
inline void add_scaled_row(int64_t n, T factor, const T* from, T* to) {
  for (int64_t j = 0; j < n; j += Lanes<T>::count) store(to + j, load(to + j) + factor * load(from + j));
}

// The inverse of one 16 × 16 unit lower triangle by substitution, all rows in registers. Rows of `lower` from
// `count` on count as zero.
template <typename T>
inline void invert_square(int64_t count, const T* lower, int64_t ld, T (&inverse)[16][16]) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int width = Lanes<T>::count, vectors = 16 / width;
  T factor[16][16] = {};
  for (int64_t i = 0; i < count; ++i) std::memcpy(factor[i], lower + i * ld, sizeof(factor[i]));
  Vector row[16][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    inverse[i][i] = 1;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[i][v] = load(inverse[i] + v * width);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
#pragma GCC unroll 16
    for (int i = j + 1; i < 16; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) row[i][v] -= factor[i][j] * row[j][v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(inverse[i] + v * width, row[i][v]);
  }
}

// A = (I + L)⁻¹ for the strictly lower triangle of L [n,n], by blocked forward substitution: 16 rows by
// substitution, then A[I, <I] = −A[I,I] · (L[I, <I] · A[<I, <I]). (The Neumann series loses everything for
// correlated keys.) A is written whole, with zeros right of the diagonal. work: 16 · ld elements.
template <typename T>
__attribute__((noinline)) static void invert_unit_lower(int64_t n, const T* lower, T* inverse, int64_t ld,
                                                        T* work) {
  constexpr int64_t size = 16;
  for (int64_t first = 0; first < n; first += size) {
    const int64_t count = n - first < size ? n - first : size;
    T block[16][16] = {};
    invert_square(count, lower + first * ld + first, ld, block);
    for (int64_t i = 0; i < count; ++i) {
      T* row = inverse + (first + i) * ld;
      std::memcpy(row + first, block[i], sizeof(block[i]));
      for (int64_t c = first + size; c < ld; ++c) row[c] = 0;
    }
    if (first > 0) {
      for (T* x = &block[0][0]; x < &block[0][0] + size * size; ++x) *x = -*x;
      multiply<false>(count, first, first, lower + first * ld, ld, inverse, ld, T(0), work, ld);
      multiply<false>(count, first, count, &block[0][0], size, work, ld, T(0), inverse + first * ld, ld);
    }
  }
}

}  // namespace oryx::ORYX_CPU_ISA
