#include "operators/gated_norm/gated_norm_cpu.h"

#include <cmath>

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

using operators::NormBackward;
using operators::NormForward;
using operators::NormMode;

// Rows that make a task worth handing to a thread.
static int64_t row_grain(int64_t channels) { return 16384 / channels + 1; }

template <typename T>
static void product_forward(const NormForward& a) {
  using A = Acc<T>;
  at::parallel_for(0, a.rows, row_grain(a.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
      const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride;
      T* y = static_cast<T*>(a.y) + r * a.channels;
      for_vectors<A>(a.channels, [&](int64_t i, auto lanes) {
        store(y + i, load(x + i, lanes) * silu(load(gate + i, lanes)), lanes);
      });
    }
  });
}

template <typename T>
static void product_backward(const NormBackward& a) {
  using A = Acc<T>;
  at::parallel_for(0, a.rows, row_grain(a.channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
      const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride;
      const int64_t row = r * a.channels;
      const T* dy = static_cast<const T*>(a.dy) + row;
      T *dx = static_cast<T*>(a.dx) + row, *dgate = static_cast<T*>(a.dgate) + row;
      for_vectors<A>(a.channels, [&](int64_t i, auto lanes) {
        const Vec<A> g = load(gate + i, lanes), s = sigmoid(g), d = load(dy + i, lanes);
        store(dx + i, d * g * s, lanes);
        store(dgate + i, d * load(x + i, lanes) * silu_slope(g, s), lanes);
      });
    }
  });
}

template <typename T, NormMode mode, bool add>
static void norm_forward(const NormForward& a) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t n = a.group, groups = a.channels / n;
  at::parallel_for(0, a.rows, row_grain(a.channels), [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(n);
    A* u = scratch.get();  // what is normalised, in the accumulate type
    for (int64_t item = begin * groups; item < end * groups; ++item) {
      const int64_t r = item / groups, c = item % groups * n;
      const T* x = static_cast<const T*>(a.x) + r * a.x_stride + c;
      const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride + c;
      const T* update = static_cast<const T*>(a.update) + r * a.update_stride + c;
      T* total = static_cast<T*>(a.sum) + r * a.channels + c;
      T* y = static_cast<T*>(a.y) + r * a.channels + c;
      V squares(A(0));
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        V v = load(x + i, lanes);
        if constexpr (add) {
          store(total + i, v + load(update + i, lanes), lanes);
          v = load(total + i, lanes);  // as rounded, so that backward sees the same
        }
        if constexpr (mode == NormMode::gate_norm) v = v * silu(load(gate + i, lanes));
        store(u + i, v, lanes);
        squares = at::vec::fmadd(v, v, squares);
      });
      const A rstd = A(1) / std::sqrt(sum(squares) / static_cast<A>(n) + static_cast<A>(a.eps));
      if (a.rstd != nullptr) static_cast<A*>(a.rstd)[item] = rstd;
      for_vectors<A>(n, [&](int64_t i, auto lanes) {
        V v = load(u + i, lanes) * V(rstd) * load(weight + i, lanes);
        if constexpr (mode == NormMode::norm_gate) v = v * silu(load(gate + i, lanes));
        store(y + i, v, lanes);
      });
    }
  });
}

// With u the normalised input, n = u·rstd and e = dL/dn:  du = rstd · (e − n · mean(e ⊙ n)).
template <typename T, NormMode mode, bool add>
static void norm_backward(const NormBackward& a) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A* weight = static_cast<const A*>(a.weight);
  const int64_t n = a.group, groups = a.channels / n;
  const int64_t blocks = (a.rows + a.rows_per_block - 1) / a.rows_per_block;
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    Scratch<A> scratch(3 * n);
    A *e = scratch.get(), *silus = e + n, *slopes = silus + n;
    for (int64_t block = first; block < last; ++block) {
      A* dweight = static_cast<A*>(a.partials) + block * n;
      for (int64_t i = 0; i < n; ++i) dweight[i] = A(0);
      const int64_t begin = block * a.rows_per_block, end = std::min(a.rows, begin + a.rows_per_block);
      for (int64_t item = begin * groups; item < end * groups; ++item) {
        const int64_t r = item / groups, c = item % groups * n, at = r * a.channels + c;
        const T* x = static_cast<const T*>(a.x) + r * a.x_stride + c;
        const T* gate = static_cast<const T*>(a.gate) + r * a.gate_stride + c;
        const T *dy = static_cast<const T*>(a.dy) + at, *dsum = static_cast<const T*>(a.dsum) + at;
        T *dx = static_cast<T*>(a.dx) + at, *dgate = static_cast<T*>(a.dgate) + at;
        const A rstd = static_cast<const A*>(a.rstd)[item];
        V dot(A(0));
        for_vectors<A>(n, [&](int64_t i, auto lanes) {
          V u = load(x + i, lanes), d = load(dy + i, lanes);
          const V w = load(weight + i, lanes);
          if constexpr (mode == NormMode::gate_norm) {
            const V g = load(gate + i, lanes), s = sigmoid(g);
            store(silus + i, g * s, lanes);
            store(slopes + i, u * silu_slope(g, s), lanes);
            u = u * g * s;
          }
          if constexpr (mode == NormMode::norm_gate) {
            const V g = load(gate + i, lanes), s = sigmoid(g);
            store(dgate + i, d * u * V(rstd) * w * silu_slope(g, s), lanes);
            d = d * g * s;
          }
          const V ei = d * w;
          store(e + i, ei, lanes);
          dot = at::vec::fmadd(ei, u, dot);
          store(dweight + i, at::vec::fmadd(d, u * V(rstd), load(dweight + i, lanes)), lanes);
        });
        const V scale(rstd), pull(-rstd * rstd * rstd * sum(dot) / static_cast<A>(n));
        for_vectors<A>(n, [&](int64_t i, auto lanes) {
          V u = load(x + i, lanes);
          if constexpr (mode == NormMode::gate_norm) u = u * load(silus + i, lanes);
          V du = at::vec::fmadd(u, pull, scale * load(e + i, lanes));
          if constexpr (mode == NormMode::gate_norm) {
            store(dgate + i, du * load(slopes + i, lanes), lanes);
            du = du * load(silus + i, lanes);
          }
          if constexpr (add) du = du + load(dsum + i, lanes);
          store(dx + i, du, lanes);
        });
      }
    }
  });
  sum_rows(static_cast<const A*>(a.partials), blocks, n, static_cast<A*>(a.dweight));
}

void gated_norm_forward(const NormForward& a) {
  dispatch(a.dtype, [&]<typename T>() {
    switch (a.mode) {
      case NormMode::product:
        return product_forward<T>(a);
      case NormMode::gate_norm:
        return norm_forward<T, NormMode::gate_norm, false>(a);
      case NormMode::norm_gate:
        return norm_forward<T, NormMode::norm_gate, false>(a);
      case NormMode::norm:
        return a.update != nullptr ? norm_forward<T, NormMode::norm, true>(a)
                                   : norm_forward<T, NormMode::norm, false>(a);
    }
  });
}

void gated_norm_backward(const NormBackward& a) {
  dispatch(a.dtype, [&]<typename T>() {
    switch (a.mode) {
      case NormMode::product:
        return product_backward<T>(a);
      case NormMode::gate_norm:
        return norm_backward<T, NormMode::gate_norm, false>(a);
      case NormMode::norm_gate:
        return norm_backward<T, NormMode::norm_gate, false>(a);
      case NormMode::norm:
        return a.dsum != nullptr ? norm_backward<T, NormMode::norm, true>(a)
                                 : norm_backward<T, NormMode::norm, false>(a);
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
