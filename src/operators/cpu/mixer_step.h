// One token at a time through a state [key_dim, value_dim], for decoding: the state streams through once
// and nothing else is large. For kernel files compiled by oryx_cpu_kernels().
#pragma once

#include <cmath>

#include "operators/cpu/mixer_chunk.h"

namespace oryx::ORYX_CPU_ISA {

// Four rows of the state at a time: enough to keep the sums over rows out of memory most of the time.
inline constexpr int64_t kStepRows = 4;

// to ← decay · from + keyᵀ · update, `rows` rows of `columns` elements; to may be from.
template <typename Acc>
inline void step_rows(int64_t rows, int64_t columns, Acc decay, const Acc* key, const Acc* update,
                      const Acc* from, Acc* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const Acc k = key[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) to[j] = decay * from[j] + k * update[j];
    from += columns;
    to += columns;
  }
}

// sum += weights · state, over `rows` rows.
template <typename Acc>
inline void sum_rows(int64_t rows, int64_t columns, const Acc* weights, const Acc* state, Acc* sum) {
  if (rows == kStepRows) {
    const Acc w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    const Acc *s0 = state, *s1 = s0 + columns, *s2 = s1 + columns, *s3 = s2 + columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      sum[j] += (w0 * s0[j] + w1 * s1[j]) + (w2 * s2[j] + w3 * s3[j]);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, state += columns) {
    const Acc w = weights[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sum[j] += w * state[j];
  }
}

// The vectors of one token, in the accumulate type.
template <typename Element>
struct StepWork {
  using Acc = Accumulate<Element>;
  const cpu::MixerInputs& a;
  int64_t group;
  Acc* key;     // [K]
  Acc* value;   // [V]
  Acc* update;  // [V] what the token adds to the state: keyᵀ · update
  Acc* query;   // [group, K]
  Acc* output;  // [group, V]

  StepWork(const cpu::MixerInputs& inputs, Arena& arena)
      : a(inputs), group(a.shape.output_heads / a.shape.state_heads) {
    key = arena.take<Acc>(a.shape.key_dim);
    value = arena.take<Acc>(a.shape.value_dim);
    update = arena.take<Acc>(a.shape.value_dim);
    query = arena.take<Acc>(group * a.shape.key_dim);
    output = arena.take<Acc>(group * a.shape.value_dim);
  }

  void load_token(const Stream& s, int64_t time) {
    const int64_t k = a.shape.key_dim, v = a.shape.value_dim, end = a.shape.time;
    load_tokens<Element>(a.key, s.batch, s.key_head, time, 1, k, key, k, 1, end);
    load_tokens<Element>(a.value, s.batch, s.head, time, 1, v, value, v, 1, end);
  }
  void load_query(const Stream& s, int64_t packed, Acc factor) {
    const Element* from = static_cast<const Element*>(a.query.data) + packed * a.query.time;
    for (int64_t r = 0; r < group; ++r) {
      const int64_t head = (s.first_output + r) / s.outputs_per_query;
      load_row(from + head * a.query.head, a.shape.key_dim, factor, query + r * a.shape.key_dim,
               a.shape.key_dim);
    }
    std::memset(output, 0, group * a.shape.value_dim * sizeof(Acc));
  }
  void store_output(const Stream& s, int64_t packed, const cpu::RowView& view) const {
    for (int64_t r = 0; r < group; ++r) {
      store_row<Element>(output + r * a.shape.value_dim, a.shape.value_dim, Acc(1), view.data,
                         packed * view.time + (s.first_output + r) * view.head, view.wide);
    }
  }
};

// Calls token(stream, time, entry, rows, from, to) for every token of every stream: `rows` of the query
// table from `entry` are at this token; the state before it is at `from`, the one after it goes to `to`.
template <typename Acc, typename Token>
inline void for_each_token(const cpu::MixerInputs& a, int64_t begin, int64_t end, void* final_state,
                           Token&& token) {
  const cpu::MixerShape& shape = a.shape;
  const int64_t size = shape.key_dim * shape.value_dim;
  for (int64_t stream = begin; stream < end; ++stream) {
    const Stream s(shape, stream);
    Acc* to = static_cast<Acc*>(final_state) + stream * size;
    const Acc* from = to;
    if (a.initial_state != nullptr) {
      from = static_cast<const Acc*>(a.initial_state) + stream * size;
    } else {
      std::memset(to, 0, size * sizeof(Acc));
    }
    const int64_t* range = a.rows.chunk_begin + s.batch * (shape.chunks + 1);
    int64_t entry = range[0];
    for (int64_t time = 0; time < shape.time; ++time) {
      int64_t rows = 0;
      while (entry + rows < range[shape.chunks] && a.rows.position[entry + rows] == time) ++rows;
      token(s, time, entry, rows, from, to);
      entry += rows;
      from = to;
    }
    if (shape.time == 0 && from != to) std::memcpy(to, from, size * sizeof(Acc));
  }
}

}  // namespace oryx::ORYX_CPU_ISA
