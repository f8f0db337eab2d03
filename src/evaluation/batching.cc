#include "evaluation/batching.h"

#include <algorithm>
#include <numeric>

namespace oryx::evaluation {

namespace {

// Prefixes within this many tokens of each other count as equal when items are sorted.
constexpr int64_t kPrefixStep = 8;

// What a batch would hold, and what it would cost.
struct Load {
  int64_t items = 0, rows = 0, shared = 0, longest = 0;

  Load joined(const Load& other) const {
    return {items + other.items, rows + other.rows, std::min(shared, other.shared),
            std::max(longest, other.longest)};
  }
  int64_t cost_whole(int64_t pass_cost) const { return rows * longest + pass_cost; }
  int64_t cost_shared(int64_t pass_cost) const {
    return items * shared + rows * (longest - shared) + 2 * pass_cost;
  }
  bool is_worth_sharing(int64_t pass_cost) const {
    return shared > 0 && cost_shared(pass_cost) < cost_whole(pass_cost);
  }
  int64_t cost(int64_t pass_cost) const {
    return is_worth_sharing(pass_cost) ? cost_shared(pass_cost) : cost_whole(pass_cost);
  }
};

Load load_of(const Item& item, bool share_prefixes) {
  Load load{1, static_cast<int64_t>(item.size()), 0, 0};
  if (share_prefixes && item.size() > 1) load.shared = shared_prefix(item);
  for (const Sequence& sequence : item) {
    load.longest = std::max(load.longest, static_cast<int64_t>(sequence.tokens.size()) - 1);
  }
  return load;
}

// Whether a comes before b for all that tells their tokens apart.
bool precedes(const Item& a, const Item& b) {
  return std::lexicographical_compare(
      a.begin(), a.end(), b.begin(), b.end(),
      [](const Sequence& left, const Sequence& right) { return left.tokens < right.tokens; });
}

// The end of the tokens on which two schedules agree.
int64_t agreement(const schedule::ModeSpans& a, const schedule::ModeSpans& b, int64_t limit) {
  int64_t end = 0;
  for (auto left = a.begin(), right = b.begin(); left != a.end() && right != b.end();) {
    if (left->mode != right->mode) break;
    end = std::min(left->end, right->end);
    if (left->end == end) ++left;
    if (right->end == end) ++right;
  }
  return std::min(end, limit);
}

}  // namespace

int64_t shared_prefix(const Item& item) {
  const Sequence& reference = item.front();
  int64_t shared = reference.first - 1;
  for (const Sequence& sequence : item) {
    shared = agreement(reference.modes, sequence.modes, std::min(shared, sequence.first - 1));
    const auto end = std::mismatch(reference.tokens.begin(), reference.tokens.begin() + shared,
                                   sequence.tokens.begin(), sequence.tokens.end());
    shared = end.first - reference.tokens.begin();
  }
  return shared;
}

std::vector<Batch> plan_batches(const std::vector<Item>& items, int64_t batch_tokens, int64_t pass_cost,
                                bool share_prefixes) {
  std::vector<Load> loads;
  for (const Item& item : items) loads.push_back(load_of(item, share_prefixes));
  std::vector<size_t> order(items.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // The longest first: what does not fit in memory fails at once.
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const int64_t step_a = loads[a].shared / kPrefixStep, step_b = loads[b].shared / kPrefixStep;
    if (step_a != step_b) return step_a > step_b;
    if (loads[a].longest != loads[b].longest) return loads[a].longest > loads[b].longest;
    return precedes(items[a], items[b]);
  });

  // The cheapest way to cut that order into batches, from the cheapest ways to cut its beginnings.
  struct Cut {
    int64_t cost = 0;
    size_t begin = 0;  // of the last batch
    Load load;         // of the last batch
  };
  std::vector<Cut> cuts(order.size() + 1);
  for (size_t end = 1; end <= order.size(); ++end) {
    Load load;
    for (size_t begin = end; begin-- > 0;) {
      load = begin + 1 == end ? loads[order[begin]] : load.joined(loads[order[begin]]);
      if (begin + 1 < end && load.rows * load.longest > batch_tokens) break;
      const int64_t cost = cuts[begin].cost + load.cost(pass_cost);
      if (begin + 1 == end || cost < cuts[end].cost) cuts[end] = {cost, begin, load};
    }
  }
  std::vector<Batch> batches;
  for (size_t end = order.size(); end > 0; end = cuts[end].begin) {
    const auto& [cost, begin, load] = cuts[end];
    batches.push_back({{order.begin() + static_cast<std::ptrdiff_t>(begin),
                        order.begin() + static_cast<std::ptrdiff_t>(end)},
                       load.is_worth_sharing(pass_cost) ? load.shared : 0});
  }
  std::reverse(batches.begin(), batches.end());
  return batches;
}

}  // namespace oryx::evaluation
