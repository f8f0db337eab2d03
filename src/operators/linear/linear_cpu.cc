#include "operators/linear/linear_cpu.h"

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

using operators::FewRows;

// Dot products of `kOutputs` neighbouring weight rows with `kRows` inputs. Every dot product sums in the same
// order (one vector of partial sums over the columns, then its lanes), so a result depends on neither number.
template <typename T, int kOutputs, int kRows>
static void dot_block(const T* weight, int64_t inputs, const T* const* x, Acc<T>* sums) {
  using A = Acc<T>;
  using V = Vec<A>;
  V total[kOutputs][kRows];
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) total[o][r] = V(A(0));
  }
  for_vectors<A>(inputs, [&](int64_t i, auto lanes) {
    V row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = load(x[r] + i, lanes);
    for (int o = 0; o < kOutputs; ++o) {
      const V w = load(weight + o * inputs + i, lanes);
      for (int r = 0; r < kRows; ++r) total[o][r] = at::vec::fmadd(w, row[r], total[o][r]);
    }
  });
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) sums[o * kRows + r] = sum(total[o][r]);
  }
}

template <typename T, int kOutputs, int kRows>
static void block(const FewRows& product, const T* x, int64_t inputs, int64_t output, int64_t first_row) {
  const T* pointers[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = product.rows ? product.rows[first_row + r] : first_row + r;
    pointers[r] = x + row * inputs;
  }
  Acc<T> sums[kOutputs * kRows];
  dot_block<T, kOutputs, kRows>(static_cast<const T*>(product.weight) + output * inputs, inputs, pointers,
                                sums);
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) {
      static_cast<T*>(product.y)[(first_row + r) * product.outputs + output + o] =
          static_cast<T>(sums[o * kRows + r]);
    }
  }
}

template <typename T, int kOutputs>
static void output_block(const FewRows& product, const T* x, int64_t inputs, int64_t output) {
  int64_t row = 0;
  for (; row + 4 <= product.count; row += 4) block<T, kOutputs, 4>(product, x, inputs, output, row);
  for (; row < product.count; ++row) block<T, kOutputs, 1>(product, x, inputs, output, row);
}

template <typename T>
static void few_rows(const T* x, int64_t inputs, const FewRows* products, int64_t count) {
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

void linear_few_rows(at::ScalarType dtype, const void* x, int64_t inputs, const FewRows* products,
                     int64_t count) {
  dispatch(dtype, [&]<typename T>() { few_rows(static_cast<const T*>(x), inputs, products, count); });
}

// Threads share the columns: rows may repeat, and each sum keeps its order.
template <typename A>
static void add_rows(const A* from, const int64_t* rows, int64_t count, int64_t columns, A* to) {
  constexpr int64_t kColumns = 64;
  at::parallel_for(0, (columns + kColumns - 1) / kColumns, 131072 / (count * kColumns + 1) + 1,
                   [&](int64_t begin, int64_t end) {
                     const int64_t first = begin * kColumns, last = std::min(end * kColumns, columns);
                     for (int64_t r = 0; r < count; ++r) {
                       const A* source = from + r * columns + first;
                       A* target = to + rows[r] * columns + first;
                       for_vectors<A>(last - first, [&](int64_t i, auto lanes) {
                         store(target + i, load(target + i, lanes) + load(source + i, lanes), lanes);
                       });
                     }
                   });
}

void linear_add_rows(at::ScalarType dtype, const void* from, const int64_t* rows, int64_t count,
                     int64_t columns, void* to) {
  if (dtype == at::kDouble) {
    add_rows(static_cast<const double*>(from), rows, count, columns, static_cast<double*>(to));
  } else {
    add_rows(static_cast<const float*>(from), rows, count, columns, static_cast<float*>(to));
  }
}

}  // namespace oryx::ORYX_CPU_ISA
