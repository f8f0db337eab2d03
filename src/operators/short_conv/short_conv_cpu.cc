#include "operators/short_conv/short_conv_cpu.h"

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

using operators::short_conv_block;
using operators::ShortConvBackward;
using operators::ShortConvForward;
using operators::ShortConvInput;

// Channels of one task: its weights and partial sums stay in the first cache level.
static constexpr int64_t slice = 256;
// Tokens whose rows are read side by side: enough to reuse the weights, few enough that the hardware follows.
static constexpr int64_t tile = 16;

// The rows of one sequence from -(width - 1), in the tail, to time - 1.
template <typename T>
struct Rows {
  const T* x;
  int64_t stride;
  const T* tail;  // [width - 1, channels]; null = zeros
  int64_t before, channels;

  Rows(const ShortConvInput& a, int64_t b)
      : x(static_cast<const T*>(a.x) + b * a.x_batch_stride),
        stride(a.x_time_stride),
        tail(a.tail ? static_cast<const T*>(a.tail) + b * (a.width - 1) * a.channels : nullptr),
        before(a.width - 1),
        channels(a.channels) {}

  template <typename Lanes>
  Vec<Acc<T>> at(int64_t t, int64_t c, Lanes lanes) const {
    if (t >= 0) return load(x + t * stride + c, lanes);
    return tail ? load(tail + (before + t) * channels + c, lanes) : Vec<Acc<T>>(Acc<T>(0));
  }
};

// Calls body(b, first token, last token, first channel, channels, taps) for every block of tokens and slice
// of channels, in parallel. `taps` holds the slice's weights as [width, slice], and the bias (or zeros) after
// them.
template <typename T, typename Body>
static void for_blocks(const ShortConvInput& a, Body body) {
  using A = Acc<T>;
  const int64_t blocks = (a.time + short_conv_block - 1) / short_conv_block;
  const int64_t slices = (a.channels + slice - 1) / slice;
  const int64_t grain = a.time >= 64 ? 1 : 64 / (a.time + 1) + 1;
  at::parallel_for(0, a.batch * slices * blocks, grain, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch((a.width + 1) * slice);
    A* taps = scratch.get();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks, b = item / blocks % a.batch,
                    first = item / blocks / a.batch * slice;
      const int64_t count = std::min(slice, a.channels - first);
      if (item == begin || item % (blocks * a.batch) == 0) {
        const A *weight = static_cast<const A*>(a.weight) + first * a.width,
                *bias = static_cast<const A*>(a.bias);
        for (int64_t c = 0; c < count; ++c)
          for (int64_t j = 0; j < a.width; ++j) taps[j * slice + c] = weight[c * a.width + j];
        for (int64_t c = 0; c < count; ++c) taps[a.width * slice + c] = bias ? bias[first + c] : A(0);
      }
      body(b, block * short_conv_block, std::min(a.time, (block + 1) * short_conv_block), first, count, taps);
    }
  });
}

// A window of the last `width` vectors: registers where the width is known at compile time (fixed > 0).
template <typename A, int fixed>
struct Window {
  Vec<A> registers[fixed > 0 ? fixed : 1];
  Vec<A>* memory;

  Vec<A>& operator[](int64_t j) {
    if constexpr (fixed > 0) return registers[j];
    return memory[j];
  }
  void push(int64_t width, Vec<A> newest) {
    for (int64_t j = 0; j + 1 < width; ++j) (*this)[j] = (*this)[j + 1];
    (*this)[width - 1] = newest;
  }
};

template <typename T, bool silu_after, int fixed>
static void forward(const ShortConvForward& a) {
  using A = Acc<T>;
  using V = Vec<A>;
  for_blocks<T>(a, [&](int64_t b, int64_t t0, int64_t t1, int64_t first, int64_t count, const A* taps) {
    // Inside the body: a constant captured by a parallel region would be read from memory.
    const int64_t width = fixed > 0 ? fixed : a.width;
    const Rows<T> rows(a, b);
    T* y = static_cast<T*>(a.y) + b * a.time * a.channels;
    Scratch<V> memory(fixed > 0 ? 0 : 2 * width);
    for (int64_t begin = t0; begin < t1; begin += tile) {
      const int64_t end = std::min(t1, begin + tile);
      for_vectors<A>(count, [&](int64_t i, auto lanes) {
        Window<A, fixed> x{{}, memory.get()}, weight{{}, memory.get() + (fixed > 0 ? 0 : width)};
        for (int64_t j = 0; j < width; ++j) weight[j] = load(taps + j * slice + i, lanes);
        const V bias = load(taps + width * slice + i, lanes);
        const int64_t c = first + i;
        for (int64_t j = 1; j < width; ++j) x[j] = rows.at(begin - width + j, c, lanes);
        for (int64_t t = begin; t < end; ++t) {
          x.push(width, load(rows.x + t * rows.stride + c, lanes));
          V z = bias;
          for (int64_t j = 0; j < width; ++j) z = at::vec::fmadd(weight[j], x[j], z);
          if constexpr (silu_after) z = silu(z);
          store(y + t * a.channels + c, z, lanes);
        }
      });
    }
  });
}

