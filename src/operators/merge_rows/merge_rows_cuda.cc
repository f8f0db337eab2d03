#include "operators/merge_rows/merge_rows_cuda.h"

#include <c10/core/DeviceGuard.h>

#include "operators/device/runtime.h"
#include "operators/merge_rows/merge_rows_kernels.h"

namespace oryx::cuda {

void merge_rows(at::TensorList parts, at::TensorList rows, const at::Tensor& whole, bool scatter) {
  if (whole.numel() == 0) return;
  const c10::DeviceGuard guard(whole.device());
  RowMerge merge{};
  merge.whole = whole.data_ptr();
  merge.row_bytes = static_cast<int64_t>(whole.nbytes()) / whole.size(0);
  merge.scatter = scatter;
  uintptr_t bits = reinterpret_cast<uintptr_t>(merge.whole) | static_cast<uintptr_t>(merge.row_bytes);
  for (const at::Tensor& part : parts) bits |= reinterpret_cast<uintptr_t>(part.data_ptr());
  merge.unit = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].numel() > 0)
      merge.part[merge.parts++] = {parts[i].data_ptr(), rows[i].const_data_ptr<int64_t>(), rows[i].numel()};
    if (merge.parts == merge_parts || (i + 1 == parts.size() && merge.parts > 0)) {
      merge_rows(merge, stream(whole));
      merge.parts = 0;
    }
  }
}

}  // namespace oryx::cuda
