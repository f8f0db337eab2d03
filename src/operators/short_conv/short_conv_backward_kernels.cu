// dz_t = dy_t · act'(z_t);  dx_t = Σ_j w_j dz_{t+W-1-j};  dw_j = Σ_t dz_t x_{t-(W-1)+j};  dbias = Σ_t dz_t.
// A run makes dx for its own tokens (the first one also for the tail) and therefore recomputes dz up to W-1
// tokens past its end; the sums take each dz once.
#include <algorithm>

#include "operators/short_conv/short_conv_device.h"

namespace oryx::cuda {

namespace {

// Few threads a block, so that as many fit on a multiprocessor as the registers of each allow; long runs, so
// that few tokens are read by two.
constexpr int kRuns = 4, kThreads = kRuns * conv_lanes;

// x, dy and, where it has two readers, what comes from the second.
template <typename T, int readers, bool looks_up>
using Ring = ConvRing<T, conv_channels, 1 + readers, kThreads, looks_up>;

// One token's gradients from memory: for any width, and for the tokens that have to do with a tail.
template <typename T, int n>
struct ConvGradient {
  const ConvTensors& p;
  int batch, channel;
  ConvRows<T, n> rows;

  __device__ ConvGradient(const ConvTensors& tensors, int sequence, int first_channel)
      : p(tensors), batch(sequence), channel(first_channel), rows(tensors, sequence, first_channel) {}

  __device__ Vector<T, n> dz(int t) const {
    if (t < 0 || t >= rows.time) return {};
    const int64_t at = (int64_t{batch} * p.time + t) * p.channels + channel;
    Vector<T, n> slope = load<n>(static_cast<const T*>(p.dy) + at);
    if (p.dy_again != nullptr) {
      const Vector<T, n> second = load<n>(static_cast<const T*>(p.dy_again) + at);
#pragma unroll
      for (int i = 0; i < n; ++i) slope[i] += second[i];
    }
    if (!p.silu) return slope;
    Vector<T, n> z = conv_bias<T, n>(p, channel);
    for (int j = 0; j <= rows.before; ++j) {
      const Vector<T, n> weight = conv_tap<T, n>(p, channel, j), x = rows(t - rows.before + j);
#pragma unroll
      for (int i = 0; i < n; ++i) z[i] += weight[i] * x[i];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) slope[i] *= silu_slope(z[i], sigmoid<T>(z[i]));
    return slope;
  }

