// Vectors of 16 bfloat16 values as float32, and functions of them.
#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

INLINE __mmask16 first(long count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE __m512 load(const bf16 *p) { return widen(_mm256_loadu_si256((const void *)p)); }

INLINE void store(bf16 *p, __m512 x) {
  _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x));
}

// Masked access to the first of 16 values; the others read as 0 and are not written.
INLINE __m512 load_first(const bf16 *p, __mmask16 mask) {
  return widen(_mm256_maskz_loadu_epi16(mask, p));
}

INLINE void store_first(bf16 *p, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// Rounds x to bfloat16.
INLINE __m512 rounded(__m512 x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }

// Returns 2^x with a relative error below 2e-6; 0 on underflow.
INLINE __m512 exp2_16(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(x, whole);  // from -0.5 to 0.5
  __m512 y = _mm512_set1_ps(1.3333558e-3f);  // ln(2)^n / n!
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// 1 / (1 + e^(-scale * x))
INLINE __m512 sigmoid(__m512 x, float scale) {
  __m512 below = exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f * scale)));
  return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), below));
}
