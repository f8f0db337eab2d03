// Warp-level matrix instructions, asynchronous copies and fast functions of sm_80 and up, under one name for
// the GPU and the emulator. Fragment layouts are those of the PTX manual; g = lane / 4, t = lane % 4.
#pragma once

#include "operators/device/platform.h"

namespace oryx::device {

// Two bf16 of neighbouring columns in one register, the first in the low half.
__device__ inline uint32_t pack(float first, float second) {
#ifdef ORYX_EMULATED
  const bf16 pair[2] = {__float2bfloat16_rn(first), __float2bfloat16_rn(second)};
  uint32_t result;
  std::memcpy(&result, pair, 4);
  return result;
#else
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
#endif
}

__device__ inline float2 unpack(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// An address in shared memory as instructions take it: 32 bits on the GPU, so that arithmetic on it is cheap.
#ifdef ORYX_EMULATED
using SharedAddress = uintptr_t;
#else
using SharedAddress = uint32_t;
#endif
__device__ inline SharedAddress shared_address(const void* pointer) {
#ifdef ORYX_EMULATED
  return reinterpret_cast<uintptr_t>(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// Four 8×8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned). result[j]: of matrix j, row g, columns 2t and 2t+1; transposed: column g, rows 2t and 2t+1.
__device__ inline void load_matrices(uint32_t (&result)[4], SharedAddress row) {
#ifdef ORYX_EMULATED
  struct Deposit {
    const void* row;
    uint32_t* result;
  } mine{reinterpret_cast<const void*>(row), result};
  static const char operation = 0;
  emulator::collective(&operation, &mine, [](void** deposits) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const auto* source = static_cast<Deposit*>(deposits[8 * j + lane / 4])->row;
        std::memcpy(&static_cast<Deposit*>(deposits[lane])->result[j],
                    static_cast<const char*>(source) + 4 * (lane % 4), 4);
      }
    }
  });
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row)
               : "memory");
#endif
}
__device__ inline void load_matrices(uint32_t (&result)[4], const void* row) {
  load_matrices(result, shared_address(row));
}

__device__ inline void load_matrices_transposed(uint32_t (&result)[4], SharedAddress row) {
#ifdef ORYX_EMULATED
  struct Deposit {
    const void* row;
    uint32_t* result;
  } mine{reinterpret_cast<const void*>(row), result};
  static const char operation = 0;
  emulator::collective(&operation, &mine, [](void** deposits) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const auto* source = static_cast<Deposit*>(deposits[8 * j + 2 * (lane % 4) + i])->row;
          std::memcpy(&pair[i], static_cast<const char*>(source) + 2 * (lane / 4), 2);
        }
        std::memcpy(&static_cast<Deposit*>(deposits[lane])->result[j], pair, 4);
      }
    }
  });
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(row)
               : "memory");
#endif
}
__device__ inline void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
  load_matrices_transposed(result, shared_address(row));
}

// An 8×8 matrix of 16-bit elements, of which a lane has row g, columns 2t and 2t+1, transposed.
__device__ inline uint32_t transpose_matrix(uint32_t pair) {
#ifdef ORYX_EMULATED
  struct Deposit {
    uint32_t pair, result;
  } mine{pair, 0};
  static const char operation = 0;
  emulator::collective(&operation, &mine, [](void** deposits) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Deposit*>(deposits[lane]);
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * (lane % 4) + i, column = lane / 4;
        const uint32_t from = static_cast<Deposit*>(deposits[4 * row + column / 2])->pair;
        to->result |= (from >> (column % 2 * 16) & 0xffffu) << (16 * i);
      }
    }
  });
  return mine.result;
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#endif
}

