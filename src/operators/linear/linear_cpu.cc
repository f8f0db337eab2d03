#include "operators/linear/linear_cpu.h"

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

using operators::FewRows;

// The weight is read a few rows side by side, which hides from the hardware that it is one stream of memory;
// so it is asked for in order, this far ahead, into the second-level cache. (Assembly: GCC 12 drops loops
// that only hold its prefetch.)
constexpr int64_t kAheadBytes = 16384;

template <int64_t kBytes>
static inline void fetch_ahead(const void* stream) {
  const char* ahead = static_cast<const char*>(stream) + kAheadBytes;
  for (int64_t byte = 0; byte < kBytes; byte += 64) asm volatile("prefetcht1 %0" : : "m"(ahead[byte]));
}

// Dot products of `kOutputs` neighbouring weight rows with `kRows` inputs. Every dot product sums in the same
// order (one vector of partial sums over the columns, its lanes, what is left), so a result depends on
// neither number.
template <typename T, int kOutputs, int kRows, bool kFetch>
static void dot_block(const T* weight, int64_t inputs, const Acc<T>* const* x, Acc<T>* sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t step = V::size();
  // All loops over outputs and rows unroll: the totals must live in registers.
  V total[kOutputs][kRows];
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[o][r] = V(A(0));
  }
  int64_t i = 0;
  for (; i + step <= inputs; i += step) {
    if constexpr (kFetch) fetch_ahead<kOutputs * step * sizeof(T)>(weight + i * kOutputs);
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const V w = load(weight + o * inputs + i, Full{});
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) total[o][r] = at::vec::fmadd(w, V::loadu(x[r] + i), total[o][r]);
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[o * kRows + r] = sum(total[o][r]);
  }
  if (i == inputs) return;
  for (int o = 0; o < kOutputs; ++o) {
    const V w = load(weight + o * inputs + i, Part{inputs - i});
    for (int r = 0; r < kRows; ++r) sums[o * kRows + r] += sum(w * load(x[r] + i, Part{inputs - i}));
  }
}

template <typename T, int kOutputs, int kRows, bool kFetch>
static void block(const FewRows& product, const Acc<T>* x, int64_t inputs, int64_t output,
                  int64_t first_row) {
  const Acc<T>* pointers[kRows];
  for (int r = 0; r < kRows; ++r) pointers[r] = x + (product.first + first_row + r) * inputs;
  Acc<T> sums[kOutputs * kRows];
  const T* weight = static_cast<const T*>(product.weight) + output * inputs;
  dot_block<T, kOutputs, kRows, kFetch>(weight, inputs, pointers, sums);
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) {
      static_cast<T*>(product.y)[(first_row + r) * product.outputs + output + o] =
          static_cast<T>(sums[o * kRows + r]);
    }
  }
}

template <typename T, int kOutputs>
static void output_block(const FewRows& product, const Acc<T>* x, int64_t inputs, int64_t output) {
  int64_t row = 0;
  if (product.count >= 4) {
    block<T, kOutputs, 4, true>(product, x, inputs, output, 0);
    row = 4;
  } else if (product.count > 0) {
    block<T, kOutputs, 1, true>(product, x, inputs, output, 0);
    row = 1;
  }
  for (; row + 4 <= product.count; row += 4) block<T, kOutputs, 4, false>(product, x, inputs, output, row);
  for (; row < product.count; ++row) block<T, kOutputs, 1, false>(product, x, inputs, output, row);
}

template <typename T>
static void few_rows(const Acc<T>* x, int64_t inputs, const FewRows* products, int64_t count) {
  constexpr int kOutputs = 4;  // weight rows read side by side
  int64_t blocks = 0;
  for (int64_t p = 0; p < count; ++p) blocks += (products[p].outputs + kOutputs - 1) / kOutputs;
  at::parallel_for(0, blocks, 32768 / (inputs * kOutputs) + 1, [&](int64_t begin, int64_t end) {
    int64_t start = 0;  // the first block of product p
    for (int64_t p = 0; p < count && start < end; ++p) {
      const FewRows& product = products[p];
      const int64_t own = (product.outputs + kOutputs - 1) / kOutputs;
      const int64_t from = std::max(begin - start, int64_t{0}), to = std::min(end - start, own);
      for (int64_t b = from; b < to; ++b) {
        const int64_t output = b * kOutputs;
        if (output + kOutputs <= product.outputs) {
          output_block<T, kOutputs>(product, x, inputs, output);
        } else {
          for (int64_t o = output; o < product.outputs; ++o) output_block<T, 1>(product, x, inputs, o);
        }
      }
      start += own;
    }
  });
}

void linear_few_rows(at::ScalarType dtype, const void* x, int64_t rows, int64_t inputs,
                     const FewRows* products, int64_t count) {
  dispatch(dtype, [&]<typename T>() {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      few_rows<T>(static_cast<const T*>(x), inputs, products, count);
    } else {
      // Every weight row meets every row of x: widen those once.
      Scratch<float> wide(rows * inputs);
      for_vectors<float>(rows * inputs, [&](int64_t i, auto lanes) {
        store(wide.get() + i, load(static_cast<const T*>(x) + i, lanes), lanes);
      });
      few_rows<T>(wide.get(), inputs, products, count);
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
