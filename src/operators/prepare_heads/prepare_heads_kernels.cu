#include "operators/prepare_heads/prepare_heads_kernels.h"

#include "operators/device/pointwise.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 2;  // vectors of a team under way together

// Where vector `index` lies.
struct HeadPlace {
  int64_t x, table;

  __device__ HeadPlace(const HeadTensors& p, unsigned index) {
    const unsigned heads = static_cast<unsigned>(p.heads), time = static_cast<unsigned>(p.time);
    const unsigned row = index / heads, head = index % heads;
    x = row / time * p.batch_stride + row % time * p.time_stride + head * p.head_stride;
    table = p.rotate ? row % static_cast<unsigned>(p.table_rows) * (p.dim / 2) : 0;
  }
};

__host__ __device__ inline int64_t vectors_of(const HeadTensors& p) { return p.batch * p.time * p.heads; }

// (low, high) turned by the angle of (c, s).
template <typename A>
__device__ inline void turn(A& low, A& high, A c, A s) {
  const A turned = low * c - high * s;
  high = high * c + low * s;
  low = turned;
}

// dx from the gradient `d` of the normalised vector, with pull = −scale³ · Σ u d and u = act(x); or, with the
// normalised vector itself as u, pull = −scale · Σ u d.
template <typename T, bool with_silu, bool with_l2, typename A>
__device__ inline A gradient(A x, A u, A d, A scale, A pull) {
  if constexpr (with_l2) d = d * scale + u * pull;
  if constexpr (with_silu) d *= silu_slope(x, sigmoid<T>(x));
  return d;
}

// A team of dim / (2 n) lanes (a power of two ≤ 32) for a vector: a lane has n elements of its first half and
// the n that rotate with them.
template <typename T, bool with_silu, bool with_l2, bool with_rotation, bool backward>
__global__ void __launch_bounds__(kThreads) prepare_heads_kernel(const HeadTensors p) {
  using A = Wide<T>;
  constexpr int n = lanes_of<T>;
  constexpr bool reads_x = !backward || with_silu || with_l2;
  constexpr bool may_add = !backward && with_rotation && !with_silu && !with_l2;
  const int half = static_cast<int>(p.dim / 2), lanes = half / n, teams = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, column = lane * n;
  const unsigned total = static_cast<unsigned>(vectors_of(p));
  const unsigned first = blockIdx.x * static_cast<unsigned>(teams * kAhead) + threadIdx.x / lanes;
  Raw<T, n> x[kAhead][2], dy[kAhead][2], again[kAhead][2];
  HeadPlace place[kAhead] = {{p, first < total ? first : 0}, {p, first + teams < total ? first + teams : 0}};
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    if (first + k * teams >= total) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (reads_x)
        x[k][j] = load_raw<n>(static_cast<const T*>(p.x) + place[k].x + j * half + column);
      if constexpr (may_add) {
        again[k][j] = p.again == nullptr
                          ? Raw<T, n>{}
                          : load_raw<n>(static_cast<const T*>(p.again) + place[k].x + j * half + column);
      }
      if constexpr (backward) {
        dy[k][j] = load_raw<n>(static_cast<const T*>(p.dy) + (first + k * teams) * p.dim + j * half + column);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    const unsigned index = first + k * teams;
    const bool valid = index < total;  // teams of one warp stay together for the sums
    Vector<T, n> u[2], c, s;
    if constexpr (with_rotation) {
      c = load_wide<T, n>(static_cast<const A*>(p.cosine) + place[k].table + column);
      s = load_wide<T, n>(static_cast<const A*>(p.sine) + place[k].table + column);
    }
    if constexpr (reads_x) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        u[j] = valid ? widen<T, n>(x[k][j]) : Vector<T, n>{};
        if constexpr (may_add) {
          const Vector<T, n> second = widen<T, n>(again[k][j]);
#pragma unroll
          for (int i = 0; i < n; ++i) u[j][i] += valid ? second[i] : A(0);
        }
        if constexpr (with_silu) {
#pragma unroll
          for (int i = 0; i < n; ++i) u[j][i] = silu<T>(u[j][i]);
        }
      }
    }
    if constexpr (!backward) {
      if constexpr (with_l2) {
        A squares = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) squares += u[0][i] * u[0][i] + u[1][i] * u[1][i];
        const A scale = reciprocal_root(sum_in_warp(squares, lanes) + static_cast<A>(p.eps));
        if (p.scale != nullptr && valid && lane == 0) static_cast<A*>(p.scale)[index] = scale;
#pragma unroll
        for (int i = 0; i < n; ++i) u[0][i] *= scale, u[1][i] *= scale;
      }
      if constexpr (with_rotation) {
        const A sign = p.backwards ? A(-1) : A(1);
#pragma unroll
        for (int i = 0; i < n; ++i) turn(u[0][i], u[1][i], c[i], s[i] * sign);
      }
      if (!valid) continue;
      T* y = static_cast<T*>(p.y) + index * p.dim + column;
      store(y, u[0]);
      store(y + half, u[1]);
    } else {
      Vector<T, n> d[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) d[j] = valid ? widen<T, n>(dy[k][j]) : Vector<T, n>{};
      if constexpr (with_rotation) {
#pragma unroll
        for (int i = 0; i < n; ++i) turn(d[0][i], d[1][i], c[i], -s[i]);
      }
      A scale = 0, pull = 0;
      if constexpr (with_l2) {
        A dot = 0;
        scale = static_cast<const A*>(p.scale)[valid ? index : 0];
#pragma unroll
        for (int i = 0; i < n; ++i) dot += u[0][i] * d[0][i] + u[1][i] * d[1][i];
        pull = -scale * (with_silu || with_rotation ? scale * scale : A(1)) * sum_in_warp(dot, lanes);
      }
      if (!valid) continue;
      T* dx = static_cast<T*>(p.dx) + index * p.dim + column;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (reads_x) {
          const Vector<T, n> raw = widen<T, n>(x[k][j]);
#pragma unroll
          for (int i = 0; i < n; ++i)
            d[j][i] = gradient<T, with_silu, with_l2, A>(raw[i], u[j][i], d[j][i], scale, pull);
        }
        store(dx + j * half, d[j]);
      }
    }
  }
}

