// Attention over bf16 pages by products of tiles (Intel AMX): what a core computes in a cycle is an
// order of magnitude more than with vectors, so that many query rows cost hardly more than one.
//
// A tile is 16 rows of 64 bytes. Scores are K (16 keys x 32 elements, as they lie) times q (pairs
// of elements by query row, `tile_place`), a tile of [key, query row]. The weighted sum is p times
// V, for which pairs of V's rows are interleaved once a block of keys. p is the sum of two bf16
// numbers, so it keeps 16 bits; all products are exact and their sums in fp32.
#pragma once

#include <algorithm>

#include "host_attention_simd.h"

#if defined(__x86_64__) && (defined(HA_AMX_EMULATE) || __GNUC__ >= 11 || \
                            (defined(__clang__) && __clang_major__ >= 12))
#define HA_AMX
#endif

namespace host_attention {

constexpr int kTileRows = 16;

// Where element d of query row `row` of a head lies in the q of tiles: blocks of 16 rows, in each
// the pairs of elements, of each pair the rows. A sum of what the row and the element add.
inline int64_t tile_place(int64_t row, int64_t d, int64_t q_stride) {
  return (row / kTileRows * (q_stride / 2) + d / 2) * 2 * kTileRows + row % kTileRows * 2 + d % 2;
}

#if defined(HA_AMX)

namespace amx {

#if defined(HA_AMX_EMULATE)
// The same on vectors, element by element: for tests on machines without tiles.
#define HA_FN __attribute__((target(                                                            \
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) static inline

struct Tiles {
  uint8_t config[64];
  uint8_t rows[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles held;
  return held;
}
inline int rows_of(int t) { return tiles().config[48 + t]; }
inline int bytes_of(int t) { return tiles().config[16 + 2 * t]; }
inline void configure(const void* config) {
  std::memset(&tiles(), 0, sizeof(Tiles));
  std::memcpy(tiles().config, config, 64);
}
inline void release() { std::memset(&tiles(), 0, sizeof(Tiles)); }
template <int T>
inline void tile_zero() {
  std::memset(tiles().rows[T], 0, sizeof(tiles().rows[T]));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int i = 0; i < rows_of(T); ++i) {
    std::memcpy(tiles().rows[T][i], static_cast<const char*>(p) + i * stride, bytes_of(T));
  }
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < rows_of(T); ++i) {
    std::memcpy(static_cast<char*>(p) + i * stride, tiles().rows[T][i], bytes_of(T));
  }
}
template <int C, int A, int B>
inline void tile_dot() {
  for (int m = 0; m < rows_of(C); ++m) {
    for (int k = 0; k < bytes_of(A) / 4; ++k) {
      for (int n = 0; n < bytes_of(C) / 4; ++n) {
        float sum;
        bf16 a[2], b[2];
        std::memcpy(&sum, tiles().rows[C][m] + 4 * n, 4);
        std::memcpy(a, tiles().rows[A][m] + 4 * k, 4);
        std::memcpy(b, tiles().rows[B][k] + 4 * n, 4);
        sum += portable::widen(a[0]) * portable::widen(b[0]);
        sum += portable::widen(a[1]) * portable::widen(b[1]);
        std::memcpy(tiles().rows[C][m] + 4 * n, &sum, 4);
      }
    }
  }
}
#else
#define HA_FN __attribute__((target(                                                            \
    "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) static inline

// Assembly, since the compilers' own functions for it do not tell that memory is read.
HA_FN void configure(const void* config) {
  __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
}
HA_FN void release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
HA_FN void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
HA_FN void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
HA_FN void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
HA_FN void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

using avx512::F;
using avx512::kLanes;
using avx512::kTile;

constexpr int kDepth = 32;      // bf16 of a row of a tile
constexpr int kLine = 64;       // bytes of it, and of a line of the cache
constexpr int kLargestV = 256;  // width of V whose block fits the first-level cache
constexpr int kSteps = kTile / kDepth;
constexpr int kWords = kTileRows * kLine / 4;  // of a tile
constexpr int kParity = kSteps * kWords;       // of the even, or the odd, ones of 32 columns of V
static_assert(kTile % kDepth == 0, "whole tiles");

// Tiles of scores, of K, and of q and V; of results, and both parts of p.
constexpr int kS0 = 0, kS1 = 1, kK = 2, kQ = 3;
constexpr int kV0 = 2, kV1 = 3, kO0 = 4, kO1 = 5, kHigh = 6, kLow = 7;

// As many query rows as vectors serve in one pass are left to them: reading K and V is then most of
// the work, and there the vectors were as fast.
inline bool takes(const Run& run) {
  return run.query_rows > HA_AMX_ABOVE && run.dtype == kBFloat16 && run.head_dim % kDepth == 0 &&
         run.v_head_dim % kDepth == 0 && run.v_head_dim <= kLargestV;
}

