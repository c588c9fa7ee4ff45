// All decoder layers over few rows in one call. A layer takes a few milliseconds, of which Python
// code between the kernels would take a tenth.

#include <omp.h>

#include "kernels.h"

typedef struct {
  const int32_t *panels;
  const bf16 *bias;    // [n], or NULL
  const float *scale;  // [n] for int8, else NULL
  const int32_t *zero; // [n] for int8
  long n, words;
} Linear;

typedef struct {
  const bf16 *input_norm, *post_norm;
  Linear qkv, o, gate_up, down;
  bf16 *k_cache, *v_cache;
} Layer;

// Arguments shared by all layers of a step of `rows` rows. Each layer overwrites the buffers from
// `residual` on. `seconds`, if not NULL, is incremented by the time of products and of attention.
typedef struct {
  long rows, size, heads, kv_heads, dim, block_size;
  float eps, scale;
  const float *cos, *sin;
  const int64_t *slots;
  const int32_t *tables, *tiles, *parts, *joins;
  long table_stride, num_tiles, num_parts, num_joins;
  double *seconds;
  bf16 *residual, *x, *normed, *qkv, *q, *attended, *gate_up, *active;
  uint8_t *numbers;
  float *row_scale, *partial, *lse;
} Step;

static void linear(const Step *s, const Linear *l, const bf16 *x, bf16 *out, int threads) {
  double began = omp_get_wtime();
  if (l->scale)
    octavo_linear_int8(x, l->panels, l->bias, l->scale, l->zero, out, s->numbers, s->row_scale,
                       s->rows, l->n, l->words, threads);
  else
    octavo_linear((const int32_t *)x, l->panels, l->bias, out, s->rows, l->n, l->words, threads);
  if (s->seconds) s->seconds[0] += omp_get_wtime() - began;
}

static void attend(const Step *s, const Layer *l, int threads) {
  double began = omp_get_wtime();
  if (s->num_tiles)
    octavo_paged_attention(s->q, s->attended, l->k_cache, l->v_cache, s->tables, s->table_stride,
                           s->tiles, s->num_tiles, s->heads, s->kv_heads, s->dim, s->block_size,
                           s->scale, threads);
  octavo_decode_attention(s->q, s->attended, l->k_cache, l->v_cache, s->tables, s->table_stride,
                          s->parts, s->num_parts, s->heads, s->kv_heads, s->dim, s->block_size,
                          s->scale, s->partial, s->lse, threads);
  octavo_join_parts(s->attended, s->partial, s->lse, s->joins, s->num_joins, s->heads, s->dim,
                    threads);
  if (s->seconds) s->seconds[1] += omp_get_wtime() - began;
}

static void layer(const Step *s, const Layer *l, const bf16 *x, int threads) {
  octavo_rms_norm(x ? x : s->residual, x ? s->residual : 0, l->input_norm, s->normed, s->residual,
                  s->rows, s->size, s->eps, threads);
  linear(s, &l->qkv, s->normed, s->qkv, threads);
  const bf16 *k = s->qkv + s->heads * s->dim, *v = k + s->kv_heads * s->dim;
  octavo_mrope_write_kv(s->qkv, l->qkv.n, k, v, l->qkv.n, s->cos, s->sin, s->slots, s->q,
                        l->k_cache, l->v_cache, s->rows, s->heads, s->kv_heads, s->dim,
                        s->block_size, threads);
  attend(s, l, threads);
  linear(s, &l->o, s->attended, s->x, threads);
  octavo_rms_norm(s->x, s->residual, l->post_norm, s->normed, s->residual, s->rows, s->size,
                  s->eps, threads);
  linear(s, &l->gate_up, s->normed, s->gate_up, threads);
  octavo_swiglu(s->gate_up, s->active, s->rows, l->gate_up.n / 2, threads);
  linear(s, &l->down, s->active, s->x, threads);
}

// `residual` holds the step's embeddings [rows, size]. At the end it holds the residual, to which the
// caller adds x, the last layer's output.
EXPORT void octavo_decoder_layers(const Layer *layers, long num_layers, const Step *step,
                                  int threads) {
  for (long i = 0; i < num_layers; i++) layer(step, layers + i, i ? step->x : 0, threads);
}
