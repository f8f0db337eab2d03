#include "operators/linear/linear.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "base/error.h"
#include "operators/activations.h"
#include "operators/linear/gemm_bfloat16.h"
#include "operators/linear/linear_cpu.h"

namespace oryx::operators {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Rows = std::vector<RowRange>;

// Products with at most this many rows are matrix–vector products, bound by reading the weight.
constexpr int64_t kFewRows = 16;
// On a GPU weights with fewer outputs than this share one product: alone each would read all of x for a
// sliver of work, and by a slow kernel where its rows are no multiple of 16 bytes.
constexpr int64_t kNarrow = 64;

void check(const at::Tensor& x, const std::vector<at::Tensor>& weights, const Rows& rows) {
  expect_activations("linear", "x", x);
  expect(x.dim() == 2, "[linear] expected x [N, in], got {} dimensions", x.dim());
  expect(rows.size() == weights.size(), "[linear] expected rows for {} weights, got {}", weights.size(),
         rows.size());
  for (const at::Tensor& weight : weights) {
    expect(weight.dim() == 2 && weight.size(1) == x.size(1), "[linear] expected weight [out, {}], got [{}]",
           x.size(1), fmt::join(weight.sizes(), ", "));
    const bool master = x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kFloat;
    expect(weight.scalar_type() == x.scalar_type() || master, "[linear] expected weight of {}, got {}",
           at::toString(x.scalar_type()), at::toString(weight.scalar_type()));
  }
  for (const RowRange& range : rows) {
    expect(range.first >= 0 && range.count >= 0 && range.count <= x.size(0) - range.first,
           "[linear] expected rows within {}, got {} from row {} on", x.size(0), range.count, range.first);
  }
}

bool is_whole(const at::Tensor& x, const RowRange& range) { return range.count == x.size(0); }

at::Tensor select(const at::Tensor& x, const RowRange& range) {
  return is_whole(x, range) ? x : x.narrow(0, range.first, range.count);
}

std::vector<at::Tensor> multiply_few_rows(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                          const Rows& rows) {
  std::vector<FewRows> products;
  std::vector<at::Tensor> y, kept;  // kept: the weights that the raw pointers point into
  const at::Tensor input = x.contiguous();
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor weight = weights[i].to(x.scalar_type()).contiguous();
    y.push_back(at::empty({rows[i].count, weight.size(0)}, x.options()));
    products.push_back(
        {weight.data_ptr(), weight.size(0), rows[i].first, rows[i].count, y.back().data_ptr()});
    kept.push_back(weight);
  }
  cpu::linear_few_rows(x.scalar_type(), input.data_ptr(), x.size(0), x.size(1), products.data(),
                       static_cast<int64_t>(products.size()));
  return y;
}

// The weights of projections() that share a product, one below the other, with zeros up to a multiple of 8
// rows.
struct NarrowWeights {
  std::vector<size_t> members;
  std::vector<int64_t> first;  // the row of each in the joined weight
  int64_t rows = 0;

  NarrowWeights(const at::Tensor& x, at::TensorList weights, const Rows& selected) {
    if (!x.is_cuda()) return;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!is_whole(x, selected[i]) || weights[i].size(0) >= kNarrow) continue;
      members.push_back(i);
      first.push_back(rows);
      rows += weights[i].size(0);
    }
    rows = (rows + 7) / 8 * 8;
  }

  bool has(size_t i) const { return std::find(members.begin(), members.end(), i) != members.end(); }

  at::Tensor joined(const at::Tensor& x, at::TensorList weights) const {
    variable_list parts;
    for (const size_t i : members) parts.push_back(weights[i].to(x.scalar_type()));
    return filled_up(std::move(parts), 0);
  }

  // The gradients of their results side by side [N, rows]; undefined where no weights share a product.
  at::Tensor joined_gradients(const at::Tensor& x, at::TensorList weights,
                              const variable_list& upstream) const {
    if (members.empty()) return {};
    variable_list parts;
    for (const size_t i : members) {
      parts.push_back(upstream[i].defined() ? upstream[i]
                                            : at::zeros({x.size(0), weights[i].size(0)}, x.options()));
    }
    return filled_up(std::move(parts), 1);
  }

 private:
  // The parts one after the other along `dimension`, and zeros up to `rows`.
  at::Tensor filled_up(variable_list parts, int64_t dimension) const {
    std::vector<int64_t> sizes = parts[0].sizes().vec();
    sizes[dimension] = rows;
    for (const at::Tensor& part : parts) sizes[dimension] -= part.size(dimension);
    if (sizes[dimension] > 0) parts.push_back(at::zeros(sizes, parts[0].options()));
    return at::cat(parts, dimension);
  }
};

