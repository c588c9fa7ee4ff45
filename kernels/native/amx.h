// Products of small bfloat16 matrices with AMX: the same as those of product.h, by tiles.
//
// Use them only if `amx_usable`, between `amx_begin` and `amx_end` on the same thread. A tile is 16
// rows of 64 bytes; tiles of B use the pair layout of product.h.
#pragma once

#include "bf16.h"

enum { AMX_ROWS = 16, AMX_DEPTH = 32 };  // rows and columns of a tile of A

INLINE long amx_padded(long count, long unit) { return (count + unit - 1) / unit * unit; }

extern int amx_usable;  // set by `octavo_check_amx`

// Configuration of a thread's eight tiles.
typedef struct {
  uint8_t bytes[64];
} AmxConfig __attribute__((aligned(64)));

// Configures this thread's tiles and saves their configuration in `before`.
void amx_begin(AmxConfig *before);
void amx_end(const AmxConfig *before);

// Computes C = A B or C = fade C + A B as in product.h. k is a multiple of AMX_DEPTH. A and C must have
// memory up to the next multiple of AMX_ROWS rows; the surplus rows of C are overwritten.
void amx_product(long m, long n, long k, const bf16 *a, long a_stride, const bf16 *b, long b_stride,
                 float *c, long c_stride, const float *fade);
