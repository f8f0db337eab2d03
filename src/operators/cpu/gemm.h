// Row-major matrix products on raw pointers, for blocks that live in cache. They call the BLAS inside
// LibTorch; inside a parallel region each call runs on the calling thread alone.
#pragma once

#include <cstdint>

namespace oryx::cpu {

// C[m,n] = alpha · op(A) · op(B) + beta · C, all row-major with leading dimensions in elements;
// op(A) is [m,k], op(B) is [k,n]. transpose_a: A is stored [k,m]; transpose_b: B is stored [n,k].
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
          int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc);

}  // namespace oryx::cpu