  // Stores the gradient of input t (negative: of the tail), which also stands in the new tail where it is one
  // of the last.
  __device__ void store_dx(int t) const {
    const int before = rows.before, kept = t - (rows.time - before);
    Vector<T, n> d = {};
    if (p.dnew_tail != nullptr && kept >= 0) {
      d = load<n>(static_cast<const T*>(p.dnew_tail) + (int64_t{batch} * before + kept) * p.channels +
                  channel);
    }
    for (int j = 0; j <= before; ++j) {
      const Vector<T, n> weight = conv_tap<T, n>(p, channel, j), slope = dz(t + before - j);
#pragma unroll
      for (int i = 0; i < n; ++i) d[i] += weight[i] * slope[i];
    }
    const int64_t row = t < 0                  ? int64_t{batch} * before + before + t
                        : rows.rows != nullptr ? rows.rows[t]
                                               : int64_t{batch} * p.time + t;
    store(static_cast<T*>(t < 0 ? p.dtail : p.dx) + row * p.channels + channel, d);
  }
};

// The end of a run's tokens before `end` that are not also in the new tail.
__device__ inline int untailed(const ConvTensors& p, int end) {
  const int tail = static_cast<int>(p.time - p.width) + 1;
  return p.dnew_tail != nullptr && tail < end ? tail : end;
}

// Width 4.
template <typename T, bool with_silu, int readers, bool looks_up>
__global__ void __launch_bounds__(kThreads, sizeof(T) != 2              ? 3
                                            : readers == 1 && !looks_up ? 5
                                                                        : 4)
    conv_backward_kernel(const ConvTensors p) {
  using A = Wide<T>;
  constexpr int n = conv_channels, width = conv_width, before = width - 1;
  const ConvPlace<n, kRuns> place(p);
  const bool inside = place.channel < p.channels;
  const int channel = inside ? place.channel : 0;  // threads outside work along and store nothing
  const ConvRows<T, n> rows(p, place.batch, channel);
  const int begin = place.begin, end = place.end;
  // Tokens count from `begin`. Runs past the end of the sequence have none.
  const int tokens = end - begin, read = tokens > 0 ? tokens + before : 0, there = rows.time - begin;
  const int64_t start = (place.batch * p.time + begin) * p.channels + channel;
  const T* from[1 + readers] = {rows.x + (looks_up ? 0 : begin * rows.stride),
                                static_cast<const T*>(p.dy) + start};
  int64_t strides[1 + readers] = {rows.stride, p.channels};
  if constexpr (readers == 2) from[2] = static_cast<const T*>(p.dy_again) + start, strides[2] = p.channels;
  Ring<T, readers, looks_up> ring(from, strides, looks_up ? rows.rows + begin : nullptr,
                                  read < there ? read : there);
  Vector<T, n> weight[width], x[width], dz[width];  // x, dz: token i is in [i % width]
  Vector<T, n> dweight[width] = {}, dbias = {};
  conv_taps<T, n>(p, channel, weight);
  // Waits beside the ring: there are no registers for it.
  A* const bias = reinterpret_cast<A*>(shared_memory() + Ring<T, readers, looks_up>::bytes);
  if constexpr (with_silu) store(bias + threadIdx.x * n, conv_bias<A, n>(p, channel));
#pragma unroll
  for (int j = 1; j < width; ++j) {
    x[j] = rows(begin - width + j);
    dz[j] = {};
  }
  const int own = untailed(p, end) - begin, stored = inside && own > 0 ? own : 0;
  T* dx = static_cast<T*>(p.dx) + channel;
  if (!looks_up) dx += (place.batch * p.time + begin - before) * p.channels;
  // Takes the ring's group: tokens of the run (or past the sequence, where every slope is zero), or else
  // those after it, which only complete the last gradients.
  const auto take = [&]<bool of_run>() {
#pragma unroll
    for (int k = 0; k < (of_run ? width : before); ++k) {
      x[k] = ring(k, 0);
      Vector<T, n> slope = ring(k, 1);
      if constexpr (readers == 2) {
        const Vector<T, n> second = ring(k, 2);
#pragma unroll
        for (int i = 0; i < n; ++i) slope[i] += second[i];
      }
      if constexpr (with_silu) {
        Vector<A, n> z = load<n>(bias + again(threadIdx.x) * n);
#pragma unroll
        for (int j = 0; j < width; ++j)
#pragma unroll
          for (int i = 0; i < n; ++i) z[i] += weight[j][i] * x[(k + 1 + j) % width][i];
#pragma unroll
        for (int i = 0; i < n; ++i) slope[i] *= silu_slope(z[i], sigmoid<T>(z[i]));
      }
      dz[k] = slope;
      if constexpr (of_run) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
#pragma unroll
          for (int j = 0; j < width; ++j) dweight[j][i] += slope[i] * x[(k + 1 + j) % width][i];
          dbias[i] += slope[i];
        }
      }
      const int s = ring.first + k - before;  // complete now
      Vector<T, n> d = {};
#pragma unroll
      for (int j = 0; j < width; ++j)
#pragma unroll
        for (int i = 0; i < n; ++i) d[i] += weight[j][i] * dz[(k + width - j) % width][i];
      if (static_cast<unsigned>(s) < static_cast<unsigned>(stored))
        store(looks_up ? dx + __ldg(ring.rows + s) * p.channels : dx, d);
      if (!looks_up) dx += p.channels;
    }
  };
  for (; ring.first < tokens; ring.finish()) {
    ring.next();
    take.template operator()<true>();
  }
  if (tokens > 0) {
    ring.next();
    take.template operator()<false>();
  }

  // The runs' sums, added in order: [runs, width + 1, lanes · n] in the place of the ring.
  wait_copies<0>();
  __syncthreads();
  const ConvPlace<n, kRuns> here(p, again(blockIdx.x));
  A* sums = reinterpret_cast<A*>(shared_memory());
  constexpr int columns = conv_lanes * n;
  const int column = static_cast<int>(threadIdx.x) % conv_lanes * n;
#pragma unroll
  for (int j = 0; j <= width; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i)
      sums[(here.run * (width + 1) + j) * columns + column + i] = j < width ? dweight[j][i] : dbias[i];
  __syncthreads();
  const int64_t slice = here.channel - column, row = int64_t{here.batch} * here.blocks + here.block;
  A* partials = static_cast<A*>(p.partials) + row * (width + 1) * p.channels;
  for (int k = static_cast<int>(threadIdx.x); k < (width + 1) * columns; k += kThreads) {
    const bool of_weight = k < width * columns;
    const int c = of_weight ? k / width : k - width * columns, j = of_weight ? k % width : width;
    if (slice + c >= p.channels) continue;
    A total = 0;
    for (int run = 0; run < kRuns; ++run) total += sums[(run * (width + 1) + j) * columns + c];
    partials[of_weight ? slice * width + k : p.channels * width + slice + c] = total;
  }

