// One sequence on two ranks (docs/mathematics/sequence_parallel.md): rank 0 has its beginning, rank 1 the
// rest. The joint state goes forward, its gradient comes back, through nothing but the operators' contracts;
// the gradients are those of the whole. Run by torchrun with two processes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "operators/attention/attention.h"
#include "operators/gated_delta_rule/gated_delta_rule.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/short_conv/short_conv.h"
#include "operators/ssd/ssd.h"
#include "training/process_group.h"

namespace oryx::training {
namespace {

constexpr int64_t kTokens = 96, kSplit = 45, kHeads = 2, kDim = 8, kWidth = kHeads * kDim, kTaps = 4;

struct ModeSpan {
  int64_t begin, end;
  bool attends;
};
// The split falls into a span of attention, and no boundary is a multiple of a chunk.
const std::vector<ModeSpan> kSpans = {
    {0, 13, true}, {13, 40, false}, {40, 70, true}, {70, 83, false}, {83, 96, true}};

// What a piece hands to the next one.
struct Carried {
  at::Tensor key_tail, value_tail;  // [1, taps − 1, width]
  at::Tensor keys, values;          // [1, tokens so far, heads, dim]
  at::Tensor state;                 // [1, heads, dim, dim]
  std::vector<at::Tensor> tensors() const { return {key_tail, value_tail, keys, values, state}; }
};

std::vector<at::Tensor> make_parameters() {
  const std::vector<std::vector<int64_t>> shapes = {{kWidth, kWidth}, {kWidth, kWidth}, {kWidth, kWidth},
                                                    {kWidth, kWidth}, {kWidth, kTaps},  {kWidth, kTaps},
                                                    {kHeads, kWidth}, {kHeads, kWidth}};
  std::vector<at::Tensor> parameters;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const int64_t size = shapes[i][0] * shapes[i][1];
    const at::Tensor values =
        0.5 * at::sin(at::arange(size, at::kDouble) * (1.3 + 0.1 * static_cast<double>(i)));
    parameters.push_back(values.view(shapes[i]).clone().set_requires_grad(true));
  }
  return parameters;
}

// A mixing layer over tokens [begin, begin + time) of the sequence.
at::Tensor mix(bool delta, const at::Tensor& x, int64_t begin, const std::vector<at::Tensor>& w,
               const std::optional<Carried>& before, Carried* after) {
  const int64_t time = x.size(1), past = before ? before->keys.size(1) : 0;
  const auto tail = [&](const at::Tensor Carried::*which) {
    return before ? std::optional<at::Tensor>((*before).*which) : std::nullopt;
  };
  const auto [key, key_tail] =
      operators::short_conv(at::linear(x, w[0]), w[4], std::nullopt, tail(&Carried::key_tail), "silu");
  const auto [value, value_tail] =
      operators::short_conv(at::linear(x, w[1]), w[5], std::nullopt, tail(&Carried::value_tail), "silu");
  at::Tensor keys = key.view({1, time, kHeads, kDim}), values = value.view({1, time, kHeads, kDim});

  std::vector<int64_t> spans[2], rows[2];  // of the linear mixer, of attention; attention counts from token 0
  for (const ModeSpan& span : kSpans) {
    const int64_t first = std::max(span.begin, begin), last = std::min(span.end, begin + time);
    if (first >= last) continue;
    const int64_t shift = span.attends ? begin - past : begin;
    for (const int64_t number : {int64_t{0}, first - shift, last - shift})
      spans[span.attends].push_back(number);
    for (int64_t t = first; t < last; ++t) rows[span.attends].push_back(t - begin);
  }
  const auto query = [&](bool attends, const at::Tensor& weight) {
    return at::linear(x.view({time, kWidth}).index_select(0, at::tensor(rows[attends])), weight)
        .view({-1, kHeads, kDim});
  };
  const auto span_rows = [&](bool attends) { return at::tensor(spans[attends]).view({-1, 3}); };

  const at::Tensor rate = at::softplus(at::linear(x, w[6]));
  const std::optional<at::Tensor> initial = tail(&Carried::state);
  const auto [linear, state] =
      delta ? operators::gated_delta_rule(query(false, w[2]), operators::l2_norm(keys), values, -rate,
                                          at::sigmoid(at::linear(x, w[7])), span_rows(false), initial, 0.3)
            : operators::ssd(query(false, w[2]), keys, values, -rate, at::softplus(at::linear(x, w[7])),
                             std::nullopt, span_rows(false), initial);
  if (before) {
    keys = at::cat({before->keys, keys}, 1);
    values = at::cat({before->values, values}, 1);
  }
  const at::Tensor attended = operators::attention(query(true, w[3]), keys, values, span_rows(true), 0.4);
  if (after) *after = {key_tail, value_tail, keys, values, state};
  return at::zeros({time, kHeads, kDim}, at::kDouble)
      .index_copy(0, at::tensor(rows[0]), linear)
      .index_copy(0, at::tensor(rows[1]), attended);
}

// A scalar in which every output counts differently.
at::Tensor loss_of(const at::Tensor& y, int64_t begin) {
  return (y *
          at::cos(at::arange(y.numel(), at::kDouble) + static_cast<double>(begin * kWidth)).view(y.sizes()))
      .sum();
}

at::Tensor flat(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> parts;
  for (const at::Tensor& tensor : tensors) parts.push_back(tensor.detach().reshape({-1}));
  return at::cat(parts);
}

std::vector<at::Tensor> like(const std::vector<at::Tensor>& shapes, const at::Tensor& values) {
  std::vector<at::Tensor> tensors;
  int64_t offset = 0;
  for (const at::Tensor& shape : shapes) {
    tensors.push_back(values.narrow(0, offset, shape.numel()).view(shape.sizes()).clone());
    offset += shape.numel();
  }
  return tensors;
}

at::Tensor input() {
  return at::sin(at::arange(kTokens * kWidth, at::kDouble) * 0.7).view({1, kTokens, kWidth});
}

ProcessGroup& group() {
  static ProcessGroup* group = [] {
    const std::optional<Launch> launch = launch_of_this_process();
    if (!launch || launch->size != 2) throw std::runtime_error("run this by torchrun with two processes");
    auto* made = new ProcessGroup(*launch);
    made->start(c10::kCPU, std::chrono::seconds(60));
    return made;
  }();
  return *group;
}

class SequenceParallel : public testing::TestWithParam<bool> {};

TEST_P(SequenceParallel, HalvesHaveTheGradientsOfTheWhole) {
  const bool delta = GetParam();
  const std::vector<at::Tensor> whole = make_parameters();
  const at::Tensor whole_input = input().set_requires_grad(true);
  loss_of(mix(delta, whole_input, 0, whole, std::nullopt, nullptr), 0).backward();

  // Both ranks know the shapes of what is handed over; the numbers come from rank 0.
  const std::vector<at::Tensor> parameters = make_parameters();
  const bool is_first = group().rank() == 0;
  const int64_t begin = is_first ? 0 : kSplit, end = is_first ? kSplit : kTokens;
  const at::Tensor piece = input().narrow(1, begin, end - begin).clone().set_requires_grad(true);
  const std::vector<at::Tensor> shapes = {
      at::empty({1, kTaps - 1, kWidth}), at::empty({1, kTaps - 1, kWidth}),
      at::empty({1, kSplit, kHeads, kDim}), at::empty({1, kSplit, kHeads, kDim}),
      at::empty({1, kHeads, kDim, kDim})};
  int64_t size = 0;
  for (const at::Tensor& shape : shapes) size += shape.numel();
  const at::Tensor message = at::zeros({size}, at::kDouble);
  if (is_first) {
    Carried after;
    const at::Tensor loss = loss_of(mix(delta, piece, 0, parameters, std::nullopt, &after), 0);
    message.copy_(flat(after.tensors()));
    group().broadcast(message, 0).finish();
    group().broadcast(message, 1).finish();  // now the gradients of what was sent
    std::vector<at::Tensor> outputs = after.tensors(), gradients = like(shapes, message);
    outputs.push_back(loss);
    gradients.push_back(at::ones({}, at::kDouble));
    torch::autograd::backward(outputs, gradients);
  } else {
    group().broadcast(message, 0).finish();
    std::vector<at::Tensor> received = like(shapes, message);
    for (at::Tensor& tensor : received) tensor.set_requires_grad(true);
    const Carried before = {received[0], received[1], received[2], received[3], received[4]};
    loss_of(mix(delta, piece, kSplit, parameters, before, nullptr), kSplit).backward();
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& tensor : received) gradients.push_back(tensor.grad());
    message.copy_(flat(gradients));
    group().broadcast(message, 1).finish();
  }

  const auto expect_close = [](const at::Tensor& ours, const at::Tensor& expected, const std::string& what) {
    const double error = (ours - expected).norm().item<double>() / expected.norm().item<double>();
    EXPECT_LT(error, 1e-12) << what;
  };
  expect_close(piece.grad(), whole_input.grad().narrow(1, begin, end - begin), "input");
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor gradient = parameters[i].grad().contiguous();
    group().all_reduce(gradient).finish();
    expect_close(gradient, whole[i].grad(), fmt::format("parameter {}", i));
  }
}

INSTANTIATE_TEST_SUITE_P(Mixers, SequenceParallel, testing::Values(false, true), [](const auto& mixer) {
  return mixer.param ? "attention_and_gated_delta_rule" : "attention_and_ssd";
});

}  // namespace
}  // namespace oryx::training
