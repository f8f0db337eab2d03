// The product of cpu/gemm.h for bfloat16 operands with float32 sums and a float32 result.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace oryx::cpu {

// C[m,n] = alpha · op(A) · op(B) + beta · C, row-major; see operators/cpu/gemm.h. Twice the speed of float32
// on processors with AVX512_BF16 or AMX, about the speed of float32 on others.
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
          const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, int64_t ldb, float beta, float* c,
          int64_t ldc);

}  // namespace oryx::cpu
