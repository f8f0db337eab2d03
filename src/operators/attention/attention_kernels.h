// The CUDA kernels of attention: bfloat16 rows of 64 or 128, and decoding in bfloat16 or float32. Definitions
// in attention_forward_kernels.cu, attention_backward*_kernels.cu and attention_decode_kernels.cu.
#pragma once

#include <cstddef>
#include <cstdint>

namespace oryx::cuda {

// Consecutive packed rows of one sequence whose positions do not fall.
struct QueryItem {
  int32_t sequence, row, rows;
  int32_t first, last;  // positions of its first and last row
};
constexpr int kItemRows = 128;      // at most, of an item of the forward pass and of dQ
constexpr int kWideItemRows = 192;  // of a wide one of the forward pass
constexpr int kTileRows = 64;       // at most, of a tile that the pass over keys reads

// Where row `row` of a tile stands among what the pass over keys reads of the tile's rows: a thread, which
// meets the rows 8 j + 2 t and 8 j + 2 t + 1 for one t and every j, finds its own together.
constexpr int tile_place(int row) { return row % 8 / 2 * (kTileRows / 4) + row / 8 * 2 + row % 2; }

// Positions [begin, begin + kBlockKeys) of one sequence and the tiles of query rows that see any of them.
struct KeyBlock {
  int32_t sequence, begin;
  int32_t end;  // of what the sequence's spans use; keys at and past it are not read
  int32_t first_tile, tiles;
};
constexpr int kBlockKeys = 128;

// Neighbouring tiles of one sequence that a block of the pass over dS takes together; those that are missing
// have no rows and see no key.
constexpr int kGroupTiles = 3;
struct TileGroup {
  struct Tile {
    int32_t row = 0, rows = 0, last = -1;
    int32_t image = 0;  // the number of its first image of dS
  };
  int32_t sequence, last;  // position of the last row of all
  Tile tiles[kGroupTiles];
};

// Strides are in elements, of sequence, position and head; rows are contiguous and 16-byte aligned.
struct AttentionInputs {
  const void* query;  // [N, Hq, dim]
  const void* key;    // [B, S, Hk, dim]
  const void* value;
  int64_t key_strides[3], value_strides[3];
  const int32_t* positions;  // [N]
  const QueryItem* items;    // all rows, the longest (largest last) first
  int64_t item_count;
  int query_heads, key_heads, dim;
  float scale;  // positive
};

struct AttentionForward {
  AttentionInputs in;
  const QueryItem* wide_items;  // the same rows in items of up to kWideItemRows
  int64_t wide_item_count;
  void* output;      // [N, Hq, dim]
  float* logsumexp;  // [N, Hq], or null
};
void attention_forward(const AttentionForward& arguments, void* stream);

struct AttentionBackward {
  AttentionInputs in;
  const void* output;  // [N, Hq, dim]
  const float* logsumexp;
  const void* output_grad;  // [N, Hq, dim]
  float* statistics;        // [N, Hq, 2] scratch: log-sum-exp in powers of two, ⟨dO, O⟩
  // [Hq, tile_count, kTileRows / 4, 2, 4] scratch: the same by tiles, four places (see tile_place()) of each
  // in turn; 0 past a tile's end.
  float* tile_statistics;
  void* query_grad;  // [N, Hq, dim]
  void* key_grad;    // [B, S, Hk, dim] contiguous; all of it is written
  void* value_grad;
  int64_t rows, capacity;  // N, S
  const QueryItem* tiles;
  const int32_t* tile_positions;  // [tile_count, kTileRows], see tile_place(); 0 past a tile's end
  int64_t tile_count;
  const KeyBlock* blocks;  // all keys, those with the most tiles first
  int64_t block_count;

  // Where dS is kept between dK, dV and dQ: an image of kTileRows by kBlockKeys bfloat16 for every tile and
  // block of keys that it sees.
  void* score_grads;           // [slice_heads · Hq / Hk, images] scratch, or null: dS is computed twice
  const int32_t* tile_images;  // of each tile, the number of its first image
  int64_t images;              // of a head
  int slice_heads;             // key heads whose images the scratch holds
  const TileGroup* groups;     // all tiles, the longest first
  int64_t group_count;
};
// Whether the current device has shared memory for the rings of tiles of the following three, which take the
// statistics: dK, dV and dQ with dS kept between them, for heads of 128; dK and dV; dQ.
bool has_backward_rings(int dim);
size_t query_ring_bytes(int dim);  // of the last
void attention_backward_kept(const AttentionBackward& arguments, void* stream);
void attention_key_gradients(const AttentionBackward& arguments, void* stream);
void attention_query_gradients(const AttentionBackward& arguments, void* stream);
// Three kernels: ⟨dO, O⟩; dK and dV by blocks of keys; dQ by items, or from what was kept. No sum depends on
// the order in which blocks run.
void attention_backward(const AttentionBackward& arguments, void* stream);

// Decoding: a row that is alone in its sequence, and the keys of it that one block of threads reads. At most
// kMostSplits of a row, of kFewestKeys · 2^n keys each.
constexpr int kMostSplits = 64, kFewestKeys = 128;
struct DecodeSplit {
  int32_t sequence, row, begin, end;
};
struct DecodeRow {
  int32_t row, first_split, splits;
};

struct AttentionDecode {
  AttentionInputs in;  // items are not read
  bool is_float32;     // else bfloat16
  const DecodeSplit* splits;
  const DecodeRow* rows;
  int64_t split_count, row_count;
  float* partials;  // [splits, Hq, dim + 2] scratch: unnormalised output, maximum (times scale · log2 e), sum
  void* output;
  float* logsumexp;  // or null
};
void attention_decode(const AttentionDecode& arguments, void* stream);

}  // namespace oryx::cuda
