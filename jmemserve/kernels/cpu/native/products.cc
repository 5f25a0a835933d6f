// Products as XLA calls them: checks of shapes, the way each one is done, division of the work among XLA's threads.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "calls.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jmemserve {
namespace {

struct Product {
  Type type, x_type;
  const void *weight, *x;  // [rows, depth], [depth, stride] of which `columns` are wanted
  float* out;              // [rows, stride]
  int64_t rows, columns, depth, stride;
};

// Up to so many columns dot products are faster: of weights that become floats, and of int8 that become bfloat16.
constexpr int64_t kFewConverted = 8, kFewNarrowed = 7;

// Rows of one piece of work: few enough for an even end and for the second cache, enough to be worth a look at the
// counter, and a multiple of what any instruction set takes together.
int64_t rows_of_piece(const ffi::ThreadPool& pool, int64_t rows) {
  return std::clamp<int64_t>(ceil_div(ceil_div(rows, pool.num_threads() * 8), 24) * 24, 24, 192);
}

// work(first row, rows)
template <class Work>
void for_pieces(ffi::ThreadPool& pool, const Product& p, const Work& work) {
  int64_t piece = rows_of_piece(pool, p.rows);
  parallel(pool, ceil_div(p.rows, piece), [&](int64_t i) { work(i * piece, std::min(piece, p.rows - i * piece)); });
}

// pack(first column, columns, width) for each panel.
template <class Pack>
void pack_panels(ffi::ThreadPool& pool, const Kernels& kernels, const Product& p, const Pack& pack) {
  parallel(pool, ceil_div(p.columns, kernels.lanes), [&](int64_t i) {
    int64_t first = i * kernels.lanes, here = std::min(kernels.lanes, p.columns - first);
    pack(first, here, here <= kernels.slim ? kernels.slim : kernels.lanes);
  });
}

void with_dots(ffi::ThreadPool& pool, const Kernels& kernels, const Product& p) {
  int64_t padded = ceil_div(p.depth, 32) * 32;
  float* x = scratch(p.columns * padded);
  kernels.pack_columns(p.x_type, p.x, p.stride, p.columns, p.depth, x, padded);
  for_pieces(pool, p, [&](int64_t first, int64_t rows) {
    kernels.product_dots(p.type, at(p.weight, p.type, first * p.depth), x, padded, p.out + first * p.stride, p.stride,
                         rows, p.columns, p.depth);
  });
}

void with_panels(ffi::ThreadPool& pool, const Kernels& kernels, const Product& p) {
  const float* x = (const float*)p.x;
  bool is_panel = p.x_type == Type::kFloat32 && p.stride == (p.columns <= kernels.slim ? kernels.slim : kernels.lanes);
  if (!is_panel) {
    float* packed = scratch(ceil_div(p.columns, kernels.lanes) * kernels.lanes * p.depth);
    x = packed;
    pack_panels(pool, kernels, p, [&](int64_t first, int64_t columns, int64_t width) {
      const char* from = at(p.x, p.x_type, first);
      kernels.pack_panel(p.x_type, from, p.stride, columns, width, p.depth, packed + first * p.depth);
    });
  }
  for_pieces(pool, p, [&](int64_t first, int64_t rows) {
    kernels.product_panels(p.type, at(p.weight, p.type, first * p.depth), x, p.out + first * p.stride, p.stride, rows,
                           p.columns, p.depth);
  });
}

void narrow_with_dots(ffi::ThreadPool& pool, const Kernels& kernels, const Product& p) {
  int64_t padded = ceil_div(p.depth, 32) * 32;
  auto* from = (const Bfloat16*)p.x;
  auto* x = (Bfloat16*)scratch(padded);
  for (int64_t k = 0; k < padded; k++) x[k] = k < p.depth ? from[k * p.stride] : 0;
  for_pieces(pool, p, [&](int64_t first, int64_t rows) {
    auto* own = (const Bfloat16*)p.weight + first * p.depth;
    kernels.narrow->product_dots(own, x, p.out + first * p.stride, p.stride, rows, p.depth);
  });
}

void narrow_with_panels(ffi::ThreadPool& pool, const Kernels& kernels, const Product& p) {
  int64_t even = p.depth + p.depth % 2;
  auto* x = (Bfloat16*)scratch(ceil_div(p.columns, kernels.lanes) * kernels.lanes * even);
  pack_panels(pool, kernels, p, [&](int64_t first, int64_t columns, int64_t width) {
    kernels.narrow->pack_panel((const Bfloat16*)p.x + first, p.stride, columns, width, p.depth, x + first * even);
  });
  for_pieces(pool, p, [&](int64_t first, int64_t rows) {
    const char* own = at(p.weight, p.type, first * p.depth);
    kernels.narrow->product_panels(p.type, own, x, p.out + first * p.stride, p.stride, rows, p.columns, p.depth);
  });
}

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer weight, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> used,
                   ffi::Result<ffi::Buffer<ffi::F32>> out, std::string_view isa) {
  const Kernels* kernels = find_kernels(std::string(isa).c_str());
  if (!kernels) return wrong("this processor has no " + std::string(isa));
  Product p = {};
  if (!type_of(weight.element_type(), &p.type) || !type_of(x.element_type(), &p.x_type) || p.x_type == Type::kInt8)
    return wrong("products take float32, bfloat16 and, of weights, int8");
  auto wd = weight.dimensions(), xd = x.dimensions();
  if (wd.size() != 2 || xd.size() != 2 || wd[1] != xd[0]) return wrong("sizes that do not fit together");
  p.rows = wd[0], p.depth = wd[1], p.stride = xd[1];
  p.columns = used.element_count() ? std::min<int64_t>(std::max(0, used.typed_data()[0]), p.stride) : p.stride;
  p.weight = weight.untyped_data(), p.x = x.untyped_data(), p.out = out->typed_data();
  if (p.columns < p.stride)  // nobody needs the others, but they must be numbers
    for (int64_t r = 0; r < p.rows; r++)
      std::memset(p.out + r * p.stride + p.columns, 0, (p.stride - p.columns) * sizeof(float));
  if (p.columns == 0) return ffi::Error::Success();
  bool narrow = kernels->narrow && p.x_type == Type::kBfloat16 && p.type != Type::kFloat32;
  if (p.type == Type::kInt8 && p.columns <= kFewNarrowed) narrow = false;
  if (narrow) (p.columns == 1 ? narrow_with_dots : narrow_with_panels)(pool, *kernels, p);
  else (p.columns <= (p.type == Type::kFloat32 ? 1 : kFewConverted) ? with_dots : with_panels)(pool, *kernels, p);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jmemserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmemserve_product, jmemserve::product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // weight
                                  .Arg<ffi::AnyBuffer>()         // x
                                  .Arg<ffi::Buffer<ffi::S32>>()  // columns used, or none: all
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
