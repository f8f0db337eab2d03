#include "operators/cross_entropy/cross_entropy_cpu.h"

#include <cmath>
#include <limits>

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

template <typename T>
static void softmax_loss_rows(const operators::SoftmaxLoss& a) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t step = V::size();
  at::parallel_for(0, a.rows, 16384 / a.columns + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* logits = static_cast<T*>(a.logits) + r * a.columns;
      A* loss = static_cast<A*>(a.losses) + r;
      const int64_t target = a.targets[r];
      if (target < 0) {
        *loss = A(0);
        if (a.gradient) std::memset(static_cast<void*>(logits), 0, a.columns * sizeof(T));
        continue;
      }
      // The lanes past the end would count as zeros: the columns of the last partial vector go one by one.
      V maxima(-std::numeric_limits<A>::infinity());
      const int64_t whole = a.columns / step * step;
      for (int64_t i = 0; i < whole; i += step) maxima = at::vec::maximum(maxima, load(logits + i, Full{}));
      A largest = lane_max(maxima);
      for (int64_t i = whole; i < a.columns; ++i)
        largest = static_cast<A>(logits[i]) > largest ? static_cast<A>(logits[i]) : largest;

      V sums[2] = {V(A(0)), V(A(0))};
      for (int64_t i = 0; i < whole; i += step)
        sums[i / step % 2] = sums[i / step % 2] + exp(load(logits + i, Full{}) - V(largest));
      A total = sum(sums[0] + sums[1]);
      for (int64_t i = whole; i < a.columns; ++i) total += std::exp(static_cast<A>(logits[i]) - largest);

      const A log_sum = largest + std::log(total);
      *loss = log_sum - static_cast<A>(logits[target]);
      if (!a.gradient) continue;
      const A scale = static_cast<A>(a.scale);
      const A of_target = (std::exp(static_cast<A>(logits[target]) - log_sum) - A(1)) * scale;
      for_vectors<A>(a.columns, [&](int64_t i, auto lanes) {
        store(logits + i, exp(load(logits + i, lanes) - V(log_sum)) * V(scale), lanes);
      });
      logits[target] = static_cast<T>(of_target);
    }
  });
}

void softmax_loss(const operators::SoftmaxLoss& a) {
  dispatch(a.dtype, [&]<typename T>() { softmax_loss_rows<T>(a); });
}

}  // namespace oryx::ORYX_CPU_ISA