// Any width and alignment: a warp a vector, element by element.
template <typename T, bool backward>
__global__ void __launch_bounds__(kThreads) prepare_heads_general_kernel(const HeadTensors p) {
  using A = Wide<T>;
  const unsigned total = static_cast<unsigned>(vectors_of(p));
  const unsigned index = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (index >= total) return;
  const HeadPlace place(p, index);
  const int64_t half = p.dim / 2;
  const auto at = [&](const void* base, int64_t offset) {
    return load<1>(static_cast<const T*>(base) + offset)[0];
  };
  const auto activated = [&](int64_t i) {
    A x = at(p.x, place.x + i);
    if (!backward && p.again != nullptr) x += at(p.again, place.x + i);
    return p.silu ? silu<T>(x) : x;
  };
  // Element i of the vector `value` turned by the angle, or by minus the angle.
  const auto turned = [&](auto value, int64_t i, bool by_minus) {
    if (!p.rotate) return value(i);
    const int64_t pair = i % half;
    const A c = static_cast<const A*>(p.cosine)[place.table + pair];
    const A s = static_cast<const A*>(p.sine)[place.table + pair] * (by_minus ? A(-1) : A(1));
    return i < half ? value(i) * c - value(i + half) * s : value(i) * c + value(i - half) * s;
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t dense = static_cast<int64_t>(index) * p.dim;
  A scale = 1, sum = 0;
  if constexpr (!backward) {
    if (p.l2) {
      for (int64_t i = lane; i < p.dim; i += 32) sum += activated(i) * activated(i);
      scale = reciprocal_root(sum_in_warp(sum, 32) + static_cast<A>(p.eps));
      if (p.scale != nullptr && lane == 0) static_cast<A*>(p.scale)[index] = scale;
    }
    for (int64_t i = lane; i < p.dim; i += 32) {
      Vector<T, 1> y;
      y[0] = turned([&](int64_t e) { return activated(e) * scale; }, i, p.backwards);
      store(static_cast<T*>(p.y) + dense + i, y);
    }
  } else {
    const auto slope = [&](int64_t i) {
      return turned([&](int64_t e) { return at(p.dy, dense + e); }, i, true);
    };
    A pull = 0;
    if (p.l2) {
      scale = static_cast<const A*>(p.scale)[index];
#pragma unroll 1
      for (int64_t i = lane; i < p.dim; i += 32) sum += activated(i) * slope(i);
      pull = -scale * (p.silu || p.rotate ? scale * scale : A(1)) * sum_in_warp(sum, 32);
    }
#pragma unroll 1
    for (int64_t i = lane; i < p.dim; i += 32) {
      Vector<T, 1> dx;
      dx[0] = slope(i);
      if (p.l2) dx[0] = dx[0] * scale + activated(i) * pull;
      if (p.silu) {
        const A x = at(p.x, place.x + i);
        dx[0] *= silu_slope(x, sigmoid<T>(x));
      }
      store(static_cast<T*>(p.dx) + dense + i, dx);
    }
  }
}

template <bool backward>
void prepare(const HeadTensors& p, void* stream) {
  const int64_t total = vectors_of(p), n = 16 / bytes_of(p.element), lanes = p.dim / 2 / n;
  const bool fast = p.aligned && p.element != Element::float64 && p.dim % (2 * n) == 0 && lanes <= 32 &&
                    (lanes & (lanes - 1)) == 0 && lanes > 0;
  if (!fast) {
    return with_element(p.element, [&]<typename T>() {
      launch<prepare_heads_general_kernel<T, backward>>(dim3(static_cast<unsigned>((total + 7) / 8)),
                                                        kThreads, 0, stream, p);
    });
  }
  const int64_t block = kThreads / lanes * kAhead;
  const dim3 grid(static_cast<unsigned>((total + block - 1) / block));
  const auto run = [&]<typename T, bool silu, bool l2, bool rotate>() {
    launch<prepare_heads_kernel<T, silu, l2, rotate, backward>>(grid, kThreads, 0, stream, p);
  };
  const auto with_type = [&]<typename T>() {
    switch (4 * p.silu + 2 * p.l2 + p.rotate) {
      case 1:
        return run.template operator()<T, false, false, true>();
      case 2:
        return run.template operator()<T, false, true, false>();
      case 3:
        return run.template operator()<T, false, true, true>();
      case 4:
        return run.template operator()<T, true, false, false>();
      case 5:
        return run.template operator()<T, true, false, true>();
      case 6:
        return run.template operator()<T, true, true, false>();
      case 7:
        return run.template operator()<T, true, true, true>();
    }
  };
  p.element == Element::bfloat16 ? with_type.template operator()<bf16>()
                                 : with_type.template operator()<float>();
}

}  // namespace

void prepare_heads_forward(const HeadTensors& tensors, void* stream) { prepare<false>(tensors, stream); }
void prepare_heads_backward(const HeadTensors& tensors, void* stream) { prepare<true>(tensors, stream); }

}  // namespace oryx::cuda
