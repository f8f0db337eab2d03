#include "operators/cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace oryx::cpu {

namespace {
Isa detect() {
  expect(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
         "expected a processor with AVX2 and FMA: this one lacks them");
  const char* limit = std::getenv("ORYX_CPU_ISA");
  if (limit != nullptr && std::string_view(limit) == "avx2") return Isa::avx2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : Isa::avx2;
}
}  // namespace

Isa isa() {
  static const Isa best = detect();
  return best;
}

}  // namespace oryx::cpu
