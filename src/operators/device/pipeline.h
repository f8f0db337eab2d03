// Hand-over between the warps of a block that load tiles and those that compute: barriers in shared memory
// (mbarriers) whose phases are waited for by their parity, so that nobody waits for more than it needs.
#pragma once

#include "operators/device/mma.h"

namespace oryx::device {

// A barrier of `count` arrivals. Phases follow each other: use u of a stage is phase u, waited for with
// parity u % 2. A barrier that nobody has come to counts as past parity 1, so that the first wait for an
// empty stage is wait((u + 1) % 2).
struct Gate {
  uint64_t word;

  // By one thread; the others see it after a barrier of the block.
  __device__ void open(int count) {
#ifdef ORYX_EMULATED
    emulator::open_gate(&word, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
#endif
  }
  __device__ void arrive() {
#ifdef ORYX_EMULATED
    emulator::arrive_at_gate(&word);
#else
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(address())
                 : "memory");
#endif
  }
  // Arrives once all copy_async() of this thread so far have landed; does not wait.
  __device__ void arrive_after_copies() {
#ifdef ORYX_EMULATED
    emulator::arrive_at_gate_after_copies(&word);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
#endif
  }
  // Until the phase of this parity is over.
  __device__ void wait(uint32_t parity) {
#ifdef ORYX_EMULATED
    emulator::wait_for_gate(&word, parity);
#elif __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
        "again;\n}" ::"r"(address()),
        "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.test_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
        "again;\n}" ::"r"(address()),
        "r"(parity)
        : "memory");
#endif
  }

#ifndef ORYX_EMULATED
 private:
  __device__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&word)); }
#endif
};

// As named_barrier() of platform.h, for those of the `threads` that need not wait.
__device__ inline void named_arrive(int id, int threads) {
#ifdef ORYX_EMULATED
  emulator::arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Registers of a thread of this warpgroup from here on (a multiple of 8): loading warps give up some, those
// that compute take them.
template <int count, bool grows>
__device__ inline void set_registers() {
#if !defined(ORYX_EMULATED) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (grows) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
  }
#endif
}

// A place in a ring of stages; both sides go round it in the same order.
template <int stages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace oryx::device
