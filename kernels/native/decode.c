// Attention of decode rows: one query token over its paged cache, whose blocks are read in place.
// Source: FlashAttention-2 and Flash-Decoding (Dao et al., 2023).
//
// The `group` query heads of a KV head share every key. KEYS keys are processed at a time: scores,
// weights by online softmax, and weighted sum of values, while the next keys are prefetched. Memory and
// compute time are about equal, so the dot products read keys and values without copies and fill the
// registers. Results are batch-invariant: a row depends only on its own keys, in their order.

#include <float.h>
#include <omp.h>
#include <string.h>

#include "kernels.h"

enum { KEYS = 64, MAX_DIM = 128, MAX_GROUP = 96, MAX_ROWS = 6 };

// Buffers of one thread. Queries are interleaved in pairs: 16 dimensions of one, then of the other.
typedef struct {
  bf16 q[MAX_GROUP * MAX_DIM], weights[MAX_GROUP][KEYS];
  float scores[MAX_GROUP][KEYS], sum[MAX_GROUP][MAX_DIM], total[MAX_GROUP][16];
  float top[MAX_GROUP], fade[MAX_GROUP];
} Scratch;

static _Thread_local Scratch scratch __attribute__((aligned(64)));

// Keys [begin, end) of a row. `part` is -1, or the index of a partial result, which
// `octavo_join_parts` combines.
typedef struct {
  int32_t row, token, begin, end, part;
} Part;

typedef struct {
  const bf16 *q, *k_cache, *v_cache;
  bf16 *out;
  const int32_t *tables;
  const Part *parts;
  long table_stride, num_items, heads, kv_heads, dim, block_size, group;
  float scale, *partial, *lse;
} Job;

// Offsets of the keys and values of one step. The last one is repeated after the end.
typedef struct {
  long at[KEYS], count;
} Step;

// Finds the step from key `from` on of an item, which is a part with one KV head.
static void find_step(Step *step, const Job *job, long item, long from) {
  const Part *part = job->parts + item / job->kv_heads;
  const int32_t *table = job->tables + part->row * job->table_stride;
  long left = part->end - from, block = from / job->block_size, offset = from % job->block_size;
  step->count = left < KEYS ? left : KEYS;
  for (long i = 0; i < step->count; i++, offset++) {
    if (offset == job->block_size) block++, offset = 0;
    long line = table[block] * job->kv_heads + item % job->kv_heads;
    step->at[i] = (line * job->block_size + offset) * job->dim;
  }
  for (long i = step->count; i < KEYS; i++) step->at[i] = step->at[step->count - 1];
}

INLINE void fetch(const bf16 *p) { _mm_prefetch((const void *)p, _MM_HINT_T1); }

// Reduces eight vectors of [2 queries, 8 partial sums] to [2 queries, 8 sums].
INLINE __m512 sum_eight(const __m512 *x) {
  __m512 two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                           _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                             _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  return _mm512_shuffle_f32x4(sum, sum, 0xd8);
}

// Computes the scores of eight keys for 2 T queries. `next`: eight keys to prefetch.
INLINE void score_eight(const int T, const bf16 *k, const long *at, const long *next, long dim,
                        const bf16 *q, float *scores) {
  __m512 sum[3][8];
#pragma GCC unroll 3
  for (int t = 0; t < T; t++)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) sum[t][i] = _mm512_setzero_ps();
  for (long d = 0; d < dim; d += 16) {
    __m512bh two[3];
#pragma GCC unroll 3
    for (int t = 0; t < T; t++)
      two[t] = (__m512bh)_mm512_load_si512(q + 2 * (t * dim + d));
    if (next) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) fetch(k + next[d / 16 % 2 * 4 + i] + d / 32 * 32);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      __m512bh key = (__m512bh)_mm512_broadcast_i64x4(_mm256_loadu_si256((void *)(k + at[i] + d)));
#pragma GCC unroll 3
      for (int t = 0; t < T; t++) sum[t][i] = _mm512_dpbf16_ps(sum[t][i], two[t], key);
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < T; t++) {
    __m512 two = sum_eight(sum[t]);
    _mm256_storeu_ps(scores + 2 * t * KEYS, _mm512_castps512_ps256(two));
    _mm256_storeu_ps(scores + (2 * t + 1) * KEYS, _mm512_extractf32x8_ps(two, 1));
  }
}

INLINE void score_step(const int T, const bf16 *k, const Step *step, const Step *next, long dim,
                       const bf16 *q, float *scores) {
  for (long i = 0; i < step->count; i += 8)
    score_eight(T, k, step->at + i, next ? next->at + i : 0, dim, q, scores + i);
}

