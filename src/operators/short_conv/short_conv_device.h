// What the forward and backward kernels of short_conv share. A thread takes a few neighbouring channels of a
// run of tokens and keeps the inputs under the taps in registers; a block takes 32 such threads side by side
// along the channels and, run by run, conv_block tokens of one sequence.
#pragma once

#include "operators/device/pointwise.h"
#include "operators/short_conv/short_conv_kernels.h"

namespace oryx::cuda {

using namespace device;

inline constexpr int conv_lanes = 32;

// Channels of one thread on the fast path (8 or 16 bytes), and the width it serves.
inline constexpr int conv_channels = 4, conv_width = 4;

// Runs of a block of the general kernels.
inline constexpr int general_runs = 8, general_threads = conv_lanes * general_runs;

// Where this thread works: block index = (sequence · blocks of tokens + block) · slices of channels + slice.
template <int n, int runs>
struct ConvPlace {
  int batch, block, blocks, channel, run, begin, end;  // tokens [begin, end)

  __device__ explicit ConvPlace(const ConvTensors& p, unsigned index = blockIdx.x) {
    const unsigned slices = static_cast<unsigned>((p.channels + conv_lanes * n - 1) / (conv_lanes * n));
    const unsigned count = static_cast<unsigned>((p.time + conv_block - 1) / conv_block);
    blocks = count > 0 ? static_cast<int>(count) : 1;
    const unsigned sequence_block = index / slices;
    batch = static_cast<int>(sequence_block / static_cast<unsigned>(blocks));
    block = static_cast<int>(sequence_block % static_cast<unsigned>(blocks));
    run = static_cast<int>(threadIdx.x) / conv_lanes;
    channel = static_cast<int>((index % slices) * conv_lanes + threadIdx.x % conv_lanes) * n;
    constexpr int tokens = conv_block / runs;
    const int time = static_cast<int>(p.time), from = block * conv_block + run * tokens;
    begin = from < time ? from : time;
    end = time - begin < tokens ? time : begin + tokens;
  }
};

// x, which the compiler does not take for the x of before: what is made from it anew holds no registers in
// between.
template <typename Integer>
__device__ inline Integer again(Integer x) {
#ifndef ORYX_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

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
  const int64_t* rows;  // of x, one a token; null where they are in order
  int64_t stride, channels;
  int time, before;

  __device__ ConvRows(const ConvTensors& p, int64_t batch, int64_t channel)
      : x(static_cast<const T*>(p.x) + batch * p.x_batch_stride + channel),
        tail(p.tail == nullptr
                 ? nullptr
                 : static_cast<const T*>(p.tail) + batch * (p.width - 1) * p.channels + channel),
        rows(p.x_rows == nullptr ? nullptr : p.x_rows + batch * p.time),
        stride(p.x_time_stride),
        channels(p.channels),
        time(static_cast<int>(p.time)),
        before(static_cast<int>(p.width) - 1) {}

  __device__ Raw<T, n> raw(int t) const {
    if (t >= 0 && t < time) return load_raw<n>(x + (rows == nullptr ? t : rows[t]) * stride);
    if (t < 0 && tail != nullptr) return load_raw<n>(tail + (before + t) * channels);
    return Raw<T, n>{};
  }
  __device__ Vector<T, n> operator()(int t) const { return widen<T, n>(raw(t)); }
};

// A thread's own rows of `streams` tensors on their way through shared memory, so that many are under way
// while none takes a register. The rows of the first tensor may be looked up. Tokens come in groups of
// conv_width: unrolled over one, the values under the taps change places in registers without a move.
template <typename T, int n, int streams, int threads, bool looks_up>
struct ConvRing {
  static constexpr int stages = 3, group = conv_width;
  static constexpr size_t bytes = sizeof(Raw<T, n>) * stages * group * streams * threads;

  Raw<T, n>* mine;         // [stages, group, streams, threads]
  const T* from[streams];  // what is copied next; where rows are looked up, row 0
  const int64_t* rows;     // of the first token and so on
  int row[group];          // of what is copied next
  int64_t strides[streams];
  int limit;                 // tokens from here on are zeros
  int first = 0, stage = 0;  // the group that is taken next

  // Starts the first groups of `tokens` tokens from those addresses on. The ring lies at the start of shared
  // memory.
  __device__ ConvRing(const T* const (&tensors)[streams], const int64_t (&token_strides)[streams],
                      const int64_t* rows_of_tokens, int tokens)
      : mine(reinterpret_cast<Raw<T, n>*>(shared_memory()) + threadIdx.x),
        rows(rows_of_tokens),
        limit(tokens) {
#pragma unroll
    for (int s = 0; s < streams; ++s) from[s] = tensors[s], strides[s] = token_strides[s];
    if (looks_up) look_up(0);
#pragma unroll
    for (int i = 0; i + 1 < stages; ++i) copy(i * group, i);
  }

  // A group ahead of the copies that need them.
  __device__ void look_up(int token) {
#pragma unroll
    for (int k = 0; k < group; ++k)
      row[k] = token + k < limit ? static_cast<int>(__ldg(rows + token + k)) : 0;
  }

  __device__ void copy(int token, int to) {
#pragma unroll
    for (int k = 0; k < group; ++k)
#pragma unroll
      for (int s = 0; s < streams; ++s) {
        const bool by_row = looks_up && s == 0;
        copy_async<sizeof(Raw<T, n>)>(mine + ((to * group + k) * streams + s) * threads,
                                      by_row ? from[s] + row[k] * strides[s] : from[s], token + k < limit);
        if (!by_row) from[s] += strides[s];
      }
    commit_copies();
    if (looks_up) look_up(token + group);
  }

  // Waits for the next group and starts one in the place of the group before it, all of which has been read.
  __device__ void next() {
    wait_copies<stages - 2>();
    copy(first + (stages - 1) * group, stage == 0 ? stages - 1 : stage - 1);
  }
  // Token k of the group of stream s.
  __device__ Vector<T, n> operator()(int k, int s) const {
    return widen<T, n>(mine[((stage * group + k) * streams + s) * threads]);
  }
  __device__ void finish() {
    first += group;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
};

// Column j of the weight for n channels.
template <typename T, int n>
__device__ inline Vector<T, n> conv_tap(const ConvTensors& p, int64_t channel, int64_t j) {
  Vector<T, n> result;
#pragma unroll
  for (int i = 0; i < n; ++i) result[i] = static_cast<const Wide<T>*>(p.weight)[(channel + i) * p.width + j];
  return result;
}
// All columns, for width conv_width.
template <typename T, int n>
__device__ inline void conv_taps(const ConvTensors& p, int64_t channel, Vector<T, n> (&weight)[conv_width]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const auto row = load_raw<conv_width>(static_cast<const Wide<T>*>(p.weight) + (channel + i) * conv_width);
#pragma unroll
    for (int j = 0; j < conv_width; ++j) weight[j][i] = row.value[j];
  }
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
