// Transposition of 16 rows by words, the basis of all packing, and reductions of 16 vectors.
#pragma once

#include "bf16.h"

// Transposes 16 rows of 16 words (4 bytes each). The first `words` rows of the result are written,
// `stride` words apart.
INLINE void transpose(const int32_t *const *rows, long words, int32_t *out, long stride) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi32(first(words), rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // 128-bit lanes of rows 0-3, 4-7, 8-11, 12-15
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
  }
  for (int i = 0; i < 16 && i < words; i++) _mm512_storeu_si512(out + i * stride, x[i]);
}

// Returns the sum (or the maximum, if not `adds`) of each of 16 vectors, in their order. Adds in the
// same order as _mm512_reduce_add_ps, but two vectors at a time: a third of the instructions.
INLINE __m512 across(const int adds, const __m512 *v) {
#define FOLD(a, b) (adds ? _mm512_add_ps(a, b) : _mm512_max_ps(a, b))
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  __m512 halves[8], quarters[4], pairs[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    halves[i] = FOLD(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                     _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    quarters[i] = FOLD(_mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88),
                       _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    __m512d a = _mm512_castps_pd(quarters[i]), b = _mm512_castps_pd(quarters[i + 2]);
    pairs[i] = FOLD(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 all = FOLD(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                    _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
  return _mm512_permutexvar_ps(order, all);
#undef FOLD
}
