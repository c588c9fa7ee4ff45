// Products of small bfloat16 matrices, for attention: C = A B or C = fade C + A B.
//
// A [m, k] is row-major. B [k, n] is stored in pairs, [k / 2, n, 2], as the CPU's dot product of pairs
// reads them. C [m, n] is float32. k is even, n a multiple of 16.
#pragma once

#include "transpose.h"

// Rows that are needed next. They are prefetched during other computation, one cache line at a time,
// in memory order.
typedef struct {
  const bf16 *const *rows;
  long count, size, row, at;  // `count` rows of `size` values; up to [row][at] is prefetched
} Ahead;

INLINE void fetch(Ahead *ahead, int lines) {
  for (int i = 0; i < lines && ahead->row < ahead->count; i++) {
    _mm_prefetch((const void *)(ahead->rows[ahead->row] + ahead->at), _MM_HINT_T0);
    ahead->at += 32;
    if (ahead->at >= ahead->size) ahead->at = 0, ahead->row++;
  }
}

// Computes R rows and 16 Z columns of C in registers. R and Z are compile-time constants when inlined.
INLINE void product_block(const int R, const int Z, long pairs, const bf16 *a, long a_stride,
                          const bf16 *b, long b_stride, float *c, long c_stride,
                          const float *fade, Ahead *ahead) {
  __m512 sum[6][5];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 5
    for (int z = 0; z < Z; z++)
      sum[r][z] = fade ? _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + 16 * z),
                                       _mm512_set1_ps(fade[r]))
                       : _mm512_setzero_ps();
  for (long p = 0; p < pairs; p++) {
    __m512bh column[5];
    fetch(ahead, 2);
#pragma GCC unroll 5
    for (int z = 0; z < Z; z++)
      column[z] = (__m512bh)_mm512_loadu_si512(b + 2 * (p * b_stride + 16 * z));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int *)(a + r * a_stride + 2 * p));
#pragma GCC unroll 5
      for (int z = 0; z < Z; z++) sum[r][z] = _mm512_dpbf16_ps(sum[r][z], pair, column[z]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 5
    for (int z = 0; z < Z; z++) _mm512_storeu_ps(c + r * c_stride + 16 * z, sum[r][z]);
}

INLINE void product_columns(const int Z, long m, long pairs, const bf16 *a, long a_stride,
                            const bf16 *b, long b_stride, float *c, long c_stride,
                            const float *fade, Ahead *ahead) {
  const int R = Z == 5 ? 5 : 6;  // fills the 32 registers, with Z columns of B
  long r = 0;
  for (; r + R <= m; r += R)
    product_block(R, Z, pairs, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride,
                  fade ? fade + r : 0, ahead);
  const bf16 *rest = a + r * a_stride;
  const float *faded = fade ? fade + r : 0;
  float *to = c + r * c_stride;
  switch (m - r) {
    case 5: product_block(5, Z, pairs, rest, a_stride, b, b_stride, to, c_stride, faded, ahead); break;
    case 4: product_block(4, Z, pairs, rest, a_stride, b, b_stride, to, c_stride, faded, ahead); break;
    case 3: product_block(3, Z, pairs, rest, a_stride, b, b_stride, to, c_stride, faded, ahead); break;
    case 2: product_block(2, Z, pairs, rest, a_stride, b, b_stride, to, c_stride, faded, ahead); break;
    case 1: product_block(1, Z, pairs, rest, a_stride, b, b_stride, to, c_stride, faded, ahead); break;
  }
}

static void product(long m, long n, long k, const bf16 *a, long a_stride, const bf16 *b,
                    long b_stride, float *c, long c_stride, const float *fade, Ahead *ahead) {
  for (long at = 0, z; at < n; at += 16 * z) {
    long left = (n - at) / 16;
    z = left == 5 ? 5 : left > 4 ? 4 : left;
    const bf16 *columns = b + 2 * at;
    switch (z) {
      case 5: product_columns(5, m, k / 2, a, a_stride, columns, b_stride, c + at, c_stride, fade, ahead); break;
      case 4: product_columns(4, m, k / 2, a, a_stride, columns, b_stride, c + at, c_stride, fade, ahead); break;
      case 3: product_columns(3, m, k / 2, a, a_stride, columns, b_stride, c + at, c_stride, fade, ahead); break;
      case 2: product_columns(2, m, k / 2, a, a_stride, columns, b_stride, c + at, c_stride, fade, ahead); break;
      case 1: product_columns(1, m, k / 2, a, a_stride, columns, b_stride, c + at, c_stride, fade, ahead); break;
    }
  }
}

// Packs the transpose of rows [n, k] as B of a product: [k / 2, n, 2].
static void pair_transposed(long n, long k, const bf16 *const *rows, Ahead *ahead,
                            bf16 *out) {
  for (long j = 0; j < n; j += 16)
    for (long p = 0; p < k / 2; p += 16) {
      fetch(ahead, 8);
      const int32_t *at[16];
      for (int i = 0; i < 16; i++) at[i] = (const int32_t *)(rows[j + i] + 2 * p);
      transpose(at, k / 2 - p, (int32_t *)(out + 2 * (p * n + j)), n);
    }
}

// Packs rows [k, n] as B of a product: [k / 2, n, 2].
static void pair_rows(long k, long n, const bf16 *const *rows, Ahead *ahead,
                            bf16 *out) {
  static const uint16_t order[64] __attribute__((aligned(64))) = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  for (long i = 0; i < k; i += 2) {
    fetch(ahead, 4);
    for (long at = 0; at < n; at += 32) {
      __mmask32 mask = n - at >= 32 ? ~0u : 0xffff;
      __m512i a = _mm512_maskz_loadu_epi16(mask, rows[i] + at);
      __m512i b = _mm512_maskz_loadu_epi16(mask, rows[i + 1] + at);
      bf16 *to = out + i * n + 2 * at;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
      if (n - at >= 32) _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
