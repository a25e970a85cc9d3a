// The kernels, included once for each instruction set with MLIP_MD_SET, the namespace,
// MLIP_MD_BYTES, the size of a register, and MLIP_MD_BRIEF for short code instead of fast. Nothing here may call a function of a shared header: it
// would be compiled for this instruction set and could be taken in place of the portable one.

namespace mlip_md {
namespace MLIP_MD_SET {

#ifndef MLIP_MD_BRIEF
#include "coefficients.h"
#endif

#define MLIP_MD_INLINE inline __attribute__((always_inline))
// In front of loops over arrays of registers: what is not unrolled lies in memory.
#define MLIP_MD_UNROLL _Pragma("GCC unroll 16")

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

template <class V, class T>
MLIP_MD_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
MLIP_MD_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T, int W>
MLIP_MD_INLINE T total(Vector<T, W> v) {
  if constexpr (W == 2) {
    return v[0] + v[1];
  } else {
    typedef Vector<T, W / 2> Half;
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return total<T, W / 2>(low + high);
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> type;
};

// One entry of a rotation: an input is multiplied by r where its entries begin.
template <class T, int W, int N, class L, int I, int O>
MLIP_MD_INLINE void turn_term(const T* t, const T* x, int64_t x_row, const Vector<T, W>* r,
                              Vector<T, W>* z, Vector<T, W> (&sum)[O][N]) {
  constexpr int in = L::list[I][0], out = L::list[I][1], index = L::list[I][2];
  if constexpr (I == 0 || L::list[I ? I - 1 : 0][0] != in) {
    MLIP_MD_UNROLL
    for (int v = 0; v < N; ++v) z[v] = r[v] * load<Vector<T, W>>(x + in * x_row + v * W);
  }
  MLIP_MD_UNROLL
  for (int v = 0; v < N; ++v) sum[out][v] += t[index * kLanes] * z[v];
}

template <class T, int W, int N, class L, int O, int... I>
MLIP_MD_INLINE void turn_terms(const T* t, const T* x, int64_t x_row, const Vector<T, W>* r,
                               Vector<T, W> (&sum)[O][N], Indices<I...>) {
  Vector<T, W> z[N];
  (turn_term<T, W, N, L, I, O>(t, x, x_row, r, z, sum), ...);
}

// The sum over edges, N vectors of W channels at a time, in registers.
template <class T, int W, int N, class L, int O>
void gather(const Sum<T>& s) {
  constexpr int entries = sizeof(L::list) / sizeof(L::list[0]);
  typedef Vector<T, W> V;
  for (int c = 0; c < s.channels; c += N * W) {
    V sum[O][N];
    MLIP_MD_UNROLL
    for (int o = 0; o < O; ++o)
      MLIP_MD_UNROLL
      for (int v = 0; v < N; ++v)
        sum[o][v] = s.first ? V{} : load<V>(s.out + o * s.out_row + c + v * W);
    for (int k = 0; k < s.n; ++k) {
      const T* t = s.turns + k / kLanes * (entries * kLanes) + k % kLanes;
      V r[N];
      MLIP_MD_UNROLL
      for (int v = 0; v < N; ++v) r[v] = load<V>(s.r[k] + c + v * W);
      turn_terms<T, W, N, L, O>(t, s.x[k] + c, s.x_row, r, sum, typename Count<entries>::type());
    }
    MLIP_MD_UNROLL
    for (int o = 0; o < O; ++o)
      MLIP_MD_UNROLL
      for (int v = 0; v < N; ++v) store(s.out + o * s.out_row + c + v * W, sum[o][v]);
  }
}

template <class L>
constexpr bool first_of_output(int i) {
  for (int j = 0; j < i; ++j)
    if (L::list[j][1] == L::list[i][1]) return false;
  return true;
}

template <class T, int W, class L, int I>
MLIP_MD_INLINE void fold_term(const Vector<T, W>* h, const T* x, int64_t x_row, Vector<T, W>& xa,
                              Vector<T, W>* v) {
  constexpr int a = L::list[I][0], b = L::list[I][1];
  if constexpr (I == 0 || L::list[I ? I - 1 : 0][0] != a)
    xa = load<Vector<T, W>>(x + a * x_row);
  if constexpr (first_of_output<L>(I))
    v[b] = xa * h[I];
  else
    v[b] += xa * h[I];
}

template <class T, int W, class L, int... I>
MLIP_MD_INLINE void fold_terms(const Vector<T, W>* h, const T* x, int64_t x_row, Vector<T, W>* v,
                               Indices<I...>) {
  Vector<T, W> xa;
  (fold_term<T, W, L, I>(h, x, x_row, xa, v), ...);
}

template <class T, int W, class L, int B>
void product(const Product<T>& s) {
  constexpr int entries = sizeof(L::list) / sizeof(L::list[0]);
  typedef Vector<T, W> V;
  for (int k = 0; k < s.n; ++k) {
    const T* y = s.y + k / kLanes * s.y_group + k % kLanes;
    V sum[B] = {};
    for (int c = 0; c < s.channels; c += W) {
      V v[B];
      const V* h = reinterpret_cast<const V*>(s.folds + c * entries);
      fold_terms<T, W, L>(h, s.x[k] + c, s.x_row, v, typename Count<entries>::type());
      V g = y[0] * v[0];
      MLIP_MD_UNROLL
      for (int b = 1; b < B; ++b) g += y[b * kLanes] * v[b];
      store(s.gr[k] + c, g);
      const V r = load<V>(s.r[k] + c);
      MLIP_MD_UNROLL
      for (int b = 0; b < B; ++b) sum[b] += r * v[b];
    }
    MLIP_MD_UNROLL
    for (int b = 0; b < B; ++b) s.gy[k][b] += total<T, W>(sum[b]);
  }
}

template <class T, int W, class F>
void fold(const T* g, int64_t g_row, int channels, T* h) {
  typedef Vector<T, W> V;
  for (int c = 0; c < channels; c += W) {
    V s[F::d3];
    MLIP_MD_UNROLL
    for (int m = 0; m < F::d3; ++m) s[m] = load<V>(g + m * g_row + c);
    F::template fold<V, T>(s, reinterpret_cast<V*>(h + c * F::folds));
  }
}

template <class T, class F>
void turn(const T* y, int64_t y_group, int groups, T scale, T* t) {
  typedef Vector<T, kLanes> V;
  for (int i = 0; i < groups; ++i) {
    V s[F::d2];
    MLIP_MD_UNROLL
    for (int b = 0; b < F::d2; ++b) s[b] = scale * load<V>(y + i * y_group + b * kLanes);
    F::template turn<V, T>(s, reinterpret_cast<V*>(t + i * (F::turns * kLanes)));
  }
}

// The same by loops over dense rotations and foldings, for couplings that are not written out.

template <class T, int W, int O>
void gather_any(const Sum<T>& s, int inputs) {
  typedef Vector<T, W> V;
  for (int c = 0; c < s.channels; c += W) {
    V sum[O];
    MLIP_MD_UNROLL
    for (int o = 0; o < O; ++o) sum[o] = s.first ? V{} : load<V>(s.out + o * s.out_row + c);
    for (int k = 0; k < s.n; ++k) {
      const T* t = s.turns + k / kLanes * (inputs * O * kLanes) + k % kLanes;
      const V r = load<V>(s.r[k] + c);
      for (int i = 0; i < inputs; ++i, t += O * kLanes) {
        const V z = r * load<V>(s.x[k] + c + i * s.x_row);
        MLIP_MD_UNROLL
        for (int o = 0; o < O; ++o) sum[o] += t[o * kLanes] * z;
      }
    }
    MLIP_MD_UNROLL
    for (int o = 0; o < O; ++o) store(s.out + o * s.out_row + c, sum[o]);
  }
}

template <class T, int W, int B>
void product_any(const Product<T>& s, int inputs) {
  typedef Vector<T, W> V;
  for (int k = 0; k < s.n; ++k) {
    const T* y = s.y + k / kLanes * s.y_group + k % kLanes;
    V sum[B] = {};
    for (int c = 0; c < s.channels; c += W) {
      V v[B] = {};
      const V* h = reinterpret_cast<const V*>(s.folds + c * inputs * B);
      for (int a = 0; a < inputs; ++a, h += B) {
        const V x = load<V>(s.x[k] + c + a * s.x_row);
        MLIP_MD_UNROLL
        for (int b = 0; b < B; ++b) v[b] += x * h[b];
      }
      V g = y[0] * v[0];
      MLIP_MD_UNROLL
      for (int b = 1; b < B; ++b) g += y[b * kLanes] * v[b];
      store(s.gr[k] + c, g);
      const V r = load<V>(s.r[k] + c);
      MLIP_MD_UNROLL
      for (int b = 0; b < B; ++b) sum[b] += r * v[b];
    }
    MLIP_MD_UNROLL
    for (int b = 0; b < B; ++b) s.gy[k][b] += total<T, W>(sum[b]);
  }
}

template <class T, int W>
void fold_any(const Term* terms, int n, int d1, int d2, const T* g, int64_t g_row, int channels,
              T* h) {
  typedef Vector<T, W> V;
  for (int c = 0; c < channels; c += W) {
    V* d = reinterpret_cast<V*>(h + c * d1 * d2);
    for (int i = 0; i < d1 * d2; ++i) d[i] = V{};
    for (int i = 0; i < n; ++i)
      d[terms[i].a * d2 + terms[i].b] += T(terms[i].k) * load<V>(g + terms[i].m * g_row + c);
  }
}

template <class T>
void turn_any(const Term* terms, int n, int d1, int d3, const T* y, int64_t y_group, int groups,
              T scale, T* t) {
  typedef Vector<T, kLanes> V;
  for (int k = 0; k < groups; ++k) {
    V* d = reinterpret_cast<V*>(t + k * (d1 * d3 * kLanes));
    for (int i = 0; i < d1 * d3; ++i) d[i] = V{};
    for (int i = 0; i < n; ++i)
      d[terms[i].a * d3 + terms[i].m] +=
          T(terms[i].k) * scale * load<V>(y + k * y_group + terms[i].b * kLanes);
  }
}

// What of this depends on the coupling.
template <class T, int W, class C>
struct AnyOf {
  static constexpr int n = sizeof(C::terms) / sizeof(C::terms[0]);
  static void gather(const Sum<T>& s) { gather_any<T, W, C::d3>(s, C::d1); }
  static void product(const Product<T>& s) { product_any<T, W, C::d2>(s, C::d1); }
  static void fold(const T* g, int64_t g_row, int channels, T* h) {
    fold_any<T, W>(C::terms, n, C::d1, C::d2, g, g_row, channels, h);
  }
  static void turn(const T* y, int64_t y_group, int groups, T scale, T* t) {
    turn_any<T>(C::terms, n, C::d1, C::d3, y, y_group, groups, scale, t);
  }
};

// All blocks of a cell one after the other, so that rows of weights are written once; meanwhile the
// next cell is fetched from memory.
template <class T, bool slopes, int D>
void evaluate(const Polynomials<T>& s) {
  typedef Vector<T, kLanes> V;
  const Spot<T>* end = s.spots + s.n;
  for (const Spot<T>* spot = s.spots; spot < end;) {
    const Spot<T>* stop = spot + 1;
    while (stop < end && stop->cell == spot->cell) ++stop;
    const T* next = (stop < end ? stop : spot)->cell + s.skipped;
    for (int b = 0; b < s.blocks; ++b) {
      const T* cell = spot->cell + s.skipped + b * s.block;
      V c[D + 1];
      MLIP_MD_UNROLL
      for (int d = 0; d <= D; ++d) {
        c[d] = load<V>(cell + d * kLanes);
        __builtin_prefetch(next + b * s.block + d * kLanes);
      }
      for (const Spot<T>* at = spot; at < stop; ++at) {
        const T u = at->u;
        V value = c[D], slope = value;
        MLIP_MD_UNROLL
        for (int d = D - 1; d >= 0; --d) {
          if (slopes && d < D - 1) slope = slope * u + value;
          value = value * u + c[d];
        }
        store(s.value + at->row * kTile + b * kLanes, value);
        if (slopes) store(s.slope + at->row * kTile + b * kLanes, slope);
      }
    }
    spot = stop;
  }
}

template <class T, bool slopes>
void evaluate_degree(const Polynomials<T>& s) {
  switch (s.degree) {
    case 3: return evaluate<T, slopes, 3>(s);
    case 4: return evaluate<T, slopes, 4>(s);
    case 5: return evaluate<T, slopes, 5>(s);
    case 6: return evaluate<T, slopes, 6>(s);
    case 7: return evaluate<T, slopes, 7>(s);
  }
}

template <class T>
void evaluate_chosen(const Polynomials<T>& s) {
  return s.slope ? evaluate_degree<T, true>(s) : evaluate_degree<T, false>(s);
}

// sums[k] += sum_c a[k, c] b[k, c] of rows of kTile
template <class T>
void multiply(int n, int width, const T* a, const T* b, T* sums) {
  typedef Vector<T, kLanes> V;
  for (int k = 0; k < n; ++k) {
    V sum{};
    for (int c = 0; c < width; c += kLanes)
      sum += load<V>(a + k * kTile + c) * load<V>(b + k * kTile + c);
    sums[k] += total<T, kLanes>(sum);
  }
}

#ifndef MLIP_MD_BRIEF
#define MLIP_MD_FUNCTIONS(l1, l2, l3)                                                       \
  struct Functions##l1##l2##l3 : Coupling##l1##l2##l3 {                                     \
    typedef Coupling##l1##l2##l3 Lists;                                                     \
    struct Turned {                                                                         \
      static constexpr auto& list = Lists::turned;                                          \
    };                                                                                      \
    struct Folded {                                                                         \
      static constexpr auto& list = Lists::folded;                                          \
    };                                                                                      \
    static constexpr int turns = sizeof(Lists::turned) / sizeof(Lists::turned[0]);          \
    static constexpr int folds = sizeof(Lists::folded) / sizeof(Lists::folded[0]);          \
    template <class V, class T>                                                             \
    static MLIP_MD_INLINE void turn(const V* s, V* d) {                                     \
      turn##l1##l2##l3<V, T>(s, d);                                                         \
    }                                                                                       \
    template <class V, class T>                                                             \
    static MLIP_MD_INLINE void fold(const V* s, V* d) {                                     \
      fold##l1##l2##l3<V, T>(s, d);                                                         \
    }                                                                                       \
  };
MLIP_MD_WRITTEN_OUT(MLIP_MD_FUNCTIONS)
#undef MLIP_MD_FUNCTIONS

template <class T, int W, int N, class F>
constexpr typename Kernels<T>::Kind kind() {
  return {W * N, gather<T, W, N, typename F::Turned, F::d3>, fold<T, W, F>,
          product<T, W, typename F::Folded, F::d2>};
}

// One register of channels at a time, or two where few sums would wait for each other; what is left
// four at a time.
template <class T, class F>
constexpr Kernels<T> kernels() {
  constexpr int full = MLIP_MD_BYTES / sizeof(T);
  typedef typename Kernels<T>::Kind Kind;
  constexpr Kind wide = kind<T, full, F::d3 <= 5 ? 2 : 1, F>();
  if constexpr (full <= 4)
    return {F::folds, F::reverse, turn<T, F>, 2, {wide, kind<T, full, 1, F>()}};
  else
    return {F::folds, F::reverse, turn<T, F>, 2, {wide, kind<T, 4, 1, F>()}};
}
#define MLIP_MD_ENTRY(l1, l2, l3) kernels<T, Functions##l1##l2##l3>(),
#endif

template <class T, class C>
constexpr Kernels<T> any_kernels() {
  constexpr int full = MLIP_MD_BYTES / sizeof(T);
  typedef AnyOf<T, full, C> Any;
  return {C::d1 * C::d2, C::reverse, Any::turn, 1,
          {{full, Any::gather, Any::fold, Any::product}}};
}
#define MLIP_MD_ANY(l1, l2, l3) any_kernels<T, Coupling##l1##l2##l3>(),
#ifdef MLIP_MD_BRIEF
#define MLIP_MD_ENTRY MLIP_MD_ANY
#endif

template <class T>
Set<T> set() {
  static constexpr Kernels<T> couplings[] = {MLIP_MD_WRITTEN_OUT(MLIP_MD_ENTRY)
                                                 MLIP_MD_OTHERS(MLIP_MD_ANY)};
  return {couplings, evaluate_chosen<T>, multiply<T>};
}
#undef MLIP_MD_ENTRY
#undef MLIP_MD_ANY
#undef MLIP_MD_INLINE
#undef MLIP_MD_UNROLL

}  // namespace MLIP_MD_SET
}  // namespace mlip_md
