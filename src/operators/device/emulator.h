// Runs kernels on the CPU as the CUDA execution model says: every thread of a block is a fiber with a stack
// of its own, and fibers change places only at barriers and warp collectives. Slow (about 1e7 multiply-adds a
// second and more) and exact enough to test a kernel's logic without a GPU: shared memory starts as NaN,
// asynchronous copies land only when they are waited for, and blocks can be run with their warps in either
// order, so that a missing barrier shows as a difference.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include <cuda_bf16.h>
#include <vector_types.h>

#undef __shared__
#define __shared__ static  // one block runs at a time
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#ifndef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#endif
#define __restrict__ __restrict

namespace oryx::device {

namespace emulator {

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

// Of the thread that is running.
const Position& here();
int lane();

// Waits until `count` threads have come to barrier `id`; 0 is __syncthreads.
void barrier(int id, int count);
void arrive(int id, int count);
// Waits for the other lanes of the warp; the last to come runs `work` with what every lane deposited.
void collective(const void* operation, void* deposit, void (*work)(void** deposits));
// A copy that happens when this thread waits for its group.
void copy_async(void* to, const void* from, size_t bytes, size_t valid_bytes);
void commit_group();
void wait_groups(int allowed_pending);
// Gates of pipeline.h. Copies that a gate waits for land at once or, where warps run in ascending order, only
// when no thread can go on without them.
void open_gate(uint64_t* gate, int count);
void arrive_at_gate(uint64_t* gate);
void arrive_at_gate_after_copies(uint64_t* gate);
void wait_for_gate(uint64_t* gate, uint32_t parity);

char* shared_memory();
void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Bytes of shared memory that a block can have; a test tries a smaller device.
inline size_t largest_shared_memory = 227 * 1024;
// Warps run from the last to the first where set.
extern bool descending;
// Warp collectives and barriers so far: a measure of work.
extern uint64_t collectives;

}  // namespace emulator

inline size_t largest_shared_memory() { return emulator::largest_shared_memory; }
inline int multiprocessors() { return 4; }
inline char* shared_memory() { return emulator::shared_memory(); }

template <auto kernel, typename Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, void*, const Arguments& arguments) {
  emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments); });
}

inline void named_barrier(int id, int threads) { emulator::barrier(id, threads); }

}  // namespace oryx::device

#define threadIdx (::oryx::device::emulator::here().thread)
#define blockIdx (::oryx::device::emulator::here().block)
#define blockDim (::oryx::device::emulator::here().block_size)
#define gridDim (::oryx::device::emulator::here().grid_size)

inline void __syncthreads() {
  using namespace oryx::device::emulator;
  barrier(0, static_cast<int>(here().block_size.x));
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  static const char operation = 0;
  oryx::device::emulator::collective(&operation, nullptr, [](void**) {});
}

namespace oryx::device::emulator {

template <typename T>
T exchange(T value, int source) {
  struct Deposit {
    T value, result;
    int source;
  } mine{value, {}, source};
  static const char operation = 0;
  collective(&operation, &mine, [](void** deposits) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Deposit*>(deposits[i]);
      to->result = static_cast<Deposit*>(deposits[to->source & 31])->value;
    }
  });
  return mine.result;
}

}  // namespace oryx::device::emulator

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return oryx::device::emulator::exchange(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return oryx::device::emulator::exchange(value, oryx::device::emulator::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = oryx::device::emulator::lane();
  return oryx::device::emulator::exchange(value, lane + delta < 32 ? lane + delta : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = oryx::device::emulator::lane();
  return oryx::device::emulator::exchange(value, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (oryx::device::emulator::exchange(predicate != 0, i) ? 1u : 0u) << i;
  return mask;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T atomicAdd(T* target, T value) {  // one thread runs at a time
  const T before = *target;
  *target = before + value;
  return before;
}
inline void __threadfence() {}

#define __float_as_uint(x) (::oryx::device::emulator::bits<unsigned>(static_cast<float>(x)))
#define __uint_as_float(x) (::oryx::device::emulator::bits<float>(static_cast<unsigned>(x)))
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __fdividef(x, y) ((x) / (y))

namespace oryx::device::emulator {
template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace oryx::device::emulator

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
