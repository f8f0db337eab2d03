#include "evaluation/batching.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "evaluation/for_items.h"

namespace oryx::evaluation {

namespace {

int64_t read_tokens(const Sequence& sequence) { return static_cast<int64_t>(sequence.tokens.size()) - 1; }

int64_t longest(const Item& item) {
  int64_t tokens = 0;
  for (const Sequence& sequence : item) tokens = std::max(tokens, read_tokens(sequence));
  return tokens;
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

// Where to cut lengths that descend, so that the sum over the pieces of size · longest + pass_cost is least:
// the pieces' ends. `most`: how many a piece that begins with some length may hold, at least one.
template <class Most>
std::vector<size_t> cheapest_ends(const std::vector<int64_t>& lengths, int64_t pass_cost, Most most) {
  // Only the first of equal lengths is a place to cut.
  std::vector<size_t> starts;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (i == 0 || lengths[i] != lengths[i - 1]) starts.push_back(i);
  }
  starts.push_back(lengths.size());
  struct Best {
    int64_t cost = 0;
    size_t begin = 0;
  };
  std::vector<Best> best(starts.size());
  for (size_t end = 1; end < starts.size(); ++end) {
    best[end].cost = std::numeric_limits<int64_t>::max();
    for (size_t begin = end; begin-- > 0;) {
      const auto count = static_cast<int64_t>(starts[end] - starts[begin]);
      const int64_t length = lengths[starts[begin]], limit = most(length);
      const int64_t cost = best[begin].cost + count * length + (count + limit - 1) / limit * pass_cost;
      if (cost < best[end].cost) best[end] = {cost, begin};
    }
  }
  std::vector<size_t> ends;
  for (size_t end = starts.size() - 1; end > 0; end = best[end].begin) {
    const size_t first = starts[best[end].begin], count = starts[end] - first;
    const auto limit = static_cast<size_t>(most(lengths[first]));
    // Parts of equal size where they are more than one pass may hold.
    const size_t parts = (count + limit - 1) / limit;
    for (size_t part = parts; part > 0; --part) ends.push_back(first + count * part / parts);
  }
  std::reverse(ends.begin(), ends.end());
  return ends;
}

// The pieces of `elements` with these ends.
template <class Element>
std::vector<std::vector<Element>> pieces(const std::vector<Element>& elements,
                                         const std::vector<size_t>& ends) {
  std::vector<std::vector<Element>> result;
  size_t begin = 0;
  for (const size_t end : ends) {
    result.emplace_back(elements.begin() + static_cast<std::ptrdiff_t>(begin),
                        elements.begin() + static_cast<std::ptrdiff_t>(end));
    begin = end;
  }
  return result;
}

class Planner {
 public:
  Planner(const std::vector<Item>& items, const BatchOptions& options, bool shares)
      : items_(items), options_(options), shared_(items.size()), longest_(items.size()) {
    for_items(items.size(), [&](size_t i) {
      longest_[i] = longest(items[i]);
      if (shares && items[i].size() > 1) shared_[i] = shared_prefix(items[i]);
    });
  }

  std::vector<Batch> plan() const {
    std::vector<size_t> order(items_.size());
    std::iota(order.begin(), order.end(), size_t{0});
    // The longest first: what does not fit in memory fails at once.
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      if (shared_[a] != shared_[b]) return shared_[a] > shared_[b];
      if (longest_[a] != longest_[b]) return longest_[a] > longest_[b];
      return precedes(items_[a], items_[b]);
    });
    // Those that share nothing are one batch: its passes are cut by length anyway.
    const auto alone = std::find_if(order.begin(), order.end(), [&](size_t i) { return shared_[i] == 0; });
    const std::vector<size_t> sharing(order.begin(), alone), others(alone, order.end());
    std::vector<int64_t> lengths;
    for (const size_t item : sharing) lengths.push_back(shared_[item]);
    // A batch of its own costs a pass, and leaves fewer sequences to choose from for the passes of the rest.
    const std::vector<size_t> ends = cheapest_ends(lengths, 8 * options_.pass_cost, [&](int64_t length) {
      return std::max<int64_t>(1, options_.batch_tokens / length);
    });
    std::vector<Batch> batches;
    for (std::vector<size_t>& members : pieces(sharing, ends))
      batches.push_back(batch_of(std::move(members)));
    if (!others.empty()) batches.push_back(batch_of(others));
    return batches;
  }

 private:
  Batch batch_of(std::vector<size_t> members) const {
    Batch batch;
    batch.items = std::move(members);
    std::vector<std::pair<int64_t, Row>> rests;
    for (size_t i = 0; i < batch.items.size(); ++i) {
      const Item& item = items_[batch.items[i]];
      batch.shared.push_back(shared_[batch.items[i]]);
      for (size_t s = 0; s < item.size(); ++s) {
        rests.push_back({read_tokens(item[s]) - batch.shared[i], {i, s}});
      }
    }
    std::stable_sort(rests.begin(), rests.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<int64_t> lengths;
    std::vector<Row> rows;
    for (const auto& [length, row] : rests) {
      lengths.push_back(length);
      rows.push_back(row);
    }
    const int64_t before = batch.shared.front();  // the most
    batch.passes = pieces(rows, cheapest_ends(lengths, options_.pass_cost, [&](int64_t length) {
                            return std::max<int64_t>(1, options_.batch_tokens / (before + length));
                          }));
    // Sequences that go on from one state side by side, so that they may find it in a cache.
    for (std::vector<Row>& pass : batch.passes) {
      std::stable_sort(pass.begin(), pass.end(), [](const Row& a, const Row& b) { return a.item < b.item; });
    }
    return batch;
  }

  const std::vector<Item>& items_;
  const BatchOptions& options_;
  std::vector<int64_t> shared_, longest_;  // of each item
};

int64_t cost(const std::vector<Batch>& batches, const std::vector<Item>& items, int64_t pass_cost) {
  int64_t total = 0;
  for (const Batch& batch : batches) {
    const auto passes = static_cast<int64_t>(batch.passes.size()) + (batch.shares() ? 1 : 0);
    total += computed_tokens(batch, items) + passes * pass_cost;
  }
  return total;
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

std::vector<Batch> plan_batches(const std::vector<Item>& items, const BatchOptions& options) {
  const auto whole = [&] { return Planner(items, options, /*shares=*/false).plan(); };
  if (!options.share_prefixes) return whole();
  std::vector<Batch> shared = Planner(items, options, /*shares=*/true).plan();
  const int64_t cost_shared = cost(shared, items, options.pass_cost);
  int64_t least = options.pass_cost;  // that whole sequences may cost
  for (const Item& item : items) {
    for (const Sequence& sequence : item) least += read_tokens(sequence);
  }
  if (cost_shared <= least) return shared;
  std::vector<Batch> separate = whole();
  return cost_shared < cost(separate, items, options.pass_cost) ? shared : separate;
}

int64_t computed_tokens(const Batch& batch, const std::vector<Item>& items) {
  int64_t tokens = batch.shared.front() * static_cast<int64_t>(batch.items.size());
  for (const std::vector<Row>& pass : batch.passes) {
    int64_t length = 0;
    for (const Row& row : pass) {
      length =
          std::max(length, read_tokens(items[batch.items[row.item]][row.sequence]) - batch.shared[row.item]);
    }
    tokens += length * static_cast<int64_t>(pass.size());
  }
  return tokens;
}

}  // namespace oryx::evaluation
