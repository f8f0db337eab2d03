#include "operators/l2_norm/l2_norm_cpu.h"

#include <cmath>

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

// Calls body(vector index, x of the vector) for every vector, in parallel.
template <typename T, typename Body>
static void for_each_vector(const operators::L2NormVectors& a, Body body) {
  at::parallel_for(0, a.rows * a.heads, 16384 / a.dim + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i, static_cast<const T*>(a.vectors) + i / a.heads * a.row_stride + i % a.heads * a.head_stride);
  });
}

template <typename T>
static void forward(const operators::L2NormForward& a) {
  using A = Acc<T>;
  for_each_vector<T>(a, [&](int64_t index, const T* x) {
    T* y = static_cast<T*>(a.y) + index * a.dim;
    Vec<A> squares(A(0));
    for_vectors<A>(a.dim, [&](int64_t i, auto lanes) {
      const Vec<A> v = load(x + i, lanes);
      squares = at::vec::fmadd(v, v, squares);
    });
    const A scale = A(1) / std::sqrt(sum(squares) + static_cast<A>(a.eps));
    if (a.scale != nullptr) static_cast<A*>(a.scale)[index] = scale;
    for_vectors<A>(a.dim,
                   [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes) * Vec<A>(scale), lanes); });
  });
}

// dx = scale · (dy − y (y·dy)).
template <typename T>
static void backward(const operators::L2NormBackward& a) {
  using A = Acc<T>;
  for_each_vector<T>(a, [&](int64_t index, const T* y) {
    const T* dy = static_cast<const T*>(a.dy) + index * a.dim;
    T* dx = static_cast<T*>(a.dx) + index * a.dim;
    const A scale = static_cast<const A*>(a.scale)[index];
    Vec<A> dot(A(0));
    for_vectors<A>(a.dim, [&](int64_t i, auto lanes) {
      dot = at::vec::fmadd(load(y + i, lanes), load(dy + i, lanes), dot);
    });
    const Vec<A> pull(-scale * sum(dot));
    for_vectors<A>(a.dim, [&](int64_t i, auto lanes) {
      store(dx + i, at::vec::fmadd(load(y + i, lanes), pull, load(dy + i, lanes) * Vec<A>(scale)), lanes);
    });
  });
}

void l2_norm_forward(const operators::L2NormForward& a) {
  dispatch(a.dtype, [&]<typename T>() { forward<T>(a); });
}
void l2_norm_backward(const operators::L2NormBackward& a) {
  dispatch(a.dtype, [&]<typename T>() { backward<T>(a); });
}

}  // namespace oryx::ORYX_CPU_ISA
