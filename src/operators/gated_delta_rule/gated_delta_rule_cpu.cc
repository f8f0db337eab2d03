#include "operators/gated_delta_rule/gated_delta_rule_cpu.h"

#include "operators/gated_delta_rule/gated_delta_rule_chunk.h"

namespace oryx::ORYX_CPU_ISA {

using cpu::GatedDeltaForward;

namespace {

template <typename Element>
struct ForwardWork : GatedDeltaChunk<Element> {
  using Base = GatedDeltaChunk<Element>;
  using Acc = Accumulate<Element>;
  using Base::a, Base::ldv, Base::ldc, Base::decay, Base::step, Base::lower, Base::rows, Base::scores;
  Acc* inverse_work;  // [16, C]
  Acc* inverse;       // [C, C] A, where the caller does not keep it
  Acc* state;         // [K, V]
  Acc* residual;      // [C, V] W
  Acc* update;        // [C, V] U
  Acc* output;        // [M, V]

  ForwardWork(const GatedDeltaForward& f, Arena& arena) : Base(f.inputs, arena) {
    inverse_work = arena.take<Acc>(16 * ldc);
    inverse = arena.take<Acc>(a.shape.chunk * ldc);
    state = arena.take<Acc>(a.shape.key_dim * ldv);
    residual = arena.take<Acc>(a.shape.chunk * ldv);
    update = arena.take<Acc>(a.shape.chunk * ldv);
    output = arena.take<Acc>(Base::most_rows() * ldv);
  }

  // A = (I + L)⁻¹ with L = strictly lower part of β ⊙ (K Kᵀ) ⊙ Γ.
  void invert(int64_t n, Acc* to) {
    constexpr int width = Lanes<Acc>::count;
    Base::multiply_keys(n);
    for (int64_t i = 0; i < n; ++i) {
      Acc* row = lower + i * ldc;
      for (int64_t j = 0; j < i; j += width) {
        store(row + j, keep_before<Acc>(step[i] * load(row + j) * decay.between(i, j), j, i));
      }
    }
    invert_unit_lower(n, lower, to, ldc, inverse_work);
  }

  // scores ⊙ Γ, zero where the key is after the query.
  void gate_scores(int64_t n) {
    constexpr int width = Lanes<Acc>::count;
    for (int64_t r = 0; r < rows.count; ++r) {
      Acc* row = scores + r * ldc;
      const int64_t i = rows.position[r];
      for (int64_t j = 0; j < padded(n); j += width) {
        typename Lanes<Acc>::Vector x = {};
        if (j <= i) x = keep_before<Acc>(load(row + j) * decay.between(i, j), j, i + 1);
        store(row + j, x);
      }
    }
  }
};

template <typename Element>
void forward(const GatedDeltaForward& f, int64_t first_stream, int64_t last_stream, char* scratch) {
  using Acc = Accumulate<Element>;
  const cpu::MixerShape& shape = f.inputs.shape;
  Arena arena{scratch};
  ForwardWork<Element> w(f, arena);
  const int64_t ldv = w.ldv, ldc = w.ldc;
  for (int64_t stream = first_stream; stream < last_stream; ++stream) {
    const Stream s(shape, stream);
    load_state(f.inputs.initial_state, stream, shape, w.state, ldv);
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const bool has_state = chunk > 0 || f.inputs.initial_state != nullptr;
      const int64_t n = w.length(chunk);
      Acc* inverse = w.inverse;
      if (f.inverse != nullptr) {
        inverse = static_cast<Acc*>(f.inverse) + (stream * shape.chunks + chunk) * shape.chunk * ldc;
      }
      w.load_inputs(s, chunk);
      w.load_query(s, chunk, static_cast<Acc>(f.scale));
      w.transpose_key(n);
      w.invert(n, inverse);
      w.solve(n, inverse, has_state ? w.state : nullptr, w.residual, w.update);
      const int64_t m = w.rows.count;
      if (m > 0) {
        w.multiply_scores(n);
        w.gate_scores(n);
        if (has_state) {
          multiply<false>(m, ldv, shape.key_dim, w.query, w.ldk, w.state, ldv, Acc(0), w.output, ldv);
          for (int64_t r = 0; r < m; ++r) {
            scale_row(ldv, w.decay.gamma[w.rows.position[r]], w.output + r * ldv, w.output + r * ldv);
          }
        }
        multiply<false>(m, ldv, n, w.scores, ldc, w.update, ldv, Acc(has_state ? 1 : 0), w.output, ldv,
                        {.inner_end = w.rows.end});
        store_packed<Element>(f.output, w.rows, s, shape.value_dim, Acc(1), w.output, ldv);
      }
      w.update_state(n, w.update, w.state);
    }
    store_state(w.state, ldv, stream, shape, f.final_state);
  }
}

}  // namespace

int64_t gated_delta_forward_scratch(const GatedDeltaForward& a) {
  return with_element(a.inputs.type, [&](auto element) {
    Arena arena{nullptr};
    ForwardWork<decltype(element)> work(a, arena);
    return arena.used;
  });
}

void gated_delta_forward(const GatedDeltaForward& a, int64_t begin, int64_t end, void* scratch) {
  with_element(a.inputs.type, [&](auto element) {
    forward<decltype(element)>(a, begin, end, static_cast<char*>(scratch));
    return 0;
  });
}

}  // namespace oryx::ORYX_CPU_ISA