// Converts a row's scores of a step to weights.
static void weigh(Scratch *s, long row, long count, float scale) {
  const float *scores = s->scores[row];
  __m512 each[KEYS / 16], none = _mm512_set1_ps(-FLT_MAX), largest = none;
#pragma GCC unroll 4
  for (int i = 0; i < KEYS / 16; i++) {
    __mmask16 own = count > 16 * i ? first(count - 16 * i) : 0;
    each[i] = _mm512_mask_mul_ps(none, own, _mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(scale));
    largest = _mm512_max_ps(largest, each[i]);
  }
  float top = _mm512_reduce_max_ps(largest);
  if (top < s->top[row]) top = s->top[row];
  float fade = _mm512_cvtss_f32(exp2_16(_mm512_set1_ps(s->top[row] - top)));
  __m512 total = _mm512_mul_ps(_mm512_loadu_ps(s->total[row]), _mm512_set1_ps(fade));
#pragma GCC unroll 4
  for (int i = 0; i < KEYS / 16; i++) {
    __m512 weight = exp2_16(_mm512_sub_ps(each[i], _mm512_set1_ps(top)));
    total = _mm512_add_ps(total, weight);
    store(s->weights[row] + 16 * i, weight);
  }
  _mm512_storeu_ps(s->total[row], total);
  s->top[row] = top;
  s->fade[row] = fade;
}

// Adds a step's weighted values to R rows and 64 columns from `column` on.
INLINE void add_values(const int R, const bf16 *v, const Step *step, const Step *next, long dim,
                       long column, Scratch *s, long row) {
  __m512 sum[MAX_ROWS][4];
  long wide = dim - column;
  __mmask32 low = wide >= 32 ? ~0u : 0xffff, high = wide >= 64 ? ~0u : wide > 32 ? 0xffff : 0;
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int z = 0; z < 4; z++)
      sum[r][z] = _mm512_mul_ps(_mm512_loadu_ps(s->sum[row + r] + column + 16 * z),
                                _mm512_set1_ps(s->fade[row + r]));
  v += column;
  for (long i = 0; i < step->count; i += 2) {
    const bf16 *p = v + step->at[i], *o = v + step->at[i + 1];
    if (next) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        fetch(v + next->at[i + j]);
        fetch(v + next->at[i + j] + 32);
      }
    }
    __m512i a = _mm512_maskz_loadu_epi16(low, p), b = _mm512_maskz_loadu_epi16(low, o);
    __m512i c = _mm512_maskz_loadu_epi16(high, p + 32), d = _mm512_maskz_loadu_epi16(high, o + 32);
    __m512bh pairs[4] = {
        (__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b),
        (__m512bh)_mm512_unpacklo_epi16(c, d), (__m512bh)_mm512_unpackhi_epi16(c, d)};
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512bh weight = (__m512bh)_mm512_set1_epi32(*(const int *)(s->weights[row + r] + i));
#pragma GCC unroll 4
      for (int z = 0; z < 4; z++) sum[r][z] = _mm512_dpbf16_ps(sum[r][z], weight, pairs[z]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int z = 0; z < 4; z++) _mm512_storeu_ps(s->sum[row + r] + column + 16 * z, sum[r][z]);
}

INLINE void add_rows(const int R, const bf16 *v, const Step *step, const Step *next, long dim,
                     Scratch *s, long row) {
  for (long column = 0; column < dim; column += 64)
    add_values(R, v, step, next, dim, column, s, row);
}

// Computes a step's scores of at most MAX_ROWS query heads from `row` on, which fit in registers.
static void score_some(const Job *job, Scratch *s, long row, long rows, const Step *step,
                       const Step *next) {
  const bf16 *q = s->q + row * job->dim;
  switch ((rows + 1) / 2) {
    case 1: score_step(1, job->k_cache, step, next, job->dim, q, s->scores[row]); break;
    case 2: score_step(2, job->k_cache, step, next, job->dim, q, s->scores[row]); break;
    case 3: score_step(3, job->k_cache, step, next, job->dim, q, s->scores[row]); break;
  }
}

static void add_some(const Job *job, Scratch *s, long row, long rows, const Step *step,
                     const Step *next) {
  switch (rows) {
    case 1: add_rows(1, job->v_cache, step, next, job->dim, s, row); break;
    case 2: add_rows(2, job->v_cache, step, next, job->dim, s, row); break;
    case 3: add_rows(3, job->v_cache, step, next, job->dim, s, row); break;
    case 4: add_rows(4, job->v_cache, step, next, job->dim, s, row); break;
    case 5: add_rows(5, job->v_cache, step, next, job->dim, s, row); break;
    case 6: add_rows(6, job->v_cache, step, next, job->dim, s, row); break;
  }
}

// Returns the query heads per pass: balanced over the passes, and even, since queries are in pairs.
static long together(long group) {
  long times = (group + MAX_ROWS - 1) / MAX_ROWS, some = (group + times - 1) / times;
  return some + some % 2;
}

