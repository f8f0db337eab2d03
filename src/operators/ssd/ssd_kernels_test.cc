#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "operators/cpu/mixer_cases.h"
#include "operators/device/device_testing.h"
#include "operators/device/state_rows_testing.h"
#include "operators/ssd/ssd.h"
#ifdef ORYX_EMULATED
#include "operators/device/warpgroup.h"
#endif

namespace oryx::operators::testing {
namespace {

[[maybe_unused]] const bool prepared = (prepare_process(), true);

// `function` on the tensors as the kernels' device has them; results on the CPU.
template <typename Function>
Mixer on_device(Function function, bool has_skip = true) {
  return [=](const MixerTensors& x) {
    const auto move = [](const at::Tensor& t) { return t.to(kernel_device()); };
    std::optional<at::Tensor> initial_state, skip;
    if (x.initial_state) initial_state = move(*x.initial_state);
    if (has_skip) skip = move(x.skip);
    const auto [output, state] = function(move(x.query), move(x.key), move(x.value), move(x.log_decay),
                                          move(x.step), skip, x.spans, initial_state, 64);
    return std::tuple(output.cpu(), state.cpu());
  };
}

double tolerance(const std::string& name) {
  return name == "d_log_decay" ? 2e-2 : name == "d_step" ? 1.2e-2 : 5e-3;
}

// The kernels in bfloat16 against composed float64, both from the same values.
void expect_kernels_are_right(const MixerCase& c, const MixerTensors& x, bool has_skip = true,
                              bool from_output = true, bool from_state = true) {
  const auto want =
      evaluate(on_device(&ssd_chunked, has_skip), x, at::kDouble, has_skip, from_output, from_state);
  std::vector<Named> got;
  with_kernels([&] {
    got = evaluate(on_device(&ssd, has_skip), x, at::kBFloat16, has_skip, from_output, from_state);
    std::vector<at::Tensor> values;
    for (const Named& named : got) values.push_back(named.value);
    return values;
  });
  expect_near(got, want, tolerance, c.name());
}

std::vector<MixerCase> cases() {
  std::vector<MixerCase> all;
  for (const int64_t time : {1, 63, 64, 65, 129, 333}) all.push_back({1, time, 2, 2, 2, 64, 64, 64});
  all.push_back({1, 70, 1, 1, 1, 128, 128, 64, Decay::mild, Step::random, Spans::all});
  all.push_back({1, 130, 1, 1, 1, 64, 128, 64});
  all.push_back({1, 130, 1, 1, 1, 128, 64, 64, Decay::none, Step::one, Spans::all, false});
  all.push_back({2, 70, 4, 1, 2, 64, 64, 64});   // Hq > Hv > Hk
  all.push_back({1, 70, 1, 2, 4, 64, 64, 64});   // Hq < Hk < Hv
  all.push_back({1, 270, 2, 1, 1, 64, 64, 64});  // several segments of a state with two readers
  all.push_back(
      {1, 330, 3, 3, 3, 64, 64, 64});  // in the emulator two segments of two pieces, walked both ways at once
  for (const Decay decay : {Decay::none, Decay::strong, Decay::mixed}) {
    all.push_back(
        {1, 200, 1, 1, 1, 64, 64, 64, decay, Step::random, Spans::all, true, decay == Decay::mixed});
  }
  all.push_back({1, 140, 1, 1, 1, 64, 64, 64, Decay::mild, Step::zero, Spans::all});
  all.push_back({2, 140, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::none});
  all.push_back({2, 100, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::scattered});
  all.push_back({1, 80, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::random, false, false, true});
  if (!wants_small_cases()) {
    all.push_back({8, 2048, 16, 16, 16, 128, 128, 64});
    all.push_back({1, 16384, 16, 16, 16, 128, 128, 64, Decay::mixed});
    all.push_back({2, 4097, 16, 1, 16, 128, 64, 64, Decay::mild, Step::random, Spans::all});
    all.push_back({3, 1000, 8, 2, 4, 64, 128, 64});
  }
  return all;
}

TEST(SsdKernels, MatchComposedFloat64) {
  for (const MixerCase& c : cases()) expect_kernels_are_right(c, draw(c, at::kBFloat16, 1, false));
}

#ifdef ORYX_EMULATED
// As on a GPU without wgmma and with less shared memory.
TEST(SsdKernels, WithoutWarpgroupProducts) {
  device::has_warpgroup_products = false;
  device::emulator::largest_shared_memory = 163 * 1024;
  for (const int64_t dim : {64, 128}) {
    const MixerCase c{1, 150, 1, 1, 1, 128, dim, 64};
    expect_kernels_are_right(c, draw(c, at::kBFloat16, 10, false));
  }
  device::has_warpgroup_products = true;
  device::emulator::largest_shared_memory = 227 * 1024;
}
#endif

TEST(SsdKernels, SpansOfWholeChunks) {
  const MixerCase c{2, 384, 1, 1, 1, 64, 64, 64};
  MixerTensors x = draw(c, at::kBFloat16, 2, false);
  x.spans = at::tensor({1, 256, 384, 0, 0, 128}, at::kLong).view({2, 3});  // in any order
  x.query = at::randn({256, 1, 64}, at::kDouble).to(at::kBFloat16).to(at::kDouble) / 8;
  expect_kernels_are_right(c, x);
}

TEST(SsdKernels, OneGradientMayBeMissingAndSkipIsOptional) {
  const MixerCase c{1, 90, 1, 1, 1, 64, 64, 64};
  const MixerTensors x = draw(c, at::kBFloat16, 3, false);
  expect_kernels_are_right(c, x, true, true, false);
  expect_kernels_are_right(c, x, true, false, true);
  expect_kernels_are_right(c, x, false);
}

// A decay so strong that the sum over a chunk takes most of a float's digits.
TEST(SsdKernels, DecayBehindStrongDecay) {
  const MixerCase c{1, 128, 1, 1, 1, 64, 64, 64, Decay::mild, Step::random, Spans::all};
  MixerTensors x = draw(c, at::kBFloat16, 4, false);
  x.log_decay.narrow(1, 3, 1).fill_(-5000);
  x.log_decay.narrow(1, 70, 1).fill_(-30000);
  expect_kernels_are_right(c, x);
}

// Without gradients, whole against pieces with the state handed over; the last pieces are single steps.
TEST(SsdKernels, PiecesWithStateAreTheWhole) {
  const c10::NoGradGuard no_grad;
  const MixerCase c{2, 150, 2, 1, 2, 64, 128, 64, Decay::mild, Step::random, Spans::all};
  const MixerTensors x = draw(c, at::kBFloat16, 5, false);
  const auto [want, want_state] = on_device(&ssd_chunked)(x);
  const auto got = with_kernels([&] {
    MixerTensors y = convert(x, at::kBFloat16);
    std::vector<at::Tensor> outputs;
    const at::Tensor query = y.query.view({c.batch, c.time, c.query_heads, c.key_dim});
    for (int64_t begin = 0; begin < c.time;) {
      const int64_t length = begin == 0 ? 77 : begin == 77 ? 64 : begin == 141 ? 7 : 1;
      MixerTensors piece = y;
      for (at::Tensor* t : {&piece.key, &piece.value, &piece.log_decay, &piece.step})
        *t = t->narrow(1, begin, length);
      piece.query = query.narrow(1, begin, length).reshape({-1, c.query_heads, c.key_dim});
      piece.spans = at::tensor({int64_t{0}, int64_t{0}, length, int64_t{1}, int64_t{0}, length}).view({2, 3});
      const auto [output, state] = on_device(&ssd)(piece);
      outputs.push_back(output.view({c.batch, length, c.output_heads(), c.value_dim}));
      y.initial_state = state;
      begin += length;
    }
    return std::vector{at::cat(outputs, 1).flatten(0, 1), *y.initial_state};
  });
  EXPECT_LE(relative_error(got[0].to(at::kDouble), want), 5e-3);
  EXPECT_LE(relative_error(got[1].to(at::kDouble), want_state), 5e-3);
}

TEST(SsdKernels, StepsInBothTypes) {
  const c10::NoGradGuard no_grad;
  std::vector<MixerCase> all = {
      {3, 1, 2, 2, 2, 64, 64, 64, Decay::mild, Step::random, Spans::all},
      {2, 1, 4, 1, 2, 128, 128, 64, Decay::mild, Step::random, Spans::all},
      {1, 9, 1, 1, 2, 128, 64, 64, Decay::mixed, Step::random, Spans::random, false},
      {2, 15, 2, 2, 2, 64, 128, 64, Decay::mild, Step::random, Spans::random}};
  if (!wants_small_cases())
    all.push_back({256, 1, 16, 16, 16, 128, 128, 64, Decay::mild, Step::random, Spans::all});
  for (const MixerCase& c : all) {
    const MixerTensors x = draw(c, at::kBFloat16, 6, false);
    const auto [want, want_state] = on_device(&ssd_chunked)(x);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      const auto got = with_kernels([&] {
        const auto [output, state] = on_device(&ssd)(convert(x, type));
        return std::vector{output, state};
      });
      EXPECT_LE(relative_error(got[0].to(at::kDouble), want), type == at::kFloat ? 5e-6 : 5e-3) << c.name();
      EXPECT_LE(relative_error(got[1].to(at::kDouble), want_state), 5e-6) << c.name();  // kept in float32
    }
  }
}

TEST(SsdKernels, GoesOnFromRowsOfStates) {
  expect_goes_on_from_rows(
      on_device(&ssd), /*normalised_keys=*/false,
      [](const MixerTensors& x, const at::Tensor& states, const at::Tensor& rows, bool keeps_state) {
        return ssd_inference(x.query, x.key, x.value, x.log_decay, x.step, x.skip, x.spans, states, rows,
                             keeps_state);
      });
}

TEST(SsdKernels, RepeatBitForBit) {
  const MixerCase c = wants_small_cases() ? MixerCase{1, 140, 1, 1, 1, 64, 64, 64}
                                          : MixerCase{1, 1000, 8, 2, 4, 128, 128, 64};
  const MixerTensors x = draw(c, at::kBFloat16, 7, false);
  std::vector<Named> first;
  for (int repeat = 0; repeat < (wants_small_cases() ? 2 : 200); ++repeat) {
    std::vector<Named> got;
    with_kernels([&] {
      got = evaluate(on_device(&ssd), x, at::kBFloat16, true);
      return std::vector<at::Tensor>{};
    });
    if (repeat == 0) first = got;
    for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].value.equal(first[i].value)) << got[i].name;
  }
}

