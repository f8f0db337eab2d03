#include "operators/gated_norm/gated_norm_device.h"

namespace oryx::cuda {

namespace {

// What is normalised, from raw inputs; in mode `add` also the sum as rounded, so that backward sees the same.
template <typename T, Norm mode, int n>
__device__ inline Vector<T, n> normalised_input(Raw<T, n>& x, const Raw<T, n>& other) {
  Vector<T, n> u = widen<T, n>(x);
  if constexpr (mode == Norm::add || mode == Norm::gate_norm) {
    const Vector<T, n> second = widen<T, n>(other);
#pragma unroll
    for (int i = 0; i < n; ++i) u[i] = mode == Norm::add ? u[i] + second[i] : u[i] * silu<T>(second[i]);
  }
  if constexpr (mode == Norm::add) {
    x = narrow<T, n>(u);
    u = widen<T, n>(x);
  }
  return u;
}

template <typename T, Norm mode, int vectors>
__global__ void __launch_bounds__(norm_threads, norm_blocks(vectors))
    norm_forward_kernel(const NormArguments p) {
  using A = Wide<T>;
  constexpr int n = lanes_of<T>;
  __shared__ A scratch[2 * norm_threads / 32];
  Team<A> team(p.team, scratch);
  const int group = static_cast<int>(p.group);
  const int items = static_cast<int>(p.rows * p.groups), teams = norm_threads / p.team;
  const int step = static_cast<int>(gridDim.x) * teams;
  // Whole blocks go round together: the sums below need every thread of a warp.
  for (int first = static_cast<int>(blockIdx.x) * teams; first < items; first += step) {
    const int item = first + team.index;
    const bool valid = item < items;
    const NormItem at(p, valid ? item : 0);
    const int end = valid ? group : 0;
    Raw<T, n> x[vectors], other[vectors];
    Vector<T, n> u[vectors];
    A squares = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      x[k] = load_raw<n>(static_cast<const T*>(p.x) + at.x + column);
      if constexpr (has_gate(mode)) other[k] = load_raw<n>(static_cast<const T*>(p.gate) + at.gate + column);
      if constexpr (mode == Norm::add) {
        other[k] = load_raw<n>(static_cast<const T*>(p.update) + at.update + column);
      }
    }
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      u[k] = normalised_input<T, mode, n>(x[k], other[k]);
      if constexpr (mode == Norm::add) store_raw<T, n>(static_cast<T*>(p.sum) + at.dense + column, x[k]);
#pragma unroll
      for (int i = 0; i < n; ++i) squares += u[k][i] * u[k][i];
    }
    const A rstd = reciprocal_root(team.sum(squares) / static_cast<A>(group) + static_cast<A>(p.eps));
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      const Vector<T, n> weight = load_wide<T, n>(static_cast<const A*>(p.weight) + column);
      Vector<T, n> y, gate;
      if constexpr (mode == Norm::norm_gate) gate = widen<T, n>(other[k]);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        y[i] = u[k][i] * rstd * weight[i];
        if constexpr (mode == Norm::norm_gate) y[i] *= silu<T>(gate[i]);
      }
      store(static_cast<T*>(p.y) + at.dense + column, y);
    }
  }
}

// Any group, any alignment: a block per item, in two passes over its elements.
template <typename T, Norm mode>
__global__ void __launch_bounds__(norm_threads) norm_forward_general_kernel(const NormArguments p) {
  using A = Wide<T>;
  __shared__ A scratch[2 * norm_threads / 32];
  Team<A> team(norm_threads, scratch);
  const int64_t items = p.rows * p.groups;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const NormItem at(p, item);
    const T *x = static_cast<const T*>(p.x) + at.x, *gate = static_cast<const T*>(p.gate) + at.gate;
    T* sum = static_cast<T*>(p.sum) + at.dense;
    A squares = 0;
    for (int64_t c = team.lane; c < p.group; c += norm_threads) {
      Raw<T, 1> raw = load_raw<1>(x + c), other = raw;
      if constexpr (mode == Norm::gate_norm) other = load_raw<1>(gate + c);
      if constexpr (mode == Norm::add) other = load_raw<1>(static_cast<const T*>(p.update) + at.update + c);
      const A u = normalised_input<T, mode, 1>(raw, other)[0];
      if constexpr (mode == Norm::add) store_raw<T, 1>(sum + c, raw);
      squares += u * u;
    }
    const A rstd = reciprocal_root(team.sum(squares) / static_cast<A>(p.group) + static_cast<A>(p.eps));
    for (int64_t c = team.lane; c < p.group; c += norm_threads) {
      // The sum is read back by the thread that wrote it.
      Vector<T, 1> y = load<1>(mode == Norm::add ? sum + c : x + c);
      if constexpr (mode == Norm::gate_norm) y[0] *= silu<T>(load<1>(gate + c)[0]);
      y[0] *= rstd * static_cast<const A*>(p.weight)[c];
      if constexpr (mode == Norm::norm_gate) y[0] *= silu<T>(load<1>(gate + c)[0]);
      store(static_cast<T*>(p.y) + at.dense + c, y);
    }
  }
}

}  // namespace

void norm_forward(const NormTensors& tensors, int multiprocessors, void* stream) {
  const NormLayout layout = norm_layout(tensors);
  const NormArguments arguments(tensors, layout);
  const dim3 grid(static_cast<unsigned>(norm_grid(tensors, layout, multiprocessors)));
  with_norm_kernel(tensors, layout.vectors, [&]<typename T, Norm mode, int vectors>() {
    if constexpr (vectors == 0) {
      launch<norm_forward_general_kernel<T, mode>>(grid, norm_threads, 0, stream, arguments);
    } else {
      launch<norm_forward_kernel<T, mode, vectors>>(grid, norm_threads, 0, stream, arguments);
    }
  });
}

}  // namespace oryx::cuda
