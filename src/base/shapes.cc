#include "base/shapes.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/error.h"

namespace oryx {

void expect_shape(std::string_view who, std::string_view name, const at::Tensor& tensor,
                  std::initializer_list<int64_t> sizes) {
  bool equal = tensor.defined() && tensor.dim() == static_cast<int64_t>(sizes.size());
  if (equal) {
    int64_t i = 0;
    for (int64_t size : sizes) equal &= size == -1 || size == tensor.size(i), ++i;
  }
  if (equal) return;
  if (!tensor.defined()) fail("[{}] expected {} [{}], got no tensor", who, name, fmt::join(sizes, ", "));
  fail("[{}] expected {} [{}], got [{}]", who, name, fmt::join(sizes, ", "), fmt::join(tensor.sizes(), ", "));
}

void expect_dimensions(std::string_view who, std::string_view name, const at::Tensor& tensor,
                       int64_t dimensions) {
  if (!tensor.defined()) fail("[{}] expected {} with {} dimensions, got no tensor", who, name, dimensions);
  expect(tensor.dim() == dimensions, "[{}] expected {} with {} dimensions, got [{}]", who, name, dimensions,
         fmt::join(tensor.sizes(), ", "));
}

}  // namespace oryx
