// Attention as XLA calls it: checks of shapes, division of the work among its threads, nothing of the arithmetic. And
// the choice of the instruction set.

#include <cstring>
#include <string>
#include <vector>

#include "calls.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jmemserve {

const Kernels* find_kernels(const char* name) {
  const Kernels* here[4];
  int count = 0;
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  avx512 = avx512 && __builtin_cpu_supports("fma");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) here[count++] = &kAvx512bf16;
  if (avx512) here[count++] = &kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) here[count++] = &kAvx2;
#elif defined(__aarch64__)
  here[count++] = &kNeon;  // every 64-bit ARM has it
#endif
  here[count++] = &kBase;
  for (int i = 0; i < count; i++)
    if (!*name || !std::strcmp(name, here[i]->name)) return here[i];
  return nullptr;
}

namespace {

constexpr int64_t kChunk = 512;  // keys of one piece of work of a row with one new token: fixed, so that a row's
                                 // result does not depend on who shares the batch
constexpr int64_t kTileRows = 64;  // queries times heads of a tile, about

constexpr int64_t kWritten = 32;   // tokens whose keys and values one piece of work writes

struct Piece {
  int32_t row, head, first, partial;  // of a row with one new token: first key, and place of the partial result
};

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer given,
                  ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> context,
                  ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> written, int64_t layer, float scale, int64_t window, float soft_cap,
                  std::string_view isa) {
  const Kernels* kernels = find_kernels(std::string(isa).c_str());
  if (!kernels) return wrong("this processor has no " + std::string(isa));
  Type type, page_type;
  if (!type_of(q.element_type(), &type) || !type_of(given.element_type(), &page_type) || type == Type::kInt8 ||
      page_type == Type::kInt8 || k.element_type() != q.element_type() || v.element_type() != q.element_type())
    return wrong("attention takes float32 and bfloat16");
  if (given.untyped_data() != written->untyped_data()) return wrong("the pages must be written in place");
  auto qd = q.dimensions(), kd = k.dimensions(), pd = given.dimensions();
  bool aggregated = pd.size() == 6;
  if (qd.size() != 3 || kd.size() != 3 || (!aggregated && pd.size() != 5)) return wrong("unknown shapes");
  int64_t num_tokens = qd[0], num_heads = qd[1], head_dim = qd[2];
  int64_t kv_heads = pd[pd.size() - 3], size = pd[pd.size() - 2];
  int64_t rows = context.element_count(), width = tables.dimensions()[1], layers = aggregated ? pd[1] : 1;
  if (head_dim > 512 || pd.back() != head_dim || kd[1] != kv_heads || num_heads % kv_heads || layer < 0 ||
      layer >= layers || int64_t(starts.element_count()) != rows + 1 || tables.dimensions()[0] != rows ||
      int64_t(slots.element_count()) < num_tokens ||
      (sinks.element_count() && int64_t(sinks.element_count()) != num_heads))
    return wrong("sizes that do not fit together");
  int64_t group = num_heads / kv_heads, item = size_of(page_type);
  Pages pages = {(char*)written->untyped_data() + layer * 2 * kv_heads * size * head_dim * item,
                 page_type,
                 layers * 2 * kv_heads * size * head_dim,
                 kv_heads * size * head_dim,
                 size * head_dim,
                 pd[0],
                 size,
                 head_dim,
                 kv_heads};
  Rule rule = {scale, window, soft_cap};
  const int32_t *slot = slots.typed_data(), *table = tables.typed_data(), *length = context.typed_data(),
                *start = starts.typed_data();
  int64_t used = std::min<int64_t>(start[rows], num_tokens);
  for (int64_t t = 0; t < used; t++)
    if (slot[t] < 0 || slot[t] / size >= pd[0]) return wrong("a token is to be written outside of the pages");
  parallel(pool, ceil_div(used, kWritten), [&](int64_t i) {
    for (int64_t t = i * kWritten; t < std::min(used, (i + 1) * kWritten); t++) {
      int64_t place = t * kv_heads * head_dim;
      kernels->write_token(pages, slot[t] / size, slot[t] % size, type, at(k.untyped_data(), type, place),
                           at(v.untyped_data(), type, place));
    }
  });
  char* result = (char*)out->untyped_data();
  std::memset(result + used * num_heads * head_dim * size_of(type), 0,
              (num_tokens - used) * num_heads * head_dim * size_of(type));

  auto make_tile = [&](int64_t row, int64_t head, int64_t token, int64_t count) {
    int64_t place = (token * num_heads + head * group) * head_dim;
    int64_t first = length[row] - (start[row + 1] - token);
    const float* own = sinks.element_count() ? sinks.typed_data() + head * group : nullptr;
    return Tile{at(q.untyped_data(), type, place), result + place * size_of(type), own, num_heads * head_dim, group,
                head, first, count, table + row * width};
  };
  std::vector<Piece> pieces;  // rows with one new token
  std::vector<Piece> tiles;   // others: `first` is the first token of the tile
  int64_t partials = 0, per_tile = std::max<int64_t>(1, kTileRows / group);
  for (int64_t b = 0; b < rows; b++) {
    int64_t fresh = start[b + 1] - start[b];
    if (fresh <= 0) continue;
    if (start[b] < 0 || start[b + 1] > num_tokens) return wrong("a row has tokens that are not there");
    if (length[b] < fresh || length[b] > width * size) return wrong("a row's context does not fit its table");
    // The first key that the row's first new token sees.
    int64_t low = rule.window ? std::max<int64_t>(0, length[b] - fresh + 1 - rule.window) : 0;
    for (int64_t p = low / size; p < ceil_div(length[b], size); p++)
      if (table[b * width + p] < 0 || table[b * width + p] >= pd[0]) return wrong("a table names no page");
    for (int64_t h = 0; h < kv_heads; h++) {
      if (fresh == 1)
        for (int64_t first = low; first < length[b]; first = (first / kChunk + 1) * kChunk)
          pieces.push_back({int32_t(b), int32_t(h), int32_t(first), int32_t(partials++)});
      else
        for (int64_t t = start[b]; t < start[b + 1]; t += per_tile)
          tiles.push_back({int32_t(b), int32_t(h), int32_t(t), 0});
    }
  }
  int64_t stride = group * (head_dim + 2);
  std::vector<float> partial(partials * stride);
  parallel(pool, int64_t(tiles.size() + pieces.size()), [&](int64_t i) {
    if (i < int64_t(tiles.size())) {
      Piece piece = tiles[tiles.size() - 1 - i];  // the last ones of a row see most keys: first, for an even end
      int64_t count = std::min<int64_t>(per_tile, start[piece.row + 1] - piece.first);
      Tile tile = make_tile(piece.row, piece.head, piece.first, count);
      kernels->attend_tile(pages, rule, tile, type, scratch(kernels->tile_floats(count, group, head_dim)));
      return;
    }
    const Piece& piece = pieces[i - tiles.size()];
    Tile tile = make_tile(piece.row, piece.head, start[piece.row], 1);
    int64_t last = std::min<int64_t>(length[piece.row], (piece.first / kChunk + 1) * kChunk);
    kernels->attend_one(pages, rule, tile, type, piece.first, last, partial.data() + piece.partial * stride);
  });
  for (size_t i = 0; i < pieces.size();) {
    size_t end = i + 1;
    while (end < pieces.size() && pieces[end].row == pieces[i].row && pieces[end].head == pieces[i].head) end++;
    Tile tile = make_tile(pieces[i].row, pieces[i].head, start[pieces[i].row], 1);
    kernels->combine(tile, type, head_dim, partial.data() + pieces[i].partial * stride, int64_t(end - i));
    i = end;
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jmemserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jmemserve_attend, jmemserve::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // q
                                  .Arg<ffi::AnyBuffer>()         // k
                                  .Arg<ffi::AnyBuffer>()         // v
                                  .Arg<ffi::AnyBuffer>()         // pages
                                  .Arg<ffi::Buffer<ffi::S32>>()  // slots
                                  .Arg<ffi::Buffer<ffi::S32>>()  // tables
                                  .Arg<ffi::Buffer<ffi::S32>>()  // context
                                  .Arg<ffi::Buffer<ffi::S32>>()  // starts
                                  .Arg<ffi::Buffer<ffi::F32>>()  // sinks, or none
                                  .Ret<ffi::AnyBuffer>()         // out
                                  .Ret<ffi::AnyBuffer>()         // pages, the same memory
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap")
                                  .Attr<std::string_view>("isa"));

// The name of what is chosen for "", or the same name if this processor has it; else null.
extern "C" const char* jmemserve_isa(const char* name) {
  const jmemserve::Kernels* kernels = jmemserve::find_kernels(name);
  return kernels ? kernels->name : nullptr;
}
