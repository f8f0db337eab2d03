#include "operators/gated_delta_rule/gated_delta_rule_chunk.h"
#include "operators/gated_delta_rule/gated_delta_rule_cpu.h"

namespace oryx::ORYX_CPU_ISA {

using cpu::GatedDeltaBackward;

namespace {

template <typename Element>
struct BackwardWork : GatedDeltaChunk<Element> {
  using Base = GatedDeltaChunk<Element>;
  using Acc = Accumulate<Element>;
  using Base::a, Base::ldk, Base::ldv, Base::ldc, Base::rows, Base::decay, Base::step, Base::key, Base::key_t,
      Base::value, Base::query, Base::scores, Base::lower, Base::token, Base::token_end;
  Acc* states;        // [chunks, K, V] the state before each chunk
  Acc* residuals;     // [chunks, C, V] W
  Acc* updates;       // [chunks, C, V] U
  Acc* d_state;       // [K, V]
  Acc* transposed;    // [V, K] dSᵀ, then Sᵀ
  Acc* update_t;      // [V, C]
  Acc* d_output;      // [M, V]
  Acc* d_scores;      // [M, C]
  Acc* d_query;       // [M, K]
  Acc* d_key;         // [C, K]
  Acc* d_update;      // [C, V] dU, then −γ ⊙ dW
  Acc* d_value;       // [C, V] Aᵀ dU, then dW
  Acc* d_lower;       // [C, C]
  Acc* column_sums;   // [C]
  Acc* d_cumulative;  // [C] dG
  Acc* d_beta;        // [C]

  BackwardWork(const GatedDeltaBackward& f, Arena& arena) : Base(f.inputs, arena) {
    const cpu::MixerShape& shape = a.shape;
    const int64_t most = Base::most_rows();
    states = arena.take<Acc>(shape.chunks * shape.key_dim * ldv);
    residuals = arena.take<Acc>(shape.chunks * shape.chunk * ldv);
    updates = arena.take<Acc>(shape.chunks * shape.chunk * ldv);
    d_state = arena.take<Acc>(shape.key_dim * ldv);
    transposed = arena.take<Acc>(shape.value_dim * ldk);
    update_t = arena.take<Acc>(shape.value_dim * ldc);
    d_output = arena.take<Acc>(most * ldv);
    d_scores = arena.take<Acc>(most * ldc);
    d_query = arena.take<Acc>(most * ldk);
    d_key = arena.take<Acc>(shape.chunk * ldk);
    d_update = arena.take<Acc>(shape.chunk * ldv);
    d_value = arena.take<Acc>(shape.chunk * ldv);
    d_lower = arena.take<Acc>(shape.chunk * ldc);
    column_sums = arena.take<Acc>(ldc);
    d_cumulative = arena.take<Acc>(ldc);
    d_beta = arena.take<Acc>(ldc);
  }

  // Through the state that leaves the chunk: starts d_update and d_key, adds to dG.
  void through_state(int64_t n, const Acc* update, const Acc* state) {
    const cpu::MixerShape& shape = a.shape;
    multiply<false>(n, ldv, shape.key_dim, key, ldk, d_state, ldv, Acc(0), d_update, ldv);
    transpose(shape.key_dim, shape.value_dim, d_state, ldv, transposed, ldk);
    multiply<false>(n, ldk, shape.value_dim, update, ldv, transposed, ldk, Acc(0), d_key, ldk);
    Acc sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      scale_row(ldv, decay.rho[j], d_update + j * ldv, d_update + j * ldv);
      scale_row(ldk, decay.rho[j], d_key + j * ldk, d_key + j * ldk);
      if (j == n - 1) break;  // ρ = 1 for the last token, whatever the decay
      const Acc x = dot(ldk, key + j * ldk, d_key + j * ldk);
      d_cumulative[j] -= x;
      sum += x;
    }
    if (state != nullptr) sum += decay.total * dot(shape.key_dim * ldv, d_state, state);
    d_cumulative[n - 1] += sum;
  }

