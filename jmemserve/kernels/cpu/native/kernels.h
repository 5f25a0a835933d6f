// What every instruction set offers: the same functions, compiled once for each, chosen when the library is used.
//
// Shape letters are those of jmemserve/kernels/__init__.py. Nothing here allocates, locks or throws.
#pragma once

#include <cstdint>

namespace jmemserve {

using Bfloat16 = uint16_t;  // its bits

enum class Type { kFloat32, kBfloat16, kInt8 };

// Where the keys and values of one layer are: page p's begin at data + p * page_stride (in elements), keys first.
struct Pages {
  void* data;  // of the layer
  Type type;
  int64_t page_stride, half_stride, head_stride;  // a head's C tokens of H numbers are contiguous
  int64_t num_pages, block_size, head_dim, kv_heads;
};

// How scores are made. window and soft_cap are 0 where there is none.
struct Rule {
  float scale;
  int64_t window;
  float soft_cap;
};

// One tile of queries of one kv head of one sequence.
struct Tile {
  const void* queries;  // [count, N, H] with `query_stride` elements between tokens: the G heads of the kv head first
  void* out;            // the same shape
  const float* sinks;   // [G] or null
  int64_t query_stride;
  int64_t group;
  int64_t head;            // kv head
  int64_t first_position;  // of the first query; the others follow it
  int64_t count;           // queries
  const int32_t* table;    // pages of the sequence
};

// Products with bfloat16 where the processor has an instruction for them: x stays as narrow as it is. As the functions of
// the same names below, but that panels are [depth / 2, width, 2], with a zero behind an odd depth.
struct Narrow {
  // bfloat16 with one column, which has zeros up to a multiple of 32.
  void (*product_dots)(const Bfloat16* weight, const Bfloat16* x, float* out, int64_t out_stride, int64_t rows,
                       int64_t depth);
  void (*product_panels)(Type type, const void* weight, const Bfloat16* x, float* out, int64_t out_stride, int64_t rows,
                         int64_t columns, int64_t depth);
  void (*pack_panel)(const Bfloat16* x, int64_t x_stride, int64_t columns, int64_t width, int64_t depth,
                     Bfloat16* panel);
};

struct Kernels {
  const char* name;
  // out[rows, columns] (stride out_stride) = weight[rows, depth] x columns of x, which are few: x lies as
  // [columns, x_stride], zeros behind depth.
  void (*product_dots)(Type type, const void* weight, const float* x, int64_t x_stride, float* out,
                       int64_t out_stride, int64_t rows, int64_t columns, int64_t depth);
  // The same with x in panels [depth, lanes], the last one [depth, slim] if that is enough.
  void (*product_panels)(Type type, const void* weight, const float* x, float* out, int64_t out_stride, int64_t rows,
                         int64_t columns, int64_t depth);
  // x [depth, x_stride] -> [columns, padded] floats.
  void (*pack_columns)(Type type, const void* x, int64_t x_stride, int64_t columns, int64_t depth, float* out,
                       int64_t padded);
  // The first columns of x [depth, x_stride] as a panel of `width` floats; zeros behind `columns`.
  void (*pack_panel)(Type type, const void* x, int64_t x_stride, int64_t columns, int64_t width, int64_t depth,
                     float* panel);
  // k, v [K, H] of one token to its place in a page.
  void (*write_token)(const Pages& pages, int64_t page, int64_t offset, Type type, const void* k, const void* v);
  // One query of each of the G heads against keys first .. last - 1: partial[G, H + 2] is (mixed, top, mass).
  void (*attend_one)(const Pages& pages, const Rule& rule, const Tile& tile, Type type, int64_t first, int64_t last,
                     float* partial);
  // Partial results of one query, one after the other, to its G heads of output.
  void (*combine)(const Tile& tile, Type type, int64_t head_dim, const float* partials, int64_t count);
  // A tile of several queries against everything before them. `buffer` is scratch of tile_floats().
  void (*attend_tile)(const Pages& pages, const Rule& rule, const Tile& tile, Type type, float* buffer);
  int64_t (*tile_floats)(int64_t queries, int64_t group, int64_t head_dim);
  int64_t lanes, slim;   // widths of panels
  const Narrow* narrow;  // or null
};

// The best that this processor has, or the one of that name; null if it has not.
const Kernels* find_kernels(const char* name);

extern const Kernels kBase;  // what the compiler assumes anyway
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512bf16;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace jmemserve
