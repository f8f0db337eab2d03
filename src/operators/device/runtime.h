// Where the kernels of operators/<name>/<name>_kernels.cu run: the GPU of a tensor, or the emulator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

namespace oryx::cuda {

// Whether the kernels serve this tensor: it lies on a GPU of compute capability 8.0 and up, or on the CPU
// while emulate(true) holds in a program that is linked with the emulated kernels. Other tensors take the
// operator's CPU kernels or its composed reference.
bool serves(const at::Tensor& tensor);

// PyTorch's current stream on the tensor's device (cudaStream_t); null for the emulator.
void* stream(const at::Tensor& tensor);

// Multiprocessors of the tensor's device, for grids that share out work; 4 for the emulator.
int multiprocessors(const at::Tensor& tensor);

// Tests only: sends CPU tensors to the kernels. Throws Error in a program linked with the GPU's.
void emulate(bool on);

}  // namespace oryx::cuda
