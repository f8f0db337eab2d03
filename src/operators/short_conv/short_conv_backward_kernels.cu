// dz_t = dy_t · act'(z_t);  dx_t = Σ_j w_j dz_{t+W-1-j};  dw_j = Σ_t dz_t x_{t-(W-1)+j};  dbias = Σ_t dz_t.
// A run makes dx for its own tokens (the first one also for the tail) and therefore recomputes dz up to W-1
// tokens past its end; the sums take each dz once.
#include "operators/short_conv/short_conv_device.h"

namespace oryx::cuda {

namespace {

// Tokens whose loads are under way together: as many as registers allow.
template <typename T, bool with_silu>
constexpr int tokens_ahead = sizeof(T) == 2 ? (with_silu ? 4 : 3) : (with_silu ? 1 : 2);

// The gradient of input t (negative: of the tail), which also stands in the new tail where it is one of the
// last.
template <typename T, int n>
__device__ inline void store_dx(const ConvTensors& p, int64_t batch, int64_t channel, int t, Vector<T, n> d) {
  const int before = static_cast<int>(p.width) - 1, kept = t - (static_cast<int>(p.time) - before);
  if (p.dnew_tail != nullptr && kept >= 0) {
    const Vector<T, n> more =
        load<n>(static_cast<const T*>(p.dnew_tail) + (batch * before + kept) * p.channels + channel);
#pragma unroll
    for (int i = 0; i < n; ++i) d[i] += more[i];
  }
  T* to = t >= 0 ? static_cast<T*>(p.dx) + (batch * p.time + t) * p.channels
                 : static_cast<T*>(p.dtail) + (batch * before + before + t) * p.channels;
  store(to + channel, d);
}

// Width 4.
template <typename T, bool with_silu>
__global__ void __launch_bounds__(conv_threads, 2) conv_backward_kernel(const ConvTensors p) {
  using A = Wide<T>;
  constexpr int n = conv_channels, width = 4, before = width - 1, ahead = tokens_ahead<T, with_silu>;
  const ConvPlace<n> place(p);
  const bool inside = place.channel < p.channels;
  const int64_t channel = inside ? place.channel : 0;  // threads outside work along and store nothing
  const ConvRows<T, n> rows(p, place.batch, channel);
  const int begin = static_cast<int>(place.begin), end = static_cast<int>(place.end);
  Vector<T, n> weight[width], x[width], dz[width], dweight[width + 1] = {};
#pragma unroll
  for (int j = 0; j < width; ++j) weight[j] = conv_tap<T, n>(p, channel, j);
  const Vector<T, n> bias = conv_bias<T, n>(p, channel);
#pragma unroll
  for (int j = 1; j < width; ++j) {
    x[j] = rows(begin - width + j);
    dz[j] = {};
  }
  const T* dy = static_cast<const T*>(p.dy) + place.batch * p.time * p.channels + channel;
  // Runs past the end of the sequence have nothing: begin = end. The first token whose gradient this run
  // stores:
  const int from = place.block == 0 && place.run == 0 && p.dtail != nullptr ? -before : begin;
  const int last = begin < end ? end + before : begin;
  for (int first = begin; first < last; first += ahead) {
    Raw<T, n> next_x[ahead], next_dy[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int t = first + k;
      const bool read = t < last && t < rows.time;
      next_x[k] = read ? load_raw<n>(rows.x + t * rows.stride) : Raw<T, n>{};
      next_dy[k] = read ? load_raw<n>(dy + t * p.channels) : Raw<T, n>{};
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int t = first + k;
      if (t >= last) break;
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) x[j] = x[j + 1], dz[j] = dz[j + 1];
      x[width - 1] = widen<T, n>(next_x[k]);
      Vector<T, n> slope = widen<T, n>(next_dy[k]);  // zero past the sequence
      if constexpr (with_silu) {
        Vector<T, n> z = bias;
#pragma unroll
        for (int j = 0; j < width; ++j)
#pragma unroll
          for (int i = 0; i < n; ++i) z[i] += weight[j][i] * x[j][i];
#pragma unroll
        for (int i = 0; i < n; ++i) slope[i] *= silu_slope(z[i], sigmoid<T>(z[i]));
      }
      if (t < end) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
#pragma unroll
          for (int j = 0; j < width; ++j) dweight[j][i] += slope[i] * x[j][i];
          dweight[width][i] += slope[i];
        }
      }
      dz[width - 1] = slope;
      const int s = t - before;  // complete now
      if (s < from || s >= end || !inside) continue;
      Vector<T, n> d = {};
#pragma unroll
      for (int j = 0; j < width; ++j)
#pragma unroll
        for (int i = 0; i < n; ++i) d[i] += weight[j][i] * dz[width - 1 - j][i];
      store_dx<T, n>(p, place.batch, channel, s, d);
    }
  }

  // The runs' sums, added in order: [runs, width + 1, lanes · n].
  A* sums = reinterpret_cast<A*>(shared_memory());
  constexpr int columns = conv_lanes * n;
  const int lane = static_cast<int>(threadIdx.x) % conv_lanes;
