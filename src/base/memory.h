// Settings of the C library's allocator for programs that work on tensors.
#pragma once

#include <malloc.h>

namespace oryx {

// glibc serves large blocks by fresh mappings and gives them back when freed, so that a training step pays a
// page fault for every 4 KiB of its activations, again at each step. After this call freed memory stays with
// the process and is used again. Call it first thing in main(). Has no effect with other C libraries.
inline void tune_allocator() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);         // large blocks come from the heap too,
  mallopt(M_TRIM_THRESHOLD, -1);  // whose free end is kept,
  mallopt(M_TOP_PAD, 64 << 20);   // and which grows in steps of 64 MiB
#endif
}

}  // namespace oryx
