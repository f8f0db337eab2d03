// The part of a chunk that forward and backward of the gated delta rule share. Letters as in
// docs/mathematics/gated_delta_rule.md. For kernel files compiled by oryx_cpu_kernels().
#pragma once

#include "operators/cpu/mixer_chunk.h"

namespace oryx::ORYX_CPU_ISA {

template <typename Element>
struct GatedDeltaChunk : MixerChunk<Element> {
  using Base = MixerChunk<Element>;
  using Acc = Accumulate<Element>;
  using Base::a, Base::ldk, Base::ldv, Base::ldc, Base::decay, Base::step, Base::key, Base::key_t,
      Base::value;
  int32_t* token;      // [C] 0, 1, 2, …
  int32_t* token_end;  // [C] 1, 2, 3, …
  Acc* lower;          // [C, C] K Kᵀ, then L
  Acc* right;          // [C, V] β ⊙ W, then ρ ⊙ U

  GatedDeltaChunk(const cpu::MixerInputs& inputs, Arena& arena) : Base(inputs, arena) {
    const int64_t chunk = a.shape.chunk;
    token = arena.take<int32_t>(chunk);
    token_end = arena.take<int32_t>(chunk);
    lower = arena.take<Acc>(chunk * ldc);
    right = arena.take<Acc>(chunk * ldv);
    for (int64_t i = 0; i < chunk && arena.memory != nullptr; ++i) {
      token[i] = static_cast<int32_t>(i);
      token_end[i] = static_cast<int32_t>(i + 1);
    }
  }

  // lower = K Kᵀ on and below the diagonal; needs key_t.
  void multiply_keys(int64_t n) {
    multiply<false>(n, padded(n), a.shape.key_dim, key, ldk, key_t, ldc, Acc(0), lower, ldc,
                    {.columns = token_end});
  }

  // W = V − γ ⊙ (K S) and U = A (β ⊙ W), the rows that the chunk adds to the state.
  void solve(int64_t n, const Acc* inverse, const Acc* state, Acc* residual, Acc* update) {
    if (state != nullptr) {
      multiply<false>(n, ldv, a.shape.key_dim, key, ldk, state, ldv, Acc(0), residual, ldv);
      for (int64_t i = 0; i < n; ++i) {
        Acc* row = residual + i * ldv;
        for (int64_t j = 0; j < ldv; j += Lanes<Acc>::count) {
          store(row + j, load(value + i * ldv + j) - decay.gamma[i] * load(row + j));
        }
      }
    } else {
      std::memcpy(residual, value, n * ldv * sizeof(Acc));
    }
    for (int64_t i = 0; i < n; ++i) scale_row(ldv, step[i], residual + i * ldv, right + i * ldv);
    multiply<false>(n, ldv, n, inverse, ldc, right, ldv, Acc(0), update, ldv, {.inner_end = token_end});
  }

  // S ← γ_C S + Kᵀ (ρ ⊙ U).
  void update_state(int64_t n, const Acc* update, Acc* state) {
    for (int64_t i = 0; i < n; ++i) scale_row(ldv, decay.rho[i], update + i * ldv, right + i * ldv);
    multiply<true>(a.shape.key_dim, ldv, n, key, ldk, right, ldv, decay.total, state, ldv);
  }
};

}  // namespace oryx::ORYX_CPU_ISA
