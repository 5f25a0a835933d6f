#include <immintrin.h>

#include "kernels.h"

#define WIDTH 16
#define ROWS 12
#define DOT_ROWS 4

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "product.inc"
#include "attention.inc"
#include "narrow.inc"

const Narrow kNarrow = {narrow_few, narrow_many, narrow_columns, narrow_panel, narrow_widen};
}  // namespace

extern const Kernels kAvx512bf16 = {"avx512bf16",      product_few, product_many, pack_panel, pack_columns,
                               write_token, attend_one,  combine,      attend_tile, tile_floats,
                               kPanel,      32,          kRowBlock,    kDepthBlock, &kNarrow};

}  // namespace jmemserve