// Keys and values as parts of one projection, with rows at multiples of 16 bytes and elsewhere.
TEST(SsdKernels, StridedRowsAreTheSame) {
  const c10::NoGradGuard no_grad;
  const MixerCase c{2, 70, 2, 2, 2, 64, 64, 64};
  const MixerTensors x = convert(draw(c, at::kBFloat16, 9, false), at::kBFloat16);
  const auto run = [](const MixerTensors& y) {
    return with_kernels([&] {
      const auto [output, state] = on_device(&ssd)(y);
      return std::vector{output, state};
    });
  };
  const auto want = run(x);
  for (const int64_t gap : {0, 4}) {
    MixerTensors y = x;
    const at::Tensor between = x.key.narrow(3, 0, gap);
    const at::Tensor both =
        at::cat({between, x.key, x.value}, 3).transpose(1, 2).contiguous().transpose(1, 2);
    y.key = both.narrow(3, gap, c.key_dim);
    y.value = both.narrow(3, gap + c.key_dim, c.value_dim);
    y.query = at::cat({x.query, x.query}, 2).narrow(2, 0, c.key_dim);
    const auto got = run(y);
    for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].equal(want[i])) << "gap " << gap;
  }
}

// What no kernel serves takes the composed form.
TEST(SsdKernels, OtherShapesAndTypesAreComposed) {
  const MixerCase c{1, 40, 2, 2, 2, 16, 24, 64};
  expect_kernels_are_right(c, draw(c, at::kBFloat16, 8, false));
}

}  // namespace
}  // namespace oryx::operators::testing
