#include <immintrin.h>

#include "kernels.h"

#define WIDTH 16
#define ROWS 12
#define DOT_ROWS 4
#define LANE_ROWS 8
#define LANE_VECTORS 1
#define SLIM_WIDTH 8

namespace jmemserve {
namespace {
#include "vectors.inc"
#include "dots.inc"
#include "lanes.inc"
#include "attention.inc"
#include "narrow.inc"

const Narrow kNarrow = {narrow_dots, narrow_panels, narrow_panel};
}  // namespace

extern const Kernels kAvx512bf16 = {"avx512bf16",
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
                               &kNarrow};

}  // namespace jmemserve
