#include "operators/attention/attention_plan.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "operators/device/span_table.h"

namespace oryx::operators {

namespace {

using cuda::DecodeRow;
using cuda::DecodeSplit;
using cuda::KeyBlock;
using cuda::QueryItem;
using cuda::TileGroup;

struct Row {
  int32_t sequence, position;
};

std::vector<Row> rows_of(const at::Tensor& spans) {
  std::vector<Row> rows;
  const auto span = spans.accessor<int64_t, 2>();
  for (int64_t i = 0; i < span.size(0); ++i) {
    for (int64_t t = span[i][1]; t < span[i][2]; ++t)
      rows.push_back({static_cast<int32_t>(span[i][0]), static_cast<int32_t>(t)});
  }
  return rows;
}

// Runs of rows of one sequence whose positions do not fall, cut after every `most` rows.
std::vector<QueryItem> items_of(const std::vector<Row>& rows, int32_t most) {
  std::vector<QueryItem> items;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto [sequence, position] = rows[i];
    if (items.empty() || items.back().sequence != sequence || items.back().last > position ||
        items.back().rows == most) {
      items.push_back({sequence, static_cast<int32_t>(i), 0, position, position});
    }
    ++items.back().rows;
    items.back().last = position;
  }
  return items;
}

template <typename Entry>
DeviceTable<Entry> table_of(const std::vector<Entry>& entries, at::Device device) {
  static_assert(sizeof(Entry) % sizeof(int32_t) == 0);
  const auto* numbers = reinterpret_cast<const int32_t*>(entries.data());
  return {to_device({numbers, numbers + entries.size() * (sizeof(Entry) / sizeof(int32_t))}, device),
          static_cast<int64_t>(entries.size())};
}

AttentionPlan make_plan(const at::Tensor& spans, int64_t batch, at::Device device) {
  const std::vector<Row> rows = rows_of(spans);
  AttentionPlan plan;
  plan.rows = static_cast<int64_t>(rows.size());
  std::vector<int64_t> count(batch), end(batch);
  std::vector<int32_t> positions, tokens;
  for (const auto [sequence, position] : rows) {
    positions.push_back(position);
    plan.pairs += position + 1;
    ++count[sequence];
    end[sequence] = std::max<int64_t>(end[sequence], position + 1);
  }
  plan.positions = to_device(positions, device);

  const auto sorted = [](std::vector<QueryItem> items) {
    std::stable_sort(items.begin(), items.end(),
                     [](const auto& a, const auto& b) { return a.last > b.last; });
    return items;
  };
  const auto long_ones = [&](const std::vector<QueryItem>& items) {
    std::vector<QueryItem> result;
    std::copy_if(items.begin(), items.end(), std::back_inserter(result),
                 [&](const QueryItem& item) { return count[item.sequence] > 1; });
    return result;
  };
  const std::vector<QueryItem> items = sorted(items_of(rows, cuda::kItemRows)), long_items = long_ones(items);
  plan.items = table_of(items, device);
  plan.long_items = long_items.size() == items.size() ? plan.items : table_of(long_items, device);
  plan.wide_items = table_of(long_ones(sorted(items_of(rows, cuda::kWideItemRows))), device);

  std::vector<DecodeRow> alone;
  std::vector<DecodeSplit> splits;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (count[rows[i].sequence] > 1) continue;
    const int32_t row = static_cast<int32_t>(i), keys = rows[i].position + 1;
    alone.push_back({row, static_cast<int32_t>(splits.size()), 0});
    int32_t size = cuda::kFewestKeys;
    while (int64_t{size} * cuda::kMostSplits < keys) size *= 2;
    for (int32_t begin = 0; begin < keys; begin += size, ++alone.back().splits)
      splits.push_back({rows[i].sequence, row, begin, std::min(begin + size, keys)});
  }
  plan.alone = table_of(alone, device), plan.splits = table_of(splits, device);

