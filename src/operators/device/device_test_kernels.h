// Kernels that test the device helpers themselves.
#pragma once

#include <cstdint>

namespace oryx::cuda {

// c [64, 64] float32 = op(a) op(b) for bf16 matrices a, b [64, 64] (as uint16), every operand plain or
// transposed as operators/device/tile.h says; `registers` sends A through an accumulator.
struct TileProduct {
  const void *a, *b;
  float* c;
  bool transpose_a, transpose_b, registers;
};
void tile_product(const TileProduct& arguments, void* stream);

// rows [128, 64] = a bᵀ and columns [128, 128] = bf16(rows) b, in float32, for bf16 matrices a [128, 128] and
// b [64, 128], by two warpgroups; from_registers is rows with A in registers, narrow [128, 32] its first
// columns and transposed [64, 128] bf16(rows)ᵀ.
struct WarpgroupProducts {
  const void *a, *b;
  float *rows, *columns, *from_registers, *narrow, *transposed;
};
void warpgroup_products(const WarpgroupProducts& arguments, void* stream);

// c [16, 8] = a [16, 8] b [8, 8] in tf32.
struct Tf32Product {
  const float *a, *b;
  float* c;
};
void tf32_product(const Tf32Product& arguments, void* stream);

}  // namespace oryx::cuda
