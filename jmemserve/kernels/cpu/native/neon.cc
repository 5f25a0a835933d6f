#include "kernels.h"

#define WIDTH 4
#define ROWS 8
#define DOT_ROWS 4

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "product.inc"
#include "attention.inc"
}  // namespace

extern const Kernels kNeon = {"neon",      product_few, product_many, pack_panel, pack_columns,
                               write_token, attend_one,  combine,      attend_tile, tile_floats,
                               kPanel,      32,          kRowBlock,    kDepthBlock, nullptr};

}  // namespace jmemserve
