// Matrix products with weights in panels of 16 output columns, in bfloat16 or int8. A panel is
// [words, 16]. A word is what one lane of a dot product reads of a column: two bfloat16 or four int8
// values. Panels are contiguous, so that a weight is read from memory once and in order, for any
// number of rows.

#include <string.h>

#include "kernels.h"
#include "transpose.h"

enum { BF16, INT8 };  // type of weights and rows

typedef struct {
  const int32_t *x;  // rows of `words` words
  const int32_t *panels;
  const bf16 *bias;          // [n], or NULL
  const float *row_scale;    // [m]; this and the next two for INT8 only
  const float *column_scale; // [n]
  const int32_t *zero;       // [n] contribution of the rows' zero point, 128
  bf16 *out;                 // [m, n]
  long m, n, words;
} Product;

INLINE __m512i dot(const int kind, __m512i sum, __m512i a, __m512i b) {
  if (kind == BF16) return (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  return _mm512_dpbusd_epi32(sum, a, b);
}

INLINE void finish(const int kind, const Product *p, long row, long column, __m512i sum) {
  __mmask16 mask = first(p->n - column);
  __m512 y = (__m512)sum;
  if (kind == INT8) {
    sum = _mm512_sub_epi32(sum, _mm512_maskz_loadu_epi32(mask, p->zero + column));
    __m512 scale = _mm512_maskz_loadu_ps(mask, p->column_scale + column);
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(p->row_scale[row]));
    y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
  }
  if (p->bias) y = _mm512_add_ps(y, load_first(p->bias + column, mask));
  store_first(p->out + row * p->n + column, mask, y);
}

enum { ROWS = 6, PANELS = 4 };  // per block: their sums and a word of each panel fill the registers

// Panels that this thread will probably need next; prefetched during the product.
typedef struct {
  const int32_t *panels;
  long count;
} Ahead;

// Computes R rows from `row` on and Z panels from `panel` on; R and Z are constants when inlined.
INLINE void block(const int kind, const int R, const int Z, const Product *p, long row, long panel,
                  Ahead ahead) {
  __m512i sum[ROWS * PANELS];
#pragma GCC unroll 24
  for (int i = 0; i < R * Z; i++) sum[i] = _mm512_setzero_si512();
  const int32_t *x = p->x + row * p->words, *columns = p->panels + panel * p->words * 16;
  for (long w = 0; w < p->words; w++) {
    __m512i column[PANELS];
    for (long i = 0; i < ahead.count; i++)
      _mm_prefetch((const void *)(ahead.panels + (i * p->words + w) * 16), _MM_HINT_T1);
#pragma GCC unroll 4
    for (int z = 0; z < Z; z++) column[z] = _mm512_loadu_si512(columns + (z * p->words + w) * 16);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512i word = _mm512_set1_epi32(x[r * p->words + w]);
#pragma GCC unroll 4
      for (int z = 0; z < Z; z++) sum[r * Z + z] = dot(kind, sum[r * Z + z], word, column[z]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R * Z; i++) finish(kind, p, row + i / Z, (panel + i % Z) * 16, sum[i]);
}

INLINE void rows_by_panels(const int kind, const int Z, const Product *p, long row, long rows,
                           long panel, Ahead ahead) {
  switch (rows) {
    case 6: block(kind, 6, Z, p, row, panel, ahead); break;
    case 5: block(kind, 5, Z, p, row, panel, ahead); break;
    case 4: block(kind, 4, Z, p, row, panel, ahead); break;
    case 3: block(kind, 3, Z, p, row, panel, ahead); break;
    case 2: block(kind, 2, Z, p, row, panel, ahead); break;
    case 1: block(kind, 1, Z, p, row, panel, ahead); break;
  }
}

INLINE Ahead ahead_of(const Product *p, long panel, long b, long blocks, int threads) {
  long next = panel + threads * PANELS, size = p->words * 16;
  if (b == 0 || next + PANELS > (p->n + 15) / 16) return (Ahead){0, 0};
  long count = (PANELS + blocks - 2) / (blocks - 1), done = (b - 1) * count;
  if (done >= PANELS) return (Ahead){0, 0};
  return (Ahead){p->panels + (next + done) * size, done + count > PANELS ? PANELS - done : count};
}

// A thread takes PANELS panels and iterates over all rows in even blocks. The first block reads the
// panels from memory, the others from the cache, while the next panels are prefetched.
INLINE void multiply(const int kind, const Product *p, int threads) {
  long panels = (p->n + 15) / 16, blocks = (p->m + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long panel = 0; panel < panels; panel += PANELS)
    for (long b = 0; b < blocks; b++) {
      long row = p->m * b / blocks, rows = p->m * (b + 1) / blocks - row;
      if (panel + PANELS <= panels)
        rows_by_panels(kind, PANELS, p, row, rows, panel, ahead_of(p, panel, b, blocks, threads));
      else
        for (long rest = panel; rest < panels; rest++)
          rows_by_panels(kind, 1, p, row, rows, rest, (Ahead){0, 0});
    }
}

// Computes out [m, n] in bfloat16 of x [m, words] and panels of [n, words].
EXPORT void octavo_linear(const int32_t *x, const int32_t *panels, const bf16 *bias, bf16 *out,
                          long m, long n, long words, int threads) {
  const Product p = {x, panels, bias, 0, 0, 0, out, m, n, words};
  multiply(BF16, &p, threads);
}

// Computes the same with int8 panels. x [m, 4 words] is quantized first, to numbers [m, 4 words] and
// row_scale [m].
EXPORT void octavo_linear_int8(const bf16 *x, const int32_t *panels, const bf16 *bias,
                               const float *column_scale, const int32_t *zero, bf16 *out,
                               uint8_t *numbers, float *row_scale, long m, long n, long words,
                               int threads) {
  octavo_quantize_rows(x, numbers, row_scale, m, 4 * words, threads);
  const Product p = {(const int32_t *)numbers, panels, bias, row_scale, column_scale, zero, out, m, n, words};
  multiply(INT8, &p, threads);
}

// Packs rows [n, words] in panels [ceil(n / 16), words, 16]; the last one is zero-padded.
EXPORT void octavo_pack_panels(const int32_t *rows, int32_t *panels, long n, long words,
                               int threads) {
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < (n + 15) / 16; panel++)
    for (long w = 0; w < words; w += 16) {
      static const int32_t zeros[16];
      const int32_t *at[16];
      for (long i = 0; i < 16; i++)
        at[i] = panel * 16 + i < n ? rows + (panel * 16 + i) * words + w : zeros;
      transpose(at, words - w, panels + (panel * words + w) * 16, 16);
    }
}