  // Tokens that have to do with a tail.
  if (here.channel >= p.channels || here.begin == here.end) return;
  const ConvGradient<T, n> gradient(p, here.batch, here.channel);
  if (p.dtail != nullptr && here.begin == 0) {
    for (int s = -before; s < 0; ++s) gradient.store_dx(s);
  }
  const int left = untailed(p, here.end);
  for (int s = left > here.begin ? left : here.begin; s < here.end; ++s) gradient.store_dx(s);
}

// Any width and alignment: one channel a thread, the taps read from memory, every dz made anew for each tap,
// and the gradients of the parameters tap by tap.
template <typename T>
__global__ void __launch_bounds__(general_threads) conv_backward_general_kernel(const ConvTensors p) {
  using A = Wide<T>;
  const ConvPlace<1, general_runs> place(p);
  const bool inside = place.channel < p.channels;
  const int channel = inside ? place.channel : 0;
  const ConvGradient<T, 1> gradient(p, place.batch, channel);
  const int width = static_cast<int>(p.width), before = width - 1, begin = place.begin, end = place.end;
  const int from = place.block == 0 && place.run == 0 && p.dtail != nullptr ? -before : begin;
  for (int s = from; s < end && inside; ++s) gradient.store_dx(s);

  A* sums = reinterpret_cast<A*>(shared_memory());  // [runs, lanes]
  const int64_t row = int64_t{place.batch} * place.blocks + place.block;
  A* partials = static_cast<A*>(p.partials) + row * (width + 1) * p.channels;
  for (int j = 0; j <= width; ++j) {
    A sum = 0;
    for (int t = begin; t < end; ++t) {
      sum += gradient.dz(t)[0] * (j < width ? gradient.rows(t - before + j)[0] : A(1));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (place.run == 0 && inside) {
      A total = 0;
      for (int run = 0; run < general_runs; ++run) total += sums[run * conv_lanes + threadIdx.x];
      partials[j < width ? int64_t{channel} * width + j : p.channels * width + channel] = total;
    }
    __syncthreads();
  }
}

}  // namespace

void conv_backward(const ConvTensors& p, void* stream) {
  const auto reduce = [&]<typename T>() {
    column_sums<Wide<T>>(
        {static_cast<const Wide<T>*>(p.partials), p.batch * ((p.time + conv_block - 1) / conv_block),
         (p.width + 1) * p.channels, static_cast<Wide<T>*>(p.sums)},
        stream);
  };
  if (p.aligned && p.width == conv_width && p.element != Element::float64) {
    const auto run = [&]<typename T, int readers, bool looks_up>() {
      constexpr size_t vector = sizeof(Wide<T>) * conv_channels;
      constexpr size_t shared = std::max(Ring<T, readers, looks_up>::bytes + kThreads * vector,
                                         kThreads * (conv_width + 1) * vector);
      const dim3 grid = conv_grid<conv_channels>(p);
      p.silu ? launch<conv_backward_kernel<T, true, readers, looks_up>>(grid, kThreads, shared, stream, p)
             : launch<conv_backward_kernel<T, false, readers, looks_up>>(grid, kThreads, shared, stream, p);
      reduce.template operator()<T>();
    };
    const auto with_lookup = [&]<typename T, int readers>() {
      p.x_rows == nullptr ? run.template operator()<T, readers, false>()
                          : run.template operator()<T, readers, true>();
    };
    const auto with_readers = [&]<typename T>() {
      p.dy_again == nullptr ? with_lookup.template operator()<T, 1>()
                            : with_lookup.template operator()<T, 2>();
    };
    return p.element == Element::bfloat16 ? with_readers.template operator()<bf16>()
                                          : with_readers.template operator()<float>();
  }
  with_element(p.element, [&]<typename T>() {
    launch<conv_backward_general_kernel<T>>(conv_grid<1>(p), general_threads,
                                            general_threads * sizeof(Wide<T>), stream, p);
    reduce.template operator()<T>();
  });
}

}  // namespace oryx::cuda
