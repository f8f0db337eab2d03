// What the chunked kernels of the linear mixers share: blocks in and out of strided tensors, and decays.
// For kernel files compiled by oryx_cpu_kernels().
#pragma once

#include <c10/util/BFloat16.h>

#include "operators/cpu/block.h"
#include "operators/cpu/mixer_arguments.h"

namespace oryx::ORYX_CPU_ISA {

template <typename Element>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename Element>
using Accumulate = typename AccumulateOf<Element>::type;

// Calls function with a value of the C++ type of the elements.
template <typename Function>
inline auto with_element(cpu::ElementType type, Function&& function) {
  switch (type) {
    case cpu::ElementType::float64:
      return function(double{});
    case cpu::ElementType::bfloat16:
      return function(c10::BFloat16{});
    default:
      return function(float{});
  }
}

inline float widen(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Rounds to the nearest element, ties to even; NaN stays NaN.
inline void narrow(float x, c10::BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.x = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }

template <typename Element, typename Acc>
inline void load_row(const Element* from, int64_t columns, Acc factor, Acc* to, int64_t ld) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) to[j] = factor * widen(from[j]);
  for (int64_t j = columns; j < ld; ++j) to[j] = 0;
}

template <typename Element, typename Acc>
inline void store_row(const Acc* from, int64_t columns, Acc factor, void* base, int64_t offset, bool wide) {
  if (wide) {
    Acc* to = static_cast<Acc*>(base) + offset;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) to[j] = factor * from[j];
  } else {
    Element* to = static_cast<Element*>(base) + offset;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) narrow(factor * from[j], to[j]);
  }
}

// One state and the heads around it (mixer_arguments.h).
struct Stream {
  int64_t batch, head, key_head;
  int64_t group;         // output heads that read this state
  int64_t first_output;  // the first of them
  int64_t outputs_per_query;

  Stream(const cpu::MixerShape& shape, int64_t index)
      : batch(index / shape.state_heads),
        head(index % shape.state_heads),
        key_head(head / (shape.state_heads / shape.key_heads)),
        group(shape.output_heads / shape.state_heads),
        first_output(head * group),
        outputs_per_query(shape.output_heads / shape.query_heads) {}
};

// Asks for a row that is needed soon: rows of one head lie too far apart for the processor to guess.
template <typename Element>
inline void prefetch_row(const Element* from, int64_t columns) {
  constexpr int64_t line = 64 / sizeof(Element);
  for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(from + j, 0, 2);
}

// Tokens [begin, begin + count) of one head as a block, and back. `ahead` says how many tokens later (or
// earlier) the next block lies; `time` bounds it.
template <typename Element, typename Acc>
inline void load_tokens(const cpu::RowView& view, int64_t batch, int64_t head, int64_t begin, int64_t count,
                        int64_t columns, Acc* to, int64_t ld, int64_t ahead, int64_t time) {
  const Element* from = static_cast<const Element*>(view.data) + batch * view.batch + head * view.head;
  for (int64_t i = begin; i < begin + count; ++i, to += ld) {
    if (i + ahead >= 0 && i + ahead < time) prefetch_row(from + (i + ahead) * view.time, columns);
    load_row(from + i * view.time, columns, Acc(1), to, ld);
  }
}
template <typename Element, typename Acc>
inline void store_tokens(const cpu::RowView& view, int64_t batch, int64_t head, int64_t begin, int64_t count,
                         int64_t columns, const Acc* from, int64_t ld) {
  const int64_t base = batch * view.batch + head * view.head;
  for (int64_t i = 0; i < count; ++i) {
    store_row<Element>(from + i * ld, columns, Acc(1), view.data, base + (begin + i) * view.time, view.wide);
  }
}

// The rows of one chunk that want an output: row = token · group + output head within the group, sorted by
// position, so that causal products are bands.
struct ChunkRows {
  const int64_t* packed;  // [tokens]
  int64_t tokens, count;
  int64_t before, after;  // tokens of the same sequence on both sides
  int32_t* position;      // [count] within the chunk
  int32_t* end;           // [count] position + 1
  int32_t* first;         // [chunk] the first row at or after each position

  void find(const cpu::MixerInputs& a, const Stream& s, int64_t chunk, int64_t length) {
    const int64_t* begin = a.rows.chunk_begin + s.batch * (a.shape.chunks + 1) + chunk;
    packed = a.rows.row + begin[0];
    tokens = begin[1] - begin[0];
    before = begin[0] - begin[-chunk];
    after = begin[a.shape.chunks - chunk] - begin[1];
    count = tokens * s.group;
    const int32_t* at = a.rows.position + begin[0];
    int64_t row = 0;
    for (int64_t i = 0; i < count; ++i) {
      position[i] = at[i / s.group] - static_cast<int32_t>(chunk * a.shape.chunk);
      end[i] = position[i] + 1;
    }
    for (int64_t j = 0; j < length; ++j) {
      while (row < count && position[row] < j) ++row;
      first[j] = static_cast<int32_t>(row);
    }
  }

