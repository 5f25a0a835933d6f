"""The garbage collector of a serving process looks at what requests leave, not at what was loaded."""

import gc
from collections.abc import Iterator

import pytest

from jmemserve.engine import garbage


@pytest.fixture
def restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_what_was_loaded_is_frozen_and_looks_are_rare(restored: None) -> None:
    gc.unfreeze()
    before = gc.get_threshold()
    loaded = [[] for _ in range(1000)]
    garbage.settle()
    assert gc.get_freeze_count() > len(loaded)
    assert all(after > usual for after, usual in zip(gc.get_threshold(), before, strict=True))
    assert gc.isenabled()
