#include <fmt/format.h>

#include "operators/device/device_testing.h"
#include "operators/short_conv/short_conv.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

using Optional = std::optional<at::Tensor>;

struct Case {
  int64_t batch, time, channels, width;
  bool bias, tail;
  const char* activation;
  int64_t padding = 0;  // of the rows of x
  bool on_gpu_only = false;
  bool in_other_order = false;  // the rows of x
};

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  for (const int64_t time : {1, 2, 3, 4, 5, 33}) cases.push_back({2, time, 12, 4, true, true, "silu"});
  for (const int64_t width : {1, 2, 3, 5, 8}) cases.push_back({2, 9, 19, width, true, true, "silu"});
  cases.push_back({2, 300, 136, 4, true, true, "silu", 8});  // several blocks and slices
  cases.push_back({1, 256, 128, 4, false, false, "silu"});
  cases.push_back({1, 259, 8, 4, false, false, "none"});
  cases.push_back({2, 63, 20, 4, false, true, "none", 4});
  cases.push_back({2, 40, 21, 4, true, false, "silu"});
  cases.push_back({2, 40, 24, 4, true, true, "silu", 3});
  cases.push_back({2, 0, 8, 4, true, true, "silu"});
  cases.push_back({8, 2048, 6144, 4, false, false, "silu", 2048, true});
  cases.push_back({3, 333, 2304, 4, true, true, "silu", 0, true});
  const std::vector<Case> in_order = cases;
  for (const Case& c : in_order) {
    cases.push_back(c);
    cases.back().in_other_order = true;
  }
  return cases;
}

at::Tensor leaf(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

// The row of x of each token, in an order of no token's neighbours.
Optional rows_of(const Case& c) {
  if (!c.in_other_order) return std::nullopt;
  return at::randperm(c.batch * c.time, at::TensorOptions(at::kLong))
      .to(kernel_device())
      .view({c.batch, c.time});
}
std::vector<int64_t> sizes_of(const Case& c) {
  if (c.in_other_order) return {c.batch * c.time, c.channels};
  return {c.batch, c.time, c.channels};
}

// A slice of a wider projection whose other columns are NaN.
at::Tensor padded(const at::Tensor& x, int64_t padding) {
  if (padding == 0) return x;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() += padding;
  const at::Tensor slice = at::full(sizes, NAN, x.options()).narrow(-1, 0, x.size(-1));
  slice.copy_(x);
  return slice;
}

double tolerance(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 5e-3;
}

std::string name(const Case& c, at::ScalarType dtype) {
  return fmt::format("{} x {} x {} width {} {} {}{}", c.batch, c.time, c.channels, c.width, c.activation,
                     at::toString(dtype), c.in_other_order ? ", rows in another order" : "");
}

TEST(ShortConvKernels, MatchReference) {
  at::manual_seed(1);
  for (const Case& c : make_cases()) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype != at::kBFloat16) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = options.dtype(dtype == at::kBFloat16 ? at::kFloat : dtype);
      Tensors inputs = {leaf(padded(at::randn(sizes_of(c), options), c.padding)),
                        leaf(at::randn({c.channels, c.width}, wide))};
      if (c.bias) inputs.push_back(leaf(at::randn({c.channels}, wide)));
      if (c.tail) inputs.push_back(leaf(at::randn({c.batch, c.width - 1, c.channels}, options)));
      const Optional rows = rows_of(c);
      const auto call = [&](auto function, const Tensors& t) {
        const auto [y, new_tail] = function(t[0], t[1], c.bias ? Optional(t[2]) : std::nullopt,
                                            c.tail ? Optional(t.back()) : std::nullopt, c.activation, rows);
        return Tensors{y, new_tail};
      };
      const Tensors upstream = {at::randn({c.batch, c.time, c.channels}, options),
                                at::randn({c.batch, c.width - 1, c.channels}, options)};
      // Once with both upstream gradients, once without that of the new tail.
      for (const bool with_tail : {true, false}) {
        const auto run = [&](auto function, const Tensors& t, at::ScalarType type) {
          Tensors out = call(function, t);
          Tensors results = with_tail
                                ? testing::gradients(out, t, {upstream[0].to(type), upstream[1].to(type)})
                                : torch::autograd::grad({out[0]}, t, {upstream[0].to(type)});
          for (const at::Tensor& y : out) results.push_back(y.detach());
          return results;
        };
        if (!with_tail && c.time == 0) continue;
        const Tensors got = testing::with_kernels([&] { return run(short_conv, inputs, dtype); });
        Tensors truth;
        for (const at::Tensor& t : inputs) truth.push_back(leaf(t.to(at::kDouble)));
        const Tensors want = run(short_conv_reference, truth, at::kDouble);
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_LE(relative_error(got[i], want[i]), tolerance(dtype))
              << "result " << i << " of " << name(c, dtype);
        }
        EXPECT_TRUE(at::equal(got.back().to(at::kDouble), want.back()));
      }
    }
  }
}

