#include "operators/gated_norm/gated_norm.h"

#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

using Optional = std::optional<at::Tensor>;

struct Case {
  int64_t rows, channels, group;  // group 0: no weight
  bool gate;
  const char* order;
  int64_t padding = 0;  // of the rows of x and gate
  bool on_gpu_only = false;
};

const Case cases[] = {
    {37, 256, 256, true, "after_gate"},
    {18, 768, 768, true, "after_gate"},
    {9, 512, 128, true, "before_gate"},
    {9, 192, 64, true, "after_gate", 8},
    {33, 512, 512, false, "before_gate"},
    {5, 2048, 2048, false, "before_gate"},
    {3, 4096, 4096, true, "before_gate"},
    {2, 8192, 8192, false, "before_gate"},
    {2, 12000, 12000, true, "after_gate"},
    {7, 37, 37, true, "after_gate"},
    {3, 35, 7, true, "before_gate"},
    {11, 64, 64, false, "before_gate", 3},
    {33, 101, 0, true, "before_gate"},
    {17, 1024, 0, true, "before_gate", 16},
    {1, 16, 16, true, "after_gate"},
    {0, 16, 16, true, "after_gate"},
    {0, 16, 0, true, "after_gate"},
    {16384, 2048, 2048, true, "after_gate", 0, true},
    {16384, 2048, 2048, false, "", 0, true},
    {16384, 2048, 128, true, "before_gate", 2048, true},
    {16384, 768, 768, true, "after_gate", 0, true},
    {16384, 5632, 0, true, "", 5632, true},
};

// Rows of a wider matrix whose other columns are NaN.
at::Tensor padded(const at::Tensor& rows, int64_t padding) {
  if (padding == 0) return rows;
  const at::Tensor wide = at::full({rows.size(0), rows.size(1) + padding}, NAN, rows.options());
  wide.narrow(1, 0, rows.size(1)).copy_(rows);
  return wide.narrow(1, 0, rows.size(1));
}

at::Tensor leaf(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

void check(const Tensors& got, const Tensors& want, at::ScalarType dtype, const Case& c) {
  const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 5e-3;
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_error(got[i], want[i]), tolerance)
        << "result " << i << " of " << c.rows << " x " << c.channels << " / " << c.group << " " << c.order;
  }
}

TEST(GatedNormKernels, MatchReference) {
  at::manual_seed(1);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype == at::kDouble) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
      const std::string order = c.group == 0 || !c.gate ? "before_gate" : c.order;
      const at::Tensor x = leaf(padded(at::randn({c.rows, c.channels}, options), c.padding));
      const at::Tensor dy = at::randn({c.rows, c.channels}, options);
      Tensors inputs = {x};
      Optional gate, weight;
      if (c.gate)
        inputs.push_back(*(gate = leaf(padded(at::randn({c.rows, c.channels}, options) * 2, c.padding))));
      if (c.group > 0) inputs.push_back(*(weight = leaf(at::randn({c.group}, options.dtype(wide)))));
      const Tensors got = testing::with_kernels([&] {
        const at::Tensor y = gated_norm(x, gate, weight, 1e-5, order);
        Tensors results = testing::gradients({y}, inputs, {dy});
        results.push_back(y.detach());
        return results;
      });
      Tensors truth;
      for (const at::Tensor& t : inputs) truth.push_back(leaf(t.to(at::kDouble)));
      const Optional wide_gate = c.gate ? Optional(truth[1]) : std::nullopt;
      const Optional wide_weight = c.group > 0 ? Optional(truth.back()) : std::nullopt;
      const at::Tensor y = gated_norm_reference(truth[0], wide_gate, wide_weight, 1e-5, order);
      Tensors want = testing::gradients({y}, truth, {dy.to(at::kDouble)});
      want.push_back(y.detach());
      check(got, want, dtype, c);
    }
  }
}

TEST(GatedNormKernels, AddNormMatchesReference) {
  at::manual_seed(2);
  for (const Case& c : cases) {
    if (c.group != c.channels || c.gate || (testing::wants_small_cases() && c.on_gpu_only)) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = dtype == at::kBFloat16 ? at::kFloat : dtype;
      const at::Tensor residual = leaf(padded(at::randn({c.rows, c.channels}, options), c.padding));
      const at::Tensor update = leaf(padded(at::randn({c.rows, c.channels}, options), c.padding));
      const at::Tensor weight = leaf(at::randn({c.group}, options.dtype(wide)));
      const Tensors upstream = {at::randn({c.rows, c.channels}, options),
                                at::randn({c.rows, c.channels}, options)};
      const Tensors got = testing::with_kernels([&] {
        const auto [sum, normed] = add_norm(residual, update, weight, 1e-5);
        Tensors results = testing::gradients({sum, normed}, {residual, update, weight}, upstream);
        results.push_back(sum.detach());
        results.push_back(normed.detach());
        return results;
      });
      EXPECT_TRUE(at::equal(got[3], (residual + update).detach()));  // rounded, and used as rounded
      const at::Tensor sum = leaf(got[3].to(at::kDouble)), factor = leaf(weight.to(at::kDouble));
      const at::Tensor normed = gated_norm_reference(sum, {}, factor, 1e-5, "before_gate");
      const Tensors want = testing::gradients({sum * 1, normed}, {sum, factor},
                                              {upstream[0].to(at::kDouble), upstream[1].to(at::kDouble)});
      check(got, {want[0], want[0], want[1], sum.detach(), normed.detach()}, dtype, c);
    }
  }
}

TEST(GatedNormKernels, ExtremeGatesStayFinite) {
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const at::Tensor x = leaf(at::ones({4, 64}, options)),
                   weight = leaf(at::ones({64}, options.dtype(at::kFloat)));
  const at::Tensor gate = leaf(at::tensor({-1e4, 1e4, -100., -88.}, at::kDouble)
                                   .to(options)
                                   .unsqueeze(1)
                                   .expand({4, 64})
                                   .contiguous());
  for (const char* order : {"after_gate", "before_gate"}) {
    const Tensors got = testing::with_kernels([&] {
      const at::Tensor y = gated_norm(x, gate, weight, 1e-5, order);
      return testing::gradients({y}, {x, gate, weight}, {at::ones_like(y)});
    });
    for (const at::Tensor& t : got) EXPECT_TRUE(t.isfinite().all().item<bool>());
  }
}

TEST(GatedNormKernels, RepeatBitForBit) {
  if (testing::wants_small_cases()) GTEST_SKIP() << "with_kernels repeats";
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const at::Tensor x = leaf(at::randn({4096, 2048}, options)), gate = leaf(at::randn({4096, 2048}, options));
  const at::Tensor weight = leaf(at::randn({128}, options.dtype(at::kFloat))), dy = at::randn_like(x);
  Tensors first;
  for (int i = 0; i < 200; ++i) {
    const Tensors again =
        testing::gradients({gated_norm(x, gate, weight, 1e-5, "after_gate")}, {x, gate, weight}, {dy});
    if (first.empty()) first = again;
    for (size_t k = 0; k < again.size(); ++k) ASSERT_TRUE(at::equal(again[k], first[k]));
  }
}

}  // namespace
}  // namespace oryx::operators
