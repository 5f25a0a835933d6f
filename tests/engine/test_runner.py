"""The compiled step: the pages are never copied, and arithmetic is checked before anything is served."""

import dataclasses
import re
import threading
from collections.abc import Callable

import jax
import numpy as np
import pytest
from engine_driver import tiny_model
from jax.sharding import Mesh

from jmemserve.config import AttentionBackend, EngineConfig, LoadFormat, demo_folder, parse_mesh
from jmemserve.engine import build, selftest
from jmemserve.engine.mesh import make_mesh
from jmemserve.engine.report import SilentReport
from jmemserve.engine.runner import Runner
from jmemserve.errors import ConfigError
from jmemserve.kernels import choice
from jmemserve.kernels.choice import Need
from jmemserve.kernels.cpu import library
from jmemserve.kernels.pages import PageLayout
from jmemserve.kvpool.store import PageStore
from jmemserve.models import load_config, weights
from jmemserve.scheduler.plan import step_shapes


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(parse_mesh("colocated")[0], 1)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("aggregated", [True, False])
def test_no_step_copies_the_pages(tmp_path, mesh: Mesh, aggregated: bool, backend: str) -> None:
    if backend == "cpu" and not library.is_there():
        pytest.skip("the C++ library was not built")
    folder = tiny_model(tmp_path)
    config = load_config(folder)
    graph, state = weights.load(folder, LoadFormat.DUMMY, config, "float32", mesh, 0, lambda done, total: None)
    layout = PageLayout(config.num_layers, config.num_kv_heads, 16, config.head_dim, "float32", aggregated)
    shapes = step_shapes(True, True, 4, 64)
    temporary = []
    for num_blocks in (200, 2000):  # what a step needs beside them must not grow with the pages
        store = PageStore(layout, num_blocks, mesh)
        runner = Runner(graph, state, store, mesh, shapes, config.vocab_size, 256, backend)
        for program in runner.programs():
            program()
        temporary.append({shape: step.memory_analysis().temp_size_in_bytes for shape, step in runner._steps.items()})
        assert {shape.seqs for shape in shapes} == {rows for _, rows in runner._samplers}
    assert temporary[0] == temporary[1]
    for step in runner._steps.values():
        text, pages = step.as_text(), jax.tree.leaves(runner.store.pages)
        head = text[: text.index("\n")]
        first = len(runner._leaves)  # the pages' place among the parameters
        aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}", head)
        expected = {(place, first + place) for place in range(len(pages))}
        assert expected <= {(int(output), int(given)) for output, given in aliased}, head
        shape = "f32[" + ",".join(map(str, pages[0].shape)) + "]"
        assert shape in text, (shape, head)
        copies = [line for line in text.splitlines() if re.search(rf"= {re.escape(shape)}\S* copy", line)]
        assert not copies, copies


def test_programs_are_compiled_by_several_threads_at_once(
    tmp_path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing and lowering too: nothing of it is done by who waits."""
    folder = tiny_model(tmp_path)
    config = load_config(folder)
    graph, state = weights.load(folder, LoadFormat.DUMMY, config, "float32", mesh, 0, lambda done, total: None)
    layout = PageLayout(config.num_layers, config.num_kv_heads, 16, config.head_dim, "float32")
    shapes = step_shapes(True, True, 1, 16)
    runner = Runner(graph, state, PageStore(layout, 20, mesh), mesh, shapes, config.vocab_size, 256)
    together, threads = threading.Barrier(2), set[int]()

    def with_another(program: Callable[[], None]) -> Callable[[], None]:
        def compile_it() -> None:
            together.wait(30)  # an error, if nobody compiles meanwhile
            threads.add(threading.get_ident())
            program()

        return compile_it

    programs = runner.programs()
    some = [with_another(program) for program in programs[:2]]
    monkeypatch.setattr(runner, "programs", lambda: [*some, *programs[2:]])
    assert len(list(runner.compile_all(threads=2))) == len(programs)
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert set(runner._steps) == set(shapes)


def test_blocks_move_between_meshes_of_different_sizes() -> None:
    layout = PageLayout(2, 4, 8, 16, "float32")
    one, two = parse_mesh("prefill+decode:model=2")
    source, target = PageStore(layout, 90, make_mesh(one, 3)), PageStore(layout, 80, make_mesh(two, 3))
    rng = np.random.default_rng(0)
    blocks = rng.normal(size=(70, *layout.page_shape)).astype(np.float32)
    source.pages = jax.device_put(
        np.concatenate((np.zeros((21, *layout.page_shape), np.float32), blocks)), source.sharding
    )
    taken = list(range(21, 91))[::-1]
    for start, stop in source.cuts(70):
        target.scatter(list(range(5, 75))[start:stop], source.gather(taken[start:stop]))
    np.testing.assert_array_equal(np.asarray(target.pages)[5:75], blocks[::-1])
    assert len(target.pages.sharding.device_set) == 2


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arithmetic_is_checked(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, dtype: str, aggregated: bool) -> None:
    device = mesh.local_devices[0]
    need = Need("cpu", "cpu", dtype, 2, 3, 64, 16, 4, aggregated)
    assert selftest.check_arithmetic(device, "xla", need) < (1e-5 if dtype == "float32" else 2e-2)
    monkeypatch.setattr(selftest, "attention_backend", lambda name: lambda q, k, v, pages, *rest: (q, pages))
    with pytest.raises(ConfigError, match="computes attention by 'xla' wrongly"):
        selftest.check_arithmetic(device, "xla", need)


@pytest.mark.parametrize("forgotten", ["window", "soft_cap"])
def test_what_the_model_asks_of_attention_is_checked(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    need = Need("cpu", "cpu", "float32", 2, 3, 64, 16, 4, window=True, soft_cap=True)
    assert selftest.check_arithmetic(mesh.local_devices[0], "xla", need) < 1e-5
    right = selftest.attention_backend("xla")

    def forgetful(q, k, v, pages, layer, ragged, rule):
        return right(q, k, v, pages, layer, ragged, dataclasses.replace(rule, **{forgotten: None}))

    monkeypatch.setattr(selftest, "attention_backend", lambda name: forgetful)
    with pytest.raises(ConfigError, match="computes attention by 'xla' wrongly"):
        selftest.check_arithmetic(mesh.local_devices[0], "xla", need)


def test_an_instance_starts_without_the_kernel_that_fails(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be chosen raises on this device: the next one serves, and the reason is said."""
    real = selftest.attention_backend

    def broken(name: str):
        if name == "xla":
            return real(name)
        raise NotImplementedError("this device is too old\nand more words")

    said: list[str] = []
    monkeypatch.setattr(selftest, "attention_backend", broken)
    monkeypatch.setattr(choice, "PREFERRED", {"cpu": ("reference", "xla")})
    engine, config = EngineConfig(), load_config(demo_folder())
    report = SilentReport()
    monkeypatch.setattr(report, "line", said.append, raising=False)
    assert build._choose_attention(engine, config, mesh, "float32", report) == "xla"
    assert said[0].endswith("attention: not reference: this device is too old")
    with pytest.raises(ConfigError, match="--attention: attention is not possible here by 'reference': this device"):
        asked = EngineConfig(attention=AttentionBackend.REFERENCE)
        build._choose_attention(asked, config, mesh, "float32", report)
