// Randomness as pure functions: a draw is named by (seed, stream, counter) and needs no stored state, so
// a resumed or re-ordered computation sees the same numbers as an uninterrupted one.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace oryx {

// The block cipher itself: ten rounds over a counter of four words under a key of two.
constexpr std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// 64 uniform bits. Different seeds, streams and counters give independent draws; chain it to key a draw
// by more than three numbers: random_u64(random_u64(seed, kPurpose, step), 0, sequence).
constexpr uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t counter) {
  const auto words = philox4x32({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                                 static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)},
                                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return words[0] | uint64_t{words[1]} << 32;
}

// Uniform in [0, 1): a multiple of 2^-53.
constexpr double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
  return static_cast<double>(random_u64(seed, stream, counter) >> 11) * 0x1p-53;
}

// Where `index` lands in the permutation of 0 … size-1 named by (seed, pass); 0 <= index < size.
// A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside
// (fewer than four steps on average): a bijection for every size, without a table.
constexpr uint64_t permutation_at(uint64_t seed, uint64_t pass, uint64_t index, uint64_t size) {
  if (size < 2) return 0;
  constexpr int kRounds = 8;
  const int half = (std::bit_width(size - 1) + 1) / 2;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  const uint64_t key = random_u64(seed, 0x7065726D75746174, pass);  // "permutat": apart from other streams
  do {
    uint64_t left = index >> half, right = index & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (random_u64(key, round, right) & mask);
      left = right;
      right = next;
    }
    index = left << half | right;
  } while (index >= size);
  return index;
}

}  // namespace oryx
