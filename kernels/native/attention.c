// Attention with bfloat16 dot products: of chunks over a paged cache, whose blocks are read where
// they lie (rows of one token: decode.c), and inside the frames of a vision tower. Source:
// FlashAttention-2 (Dao, 2023).
//
// A tile is a few query tokens with the heads of one KV head: its rows share every key. Keys come
// KEYS at a time: scores, their weights by a running maximum, and the weighted sum of values.
// A row's result depends on its own keys alone, in their order: not on what else is in the batch.

#include <float.h>
#include <string.h>

#include "product.h"

enum { ROWS = 96, KEYS = 64, MOST_DIM = 128 };

// The memory of one thread.
typedef struct {
  bf16 q[ROWS * MOST_DIM], weights[ROWS * KEYS], keys[KEYS * MOST_DIM], values[KEYS * MOST_DIM];
  float scores[ROWS * KEYS], sum[ROWS * MOST_DIM], top[ROWS], total[ROWS], fade[ROWS];
} Scratch;

static _Thread_local Scratch scratch __attribute__((aligned(64)));
static const bf16 zeros[MOST_DIM];

// Turns one row's scores into weights. `seen` of the KEYS keys are its own.
static void weigh(Scratch *s, long row, long seen, float scale) {
  const float *scores = s->scores + row * KEYS;
  __m512 each[KEYS / 16], most = _mm512_set1_ps(-FLT_MAX);
#pragma GCC unroll 4
  for (int i = 0; i < KEYS / 16; i++) {
    each[i] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(scale));
    if (seen < KEYS) {
      __mmask16 own = seen > 16 * i ? first(seen - 16 * i) : 0;
      each[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-FLT_MAX), own, each[i]);
    }
    most = _mm512_max_ps(most, each[i]);
  }
  float top = _mm512_reduce_max_ps(most);
  if (top < s->top[row]) top = s->top[row];
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < KEYS / 16; i++) {
    each[i] = exp2_16(_mm512_sub_ps(each[i], _mm512_set1_ps(top)));
    if (seen < KEYS) each[i] = _mm512_maskz_mov_ps(seen > 16 * i ? first(seen - 16 * i) : 0, each[i]);
    sum = _mm512_add_ps(sum, each[i]);
    store(s->weights + row * KEYS + 16 * i, each[i]);
  }
  float fade = _mm512_cvtss_f32(exp2_16(_mm512_set1_ps(s->top[row] - top)));
  s->top[row] = top;
  s->fade[row] = fade;
  s->total[row] = s->total[row] * fade + _mm512_reduce_add_ps(sum);
}

// Where KEYS keys and values lie.
typedef struct {
  const bf16 *keys[KEYS], *values[KEYS];  // one after the other
} Lines;

static void begin(Scratch *s, long rows, long dim) {
  for (long r = 0; r < rows; r++) s->top[r] = -FLT_MAX, s->total[r] = 0;
  memset(s->sum, 0, rows * dim * sizeof(float));
}

// Adds KEYS keys and values to `rows` rows, while the next ones come from memory. Row r sees
// `seen` + r / group keys; where `group` is 0, `seen`.
static void add_keys(Scratch *s, long rows, long group, long dim, const Lines *lines,
                     const Lines *next, long seen, float scale) {
  Ahead ahead = {next ? next->keys : 0, next ? 2 * KEYS : 0, dim, 0, 0};
  pair_transposed(KEYS, dim, lines->keys, &ahead, s->keys);
  product(rows, KEYS, dim, s->q, dim, s->keys, KEYS, s->scores, KEYS, 0, &ahead);
  for (long r = 0; r < rows; r++) weigh(s, r, group ? seen + r / group : seen, scale);
  pair_rows(KEYS, dim, lines->values, &ahead, s->values);
  product(rows, dim, KEYS, s->weights, KEYS, s->values, dim, s->sum, dim, s->fade, &ahead);
}

static void write_row(const Scratch *s, long row, long dim, bf16 *out) {
  __m512 share = _mm512_set1_ps(1 / s->total[row]);
  for (long i = 0; i < dim; i += 16)
    store(out + i, _mm512_mul_ps(_mm512_loadu_ps(s->sum + row * dim + i), share));
}

// A part of a chunk's attention with one KV head: `count` tokens from `token` on, over the request's
// first `end` keys. The first token sees `seen` of them, each next one more.
typedef struct {
  int32_t row, token, count, head, end, seen;
} Tile;

typedef struct {
  const bf16 *k_cache, *v_cache;
  const int32_t *tables;
  long table_stride, heads, kv_heads, dim, block_size, group;
} Cache;

// Where a tile's keys from `at` on lie; those from `end` on are zeros.
static void find_lines(Lines *lines, const Cache *c, const Tile *t, long at) {
  const int32_t *table = c->tables + t->row * c->table_stride;
  for (long i = 0; i < KEYS; i++) {
    lines->keys[i] = lines->values[i] = zeros;
    if (at + i >= t->end) continue;
    long block = table[(at + i) / c->block_size] * c->kv_heads + t->head;
    long line = block * c->block_size + (at + i) % c->block_size;
    lines->keys[i] = c->k_cache + line * c->dim;
    lines->values[i] = c->v_cache + line * c->dim;
  }
}

// Row r of a tile is query head r % group of token r / group.
static void attend(const Cache *c, const Tile *t, const bf16 *q, bf16 *out, float scale) {
  Scratch *s = &scratch;
  Lines lines[2];
  long rows = t->count * c->group, token = c->heads * c->dim;
  long from = t->token * token + t->head * c->group * c->dim;
  begin(s, rows, c->dim);
  for (long i = 0; i < t->count; i++)
    memcpy(s->q + i * c->group * c->dim, q + from + i * token, c->group * c->dim * sizeof(bf16));
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
                                   const Tile *tiles, long num_tiles, long heads, long kv_heads,
                                   long dim, long block_size, float scale, int threads) {
  const Cache cache = {k_cache, v_cache, tables,     table_stride,    heads,
                       kv_heads, dim,    block_size, heads / kv_heads};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long i = 0; i < num_tiles; i++) attend(&cache, tiles + i, q, out, scale);
}

// q, k, v [n, heads, dim], whose tokens lie `stride` numbers apart; out [n, heads, dim]. Rows of
// `tiles` [num_tiles, 4]: a frame's first and last token + 1, a first query and how many there are.
EXPORT void octavo_vision_attention(const bf16 *q, const bf16 *k, const bf16 *v, long stride,
                                    bf16 *out, const int32_t *tiles, long num_tiles, long heads,
                                    long dim, float scale, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long item = 0; item < num_tiles * heads; item++) {
    const int32_t *t = tiles + 4 * (item % num_tiles);
    long head = item / num_tiles, count = t[3];
    Scratch *s = &scratch;
    begin(s, count, dim);
    for (long i = 0; i < count; i++)
      memcpy(s->q + i * dim, q + (t[2] + i) * stride + head * dim, dim * sizeof(bf16));
    for (long at = t[0]; at < t[1]; at += KEYS) {
      Lines lines;
      for (long i = 0; i < KEYS; i++) {
        long from = (at + i) * stride + head * dim;
        lines.keys[i] = at + i < t[1] ? k + from : zeros;
        lines.values[i] = at + i < t[1] ? v + from : zeros;
      }
      add_keys(s, count, 0, dim, &lines, 0, t[1] - at, scale);
    }
    for (long i = 0; i < count; i++) write_row(s, i, dim, out + ((t[2] + i) * heads + head) * dim);
  }
}
