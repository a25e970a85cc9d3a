// The convolution: who is summed where, cut into tasks, with the kernels doing the arithmetic.
//
// All passes are one of two. A sum collects x t r of the edges of a node, the rotations t made of
// the harmonics of eight edges at once: at receivers it is the convolution, at senders, with l1 and
// l3 exchanged, its gradient to the features. A product folds what arrives at a receiver with the
// coupling first, h, once for all of its edges; then x h alone gives the gradients to the harmonics
// and radial weights. Every number is summed in an order that only the problem decides.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <vector>

#include "sets.h"
#include "team.h"

namespace mlip_md {

struct Path {
  int64_t source, channel, degree, target, position, column, width;
  int l1, l3;
  int64_t block;      // first of its blocks in a table
  int forth, back;    // which coupling it is, and that with l1 and l3 exchanged
};

// Node features by source or target: (n_nodes, components, channels).
template <class T>
struct Features {
  T* data;
  int64_t components, channels;
  T* at(int64_t node, int64_t channel) const {
    return data + node * components * channels + channel;
  }
};

template <class T>
using FeatureList = std::vector<Features<T>>;

// Memory on the boundary of a cache line, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : memory_(size ? new char[size * sizeof(T) + 64] : nullptr),
        data_(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64)) {}
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<char[]> memory_;
  T* data_;
};

// The graph and what a call has of its edges.
template <class T>
struct Problem {
  int64_t n_nodes, n_edges, harmonics, columns;
  const int32_t *senders, *receivers;
  std::vector<Path> paths;
  Set<T> set;
  // Radial weights, either given, and who counts …
  const bool* inside = nullptr;
  // … or by a table.
  const T* lengths = nullptr;
  const int32_t* pairs = nullptr;
  const T* table = nullptr;
  int64_t n_blocks = 0, cells = 0, degree = 0, n_pairs = 0;
  double cutoff = 0;

  bool counts(int64_t e) const { return inside ? inside[e] : !(lengths[e] >= T(cutoff)); }
  bool by_table() const { return table != nullptr; }
};

// The edges that count by one of their ends, in groups of eight that belong to one node.
template <class T>
struct Order {
  std::vector<int64_t> first;   // group of each node, and their number
  std::vector<int32_t> count;   // edges of each node
  std::vector<int32_t> edge;    // (groups * kLanes)
  const int32_t* other;         // node at the other end, by edge
};

template <class T>
Order<T> order_edges(const Problem<T>& p, const int32_t* ends, const int32_t* others) {
  Order<T> order;
  order.other = others;
  order.count.assign(p.n_nodes, 0);
  for (int64_t e = 0; e < p.n_edges; ++e)
    if (p.counts(e)) ++order.count[ends[e]];
  order.first.assign(p.n_nodes + 1, 0);
  for (int64_t i = 0; i < p.n_nodes; ++i)
    order.first[i + 1] = order.first[i] + (order.count[i] + kLanes - 1) / kLanes;
  order.edge.assign(order.first[p.n_nodes] * kLanes, 0);
  std::vector<int64_t> next(p.n_nodes);
  for (int64_t i = 0; i < p.n_nodes; ++i) next[i] = order.first[i] * kLanes;
  for (int64_t e = 0; e < p.n_edges; ++e)
    if (p.counts(e)) order.edge[next[ends[e]]++] = static_cast<int32_t>(e);
  return order;
}

// Harmonics of the edges of an order: (groups, harmonics, kLanes), 0 where a group has no edge.
template <class T>
Buffer<T> by_groups(const Problem<T>& p, const Order<T>& order, const T* y, Team& team) {
  const int64_t groups = order.first[p.n_nodes], width = p.harmonics;
  Buffer<T> out(groups * width * kLanes);
  constexpr int64_t block = 64;
  team.run((p.n_nodes + block - 1) / block, [&](auto claim) {
    for (int64_t task; (task = claim()) >= 0;)
      for (int64_t i = task * block; i < std::min(p.n_nodes, (task + 1) * block); ++i)
        for (int64_t k = 0; k < (order.first[i + 1] - order.first[i]) * kLanes; ++k) {
          const int64_t place = order.first[i] * kLanes + k;
          const T* row = y + int64_t(order.edge[place]) * width;
          T* to = out.data() + place / kLanes * width * kLanes + place % kLanes;
          for (int64_t b = 0; b < width; ++b) to[b * kLanes] = k < order.count[i] ? row[b] : T(0);
        }
  });
  return out;
}

