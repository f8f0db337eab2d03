// Who computes which rows on a GPU: the spans of an attention call as tables on the device, made once per
// spans tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "operators/attention/attention_kernels.h"

namespace oryx::operators {

// A table of structs of int32_t on the device.
template <typename Entry>
struct DeviceTable {
  at::Tensor storage;
  int64_t count = 0;

  const Entry* data() const { return static_cast<const Entry*>(storage.const_data_ptr()); }
};

struct AttentionPlan {
  int64_t rows = 0;
  at::Tensor positions;                     // int32 [rows]
  DeviceTable<cuda::QueryItem> items;       // every row; the longest first
  DeviceTable<cuda::QueryItem> long_items;  // less the rows that are alone in their sequence: decoding
  DeviceTable<cuda::QueryItem> wide_items;  // the rows of long_items in items of kWideItemRows
  DeviceTable<cuda::DecodeRow> alone;       // those
  DeviceTable<cuda::DecodeSplit> splits;    // and their keys

  double pairs = 0;         // Σ (position + 1) over the rows
  int64_t end = 0;          // the largest end of a sequence
  bool covers_all = false;  // every sequence uses `end` positions, and no token has two rows
  bool is_whole = false;    // the rows are all tokens below `end` of every sequence, in order
  at::Tensor tokens;        // int32 [rows]: sequence · end + position
};

std::shared_ptr<const AttentionPlan> attention_plan(const at::Tensor& spans, int64_t batch, int64_t capacity,
                                                    at::Device device);

// What backward reads.
struct KeyPlan {
  DeviceTable<cuda::QueryItem> tiles;
  DeviceTable<int32_t> tile_positions;  // of each tile's rows, by tile_place()
  DeviceTable<cuda::KeyBlock> blocks;
  DeviceTable<int32_t> tile_images;  // of each tile, the number of its first image of dS
  int64_t images = 0;                // of a head
  DeviceTable<cuda::TileGroup> groups;
};

std::shared_ptr<const KeyPlan> key_plan(const at::Tensor& spans, int64_t batch, int64_t capacity,
                                        at::Device device);

}  // namespace oryx::operators
