#include "operators/ssd/ssd_cpu.h"

#include "operators/cpu/mixer_chunk.h"

namespace oryx::ORYX_CPU_ISA {

using cpu::SsdBackward;
using cpu::SsdForward;

namespace {

// Letters as in docs/mathematics/ssd.md.
template <typename Element>
struct SsdChunk : MixerChunk<Element> {
  using Base = MixerChunk<Element>;
  using Acc = Accumulate<Element>;
  using Base::a, Base::ldk, Base::ldv, Base::decay, Base::step, Base::key, Base::value;
  Acc* weight;  // [C] ρ Δ: the weight of a token in the chunk's last state
  Acc* scaled;  // [C, V] weight ⊙ V

  SsdChunk(const cpu::MixerInputs& inputs, Arena& arena) : Base(inputs, arena) {
    weight = arena.take<Acc>(Base::ldc);
    scaled = arena.take<Acc>(a.shape.chunk * ldv);
  }

  void load_inputs(const Stream& s, int64_t chunk) {
    Base::load_inputs(s, chunk);
    for (int64_t i = 0; i < padded(Base::length(chunk)); ++i) weight[i] = decay.rho[i] * step[i];
  }

  // S ← γ_C S + Kᵀ (weight ⊙ V).
  void update_state(int64_t n, Acc* state) {
    for (int64_t i = 0; i < n; ++i) scale_row(ldv, weight[i], value + i * ldv, scaled + i * ldv);
    multiply<true>(a.shape.key_dim, ldv, n, key, ldk, scaled, ldv, decay.total, state, ldv);
  }
};

template <typename Element>
struct SsdForwardWork : SsdChunk<Element> {
  using Base = SsdChunk<Element>;
  using Acc = Accumulate<Element>;
  Acc* state;   // [K, V]
  Acc* output;  // [M, V]
  SsdForwardWork(const SsdForward& f, Arena& arena) : Base(f.inputs, arena) {
    state = arena.take<Acc>(f.inputs.shape.key_dim * Base::ldv);
    output = arena.take<Acc>(Base::most_rows() * Base::ldv);
  }
};

template <typename Element>
void forward(const SsdForward& f, int64_t first_stream, int64_t last_stream, char* scratch) {
  using Acc = Accumulate<Element>;
  using Lane = Lanes<Acc>;
  const cpu::MixerShape& shape = f.inputs.shape;
  Arena arena{scratch};
  SsdForwardWork<Element> w(f, arena);
  const int64_t ldv = w.ldv, ldc = w.ldc;
  for (int64_t stream = first_stream; stream < last_stream; ++stream) {
    const Stream s(shape, stream);
    load_state(f.inputs.initial_state, stream, shape, w.state, ldv);
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const bool has_state = chunk > 0 || f.inputs.initial_state != nullptr;
      const int64_t n = w.length(chunk);
      w.load_inputs(s, chunk);
      w.load_query(s, chunk, Acc(1));
      const int64_t m = w.rows.count;
      if (m > 0) {
        w.transpose_key(n);
        w.multiply_scores(n);
        for (int64_t r = 0; r < m; ++r) {
          Acc* row = w.scores + r * ldc;
          const int64_t i = w.rows.position[r];
          for (int64_t j = 0; j < padded(n); j += Lane::count) {
            typename Lane::Vector x = {};
            if (j <= i)
              x = keep_before<Acc>(load(row + j) * load(w.step + j) * w.decay.between(i, j), j, i + 1);
            store(row + j, x);
          }
        }
        if (has_state) {
          multiply<false>(m, ldv, shape.key_dim, w.query, w.ldk, w.state, ldv, Acc(0), w.output, ldv);
          for (int64_t r = 0; r < m; ++r) {
            scale_row(ldv, w.decay.gamma[w.rows.position[r]], w.output + r * ldv, w.output + r * ldv);
          }
        }
        multiply<false>(m, ldv, n, w.scores, ldc, w.value, ldv, Acc(has_state ? 1 : 0), w.output, ldv,
                        {.inner_end = w.rows.end});
        if (f.skip != nullptr) {
          for (int64_t r = 0; r < m; ++r) {
            const Acc skip = static_cast<const Acc*>(f.skip)[s.first_output + r % s.group];
            add_scaled_row(ldv, skip, w.value + w.rows.position[r] * ldv, w.output + r * ldv);
          }
        }
        store_packed<Element>(f.output, w.rows, s, shape.value_dim, Acc(1), w.output, ldv);
      }
      w.update_state(n, w.state);
    }
    store_state(w.state, ldv, stream, shape, f.final_state);
  }
}

template <typename Element>
struct SsdBackwardWork : SsdChunk<Element> {
  using Base = SsdChunk<Element>;
  using Acc = Accumulate<Element>;
  using Base::a, Base::ldk, Base::ldv, Base::ldc, Base::rows, Base::decay, Base::step, Base::weight,
      Base::key, Base::value, Base::scores;
  Acc* states;        // [chunks, K, V] the state before each chunk
  Acc* d_state;       // [K, V]
  Acc* transposed;    // [V, K] Sᵀ or dSᵀ
  Acc* value_t;       // [V, C]
  Acc* d_output;      // [M, V]
  Acc* d_scores;      // [M, C]
  Acc* d_query;       // [M, K]
  Acc* d_key;         // [C, K]
  Acc* d_value;       // [C, V]
  Acc* d_cumulative;  // [C] dG
  Acc* d_step;        // [C]
  SsdBackwardWork(const SsdBackward& f, Arena& arena) : Base(f.inputs, arena) {
    const cpu::MixerShape& shape = a.shape;
    const int64_t chunk = shape.chunk;
    const int64_t most = Base::most_rows();
    states = arena.take<Acc>(shape.chunks * shape.key_dim * ldv);
    d_state = arena.take<Acc>(shape.key_dim * ldv);
    transposed = arena.take<Acc>(shape.value_dim * ldk);
    value_t = arena.take<Acc>(shape.value_dim * ldc);
    d_output = arena.take<Acc>(most * ldv);
    d_scores = arena.take<Acc>(most * ldc);
    d_query = arena.take<Acc>(most * ldk);
    d_key = arena.take<Acc>(chunk * ldk);
    d_value = arena.take<Acc>(chunk * ldv);
    d_cumulative = arena.take<Acc>(ldc);
    d_step = arena.take<Acc>(ldc);
  }

