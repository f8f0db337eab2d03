#include "operators/device/runtime.h"

namespace oryx::cuda {

namespace {
bool emulates = false;
}

bool serves(const at::Tensor& tensor) { return emulates && tensor.is_cpu(); }
void* stream(const at::Tensor&) { return nullptr; }
int multiprocessors(const at::Tensor&) { return 4; }
void emulate(bool on) { emulates = on; }

}  // namespace oryx::cuda