  void allocate(const cpu::MixerInputs& a, Arena& arena) {
    const int64_t most = a.rows.largest * (a.shape.output_heads / a.shape.state_heads);
    position = arena.take<int32_t>(most);
    end = arena.take<int32_t>(most);
    first = arena.take<int32_t>(a.shape.chunk);
  }
};

// The chunk's rows of a packed tensor whose heads are query heads (by_query) or output heads. The next chunk
// comes later, or earlier if `backwards`.
template <typename Element, typename Acc>
inline void load_packed(const cpu::RowView& view, const ChunkRows& rows, const Stream& s, bool by_query,
                        bool backwards, int64_t columns, Acc factor, Acc* to, int64_t ld) {
  const Element* data = static_cast<const Element*>(view.data);
  const int64_t ahead = backwards ? -rows.tokens : rows.tokens;
  for (int64_t i = 0; i < rows.tokens; ++i) {
    const bool next = i + ahead >= -rows.before && i + ahead < rows.tokens + rows.after;
    for (int64_t r = 0; r < s.group; ++r, to += ld) {
      const int64_t head = by_query ? (s.first_output + r) / s.outputs_per_query : s.first_output + r;
      if (next) prefetch_row(data + rows.packed[i + ahead] * view.time + head * view.head, columns);
      load_row(data + rows.packed[i] * view.time + head * view.head, columns, factor, to, ld);
    }
  }
}
template <typename Element, typename Acc>
inline void store_packed(const cpu::RowView& view, const ChunkRows& rows, const Stream& s, int64_t columns,
                         Acc factor, const Acc* from, int64_t ld) {
  for (int64_t i = 0; i < rows.tokens; ++i) {
    for (int64_t r = 0; r < s.group; ++r, from += ld) {
      const int64_t offset = rows.packed[i] * view.time + (s.first_output + r) * view.head;
      store_row<Element>(from, columns, factor, view.data, offset, view.wide);
    }
  }
}

// A stream's state [key_dim, value_dim] in and out; null reads as zero.
template <typename Acc>
inline void load_state(const void* base, int64_t stream, const cpu::MixerShape& shape, Acc* to, int64_t ld) {
  if (base == nullptr) {
    std::memset(to, 0, shape.key_dim * ld * sizeof(Acc));
    return;
  }
  const Acc* from = static_cast<const Acc*>(base) + stream * shape.key_dim * shape.value_dim;
  for (int64_t i = 0; i < shape.key_dim; ++i) {
    load_row(from + i * shape.value_dim, shape.value_dim, Acc(1), to + i * ld, ld);
  }
}
template <typename Acc>
inline void store_state(const Acc* from, int64_t ld, int64_t stream, const cpu::MixerShape& shape,
                        void* base) {
  Acc* to = static_cast<Acc*>(base) + stream * shape.key_dim * shape.value_dim;
  for (int64_t i = 0; i < shape.key_dim; ++i) {
    std::memcpy(to + i * shape.value_dim, from + i * ld, shape.value_dim * sizeof(Acc));
  }
}

// The decays of one chunk. G, the running sum of log_decay, is held as high + low: with one strong decay in
// the chunk G is large, and e^{G_i − G_j} behind it would keep only a few digits of a single float.
template <typename Acc>
struct Decays {
  Acc* high;   // [padded chunk] G = high + low
  Acc* low;    //
  Acc* gamma;  // e^{G}
  Acc* rho;    // e^{G_last − G}
  Acc total;   // e^{G_last}

  void allocate(int64_t chunk, Arena& arena) {
    for (Acc** piece : {&high, &low, &gamma, &rho}) *piece = arena.take<Acc>(padded(chunk));
  }

  // log_decay points at the stream's entry of the chunk's first token.
  void compute(const Acc* log_decay, int64_t stride, int64_t length) {
    double sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      sum += log_decay[i * stride];
      high[i] = static_cast<Acc>(sum);
      low[i] = static_cast<Acc>(sum - static_cast<double>(high[i]));
    }
    for (int64_t i = 0; i < length; ++i) {
      gamma[i] = high[i] + low[i];
      rho[i] = (high[length - 1] - high[i]) + (low[length - 1] - low[i]);
    }
    for (int64_t i = length; i < padded(length); ++i) high[i] = low[i] = gamma[i] = rho[i] = 0;
    for (int64_t i = 0; i < padded(length); i += Lanes<Acc>::count) {
      store(gamma + i, exponential<Acc>(load(gamma + i)));
      store(rho + i, exponential<Acc>(load(rho + i)));
    }
    total = gamma[length - 1];
  }

  // e^{G_i − G_j} for the vector of columns that starts at j. Columns past i may hold anything, infinity
  // included: the caller selects (keep_before), it never multiplies by a mask.
  typename Lanes<Acc>::Vector between(int64_t i, int64_t j) const {
    return exponential<Acc>((high[i] - load(high + j)) + (low[i] - load(low + j)));
  }
};

