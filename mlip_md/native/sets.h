#pragma once
#include "problem.h"

namespace mlip_md {

// The largest level of instructions that this processor has: 0 portable, 1 AVX2, 2 AVX-512.
int best_level();
const char* level_name(int level);

// Where a set has the kernels of a coupling of degrees up to 4; -1 where these do not couple.
int coupling_index(int l1, int l2, int l3);

// Kernels of a level, which must not be above the best.
template <class T>
Set<T> kernel_set(int level);

}  // namespace mlip_md