  // scores = Q Kᵀ and d_scores = dO Uᵀ become P = (Q Kᵀ) ⊙ Γ and (dO Uᵀ) ⊙ Γ; adds to dG. The diagonal,
  // where Γ = 1 whatever the decay, stays out of dG: it would cancel there, but for rounding.
  void through_scores(int64_t n) {
    using Vector = typename Lanes<Acc>::Vector;
    constexpr int width = Lanes<Acc>::count;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = rows.position[r];
      Acc *p = scores + r * ldc, *d = d_scores + r * ldc;
      Vector row_sum = {};
      for (int64_t j = 0; j < padded(n); j += width) {
        if (j > i) {
          store(p + j, Vector{});
          store(d + j, Vector{});
          continue;
        }
        const Vector gate = decay.between(i, j);
        const Vector score = keep_before<Acc>(load(p + j) * gate, j, i + 1), gradient = load(d + j);
        const Vector product = keep_before<Acc>(score * gradient, j, i);
        row_sum += product;
        store(column_sums + j, load(column_sums + j) + product);
        store(p + j, score);
        store(d + j, keep_before<Acc>(gradient * gate, j, i + 1));
      }
      d_cumulative[i] += sum_lanes<Acc>(row_sum);
    }
  }

  // lower = K Kᵀ and d_lower = −dL become … and β ⊙ dL ⊙ Γ, the gradient of K Kᵀ; adds to dβ and dG.
  void through_lower(int64_t n) {
    using Vector = typename Lanes<Acc>::Vector;
    constexpr int width = Lanes<Acc>::count;
    for (int64_t i = 0; i < n; ++i) {
      Acc* d = d_lower + i * ldc;
      Vector row_sum = {};
      for (int64_t j = 0; j < padded(n); j += width) {
        if (j >= i) {
          store(d + j, Vector{});
          continue;
        }
        const Vector gradient = keep_before<Acc>(-load(d + j) * decay.between(i, j), j, i);
        const Vector product = keep_before<Acc>(gradient * load(lower + i * ldc + j), j, i);
        row_sum += product;
        store(column_sums + j, load(column_sums + j) + step[i] * product);
        store(d + j, step[i] * gradient);
      }
      const Acc sum = sum_lanes<Acc>(row_sum);
      d_beta[i] += sum;
      d_cumulative[i] += step[i] * sum;
    }
  }

  // Given dU: dL, dβ, dW (left in d_value), the rest of d_key and of dG. Leaves −γ ⊙ dW in d_update.
  void through_solve(int64_t n, const Acc* inverse, const Acc* residual, const Acc* state) {
    const cpu::MixerShape& shape = a.shape;
    multiply<true>(n, ldv, n, inverse, ldc, d_update, ldv, Acc(0), d_value, ldv, {.inner_begin = token});
    Base::multiply_keys(n);
    multiply<false>(n, padded(n), shape.value_dim, d_value, ldv, update_t, ldc, Acc(0), d_lower, ldc,
                    {.columns = token_end});
    through_lower(n);
    multiply<false>(n, ldk, n, d_lower, ldc, key, ldk, Acc(1), d_key, ldk, {.inner_end = token_end});
    multiply<true>(n, ldk, n, d_lower, ldc, key, ldk, Acc(1), d_key, ldk, {.inner_begin = token});
    for (int64_t i = 0; i < n; ++i) {
      Acc *dv = d_value + i * ldv, *du = d_update + i * ldv;
      d_beta[i] += dot(ldv, dv, residual + i * ldv);
      scale_row(ldv, step[i], dv, dv);
      if (state == nullptr) continue;
      // γ (K S) = V − W, and W falls with it.
      d_cumulative[i] += dot(ldv, dv, residual + i * ldv) - dot(ldv, dv, value + i * ldv);
      scale_row(ldv, -decay.gamma[i], dv, du);
    }
    if (state != nullptr) {  // `transposed` holds Sᵀ
      multiply<false>(n, ldk, shape.value_dim, d_update, ldv, transposed, ldk, Acc(1), d_key, ldk);
    }
  }
};