// The blocks of one chunk that every pass of every linear mixer needs. Sizes in comments: C tokens, M query
// rows, K key_dim, V value_dim; ldc, ldk, ldv are the leading dimensions.
template <typename Element>
struct MixerChunk {
  using Acc = Accumulate<Element>;
  const cpu::MixerInputs& a;
  int64_t ldk, ldv, ldc;
  ChunkRows rows;
  Decays<Acc> decay;
  Acc* step;               // [C] Δ or β
  Acc* key;                // [C, K]
  Acc* key_t;              // [K, C]
  Acc* value;              // [C, V]
  Acc* query;              // [M, K]
  Acc* scores;             // [M, C]
  bool backwards = false;  // whether the chunks are visited from the last to the first

  MixerChunk(const cpu::MixerInputs& inputs, Arena& arena)
      : a(inputs), ldk(padded(a.shape.key_dim)), ldv(padded(a.shape.value_dim)), ldc(padded(a.shape.chunk)) {
    rows.allocate(a, arena);
    decay.allocate(a.shape.chunk, arena);
    step = arena.take<Acc>(ldc);
    key = arena.take<Acc>(a.shape.chunk * ldk);
    key_t = arena.take<Acc>(a.shape.key_dim * ldc);
    value = arena.take<Acc>(a.shape.chunk * ldv);
    query = arena.take<Acc>(most_rows() * ldk);
    scores = arena.take<Acc>(most_rows() * ldc);
  }

  int64_t most_rows() const { return a.rows.largest * (a.shape.output_heads / a.shape.state_heads); }
  int64_t begin(int64_t chunk) const { return chunk * a.shape.chunk; }
  int64_t length(int64_t chunk) const {
    const int64_t left = a.shape.time - begin(chunk);
    return left < a.shape.chunk ? left : a.shape.chunk;
  }
  // Where the chunk's first token is in [batch, time, state_heads].
  int64_t at(const Stream& s, int64_t chunk) const {
    return (s.batch * a.shape.time + begin(chunk)) * a.shape.state_heads + s.head;
  }

  void load_inputs(const Stream& s, int64_t chunk) {
    const int64_t n = length(chunk), heads = a.shape.state_heads;
    const int64_t ahead = backwards ? -a.shape.chunk : a.shape.chunk, time = a.shape.time;
    load_tokens<Element>(a.key, s.batch, s.key_head, begin(chunk), n, a.shape.key_dim, key, ldk, ahead, time);
    load_tokens<Element>(a.value, s.batch, s.head, begin(chunk), n, a.shape.value_dim, value, ldv, ahead,
                         time);
    decay.compute(static_cast<const Acc*>(a.log_decay) + at(s, chunk), heads, n);
    const Acc* from = static_cast<const Acc*>(a.step) + at(s, chunk);
    for (int64_t i = 0; i < n; ++i) step[i] = from[i * heads];
    for (int64_t i = n; i < padded(n); ++i) step[i] = 0;
  }

  void load_query(const Stream& s, int64_t chunk, Acc scale) {
    rows.find(a, s, chunk, length(chunk));
    load_packed<Element>(a.query, rows, s, true, backwards, a.shape.key_dim, scale, query, ldk);
  }

  void transpose_key(int64_t n) { transpose(n, a.shape.key_dim, key, ldk, key_t, ldc); }

  // scores = Q Kᵀ where the key is not after the query; needs key_t.
  void multiply_scores(int64_t n) {
    multiply<false>(rows.count, padded(n), a.shape.key_dim, query, ldk, key_t, ldc, Acc(0), scores, ldc,
                    {.columns = rows.end});
  }
};

// d log_decay_j = Σ_{i ≥ j} dG_i.
template <typename Acc>
inline void store_decay_gradient(const Acc* gradient, int64_t length, Acc* to, int64_t stride) {
  double sum = 0;
  for (int64_t i = length - 1; i >= 0; --i) {
    sum += gradient[i];
    to[i * stride] = static_cast<Acc>(sum);
  }
}

}  // namespace oryx::ORYX_CPU_ISA