TEST(ShortConvKernels, TwoReadersFlowBackTogether) {
  at::manual_seed(3);
  for (const Case& c : make_cases()) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype != at::kBFloat16) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = options.dtype(dtype == at::kBFloat16 ? at::kFloat : dtype);
      const Optional rows = rows_of(c);
      const Tensors inputs = {leaf(padded(at::randn(sizes_of(c), options), c.padding)),
                              leaf(at::randn({c.channels, c.width}, wide)),
                              leaf(at::randn({c.channels}, wide)),
                              leaf(at::randn({c.batch, c.width - 1, c.channels}, options))};
      const Tensors upstream = {at::randn({c.batch, c.time, c.channels}, options),
                                at::randn({c.batch, c.time, c.channels}, options),
                                at::randn({c.batch, c.width - 1, c.channels}, options)};
      const Tensors got = testing::with_kernels([&] {
        const auto [y, again, tail] =
            short_conv_for_two(inputs[0], inputs[1], inputs[2], inputs[3], c.activation, rows);
        EXPECT_TRUE(at::equal(y, again));
        return testing::gradients({y, again, tail}, inputs, upstream);
      });
      Tensors truth;
      for (const at::Tensor& t : inputs) truth.push_back(leaf(t.to(at::kDouble)));
      const auto [y, tail] = short_conv_reference(truth[0], truth[1], truth[2], truth[3], c.activation, rows);
      const at::Tensor both = upstream[0].to(at::kDouble) + upstream[1].to(at::kDouble);
      const Tensors want = testing::gradients({y, tail}, truth, {both, upstream[2].to(at::kDouble)});
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_LE(relative_error(got[i], want[i]), tolerance(dtype))
            << "gradient " << i << " of " << name(c, dtype);
      }
      if (c.time == 0) continue;
      const Tensors second = testing::with_kernels([&] {
        const auto out = short_conv_for_two(inputs[0], inputs[1], inputs[2], inputs[3], c.activation, rows);
        return torch::autograd::grad({std::get<1>(out)}, inputs, {upstream[1]});
      });
      const Tensors alone = testing::with_kernels([&] {
        const auto out = short_conv(inputs[0], inputs[1], inputs[2], inputs[3], c.activation, rows);
        return torch::autograd::grad({std::get<0>(out)}, inputs, {upstream[1]});
      });
      for (size_t i = 0; i < second.size(); ++i) EXPECT_TRUE(at::equal(second[i], alone[i]));
    }
  }
}

TEST(ShortConvKernels, PiecesGiveTheWhole) {
  at::manual_seed(2);
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const at::Tensor x = at::randn({2, 70, 16}, options),
                   weight = at::randn({16, 4}, options.dtype(at::kFloat));
  testing::with_kernels([&] {
    const auto [whole, last] = short_conv(x, weight, {}, {}, "silu");
    Tensors pieces;
    Optional tail;
    for (const auto& [from, to] : {std::pair{0, 1}, {1, 3}, {3, 40}, {40, 70}}) {
      const auto [y, next] = short_conv(x.slice(1, from, to), weight, {}, tail, "silu");
      pieces.push_back(y);
      tail = next;
    }
    EXPECT_TRUE(at::equal(at::cat(pieces, 1), whole));
    EXPECT_TRUE(at::equal(*tail, last));
    return pieces;
  });
}

TEST(ShortConvKernels, RepeatBitForBit) {
  if (testing::wants_small_cases()) GTEST_SKIP() << "with_kernels repeats";
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const at::Tensor x = leaf(at::randn({3, 1333, 2048}, options)), dy = at::randn_like(x);
  const at::Tensor weight = leaf(at::randn({2048, 4}, options.dtype(at::kFloat)));
  Tensors first;
  for (int i = 0; i < 200; ++i) {
    const Tensors again =
        testing::gradients({std::get<0>(short_conv(x, weight, {}, {}, "silu"))}, {x, weight}, {dy});
    if (first.empty()) first = again;
    for (size_t k = 0; k < again.size(); ++k) ASSERT_TRUE(at::equal(again[k], first[k]));
  }
}

}  // namespace
}  // namespace oryx::operators