// A range of channels of a path.
struct Tile {
  const Path* path;
  int64_t begin, width;
};

inline void cut_path(const Path& path, int64_t tile, std::vector<Tile>& tiles) {
  for (int64_t c = 0; c < path.width; c += tile)
    tiles.push_back({&path, c, std::min(tile, path.width - c)});
}

// Tiles that one task does one after the other, since they add to the same numbers.
struct Unit {
  std::vector<Tile> tiles;
  int64_t feature = 0, begin = 0, end = 0;  // channels of a source that it writes
};

// Nodes per task where all tiles of a node are done together, so that its rows of radial weights
// stay in the cache; by a table, where its columns shall stay, a tile is done for many nodes.
constexpr int64_t kNodes = 4;

// Nodes that a task takes, and where in a table their edges are: those of a cell one after the
// other, since they share what is read of it.
template <class T>
struct Range {
  int64_t begin, end;   // nodes
  int64_t place, size;  // of their edges in the order
  std::vector<Spot<T>> spots;
};

// Edges per range by a table, whose radial weights shall stay in the cache as well as the part of
// the table that they are made of.
constexpr int64_t kRange = 8192;

template <class T>
void find_spots(const Problem<T>& p, const Order<T>& order, Range<T>& range) {
  const int64_t row = (p.degree + 1) * kLanes, last = p.cells - 1;
  std::vector<Spot<T>> spots;
  std::vector<int32_t> cells, next(p.cells + 1);
  spots.reserve(range.size), cells.reserve(range.size);
  for (int64_t i = range.begin; i < range.end; ++i)
    for (int64_t k = 0; k < order.count[i]; ++k) {
      const int64_t place = order.first[i] * kLanes + k, e = order.edge[place];
      const double s = double(p.lengths[e]) * (double(p.cells) / p.cutoff);
      const int64_t cell = s >= double(last) ? last : s > 0 ? int64_t(s) : 0;  // 0 for NaN
      spots.push_back({p.table + (p.pairs[e] * p.n_blocks * p.cells + cell) * row,
                       T(s - double(cell)), int32_t(place - range.place)});
      cells.push_back(int32_t(cell));
      ++next[cell + 1];
    }
  for (int64_t c = 0; c < last; ++c) next[c + 1] += next[c];
  range.spots.resize(spots.size());
  for (size_t k = 0; k < spots.size(); ++k) range.spots[next[cells[k]]++] = spots[k];
}

// Ranges of nodes for so many units; by a table no more than give every thread some tasks.
template <class T>
std::vector<Range<T>> cut_nodes(const Problem<T>& p, const Order<T>& order, int64_t units,
                                Team& team) {
  std::vector<Range<T>> ranges;
  const int64_t tasks = team.threads() == 1 ? 1 : team.threads() * 4;
  const int64_t parts = units ? (tasks + units - 1) / units : 1;
  const int64_t most = std::min(kRange / kLanes, order.first[p.n_nodes] / parts + 1);
  for (int64_t i = 0; i < p.n_nodes;) {
    int64_t end = i + 1;
    while (end < p.n_nodes && (p.by_table() ? order.first[end + 1] - order.first[i] <= most
                                            : end < i + kNodes))
      ++end;
    const int64_t groups = order.first[end] - order.first[i];
    ranges.push_back({i, end, order.first[i] * kLanes, groups * kLanes, {}});
    i = end;
  }
  if (p.by_table())
    team.run(ranges.size(), [&](auto claim) {
      for (int64_t task; (task = claim()) >= 0;) find_spots(p, order, ranges[task]);
    });
  return ranges;
}

// Memory of one thread.
template <class T>
struct Workspace {
  Buffer<T> turns{kEdges * kLargest}, value, slope,
      gradient{kEdges * kTile}, folds{(kTile + kWidest) * kLargest};
  Buffer<T> packed_x{kEdges * 9 * kWidest}, packed_r{kEdges * kWidest}, packed_g{9 * kWidest},
      packed_gradient{kEdges * kWidest};
  const T *x[kEdges], *r[kEdges], *px[kEdges], *pr[kEdges];
  const T *moved_x[kEdges], *moved_r[kEdges];
  T *gr[kEdges], *gy[kEdges], *moved_gr[kEdges];
  T sums[kEdges], ignored[9];
  int64_t rows = 0;  // of value and slope
};

