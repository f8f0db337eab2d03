#include "base/random.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <vector>

namespace oryx {
namespace {

// The known answers that Random123 ships (kat_vectors, philox4x32 10).
TEST(Random, PhiloxKnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox4x32({ones, ones, ones, ones}, {ones, ones}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, EveryArgumentMatters) {
  const uint64_t base = random_u64(1, 2, 3);
  for (int bit = 0; bit < 64; ++bit) {
    const uint64_t flip = uint64_t{1} << bit;
    EXPECT_NE(base, random_u64(1 ^ flip, 2, 3));
    EXPECT_NE(base, random_u64(1, 2 ^ flip, 3));
    EXPECT_NE(base, random_u64(1, 2, 3 ^ flip));
  }
}

TEST(Random, UniformFillsTheUnitInterval) {
  constexpr int kDraws = 100000, kBins = 20;
  std::vector<int> bins(kBins);
  for (int i = 0; i < kDraws; ++i) {
    const double u = random_uniform(9, 0, i);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++bins[static_cast<int>(u * kBins)];
  }
  double chi_squared = 0;
  for (int count : bins)
    chi_squared += (count - kDraws / kBins) * (count - kDraws / kBins) / double{kDraws / kBins};
  EXPECT_LT(chi_squared, 43.8);  // the 0.1 % point for 19 degrees of freedom
}

void expect_bijection(uint64_t seed, uint64_t pass, uint64_t size) {
  std::vector<bool> seen(size);
  for (uint64_t i = 0; i < size; ++i) {
    const uint64_t at = permutation_at(seed, pass, i, size);
    RC_ASSERT(at < size);
    RC_ASSERT(!seen[at]);
    seen[at] = true;
  }
}

TEST(Permutation, IsABijectionForEverySize) {
  EXPECT_TRUE(rc::check([] {
    const auto seed = *rc::gen::arbitrary<uint64_t>();
    const auto pass = *rc::gen::arbitrary<uint64_t>();
    for (uint64_t size = 1; size < 70; ++size) expect_bijection(seed, pass, size);
    expect_bijection(seed, pass, *rc::gen::inRange<uint64_t>(70, 2000));
  }));
  for (uint64_t size : {uint64_t{1} << 40, ~uint64_t{0}})
    EXPECT_LT(permutation_at(1, 2, size - 1, size), size);
}

TEST(Permutation, OrdersOfThreeAreEquallyLikely) {
  std::map<std::vector<uint64_t>, int> counts;
  for (uint64_t pass = 0; pass < 6000; ++pass) {
    ++counts[{permutation_at(5, pass, 0, 3), permutation_at(5, pass, 1, 3), permutation_at(5, pass, 2, 3)}];
  }
  ASSERT_EQ(counts.size(), 6u);
  for (const auto& [order, count] : counts) EXPECT_NEAR(count, 1000, 150);
}

TEST(Permutation, ScattersNeighboursDifferentlyEachPass) {
  constexpr uint64_t kSize = 10007;
  double distance = 0;
  int same = 0;
  for (uint64_t i = 0; i + 1 < kSize; ++i) {
    const double a = permutation_at(1, 0, i, kSize), b = permutation_at(1, 0, i + 1, kSize);
    distance += std::abs(a - b);
    same += permutation_at(1, 0, i, kSize) == permutation_at(1, 1, i, kSize);
  }
  EXPECT_NEAR(distance / kSize, kSize / 3.0, kSize * 0.01);  // the mean gap of two uniform draws
  EXPECT_LT(same, 10);
}

}  // namespace
}  // namespace oryx
