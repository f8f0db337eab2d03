// Pieces of several lengths and positions, through the kernels.
#include <c10/core/GradMode.h>

#include "model/testing.h"
#include "operators/device/device_testing.h"

namespace oryx::model {
namespace {

using operators::testing::kernel_device;
using schedule::Mode;
using testing::relative_error;

// What no kernel writes is NaN: in the spare room of a cache, in padding, in a state.
[[maybe_unused]] const bool is_poisoned = operators::testing::poison_fresh_memory();

LanguageModel model_of(const ModelConfig& config, at::ScalarType dtype, at::Device device) {
  Weights weights = initial_weights(config, 3, at::kDouble);
  for (auto& [name, tensor] : weights.entries()) {
    const bool is_matrix = tensor.dim() == 2 && tensor.size(1) != config.conv_width;
    // The same numbers in every type.
    tensor = (is_matrix ? tensor * 4 : tensor).to(at::kBFloat16);
    tensor = tensor.to(dtype == at::kBFloat16 && !is_matrix ? at::kFloat : dtype).to(device);
  }
  return {config, std::move(weights), dtype};
}

class PiecesOf : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Linear, PiecesOf, ::testing::Values("ssd", "gated_delta"));

TEST_P(PiecesOf, EqualTheWholeSequences) {
  const c10::NoGradGuard no_grad;
  ModelConfig config = testing::small_config(GetParam(), 2);
  config.width = 128;
  config.head_dim = config.value_dim = 64;
  const std::vector<int64_t> first = {5, 70, 33}, rest = {20, 3, 90};
  const int64_t batch = 3, longest_first = 70, longest_rest = 90, time = 123;
  const at::Tensor tokens = testing::random_tokens(config, batch, time, 5);
  // Switches before, at and after the places where the pieces meet.
  const std::vector<schedule::ModeSpans> spans = {
      {{0, 9, Mode::linear}, {9, 25, Mode::attention}},
      {{0, 70, Mode::attention}, {70, 73, Mode::linear}},
      {{0, 20, Mode::linear}, {20, 60, Mode::attention}, {60, 123, Mode::linear}}};
  at::Tensor later = at::zeros({batch, longest_rest}, at::kLong);
  for (int64_t b = 0; b < batch; ++b) {
    later[b].narrow(0, 0, rest[b]).copy_(tokens[b].narrow(0, first[b], rest[b]));
  }

  const LanguageModel exact = model_of(config, at::kDouble, at::kCPU),
                      model = model_of(config, at::kBFloat16, kernel_device());
  const auto whole = [&](const LanguageModel& with, int64_t b) {
    const at::Tensor row = tokens.narrow(0, b, 1).narrow(1, 0, first[b] + rest[b]).to(with.device());
    return with.hidden(row, {spans[b]}).narrow(0, first[b], rest[b]).cpu();
  };
  for (const bool is_last : {false, true}) {
    const auto pieces = operators::testing::with_kernels([&] {
      JointState state = model.empty_state(batch);
      model.hidden(tokens.narrow(1, 0, longest_first).to(model.device()), spans, &state, first);
      JointState copy = state.select(at::tensor({2, 0, 1}, at::kLong), longest_rest);
      const std::vector<schedule::ModeSpans> moved = {spans[2], spans[0], spans[1]};
      const at::Tensor rows = at::tensor({2, 0, 1}, at::kLong);
      const at::Tensor ids = later.index_select(0, rows).to(model.device());
      const std::vector<int64_t> lengths = {rest[2], rest[0], rest[1]};
      const at::Tensor hidden =
          is_last ? model.last_hidden(ids, moved, copy, lengths) : model.hidden(ids, moved, &copy, lengths);
      const at::Tensor by_row = hidden.view({batch, longest_rest, -1}).cpu();
      return std::vector<at::Tensor>{by_row[1].narrow(0, 0, rest[0]).contiguous(),
                                     by_row[2].narrow(0, 0, rest[1]).contiguous(),
                                     by_row[0].narrow(0, 0, rest[2]).contiguous()};
    });
    for (int64_t b = 0; b < batch; ++b) {
      const at::Tensor wanted = whole(exact, b);
      const double alone = relative_error(whole(model, b).to(at::kDouble), wanted),
                   got = relative_error(pieces[b].to(at::kDouble), wanted);
      EXPECT_LE(got, 2 * alone) << "sequence " << b << (is_last ? ", last piece" : "");
    }
  }
}

}  // namespace
}  // namespace oryx::model
