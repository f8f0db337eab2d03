#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/rotary/rotary.h"

namespace oryx::operators {

at::Tensor rotary_reference(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine) {
  const int64_t heads = x.size(-2), dim = x.size(-1), half = dim / 2, n = cosine.size(0);
  const int64_t repeats = n > 0 ? x.numel() / (n * heads * dim) : 0;
  const at::Tensor rows = x.to(accumulate_type(x.scalar_type())).reshape({repeats, n, heads, dim});
  const at::Tensor low = rows.narrow(-1, 0, half), high = rows.narrow(-1, half, half);
  const at::Tensor c = cosine.unsqueeze(1), s = sine.unsqueeze(1);
  return at::cat({low * c - high * s, high * c + low * s}, -1).reshape(x.sizes()).to(x.scalar_type());
}

}  // namespace oryx::operators
