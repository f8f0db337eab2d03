// Where the tests of kernels run: compiled twice, for the emulator (any machine) and for a GPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "operators/device/runtime.h"
#ifdef ORYX_EMULATED
#include "operators/device/emulator.h"
#endif

namespace oryx::operators::testing {

// The device whose tensors the kernels serve.
inline at::Device kernel_device() {
#ifdef ORYX_EMULATED
  return at::kCPU;
#else
  return at::Device(at::kCUDA, 0);
#endif
}

constexpr bool is_emulated =
#ifdef ORYX_EMULATED
    true;
#else
    false;
#endif

// Whether only small cases run: under the emulator, and on a GPU where ORYX_SMALL_CASES is set, for tools
// that make every access a hundred times slower.
inline bool wants_small_cases() {
  static const bool asked = std::getenv("ORYX_SMALL_CASES") != nullptr;
  return is_emulated || asked;
}

// From now on at::empty gives NaN, so that an element which no kernel writes shows. For a constant of the
// test's file.
inline bool poison_fresh_memory() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  return true;
}

// Runs `work` with the kernels serving kernel_device(): under the emulator twice, with the warps of a block
// in either order, so that a missing barrier gives two results. `work` returns what must be the same, bit for
// bit.
template <typename Work>
auto with_kernels(Work work) {
#ifdef ORYX_EMULATED
  cuda::emulate(true);
  auto ascending = work();
  device::emulator::descending = true;
  const auto descending = work();
  device::emulator::descending = false;
  cuda::emulate(false);
  for (size_t i = 0; i < ascending.size(); ++i) {
    // Bytes, because NaN must equal itself here.
    EXPECT_TRUE(ascending[i].nbytes() == descending[i].nbytes() &&
                (ascending[i].nbytes() == 0 ||
                 std::memcmp(ascending[i].contiguous().data_ptr(), descending[i].contiguous().data_ptr(),
                             ascending[i].nbytes()) == 0))
        << "result " << i << " depends on the order of the warps: a barrier is missing";
  }
  return ascending;
#else
  return work();
#endif
}

}  // namespace oryx::operators::testing
