// A thread takes one head of every few tokens: threads side by side those of one token, where they fit a
// block.
#include "operators/decays/decays_kernels.h"

#include "operators/device/pointwise.h"

namespace oryx::cuda {

using namespace device;

namespace {

constexpr int kThreads = 256;

// Heads side by side in a block.
__device__ __host__ inline int lanes_of_block(const DecayTensors& p) {
  return p.heads < kThreads ? static_cast<int>(p.heads) : kThreads;
}

struct Place {
  int lanes, turns, lane, turn;  // `turns` tokens side by side
  int64_t head;
  bool inside;  // the last threads have no token where heads do not divide the block

  __device__ explicit Place(const DecayTensors& p)
      : lanes(lanes_of_block(p)),
        turns(kThreads / lanes),
        lane(static_cast<int>(threadIdx.x) % lanes),
        turn(static_cast<int>(threadIdx.x) / lanes),
        head(static_cast<int64_t>(blockIdx.y) * lanes + lane),
        inside(turn < turns && head < p.heads) {}
};

// The narrow work is bound by its launch, so that no fast approximations are called for.
template <typename A>
__device__ inline A softplus(A z) {
  if (z > A(20)) return z;
  if constexpr (sizeof(A) == sizeof(double)) {
    return ::log1p(exponential<A>(z));
  } else {
    return ::log1pf(exponential<A>(z));
  }
}

template <typename T>
__device__ inline Wide<T> element(const void* matrix, int64_t index) {
  return static_cast<Wide<T>>(static_cast<const T*>(matrix)[index]);
}

template <typename T>
__device__ inline void write(void* matrix, int64_t index, Wide<T> value) {
  if constexpr (std::is_same_v<T, bf16>) {
    static_cast<bf16*>(matrix)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<T*>(matrix)[index] = value;
  }
}

// The inputs of one token and head.
template <typename T>
struct Inputs {
  using A = Wide<T>;
  int64_t row;
  A z, beta, mask;

  __device__ Inputs(const DecayTensors& p, int64_t token, int64_t head, A bias)
      : row(p.rows != nullptr ? p.rows[token] : token),
        z(element<T>(p.x, row * p.x_stride + head) + bias),
        beta(p.beta != nullptr ? element<T>(p.beta, row * p.beta_stride + head) : A(0)),
        mask(p.mask != nullptr ? element<A>(p.mask, token) : A(1)) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads) decays_forward_kernel(const DecayTensors p) {
  using A = Wide<T>;
  const Place place(p);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * place.turns + place.turn;
  if (!place.inside || token >= p.tokens) return;
  const Inputs<T> in(p, token, place.head, element<A>(p.bias, place.head));
  const A step = softplus(in.z) * in.mask;
  const int64_t index = token * p.heads + place.head;
  write<A>(p.log_decay, index, step * -exponential<A>(element<A>(p.log_a, place.head)));
  write<A>(p.strength, index, p.beta != nullptr ? sigmoid<A>(in.beta) * in.mask : step);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) decays_backward_kernel(const DecayTensors p) {
  using A = Wide<T>;
  const Place place(p);
  A dbias = 0, dlog_a = 0;
  if (place.inside) {
    const A bias = element<A>(p.bias, place.head), rate = -exponential<A>(element<A>(p.log_a, place.head));
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * decay_block,
                  end = begin + decay_block < p.tokens ? begin + decay_block : p.tokens;
    for (int64_t token = begin + place.turn; token < end; token += place.turns) {
      const Inputs<T> in(p, token, place.head, bias);
      const int64_t index = token * p.heads + place.head, to = in.row * p.heads + place.head;
      const A dlog_decay = p.dlog_decay != nullptr ? element<A>(p.dlog_decay, index) : A(0);
      A dstrength = p.dstrength != nullptr ? element<A>(p.dstrength, index) : A(0);
      if (p.beta != nullptr) {
        const A s = sigmoid<A>(in.beta);
        write<T>(p.dbeta, to, dstrength * in.mask * s * (A(1) - s));
        dstrength = 0;
      }
      const A dz = (dlog_decay * rate + dstrength) * in.mask * (in.z > A(20) ? A(1) : sigmoid<A>(in.z));
      write<T>(p.dx, to, dz);
      dbias += dz;
      dlog_a += dlog_decay * rate * softplus(in.z) * in.mask;
    }
  }
  A* sums = reinterpret_cast<A*>(shared_memory());  // [2, kThreads]
  sums[threadIdx.x] = dbias;
  sums[kThreads + threadIdx.x] = dlog_a;
  __syncthreads();
  if (place.turn != 0 || !place.inside) return;
  for (int i = 0; i < 2; ++i) {
    A total = 0;
    for (int turn = 0; turn < place.turns; ++turn)
      total += sums[i * kThreads + turn * place.lanes + place.lane];
    write<A>(p.partials, (2 * static_cast<int64_t>(blockIdx.x) + i) * p.heads + place.head, total);
  }
}

dim3 grid(const DecayTensors& p, int64_t tokens_per_block) {
  const int lanes = lanes_of_block(p);
  return {static_cast<unsigned>((p.tokens + tokens_per_block - 1) / tokens_per_block),
          static_cast<unsigned>((p.heads + lanes - 1) / lanes)};
}

}  // namespace

void decays_forward(const DecayTensors& p, void* stream) {
  with_element(p.element, [&]<typename T>() {
    launch<decays_forward_kernel<T>>(grid(p, kThreads / lanes_of_block(p)), kThreads, 0, stream, p);
  });
}

void decays_backward(const DecayTensors& p, void* stream) {
  with_element(p.element, [&]<typename T>() {
    using A = Wide<T>;
    launch<decays_backward_kernel<T>>(grid(p, decay_block), kThreads, 2 * kThreads * sizeof(A), stream, p);
    column_sums<A>({static_cast<const A*>(p.partials), (p.tokens + decay_block - 1) / decay_block,
                    2 * p.heads, static_cast<A*>(p.sums)},
                   stream);
  });
}

}  // namespace oryx::cuda
