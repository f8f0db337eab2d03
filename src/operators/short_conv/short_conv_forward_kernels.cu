#include "operators/short_conv/short_conv_device.h"

namespace oryx::cuda {

namespace {

constexpr int kRuns = 8, kThreads = kRuns * conv_lanes;

// The rows of the new tail that this run owns: of its own tokens and, for the first run, of the old tail.
template <typename T, int n, typename Place>
__device__ inline void copy_tail(const ConvTensors& p, const Place& place, const ConvRows<T, n>& rows) {
  const int before = rows.before, first = rows.time - before;  // the token of row 0
  T* to = static_cast<T*>(p.new_tail) + place.batch * before * p.channels + place.channel;
  const bool is_first = place.block == 0 && place.run == 0;
  for (int j = 0; j < before; ++j) {
    const int t = first + j;
    if (t < 0 ? is_first : t >= place.begin && t < place.end)
      store_raw<T, n>(to + j * p.channels, rows.raw(t));
  }
}

// Width 4.
template <typename T, bool with_silu, bool looks_up>
__global__ void __launch_bounds__(kThreads, sizeof(T) != 2 ? 2
                                            : looks_up     ? 3
                                                           : 4) conv_forward_kernel(const ConvTensors p) {
  constexpr int n = conv_channels, width = conv_width;
  const ConvPlace<n, kRuns> place(p);
  if (place.channel >= p.channels) return;
  const ConvRows<T, n> rows(p, place.batch, place.channel);
  const int begin = place.begin, tokens = place.end - begin;
  ConvRing<T, n, 1, kThreads, looks_up> ring({rows.x + (looks_up ? 0 : begin * rows.stride)}, {rows.stride},
                                             looks_up ? rows.rows + begin : nullptr, tokens);
  Vector<T, n> weight[width], x[width];  // token begin + i is x[i % width]
  conv_taps<T, n>(p, place.channel, weight);
  const Vector<T, n> bias = conv_bias<T, n>(p, place.channel);
#pragma unroll
  for (int j = 1; j < width; ++j) x[j] = rows(begin - width + j);
  T* y = static_cast<T*>(p.y) + (place.batch * p.time + begin) * p.channels + place.channel;
  for (; ring.first < tokens; ring.finish()) {
    ring.next();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      x[k] = ring(k, 0);
      Vector<T, n> z = bias;
#pragma unroll
      for (int j = 0; j < width; ++j)
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] += weight[j][i] * x[(k + 1 + j) % width][i];
      if constexpr (with_silu) {
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = silu<T>(z[i]);
      }
      if (ring.first + k < tokens) store(y, z);
      y += p.channels;
    }
  }
  wait_copies<0>();
  const ConvPlace<n, kRuns> here(p, again(blockIdx.x));
  copy_tail<T, n>(p, here, ConvRows<T, n>(p, here.batch, here.channel));
}

// Any width and alignment: one channel a thread, the taps read from memory.
template <typename T>
__global__ void __launch_bounds__(general_threads) conv_forward_general_kernel(const ConvTensors p) {
  const ConvPlace<1, general_runs> place(p);
  if (place.channel >= p.channels) return;
  const ConvRows<T, 1> rows(p, place.batch, place.channel);
  const int width = static_cast<int>(p.width);
  for (int t = place.begin; t < place.end; ++t) {
    Vector<T, 1> z = conv_bias<T, 1>(p, place.channel);
    for (int j = 0; j < width; ++j)
      z[0] += conv_tap<T, 1>(p, place.channel, j)[0] * rows(t - width + 1 + j)[0];
    if (p.silu) z[0] = silu<T>(z[0]);
    store(static_cast<T*>(p.y) + (place.batch * p.time + t) * p.channels + place.channel, z);
  }
  copy_tail<T, 1>(p, place, rows);
}

}  // namespace

void conv_forward(const ConvTensors& p, void* stream) {
  if (p.aligned && p.width == conv_width && p.element != Element::float64) {
    const auto run = [&]<typename T, bool looks_up>() {
      constexpr size_t shared = ConvRing<T, conv_channels, 1, kThreads, looks_up>::bytes;
      const dim3 grid = conv_grid<conv_channels>(p);
      p.silu ? launch<conv_forward_kernel<T, true, looks_up>>(grid, kThreads, shared, stream, p)
             : launch<conv_forward_kernel<T, false, looks_up>>(grid, kThreads, shared, stream, p);
    };
    const auto with_lookup = [&]<typename T>() {
      p.x_rows == nullptr ? run.template operator()<T, false>() : run.template operator()<T, true>();
    };
    return p.element == Element::bfloat16 ? with_lookup.template operator()<bf16>()
                                          : with_lookup.template operator()<float>();
  }
  with_element(p.element, [&]<typename T>() {
    launch<conv_forward_general_kernel<T>>(conv_grid<1>(p), general_threads, 0, stream, p);
  });
}

}  // namespace oryx::cuda
