// One set of names for the two ways a kernel file is compiled: by nvcc for a GPU, and by the host compiler
// for the emulator of emulator.h, which runs the same source on the CPU (tests on machines without a GPU).
//
// A kernel is `__global__ void name(const Arguments arguments)` with one struct of raw pointers and sizes. It
// takes its dynamic shared memory from device::shared_memory() and synchronises with the functions below and
// those of mma.h. Collectives (__syncwarp, shuffles, ldmatrix, mma) take all 32 lanes of a warp.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#ifdef ORYX_EMULATED
#include "operators/device/emulator.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

// Launchers live in namespace oryx::cuda whichever compiler made them: a program links one of the two sets.
namespace oryx::device {

using bf16 = __nv_bfloat16;

#ifndef ORYX_EMULATED

__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

inline void expect_success(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Bytes of shared memory that a block can have on the current device.
inline size_t largest_shared_memory() {
  int device = 0, bytes = 0;
  expect_success(cudaGetDevice(&device), "the current device");
  expect_success(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                 "shared memory of the device");
  return static_cast<size_t>(bytes);
}

// Multiprocessors of the current device, for grids that share out work.
inline int multiprocessors() {
  int device = 0, count = 0;
  expect_success(cudaGetDevice(&device), "the current device");
  expect_success(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                 "multiprocessors of the device");
  return count;
}

// Launches kernel<<<grid, threads, shared_bytes, stream>>>(arguments). Throws std::runtime_error where the
// launch is refused; never waits.
template <auto kernel, typename Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, void* stream, const Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes >
      48 * 1024) {  // above that a kernel must ask, once per device; asking again costs nothing
    expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   "shared memory of a kernel");
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  expect_success(cudaGetLastError(), "launch of a kernel");
}

// Waits until `threads` threads of the block (a multiple of 32) have come to barrier `id` (1 … 15).
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif

}  // namespace oryx::device
