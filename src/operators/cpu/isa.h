// CPU kernels are compiled once per instruction set (cmake/Rooms.cmake, oryx_cpu_kernels) and picked at
// run time. A kernel file <name>_cpu.cc defines its functions in namespace oryx::ORYX_CPU_ISA; its header
// <name>_cpu.h declares each with ORYX_CPU_KERNEL, which also gives the caller one function
// oryx::cpu::<name> that forwards to the best copy this processor can run.
#pragma once

namespace oryx::cpu {

enum class Isa { avx2, avx512 };

// The instruction set in use: AVX-512 where the processor has F, BW, VL and DQ, else AVX2.
// The environment variable ORYX_CPU_ISA=avx2 lowers it. Throws Error on a processor without AVX2 and FMA.
Isa isa();

}  // namespace oryx::cpu

#define ORYX_CPU_KERNEL(result, name, parameters, arguments)                                     \
  namespace oryx::avx2 {                                                                         \
  result name parameters;                                                                        \
  }                                                                                              \
  namespace oryx::avx512 {                                                                       \
  result name parameters;                                                                        \
  }                                                                                              \
  namespace oryx::cpu {                                                                          \
  inline result name parameters {                                                                \
    return isa() == Isa::avx512 ? ::oryx::avx512::name arguments : ::oryx::avx2::name arguments; \
  }                                                                                              \
  }
