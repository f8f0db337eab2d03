#include "operators/gated_norm/gated_norm_device.h"

namespace oryx::cuda {

namespace {

// One element of the first pass. With u the input of the norm, n = u · rstd and e = dL/dn: adds u² to squares
// and e · u to dot.
template <typename T, Norm mode, typename A>
__device__ inline void first_pass(A x, A gate, A dy, A weight, A& squares, A& dot) {
  A u = x, e = dy * weight;
  if constexpr (mode == Norm::gate_norm) u *= silu<T>(gate);
  if constexpr (mode == Norm::norm_gate) e *= silu<T>(gate);
  squares += u * u;
  dot += e * u;
}

// du = rstd · (e − n · mean(e ⊙ n)) with pull = −rstd³ · mean(e ⊙ u); returns dx and adds the weight's share
// to dweight.
template <typename T, Norm mode, typename A>
__device__ inline A second_pass(A x, A gate, A dy, A weight, A rstd, A pull, A dsum, A& dweight, A& dgate,
                                A& y) {
  if constexpr (mode == Norm::gate_norm) {
    const A s = sigmoid<T>(gate), gated = gate * s, u = x * gated;
    const A du = u * pull + rstd * (dy * weight);
    dgate = du * x * silu_slope(gate, s);
    dweight += dy * (u * rstd);
    y = u * rstd * weight;
    return du * gated;
  } else if constexpr (mode == Norm::norm_gate) {
    const A s = sigmoid<T>(gate), gated = gate * s, n = x * rstd, m = n * weight;
    dgate = dy * m * silu_slope(gate, s);
    y = m * gated;
    dy *= gated;
    dweight += dy * n;
    return x * pull + rstd * (dy * weight);
  } else {
    const A n = x * rstd;
    dweight += dy * n;
    y = n * weight;
    return x * pull + rstd * (dy * weight) + dsum;
  }
}

// rstd and second_pass's pull from the sums of the first pass; share = 1 / group.
template <typename A>
struct NormFactors {
  A rstd, pull;

  __device__ NormFactors(A squares, A dot, A share, A eps)
      : rstd(reciprocal_root(squares * share + eps)), pull(-rstd * rstd * rstd * dot * share) {}
};

template <typename T, Norm mode, int vectors>
__global__ void __launch_bounds__(norm_threads, norm_blocks(vectors))
    norm_backward_kernel(const NormArguments p) {
  using A = Wide<T>;
  constexpr int n = lanes_of<T>;
  __shared__ A scratch[4 * norm_threads / 32];
  Team<A> team(p.team, scratch);
  const int group = static_cast<int>(p.group);
  const int items = static_cast<int>(p.rows * p.groups), teams = norm_threads / p.team;
  const int step = static_cast<int>(gridDim.x) * teams;
  const A* weights = static_cast<const A*>(p.weight);
  Vector<T, n> dweight[vectors];
#pragma unroll
  for (int k = 0; k < vectors; ++k)
#pragma unroll
    for (int i = 0; i < n; ++i) dweight[k][i] = 0;

  for (int first = static_cast<int>(blockIdx.x) * teams; first < items; first += step) {
    const int item = first + team.index;
    const bool valid = item < items;
    const NormItem at(p, valid ? item : 0);
    const int end = valid ? group : 0;
    Raw<T, n> x[vectors], gate[vectors], dy[vectors], dsum[vectors];
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      x[k] = load_raw<n>(static_cast<const T*>(p.x) + at.x + column);
      dy[k] = load_raw<n>(static_cast<const T*>(p.dy) + at.dense + column);
      if constexpr (has_gate(mode)) gate[k] = load_raw<n>(static_cast<const T*>(p.gate) + at.gate + column);
      if constexpr (mode == Norm::add)
        dsum[k] = load_raw<n>(static_cast<const T*>(p.dsum) + at.dense + column);
    }
    A squares = 0, dot = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      const Vector<T, n> wide = widen<T, n>(x[k]), d = widen<T, n>(dy[k]);
      const Vector<T, n> weight = load_wide<T, n>(weights + column);
      Vector<T, n> g;
      if constexpr (has_gate(mode)) g = widen<T, n>(gate[k]);
#pragma unroll
      for (int i = 0; i < n; ++i)
        first_pass<T, mode, A>(wide[i], has_gate(mode) ? g[i] : A(0), d[i], weight[i], squares, dot);
    }
    team.sum(squares, dot);
    const NormFactors<A> factors(squares, dot, static_cast<A>(p.share), static_cast<A>(p.eps));
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int column = (k * p.team + team.lane) * n;
      if (column >= end) continue;
      const Vector<T, n> wide = widen<T, n>(x[k]), d = widen<T, n>(dy[k]);
      const Vector<T, n> weight = load_wide<T, n>(weights + column);
      Vector<T, n> g, ds, dg, dx, y;
      if constexpr (has_gate(mode)) g = widen<T, n>(gate[k]);
      if constexpr (mode == Norm::add) ds = widen<T, n>(dsum[k]);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        dx[i] = second_pass<T, mode, A>(wide[i], has_gate(mode) ? g[i] : A(0), d[i], weight[i], factors.rstd,
                                        factors.pull, mode == Norm::add ? ds[i] : A(0), dweight[k][i], dg[i],
                                        y[i]);
      }
      store(static_cast<T*>(p.dx) + at.dense + column, dx);
      if constexpr (has_gate(mode)) store(static_cast<T*>(p.dgate) + at.dense + column, dg);
      if (p.y != nullptr) store(static_cast<T*>(p.y) + at.dense + column, y);
    }
  }

  // The teams' sums, added in order: [teams, group].
  A* sums = reinterpret_cast<A*>(shared_memory());
