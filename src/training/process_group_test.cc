// Ranks as threads of one process: two or three over Gloo, and where there is a GPU one over NCCL.
#include "training/process_group.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "base/error.h"
#include "training/gradient_exchange.h"
#include "training/optimizer.h"
#include "training/ranks_testing.h"
#include "training/sharding.h"

namespace oryx::training {
namespace {

struct Setting {
  c10::Device device;
  int64_t ranks;
};

class RanksTest : public testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (GetParam().device.is_cuda() && !at::hasCUDA()) GTEST_SKIP() << "no GPU here";
  }
  void run(const std::function<void(ProcessGroup&)>& body) {
    testing_with_ranks(GetParam().ranks, GetParam().device, body);
  }
  at::TensorOptions options() const { return at::TensorOptions(GetParam().device).dtype(at::kDouble); }
};

TEST_P(RanksTest, Exchange) {
  const int64_t ranks = GetParam().ranks;
  run([&](ProcessGroup& group) {
    const double mine = static_cast<double>(group.rank() + 1);
    const at::Tensor sum = at::full({7}, mine, options());
    group.all_reduce(sum).finish();
    EXPECT_TRUE(sum.cpu().equal(at::full({7}, 0.5 * static_cast<double>(ranks * (ranks + 1)), at::kDouble)));

    const at::Tensor whole = at::arange(4 * ranks, options()), part = at::empty({4}, options());
    group.reduce_scatter(whole, part).finish();
    EXPECT_TRUE(part.equal(whole.narrow(0, 4 * group.rank(), 4) * static_cast<double>(ranks)));

    const at::Tensor all = at::empty({4 * ranks}, options());
    group.all_gather(part, all).finish();
    EXPECT_TRUE(all.equal(whole * static_cast<double>(ranks)));

    const at::Tensor from_last = at::full({3}, mine, options());
    group.broadcast(from_last, ranks - 1).finish();
    EXPECT_EQ(from_last.cpu().select(0, 0).item<double>(), static_cast<double>(ranks));

    EXPECT_EQ(group.share("word", group.leads() ? "oryx" : "kudu"), "oryx");
  });
}

// Parameters of several buckets under a loss that differs by rank and leaves some out.
class Problem {
 public:
  explicit Problem(const at::TensorOptions& options) {
    const std::vector<std::vector<int64_t>> shapes = {{5, 7}, {3}, {64, 3}, {1}, {40}, {9, 9}, {130}};
    for (size_t i = 0; i < shapes.size(); ++i) {
      const int64_t count = c10::multiply_integers(shapes[i]);
      const at::Tensor values = at::sin(at::arange(count, options) + static_cast<double>(i));
      weights.add(fmt::format("weight{}", i), values.view(shapes[i]).clone());
    }
  }
  std::vector<at::Tensor> parameters() {
    std::vector<at::Tensor> all;
    for (auto& [name, tensor] : weights.entries()) all.push_back(tensor.set_requires_grad(true));
    return all;
  }
  std::vector<model::ParameterSpec> specs() const {
    std::vector<model::ParameterSpec> all;
    for (const auto& [name, tensor] : weights.entries()) {
      all.push_back({name, tensor.sizes().vec(), model::Initialisation::zeros, tensor.dim() > 1, ""});
    }
    return all;
  }
  // Most parameters get a bucket of their own.
  std::vector<Bucket> buckets(int64_t ranks) const { return make_buckets(specs(), 128, ranks); }
  // Rank r alone does not use parameter r; nobody uses parameter 3.
  at::Tensor loss(int64_t rank, int64_t pass) {
    at::Tensor sum = at::zeros({}, weights.entries()[0].second.detach().options());
    for (size_t i = 0; i < weights.entries().size(); ++i) {
      if (i == 3 || static_cast<int64_t>(i) == rank) continue;
      sum = sum + (weights.entries()[i].second.pow(2) * static_cast<double>(rank + 2 * pass + 1)).sum();
    }
    return sum;
  }
  model::Weights weights;
};

constexpr int64_t kPasses = 2;

// What one rank on its own would have.
std::vector<at::Tensor> gradients_of_all(Problem& problem, int64_t ranks) {
  const std::vector<at::Tensor> parameters = problem.parameters();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (int64_t pass = 0; pass < kPasses; ++pass) problem.loss(rank, pass).backward();
  }
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters) {
    gradients.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter.detach()));
  }
  return gradients;
}

TEST_P(RanksTest, GradientsAreSummed) {
  const int64_t ranks = GetParam().ranks;
  Problem alone(options());
  const std::vector<at::Tensor> expected = gradients_of_all(alone, ranks);
  run([&](ProcessGroup& group) {
    Problem problem(options());
    GradientExchange exchange(problem.parameters(), problem.buckets(ranks), group, /*shard=*/false);
    EXPECT_GT(exchange.buckets().size(), 3u);
    size_t early = 0;
    while (exchange.buckets()[early].entries.back().parameter > 3) ++early;
    EXPECT_GT(early, 1u);
    for (int64_t step = 0; step < 2; ++step) {
      for (int64_t pass = 0; pass < kPasses; ++pass) {
        if (pass + 1 == kPasses) exchange.expect_last_pass();
        problem.loss(group.rank(), pass).backward();
      }
      exchange.finish();
      // Nobody has a gradient of parameter 3, which holds up its bucket and those behind it; rank 0 uses 4
      // to 6.
      EXPECT_EQ(exchange.sent_early(), group.leads() ? early : exchange.sent_early());
      const std::vector<at::Tensor> gradients = exchange.gradients();
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(gradients[i].allclose(expected[i], 1e-14, 1e-14)) << "parameter " << i;
      }
      exchange.clear();
    }
  });
}

