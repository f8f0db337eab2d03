#include "operators/linear/gemm_bfloat16.h"

// Exported by the BLAS inside LibTorch; its headers do not declare it.
extern "C" void gemm_bf16bf16f32_(const char* transa, const char* transb, const int* m, const int* n,
                                  const int* k, const float* alpha, const c10::BFloat16* a, const int* lda,
                                  const c10::BFloat16* b, const int* ldb, const float* beta, float* c,
                                  const int* ldc);

namespace oryx::cpu {

void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
          const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, int64_t ldb, float beta, float* c,
          int64_t ldc) {
  if (m == 0 || n == 0) return;
  // Fortran is column-major: Cᵀ = op(B)ᵀ op(A)ᵀ, so the operands and m, n change places.
  const char ta = transpose_a ? 'T' : 'N', tb = transpose_b ? 'T' : 'N';
  const int mi = static_cast<int>(m), ni = static_cast<int>(n), ki = static_cast<int>(k);
  const int la = static_cast<int>(lda), lb = static_cast<int>(ldb), lc = static_cast<int>(ldc);
  gemm_bf16bf16f32_(&tb, &ta, &ni, &mi, &ki, &alpha, b, &lb, a, &la, &beta, c, &lc);
}

}  // namespace oryx::cpu
