// Products of small bfloat16 matrices by AMX: the same as product.h's, a tile at a time.
//
// To be used where `amx_usable`, between `amx_begin` and `amx_end` of the same thread. A tile is 16
// rows of 64 bytes; `product.h`'s pairs are what one of B must be.
#pragma once

#include "bf16.h"

enum { AMX_ROWS = 16, AMX_DEPTH = 32 };  // of a tile of A

INLINE long amx_padded(long count, long unit) { return (count + unit - 1) / unit * unit; }

extern int amx_usable;  // once `octavo_check_amx` has found it so

// What a thread's eight tiles are configured for.
typedef struct {
  uint8_t bytes[64];
} AmxConfig __attribute__((aligned(64)));

// Configures this thread's tiles; `before` is how they were.
void amx_begin(AmxConfig *before);
void amx_end(const AmxConfig *before);

// C = A B or C = fade C + A B as in product.h. k is a multiple of AMX_DEPTH. A and C have memory up to
// the next multiple of AMX_ROWS rows; what it holds in C is lost.
void amx_product(long m, long n, long k, const bf16 *a, long a_stride, const bf16 *b, long b_stride,
                 float *c, long c_stride, const float *fade);
