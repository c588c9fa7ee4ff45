// Kernels that other kernels call; documented at their definitions.
#pragma once

#include "bf16.h"

void octavo_quantize_rows(const bf16 *x, uint8_t *out, float *scale, long n, long size,
                          int threads);
void octavo_rms_norm(const bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *out, bf16 *sum,
                     long n, long size, float eps, int threads);
void octavo_swiglu(const bf16 *gate_up, bf16 *out, long n, long size, int threads);
void octavo_mrope_write_kv(const bf16 *q, long q_stride, const bf16 *k, const bf16 *v,
                           long kv_stride, const float *cos, const float *sin,
                           const int64_t *slots, bf16 *out, bf16 *k_cache, bf16 *v_cache, long n,
                           long heads, long kv_heads, long dim, long block_size, int threads);
void octavo_linear(const int32_t *x, const int32_t *panels, const bf16 *bias, bf16 *out, long m,
                   long n, long words, int threads);
void octavo_linear_int8(const bf16 *x, const int32_t *panels, const bf16 *bias,
                        const float *column_scale, const int32_t *zero, bf16 *out,
                        uint8_t *numbers, float *row_scale, long m, long n, long words,
                        int threads);
void octavo_paged_attention(const bf16 *q, bf16 *out, const bf16 *k_cache, const bf16 *v_cache,
                            const int32_t *tables, long table_stride, const int32_t *tiles,
                            long num_tiles, long heads, long kv_heads, long dim, long block_size,
                            float scale, int threads);
void octavo_decode_attention(const bf16 *q, bf16 *out, const bf16 *k_cache, const bf16 *v_cache,
                             const int32_t *tables, long table_stride, const int32_t *parts,
                             long num_parts, long heads, long kv_heads, long dim, long block_size,
                             float scale, float *partial, float *lse, int threads);
void octavo_join_parts(bf16 *out, const float *partial, const float *lse, const int32_t *joins,
                       long num_joins, long heads, long dim, int threads);
