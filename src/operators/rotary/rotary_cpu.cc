#include "operators/rotary/rotary_cpu.h"

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

template <typename T>
static void rotate_rows(const operators::RotaryArguments& a) {
  using A = Acc<T>;
  const int64_t half = a.dim / 2, width = a.heads * a.dim;
  const Vec<A> sign(a.backwards ? A(-1) : A(1));
  at::parallel_for(0, a.batch * a.time, 16384 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = static_cast<const T*>(a.x) + r / a.time * a.batch_stride + r % a.time * a.time_stride;
      const A* cosine = static_cast<const A*>(a.cosine) + r % a.table_rows * half;
      const A* sine = static_cast<const A*>(a.sine) + r % a.table_rows * half;
      for (int64_t h = 0; h < a.heads; ++h) {
        const T* x = row + h * a.head_stride;
        T* y = static_cast<T*>(a.y) + r * width + h * a.dim;
        for_vectors<A>(half, [&](int64_t i, auto lanes) {
          const Vec<A> low = load(x + i, lanes), high = load(x + half + i, lanes);
          const Vec<A> c = load(cosine + i, lanes), s = load(sine + i, lanes) * sign;
          store(y + i, at::vec::fmsub(low, c, high * s), lanes);
          store(y + half + i, at::vec::fmadd(high, c, low * s), lanes);
        });
      }
    }
  });
}

void rotate(const operators::RotaryArguments& a) {
  dispatch(a.dtype, [&]<typename T>() { rotate_rows<T>(a); });
}

}  // namespace oryx::ORYX_CPU_ISA