#pragma unroll
  for (int k = 0; k < vectors; ++k) {
    const int column = (k * p.team + team.lane) * n;
    if (column >= group) continue;
#pragma unroll
    for (int i = 0; i < n; ++i) sums[team.index * group + column + i] = dweight[k][i];
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < group; c += norm_threads) {
    A total = 0;
    for (int t = 0; t < teams; ++t) total += sums[t * group + c];
    static_cast<A*>(p.partials)[blockIdx.x * p.group + c] = total;
  }
}

// Any group, any alignment: a block per item; the block's partial sums lie in memory, each with its own
// thread.
template <typename T, Norm mode>
__global__ void __launch_bounds__(norm_threads) norm_backward_general_kernel(const NormArguments p) {
  using A = Wide<T>;
  __shared__ A scratch[4 * norm_threads / 32];
  Team<A> team(norm_threads, scratch);
  const int64_t items = p.rows * p.groups;
  A* dweight = static_cast<A*>(p.partials) + blockIdx.x * p.group;
  for (int64_t c = team.lane; c < p.group; c += norm_threads) dweight[c] = 0;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const NormItem at(p, item);
    const auto element = [](const void* base, int64_t offset) {
      return load<1>(static_cast<const T*>(base) + offset)[0];
    };
    A squares = 0, dot = 0;
    for (int64_t c = team.lane; c < p.group; c += norm_threads) {
      first_pass<T, mode, A>(element(p.x, at.x + c), has_gate(mode) ? element(p.gate, at.gate + c) : A(0),
                             element(p.dy, at.dense + c), static_cast<const A*>(p.weight)[c], squares, dot);
    }
    team.sum(squares, dot);
    const NormFactors<A> factors(squares, dot, static_cast<A>(p.share), static_cast<A>(p.eps));
    for (int64_t c = team.lane; c < p.group; c += norm_threads) {
      Vector<T, 1> dx, dgate, y;
      dx[0] = second_pass<T, mode, A>(
          element(p.x, at.x + c), has_gate(mode) ? element(p.gate, at.gate + c) : A(0),
          element(p.dy, at.dense + c), static_cast<const A*>(p.weight)[c], factors.rstd, factors.pull,
          mode == Norm::add ? element(p.dsum, at.dense + c) : A(0), dweight[c], dgate[0], y[0]);
      store(static_cast<T*>(p.dx) + at.dense + c, dx);
      if constexpr (has_gate(mode)) store(static_cast<T*>(p.dgate) + at.dense + c, dgate);
      if (p.y != nullptr) store(static_cast<T*>(p.y) + at.dense + c, y);
    }
  }
}

}  // namespace

int64_t norm_backward_blocks(const NormTensors& tensors, int multiprocessors) {
  return norm_grid(tensors, norm_layout(tensors), multiprocessors);
}

void norm_backward(const NormTensors& tensors, int multiprocessors, void* stream) {
  const NormLayout layout = norm_layout(tensors);
  const NormArguments arguments(tensors, layout);
  const int64_t blocks = norm_grid(tensors, layout, multiprocessors);
  with_norm_kernel(tensors, layout.vectors, [&]<typename T, Norm mode, int vectors>() {
    const dim3 grid(static_cast<unsigned>(blocks));
    if constexpr (vectors == 0) {
      launch<norm_backward_general_kernel<T, mode>>(grid, norm_threads, 0, stream, arguments);
    } else {
      const size_t shared = norm_threads / layout.size * static_cast<size_t>(tensors.group) * sizeof(Wide<T>);
      launch<norm_backward_kernel<T, mode, vectors>>(grid, norm_threads, shared, stream, arguments);
    }
    column_sums<Wide<T>>({static_cast<const Wide<T>*>(tensors.partials), blocks, tensors.group,
                          static_cast<Wide<T>*>(tensors.dweight)},
                         stream);
  });
}

}  // namespace oryx::cuda
