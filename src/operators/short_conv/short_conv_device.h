// What the forward and backward kernels of short_conv share. A thread takes a few neighbouring channels of a
// run of tokens and keeps the inputs under the taps in registers; a block takes 32 such threads side by side
// along the channels and 8 runs of one sequence.
#pragma once

#include "operators/device/pointwise.h"
#include "operators/short_conv/short_conv_kernels.h"

namespace oryx::cuda {

using namespace device;

inline constexpr int conv_lanes = 32, conv_runs = 8, conv_threads = conv_lanes * conv_runs;
inline constexpr int conv_run = conv_block / conv_runs;

// Channels of one thread on the fast path: 8 or 16 bytes.
inline constexpr int conv_channels = 4;

// Where this thread works: block index = (sequence · blocks of tokens + block) · slices of channels + slice.
template <int n>
struct ConvPlace {
  int64_t batch, block, blocks, channel, begin, end;  // tokens [begin, end)
  int run;

  __device__ explicit ConvPlace(const ConvTensors& p) {
    const unsigned slices = static_cast<unsigned>((p.channels + conv_lanes * n - 1) / (conv_lanes * n));
    const unsigned count = static_cast<unsigned>((p.time + conv_block - 1) / conv_block);
    blocks = count > 0 ? count : 1;
    const unsigned sequence_block = blockIdx.x / slices;
    batch = sequence_block / static_cast<unsigned>(blocks);
    block = sequence_block % static_cast<unsigned>(blocks);
    run = static_cast<int>(threadIdx.x) / conv_lanes;
    channel = (static_cast<int64_t>(blockIdx.x % slices) * conv_lanes + threadIdx.x % conv_lanes) * n;
    begin = block * conv_block + run * conv_run;
    begin = begin < p.time ? begin : p.time;
    end = begin + conv_run < p.time ? begin + conv_run : p.time;
  }
};

template <int n>
inline dim3 conv_grid(const ConvTensors& p) {
  const int64_t slices = (p.channels + conv_lanes * n - 1) / (conv_lanes * n);
  const int64_t blocks = p.time > 0 ? (p.time + conv_block - 1) / conv_block : 1;
  return dim3(static_cast<unsigned>(p.batch * blocks * slices));
}

// Rows of one sequence from −(width − 1), in the tail, to time − 1; zero elsewhere.
template <typename T, int n>
struct ConvRows {
  const T *x, *tail;
  int64_t stride, channels;
  int time, before;

  __device__ ConvRows(const ConvTensors& p, int64_t batch, int64_t channel)
      : x(static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel),
        tail(p.tail == nullptr
                 ? nullptr
                 : static_cast<const T*>(p.tail) + batch * (p.width - 1) * p.channels + channel),
        stride(p.x_time_stride),
        channels(p.channels),
        time(static_cast<int>(p.time)),
        before(static_cast<int>(p.width) - 1) {}

  __device__ Raw<T, n> raw(int t) const {
    if (t >= 0 && t < time) return load_raw<n>(x + t * stride);
    if (t < 0 && tail != nullptr) return load_raw<n>(tail + (before + t) * channels);
    return Raw<T, n>{};
  }
  __device__ Vector<T, n> operator()(int t) const { return widen<T, n>(raw(t)); }
};

// Column j of the weight for n channels.
template <typename T, int n>
__device__ inline Vector<T, n> conv_tap(const ConvTensors& p, int64_t channel, int64_t j) {
  Vector<T, n> result;
#pragma unroll
  for (int i = 0; i < n; ++i) result[i] = static_cast<const Wide<T>*>(p.weight)[(channel + i) * p.width + j];
  return result;
}
template <typename T, int n>
__device__ inline Vector<T, n> conv_bias(const ConvTensors& p, int64_t channel) {
  Vector<T, n> result;
#pragma unroll
  for (int i = 0; i < n; ++i)
    result[i] = p.bias == nullptr ? Wide<T>(0) : static_cast<const Wide<T>*>(p.bias)[channel + i];
  return result;
}

}  // namespace oryx::cuda