#pragma unroll
  for (int j = 0; j <= width; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i) sums[(place.run * (width + 1) + j) * columns + lane * n + i] = dweight[j][i];
  __syncthreads();
  const int64_t slice = place.channel - lane * n;
  A* partials =
      static_cast<A*>(p.partials) + (place.batch * place.blocks + place.block) * (width + 1) * p.channels;
  for (int k = static_cast<int>(threadIdx.x); k < (width + 1) * columns; k += conv_threads) {
    const int64_t c = slice + k % columns;
    if (c >= p.channels) continue;
    A total = 0;
    for (int run = 0; run < conv_runs; ++run) total += sums[run * (width + 1) * columns + k];
    partials[k / columns * p.channels + c] = total;
  }
}

// Any width and alignment: one channel a thread, the taps read from memory, every dz made anew for each tap,
// and the gradients of the parameters tap by tap.
template <typename T>
__global__ void __launch_bounds__(conv_threads) conv_backward_general_kernel(const ConvTensors p) {
  using A = Wide<T>;
  const ConvPlace<1> place(p);
  const bool inside = place.channel < p.channels;
  const int64_t channel = inside ? place.channel : 0;
  const ConvRows<T, 1> rows(p, place.batch, channel);
  const int width = static_cast<int>(p.width), before = width - 1;
  const int begin = static_cast<int>(place.begin), end = static_cast<int>(place.end);
  const T* dy = static_cast<const T*>(p.dy) + place.batch * p.time * p.channels + channel;
  const auto dz = [&](int t) {
    if (t < 0 || t >= rows.time) return A(0);
    const A slope = load<1>(dy + t * p.channels)[0];
    if (!p.silu) return slope;
    A z = conv_bias<T, 1>(p, channel)[0];
    for (int j = 0; j < width; ++j) z += conv_tap<T, 1>(p, channel, j)[0] * rows(t - before + j)[0];
    return slope * silu_slope(z, sigmoid<T>(z));
  };
  const int from = place.block == 0 && place.run == 0 && p.dtail != nullptr ? -before : begin;
  for (int s = from; s < end && inside; ++s) {
    Vector<T, 1> d = {};
    for (int j = 0; j < width; ++j) d[0] += conv_tap<T, 1>(p, channel, j)[0] * dz(s + before - j);
    store_dx<T, 1>(p, place.batch, channel, s, d);
  }

  A* sums = reinterpret_cast<A*>(shared_memory());  // [runs, lanes]
  A* partials =
      static_cast<A*>(p.partials) + (place.batch * place.blocks + place.block) * (width + 1) * p.channels;
  for (int j = 0; j <= width; ++j) {
    A sum = 0;
    for (int t = begin; t < end; ++t) sum += j < width ? dz(t) * rows(t - before + j)[0] : dz(t);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (place.run == 0 && inside) {
      A total = 0;
      for (int run = 0; run < conv_runs; ++run) total += sums[run * conv_lanes + threadIdx.x];
      partials[j * p.channels + channel] = total;
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
  if (p.aligned && p.width == 4 && p.element != Element::float64) {
    const auto run = [&]<typename T>() {
      const size_t shared = sizeof(Wide<T>) * conv_runs * 5 * conv_lanes * conv_channels;
      p.silu ? launch<conv_backward_kernel<T, true>>(conv_grid<conv_channels>(p), conv_threads, shared,
                                                     stream, p)
             : launch<conv_backward_kernel<T, false>>(conv_grid<conv_channels>(p), conv_threads, shared,
                                                      stream, p);
      reduce.template operator()<T>();
    };
    return p.element == Element::bfloat16 ? run.template operator()<bf16>()
                                          : run.template operator()<float>();
  }
  with_element(p.element, [&]<typename T>() {
    launch<conv_backward_general_kernel<T>>(conv_grid<1>(p), conv_threads, conv_threads * sizeof(Wide<T>),
                                            stream, p);
    reduce.template operator()<T>();
  });
}

}  // namespace oryx::cuda
