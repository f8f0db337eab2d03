// y = x ⊙ SiLU(gate): the mode without a weight, which needs no sums.
#include "operators/gated_norm/gated_norm_device.h"

namespace oryx::cuda {

namespace {

// Vectors a thread has under way.
constexpr int kUnroll = 2;

template <typename T, int n, bool backward>
__global__ void __launch_bounds__(norm_threads) product_kernel(const NormTensors p) {
  // Neighbouring threads take neighbouring vectors of a row; a block takes `kUnroll · norm_threads` of all
  // vectors.
  const int64_t row_vectors = p.channels / n, total = p.rows * row_vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kUnroll * norm_threads) + threadIdx.x;
  Raw<T, n> x[kUnroll], gate[kUnroll], dy[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t index = first + k * norm_threads;
    if (index >= total) continue;
    // 64-bit division would cost as much as the rest.
    const bool is_small = index < (int64_t{1} << 32);
    const int64_t row =
        is_small ? static_cast<uint32_t>(index) / static_cast<uint32_t>(row_vectors) : index / row_vectors;
    const int64_t column = (index - row * row_vectors) * n;
    x[k] = load_raw<n>(static_cast<const T*>(p.x) + row * p.x_stride + column);
    gate[k] = load_raw<n>(static_cast<const T*>(p.gate) + row * p.gate_stride + column);
    if constexpr (backward) dy[k] = load_raw<n>(static_cast<const T*>(p.dy) + index * n);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t at = (first + k * norm_threads) * n;
    if (at >= total * n) continue;
    const Vector<T, n> u = widen<T, n>(x[k]), g = widen<T, n>(gate[k]);
    if constexpr (backward) {
      const Vector<T, n> d = widen<T, n>(dy[k]);
      Vector<T, n> dx, dgate, y;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const Wide<T> s = sigmoid<T>(g[i]);
        dx[i] = d[i] * g[i] * s;
        y[i] = u[i] * g[i] * s;
        dgate[i] = d[i] * u[i] * silu_slope(g[i], s);
      }
      store(static_cast<T*>(p.dx) + at, dx);
      store(static_cast<T*>(p.dgate) + at, dgate);
      if (p.y != nullptr) store(static_cast<T*>(p.y) + at, y);
    } else {
      Vector<T, n> y;
#pragma unroll
      for (int i = 0; i < n; ++i) y[i] = u[i] * silu<T>(g[i]);
      store(static_cast<T*>(p.y) + at, y);
    }
  }
}

template <bool backward>
void product(const NormTensors& t, void* stream) {
  with_element(t.element, [&]<typename T>() {
    const auto run = [&]<int n>() {
      const int64_t vectors = t.rows * (t.channels / n), block = kUnroll * norm_threads;
      launch<product_kernel<T, n, backward>>(dim3(static_cast<unsigned>((vectors + block - 1) / block)),
                                             norm_threads, 0, stream, t);
    };
    if (t.aligned) {
      run.template operator()<lanes_of<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

}  // namespace

void product_forward(const NormTensors& tensors, void* stream) { product<false>(tensors, stream); }
void product_backward(const NormTensors& tensors, void* stream) { product<true>(tensors, stream); }

}  // namespace oryx::cuda