// What of the next keys and values is not yet on its way; some more at each step of a block, so
// that memory has as much to do all along.
struct Ahead {
  const char *at, *stop, *then, *then_stop;
  int lines;  // at each step

  HA_FN Ahead of(const Run& run, int64_t row, int steps) {
    const int64_t k_bytes = kTile * run.head_dim * 2, v_bytes = kTile * run.v_head_dim * 2;
    const char* k = static_cast<const char*>(run.k) + row * run.head_dim * 2 + HA_PREFETCH_BYTES;
    const char* v = static_cast<const char*>(run.v) + row * run.v_head_dim * 2 + HA_PREFETCH_BYTES;
    const int64_t all = (k_bytes + v_bytes) / HA_PREFETCH_STRIDE;
    return {k, k + k_bytes, v, v + v_bytes, static_cast<int>((all + steps - 1) / steps)};
  }
  HA_FN void step(Ahead& ahead) {
    for (int line = 0; line < ahead.lines; ++line, ahead.at += HA_PREFETCH_STRIDE) {
      if (ahead.at >= ahead.stop) {
        ahead.at = ahead.then;
        ahead.stop = ahead.then_stop;
        ahead.then = ahead.then_stop;
        if (ahead.at >= ahead.stop) return;
      }
      avx512::prefetch(ahead.at);
    }
  }
};

// Scores of a block of keys with 16 query rows into s[key][query row].
HA_FN void score(const Run& run, const bf16* k, const uint16_t* q, float* s, Ahead& ahead) {
  const int64_t dim = run.head_dim, stride = dim * 2;
  for (int key = 0; key < kTile; key += 2 * kTileRows) {
    tile_zero<kS0>();
    tile_zero<kS1>();
    for (int64_t d = 0; d < dim; d += kDepth) {
      tile_load<kQ>(q + d * kTileRows, kLine);
      tile_load<kK>(k + key * dim + d, stride);
      tile_dot<kS0, kK, kQ>();
      tile_load<kK>(k + (key + kTileRows) * dim + d, stride);
      tile_dot<kS1, kK, kQ>();
      Ahead::step(ahead);
    }
    tile_store<kS0>(s + key * kTileRows, kLine);
    tile_store<kS1>(s + (key + kTileRows) * kTileRows, kLine);
  }
}