  plan.end = batch > 0 ? *std::max_element(end.begin(), end.end()) : 0;
  std::vector<char> taken(static_cast<size_t>(batch * plan.end));
  plan.covers_all =
      plan.rows > 0 && std::all_of(end.begin(), end.end(), [&](int64_t e) { return e == plan.end; });
  plan.is_whole = plan.covers_all && plan.rows == batch * plan.end;
  for (const auto [sequence, position] : rows) {
    const int64_t token = sequence * plan.end + position;
    if (taken[token]) plan.covers_all = plan.is_whole = false;
    taken[token] = 1;
    plan.is_whole &= token == static_cast<int64_t>(tokens.size());
    tokens.push_back(static_cast<int32_t>(token));
  }
  if (plan.covers_all && !plan.is_whole) plan.tokens = to_device(tokens, device);
  return plan;
}

KeyPlan make_key_plan(const at::Tensor& spans, int64_t batch, int64_t capacity, at::Device device) {
  // By sequence, then by the last position: the tiles that see a key are the last ones of its sequence.
  const std::vector<Row> rows = rows_of(spans);
  std::vector<QueryItem> tiles = items_of(rows, cuda::kTileRows);
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) {
    return a.sequence != b.sequence ? a.sequence < b.sequence : a.last < b.last;
  });
  std::vector<int32_t> positions(tiles.size() * cuda::kTileRows);
  for (size_t i = 0; i < tiles.size(); ++i) {
    for (int row = 0; row < tiles[i].rows; ++row)
      positions[i * cuda::kTileRows + cuda::tile_place(row)] = rows[tiles[i].row + row].position;
  }
  std::vector<KeyBlock> blocks;
  auto first = tiles.begin();
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    const auto past = std::find_if(first, tiles.end(), [&](const auto& t) { return t.sequence != sequence; });
    const int32_t end = past == first ? 0 : std::prev(past)->last + 1;
    for (int64_t begin = 0; begin < capacity; begin += cuda::kBlockKeys) {
      while (first != past && first->last < begin) ++first;
      blocks.push_back({static_cast<int32_t>(sequence), static_cast<int32_t>(begin), end,
                        static_cast<int32_t>(first - tiles.begin()), static_cast<int32_t>(past - first)});
    }
    first = past;
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const auto& a, const auto& b) { return a.tiles > b.tiles; });
  std::vector<int32_t> tile_images;
  std::vector<TileGroup> groups;
  int64_t images = 0;
  for (int taken = 0; const QueryItem& tile : tiles) {
    if (groups.empty() || taken == cuda::kGroupTiles || groups.back().sequence != tile.sequence) {
      groups.push_back({tile.sequence, 0, {}});
      taken = 0;
    }
    groups.back().last = tile.last;
    groups.back().tiles[taken++] = {tile.row, tile.rows, tile.last, static_cast<int32_t>(images)};
    tile_images.push_back(static_cast<int32_t>(images));
    images += tile.last / cuda::kBlockKeys + 1;
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const auto& a, const auto& b) { return a.last > b.last; });
  return {table_of(tiles, device),
          table_of(positions, device),
          table_of(blocks, device),
          table_of(tile_images, device),
          images,
          table_of(groups, device)};
}

}  // namespace

std::shared_ptr<const AttentionPlan> attention_plan(const at::Tensor& spans, int64_t batch, int64_t capacity,
                                                    at::Device device) {
  static SpanCache<AttentionPlan> cache;
  return cache.get(spans, batch, capacity, device, [&] { return make_plan(spans, batch, device); });
}

std::shared_ptr<const KeyPlan> key_plan(const at::Tensor& spans, int64_t batch, int64_t capacity,
                                        at::Device device) {
  static SpanCache<KeyPlan> cache;
  return cache.get(spans, batch, capacity, device,
                   [&] { return make_key_plan(spans, batch, capacity, device); });
}

}  // namespace oryx::operators
