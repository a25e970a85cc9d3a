#pragma once
#include "problem.h"

namespace mlip_md {

// The largest level of instructions that this processor has: 0 portable, 1 AVX2, 2 AVX-512.
int best_level();
const char* level_name(int level);

// Kernels of a level, which must not be above the best.
template <class T>
Set<T> kernel_set(int level);

}  // namespace mlip_md