// Edges of one node, at most kEdges of them.
struct Piece {
  int64_t place;  // of the first
  int n;
};

// Radial weights of a tile, by a table, of the edges of some nodes.
template <class T>
void weigh(const Problem<T>& p, const Range<T>& range, const Tile& tile, bool slopes,
           Workspace<T>& w) {
  if (!p.by_table()) return;
  if (w.rows < range.size) {
    w.value = Buffer<T>(range.size * kTile), w.slope = Buffer<T>(range.size * kTile);
    w.rows = range.size;
  }
  const int64_t block = p.cells * (p.degree + 1) * kLanes;
  p.set.evaluate({range.spots.data(), int64_t(range.spots.size()),
                  (tile.path->block + tile.begin / kLanes) * block, block,
                  int(tile.width + kLanes - 1) / kLanes, int(p.degree), w.value.data(),
                  slopes ? w.slope.data() : nullptr});
}

// What both passes do with a tile at a node: radial weights and features of its edges.
template <class T>
void point_to(const Problem<T>& p, const Order<T>& order, const Range<T>& range, const Tile& tile,
              const Piece& piece, const Features<const T>& x, const T* radial, Workspace<T>& w) {
  const int32_t* edge = order.edge.data() + piece.place;
  for (int k = 0; k < piece.n; ++k) {
    w.x[k] = x.at(order.other[edge[k]], 0);
    w.r[k] = p.by_table() ? w.value.data() + (piece.place - range.place + k) * kTile
                          : radial + edge[k] * p.columns + tile.path->column + tile.begin;
  }
}

template <class T>
void shift(const T* const* from, int n, int64_t by, const T** to) {
  for (int k = 0; k < n; ++k) to[k] = from[k] + by;
}

// Copies channels that fill no vector, with zeros after them.
template <class T>
void pack(const T* const* from, int n, int64_t rows, int64_t row, int64_t width, T* to,
          const T** pointers) {
  for (int k = 0; k < n; ++k) {
    pointers[k] = to + k * rows * kWidest;
    for (int64_t i = 0; i < rows * kWidest; ++i) to[k * rows * kWidest + i] = T(0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < width; ++c)
        to[(k * rows + i) * kWidest + c] = from[k][i * row + c];
  }
}

// A sum of one tile at one node.
template <class T>
void sum_tile(const Kernels<T>& kernels, int n, int64_t width, int64_t x_row, int64_t in, T* out,
              int64_t out_row, int64_t outputs, bool first, Workspace<T>& w) {
  int64_t c = 0;
  for (int i = 0; i < kernels.n_kinds; ++i) {
    const auto& kind = kernels.kinds[i];
    const int64_t part = (width - c) / kind.multiple * kind.multiple;
    if (part == 0) continue;
    shift(w.x, n, c, w.moved_x);
    shift(w.r, n, c, w.moved_r);
    Sum<T> sum;
    sum.n = n, sum.channels = int(part), sum.x = w.moved_x, sum.x_row = x_row, sum.r = w.moved_r;
    sum.turns = w.turns.data(), sum.out = out + c, sum.out_row = out_row, sum.first = first;
    kind.gather(sum);
    c += part;
  }
  if (c == width) return;
  shift(w.x, n, c, w.moved_x);
  shift(w.r, n, c, w.moved_r);
  pack(w.moved_x, n, in, x_row, width - c, w.packed_x.data(), w.px);
  pack(w.moved_r, n, 1, 0, width - c, w.packed_r.data(), w.pr);
  const auto& kind = kernels.kinds[kernels.n_kinds - 1];
  Sum<T> sum;
  sum.n = n, sum.channels = kind.multiple, sum.x = w.px, sum.x_row = kWidest, sum.r = w.pr;
  sum.turns = w.turns.data(), sum.out = w.packed_g.data(), sum.out_row = kWidest, sum.first = false;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < kind.multiple; ++i)
      sum.out[o * kWidest + i] = !first && i < width - c ? out[o * out_row + c + i] : T(0);
  kind.gather(sum);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < width - c; ++i)
      out[o * out_row + c + i] = sum.out[o * kWidest + i];
}

// One term of a sum over edges: features at the other end, harmonics by groups, radial weights.
template <class T>
struct Term {
  FeatureList<const T> x;
  const T* y;
  const T* radial;
};

