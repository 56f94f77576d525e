// Vector types of the instruction sets that the kernel is built for, and the kernel for each.
//
// Functions carry their target as an attribute, so that one compile without -march makes them all
// and `best_level` chooses at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// What a tuning run may set: rows of a tile; how far ahead K and V are prefetched, one line of how
// many bytes, and into which cache (3: first level, 2: second, 0: past them, -1: not at all); tasks
// of a job; above how many query rows tiles (AMX) are taken where there are some.
#ifndef HA_TILE
#define HA_TILE 64
#endif
#ifndef HA_PREFETCH_BYTES
#define HA_PREFETCH_BYTES 16384
#endif
#ifndef HA_PREFETCH_STRIDE
#define HA_PREFETCH_STRIDE 64
#endif
#ifndef HA_AMX_ABOVE
#define HA_AMX_ABOVE 4
#endif
#ifndef HA_TASKS
#define HA_TASKS 512
#endif
#ifndef HA_PREFETCH_LEVEL
#define HA_PREFETCH_LEVEL 2
#endif

#if HA_PREFETCH_LEVEL < 0
#define HA_PREFETCH(p) (void)(p)
#else
#define HA_PREFETCH(p) __builtin_prefetch(p, 0, HA_PREFETCH_LEVEL)
#endif

// Accumulators are arrays that have to end in registers, whatever the compiler thinks of its limits.
#if defined(__clang__)
#define HA_UNROLL _Pragma("unroll")
#else
#define HA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace host_attention {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One run of KV rows of one head, and the query rows that attend it.
struct Run {
  Dtype dtype;
  int64_t item;
  const void* k;
  const void* v;
  int64_t rows;
  int64_t position;  // of the first row, as `starts` counts
  int64_t head_dim;
  int64_t v_head_dim;
  const float* q;         // [query_rows, q_stride], zeros past head_dim; bf16: each d at `place`
  const void* q_pairs;    // the same in bf16 as it is, where the level takes products of pairs
  int64_t q_stride;
  int query_rows;         // query heads of the KV head times query tokens, tokens innermost
  int64_t queries;        // query tokens
  const int64_t* starts;  // [queries] first position that each sees, or null
  float scale;
  float softcap;          // 0: none
  float* out;             // [query_rows, out_stride], not divided by totals; bf16: d at `place`
  int64_t out_stride;
  float* tops;            // [query_rows] largest score
  float* totals;          // [query_rows] sum of exp(score - top)
};

// Prefetches go to the second-level cache: into the first they would drive out the tile in use, and
// twice as slow it was.

