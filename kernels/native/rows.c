// Row-wise kernels on bfloat16: norms, activations, rotary embedding, quantization. Results match the
// plain-torch references of the Triton kernels: float32 inside, rounded where transformers rounds.

#include <string.h>

#include "kernels.h"

enum { MIN_PARALLEL = 1 << 14 };  // values; fewer do not pay for a second thread

// Computes sum = x + residual and out = RMSNorm(sum) × weight. Without residual, out = RMSNorm(x) ×
// weight, and sum is not written. x, residual, out, sum [n, size], weight [size].
EXPORT void octavo_rms_norm(const bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *out,
                            bf16 *sum, long n, long size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (n * size > MIN_PARALLEL)
  for (long r = 0; r < n; r++) {
    const bf16 *row = x + r * size;
    bf16 *to = out + r * size;
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
      __mmask16 mask = first(size - i);
      __m512 each = load_first(row + i, mask);
      if (residual) {
        each = rounded(_mm512_add_ps(each, load_first(residual + r * size + i, mask)));
        store_first(sum + r * size + i, mask, each);
      }
      squares = _mm512_fmadd_ps(each, each, squares);
    }
    if (residual) row = sum + r * size;
    float mean = _mm512_reduce_add_ps(squares) / size;
    __m512 scale = _mm512_set1_ps(1 / __builtin_sqrtf(mean + eps));
    for (long i = 0; i < size; i += 16) {
      __mmask16 mask = first(size - i);
      __m512 normed = rounded(_mm512_mul_ps(load_first(row + i, mask), scale));
      store_first(to + i, mask, _mm512_mul_ps(normed, load_first(weight + i, mask)));
    }
  }
}

// Computes silu(gate) × up [n, size] of gate_up [n, 2 size].
EXPORT void octavo_swiglu(const bf16 *gate_up, bf16 *out, long n, long size, int threads) {
#pragma omp parallel for num_threads(threads) if (n * size > MIN_PARALLEL)
  for (long r = 0; r < n; r++)
    for (long i = 0; i < size; i += 16) {
      __mmask16 mask = first(size - i);
      __m512 gate = load_first(gate_up + 2 * r * size + i, mask);
      __m512 up = load_first(gate_up + (2 * r + 1) * size + i, mask);
      __m512 active = rounded(_mm512_mul_ps(gate, sigmoid(gate, 1)));
      store_first(out + r * size + i, mask, _mm512_mul_ps(active, up));
    }
}

// Computes x × sigmoid(1.702 x) of `count` values in place.
EXPORT void octavo_quick_gelu(bf16 *x, long count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > MIN_PARALLEL)
  for (long i = 0; i < count; i += 16) {
    __mmask16 mask = first(count - i);
    __m512 each = load_first(x + i, mask);
    __m512 share = rounded(sigmoid(rounded(_mm512_mul_ps(each, _mm512_set1_ps(1.702f))), 1));
    store_first(x + i, mask, _mm512_mul_ps(each, share));
  }
}

// Rotates a head of `dim` values: value i is paired with i + dim / 2.
INLINE void rotate_head(const bf16 *x, bf16 *out, const float *cos, const float *sin, long dim) {
  long half = dim / 2;
  for (long i = 0; i < half; i += 16) {
    __mmask16 mask = first(half - i);
    __m512 a = load_first(x + i, mask), b = load_first(x + half + i, mask);
    __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
    store_first(out + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store_first(out + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

// Rotates the heads of x [n, heads, dim] in place by cos and sin [n, dim / 2]. `stride`: values
// between tokens.
EXPORT void octavo_rotate(bf16 *x, long stride, const float *cos, const float *sin, long n,
                          long heads, long dim, int threads) {
#pragma omp parallel for num_threads(threads) if (n * heads * dim > MIN_PARALLEL)
  for (long token = 0; token < n; token++)
    for (long head = 0; head < heads; head++) {
      bf16 *at = x + token * stride + head * dim;
      rotate_head(at, at, cos + token * dim / 2, sin + token * dim / 2, dim);
    }
}

// Rotates queries into out [n, heads, dim], and writes rotated keys and the values to their slots of
// the caches [blocks, kv_heads, block_size, dim]; slot -1 writes nothing. q [n, heads, dim], k and v
// [n, kv_heads, dim]; `q_stride` and `kv_stride`: values between tokens.
EXPORT void octavo_mrope_write_kv(const bf16 *q, long q_stride, const bf16 *k, const bf16 *v,
                                  long kv_stride, const float *cos, const float *sin,
                                  const int64_t *slots, bf16 *out, bf16 *k_cache, bf16 *v_cache,
                                  long n, long heads, long kv_heads, long dim, long block_size,
                                  int threads) {
#pragma omp parallel for num_threads(threads) if (n * heads * dim > MIN_PARALLEL)
  for (long token = 0; token < n; token++) {
    const float *c = cos + token * dim / 2, *s = sin + token * dim / 2;
    for (long head = 0; head < heads; head++)
      rotate_head(q + token * q_stride + head * dim, out + (token * heads + head) * dim, c, s, dim);
    long block = slots[token] / block_size, offset = slots[token] % block_size;
    for (long head = 0; head < kv_heads && slots[token] >= 0; head++) {
      long to = ((block * kv_heads + head) * block_size + offset) * dim;
      rotate_head(k + token * kv_stride + head * dim, k_cache + to, c, s, dim);
      memcpy(v_cache + to, v + token * kv_stride + head * dim, dim * sizeof(bf16));
    }
  }
}

// Quantizes rows of x [n, size] to [1, 255] with zero point 128; scale [n].
EXPORT void octavo_quantize_rows(const bf16 *x, uint8_t *out, float *scale, long n, long size,
                                 int threads) {
#pragma omp parallel for num_threads(threads) if (n * size > MIN_PARALLEL)
  for (long r = 0; r < n; r++) {
    const bf16 *row = x + r * size;
    __m512 largest = _mm512_set1_ps(1.17549435e-38f);
    for (long i = 0; i < size; i += 16)
      largest = _mm512_max_ps(largest, _mm512_abs_ps(load_first(row + i, first(size - i))));
    float top = _mm512_reduce_max_ps(largest);
    scale[r] = top / 127;
    __m512 factor = _mm512_set1_ps(127 / top);
    for (long i = 0; i < size; i += 16) {
      __mmask16 mask = first(size - i);
      __m512i each = _mm512_cvtps_epi32(_mm512_mul_ps(load_first(row + i, mask), factor));
      each = _mm512_add_epi32(each, _mm512_set1_epi32(128));
      _mm_mask_storeu_epi8(out + r * size + i, mask, _mm512_cvtepi32_epi8(each));
    }
  }
}

// Returns whether this CPU has the instructions. Compiled for any x86-64.
__attribute__((target("arch=x86-64"))) EXPORT int octavo_runs_here(void) {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