// Channels of a feature that the edges of a tile read, from its first channel on.
struct Reading {
  int64_t feature, channel, width;
  bool operator<(const Reading& other) const {
    return std::tie(feature, channel, width) < std::tie(other.feature, other.channel, other.width);
  }
};

template <class T>
Features<const T> part(const FeatureList<const T>& x, const Reading& reading) {
  const Features<const T>& whole = x[reading.feature];
  return {whole.data + reading.channel, whole.components, whole.channels};
}

// What tiles read, copied so that what lies at one node lies in one place: edges jump from node to
// node, and rows that lie apart cost a page and a cache line each.
template <class T>
class Packed {
 public:
  Packed(const FeatureList<const T>& x, const std::set<Reading>& readings, int64_t n_nodes,
         Team& team) {
    int64_t size = 0;
    for (const Reading& reading : readings) size += row(x, reading) * n_nodes;
    memory_ = Buffer<T>(size);
    T* to = memory_.data();
    for (const Reading& reading : readings) {
      parts_[reading] = {to, x[reading.feature].components, kTile};
      to += row(x, reading) * n_nodes;
    }
    constexpr int64_t block = 64;
    team.run((n_nodes + block - 1) / block, [&](auto claim) {
      for (int64_t task; (task = claim()) >= 0;)
        for (const auto& [reading, packed] : parts_)
          copy(part(x, reading), packed, reading.width, task * block,
               std::min(n_nodes, (task + 1) * block));
    });
  }

  static int64_t row(const FeatureList<const T>& x, const Reading& reading) {
    return x[reading.feature].components * kTile;
  }

  Features<const T> at(const Reading& reading) const {
    const Features<T>& packed = parts_.at(reading);
    return {packed.data, packed.components, packed.channels};
  }

 private:
  static void copy(const Features<const T>& from, const Features<T>& to, int64_t width,
                   int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t m = 0; m < to.components; ++m)
        std::copy_n(from.at(i, m * from.channels), width, to.at(i, m * to.channels));
  }

  Buffer<T> memory_;
  std::map<Reading, Features<T>> parts_;
};

// Bytes of features from which on they are copied in several parts, each of one unit at least.
constexpr int64_t kPacked = 8 << 20;

// Calls work(unit, range, workspace, view) for all units and ranges; view(reading) is what a tile
// reads, of the only term where radial weights come from a table.
template <class T, class Reads, class Work>
void for_each_unit(const Problem<T>& p, const Order<T>& order, const std::vector<Term<T>>& terms,
                   const std::vector<Unit>& units, Team& team, const Reads& reads,
                   const Work& work) {
  const std::vector<Range<T>> ranges = cut_nodes(p, order, units.size(), team);
  const int64_t n = ranges.size();
  if (!p.by_table()) {
    team.run(n, [&](auto claim) {
      Workspace<T> w;
      for (int64_t task; (task = claim()) >= 0;)
        for (const Unit& unit : units)
          work(unit, ranges[task], w, [](const Term<T>& term, const Reading& reading) {
            return part(term.x, reading);
          });
    });
    return;
  }
  const FeatureList<const T>& x = terms.front().x;
  for (size_t begin = 0, end; begin < units.size(); begin = end) {
    std::set<Reading> readings;
    int64_t bytes = 0;
    for (end = begin; end < units.size() && (end == begin || bytes < kPacked); ++end)
      for (const Tile& tile : units[end].tiles)
        if (readings.insert(reads(tile)).second)
          bytes += Packed<T>::row(x, reads(tile)) * p.n_nodes * int64_t(sizeof(T));
    const Packed<T> packed(x, readings, p.n_nodes, team);
    team.run(n * int64_t(end - begin), [&](auto claim) {
      Workspace<T> w;
      for (int64_t task; (task = claim()) >= 0;)
        work(units[begin + task / n], ranges[task % n], w,
             [&](const Term<T>&, const Reading& reading) { return packed.at(reading); });
    });
  }
}

// Sums at one end of the edges: features of sources at receivers, or of targets at senders.
template <class T>
class SumPass {
 public:
  SumPass(const Problem<T>& p, const Order<T>& order, bool reversed, FeatureList<T> out)
      : p_(p), order_(order), reversed_(reversed), out_(std::move(out)), units_(make_units()) {}

  void run(const std::vector<Term<T>>& terms, Team& team) const {
    for_each_unit(
        p_, order_, terms, units_, team, [&](const Tile& tile) { return reading(tile); },
        [&](const Unit& unit, const Range<T>& range, auto& w, auto view) {
          do_unit(unit, range, terms, w, view);
        });
  }

