// Which instruction set attends: the best of the machine, the one that is fastest, and one by name.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "host_attention_amx.h"
#include "host_attention_simd.h"

namespace host_attention {

// Levels in rising order; a machine that runs one runs those before it.
enum Level : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Where element d of a row of `dim` lies in q and out of bf16 pages: in each whole pair of vectors
// the even elements come before the odd ones.
inline int64_t place(Level level, int64_t d, int64_t dim) {
  const int64_t lanes = level >= kAvx512 ? 16 : level == kAvx2 ? 8 : 4;
  const int64_t at = d % (2 * lanes), first = d - at;
  return first + 2 * lanes > dim ? d : first + at / 2 + at % 2 * lanes;
}

// Whether the processor has tiles and the kernel lets this process use them: 8 KiB of state a
// thread that Linux saves for those alone that asked (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline bool have_tiles() {
#if defined(HA_AMX_EMULATE)
  return true;
#elif defined(HA_AMX) && defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16_tiles = (d >> 22 & 1) && (d >> 24 & 1);
    return bf16_tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

inline Level best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!wide) return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  return have_tiles() ? kAmx : kAvx512Bf16;
#else
  return kPortable;
#endif
}

// The level that is fastest. Products of bf16 pairs take Intel's cores four micro-operations of two
// cycles (LLVM's X86SchedSapphireRapids), twice the time of the same products in fp32.
inline Level usual_level() {
  const Level best = best_level();
#if defined(__x86_64__)
  if (best == kAvx512Bf16 && __builtin_cpu_is("intel")) return kAvx512;
#endif
  return best;
}

inline void attend_run([[maybe_unused]] Level level, const Run& run) {
#if defined(__x86_64__)
#if defined(HA_AMX)
  if (level == kAmx && amx::takes(run)) return amx::attend_run(run);
#endif
  if (level == kAmx) level = kAvx512;
  if (level == kAvx512Bf16) return avx512bf16::attend_run(run);
  if (level == kAvx512) return avx512::attend_run(run);
  if (level == kAvx2) return avx2::attend_run(run);
#endif
  portable::attend_run(run);
}

inline float read_run([[maybe_unused]] Level level, const Run& run) {
#if defined(__x86_64__)
  if (level >= kAvx512) return avx512::read_run(run);
  if (level == kAvx2) return avx2::read_run(run);
#endif
  return portable::read_run(run);
}

}  // namespace host_attention
