"""Which attention backend is taken, and that what is asked for is never replaced silently."""

import pytest

from jmemserve.config import AttentionBackend
from jmemserve.kernels import BACKENDS
from jmemserve.kernels.choice import PREFERRED, Need, choose, why_not

NEED = Need("cpu", "cpu", "float32", 2, 4, 64, 16, 2)


def test_every_backend_has_a_name_in_the_configuration() -> None:
    assert {backend.value for backend in AttentionBackend} == {"auto", *BACKENDS}
    assert all(names[-1] == "xla" and set(names) <= set(BACKENDS) for names in PREFERRED.values())


@pytest.mark.parametrize("platform", [*PREFERRED, "something else"])
def test_auto_always_finds_one(platform: str) -> None:
    need = Need(platform, "unheard of", "float16", 1, 1, 10, 3, 1)
    choice = choose("auto", need)
    assert why_not(choice.name, need) is None and all(reason for _, reason in choice.refused)


def test_a_name_is_taken_at_its_word() -> None:
    assert choose("reference", NEED).name == "reference"


def test_one_that_fails_on_the_device_is_left_out() -> None:
    choice = choose("auto", NEED, lambda name: "it computes nonsense" if name == "cpu" else None)
    assert choice.name == "xla" and choice.refused[0][0] == "cpu"
    with pytest.raises(ValueError, match="not possible here by 'xla': it computes nonsense"):
        choose("xla", NEED, lambda name: "it computes nonsense")