// dz_t = dy_t · act'(z_t);  dx_t = Σ_j w_j dz_{t+W-1-j};  dw_j = Σ_t dz_t x_{t-(W-1)+j};  dbias = Σ_t dz_t.
// A block makes dx for its own tokens (the first one also for the tail) and therefore needs dz up to W-1
// tokens past its end, which it recomputes; the sums take each dz once.
template <typename T, bool silu_after, int fixed>
static void backward(const ShortConvBackward& a) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t blocks = (a.time + short_conv_block - 1) / short_conv_block;
  for_blocks<T>(a, [&](int64_t b, int64_t t0, int64_t t1, int64_t first, int64_t count, const A* taps) {
    const int64_t width = fixed > 0 ? fixed : a.width, before = width - 1;
    const Rows<T> rows(a, b);
    const T* dy = static_cast<const T*>(a.dy) + b * a.time * a.channels;
    const T* dnew_tail = a.dnew_tail ? static_cast<const T*>(a.dnew_tail) + b * before * a.channels : nullptr;
    T* dx = static_cast<T*>(a.dx) + b * a.time * a.channels;
    T* dtail = a.dtail ? static_cast<T*>(a.dtail) + b * before * a.channels : nullptr;
    Scratch<V> memory(fixed > 0 ? 0 : 4 * width);
    const int64_t step = fixed > 0 ? 0 : width;
    // From one tile to the next: the last W-1 dz, then the sums for weight and bias.
    Scratch<A> carried((before + width + 1) * slice);
    A *last_dz = carried.get(), *sums = last_dz + before * slice;
    for (int64_t k = 0; k < (before + width + 1) * slice; ++k) last_dz[k] = A(0);
    const int64_t from = t0 == 0 ? (dtail ? -before : 0) : t0;
    for (int64_t begin = t0; begin < t1 + before; begin += tile) {
      const int64_t end = std::min(t1 + before, begin + tile);
      for_vectors<A>(count, [&](int64_t i, auto lanes) {
        V* m = memory.get();
        Window<A, fixed> x{{}, m}, dz{{}, m + step}, weight{{}, m + 2 * step}, dweight{{}, m + 3 * step};
        const int64_t c = first + i;
        for (int64_t j = 0; j < width; ++j) {
          weight[j] = load(taps + j * slice + i, lanes);
          dweight[j] = load(sums + j * slice + i, lanes);
        }
        const V bias = load(taps + width * slice + i, lanes);
        V dbias = load(sums + width * slice + i, lanes);
        for (int64_t j = 1; j < width; ++j) {
          dz[j] = load(last_dz + (j - 1) * slice + i, lanes);
          const int64_t t = begin - width + j;
          x[j] = t < a.time ? rows.at(t, c, lanes) : V(A(0));
        }
        // At step t, dz_t enters the window and the gradient of the input at t - (W-1) is complete.
        for (int64_t t = begin; t < end; ++t) {
          V slope(A(0));
          if (t < a.time) {
            x.push(width, load(rows.x + t * rows.stride + c, lanes));
            slope = load(dy + t * a.channels + c, lanes);
            if constexpr (silu_after) {
              V z = bias;
              for (int64_t j = 0; j < width; ++j) z = at::vec::fmadd(weight[j], x[j], z);
              slope = slope * silu_slope(z, sigmoid(z));
            }
            if (t < t1) {
              for (int64_t j = 0; j < width; ++j) dweight[j] = at::vec::fmadd(slope, x[j], dweight[j]);
              dbias = dbias + slope;
            }
          }
          dz.push(width, slope);
          const int64_t s = t - before;
          if (s < from || s >= t1) continue;
          V d(A(0));
          for (int64_t j = 0; j < width; ++j) d = at::vec::fmadd(weight[j], dz[width - 1 - j], d);
          const int64_t kept = s - (a.time - before);  // the row of the new tail that holds this input
          if (dnew_tail && kept >= 0) d = d + load(dnew_tail + kept * a.channels + c, lanes);
          store(s >= 0 ? dx + s * a.channels + c : dtail + (before + s) * a.channels + c, d, lanes);
        }
        for (int64_t j = 1; j < width; ++j) store(last_dz + (j - 1) * slice + i, dz[j], lanes);
        for (int64_t j = 0; j < width; ++j) store(sums + j * slice + i, dweight[j], lanes);
        store(sums + width * slice + i, dbias, lanes);
      });
    }
    A* partials =
        static_cast<A*>(a.partials) + (b * blocks + t0 / short_conv_block) * (width + 1) * a.channels;
    for (int64_t j = 0; j <= width; ++j)
      std::memcpy(partials + j * a.channels + first, sums + j * slice, count * sizeof(A));
  });
  sum_rows(static_cast<const A*>(a.partials), a.batch * blocks, (a.width + 1) * a.channels,
           static_cast<A*>(a.sums));
}

// The last width - 1 rows of tail and x.
template <typename T>
static void copy_tail(const ShortConvForward& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Rows<T> rows(a, b);
    for (int64_t j = 0; j < a.width - 1; ++j) {
      const int64_t t = a.time - (a.width - 1) + j;
      T* to = static_cast<T*>(a.new_tail) + (b * (a.width - 1) + j) * a.channels;
      const T* from = t >= 0   ? rows.x + t * rows.stride
                      : a.tail ? rows.tail + (rows.before + t) * a.channels
                               : nullptr;
      if (from == nullptr) {
        std::memset(to, 0, a.channels * sizeof(T));
      } else {
        std::memcpy(to, from, a.channels * sizeof(T));
      }
    }
  }
}

void short_conv_forward(const ShortConvForward& a) {
  dispatch(a.dtype, [&]<typename T>() {
    copy_tail<T>(a);
    if (a.time == 0) return;
    if (a.width == 4) {
      a.silu ? forward<T, true, 4>(a) : forward<T, false, 4>(a);
    } else {
      a.silu ? forward<T, true, 0>(a) : forward<T, false, 0>(a);
    }
  });
}

void short_conv_backward(const ShortConvBackward& a) {
  dispatch(a.dtype, [&]<typename T>() {
    if (a.width == 4) {
      a.silu ? backward<T, true, 4>(a) : backward<T, false, 4>(a);
    } else {
      a.silu ? backward<T, true, 0>(a) : backward<T, false, 0>(a);
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
