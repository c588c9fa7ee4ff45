// Attention with bfloat16 dot products: over a paged cache, whose blocks are read where they lie,
// and inside the frames of a vision tower. Source: FlashAttention-2 (Dao, 2023).
//
// A tile is a few query tokens with the heads of one KV head: its rows share every key. Keys come
// KEYS at a time: scores, their weights by a running maximum, and the weighted sum of values.
// A row's result depends on its own keys alone, in their order: not on what else is in the batch.

#include <float.h>
#include <string.h>

#include "amx.h"
#include "product.h"

enum { ROWS = 96, KEYS = 64, MOST_DIM = 128 };

// The memory of one thread. With `amx` products go by tiles: rows of q then have zeros up to `width`,
// a multiple of a tile's depth.
typedef struct {
  bf16 q[ROWS * MOST_DIM], weights[ROWS * KEYS], keys[KEYS * MOST_DIM], values[KEYS * MOST_DIM];
  float scores[ROWS * KEYS], sum[ROWS * MOST_DIM], top[ROWS], total[ROWS], fade[ROWS];
  long width;
  int amx;
} Scratch;

static _Thread_local Scratch scratch __attribute__((aligned(64)));
static const bf16 zeros[MOST_DIM];

// Turns the scores of up to sixteen rows from `row` on into weights. Row r sees the first `seen` +
// (`after` + r) / group of the KEYS keys; where `group` is 0, `seen`. `scale` is above 0.
static void weigh(Scratch *s, long row, long rows, long after, long group, long seen, float scale) {
  __m512 each[16];
  __mmask16 own[16][KEYS / 16], all = first(rows);
  for (long r = 0; r < 16; r++) {
    each[r] = _mm512_set1_ps(-FLT_MAX);
    if (r >= rows) continue;
    long sees = seen < KEYS && group ? seen + (after + r) / group : seen;
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

// Where KEYS keys and values lie.
typedef struct {
  const bf16 *keys[KEYS], *values[KEYS];  // one after the other
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

// Either product, of rows that begin a tile. Only AVX512's has the time to fetch.
INLINE void multiply(const Scratch *s, long m, long n, long k, const bf16 *a, const bf16 *b, float *c,
                     const float *fade, Ahead *ahead) {
  if (s->amx)
    amx_product(m, n, k, a, k, b, n, c, n, fade);
  else
    product(m, n, k, a, k, b, n, c, n, fade, ahead);
}

// Adds KEYS keys and values to `rows` rows from `row` on, while the next ones come from memory. Row
// r of them sees `seen` + r / group keys; where `group` is 0, `seen`.
static void add_keys(Scratch *s, long row, long rows, long group, long dim, const Lines *lines,
                     const Lines *next, long seen, float scale) {
  Ahead ahead = {next ? next->keys : 0, next ? 2 * KEYS : 0, dim, 0, 0};
  pair_transposed(KEYS, dim, lines->keys, &ahead, s->keys);
  multiply(s, rows, KEYS, s->width, s->q + row * s->width, s->keys, s->scores + row * KEYS, 0, &ahead);
  for (long r = 0; r < rows; r += 16) {
    if (s->amx) fetch(&ahead, 48);
    weigh(s, row + r, rows - r < 16 ? rows - r : 16, r, group, seen, scale);
  }
  pair_rows(KEYS, dim, lines->values, &ahead, s->values);
  multiply(s, rows, dim, KEYS, s->weights + row * KEYS, s->values, s->sum + row * dim, s->fade + row,
           &ahead);
}

static void write_row(const Scratch *s, long row, long dim, bf16 *out) {
  __m512 share = _mm512_set1_ps(1 / s->total[row]);
  for (long i = 0; i < dim; i += 16)
    store(out + i, _mm512_mul_ps(_mm512_loadu_ps(s->sum + row * dim + i), share));
}

// A part of a request's attention: `count` tokens from `token` on, with the KV heads
// [head_begin, head_end), over the request's keys [begin, end). The first token sees `seen` keys of
// the request, each next one more. `part` is -1, or the place of an unfinished result, which
// `octavo_join_parts` adds up.
typedef struct {
  int32_t row, token, count, head_begin, head_end, begin, end, seen, part;
} Tile;

typedef struct {
  const bf16 *k_cache, *v_cache;
  const int32_t *tables;
  long table_stride, heads, kv_heads, dim, block_size, group;
} Cache;

// Where a tile's keys of one step lie. The heads of the same keys follow each other, as they do in
// memory; keys from `end` on are zeros.
static void find_lines(Lines *lines, const Cache *c, const Tile *t, long step) {
  long heads = t->head_end - t->head_begin, at = t->begin + step / heads * KEYS;
  const int32_t *table = c->tables + t->row * c->table_stride;
  for (long i = 0; i < KEYS; i++) {
    lines->keys[i] = lines->values[i] = zeros;
    if (at + i >= t->end) continue;
    long block = table[(at + i) / c->block_size] * c->kv_heads + t->head_begin + step % heads;
    long line = block * c->block_size + (at + i) % c->block_size;
    lines->keys[i] = c->k_cache + line * c->dim;
    lines->values[i] = c->v_cache + line * c->dim;
  }
}

// Row r of a tile belongs to a head of `rows` rows: to its token r / group.
static void read_queries(Scratch *s, const Cache *c, const Tile *t, const bf16 *q) {
  long row = 0;
  for (long head = t->head_begin; head < t->head_end; head++)
    for (long i = 0; i < t->count * c->group; i++, row++) {
      long token = t->token + i / c->group, its = head * c->group + i % c->group;
      read_query(s, row, c->dim, q + (token * c->heads + its) * c->dim);
    }
}

static void write_results(const Scratch *s, const Cache *c, const Tile *t, bf16 *out,
                          float *partial, float *lse) {
  long row = 0;
  for (long kv_head = t->head_begin; kv_head < t->head_end; kv_head++)
    for (long r = 0; r < t->count * c->group; r++, row++) {
      long token = t->token + r / c->group, head = kv_head * c->group + r % c->group;
      if (t->part < 0) {
        write_row(s, row, c->dim, out + (token * c->heads + head) * c->dim);
        continue;
      }
      long to = t->part * c->heads + head;
      for (long i = 0; i < c->dim; i++)
        partial[to * c->dim + i] = s->sum[row * c->dim + i] / s->total[row];
      lse[to] = s->top[row] + __builtin_log2f(s->total[row]);
    }
}

static void attend(const Cache *c, const Tile *t, const bf16 *q, bf16 *out, float scale,
                   float *partial, float *lse, int amx) {
  Scratch *s = &scratch;
  Lines lines[2];
  long heads = t->head_end - t->head_begin, rows = t->count * c->group;
  long steps = (t->end - t->begin + KEYS - 1) / KEYS * heads;
  begin(s, rows * heads, c->dim, amx && heads == 1);
  read_queries(s, c, t, q);
  find_lines(lines, c, t, 0);
  for (long step = 0; step < steps; step++) {
    Lines *next = step + 1 < steps ? lines + (step + 1) % 2 : 0;
    if (next) find_lines(next, c, t, step + 1);
    long at = t->begin + step / heads * KEYS, seen = t->seen - at;
    if (t->count == 1 && t->end - at < seen) seen = t->end - at;  // a part ends before its token
    add_keys(s, step % heads * rows, rows, c->group, c->dim, lines + step % 2, next, seen, scale);
  }
  write_results(s, c, t, out, partial, lse);
}

// q, out [n, heads, dim]; caches [blocks, kv_heads, block_size, dim]; tables [rows, table_stride];
// partial [parts, heads, dim] and lse [parts, heads]: of the tiles that are parts.
EXPORT void octavo_paged_attention(const bf16 *q, bf16 *out, const bf16 *k_cache,
                                   const bf16 *v_cache, const int32_t *tables, long table_stride,
                                   const Tile *tiles, long num_tiles, long heads, long kv_heads,
                                   long dim, long block_size, float scale, float *partial,
                                   float *lse, int threads) {
  const Cache cache = {k_cache, v_cache, tables,     table_stride,    heads,
                       kv_heads, dim,    block_size, heads / kv_heads};
  const int amx = amx_usable;
#pragma omp parallel num_threads(threads)
  {
    AmxConfig before;
    if (amx) amx_begin(&before);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < num_tiles; i++) attend(&cache, tiles + i, q, out, scale, partial, lse, amx);
    if (amx) amx_end(&before);
  }
}

// Rows of `joins` [num_joins, 3]: a token, its first part and how many there are.
EXPORT void octavo_join_parts(bf16 *out, const float *partial, const float *lse,
                              const int32_t *joins, long num_joins, long heads, long dim,
                              int threads) {
#pragma omp parallel for num_threads(threads)
  for (long item = 0; item < num_joins * heads; item++) {
    const int32_t *join = joins + 3 * (item / heads);
    long head = item % heads;
    float top = -FLT_MAX, total = 0, sum[MOST_DIM] = {0};
    for (long i = 0; i < join[2]; i++) {
      float one = lse[(join[1] + i) * heads + head];
      if (one > top) top = one;
    }
    for (long i = 0; i < join[2]; i++) {
      long from = (join[1] + i) * heads + head;
      float weight = __builtin_exp2f(lse[from] - top);
      total += weight;
      for (long j = 0; j < dim; j++) sum[j] += weight * partial[from * dim + j];
    }
    for (long j = 0; j < dim; j += 16)
      store(out + (join[0] * heads + head) * dim + j,
            _mm512_mul_ps(_mm512_loadu_ps(sum + j), _mm512_set1_ps(1 / total)));
  }
}

// Where frames' queries, keys and values lie: [n, heads, dim], tokens `stride` numbers apart.
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
      lines.keys[i] = at + i < t[1] ? f->k + from : zeros;
      lines.values[i] = at + i < t[1] ? f->v + from : zeros;
    }
    add_keys(s, 0, count, 0, dim, &lines, 0, t[1] - at, scale);
  }
  for (long i = 0; i < count; i++)
    write_row(s, i, dim, out + ((t[2] + i) * f->heads + head) * dim);
}

// q, k, v [n, heads, dim], whose tokens lie `stride` numbers apart; out [n, heads, dim]. Rows of
// `tiles` [num_tiles, 4]: a frame's first and last token + 1, a first query and how many there are.
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