#ifdef ORYX_EMULATED
namespace emulator {

// What a lane brings to a product: its part of the sum and its fragments.
struct ProductLane {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Adds left right to the sums of the lanes.
template <int depth>
void add_product(const float (&left)[16][depth], const float (&right)[depth][8], void** lanes) {
  float product[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) product[m][n] += left[m][k] * right[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<ProductLane*>(lanes[lane])->c;
    for (int j = 0; j < 4; ++j) c[j] += product[lane / 4 + 8 * (j / 2)][2 * (lane % 4) + j % 2];
  }
}

}  // namespace emulator
#endif

// c += a b: a is 16×16 (a[0]: row g, columns 2t 2t+1; a[1]: row g+8; a[2], a[3]: the same, columns + 8), b is
// 16×8 (b[0]: rows 2t 2t+1 of column g; b[1]: rows + 8), c is 16×8 (c[0], c[1]: row g, columns 2t 2t+1; c[2],
// c[3]: row g+8).
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ORYX_EMULATED
  emulator::ProductLane mine{c, a, {b0, b1}};
  static const char operation = 0;
  emulator::collective(&operation, &mine, [](void** deposits) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* d = static_cast<emulator::ProductLane*>(deposits[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < 4; ++j) {
        const float2 x = unpack(d->a[j]);
        left[g + 8 * (j % 2)][2 * t + 8 * (j / 2)] = x.x;
        left[g + 8 * (j % 2)][2 * t + 8 * (j / 2) + 1] = x.y;
      }
      for (int j = 0; j < 2; ++j) {
        const float2 x = unpack(d->b[j]);
        right[2 * t + 8 * j][g] = x.x;
        right[2 * t + 8 * j + 1][g] = x.y;
      }
    }
    emulator::add_product(left, right, deposits);
  });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// float32 rounded to tf32 (10 bits of mantissa), as a register of multiply_add_tf32.
// Not cvt.rna.tf32, which takes care of what is not finite.
__device__ inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// c += a b in tf32: a is 16×8 (a[0]: row g, column t; a[1]: row g+8; a[2], a[3]: the same, column + 4), b is
// 8×8 (b0: row t of column g; b1: row t + 4), c as above.
__device__ inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef ORYX_EMULATED
  emulator::ProductLane mine{c, a, {b0, b1}};
  static const char operation = 0;
  emulator::collective(&operation, &mine, [](void** deposits) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* d = static_cast<emulator::ProductLane*>(deposits[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < 4; ++j) left[g + 8 * (j % 2)][t + 4 * (j / 2)] = __uint_as_float(d->a[j]);
      for (int j = 0; j < 2; ++j) right[t + 4 * j][g] = __uint_as_float(d->b[j]);
    }
    emulator::add_product(left, right, deposits);
  });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Copies 16 (or 8 or 4) bytes from global to shared memory, or writes zeros where not `valid`; lands by
// wait_copies().
template <int size = 16>
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
#ifdef ORYX_EMULATED
  emulator::copy_async(shared, global, size, valid ? size : 0);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? size : 0;
  if constexpr (size == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(global), "r"(bytes),
                 "n"(size)
                 : "memory");
  }
#endif
}
// Ends a group of this thread's copies.
__device__ inline void commit_copies() {
#ifdef ORYX_EMULATED
  emulator::commit_group();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `pending` of this thread's latest groups are under way. Others' copies need a barrier
// too.
template <int pending>
__device__ inline void wait_copies() {
#ifdef ORYX_EMULATED
  emulator::wait_groups(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// 2^x; within 2 ulp, −inf gives 0.
__device__ inline float exp2_fast(float x) {
#ifdef ORYX_EMULATED
  return ::exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
constexpr float log2_of_e = 1.4426950408889634f;

// 1 / x; within 1 ulp, one instruction where a division would take care of ranges.
__device__ inline float reciprocal_fast(float x) {
#ifdef ORYX_EMULATED
  return 1.0f / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// The sum (largest) of a value over groups of `lanes` neighbouring lanes, in all of them.
template <int lanes>
__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
template <int lanes>
__device__ inline float max_over_lanes(float x) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

}  // namespace oryx::device