  // The gradient through the state that leaves the chunk: starts d_value and d_key, adds to dΔ and dG.
  void through_state(int64_t n) {
    const cpu::MixerShape& shape = a.shape;
    multiply<false>(n, ldv, shape.key_dim, key, ldk, d_state, ldv, Acc(0), d_value, ldv);
    transpose(shape.key_dim, shape.value_dim, d_state, ldv, transposed, ldk);
    multiply<false>(n, ldk, shape.value_dim, value, ldv, transposed, ldk, Acc(0), d_key, ldk);
    Acc sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      scale_row(ldv, weight[j], d_value + j * ldv, d_value + j * ldv);
      const Acc x = decay.rho[j] * dot(ldk, key + j * ldk, d_key + j * ldk);
      scale_row(ldk, weight[j], d_key + j * ldk, d_key + j * ldk);
      d_step[j] += x;
      if (j == n - 1) break;  // ρ = 1 for the last token, whatever the decay
      d_cumulative[j] -= step[j] * x;
      sum += step[j] * x;
    }
    d_cumulative[n - 1] += sum;
  }

  // The gradient through the scores inside the chunk, given scores = Q Kᵀ and d_scores = dO Vᵀ. Leaves
  // scores = (Q Kᵀ) ⊙ Γ ⊙ Δ and d_scores = (dO Vᵀ) ⊙ Γ ⊙ Δ; adds to dΔ and dG. The diagonal, where Γ = 1
  // whatever the decay, stays out of dG: it would cancel there, but for rounding.
  void through_scores(int64_t n) {
    using Vector = typename Lanes<Acc>::Vector;
    constexpr int width = Lanes<Acc>::count;
    Acc* column_sums = weight;  // no longer needed by this chunk
    for (int64_t j = 0; j < padded(n); ++j) column_sums[j] = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.position[r];
      Acc *p = scores + r * ldc, *d = d_scores + r * ldc;
      Vector row_sum = {};
      d_step[i] += p[i] * d[i];
      for (int64_t j = 0; j < padded(n); j += width) {
        if (j > i) {
          store(p + j, Vector{});
          store(d + j, Vector{});
          continue;
        }
        const Vector gate = decay.between(i, j), steps = load(step + j);
        const Vector score = keep_before<Acc>(load(p + j), j, i + 1);
        const Vector gradient = keep_before<Acc>(load(d + j) * gate, j, i + 1);
        const Vector product = keep_before<Acc>(score * gradient, j, i);
        row_sum += product * steps;
        store(column_sums + j, load(column_sums + j) + product);
        store(p + j, keep_before<Acc>(score * gate * steps, j, i + 1));
        store(d + j, gradient * steps);
      }
      d_cumulative[i] += sum_lanes<Acc>(row_sum);
    }
    for (int64_t j = 0; j < n; ++j) {
      d_step[j] += column_sums[j];
      d_cumulative[j] -= step[j] * column_sums[j];
    }
  }
};

