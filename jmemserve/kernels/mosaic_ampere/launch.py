"""How a kernel is launched."""

from collections.abc import Callable

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmemserve.kernels.mosaic_ampere.tiles import Plan


def launch(
    kernel: Callable, plan: Plan, out: list[jax.ShapeDtypeStruct], scratch: list, grid: dict[str, int]
) -> Callable:
    """The function of arrays that runs ``kernel`` on a grid (names and sizes), one warpgroup for each of its points."""
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret,
    )
