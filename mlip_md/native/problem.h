// What the convolution and its kernels share: plain data, no code that depends on an instruction set.
#pragma once
#include <cstdint>

namespace mlip_md {

constexpr int kLanes = 8;        // edges whose rotations are made at once; columns of a table's block
constexpr int kEdges = 64;       // edges of one node that a kernel is given at once
constexpr int kLargest = 81;     // components of a rotation
constexpr int kTile = 32;        // channels of a tile where radial weights are made from a table
constexpr int kWidest = 16;      // largest multiple of channels of the last kind

// Some edges of one node and a range of channels.
template <class T>
struct Edges {
  int n;
  int channels;
  const T* const* x;  // of each edge: first component of the features at its other end
  int64_t x_row;      // from one component to the next
  const T* const* r;  // of each edge: radial weights
};

// out[o] (+)= sum_e r x[i] t[i, o]
template <class T>
struct Sum : Edges<T> {
  const T* turns;  // (groups of edges, entries, kLanes)
  T* out;
  int64_t out_row;
  bool first;  // start from 0
};

// v[b] = sum_a x[a] h[a, b] of each edge: gr = sum_b y[b] v[b], gy[b] += sum_c r v[b]
template <class T>
struct Product : Edges<T> {
  const T* folds;    // (vectors, entries, lanes of a vector)
  const T* y;        // (groups of edges, kLanes) of the first component
  int64_t y_group;   // from one group to the next
  T* const* gr;      // of each edge
  T* const* gy;      // of each edge
};

// Where in a table an edge is: its cell in the first block, where in the cell, and where its radial
// weights go.
template <class T>
struct Spot {
  const T* cell;
  T u;
  int32_t row;
};

// Polynomials of a table at some edges, those of the same cell one after the other.
template <class T>
struct Polynomials {
  const Spot<T>* spots;
  int64_t n, skipped, block;  // number of edges; from a first block to the one wanted, to the next
  int blocks, degree;
  T* value;                   // (edges, kTile)
  T* slope;                   // by u, or none
};

template <class T>
struct Kernels {
  struct Kind {
    int multiple;  // of channels
    void (*gather)(const Sum<T>&);
    void (*fold)(const T* g, int64_t g_row, int channels, T* h);
    void (*product)(const Product<T>&);
  };
  int folds;       // entries of a folded coupling
  double reverse;  // factor of the coupling with l1 and l3 exchanged
  void (*turn)(const T* y, int64_t y_group, int groups, T scale, T* t);
  int n_kinds;     // those of larger multiples first
  Kind kinds[2];
};

template <class T>
struct Set {
  const Kernels<T>* couplings;  // by index of the coupling
  void (*evaluate)(const Polynomials<T>&);
  void (*multiply)(int n, int width, const T* a, const T* b, T* sums);
};

}  // namespace mlip_md
