#include "kernels.h"

#define WIDTH 4
#define ROWS 6
#define DOT_ROWS 2

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "product.inc"
#include "attention.inc"
}  // namespace

extern const Kernels kBase = {"base",      product_few, product_many, pack_panel, pack_columns,
                               write_token, attend_one,  combine,      attend_tile, tile_floats,
                               kPanel,      32,          kRowBlock,    kDepthBlock, nullptr};

}  // namespace jmemserve
