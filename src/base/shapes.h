// Executable shape comments: expect_shape("ssd", "key", key, {batch, time, heads, dim}).
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string_view>

namespace oryx {

// Throws Error "[who] expected NAME [2, 64, 4, 16], got [2, 64, 3, 16]" unless the sizes agree.
// A size of -1 matches anything.
void expect_shape(std::string_view who, std::string_view name, const at::Tensor& tensor,
                  std::initializer_list<int64_t> sizes);

// Throws Error unless the tensor has `dimensions` dimensions.
void expect_dimensions(std::string_view who, std::string_view name, const at::Tensor& tensor,
                       int64_t dimensions);

}  // namespace oryx
