// The kernels for every instruction set that a processor of this architecture may have.
#include "sets.h"

#include "coefficients.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MLIP_MD_X86 1
#endif

#define MLIP_MD_SET portable
#define MLIP_MD_BYTES 16
#ifdef MLIP_MD_X86  // processors that have no more are few
#define MLIP_MD_BRIEF
#endif
#include "kernels.h"
#undef MLIP_MD_SET
#undef MLIP_MD_BYTES
#undef MLIP_MD_BRIEF

#ifdef MLIP_MD_X86
#ifdef __clang__
#define MLIP_MD_PRAGMA(text) _Pragma(#text)
#define MLIP_MD_BEGIN(names) \
  MLIP_MD_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define MLIP_MD_END _Pragma("clang attribute pop")
#else
#define MLIP_MD_PRAGMA(text) _Pragma(#text)
#define MLIP_MD_BEGIN(names) _Pragma("GCC push_options") MLIP_MD_PRAGMA(GCC target(names))
#define MLIP_MD_END _Pragma("GCC pop_options")
#endif

MLIP_MD_BEGIN("avx2,fma")
#define MLIP_MD_SET avx2
#define MLIP_MD_BYTES 32
#include "kernels.h"
#undef MLIP_MD_SET
#undef MLIP_MD_BYTES
MLIP_MD_END

#ifndef MLIP_MD_NO_AVX512
MLIP_MD_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define MLIP_MD_SET avx512
#define MLIP_MD_BYTES 64
#include "kernels.h"
#undef MLIP_MD_SET
#undef MLIP_MD_BYTES
MLIP_MD_END
#endif
#endif

namespace mlip_md {

int best_level() {
#ifdef MLIP_MD_X86
  __builtin_cpu_init();
#ifndef MLIP_MD_NO_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return 2;
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const char* level_name(int level) {
#ifdef MLIP_MD_X86
  static const char* const names[] = {"SSE2", "AVX2", "AVX-512"};
  return names[level];
#else
  return level == 0 ? "portable" : "";
#endif
}

int coupling_index(int l1, int l2, int l3) {
  static constexpr int degrees[][3] = {
#define MLIP_MD_DEGREES(l1, l2, l3) {l1, l2, l3},
      MLIP_MD_WRITTEN_OUT(MLIP_MD_DEGREES) MLIP_MD_OTHERS(MLIP_MD_DEGREES)
#undef MLIP_MD_DEGREES
  };
  constexpr int number = sizeof(degrees) / sizeof(degrees[0]);
  for (int i = 0; i < number; ++i)
    if (degrees[i][0] == l1 && degrees[i][1] == l2 && degrees[i][2] == l3) return i;
  return -1;
}

template <class T>
Set<T> kernel_set(int level) {
#ifdef MLIP_MD_X86
#ifndef MLIP_MD_NO_AVX512
  if (level == 2) return avx512::set<T>();
#endif
  if (level == 1) return avx2::set<T>();
#endif
  return portable::set<T>();
}
template Set<float> kernel_set<float>(int);
template Set<double> kernel_set<double>(int);

}  // namespace mlip_md
