#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/l2_norm/l2_norm.h"

namespace oryx::operators {

at::Tensor l2_norm_reference(const at::Tensor& x, double eps) {
  const at::Tensor wide = x.to(accumulate_type(x.scalar_type()));
  return (wide / (wide.square().sum(-1, /*keepdim=*/true) + eps).sqrt()).to(x.scalar_type());
}

}  // namespace oryx::operators
