#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>

#include "base/error.h"
#include "operators/device/runtime.h"

namespace oryx::cuda {

bool serves(const at::Tensor& tensor) {
  return tensor.is_cuda() && at::cuda::getDeviceProperties(tensor.get_device())->major >= 8;
}
void* stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
}
int multiprocessors(const at::Tensor& tensor) {
  return at::cuda::getDeviceProperties(tensor.get_device())->multiProcessorCount;
}
void emulate(bool) { fail("expected a program linked with the emulated kernels"); }

}  // namespace oryx::cuda
