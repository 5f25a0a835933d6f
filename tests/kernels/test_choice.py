"""Which attention backend is taken, and that what is asked for is never replaced silently."""

import pytest

from jmemserve.config import AttentionBackend
from jmemserve.kernels import BACKENDS
from jmemserve.kernels.choice import PREFERRED, Need, choose

NEED = Need("cpu", "cpu", "float32", 2, 4, 64, 16, 2)


def test_every_backend_has_a_name_in_the_configuration() -> None:
    assert {backend.value for backend in AttentionBackend} == {"auto", *BACKENDS}
    assert all(names[-1] == "xla" and set(names) <= set(BACKENDS) for names in PREFERRED.values())


@pytest.mark.parametrize("platform", [*PREFERRED, "something else"])
def test_auto_always_finds_one(platform: str) -> None:
    choice = choose("auto", Need(platform, "unheard of", "float32", 1, 1, 10, 3, 1))
    assert choice.name == "xla" and all(reason for _, reason in choice.refused)


def test_a_name_is_taken_at_its_word() -> None:
    assert choose("reference", NEED).name == "reference"
