#include "operators/short_conv/short_conv_device.h"

namespace oryx::cuda {

namespace {

// Tokens whose loads are under way together: as many as registers allow.
template <typename T, bool with_silu>
constexpr int tokens_ahead = sizeof(T) == 2 ? (with_silu ? 8 : 4) : 2;

// The rows of the new tail that this run owns: of its own tokens and, for the first run, of the old tail.
template <typename T, int n>
__device__ inline void copy_tail(const ConvTensors& p, const ConvPlace<n>& place,
                                 const ConvRows<T, n>& rows) {
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
template <typename T, bool with_silu>
__global__ void __launch_bounds__(conv_threads, 3) conv_forward_kernel(const ConvTensors p) {
  constexpr int n = conv_channels, width = 4, ahead = tokens_ahead<T, with_silu>;
  const ConvPlace<n> place(p);
  if (place.channel >= p.channels) return;
  const ConvRows<T, n> rows(p, place.batch, place.channel);
  Vector<T, n> weight[width], x[width];
#pragma unroll
  for (int j = 0; j < width; ++j) weight[j] = conv_tap<T, n>(p, place.channel, j);
  const Vector<T, n> bias = conv_bias<T, n>(p, place.channel);
  const int begin = static_cast<int>(place.begin), end = static_cast<int>(place.end);
#pragma unroll
  for (int j = 1; j < width; ++j) x[j] = rows(begin - width + j);
  T* y = static_cast<T*>(p.y) + (place.batch * p.time + begin) * p.channels + place.channel;
  for (int first = begin; first < end; first += ahead) {
    Raw<T, n> next[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + k < end) next[k] = load_raw<n>(rows.x + (first + k) * rows.stride);
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (first + k >= end) break;
#pragma unroll
      for (int j = 0; j + 1 < width; ++j) x[j] = x[j + 1];
      x[width - 1] = widen<T, n>(next[k]);
      Vector<T, n> z = bias;
#pragma unroll
      for (int j = 0; j < width; ++j)
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] += weight[j][i] * x[j][i];
      if constexpr (with_silu) {
#pragma unroll
        for (int i = 0; i < n; ++i) z[i] = silu<T>(z[i]);
      }
      store(y, z);
      y += p.channels;
    }
  }
  copy_tail(p, place, rows);
}

// Any width and alignment: one channel a thread, the taps read from memory.
template <typename T>
__global__ void __launch_bounds__(conv_threads) conv_forward_general_kernel(const ConvTensors p) {
  const ConvPlace<1> place(p);
  if (place.channel >= p.channels) return;
  const ConvRows<T, 1> rows(p, place.batch, place.channel);
  const int width = static_cast<int>(p.width);
  for (int t = static_cast<int>(place.begin); t < place.end; ++t) {
    Vector<T, 1> z = conv_bias<T, 1>(p, place.channel);
    for (int j = 0; j < width; ++j)
      z[0] += conv_tap<T, 1>(p, place.channel, j)[0] * rows(t - width + 1 + j)[0];
    if (p.silu) z[0] = silu<T>(z[0]);
    store(static_cast<T*>(p.y) + (place.batch * p.time + t) * p.channels + place.channel, z);
  }
  copy_tail(p, place, rows);
}

}  // namespace

void conv_forward(const ConvTensors& p, void* stream) {
  if (p.aligned && p.width == 4 && p.element != Element::float64) {
    const auto run = [&]<typename T>() {
      p.silu ? launch<conv_forward_kernel<T, true>>(conv_grid<conv_channels>(p), conv_threads, 0, stream, p)
             : launch<conv_forward_kernel<T, false>>(conv_grid<conv_channels>(p), conv_threads, 0, stream, p);
    };
    return p.element == Element::bfloat16 ? run.template operator()<bf16>()
                                          : run.template operator()<float>();
  }
  with_element(p.element, [&]<typename T>() {
    launch<conv_forward_general_kernel<T>>(conv_grid<1>(p), conv_threads, 0, stream, p);
  });
}

}  // namespace oryx::cuda
