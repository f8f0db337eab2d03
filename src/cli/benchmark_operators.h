// oryx benchmark operators: every operator of a training step beside its floor on this device.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <string>
#include <vector>

namespace oryx::cli {

// What the device can do at most, measured: a product of 8192 × 8192 matrices, and a copy counting bytes read
// and written.
struct Ceilings {
  double flops_per_second = 0;
  double bytes_per_second = 0;
};
Ceilings measure_ceilings(c10::Device device, c10::ScalarType dtype);

struct OperatorSizes {
  int64_t batch = 8, length = 2048, heads = 16, head_dim = 128;
};

struct OperatorTime {
  std::string name;
  double seconds = 0;
  double flops = 0, bytes = 0;  // the least the computation needs

  double floor(const Ceilings& ceilings) const;  // seconds
};

// Those whose name contains `filter`.
std::vector<OperatorTime> measure_operators(const OperatorSizes& sizes, c10::Device device,
                                            c10::ScalarType dtype, const std::string& filter,
                                            int64_t repeats);

}  // namespace oryx::cli
