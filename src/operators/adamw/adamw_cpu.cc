#include "operators/adamw/adamw_cpu.h"

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

template <typename A>
static void update(const operators::AdamwChunk& chunk, const operators::AdamwFactors& f) {
  using V = Vec<A>;
  A* p = static_cast<A*>(chunk.parameter);
  const A* g = static_cast<const A*>(chunk.gradient);
  A *m = static_cast<A*>(chunk.first_moment), *v = static_cast<A*>(chunk.second_moment);
  const V scale(static_cast<A>(f.gradient_scale)), decay(static_cast<A>(chunk.decay));
  const V beta1(static_cast<A>(f.beta1)), rest1(static_cast<A>(1 - f.beta1));
  const V beta2(static_cast<A>(f.beta2)), rest2(static_cast<A>(1 - f.beta2));
  const V correction(static_cast<A>(f.correction)), eps(static_cast<A>(f.eps)),
      step(static_cast<A>(f.step_size));
  for_vectors<A>(chunk.count, [&](int64_t i, auto lanes) {
    V first = load(m + i, lanes) * beta1, second = load(v + i, lanes) * beta2;
    if (g != nullptr) {
      const V gradient = load(g + i, lanes) * scale;
      first = at::vec::fmadd(rest1, gradient, first);
      second = at::vec::fmadd(rest2 * gradient, gradient, second);
    }
    const V denominator = at::vec::fmadd(second.sqrt(), correction, eps);
    store(m + i, first, lanes);
    store(v + i, second, lanes);
    store(p + i, load(p + i, lanes) * decay - step * first / denominator, lanes);
  });
}

void adamw_update(const operators::AdamwChunk* chunks, int64_t count,
                  const operators::AdamwFactors& factors) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      chunks[i].dtype == at::kDouble ? update<double>(chunks[i], factors) : update<float>(chunks[i], factors);
    }
  });
}

template <typename T>
static double squares(const T* g, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    const double value = static_cast<double>(g[i]);
    total += value * value;
  }
  return total;
}

void sum_squares(operators::NormChunk* chunks, int64_t count) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dispatch(chunks[i].dtype, [&]<typename T>() {
        chunks[i].sum = squares(static_cast<const T*>(chunks[i].gradient), chunks[i].count);
      });
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
