// What the LibTorch side of every pointwise kernel needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "operators/device/element.h"

namespace oryx::device {

inline Element element_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? Element::float64 : dtype == at::kFloat ? Element::float32 : Element::bfloat16;
}

// Whether 16-byte accesses reach all of these rows: pointers (null counts as aligned), and the numbers of
// elements between and along their rows.
inline bool is_aligned(Element element, std::initializer_list<const void*> pointers,
                       std::initializer_list<int64_t> strides) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  for (const int64_t stride : strides)
    if (stride * bytes_of(element) % 16 != 0) return false;
  return true;
}

}  // namespace oryx::device
