// Attention with bfloat16 dot products: of prompt chunks over a paged cache, whose blocks are read in
// place (decode rows: decode.c), and within the frames of the vision tower. Source: FlashAttention-2
// (Dao, 2023).
//
// A tile is a few query tokens with the query heads of one KV head, whose rows share every key. KEYS
// keys are processed at a time: scores, weights by online softmax, and weighted sum of values.
// Results are batch-invariant: a row depends only on its own keys, in their order.

#include <float.h>
#include <string.h>

#include "amx.h"
#include "kernels.h"
#include "product.h"

enum { ROWS = 96, KEYS = 64, MAX_DIM = 128 };

// Buffers of one thread. With `amx`, rows of q are zero-padded to `width`, a multiple of a tile's
// depth.
typedef struct {
  bf16 q[ROWS * MAX_DIM], weights[ROWS * KEYS], keys[KEYS * MAX_DIM], values[KEYS * MAX_DIM];
  float scores[ROWS * KEYS], sum[ROWS * MAX_DIM], top[ROWS], total[ROWS], fade[ROWS];
  long width;
  int amx;
} Scratch;

static _Thread_local Scratch scratch __attribute__((aligned(64)));
static const bf16 zeros[MAX_DIM];

// Converts the scores of up to 16 rows from `row` on to weights. Row r of the tile sees the first
// `seen` + r / group of the KEYS keys; `seen` if `group` is 0. `scale` is above 0.
static void weigh(Scratch *s, long row, long rows, long group, long seen, float scale) {
  __m512 each[16];
  __mmask16 own[16][KEYS / 16], all = first(rows);
  for (long r = 0; r < 16; r++) {
    each[r] = _mm512_set1_ps(-FLT_MAX);
    if (r >= rows) continue;
    long sees = seen < KEYS && group ? seen + (row + r) / group : seen;
#pragma GCC unroll 4
    for (int i = 0; i < KEYS / 16; i++) {
      own[r][i] = sees > 16 * i ? first(sees - 16 * i) : 0;
      __m512 scores = _mm512_loadu_ps(s->scores + (row + r) * KEYS + 16 * i);
      each[r] = _mm512_mask_max_ps(each[r], own[r][i], each[r], scores);
    }
  }
  __m512 before = _mm512_maskz_loadu_ps(all, s->top + row);
  __m512 tops = _mm512_max_ps(_mm512_mul_ps(across(0, each), _mm512_set1_ps(scale)), before);
  __m512 fade = exp2_16(_mm512_sub_ps(before, tops));
  _mm512_mask_storeu_ps(s->top + row, all, tops);
  _mm512_mask_storeu_ps(s->fade + row, all, fade);
  for (long r = 0; r < 16; r++) {
    each[r] = _mm512_setzero_ps();
    if (r >= rows) continue;
    __m512 top = _mm512_set1_ps(s->top[row + r]);
#pragma GCC unroll 4
    for (int i = 0; i < KEYS / 16; i++) {
      __m512 scores = _mm512_loadu_ps(s->scores + (row + r) * KEYS + 16 * i);
      __m512 below = _mm512_sub_ps(_mm512_mul_ps(scores, _mm512_set1_ps(scale)), top);
      __m512 weights = _mm512_maskz_mov_ps(own[r][i], exp2_16(below));
      each[r] = _mm512_add_ps(each[r], weights);
      store(s->weights + (row + r) * KEYS + 16 * i, weights);
    }
  }
  __m512 total = _mm512_maskz_loadu_ps(all, s->total + row);
  total = _mm512_fmadd_ps(total, fade, across(1, each));
  _mm512_mask_storeu_ps(s->total + row, all, total);
}

// Addresses of KEYS keys and values.
typedef struct {
  const bf16 *rows[2 * KEYS];  // the keys, then the values
} Lines;

static void begin(Scratch *s, long rows, long dim, int amx) {
  s->amx = amx;
  s->width = amx ? amx_padded(dim, AMX_DEPTH) : dim;
  memset(s->keys + KEYS * dim, 0, KEYS * (s->width - dim) * sizeof(bf16));
  for (long r = 0; r < rows; r++) s->top[r] = -FLT_MAX, s->total[r] = 0;
  memset(s->sum, 0, rows * dim * sizeof(float));
}

static void read_query(Scratch *s, long row, long dim, const bf16 *q) {
  bf16 *to = s->q + row * s->width;
  memcpy(to, q, dim * sizeof(bf16));
  memset(to + dim, 0, (s->width - dim) * sizeof(bf16));
}

// Multiplies with AMX or AVX512. Only the AVX512 product prefetches.
INLINE void multiply(const Scratch *s, long m, long n, long k, const bf16 *a, const bf16 *b, float *c,
                     const float *fade, Ahead *ahead) {
  if (s->amx)
    amx_product(m, n, k, a, k, b, n, c, n, fade);
  else
    product(m, n, k, a, k, b, n, c, n, fade, ahead);
}

// Adds KEYS keys and values to `rows` rows, and prefetches the next ones. Row r sees `seen` + r / group
// keys; `seen` if `group` is 0.
static void add_keys(Scratch *s, long rows, long group, long dim, const Lines *lines,
                     const Lines *next, long seen, float scale) {
  Ahead ahead = {next ? next->rows : 0, next ? 2 * KEYS : 0, dim, 0, 0};
  pair_transposed(KEYS, dim, lines->rows, &ahead, s->keys);
  multiply(s, rows, KEYS, s->width, s->q, s->keys, s->scores, 0, &ahead);
  for (long row = 0; row < rows; row += 16) {
    if (s->amx) fetch(&ahead, 48);
    weigh(s, row, rows - row < 16 ? rows - row : 16, group, seen, scale);
  }
  pair_rows(KEYS, dim, lines->rows + KEYS, &ahead, s->values);
  multiply(s, rows, dim, KEYS, s->weights, s->values, s->sum, s->fade, &ahead);
}