 private:
  // Channels of an output that overlapping tiles write, and what no path writes.
  std::vector<Unit> make_units() const {
    std::vector<Unit> units;
    std::vector<Tile> tiles;
    const int64_t widest = p_.by_table() ? kTile : 4 * kTile;
    for (const Path& path : p_.paths) cut_path(path, widest, tiles);
    for (size_t f = 0; f < out_.size(); ++f) {
      std::vector<Tile> own;
      for (const Tile& tile : tiles)
        if (feature(*tile.path) == int64_t(f)) own.push_back(tile);
      std::stable_sort(own.begin(), own.end(), [&](const Tile& a, const Tile& b) {
        return channel(a) < channel(b);
      });
      int64_t end = 0;
      for (const Tile& tile : own) {
        const int64_t begin = channel(tile);
        if (begin > end) units.push_back({{}, int64_t(f), end, begin});
        if (begin >= end) units.push_back({{}, int64_t(f), begin, begin});
        end = std::max(end, begin + tile.width);
        units.back().tiles.push_back(tile);
        units.back().end = end;
      }
      if (end < out_[f].channels) units.push_back({{}, int64_t(f), end, out_[f].channels});
    }
    for (Unit& unit : units)  // in the order of the paths, whose addresses ascend
      std::stable_sort(unit.tiles.begin(), unit.tiles.end(),
                       [](const Tile& a, const Tile& b) { return a.path < b.path; });
    return units;
  }

  int64_t feature(const Path& path) const { return reversed_ ? path.source : path.target; }
  int64_t channel(const Tile& tile) const {
    return (reversed_ ? tile.path->channel : tile.path->position) + tile.begin;
  }
  Reading reading(const Tile& tile) const {
    const Path& path = *tile.path;
    return {reversed_ ? path.target : path.source,
            (reversed_ ? path.position : path.channel) + tile.begin, tile.width};
  }

  template <class View>
  void do_unit(const Unit& unit, const Range<T>& range, const std::vector<Term<T>>& terms,
               Workspace<T>& w, const View& view) const {
    const Features<T>& out = out_[unit.feature];
    // One tile that fills its channels overwrites them.
    const bool alone = unit.tiles.size() == 1;
    for (int64_t i = range.begin; i < range.end; ++i)
      if (!alone || order_.count[i] == 0)
        for (int64_t m = 0; m < out.components; ++m)
          std::fill_n(out.at(i, unit.begin) + m * out.channels, unit.end - unit.begin, T(0));
    for (const Tile& tile : unit.tiles) {
      weigh(p_, range, tile, false, w);
      for (int64_t i = range.begin; i < range.end; ++i)
        do_node(range, tile, i, terms, alone, w, view);
    }
  }

  template <class View>
  void do_node(const Range<T>& range, const Tile& tile, int64_t node,
               const std::vector<Term<T>>& terms, bool first, Workspace<T>& w,
               const View& view) const {
    const Path& path = *tile.path;
    const int from = reversed_ ? path.l3 : path.l1, to = reversed_ ? path.l1 : path.l3;
    const Kernels<T>& kernels = p_.set.couplings[reversed_ ? path.back : path.forth];
    const T scale = reversed_ ? T(1 / kernels.reverse) : T(1);
    const Features<T>& out = out_[feature(path)];
    const Reading read = reading(tile);
    for (int done = 0; done < order_.count[node]; done += kEdges) {
      const Piece piece{order_.first[node] * kLanes + done,
                        std::min(kEdges, order_.count[node] - done)};
      const int groups = (piece.n + kLanes - 1) / kLanes;
      for (const Term<T>& term : terms) {
        const int64_t y_group = p_.harmonics * kLanes;
        kernels.turn(term.y + piece.place / kLanes * y_group + path.degree * path.degree * kLanes,
                     y_group, groups, scale, w.turns.data());
        const Features<const T> x = view(term, read);
        point_to(p_, order_, range, tile, piece, x, term.radial, w);
        sum_tile(kernels, piece.n, tile.width, x.channels, 2 * from + 1,
                 out.at(node, channel(tile)), out.channels, 2 * to + 1, first, w);
        first = false;
      }
    }
  }

  const Problem<T>& p_;
  const Order<T>& order_;
  const bool reversed_;
  const FeatureList<T> out_;
  const std::vector<Unit> units_;
};

