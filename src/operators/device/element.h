// Element types of pointwise kernels, for arguments that neither CUDA nor LibTorch headers reach.
#pragma once

namespace oryx::device {

enum class Element : int { bfloat16, float32, float64 };

constexpr int bytes_of(Element element) {
  return element == Element::bfloat16 ? 2 : element == Element::float32 ? 4 : 8;
}

}  // namespace oryx::device