template <typename Element>
void backward(const GatedDeltaBackward& f, int64_t first_stream, int64_t last_stream, char* scratch) {
  using Acc = Accumulate<Element>;
  const cpu::MixerShape& shape = f.inputs.shape;
  Arena arena{scratch};
  BackwardWork<Element> w(f, arena);
  const int64_t ldk = w.ldk, ldv = w.ldv, ldc = w.ldc, state_size = shape.key_dim * w.ldv;
  const int64_t chunk_size = shape.chunk * ldv;
  const Acc scale = static_cast<Acc>(f.scale);
  for (int64_t stream = first_stream; stream < last_stream; ++stream) {
    const Stream s(shape, stream);
    const Acc* inverses = static_cast<const Acc*>(f.inverse) + stream * shape.chunks * shape.chunk * ldc;
    w.backwards = false;
    load_state(f.inputs.initial_state, stream, shape, w.states, ldv);
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const bool has_state = chunk > 0 || f.inputs.initial_state != nullptr;
      const int64_t n = w.length(chunk);
      Acc *state = w.states + chunk * state_size, *update = w.updates + chunk * chunk_size;
      w.load_inputs(s, chunk);
      w.solve(n, inverses + chunk * shape.chunk * ldc, has_state ? state : nullptr,
              w.residuals + chunk * chunk_size, update);
      if (chunk + 1 < shape.chunks) {
        std::memcpy(state + state_size, state, state_size * sizeof(Acc));
        w.update_state(n, update, state + state_size);
      }
    }
    w.backwards = true;
    bool state_gradient = f.d_final_state != nullptr;
    load_state(f.d_final_state, stream, shape, w.d_state, ldv);
    for (int64_t chunk = shape.chunks - 1; chunk >= 0; --chunk) {
      const int64_t n = w.length(chunk);
      const bool has_state = chunk > 0 || f.inputs.initial_state != nullptr;
      const Acc* state = has_state ? w.states + chunk * state_size : nullptr;
      const Acc *residual = w.residuals + chunk * chunk_size, *update = w.updates + chunk * chunk_size;
      w.load_inputs(s, chunk);
      for (int64_t i = 0; i < padded(n); ++i) w.d_cumulative[i] = w.d_beta[i] = w.column_sums[i] = 0;
      if (state_gradient) w.through_state(n, update, state);
      w.rows.count = 0;
      if (f.d_output.data != nullptr) w.load_query(s, chunk, scale);
      const int64_t m = w.rows.count;
      if (m > 0 || state_gradient) {
        w.transpose_key(n);
        transpose(n, shape.value_dim, update, ldv, w.update_t, ldc);
        if (has_state) transpose(shape.key_dim, shape.value_dim, state, ldv, w.transposed, ldk);
      }
      const Acc keep = Acc(state_gradient ? 1 : 0);
      if (m > 0) {
        load_packed<Element>(f.d_output, w.rows, s, false, true, shape.value_dim, Acc(1), w.d_output, ldv);
        w.multiply_scores(n);
        multiply<false>(m, padded(n), shape.value_dim, w.d_output, ldv, w.update_t, ldc, Acc(0), w.d_scores,
                        ldc, {.columns = w.rows.end});
        w.through_scores(n);
        multiply<true>(n, ldv, m, w.scores, ldc, w.d_output, ldv, keep, w.d_update, ldv,
                       {.inner_begin = w.rows.first});
        multiply<true>(n, ldk, m, w.d_scores, ldc, w.query, ldk, keep, w.d_key, ldk,
                       {.inner_begin = w.rows.first});
        if (has_state) {
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
        store_packed<Element>(f.d_query, w.rows, s, shape.key_dim, scale, w.d_query, ldk);
      }
      if (m > 0 || state_gradient) {
        w.through_solve(n, inverses + chunk * shape.chunk * ldc, residual, state);
        for (int64_t j = 0; j < n; ++j) w.d_cumulative[j] -= w.column_sums[j];
        if (has_state) {
          multiply<true>(shape.key_dim, ldv, n, w.key, ldk, w.d_update, ldv, keep * w.decay.total, w.d_state,
                         ldv);
          for (int64_t r = 0; r < m; ++r) {
            Acc* row = w.d_output + r * ldv;
            scale_row(ldv, w.decay.gamma[w.rows.position[r]], row, row);
          }
          multiply<true>(shape.key_dim, ldv, m, w.query, ldk, w.d_output, ldv, Acc(1), w.d_state, ldv);
        }
        state_gradient = true;
      } else {
        std::memset(w.d_key, 0, n * ldk * sizeof(Acc));
        std::memset(w.d_value, 0, n * ldv * sizeof(Acc));
      }
      store_tokens<Element>(f.d_key, s.batch, s.head, w.begin(chunk), n, shape.key_dim, w.d_key, ldk);
      store_tokens<Element>(f.d_value, s.batch, s.head, w.begin(chunk), n, shape.value_dim, w.d_value, ldv);
      const int64_t at = w.at(s, chunk), heads = shape.state_heads;
      store_decay_gradient(w.d_cumulative, n, static_cast<Acc*>(f.d_log_decay) + at, heads);
      for (int64_t i = 0; i < n; ++i) static_cast<Acc*>(f.d_beta)[at + i * heads] = w.d_beta[i];
    }
    if (f.d_initial_state != nullptr) store_state(w.d_state, ldv, stream, shape, f.d_initial_state);
  }
}

}  // namespace

int64_t gated_delta_backward_scratch(const GatedDeltaBackward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    BackwardWork<decltype(element)> work(a, arena);
    return arena.used;
  });
}

void gated_delta_backward(const GatedDeltaBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    backward<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace oryx::ORYX_CPU_ISA