std::vector<at::Tensor> multiply(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                 const Rows& rows) {
  bool few = x.is_cpu();
  for (const RowRange& range : rows) few &= range.count <= kFewRows;
  if (few) return multiply_few_rows(x, weights, rows);
  const NarrowWeights narrow(x, weights, rows);
  std::vector<at::Tensor> y(weights.size());
  if (!narrow.members.empty()) {
    const at::Tensor joined = at::mm(x, narrow.joined(x, weights).t());
    for (size_t j = 0; j < narrow.members.size(); ++j) {
      const size_t i = narrow.members[j];
      y[i] = joined.narrow(1, narrow.first[j], weights[i].size(0));
    }
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!narrow.has(i)) y[i] = at::mm(select(x, rows[i]), weights[i].to(x.scalar_type()).t());
  }
  return y;
}

// target [m, n] (accumulate type) = op(a) b + keep · target, row-major and contiguous.
void add_product(const at::Tensor& a, bool transpose_a, const at::Tensor& b, bool keep, at::Tensor& target) {
  if (a.is_cpu() && a.scalar_type() == at::kBFloat16) {
    const int64_t m = target.size(0), n = target.size(1), k = transpose_a ? a.size(0) : a.size(1);
    cpu::gemm(transpose_a, false, m, n, k, 1.f, a.data_ptr<c10::BFloat16>(), a.size(1),
              b.data_ptr<c10::BFloat16>(), n, keep ? 1.f : 0.f, target.data_ptr<float>(), n);
    return;
  }
  const at::Tensor left = transpose_a ? a.t() : a;
  if (a.is_cuda() && a.scalar_type() != target.scalar_type()) {  // products of bfloat16 with a float32 result
    keep ? at::addmm_out(target, target, left, b, target.scalar_type())
         : at::mm_out(target, left, b, target.scalar_type());
  } else if (a.scalar_type() != target.scalar_type()) {
    const at::Tensor product = at::mm(left, b).to(target.scalar_type());
    keep ? target.add_(product) : target.copy_(product);
  } else if (keep) {
    target.addmm_(left, b);
  } else {
    at::mm_out(target, left, b);
  }
}

// `narrow_upstream`: what narrow.joined_gradients() gives.
at::Tensor input_gradient(const at::Tensor& x, const variable_list& weights, const Rows& rows,
                          const variable_list& upstream, const NarrowWeights& narrow,
                          const at::Tensor& narrow_upstream) {
  // On a GPU the sum over the weights is kept in the type of x: a float32 buffer would double the traffic of
  // a pass that is bound by memory, for a rounding as small as those of its terms.
  const at::TensorOptions options =
      x.options().dtype(x.is_cuda() ? x.scalar_type() : accumulate_type(x.scalar_type()));
  at::Tensor gradient = at::empty(x.sizes(), options);
  bool written = false;
  if (narrow_upstream.defined()) {
    add_product(narrow_upstream, false, narrow.joined(x, weights), false, gradient);
    written = true;
  }
  // Weights that read every row first: the first of them writes the buffer, and no zeros are needed.
  for (const bool whole : {true, false}) {
    for (size_t i = 0; i < weights.size(); ++i) {
      if (is_whole(x, rows[i]) != whole || !upstream[i].defined() || upstream[i].size(0) == 0 ||
          narrow.has(i))
        continue;
      if (!written && !whole) {
        gradient.zero_();
        written = true;
      }
      at::Tensor part = select(gradient, rows[i]);
      add_product(upstream[i].contiguous(), false, weights[i].to(x.scalar_type()).contiguous(), written,
                  part);
      written = true;
    }
  }
  if (!written) gradient.zero_();
  return gradient.to(x.scalar_type());
}

// Of `weight` from y = x[rows] Wᵀ.
at::Tensor weight_gradient(const at::Tensor& x, const at::Tensor& weight, const RowRange& rows,
                           const at::Tensor& upstream) {
  at::Tensor gradient = at::empty(weight.sizes(), weight.options().dtype(accumulate_type(x.scalar_type())));
  add_product(upstream.contiguous(), true, select(x, rows).contiguous(), false, gradient);
  return gradient.to(gradient_type(weight));
}

