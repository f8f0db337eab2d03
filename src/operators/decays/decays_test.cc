#include "operators/decays/decays.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::leaves;
using testing::random_normal;
using Tensors = std::vector<at::Tensor>;
using Optional = std::optional<at::Tensor>;

Tensors call(const Tensors& t, const Optional& rows, const Optional& mask) {
  const auto [log_decay, strength] =
      decays(t[0], t[1], t[2], t.size() > 3 ? Optional(t[3]) : std::nullopt, rows, mask);
  return {log_decay, strength};
}

TEST(Decays, AreTheFormulaOfEachToken) {
  at::manual_seed(1);
  const Tensors t = {random_normal({2, 3, 4}), random_normal({4}), random_normal({4}),
                     random_normal({2, 3, 4})};
  const at::Tensor mask = at::ones({2, 3, 1}, at::kDouble);
  mask[1][2].zero_();
  for (const bool with_beta : {false, true}) {
    const Tensors got = call(with_beta ? t : Tensors(t.begin(), t.begin() + 3), std::nullopt, mask);
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t i = 0; i < 3; ++i) {
        for (int64_t h = 0; h < 4; ++h) {
          const auto at = [&](const at::Tensor& x) { return x[b][i][h].item<double>(); };
          const double kept = b == 1 && i == 2 ? 0 : 1,
                       step = kept * std::log(1 + std::exp(at(t[0]) + t[1][h].item<double>()));
          EXPECT_NEAR(at(got[0]), -std::exp(t[2][h].item<double>()) * step, 1e-12);
          EXPECT_NEAR(at(got[1]), with_beta ? kept / (1 + std::exp(-at(t[3]))) : step, 1e-12);
        }
      }
    }
  }
}

TEST(Decays, GradientsMatchFiniteDifferences) {
  at::manual_seed(2);
  const at::Tensor rows = at::randperm(18, at::kLong).view({2, 9}),
                   mask = at::rand({2, 9, 1}, at::kDouble).gt(0.3).to(at::kDouble);
  for (const bool in_other_order : {false, true}) {
    const std::vector<int64_t> sizes =
        in_other_order ? std::vector<int64_t>{18, 5} : std::vector<int64_t>{2, 9, 5};
    for (const bool with_beta : {false, true}) {
      Tensors inputs = {random_normal(sizes), random_normal({5}), random_normal({5})};
      if (with_beta) inputs.push_back(random_normal(sizes));
      const auto function = [&](const Tensors& t) {
        return call(t, in_other_order ? Optional(rows) : std::nullopt, mask);
      };
      EXPECT_LE(testing::directional_error(function, inputs), 1e-6);
    }
  }
}

TEST(Decays, RowsMayLieInAnotherOrder) {
  at::manual_seed(3);
  const at::Tensor rows = at::randperm(18, at::kLong).view({2, 9});
  const at::Tensor x = random_normal({18, 5}, at::kBFloat16), beta = random_normal({18, 5}, at::kBFloat16);
  const auto in_order = [&](const at::Tensor& t) {
    return t.index_select(0, rows.flatten()).view({2, 9, 5});
  };
  const auto run = [&](const Tensors& t, const Optional& order) {
    Tensors results = call(t, order, std::nullopt);
    const Tensors gradients = testing::gradients(results, t, {results[0].detach(), results[1].detach()});
    results.insert(results.end(), gradients.begin(), gradients.end());
    return results;
  };
  const at::Tensor bias = leaves({random_normal({5})}, at::kFloat)[0],
                   log_a = leaves({random_normal({5})}, at::kFloat)[0];
  const auto leaf = [](const at::Tensor& t) { return t.detach().set_requires_grad(true); };
  Tensors got = run({leaf(x), bias, log_a, leaf(beta)}, rows);
  for (const size_t i : {2, 5}) got[i] = in_order(got[i]);
  const Tensors want = run({leaf(in_order(x)), bias, log_a, leaf(in_order(beta))}, std::nullopt);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
  EXPECT_EQ(got[0].scalar_type(), at::kFloat);
  EXPECT_EQ(got[2].scalar_type(), at::kBFloat16);
}

TEST(Decays, ExtremesStayFinite) {
  const at::Tensor x = at::tensor({-1e4, -90.0, 19.9, 20.1, 1e4}).to(at::kFloat).view({1, 5, 1}).clone();
  const Tensors inputs = leaves({x, at::zeros({1}), at::zeros({1}), x}, at::kFloat);
  const Tensors out = call(inputs, std::nullopt, std::nullopt);
  for (const at::Tensor& y : out) EXPECT_TRUE(y.isfinite().all().item<bool>());
  for (const at::Tensor& g :
       testing::gradients(out, inputs, {at::ones_like(out[0]), at::ones_like(out[1])})) {
    EXPECT_TRUE(g.isfinite().all().item<bool>());
  }
}

TEST(Decays, RejectsWhatItCannotRead) {
  const at::Tensor x = at::ones({2, 5, 3}), heads = at::ones({3}), packed = x.flatten(0, 1);
  const at::Tensor rows = at::arange(10, at::kLong).view({2, 5});
  EXPECT_THROW(decays(packed, heads, heads), Error);
  EXPECT_THROW(decays(x.to(at::kHalf), heads, heads), Error);
  EXPECT_THROW(decays(x.narrow(2, 0, 0), heads.narrow(0, 0, 0), heads.narrow(0, 0, 0)), Error);
  EXPECT_THROW(decays(x, at::ones({4}), heads), Error);
  EXPECT_THROW(decays(x, heads, at::ones({1})), Error);
  EXPECT_THROW(decays(x, heads, heads, packed), Error);
  EXPECT_THROW(decays(x, heads, heads, x.to(at::kDouble)), Error);
  EXPECT_THROW(decays(x, heads, heads, {}, rows), Error);
  EXPECT_THROW(decays(packed, heads, heads, {}, rows.to(at::kInt)), Error);
  EXPECT_THROW(decays(packed, heads, heads, {}, rows.narrow(1, 0, 4)), Error);
  EXPECT_THROW(decays(x, heads, heads, {}, {}, at::ones({2, 5})), Error);
  EXPECT_THROW(decays(x, heads, heads, {}, {}, at::ones({2, 5, 1}, at::kDouble)), Error);
  EXPECT_NO_THROW(decays(packed, heads, heads, packed, rows, at::ones({2, 5, 1})));
}

}  // namespace
}  // namespace oryx::operators
