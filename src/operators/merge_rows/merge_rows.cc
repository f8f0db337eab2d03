#include "operators/merge_rows/merge_rows.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "base/error.h"
#include "operators/device/runtime.h"
#include "operators/merge_rows/merge_rows_cuda.h"

namespace oryx::operators {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool takes_kernel(const at::Tensor& tensor) { return cuda::serves(tensor) && tensor.element_size() >= 2; }

variable_list contiguous(at::TensorList tensors) {
  variable_list result;
  for (const at::Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

at::Tensor merge(at::TensorList parts, at::TensorList rows, int64_t count) {
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes[0] = count;
  at::Tensor merged = at::empty(sizes, parts[0].options());
  if (takes_kernel(merged)) {
    cuda::merge_rows(contiguous(parts), contiguous(rows), merged, /*scatter=*/true);
    return merged;
  }
  for (size_t i = 0; i < parts.size(); ++i) merged.index_copy_(0, rows[i], parts[i]);
  return merged;
}

class MergeRows : public torch::autograd::Function<MergeRows> {
 public:
  static at::Tensor forward(AutogradContext* context, at::TensorList parts, variable_list rows,
                            int64_t count) {
    context->save_for_backward(rows);
    return merge(parts, rows, count);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list rows = context->get_saved_variables();
    variable_list result;
    if (takes_kernel(gradients[0])) {
      const at::Tensor whole = gradients[0].contiguous();
      std::vector<int64_t> sizes = whole.sizes().vec();
      for (const at::Tensor& selected : rows) {
        sizes[0] = selected.numel();
        result.push_back(at::empty(sizes, whole.options()));
      }
      cuda::merge_rows(result, contiguous(rows), whole, /*scatter=*/false);
    } else {
      for (const at::Tensor& selected : rows) result.push_back(gradients[0].index_select(0, selected));
    }
    result.resize(rows.size() + 2);  // rows and count have no gradient
    return result;
  }
};

class TakeRows : public torch::autograd::Function<TakeRows> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& rows) {
    context->save_for_backward({rows});
    return x.index_select(0, rows.flatten()).view({rows.size(0), rows.size(1), x.size(1)});
  }
  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const at::Tensor rows = context->get_saved_variables()[0];
    at::Tensor dx = at::empty({rows.numel(), upstream[0].size(2)}, upstream[0].options());
    dx.index_copy_(0, rows.flatten(), upstream[0].flatten(0, 1));
    return {dx, {}};
  }
};

}  // namespace

at::Tensor take_rows(const at::Tensor& x, const at::Tensor& rows) { return TakeRows::apply(x, rows); }

void expect_token_rows(const char* op, const at::Tensor& x, const at::Tensor& rows) {
  expect(rows.dim() == 2 && rows.scalar_type() == at::kLong && rows.numel() == x.size(0),
         "[{}] expected rows [batch, time] of int64 for the {} rows of x, got [{}] of {}", op, x.size(0),
         fmt::join(rows.sizes(), ", "), at::toString(rows.scalar_type()));
}

at::Tensor merge_rows(at::TensorList parts, at::TensorList rows, int64_t count) {
  expect(!parts.empty() && parts.size() == rows.size(),
         "[merge_rows] expected as many rows as parts, got {} and {}", parts.size(), rows.size());
  int64_t total = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    expect(parts[i].size(0) == rows[i].numel(), "[merge_rows] expected part {} of {} rows, got {}", i,
           rows[i].numel(), parts[i].size(0));
    expect(parts[i].sizes().slice(1) == parts[0].sizes().slice(1) &&
               parts[i].scalar_type() == parts[0].scalar_type(),
           "[merge_rows] expected part {} with rows like those of part 0", i);
    total += parts[i].size(0);
  }
  expect(total == count, "[merge_rows] expected {} rows in all, got {}", count, total);
  return MergeRows::apply(parts, variable_list(rows.begin(), rows.end()), count);
}

void write_rows(at::Tensor whole, const at::Tensor& rows, const at::Tensor& part) {
  expect(whole.is_contiguous(), "[write_rows] expected whole to be contiguous");
  expect(whole.dim() == part.dim() && whole.sizes().slice(1) == part.sizes().slice(1) &&
             whole.scalar_type() == part.scalar_type(),
         "[write_rows] expected a part with rows like those of whole");
  expect(part.size(0) == rows.numel(), "[write_rows] expected a part of {} rows, got {}", rows.numel(),
         part.size(0));
  if (takes_kernel(whole)) return cuda::merge_rows({part.contiguous()}, {rows.contiguous()}, whole, true);
  whole.index_copy_(0, rows, part);
}

TORCH_LIBRARY_FRAGMENT(oryx, library) {
  library.def("merge_rows(Tensor[] parts, Tensor[] rows, int count) -> Tensor", &merge_rows);
}

}  // namespace oryx::operators
