#include "operators/device/device_testing.h"
#include "operators/gated_linear/gated_linear.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/linear/linear.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;
using Optional = std::optional<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

struct Case {
  int64_t rows, channels, group, out;  // group 0: no weight of a norm
  bool gate;
  const char* order;
  int64_t padding = 0;  // of the rows of the gate
  bool on_gpu_only = false;
};

const Case cases[] = {
    {37, 256, 256, 24, true, "after_gate"},
    {18, 768, 768, 16, true, "after_gate", 8},
    {35, 512, 128, 40, true, "before_gate"},
    {33, 512, 512, 8, false, "before_gate"},
    {33, 104, 0, 56, true, "before_gate", 16},
    {21, 37, 37, 5, true, "after_gate"},
    {19, 35, 7, 6, true, "before_gate", 3},
    {33, 101, 0, 7, true, "before_gate"},
    {3, 64, 64, 16, true, "after_gate"},
    {2048, 2048, 2048, 1024, true, "after_gate", 0, true},
    {2331, 2048, 128, 1024, true, "before_gate", 2048, true},
    {2048, 5632, 0, 1024, true, "before_gate", 0, true},
};

at::Tensor leaf(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

// Rows of a wider matrix whose other columns are NaN.
at::Tensor padded(const at::Tensor& rows, int64_t padding) {
  if (padding == 0) return rows;
  const at::Tensor wide = at::full({rows.size(0), rows.size(1) + padding}, NAN, rows.options());
  wide.narrow(1, 0, rows.size(1)).copy_(rows);
  return wide.narrow(1, 0, rows.size(1));
}

struct Inputs {
  Tensors all;  // x, then those of gate and norm weight that there are, then the weight
  bool gate, norm;

  Optional gates() const { return gate ? Optional(all[1]) : std::nullopt; }
  Optional factors() const { return norm ? Optional(all[all.size() - 2]) : std::nullopt; }
  Inputs in_double() const {
    Inputs result{{}, gate, norm};
    for (const at::Tensor& t : all) result.all.push_back(leaf(t.to(at::kDouble)));
    return result;
  }
};

Inputs random_inputs(const Case& c, at::ScalarType dtype) {
  const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
  const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
  Inputs inputs{{leaf(at::randn({c.rows, c.channels}, options))}, c.gate, c.group > 0};
  if (c.gate) inputs.all.push_back(leaf(padded(at::randn({c.rows, c.channels}, options) * 2, c.padding)));
  if (c.group > 0) inputs.all.push_back(leaf(at::randn({c.group}, options.dtype(wide))));
  const double scale = 1 / std::sqrt(static_cast<double>(c.channels));
  inputs.all.push_back(leaf(at::randn({c.out, c.channels}, options) * scale));
  return inputs;
}

void check(const Tensors& got, const Tensors& want, double tolerance, const Case& c) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_error(got[i], want[i]), tolerance)
        << "result " << i << " of " << c.rows << " x " << c.channels << " / " << c.group << " -> " << c.out
        << " " << c.order;
  }
}

TEST(GatedLinearKernels, MatchComposition) {
  at::manual_seed(1);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype != at::kBFloat16) continue;
      const Inputs inputs = random_inputs(c, dtype), truth = inputs.in_double();
      const at::Tensor dy = at::randn({c.rows, c.out}, inputs.all[0].options().requires_grad(false));
      const Tensors got = testing::with_kernels([&] {
        const at::Tensor y =
            gated_linear(inputs.all[0], inputs.gates(), inputs.factors(), 1e-5, c.order, inputs.all.back());
        Tensors results = testing::gradients({y}, inputs.all, {dy});
        results.push_back(y.detach());
        return results;
      });
      const at::Tensor inner =
          gated_norm_reference(truth.all[0], truth.gates(), truth.factors(), 1e-5, c.order);
      const at::Tensor y = linear_reference(inner, truth.all.back());
      Tensors want = testing::gradients({y}, truth.all, {dy.to(at::kDouble)});
      want.push_back(y.detach());
      // bfloat16: the product's input, its gradient and the result are each rounded.
      check(got, want, dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 2e-6 : 1e-2, c);
    }
  }
}

// A bfloat16 leaf that collects float32 gradients is to autograd what its float32 original is.
TEST(GatedLinearKernels, ARoundedLeafGetsTheGradientOfItsMaster) {
  at::manual_seed(3);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    const Inputs inputs = random_inputs(c, at::kBFloat16);
    const at::Tensor dy = at::randn({c.rows, c.out}, inputs.all[0].options().requires_grad(false));
    const at::Tensor master = leaf(at::randn({c.out, c.channels}, dy.options().dtype(at::kFloat)));
    at::Tensor rounded = leaf(master.to(at::kBFloat16));
    rounded.set_grad_dtype(at::kFloat);
    std::vector<Tensors> results;
    for (const at::Tensor& weight : {master, rounded}) {
      results.push_back(testing::with_kernels([&] {
        const at::Tensor y =
            gated_linear(inputs.all[0], inputs.gates(), inputs.factors(), 1e-5, c.order, weight);
        Tensors leaves = inputs.all;
        leaves.back() = weight;
        return testing::gradients({y}, leaves, {dy});
      }));
    }
    EXPECT_EQ(results[1].back().scalar_type(), at::kFloat);
    for (size_t i = 0; i < results[0].size(); ++i) EXPECT_TRUE(at::equal(results[0][i], results[1][i]));
  }
}

// The gradients and the result that the backward kernels make together: those of autograd, bit for bit.
TEST(GatedLinearKernels, GradientsOfTheNormWithoutProducts) {
  at::manual_seed(2);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    const Inputs inputs = random_inputs(c, at::kBFloat16);
    const at::Tensor& x = inputs.all[0];
    const at::Tensor dy = at::randn({c.rows, c.channels}, x.options().requires_grad(false));
    const Tensors pairs = testing::with_kernels([&] {
      const GatedNormGradients out =
          gated_norm_gradients(x, inputs.gates(), inputs.factors(), 1e-5, c.order, dy);
      const at::Tensor y = gated_norm(x, inputs.gates(), inputs.factors(), 1e-5, c.order);
      const Tensors want = testing::gradients({y}, Tensors(inputs.all.begin(), inputs.all.end() - 1), {dy});
      Tensors results = {out.y, y.detach(), out.dx, want[0]};
      if (c.gate) results.insert(results.end(), {out.dgate, want[1]});
      if (c.group > 0) results.insert(results.end(), {out.dweight, want.back()});
      return results;
    });
    EXPECT_LE(relative_error(pairs[0], pairs[1]), 1e-3);  // roundings to bfloat16 may fall apart
    for (size_t i = 2; i < pairs.size(); i += 2) EXPECT_TRUE(at::equal(pairs[i], pairs[i + 1]));
  }
}

}  // namespace
}  // namespace oryx::operators
