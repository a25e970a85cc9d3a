// Handlers of XLA's foreign function interface: what they are given, checked, and what they call.
#include <stdexcept>
#include <string>

#include "convolution.h"

namespace ffi = xla::ffi;

namespace mlip_md {
namespace {

std::atomic<int> level{-1};

int current_level() {
  int chosen = level.load();
  if (chosen < 0) level.store(chosen = best_level());
  return chosen;
}

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

std::string text(ffi::AnyBuffer::Dimensions dims) {
  std::string out = "(";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + ")";
}

template <class T>
constexpr ffi::DataType type_of() {
  if constexpr (std::is_same_v<T, float>) return ffi::F32;
  if constexpr (std::is_same_v<T, double>) return ffi::F64;
  if constexpr (std::is_same_v<T, int32_t>) return ffi::S32;
  if constexpr (std::is_same_v<T, bool>) return ffi::PRED;
}

constexpr int64_t kAny = -1;

// Data of a buffer whose type and shape are what they must be; kAny allows every size.
template <class T>
T* checked(const std::string& name, const ffi::AnyBuffer& buffer, std::vector<int64_t> shape) {
  const auto dims = buffer.dimensions();
  bool fits = buffer.element_type() == type_of<T>() && dims.size() == shape.size();
  std::string wanted;
  for (size_t i = 0; i < shape.size(); ++i) {
    wanted += (i ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
    fits = fits && (shape[i] == kAny || dims[i] == shape[i]);
  }
  if (!fits)
    refuse(name + " of the convolution has shape " + text(dims) + " but must be (" + wanted +
           ") of the other arguments' type");
  return static_cast<T*>(buffer.untyped_data());
}

// Reads arguments and results one after the other.
class Reader {
 public:
  Reader(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  ffi::AnyBuffer argument() {
    auto buffer = args_.get<ffi::AnyBuffer>(next_argument_++);
    if (!buffer.has_value()) refuse("the convolution was given too few arguments");
    return *buffer;
  }
  ffi::AnyBuffer result() {
    auto buffer = rets_.get<ffi::AnyBuffer>(next_result_++);
    if (!buffer.has_value()) refuse("the convolution was given too few results");
    return **buffer;
  }
  template <class T>
  const T* argument(const char* name, std::vector<int64_t> shape) {
    return checked<T>(name, argument(), std::move(shape));
  }
  template <class T>
  T* result(const char* name, std::vector<int64_t> shape) {
    return checked<T>(name, result(), std::move(shape));
  }
  ffi::AnyBuffer peek(size_t ahead) const {
    auto buffer = args_.get<ffi::AnyBuffer>(next_argument_ + ahead);
    if (!buffer.has_value()) refuse("the convolution was given too few arguments");
    return *buffer;
  }
  void finish() const {
    if (next_argument_ != args_.size() || next_result_ != rets_.size())
      refuse("the convolution was given too many arguments or results");
  }

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t next_argument_ = 0, next_result_ = 0;
};

struct Attributes {
  ffi::Span<const int64_t> plan;
  int64_t threads;
  int64_t wrt;
  double cutoff;
};

// One call: arguments in the order of the interface, checked against each other.
template <class T>
class Call {
 public:
  Call(Reader& reader, const Attributes& attributes, bool table)
      : reader_(reader), plan_(attributes.plan) {
    if (plan_.size() < 3 || plan_.begin()[0] < 1 || plan_.begin()[1] < 1 || plan_.begin()[2] < 0 ||
        int64_t(plan_.size()) != 3 + 7 * plan_.begin()[2])
      refuse("the plan of the convolution must be 3 numbers and 7 for each path");
    n_sources_ = plan_.begin()[0], n_targets_ = plan_.begin()[1];
    p.set = kernel_set<T>(current_level());
    read_edges(attributes, table);
    x = features<const T>("x", n_sources_, false);
  }

  // Features as arguments or results, one for each source or target.
  template <class F>
  FeatureList<F> features(const char* name, int64_t number, bool results) {
    FeatureList<F> list;
    for (int64_t i = 0; i < number; ++i) {
      const ffi::AnyBuffer buffer = results ? reader_.result() : reader_.argument();
      if (buffer.dimensions().size() == 3 && p.n_nodes == kAny) p.n_nodes = buffer.dimensions()[0];
      F* data = checked<std::remove_const_t<F>>(name, buffer, {p.n_nodes, kAny, kAny});
      const int64_t rows = buffer.dimensions()[1];
      if (rows % 2 == 0 || rows > 9)
        refuse(std::string(name) + " of the convolution has " + std::to_string(rows) +
               " components, but 2l+1 with l up to 4 are allowed");
      list.push_back({data, rows, buffer.dimensions()[2]});
    }
    return list;
  }
  FeatureList<const T> arriving() { return features<const T>("g", n_targets_, false); }
  FeatureList<const T> tangents() { return alike(features<const T>("ux", n_sources_, false), x); }
  FeatureList<T> source_results() { return alike(features<T>("gx", n_sources_, true), x); }
  FeatureList<T> target_results() { return features<T>("out", n_targets_, true); }

  // Paths with their degrees, after the targets are known; every index is checked.
  template <class F>
  void read_paths(const FeatureList<F>& targets) {
    for (const int64_t* at = plan_.begin() + 3; at != plan_.end(); at += 7)
      add_path({at[0], at[1], at[2], at[3], at[4], at[5], at[6], 0, 0, 0, -1, -1}, targets);
    if (p.by_table() && next_block_ != p.n_blocks)
      refuse("the table of the convolution has " + std::to_string(p.n_blocks) +
             " blocks of columns, but its paths need " + std::to_string(next_block_));
    check_disjoint(targets);
    for (int64_t e = 0; e < p.n_edges; ++e)
      if (p.counts(e) && (!is_node(p.senders[e]) || !is_node(p.receivers[e])))
        refuse("edge " + std::to_string(e) + " of the convolution joins nodes " +
               std::to_string(p.senders[e]) + " and " + std::to_string(p.receivers[e]) +
               ", but there are " + std::to_string(p.n_nodes));
    for (int64_t e = 0; p.by_table() && e < p.n_edges; ++e)
      if (p.counts(e) && (p.pairs[e] < 0 || p.pairs[e] >= p.n_pairs))
        refuse("edge " + std::to_string(e) + " of the convolution is of pair " +
               std::to_string(p.pairs[e]) + ", but the table has " + std::to_string(p.n_pairs));
  }

  // Work in multiplications, about; a thread takes tens of microseconds to come.
  bool small() const {
    int64_t work = 0;
    for (const Path& path : p.paths) work += path.width * (2 * path.l1 + 1) * (2 * path.l3 + 1);
    return work * p.n_edges < 1000000;
  }

  Reader& reader_;
  Problem<T> p{};
  FeatureList<const T> x;
  const T *y = nullptr, *r = nullptr;

 private:
  void read_edges(const Attributes& attributes, bool table) {
    p.n_nodes = kAny;
    const auto dims = reader_.peek(0).dimensions();
    p.n_edges = dims.size() == 1 ? dims[0] : 0;
    p.senders = reader_.argument<int32_t>("senders", {p.n_edges});
    p.receivers = reader_.argument<int32_t>("receivers", {p.n_edges});
    if (table) {
      p.lengths = reader_.argument<T>("lengths", {p.n_edges});
      p.pairs = reader_.argument<int32_t>("pairs", {p.n_edges});
    } else {
      p.inside = reader_.argument<bool>("inside", {p.n_edges});
    }
    const auto y_dims = reader_.peek(0).dimensions();
    p.harmonics = y_dims.size() == 2 ? y_dims[1] : 0;
    y = reader_.argument<T>("y", {p.n_edges, kAny});
    const auto r_dims = reader_.peek(0).dimensions();
    if (!table) {
      r = reader_.argument<T>("r", {p.n_edges, kAny});
      p.columns = r_dims[1];
      return;
    }
    p.table = reader_.argument<T>("table", {kAny, kAny, kAny, kAny, kLanes});
    p.n_pairs = r_dims[0], p.n_blocks = r_dims[1], p.cells = r_dims[2], p.degree = r_dims[3] - 1;
    p.cutoff = attributes.cutoff;
    if (p.degree < 3 || p.degree > 7 || p.cells < 1 || !(p.cutoff > 0))
      refuse("the table of the convolution must be of degree 3 to 7, with cells up to a cutoff");
  }

  template <class F>
  FeatureList<F> alike(FeatureList<F> list, const FeatureList<const T>& model) const {
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i].components != model[i].components || list[i].channels != model[i].channels)
        refuse("gradients or tangents of the convolution differ in shape from their features");
    return list;
  }

  bool is_node(int32_t index) const { return index >= 0 && index < p.n_nodes; }

  template <class F>
  void add_path(Path path, const FeatureList<F>& targets) {
    const auto within = [](int64_t begin, int64_t width, int64_t size) {
      return begin >= 0 && width >= 1 && width <= size && begin <= size - width;
    };
    bool good = within(path.source, 1, n_sources_) && within(path.target, 1, n_targets_) &&
                within(path.degree, 1, 5) &&
                (path.degree + 1) * (path.degree + 1) <= p.harmonics;
    good = good && within(path.channel, path.width, x[path.source].channels) &&
           within(path.position, path.width, targets[path.target].channels) &&
           (p.by_table() || within(path.column, path.width, p.columns));
    if (good) {
      path.l1 = int(x[path.source].components / 2), path.l3 = int(targets[path.target].components / 2);
      path.forth = coupling_index(path.l1, int(path.degree), path.l3);
      path.back = coupling_index(path.l3, int(path.degree), path.l1);
      good = path.forth >= 0;
    }
    if (!good)
      refuse("path " + std::to_string(p.paths.size()) +
             " of the convolution does not fit its features, harmonics and radial weights");
    path.block = next_block_;
    next_block_ += (path.width + kLanes - 1) / kLanes;
    p.paths.push_back(path);
  }

  // No two paths may write the same channels or columns: threads would race for them.
  template <class F>
  void check_disjoint(const FeatureList<F>& targets) const {
    std::vector<std::vector<char>> taken;
    for (const auto& target : targets) taken.emplace_back(target.channels, 0);
    taken.emplace_back(p.by_table() ? 0 : p.columns, 0);
    const auto take = [&](std::vector<char>& row, int64_t begin, int64_t width) {
      for (int64_t c = begin; c < begin + width; ++c)
        if (row[c]++) refuse("two paths of the convolution share channels or columns");
    };
    for (const Path& path : p.paths) {
      take(taken[path.target], path.position, path.width);
      if (!p.by_table()) take(taken.back(), path.column, path.width);
    }
  }

  ffi::Span<const int64_t> plan_;
  int64_t n_sources_, n_targets_, next_block_ = 0;
};

template <class T>
void forward(Reader& reader, const Attributes& attributes, Team& team, bool table) {
  Call<T> call(reader, attributes, table);
  const FeatureList<T> out = call.target_results();
  reader.finish();
  call.read_paths(out);
  if (call.small()) team.stay_alone();
  const Problem<T>& p = call.p;
  const Order<T> order = order_edges(p, p.receivers, p.senders);
  const Buffer<T> y = by_groups(p, order, call.y, team);
  SumPass<T>(p, order, false, out).run({{call.x, y.data(), call.r}}, team);
}

template <class T>
void backward(Reader& reader, const Attributes& attributes, Team& team, bool table) {
  Call<T> call(reader, attributes, table);
  const FeatureList<const T> g = call.arriving();
  call.read_paths(g);
  const Problem<T>& p = call.p;
  FeatureList<T> gx;
  T *gy = nullptr, *gr = nullptr, *glengths = nullptr;
  if (attributes.wrt & 1) gx = call.source_results();
  if (attributes.wrt & 2) gy = reader.result<T>("gy", {p.n_edges, p.harmonics});
  if (attributes.wrt & 4 && !table) gr = reader.result<T>("gr", {p.n_edges, p.columns});
  if (attributes.wrt & 4 && table) glengths = reader.result<T>("glengths", {p.n_edges});
  reader.finish();
  if (call.small()) team.stay_alone();
  if (attributes.wrt & 1) {
    const Order<T> order = order_edges(p, p.senders, p.receivers);
    const Buffer<T> y = by_groups(p, order, call.y, team);
    SumPass<T>(p, order, true, gx).run({{g, y.data(), call.r}}, team);
  }
  if (gy || gr || glengths) {
    const Order<T> order = order_edges(p, p.receivers, p.senders);
    const Buffer<T> y = by_groups(p, order, call.y, team);
    ProductPass<T>(p, order, g, gy, gr, glengths).run({{call.x, y.data(), call.r}}, team);
  }
}

template <class T>
void second(Reader& reader, const Attributes& attributes, Team& team, bool) {
  Call<T> call(reader, attributes, false);
  const FeatureList<const T> g = call.arriving();
  call.read_paths(g);
  const Problem<T>& p = call.p;
  const T* uy = reader.argument<T>("uy", {p.n_edges, p.harmonics});
  const T* ur = reader.argument<T>("ur", {p.n_edges, p.columns});
  const FeatureList<const T> ux = call.tangents();
  const FeatureList<T> gx = call.source_results();
  T* gy = reader.result<T>("gy", {p.n_edges, p.harmonics});
  T* gr = reader.result<T>("gr", {p.n_edges, p.columns});
  const FeatureList<T> gg = call.target_results();
  for (size_t i = 0; i < gg.size(); ++i)
    if (gg[i].components != g[i].components || gg[i].channels != g[i].channels)
      refuse("gradients of the convolution differ in shape from what arrives");
  reader.finish();
  if (call.small()) team.stay_alone();
  {
    const Order<T> order = order_edges(p, p.senders, p.receivers);
    const Buffer<T> y = by_groups(p, order, call.y, team), du = by_groups(p, order, uy, team);
    SumPass<T>(p, order, true, gx).run({{g, du.data(), call.r}, {g, y.data(), ur}}, team);
  }
  const Order<T> order = order_edges(p, p.receivers, p.senders);
  const Buffer<T> y = by_groups(p, order, call.y, team), du = by_groups(p, order, uy, team);
  ProductPass<T>(p, order, g, gy, gr, nullptr)
      .run({{ux, y.data(), call.r}, {call.x, du.data(), ur}}, team);
  SumPass<T>(p, order, false, gg)
      .run({{ux, y.data(), call.r}, {call.x, du.data(), call.r}, {call.x, y.data(), ur}}, team);
}

template <class Body>
ffi::Error guarded(const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the convolution");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

// The element type is that of y, which comes after the integers.
#define MLIP_MD_DISPATCH(function, table)                                                   \
  guarded([&] {                                                                             \
    Reader reader(args, rets);                                                              \
    Team team(pool, attributes.threads);                                                    \
    const auto type = reader.peek(table ? 4 : 3).element_type();                            \
    if (type == ffi::F32)                                                                   \
      function<float>(reader, attributes, team, table);                                     \
    else if (type == ffi::F64)                                                              \
      function<double>(reader, attributes, team, table);                                    \
    else                                                                                    \
      refuse("the convolution computes in float32 or float64");                             \
  })

ffi::Error forward_handler(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Span<const int64_t> plan, int64_t threads) {
  const Attributes attributes{plan, threads, 0, 0};
  return MLIP_MD_DISPATCH(forward, false);
}

ffi::Error backward_handler(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                            ffi::Span<const int64_t> plan, int64_t threads, int64_t wrt) {
  const Attributes attributes{plan, threads, wrt, 0};
  return MLIP_MD_DISPATCH(backward, false);
}

ffi::Error second_handler(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Span<const int64_t> plan, int64_t threads) {
  const Attributes attributes{plan, threads, 0, 0};
  return MLIP_MD_DISPATCH(second, false);
}

ffi::Error table_forward_handler(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                 ffi::RemainingRets rets, ffi::Span<const int64_t> plan,
                                 int64_t threads, double cutoff) {
  const Attributes attributes{plan, threads, 0, cutoff};
  return MLIP_MD_DISPATCH(forward, true);
}

ffi::Error table_backward_handler(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                  ffi::RemainingRets rets, ffi::Span<const int64_t> plan,
                                  int64_t threads, int64_t wrt, double cutoff) {
  const Attributes attributes{plan, threads, wrt, cutoff};
  return MLIP_MD_DISPATCH(backward, true);
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<ffi::Span<const int64_t>>("plan")
      .Attr<int64_t>("threads");
}

}  // namespace
}  // namespace mlip_md

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(mlip_md_conv_forward, mlip_md::forward_handler, mlip_md::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mlip_md_conv_backward, mlip_md::backward_handler,
                              mlip_md::binding().Attr<int64_t>("wrt"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mlip_md_conv_second, mlip_md::second_handler, mlip_md::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(mlip_md_conv_table_forward, mlip_md::table_forward_handler,
                              mlip_md::binding().Attr<double>("cutoff"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mlip_md_conv_table_backward, mlip_md::table_backward_handler,
                              mlip_md::binding().Attr<int64_t>("wrt").Attr<double>("cutoff"));

// The set of instructions in use, and another one, for tests; -1 is the best that there is.
extern "C" const char* mlip_md_instructions() {
  return mlip_md::level_name(mlip_md::current_level());
}
extern "C" int mlip_md_use_level(int level) {
  const int best = mlip_md::best_level();
  const int chosen = level < 0 || level > best ? best : level;
  mlip_md::level.store(chosen);
  return chosen;
}
#pragma GCC visibility pop