// Gradients to harmonics and radial weights, or lengths, of the edges; each may be null.
template <class T>
class ProductPass {
 public:
  ProductPass(const Problem<T>& p, const Order<T>& order, FeatureList<const T> g, T* gy, T* gr,
              T* glengths)
      : p_(p), order_(order), g_(std::move(g)), gy_(gy), gr_(gr), glengths_(glengths) {
    // What adds to the harmonics of one degree, and to the same part of the lengths' gradient.
    for (int64_t degree = 0; degree < 5; ++degree) {
      Unit unit;
      unit.feature = degree;
      for (const Path& path : p.paths)
        if (path.degree == degree) cut_path(path, kTile, unit.tiles);
      if (!unit.tiles.empty()) units_.push_back(unit);
    }
  }

  void run(const std::vector<Term<T>>& terms, Team& team) {
    if (gy_) std::fill_n(gy_, p_.n_edges * p_.harmonics, T(0));
    if (gr_) clear_unread(team);
    const int64_t parts = glengths_ ? int64_t(units_.size()) : 0;
    lengths_.assign(parts * p_.n_edges, T(0));
    for_each_unit(
        p_, order_, terms, units_, team, reading,
        [&](const Unit& unit, const Range<T>& range, auto& w, auto view) {
          for (const Tile& tile : unit.tiles) {
            weigh(p_, range, tile, glengths_ != nullptr, w);
            for (int64_t i = range.begin; i < range.end; ++i)
              do_node(unit, range, tile, i, terms, w, view);
          }
        });
    if (!glengths_) return;
    const T factor = T(double(p_.cells) / p_.cutoff);
    for (int64_t e = 0; e < p_.n_edges; ++e) {
      T sum(0);
      for (int64_t part = 0; part < parts; ++part) sum += lengths_[part * p_.n_edges + e];
      glengths_[e] = sum * factor;
    }
  }

 private:
  // Rows of edges that do not count, and columns of no path.
  void clear_unread(Team& team) const {
    std::vector<char> read(p_.columns, 0);
    for (const Path& path : p_.paths)
      std::fill_n(read.begin() + path.column, path.width, char(1));
    std::vector<int64_t> unread;
    for (int64_t c = 0; c < p_.columns; ++c)
      if (!read[c]) unread.push_back(c);
    constexpr int64_t block = 256;
    team.run((p_.n_edges + block - 1) / block, [&](auto claim) {
      for (int64_t task; (task = claim()) >= 0;)
        for (int64_t e = task * block; e < std::min(p_.n_edges, (task + 1) * block); ++e) {
          T* row = gr_ + e * p_.columns;
          if (!p_.counts(e)) std::fill_n(row, p_.columns, T(0));
          else for (int64_t c : unread) row[c] = T(0);
        }
    });
  }

  static Reading reading(const Tile& tile) {
    return {tile.path->source, tile.path->channel + tile.begin, tile.width};
  }

  template <class View>
  void do_node(const Unit& unit, const Range<T>& range, const Tile& tile, int64_t node,
               const std::vector<Term<T>>& terms, Workspace<T>& w, const View& view) {
    if (order_.count[node] == 0) return;
    const Path& path = *tile.path;
    const auto& kernels = p_.set.couplings[path.forth];
    const Features<const T>& g = g_[path.target];
    const int folds = fold(kernels, path, g.at(node, path.position + tile.begin), g.channels,
                           tile.width, w);
    for (int done = 0; done < order_.count[node]; done += kEdges) {
      const Piece piece{order_.first[node] * kLanes + done,
                        std::min(kEdges, order_.count[node] - done)};
      const int32_t* edge = order_.edge.data() + piece.place;
      for (const Term<T>& term : terms) {
        const bool direct = gr_ && &term == &terms.front();
        for (int k = 0; k < piece.n; ++k) {
          w.gy[k] = gy_ ? gy_ + edge[k] * p_.harmonics + path.degree * path.degree : w.ignored;
          w.gr[k] = direct ? gr_ + edge[k] * p_.columns + path.column + tile.begin
                           : w.gradient.data() + k * kTile;
        }
        const Features<const T> x = view(term, reading(tile));
        point_to(p_, order_, range, tile, piece, x, term.radial, w);
        multiply(kernels, tile, piece, term, x.channels, folds, w);
        if (glengths_) add_lengths(unit, range, tile, piece, w);
        if (gr_ && !direct)
          for (int k = 0; k < piece.n; ++k) {
            T* to = gr_ + edge[k] * p_.columns + path.column + tile.begin;
            for (int64_t c = 0; c < tile.width; ++c) to[c] += w.gr[k][c];
          }
      }
    }
  }

