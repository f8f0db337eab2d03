// The gated delta rule on tensors of more than 2³¹ elements.
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/large_testing.h"

namespace oryx::operators::testing {
namespace {

// How many segments a sequence is cut into may depend on its neighbours: the same up to rounding.
TEST_F(LargeTensors, GatedDeltaRule) {
  const int64_t time = 512, batch = tokens / time, heads = 16;
  const at::Tensor all = spans_of(batch, time), one = spans_of(1, time);
  for (const int64_t key_dim : {64, 128}) {
    const int64_t value_dim = 192 - key_dim;
    const auto unit = [](at::Tensor x) { return x.div_(x.norm(2, -1, /*keepdim=*/true)); };
    const Tensors inputs = {
        unit(random({tokens, heads, key_dim})), unit(random({batch, time, heads, key_dim})),
        random({batch, time, heads, value_dim}), random({batch, time, heads}, at::kFloat).abs_().mul_(-0.1),
        random({batch, time, heads}, at::kFloat).sigmoid_()};
    expect_last_rows(inputs, {time, 1, 1, 1, 1}, 2e-2,
                     [&](const Tensors& x, bool is_small) {
                       const auto [output, state] = gated_delta_rule(x[0], x[1], x[2], x[3], x[4],
                                                                     is_small ? one : all, std::nullopt, 0.1);
                       return Tensors{output.view(x[2].sizes())};
                     },
                     {1});
    at::accelerator::emptyCache();
  }
}

}  // namespace
}  // namespace oryx::operators::testing
