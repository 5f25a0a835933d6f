#include "kernels.h"

#define WIDTH 4
#define ROWS 8
#define DOT_ROWS 4
#define LANE_ROWS 8
#define LANE_VECTORS 2
#define SLIM_WIDTH 4

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "dots.inc"
#include "lanes.inc"
#include "attention.inc"
}  // namespace

extern const Kernels kNeon = {"neon",
                               product_dots,
                               product_panels,
                               pack_columns,
                               pack_panel,
                               write_token,
                               attend_one,
                               combine,
                               attend_tile,
                               tile_floats,
                               LANES,
                               SLIM,
                               nullptr};

}  // namespace jmemserve
