#include <immintrin.h>

#include "kernels.h"

#define WIDTH 8
#define ROWS 4
#define DOT_ROWS 2

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "product.inc"
#include "attention.inc"
}  // namespace

extern const Kernels kAvx2 = {"avx2",      product_few, product_many, pack_panel, pack_columns,
                               write_token, attend_one,  combine,      attend_tile, tile_floats,
                               kPanel,      32,          kRowBlock,    kDepthBlock, nullptr};

}  // namespace jmemserve