static void begin(Scratch *s, const Job *job, const Part *part, long kv_head) {
  const bf16 *q = job->q + (part->token * job->heads + kv_head * job->group) * job->dim;
  for (long r = 0; r < job->group; r++) {
    s->top[r] = -FLT_MAX;
    memset(s->total[r], 0, sizeof(s->total[r]));
    memset(s->sum[r], 0, sizeof(s->sum[r]));
    for (long d = 0; d < job->dim; d += 16)
      memcpy(s->q + r / 2 * 2 * job->dim + 2 * d + r % 2 * 16, q + r * job->dim + d,
             16 * sizeof(bf16));
  }
}

// Normalizes and writes the sums. `order` restores the order of columns: of every eight, `add_values`
// leaves the first four in one vector and the last four in the other.
static void finish(const Scratch *s, const Job *job, const Part *part, long kv_head) {
  static const int order[32] __attribute__((aligned(64))) = {
      0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
      8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  for (long r = 0; r < job->group; r++) {
    long head = kv_head * job->group + r;
    float total = _mm512_reduce_add_ps(_mm512_loadu_ps(s->total[r]));
    __m512 share = _mm512_set1_ps(1 / total);
    for (long d = 0; d < job->dim; d += 16) {
      const float *pair = s->sum[r] + d / 32 * 32;
      __m512 x = _mm512_permutex2var_ps(_mm512_loadu_ps(pair),
                                        _mm512_load_si512(order + d % 32),
                                        _mm512_loadu_ps(pair + 16));
      x = _mm512_mul_ps(x, share);
      if (part->part < 0) store(job->out + (part->token * job->heads + head) * job->dim + d, x);
      else _mm512_storeu_ps(job->partial + (part->part * job->heads + head) * job->dim + d, x);
    }
    if (part->part >= 0) job->lse[part->part * job->heads + head] = s->top[r] + __builtin_log2f(total);
  }
}

// `step` is the item's first step; it is replaced by the first step of item `following`.
static void attend(const Job *job, long item, long following, Step *step) {
  Scratch *s = &scratch;
  const Part *part = job->parts + item / job->kv_heads;
  long kv_head = item % job->kv_heads, some = together(job->group);
  begin(s, job, part, kv_head);
  for (long at = part->begin; at < part->end; at += KEYS) {
    Step later, *next = 0;
    if (at + KEYS < part->end) find_step(next = &later, job, item, at + KEYS);
    else if (following < job->num_items)
      find_step(next = &later, job, following, job->parts[following / job->kv_heads].begin);
    for (long r = 0; r < job->group; r += some)
      score_some(job, s, r, job->group - r < some ? job->group - r : some, step, r ? 0 : next);
    for (long r = 0; r < job->group; r++) weigh(s, r, step->count, job->scale);
    for (long r = 0; r < job->group; r += some)
      add_some(job, s, r, job->group - r < some ? job->group - r : some, step, r ? 0 : next);
    if (next) *step = later;
  }
  finish(s, job, part, kv_head);
}

// q, out [n, heads, dim]; caches [blocks, kv_heads, block_size, dim]; tables [rows, table_stride];
// partial [parts, heads, dim] and lse [parts, heads] of parts that do not cover a whole row.
EXPORT void octavo_decode_attention(const bf16 *q, bf16 *out, const bf16 *k_cache,
                                    const bf16 *v_cache, const int32_t *tables, long table_stride,
                                    const int32_t *parts, long num_parts, long heads, long kv_heads,
                                    long dim, long block_size, float scale, float *partial,
                                    float *lse, int threads) {
  const Job job = {
      .q = q, .k_cache = k_cache, .v_cache = v_cache, .out = out, .tables = tables,
      .parts = (const Part *)parts, .table_stride = table_stride, .num_items = num_parts * kv_heads,
      .heads = heads, .kv_heads = kv_heads, .dim = dim, .block_size = block_size,
      .group = heads / kv_heads, .scale = scale, .partial = partial, .lse = lse};
  long claimed;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    claimed = omp_get_num_threads();
    Step step;
    long item = omp_get_thread_num(), following;
    if (item < job.num_items) find_step(&step, &job, item, job.parts[item / kv_heads].begin);
    for (; item < job.num_items; item = following) {
      following = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
      attend(&job, item, following, &step);
    }
  }
}

// Combines parts. Rows of `joins` [num_joins, 3]: token, first part, number of parts.
EXPORT void octavo_join_parts(bf16 *out, const float *partial, const float *lse,
                              const int32_t *joins, long num_joins, long heads, long dim,
                              int threads) {
#pragma omp parallel for num_threads(threads)
  for (long item = 0; item < num_joins * heads; item++) {
    const int32_t *join = joins + 3 * (item / heads);
    long head = item % heads;
    float top = -FLT_MAX, total = 0, sum[MAX_DIM] = {0};
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