// The 16 x 16 numbers at `from`, rows and columns exchanged; the first `count` rows are written.
HA_FN void transpose(const float* from, float* to, int64_t stride, int count) {
  F rows[16], half[16];
  HA_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = avx512::load(from + 16 * i);
  HA_UNROLL
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // rows[4g + c] has column 4l + c of rows 4g .. 4g + 3 in lane l.
  HA_UNROLL
  for (int i = 0; i < 16; i += 4) {
    HA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const __m512d a = _mm512_castps_pd(half[i + c]), b = _mm512_castps_pd(half[i + c + 2]);
      rows[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      rows[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  HA_UNROLL
  for (int c = 0; c < 4; ++c) {
    const F ab_low = _mm512_shuffle_f32x4(rows[c], rows[c + 4], 0x88);
    const F ab_high = _mm512_shuffle_f32x4(rows[c], rows[c + 4], 0xdd);
    const F cd_low = _mm512_shuffle_f32x4(rows[c + 8], rows[c + 12], 0x88);
    const F cd_high = _mm512_shuffle_f32x4(rows[c + 8], rows[c + 12], 0xdd);
    half[c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
    half[c + 8] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
    half[c + 4] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    half[c + 12] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
  }
  HA_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (i < count) avx512::store(to + i * stride, half[i]);
  }
}

// A row of weights as the sum of two rows of bf16.
HA_FN void cut(const float* p, bf16* high, bf16* low) {
  for (int j = 0; j < kTile; j += 2 * kLanes) {
    const F a = avx512::load(p + j), b = avx512::load(p + j + kLanes);
    const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const F left_a = avx512::sub(a, avx512::from_bf16(_mm512_castsi512_si256(bits)));
    const F left_b = avx512::sub(b, avx512::from_bf16(_mm512_extracti64x4_epi64(bits, 1)));
    _mm512_store_si512(high + j, bits);
    _mm512_store_si512(low + j, (__m512i)_mm512_cvtne2ps_pbh(left_b, left_a));
  }
}

// V of a block of keys as tiles: for each 32 columns the even and the odd ones, in each the pairs
// of rows, [columns / 32, 2, keys / 32, 16, 16 pairs].
HA_FN void interleave(const bf16* v, int64_t dim, uint32_t* to, Ahead& ahead) {
  const __mmask32 odd = 0xaaaaaaaa;
  for (int pair = 0; pair < kTile / 2; ++pair) {
    const bf16* row = v + 2 * pair * dim;
    uint32_t* at = to + pair * 16;
    for (int64_t d = 0; d < dim; d += kDepth, at += 2 * kParity) {
      const __m512i a = _mm512_loadu_si512(row + d), b = _mm512_loadu_si512(row + dim + d);
      _mm512_store_si512(at, _mm512_mask_blend_epi16(odd, a, _mm512_slli_epi32(b, 16)));
      _mm512_store_si512(at + kParity, _mm512_mask_blend_epi16(odd, _mm512_srli_epi32(a, 16), b));
    }
    if (pair % 2 != 0) Ahead::step(ahead);
  }
}

// out += p V for the query rows that tiles are configured for.
HA_FN void weigh(
    const Run& run, const bf16* high, const bf16* low, const uint32_t* v, float* out,
    Ahead& ahead) {
  const int64_t stride = run.out_stride * sizeof(float);
  for (int64_t d = 0; d < run.v_head_dim; d += kDepth, v += 2 * kParity) {
    tile_load<kO0>(out + d, stride);
    tile_load<kO1>(out + d + kLanes, stride);
    for (int step = 0; step < kSteps; ++step) {
      tile_load<kHigh>(high + step * kDepth, kTile * sizeof(bf16));
      tile_load<kV0>(v + step * kWords, kLine);
      tile_load<kV1>(v + kParity + step * kWords, kLine);
      tile_dot<kO0, kHigh, kV0>();
      tile_dot<kO1, kHigh, kV1>();
      tile_load<kLow>(low + step * kDepth, kTile * sizeof(bf16));
      tile_dot<kO0, kLow, kV0>();
      tile_dot<kO1, kLow, kV1>();
      Ahead::step(ahead);
    }
    tile_store<kO0>(out + d, stride);
    tile_store<kO1>(out + d + kLanes, stride);
  }
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine, kLine};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Config) == 64, "as ldtilecfg takes it");

// What a block of keys needs, in the first-level cache.
struct alignas(64) Scratch {
  float columns[kTile * kTileRows];  // scores, [key][query row]
  float s[kTileRows * kTile];        // [query row][key]
  bf16 high[kTileRows * kTile], low[kTileRows * kTile];
  uint32_t v[kTile / 2 * kLargestV];
};

HA_FN void set_rows(Config& config, int rows) {
  if (config.rows[kO0] == rows) return;
  for (int t : {kO0, kO1, kHigh, kLow}) config.rows[t] = static_cast<uint8_t>(rows);
  configure(&config);
}

HA_FN void attend_block(const Run& run, int64_t at, Config& config, Scratch& work) {
  const bf16* k = static_cast<const bf16*>(run.k) + at * run.head_dim;
  const bf16* v = static_cast<const bf16*>(run.v) + at * run.v_head_dim;
  // Calls of `step` in the pass of the first query rows.
  const int64_t steps = kTile / (2 * kTileRows) * run.head_dim / kDepth +
                        std::min(run.query_rows, kTileRows) +
                        kTile / 4 + kSteps * run.v_head_dim / kDepth;
  Ahead ahead = Ahead::of(run, at, static_cast<int>(steps));
  for (int row = 0; row < run.query_rows; row += kTileRows) {
    const int rows = std::min(run.query_rows - row, kTileRows);
    const uint16_t* q = static_cast<const uint16_t*>(run.q_pairs) + row * run.q_stride;
    set_rows(config, rows);
    score(run, k, q, work.columns, ahead);
    for (int key = 0; key < kTile; key += 16) {
      transpose(work.columns + key * kTileRows, work.s + key, kTile, rows);
    }
    for (int r = 0; r < rows; ++r) {
      float* s = work.s + r * kTile;
      float* out = run.out + (row + r) * run.out_stride;
      const int hidden = avx512::hidden_keys(run, row + r, at, kTile);
      const float shrink =
          avx512::soften(run, s, kTile, hidden, run.tops + row + r, run.totals + row + r);
      if (shrink != 1.0f) avx512::scale_row(out, run.out_stride, shrink);
      cut(s, work.high + r * kTile, work.low + r * kTile);
      Ahead::step(ahead);
    }
    if (row == 0) interleave(v, run.v_head_dim, work.v, ahead);
    weigh(run, work.high, work.low, work.v, run.out + row * run.out_stride, ahead);
  }
}

// Attend one run of rows, as `attend_run_as` does; keys that fill no block go the way of vectors.
HA_FN void attend_run(const Run& run) {
  Scratch work;
  Config config;
  avx512::clear(run);
  configure(&config);
  int64_t at = 0;
  for (; at + kTile <= run.rows; at += kTile) attend_block(run, at, config, work);
  release();
  if (at < run.rows) {
    avx512::attend_tile<bf16>(run, at, static_cast<int>(run.rows - at), work.s);
  }
}

#undef HA_FN

}  // namespace amx

#endif

}  // namespace host_attention
