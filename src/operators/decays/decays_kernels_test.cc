#include <fmt/format.h>

#include "operators/decays/decays.h"
#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;
using Optional = std::optional<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

struct Case {
  int64_t batch, time, heads;
  bool on_gpu_only = false;
};

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  for (const int64_t heads : {1, 2, 6, 7, 32, 300}) cases.push_back({2, 9, heads});
  cases.push_back({1, 1, 6});
  cases.push_back({3, 1, 6});
  cases.push_back({2, 0, 6});
  cases.push_back({1, 128, 6});
  cases.push_back({3, 333, 12});  // several blocks, the last not full
  cases.push_back({2, 16384, 6, true});
  cases.push_back({3, 1333, 400, true});
  return cases;
}

// Options of a call.
struct Form {
  bool beta, in_other_order, mask;
};

std::vector<Form> make_forms() {
  std::vector<Form> forms;
  for (const bool beta : {false, true})
    for (const bool in_other_order : {false, true})
      for (const bool mask : {false, true}) forms.push_back({beta, in_other_order, mask});
  return forms;
}

at::Tensor leaf(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

// Both as columns of one wider matrix whose other columns are NaN.
std::pair<at::Tensor, at::Tensor> side_by_side(at::IntArrayRef sizes, const at::TensorOptions& options) {
  std::vector<int64_t> wide = sizes.vec();
  const int64_t heads = sizes.back();
  wide.back() = 2 * heads + 3;
  const at::Tensor both = at::full(wide, NAN, options);
  const at::Tensor x = both.narrow(-1, 0, heads), beta = both.narrow(-1, heads, heads);
  x.copy_(4 * at::randn(sizes, options.dtype(at::kFloat)));
  x.flatten(0, -2).narrow(0, 0, std::min<int64_t>(1, x.numel() / heads)).fill_(24.0);  // beyond the threshold
  beta.copy_(at::randn(sizes, options.dtype(at::kFloat)));
  return {x, beta};
}

// Of results in the accumulate type, which kernels give unrounded even for bfloat16; and of gradients of
// bfloat16 inputs.
double tolerance(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 5e-3;
}

TEST(DecaysKernels, MatchReference) {
  at::manual_seed(1);
  for (const Case& c : make_cases()) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      for (const Form& form : make_forms()) {
        const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
        const auto wide = options.dtype(dtype == at::kBFloat16 ? at::kFloat : dtype);
        const int64_t tokens = c.batch * c.time;
        const std::vector<int64_t> per_token = {c.batch, c.time, c.heads};
        const auto [x, beta] =
            side_by_side(form.in_other_order ? std::vector<int64_t>{tokens, c.heads} : per_token, options);
        Tensors inputs = {leaf(x), leaf(at::randn({c.heads}, wide)), leaf(at::randn({c.heads}, wide))};
        if (form.beta) inputs.push_back(leaf(beta));
        Optional rows, mask;
        if (form.in_other_order) {
          rows =
              at::randperm(tokens, at::TensorOptions(at::kLong)).to(kernel_device()).view({c.batch, c.time});
        }
        if (form.mask) mask = at::rand({c.batch, c.time, 1}, wide).gt(0.2).to(wide.dtype());
        // Mostly of the sign in which the shares of the parameters' gradients do not cancel: what is left of
        // a sum that does says little about its terms.
        const Tensors upstream = {at::randn(per_token, wide) - 2, at::randn(per_token, wide) + 2};
        // What flows back through both results, or through one.
        for (const int used : {2, 0, 1}) {
          const auto run = [&](auto function, const Tensors& t, at::ScalarType type) {
            const auto [log_decay, strength] =
                function(t[0], t[1], t[2], form.beta ? Optional(t[3]) : std::nullopt, rows,
                         mask ? Optional(mask->to(type)) : std::nullopt);
            const Tensors out = {log_decay, strength};
            const Tensors results = used == 2 ? out : Tensors{out[used]};
            Tensors cotangents;
            for (size_t i = 0; i < results.size(); ++i)
              cotangents.push_back(upstream[used == 2 ? i : used].to(type));
            Tensors gradients = torch::autograd::grad(results, t, cotangents, std::nullopt, false,
                                                      /*allow_unused=*/true);
            for (size_t i = 0; i < t.size(); ++i) {
              if (!gradients[i].defined()) gradients[i] = at::zeros_like(t[i]);
            }
            for (const at::Tensor& y : out) gradients.push_back(y.detach());
            return gradients;
          };
          const Tensors got =
              testing::with_kernels([&] { return run(decays, inputs, wide.dtype().toScalarType()); });
          Tensors truth;
          for (const at::Tensor& t : inputs) truth.push_back(leaf(t.to(at::kDouble)));
          const Tensors want = run(decays_reference, truth, at::kDouble);
          for (size_t i = 0; i < got.size(); ++i) {
            EXPECT_EQ(got[i].sizes(), want[i].sizes());
            EXPECT_LE(relative_error(got[i], want[i]), tolerance(got[i].scalar_type()))
                << "result " << i << " of " << c.batch << " x " << c.time << " x " << c.heads << " "
                << at::toString(dtype) << (form.beta ? ", beta" : "")
                << (form.in_other_order ? ", rows in another order" : "") << (form.mask ? ", mask" : "")
                << ", upstream " << used;
          }
        }
      }
    }
  }
}

// The same values whether or not a gradient is wanted, and wherever the rows lie.
TEST(DecaysKernels, DoNotDependOnTheLayout) {
  at::manual_seed(2);
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const auto wide = options.dtype(at::kFloat);
  const auto [x, beta] = side_by_side({2, 70, 6}, options);
  const at::Tensor bias = at::randn({6}, wide), log_a = at::randn({6}, wide);
  const auto run = [&](const at::Tensor& x_, const at::Tensor& beta_) {
    return testing::with_kernels([&] {
      const auto [log_decay, strength] = decays(x_, bias, log_a, beta_);
      return Tensors{log_decay.detach(), strength.detach()};
    });
  };
  const Tensors want = run(x, beta);
  // Neither the rows of a sequence nor the sequences follow each other here.
  const auto turned = [](const at::Tensor& t) { return t.transpose(0, 1).contiguous().transpose(0, 1); };
  for (const Tensors& got :
       {run(leaf(x), leaf(beta)), run(x.contiguous(), beta), run(turned(x), turned(beta))})
    for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i]));
}

}  // namespace
}  // namespace oryx::operators
