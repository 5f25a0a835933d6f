"""A prompt and some decoding by the compiled step with the TPU's kernels, simulated, beside the portable attention."""

import numpy as np
import pytest
from engine_driver import tiny_model
from jax.experimental.pallas import tpu as pltpu

from jmemserve.config import LoadFormat, parse_mesh
from jmemserve.engine.mesh import make_mesh
from jmemserve.engine.orders import Order
from jmemserve.engine.runner import Runner
from jmemserve.kernels import fold_of
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool.store import PageStore
from jmemserve.models import load_config, weights
from jmemserve.scheduler.plan import StepShape
from jmemserve.types import INVALID

SIZE, WIDTH = 8, 3  # tokens of a block, blocks of the longest sequence
PACKED, ONES = StepShape(24, 2), StepShape(2, 2)
TABLES = np.array([[5, 2, 6], [3, 1, 4]], np.int32)
PROMPTS = (11, 6)  # tokens
STEPS = 4  # after the prompts; the first row goes on in its second block, the second begins one


def order_of(shape: StepShape, done: tuple[int, int], lengths: tuple[int, int], tokens: np.ndarray | None) -> Order:
    """``done``: tokens computed before; tokens: of the host, None: those that the step before has chosen."""
    row = np.repeat((0, 1), lengths)
    starts = np.array((0, lengths[0], sum(lengths)))
    place = np.array(done)[row] + np.arange(len(row)) - starts[row]
    padded = np.zeros((3, shape.tokens), np.int32)  # tokens, positions, slots
    padded[0, : len(row)] = 0 if tokens is None else tokens
    padded[1:, : len(row)] = place, TABLES[row, place // SIZE] * SIZE + place % SIZE
    from_last = np.full(2, INVALID) if tokens is not None else np.arange(2)
    parts = (padded.ravel(), TABLES.ravel(), np.add(done, lengths), starts, from_last)
    return Order(shape, np.concatenate(parts).astype(np.int32), None, None, False)


@pytest.mark.slow  # simulating: a quarter of a minute
@pytest.mark.parametrize("head_dim", [128, 64])
def test_the_same_tokens_and_pages_as_by_xla(tmp_path, head_dim: int) -> None:
    folder = tiny_model(tmp_path, head_dim=head_dim, num_attention_heads=4)
    config, mesh = load_config(folder), make_mesh(parse_mesh("colocated")[0], 1)
    sizes = (config.num_layers, config.num_kv_heads, SIZE, config.head_dim, "float32")
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, sum(PROMPTS))
    chosen, pages = {}, {}
    for backend in ("xla", "tpu"):
        graph, state = weights.load(folder, LoadFormat.DUMMY, config, "float32", mesh, 0, lambda done, total: None)
        store = PageStore(PageLayout(*sizes, fold=fold_of(backend, config.head_dim)), 7, mesh)
        runner = Runner(graph, state, store, mesh, (ONES, PACKED), config.vocab_size, SIZE * WIDTH, backend)
        with pltpu.force_tpu_interpret_mode():
            chosen[backend] = [np.asarray(runner.enqueue(order_of(PACKED, (0, 0), PROMPTS, prompts))[0])]
            for step in range(STEPS):
                done = PROMPTS[0] + step, PROMPTS[1] + step
                chosen[backend].append(np.asarray(runner.enqueue(order_of(ONES, done, (1, 1), None))[0]))
        pages[backend] = np.concatenate([store.gather([number]) for number in range(1, 8)])
    np.testing.assert_array_equal(chosen["tpu"], chosen["xla"])
    np.testing.assert_allclose(pages["tpu"], pages["xla"], rtol=1e-4, atol=1e-5)
    assert np.abs(pages["tpu"][TABLES[:, 0] - 1]).min() > 0, "every slot of a full block has been written"
