// Shared by the CPU kernels: AVX2, where the processor has it, enabled function by function.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SAGA_AVX2 1
#include <immintrin.h>
#define SAGA_TARGET __attribute__((target("avx2,fma")))
#define SAGA_INLINE __attribute__((target("avx2,fma"), always_inline))  // a lambda inherits neither from its function
#endif

namespace saga {

#ifdef SAGA_AVX2

inline bool has_avx2() {
  static const bool known = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return known;
}

// e^x of eight numbers to 1e-7 of each; 0 below -87.3, where float32 has no normal number left; of more than 88, e^88.
SAGA_TARGET static inline __m256 exp(__m256 x) {
  const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
  x = _mm256_min_ps(_mm256_set1_ps(88.0f), x);  // in this order nan stays nan
  // x = n log 2 + r, log 2 in two parts (Cody and Waite), and the Taylor polynomial of e^r for |r| <= log(2) / 2.
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  }
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

SAGA_TARGET static inline float sum(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

SAGA_TARGET static inline float max(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

struct Eight {
  SAGA_TARGET __m256 load(const float* from) const { return _mm256_loadu_ps(from); }
  SAGA_TARGET void store(float* to, __m256 x) const { _mm256_storeu_ps(to, x); }
};

// Fewer than eight, the end of a row: numbers past it are read as 0 and not written.
struct Tail {
  SAGA_TARGET explicit Tail(int64_t n)
      : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  SAGA_TARGET __m256 load(const float* from) const { return _mm256_maskload_ps(from, mask); }
  SAGA_TARGET void store(float* to, __m256 x) const { _mm256_maskstore_ps(to, mask, x); }
  const __m256i mask;
};

// body(i, lanes) for n numbers from i = 0, eight at a time; it loads and stores them by `lanes`.
template <class Body>
SAGA_INLINE inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) body(i, Eight{});
  if (i < n) body(i, Tail(n - i));
}

// The sum over n numbers of term(i, lanes), in 32 partial sums.
template <class Term>
SAGA_INLINE inline float vector_sum(int64_t n, const Term& term) {
  __m256 sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int k = 0; k < 4; ++k) sums[k] += term(i + 8 * k, Eight{});
  }
  for_vectors(n - i, [&](int64_t j, const auto& lanes) SAGA_INLINE { sums[0] += term(i + j, lanes); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

#else
inline bool has_avx2() { return false; }
#endif

}  // namespace saga