Rows ranges(at::IntArrayRef first, at::IntArrayRef count) {
  expect(first.size() == count.size(), "[linear] expected as many counts as first rows, got {} and {}",
         count.size(), first.size());
  Rows rows;
  for (size_t i = 0; i < first.size(); ++i) rows.push_back({first[i], count[i]});
  return rows;
}

class Projections : public torch::autograd::Function<Projections> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& x, at::TensorList weights,
                               const Rows& rows) {
    variable_list saved = {x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    context->save_for_backward(saved);
    std::vector<int64_t> first, count;
    for (const RowRange& range : rows) first.push_back(range.first), count.push_back(range.count);
    context->saved_data["first"] = first;
    context->saved_data["count"] = count;
    return multiply(x, weights.vec(), rows);
  }

  static variable_list backward(AutogradContext* context, variable_list upstream) {
    const variable_list saved = context->get_saved_variables();
    const size_t count = upstream.size();
    const at::Tensor& x = saved[0];
    const variable_list weights(saved.begin() + 1, saved.end());
    const Rows rows =
        ranges(context->saved_data["first"].toIntVector(), context->saved_data["count"].toIntVector());
    variable_list gradients(count + 2);  // x, the weights, and rows, which has none
    const NarrowWeights narrow(x, weights, rows);
    const at::Tensor narrow_upstream = narrow.joined_gradients(x, weights, upstream);
    if (context->needs_input_grad(0)) {
      gradients[0] = input_gradient(x, weights, rows, upstream, narrow, narrow_upstream);
    }
    if (narrow_upstream.defined()) {
      at::Tensor joined =
          at::empty({narrow.rows, x.size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
      add_product(narrow_upstream, true, x.contiguous(), false, joined);
      for (size_t j = 0; j < narrow.members.size(); ++j) {
        const at::Tensor& weight = weights[narrow.members[j]];
        gradients[1 + narrow.members[j]] =
            joined.narrow(0, narrow.first[j], weight.size(0)).to(gradient_type(weight));
      }
    }
    for (size_t i = 0; i < count; ++i) {
      if (!upstream[i].defined() || !context->needs_input_grad(1 + i) || narrow.has(i)) continue;
      gradients[1 + i] = weight_gradient(x, weights[i], rows[i], upstream[i]);
    }
    return gradients;
  }
};

at::Tensor linear_schema(const at::Tensor& x, const at::Tensor& weight) {
  return operators::linear(x, weight);
}

std::vector<at::Tensor> projections_schema(const at::Tensor& x, at::TensorList weights, at::IntArrayRef first,
                                           at::IntArrayRef count) {
  return projections(x, weights.vec(), ranges(first, count));
}

}  // namespace

at::Tensor linear_input_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& upstream) {
  const variable_list weights = {weight}, gradients = {upstream};
  const Rows rows = {{0, x.size(0)}};
  const NarrowWeights narrow(x, weights, rows);
  return input_gradient(x, weights, rows, gradients, narrow, narrow.joined_gradients(x, weights, gradients));
}

at::Tensor linear_weight_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& upstream) {
  return weight_gradient(x, weight, {0, x.size(0)}, upstream);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  return projections(x, {weight}, {{0, x.size(0)}})[0];
}

std::vector<at::Tensor> projections(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                    const std::vector<RowRange>& rows) {
  check(x, weights, rows);
  bool gradient = needs_gradient({x});
  for (const at::Tensor& weight : weights) gradient |= needs_gradient({weight});
  return gradient ? Projections::apply(x, at::TensorList(weights), rows) : multiply(x, weights, rows);
}

at::Tensor linear_reference(const at::Tensor& x, const at::Tensor& weight) {
  return at::linear(x, weight.to(x.scalar_type()));
}

std::vector<at::Tensor> projections_reference(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                              const std::vector<RowRange>& rows) {
  std::vector<at::Tensor> y;
  for (size_t i = 0; i < weights.size(); ++i)
    y.push_back(operators::linear_reference(select(x, rows[i]), weights[i]));
  return y;
}

TORCH_LIBRARY_FRAGMENT(oryx, library) {
  library.def("linear(Tensor x, Tensor weight) -> Tensor", &linear_schema);
  library.def("projections(Tensor x, Tensor[] weights, int[] first, int[] count) -> Tensor[]",
              &projections_schema);
}

}  // namespace oryx::operators