namespace portable {

#define HA_FN static inline
constexpr int kLanes = 4;
constexpr int kPairs = 1;
constexpr int kPairsOfOne = 2;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

HA_FN F set1(float x) { return F{x, x, x, x}; }
HA_FN F zero() { return set1(0.0f); }
HA_FN F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
HA_FN void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
HA_FN F fma(F a, F b, F c) { return a * b + c; }
HA_FN F add(F a, F b) { return a + b; }
HA_FN F sub(F a, F b) { return a - b; }
HA_FN F mul(F a, F b) { return a * b; }
HA_FN F div(F a, F b) { return a / b; }
HA_FN F max(F a, F b) {
  const I left = a > b;
  return (F)((left & (I)a) | (~left & (I)b));
}
HA_FN F either(F a, F b) { return (F)((I)a | (I)b); }
HA_FN F zero_where_less(F x, F limit, F y) { return (F)(~(I)(x < limit) & (I)y); }
HA_FN F scale_by_power_of_two(F x, F n) {
  const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  return x * (F)exponent;
}
HA_FN float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
HA_FN float greatest(F x) {
  return std::fmax(std::fmax(x[0], x[1]), std::fmax(x[2], x[3]));
}
HA_FN F sum_each(const F* acc) { return F{sum(acc[0]), sum(acc[1]), sum(acc[2]), sum(acc[3])}; }
HA_FN void prefetch(const void* p) { HA_PREFETCH(p); }
HA_FN float widen(float x) { return x; }
HA_FN float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
HA_FN float widen(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  float out;
  if (rest < 0x0400) {
    out = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24: zero and subnormals
    return sign ? -out : out;
  }
  const uint32_t bits = sign | (rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ffu) << 13
                                               : (rest << 13) + (112u << 23));
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
template <class T>
HA_FN F load_first(const T* p, int count) {
  F x = zero();
  for (int i = 0; i < count; ++i) x[i] = widen(p[i]);
  return x;
}
HA_FN void split(const bf16* p, F* even, F* odd) {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Bits bits;
  std::memcpy(&bits, p, sizeof(bits));
  *even = (F)(bits << 16);
  *odd = (F)(bits & 0xffff0000u);
}
HA_FN F load(const fp16* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }

#include "host_attention_kernel.h"
#undef HA_FN

}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {

#define HA_FN __attribute__((target("avx2,fma,f16c"))) static inline
constexpr int kLanes = 8;
constexpr int kPairs = 1;
constexpr int kPairsOfOne = 4;
using F = __m256;

HA_FN F set1(float x) { return _mm256_set1_ps(x); }
HA_FN F zero() { return _mm256_setzero_ps(); }
HA_FN F load(const float* p) { return _mm256_loadu_ps(p); }
HA_FN F load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
HA_FN void split(const bf16* p, F* even, F* odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}
HA_FN F load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
HA_FN F load_first(const T* p, int count) {
  T held[8];
  std::memset(held, 0, sizeof(held));
  std::memcpy(held, p, count * sizeof(T));
  return load(held);
}
HA_FN void store(float* p, F x) { _mm256_storeu_ps(p, x); }
HA_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
HA_FN F add(F a, F b) { return _mm256_add_ps(a, b); }
HA_FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
HA_FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
HA_FN F div(F a, F b) { return _mm256_div_ps(a, b); }
HA_FN F max(F a, F b) { return _mm256_max_ps(a, b); }
HA_FN F either(F a, F b) { return _mm256_or_ps(a, b); }
HA_FN F zero_where_less(F x, F limit, F y) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y);
}
HA_FN F scale_by_power_of_two(F x, F n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
HA_FN F sum_four(F a, F b, F c, F d) {
  const F ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const F cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d left = _mm256_castps_pd(ab), right = _mm256_castps_pd(cd);
  return add(
      _mm256_castpd_ps(_mm256_unpacklo_pd(left, right)),
      _mm256_castpd_ps(_mm256_unpackhi_pd(left, right)));
}
HA_FN F sum_each(const F* acc) {
  const F low = sum_four(acc[0], acc[1], acc[2], acc[3]);
  const F high = sum_four(acc[4], acc[5], acc[6], acc[7]);
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
HA_FN float sum(F x) {
  alignas(32) float held[8];
  _mm256_store_ps(held, x);
  return ((held[0] + held[1]) + (held[2] + held[3])) + ((held[4] + held[5]) + (held[6] + held[7]));
}
HA_FN float greatest(F x) {
  alignas(32) float held[8];
  _mm256_store_ps(held, x);
  float top = held[0];
  for (int i = 1; i < 8; ++i) top = held[i] > top ? held[i] : top;
  return top;
}
HA_FN void prefetch(const void* p) { HA_PREFETCH(p); }

#include "host_attention_kernel.h"
#undef HA_FN

}  // namespace avx2

// The same primitives for both levels of AVX-512.
#define HA_AVX512_PRIMITIVES                                                                       \
  constexpr int kLanes = 16;                                                                       \
  constexpr int kPairs = 2;                                                                        \
  constexpr int kPairsOfOne = 4;                                                                   \
  using F = __m512;                                                                                \
  HA_FN F set1(float x) { return _mm512_set1_ps(x); }                                              \
  HA_FN F zero() { return _mm512_setzero_ps(); }                                                   \
  HA_FN F load(const float* p) { return _mm512_loadu_ps(p); }                                      \
  HA_FN F from_bf16(__m256i bits) {                                                                \
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));                \
  }                                                                                                \
  HA_FN void split(const bf16* p, F* even, F* odd) {                                               \
    const __m512i bits = _mm512_loadu_si512(p);                                                    \
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));                                      \
    *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));        \
  }                                                                                                \
  HA_FN F load(const fp16* p) {                                                                    \
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));                                 \
  }                                                                                                \
  HA_FN F load_first(const float* p, int count) {                                                  \
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);                               \
  }                                                                                                \
  HA_FN F load_first(const bf16* p, int count) {                                                   \
    return from_bf16(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));                 \
  }                                                                                                \
  HA_FN F load_first(const fp16* p, int count) {                                                   \
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));           \
  }                                                                                                \
  HA_FN void store(float* p, F x) { _mm512_storeu_ps(p, x); }                                      \
  HA_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }                                  \
  HA_FN F add(F a, F b) { return _mm512_add_ps(a, b); }                                            \
  HA_FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }                                            \
  HA_FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }                                            \
  HA_FN F div(F a, F b) { return _mm512_div_ps(a, b); }                                            \
  HA_FN F max(F a, F b) { return _mm512_max_ps(a, b); }                                            \
  HA_FN F either(F a, F b) { return _mm512_or_ps(a, b); }                                          \
  HA_FN F zero_where_less(F x, F limit, F y) {                                                     \
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);                      \
  }                                                                                                \
  HA_FN F scale_by_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }                       \
  HA_FN F sum_four(F a, F b, F c, F d) {                                                           \
    const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));                          \
    const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));                          \
    const __m512d left = _mm512_castps_pd(ab), right = _mm512_castps_pd(cd);                       \
    return add(                                                                                    \
        _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),                                         \
        _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));                                        \
  }                                                                                                \
  HA_FN F sum_halves(F a, F b) {                                                                   \
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));                \
  }                                                                                                \
  HA_FN F sum_each(const F* acc) {                                                                 \
    const F a = sum_four(acc[0], acc[1], acc[2], acc[3]);                                          \
    const F b = sum_four(acc[4], acc[5], acc[6], acc[7]);                                          \
    const F c = sum_four(acc[8], acc[9], acc[10], acc[11]);                                        \
    const F d = sum_four(acc[12], acc[13], acc[14], acc[15]);                                      \
    return sum_halves(sum_halves(a, b), sum_halves(c, d));                                         \
  }                                                                                                \
  HA_FN float sum(F x) { return _mm512_reduce_add_ps(x); }                                         \
  HA_FN float greatest(F x) { return _mm512_reduce_max_ps(x); }                                    \
  HA_FN void prefetch(const void* p) { HA_PREFETCH(p); }

namespace avx512 {

#define HA_FN __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) static inline
HA_AVX512_PRIMITIVES
#include "host_attention_kernel.h"
#undef HA_FN

}  // namespace avx512

namespace avx512bf16 {

#define HA_FN                                                                               \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) \
  static inline
HA_AVX512_PRIMITIVES
using Pairs = __m512bh;
HA_FN Pairs load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
HA_FN Pairs load_pairs_first(const bf16* p, int count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
}
HA_FN F dot_pairs(F acc, Pairs a, Pairs b) { return _mm512_dpbf16_ps(acc, a, b); }
#define HA_DOT
#include "host_attention_kernel.h"
#undef HA_DOT
#undef HA_FN

}  // namespace avx512bf16

#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16 pairs are split by their low half");

}  // namespace host_attention