template <typename Element>
void backward(const SsdBackward& f, int64_t first_stream, int64_t last_stream, char* scratch) {
  using Acc = Accumulate<Element>;
  const cpu::MixerShape& shape = f.inputs.shape;
  Arena arena{scratch};
  SsdBackwardWork<Element> w(f, arena);
  const int64_t ldk = w.ldk, ldv = w.ldv, ldc = w.ldc, state_size = shape.key_dim * w.ldv;
  for (int64_t stream = first_stream; stream < last_stream; ++stream) {
    const Stream s(shape, stream);
    w.backwards = false;
    load_state(f.inputs.initial_state, stream, shape, w.states, ldv);
    for (int64_t chunk = 0; chunk + 1 < shape.chunks; ++chunk) {
      Acc* next = w.states + (chunk + 1) * state_size;
      std::memcpy(next, next - state_size, state_size * sizeof(Acc));
      w.load_inputs(s, chunk);
      w.update_state(w.length(chunk), next);
    }
    w.backwards = true;
    bool state_gradient = f.d_final_state != nullptr;
    load_state(f.d_final_state, stream, shape, w.d_state, ldv);
    if (f.d_skip != nullptr) {
      for (int64_t r = 0; r < s.group; ++r) {
        static_cast<Acc*>(f.d_skip)[s.batch * shape.output_heads + s.first_output + r] = 0;
      }
    }
    for (int64_t chunk = shape.chunks - 1; chunk >= 0; --chunk) {
      const int64_t n = w.length(chunk);
      const Acc* state = w.states + chunk * state_size;
      const bool has_state = chunk > 0 || f.inputs.initial_state != nullptr;
      w.load_inputs(s, chunk);
      for (int64_t i = 0; i < padded(n); ++i) w.d_cumulative[i] = w.d_step[i] = 0;
      if (state_gradient) w.through_state(n);
      if (state_gradient && has_state) {
        w.d_cumulative[n - 1] += w.decay.total * dot(state_size, w.d_state, state);
      }
      w.rows.count = 0;
      if (f.d_output.data != nullptr) w.load_query(s, chunk, Acc(1));
      const int64_t m = w.rows.count;
      const Acc keep = Acc(state_gradient ? 1 : 0);
      if (m > 0) {
        load_packed<Element>(f.d_output, w.rows, s, false, true, shape.value_dim, Acc(1), w.d_output, ldv);
        w.transpose_key(n);
        w.multiply_scores(n);
        transpose(n, shape.value_dim, w.value, ldv, w.value_t, ldc);
        multiply<false>(m, padded(n), shape.value_dim, w.d_output, ldv, w.value_t, ldc, Acc(0), w.d_scores,
                        ldc, {.columns = w.rows.end});
        w.through_scores(n);
        multiply<true>(n, ldv, m, w.scores, ldc, w.d_output, ldv, keep, w.d_value, ldv,
                       {.inner_begin = w.rows.first});
        multiply<true>(n, ldk, m, w.d_scores, ldc, w.query, ldk, keep, w.d_key, ldk,
                       {.inner_begin = w.rows.first});
        if (has_state) {
          transpose(shape.key_dim, shape.value_dim, state, ldv, w.transposed, ldk);
          multiply<false>(m, ldk, shape.value_dim, w.d_output, ldv, w.transposed, ldk, Acc(0), w.d_query,
                          ldk);
          for (int64_t r = 0; r < m; ++r) {
            const int64_t i = w.rows.position[r];
            scale_row(ldk, w.decay.gamma[i], w.d_query + r * ldk, w.d_query + r * ldk);
            w.d_cumulative[i] += dot(ldk, w.query + r * ldk, w.d_query + r * ldk);
          }
        }
        multiply<false>(m, ldk, n, w.d_scores, ldc, w.key, ldk, Acc(has_state ? 1 : 0), w.d_query, ldk,
                        {.inner_end = w.rows.end});
        store_packed<Element>(f.d_query, w.rows, s, shape.key_dim, Acc(1), w.d_query, ldk);
        for (int64_t r = 0; r < m; ++r) {
          const int64_t i = w.rows.position[r];
          Acc* row = w.d_output + r * ldv;
          if (f.skip != nullptr) {
            const int64_t head = s.first_output + r % s.group;
            add_scaled_row(ldv, static_cast<const Acc*>(f.skip)[head], row, w.d_value + i * ldv);
            if (f.d_skip != nullptr) {
              static_cast<Acc*>(f.d_skip)[s.batch * shape.output_heads + head] +=
                  dot(ldv, row, w.value + i * ldv);
            }
          }
          scale_row(ldv, w.decay.gamma[i], row, row);
        }
        if (has_state) {
          multiply<true>(shape.key_dim, ldv, m, w.query, ldk, w.d_output, ldv, keep * w.decay.total,
                         w.d_state, ldv);
        }
        state_gradient = true;
      } else if (state_gradient) {
        scale_row(state_size, w.decay.total, w.d_state, w.d_state);
      } else {
        std::memset(w.d_key, 0, n * ldk * sizeof(Acc));
        std::memset(w.d_value, 0, n * ldv * sizeof(Acc));
      }
      store_tokens<Element>(f.d_key, s.batch, s.head, w.begin(chunk), n, shape.key_dim, w.d_key, ldk);
      store_tokens<Element>(f.d_value, s.batch, s.head, w.begin(chunk), n, shape.value_dim, w.d_value, ldv);
      const int64_t at = w.at(s, chunk), heads = shape.state_heads;
      store_decay_gradient(w.d_cumulative, n, static_cast<Acc*>(f.d_log_decay) + at, heads);
      for (int64_t i = 0; i < n; ++i) static_cast<Acc*>(f.d_step)[at + i * heads] = w.d_step[i];
    }
    if (f.d_initial_state != nullptr) store_state(w.d_state, ldv, stream, shape, f.d_initial_state);
  }
}

}  // namespace

int64_t ssd_forward_scratch(const SsdForward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    SsdForwardWork<decltype(element)> work(a, arena);
    return arena.used;
  });
}

void ssd_forward(const SsdForward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    forward<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

int64_t ssd_backward_scratch(const SsdBackward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    SsdBackwardWork<decltype(element)> work(a, arena);
    return arena.used;
  });
}

void ssd_backward(const SsdBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    backward<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace oryx::ORYX_CPU_ISA