  // What arrives at a node times the coupling, for every kind of vectors that a tile takes.
  static int fold(const Kernels<T>& kernels, const Path& path, const T* g, int64_t g_row,
                  int64_t width, Workspace<T>& w) {
    int64_t c = 0;
    for (int i = 0; i < kernels.n_kinds; ++i) {
      const auto& kind = kernels.kinds[i];
      const int64_t part = (width - c) / kind.multiple * kind.multiple;
      if (part) kind.fold(g + c, g_row, int(part), w.folds.data() + c * kernels.folds);
      c += part;
    }
    if (c < width) {
      const auto& kind = kernels.kinds[kernels.n_kinds - 1];
      const T* from = g + c;
      const T* to;
      pack(&from, 1, 2 * path.l3 + 1, g_row, width - c, w.packed_g.data(), &to);
      kind.fold(to, kWidest, kind.multiple, w.folds.data() + c * kernels.folds);
    }
    return kernels.folds;
  }

  void multiply(const Kernels<T>& kernels, const Tile& tile, const Piece& piece,
                const Term<T>& term, int64_t x_row, int folds, Workspace<T>& w) const {
    const Path& path = *tile.path;
    const int n = piece.n;
    Product<T> product;
    product.n = n, product.x = w.moved_x, product.x_row = x_row;
    product.r = w.moved_r, product.gr = w.moved_gr, product.gy = w.gy;
    product.y_group = p_.harmonics * kLanes;
    product.y = term.y + piece.place / kLanes * product.y_group + path.degree * path.degree * kLanes;
    int64_t c = 0;
    for (int i = 0; i < kernels.n_kinds; ++i) {
      const auto& kind = kernels.kinds[i];
      const int64_t part = (tile.width - c) / kind.multiple * kind.multiple;
      if (part == 0) continue;
      shift(w.x, n, c, w.moved_x);
      shift(w.r, n, c, w.moved_r);
      for (int k = 0; k < n; ++k) w.moved_gr[k] = w.gr[k] + c;
      product.channels = int(part), product.folds = w.folds.data() + c * folds;
      kind.product(product);
      c += part;
    }
    if (c == tile.width) return;
    const auto& kind = kernels.kinds[kernels.n_kinds - 1];
    shift(w.x, n, c, w.moved_x);
    shift(w.r, n, c, w.moved_r);
    pack(w.moved_x, n, 2 * path.l1 + 1, x_row, tile.width - c, w.packed_x.data(), w.px);
    pack(w.moved_r, n, 1, 0, tile.width - c, w.packed_r.data(), w.pr);
    for (int k = 0; k < n; ++k) w.moved_gr[k] = w.packed_gradient.data() + k * kWidest;
    product.channels = kind.multiple, product.folds = w.folds.data() + c * folds;
    product.x = w.px, product.x_row = kWidest, product.r = w.pr;
    kind.product(product);
    for (int k = 0; k < n; ++k)
      for (int64_t i = c; i < tile.width; ++i) w.gr[k][i] = w.moved_gr[k][i - c];
  }

  void add_lengths(const Unit& unit, const Range<T>& range, const Tile& tile, const Piece& piece,
                   Workspace<T>& w) {
    const int padded = int(tile.width + kLanes - 1) / kLanes * kLanes;
    for (int k = 0; k < piece.n; ++k) {
      w.sums[k] = T(0);
      for (int64_t c = tile.width; c < padded; ++c) w.gradient[k * kTile + c] = T(0);
    }
    p_.set.multiply(piece.n, padded, w.gradient.data(),
                    w.slope.data() + (piece.place - range.place) * kTile, w.sums);
    T* to = lengths_.data() + (&unit - units_.data()) * p_.n_edges;
    for (int k = 0; k < piece.n; ++k) to[order_.edge[piece.place + k]] += w.sums[k];
  }

  const Problem<T>& p_;
  const Order<T>& order_;
  const FeatureList<const T> g_;
  T *const gy_, *const gr_, *const glengths_;
  std::vector<Unit> units_;
  std::vector<T> lengths_;
};

}  // namespace mlip_md
