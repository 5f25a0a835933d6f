"""Is the arithmetic right? A small attention on every instance's first device, beside numpy, before anything is served.

Some releases of XLA have given wrong numbers silently; a server that starts on one must say so instead of serving.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmemserve.errors import ConfigError
from jmemserve.kernels import Ragged, attention_backend

ROWS, HEADS, KV_HEADS, HEAD, SIZE, PAGES = 3, 4, 2, 16, 4, 8


def check_arithmetic(mesh: Mesh, attention: str = "xla") -> float:
    """Largest error of paged attention against numpy. Raises ConfigError if it is not small."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(ROWS, HEADS, HEAD)).astype(np.float32)
    pages = rng.normal(size=(PAGES, 1, 2, KV_HEADS, SIZE, HEAD)).astype(np.float32)
    tables = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    context = np.array([8, 3, 5], np.int32)
    starts = np.arange(ROWS + 1, dtype=np.int32)
    with jax.default_device(mesh.local_devices[0]):
        places = (jnp.asarray(x) for x in (context - 1, np.zeros_like(context), tables, context, starts))
        kernel = jax.jit(lambda q, pages, ragged: attention_backend(attention)(q, pages, 0, ragged, None))
        got = np.asarray(kernel(jnp.asarray(q), jnp.asarray(pages), Ragged(*places)))
    error = 0.0
    for row in range(ROWS):
        kv = pages[tables[row], 0].transpose(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, HEAD)[:, :, : context[row]]
        grouped = q[row].reshape(KV_HEADS, HEADS // KV_HEADS, HEAD)
        scores = np.einsum("kgh,ksh->kgs", grouped, kv[0]) * HEAD**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("kgs,ksh->kgh", weights, kv[1]).reshape(HEADS, HEAD)
        error = max(error, float(np.abs(got[row] - expected).max()))
    if not error < 2e-2:  # bfloat16 products of an accelerator's default precision are this good
        raise ConfigError(
            f"this machine computes attention wrongly (error {error:.3g} beside numpy, jax {jax.__version__}); "
            "install another release of jax and jaxlib"
        )
    return error