static void write_row(const Scratch *s, long row, long dim, bf16 *out) {
  __m512 share = _mm512_set1_ps(1 / s->total[row]);
  for (long i = 0; i < dim; i += 16)
    store(out + i, _mm512_mul_ps(_mm512_loadu_ps(s->sum + row * dim + i), share));
}

// A tile of a chunk's attention with one KV head: `count` tokens from `token` on, over the request's
// first `end` keys. The first token sees `seen` of them, each further token one more.
typedef struct {
  int32_t row, token, count, head, end, seen;
} Tile;

typedef struct {
  const bf16 *k_cache, *v_cache;
  const int32_t *tables;
  long table_stride, heads, kv_heads, dim, block_size, group;
} Cache;

// Finds the addresses of a tile's keys from `at` on; keys from `end` on are zeros.
static void find_lines(Lines *lines, const Cache *c, const Tile *t, long at) {
  const int32_t *table = c->tables + t->row * c->table_stride;
  for (long i = 0; i < KEYS; i++) {
    lines->rows[i] = lines->rows[KEYS + i] = zeros;
    if (at + i >= t->end) continue;
    long block = table[(at + i) / c->block_size] * c->kv_heads + t->head;
    long line = block * c->block_size + (at + i) % c->block_size;
    lines->rows[i] = c->k_cache + line * c->dim;
    lines->rows[KEYS + i] = c->v_cache + line * c->dim;
  }
}

// Row r of a tile is query head r % group of token r / group.
static void attend(const Cache *c, const Tile *t, const bf16 *q, bf16 *out, float scale, int amx) {
  Scratch *s = &scratch;
  Lines lines[2];
  long rows = t->count * c->group, token = c->heads * c->dim;
  long from = t->token * token + t->head * c->group * c->dim;
  begin(s, rows, c->dim, amx);
  for (long r = 0; r < rows; r++)
    read_query(s, r, c->dim, q + from + r / c->group * token + r % c->group * c->dim);
  find_lines(lines, c, t, 0);
  for (long step = 0, at = 0; at < t->end; step++, at += KEYS) {
    Lines *next = at + KEYS < t->end ? lines + (step + 1) % 2 : 0;
    if (next) find_lines(next, c, t, at + KEYS);
    add_keys(s, rows, c->group, c->dim, lines + step % 2, next, t->seen - at, scale);
  }
  for (long r = 0; r < rows; r++)
    write_row(s, r, c->dim, out + from + r / c->group * token + r % c->group * c->dim);
}

// q, out [n, heads, dim]; caches [blocks, kv_heads, block_size, dim]; tables [rows, table_stride].
EXPORT void octavo_paged_attention(const bf16 *q, bf16 *out, const bf16 *k_cache,
                                   const bf16 *v_cache, const int32_t *tables, long table_stride,
                                   const int32_t *tiles, long num_tiles, long heads, long kv_heads,
                                   long dim, long block_size, float scale, int threads) {
  const Cache cache = {k_cache, v_cache, tables,     table_stride,    heads,
                       kv_heads, dim,    block_size, heads / kv_heads};
  const int amx = amx_usable;
#pragma omp parallel num_threads(threads)
  {
    AmxConfig before;
    if (amx) amx_begin(&before);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < num_tiles; i++) attend(&cache, (const Tile *)tiles + i, q, out, scale, amx);
    if (amx) amx_end(&before);
  }
}

// Queries, keys and values of all frames: [n, heads, dim]; `stride`: values between tokens.
typedef struct {
  const bf16 *q, *k, *v;
  long stride, heads, dim;
} Frames;

// t: a row of `octavo_vision_attention`'s tiles.
static void attend_frame(const Frames *f, const int32_t *t, long head, bf16 *out, float scale,
                         int amx) {
  Scratch *s = &scratch;
  long count = t[3], dim = f->dim;
  begin(s, count, dim, amx);
  for (long i = 0; i < count; i++) read_query(s, i, dim, f->q + (t[2] + i) * f->stride + head * dim);
  for (long at = t[0]; at < t[1]; at += KEYS) {
    Lines lines;
    for (long i = 0; i < KEYS; i++) {
      long from = (at + i) * f->stride + head * dim;
      lines.rows[i] = at + i < t[1] ? f->k + from : zeros;
      lines.rows[KEYS + i] = at + i < t[1] ? f->v + from : zeros;
    }
    add_keys(s, count, 0, dim, &lines, 0, t[1] - at, scale);
  }
  for (long i = 0; i < count; i++)
    write_row(s, i, dim, out + ((t[2] + i) * f->heads + head) * dim);
}

// q, k, v, out [n, heads, dim]; `stride`: values between tokens of q, k and v. Rows of `tiles`
// [num_tiles, 4]: first token and end of the frame, first query, number of queries.
EXPORT void octavo_vision_attention(const bf16 *q, const bf16 *k, const bf16 *v, long stride,
                                    bf16 *out, const int32_t *tiles, long num_tiles, long heads,
                                    long dim, float scale, int threads) {
  const Frames frames = {q, k, v, stride, heads, dim};
  const int amx = amx_usable;
#pragma omp parallel num_threads(threads)
  {
    AmxConfig before;
    if (amx) amx_begin(&before);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < num_tiles * heads; item++)
      attend_frame(&frames, tiles + 4 * (item % num_tiles), item / num_tiles, out, scale, amx);
    if (amx) amx_end(&before);
  }
}