TEST_P(RanksTest, AnOptimizerInPartsIsTheWhole) {
  const int64_t ranks = GetParam().ranks;
  Problem alone(options());
  Optimizer whole(alone.weights, {});
  std::vector<double> norms;
  for (int64_t step = 0; step < 3; ++step) {
    gradients_of_all(alone, ranks);
    norms.push_back(whole.clip_and_update(step, 0.01, 1.0).item<double>());
    whole.clear_gradients();
  }
  formats::NamedTensors stored;
  run([&](ProcessGroup& group) {
    Problem problem(options());
    GradientExchange exchange(problem.parameters(), problem.buckets(ranks), group, /*shard=*/true);
    const auto make_optimizer = [&] {
      const std::vector<at::Tensor> masters =
          take_masters(problem.weights, problem.specs(), at::kDouble, exchange.pieces());
      return std::make_unique<Optimizer>(problem.weights, AdamwRates{}, exchange.pieces(), masters);
    };
    auto optimizer = make_optimizer();
    for (int64_t step = 0; step < 3; ++step) {
      for (int64_t pass = 0; pass < kPasses; ++pass) {
        if (pass + 1 == kPasses) exchange.expect_last_pass();
        problem.loss(group.rank(), pass).backward();
      }
      exchange.finish();
      const at::Tensor norm = optimizer->clip_and_update(step, 0.01, 1.0, exchange.gradients(), group);
      EXPECT_NEAR(norm.item<double>(), norms[step], 1e-12 * norms[step]);
      exchange.clear();
      share_weights(problem.weights, *optimizer, exchange.buckets(), group);
      if (step == 1) {  // stored and brought back: as if nothing had been
        const formats::NamedTensors moments =
            gather_moments(*optimizer, problem.weights, exchange.buckets(), group);
        EXPECT_EQ(moments.empty(), !group.leads());
        optimizer = make_optimizer();
        scatter_moments(moments, *optimizer, problem.weights, exchange.buckets(), group);
      }
    }
    for (size_t i = 0; i < alone.weights.entries().size(); ++i) {
      const at::Tensor ours = problem.weights.entries()[i].second.detach();
      EXPECT_TRUE(ours.allclose(alone.weights.entries()[i].second.detach(), 1e-12, 1e-12)) << i;
    }
    const formats::NamedTensors moments =
        gather_moments(*optimizer, problem.weights, exchange.buckets(), group);
    if (group.leads()) stored = moments;
  });
  const auto expected = whole.moments();
  ASSERT_EQ(stored.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(stored[i].first, expected[i].first);
    EXPECT_TRUE(stored[i].second.allclose(expected[i].second.cpu(), 1e-12, 1e-14)) << stored[i].first;
  }
}

// Weights that are rounded for the products, their originals in parts.
TEST_P(RanksTest, MastersInParts) {
  const int64_t ranks = GetParam().ranks;
  run([&](ProcessGroup& group) {
    Problem problem(options().dtype(at::kFloat)), whole(options().dtype(at::kFloat));
    const std::vector<Bucket> buckets = problem.buckets(ranks);
    const std::vector<Piece> pieces = pieces_of(buckets, group.rank(), ranks);
    const std::vector<at::Tensor> masters =
        take_masters(problem.weights, problem.specs(), at::kBFloat16, pieces);
    const Optimizer optimizer(problem.weights, {}, pieces, masters);
    const at::NoGradGuard no_grad;
    for (const at::Tensor& master : masters) master.mul_(3.14159);
    share_weights(problem.weights, optimizer, buckets, group);
    const model::Weights gathered = gather_masters(optimizer, problem.weights, buckets, group);
    EXPECT_EQ(gathered.entries().size(), group.leads() ? whole.weights.entries().size() : 0);
    for (size_t i = 0; i < whole.weights.entries().size(); ++i) {
      const at::Tensor expected = whole.weights.entries()[i].second * 3.14159;
      const at::Tensor& ours = problem.weights.entries()[i].second;
      EXPECT_EQ(ours.scalar_type(), expected.dim() > 1 ? at::kBFloat16 : at::kFloat);
      EXPECT_TRUE(ours.equal(expected.to(ours.scalar_type()))) << i;
      EXPECT_TRUE(!group.leads() || gathered.entries()[i].second.equal(expected.cpu())) << i;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Gloo, RanksTest,
                         testing::Values(Setting{c10::kCPU, 1}, Setting{c10::kCPU, 2},
                                         Setting{c10::kCPU, 3}));
INSTANTIATE_TEST_SUITE_P(Nccl, RanksTest, testing::Values(Setting{c10::Device(c10::kCUDA, 0), 1}));

TEST(ProcessGroup, SaysThatNobodyListens) {
  Launch launch;
  launch.rank = 1;
  launch.size = 2;
  launch.address = "127.0.0.1";
  launch.port = testing_free_port();
  try {
    ProcessGroup group(launch, std::chrono::seconds(1));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(fmt::format("127.0.0.1:{}", launch.port)), std::string::npos);
  }
}

}  // namespace
}  // namespace oryx::training
