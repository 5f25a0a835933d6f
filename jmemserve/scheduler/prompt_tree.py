"""Which instance holds which prefix: the plain version."""

from typing import NamedTuple

from jmemserve.kvpool.runs import TOKEN_BYTES


class Holding(NamedTuple):
    """What an instance holds of a prompt."""

    blocks: int  # leading blocks, in any medium
    dram: int  # of these, only in DRAM


class PromptTree:
    """Prefixes as whole bytes, each with a set of instances per medium."""

    def __init__(self, block_size: int):
        self.step = block_size * TOKEN_BYTES
        self.instances: list[str] = []
        self.have: dict[tuple[str, bytes], dict[str, set[int]]] = {}

    def join(self, instance: str) -> None:
        self.instances.append(instance)

    def leave(self, instance: str) -> None:
        self.instances.remove(instance)
        for key in list(self.have):
            self.drop(key, instance, 0)
            self.drop(key, instance, 1)

    def put(self, key: tuple[str, bytes], instance: str, medium: int) -> None:
        self.have.setdefault(key, {}).setdefault(instance, set()).add(medium)

    def drop(self, key: tuple[str, bytes], instance: str, medium: int) -> None:
        found = self.have.get(key, {})
        if instance in found:
            found[instance].discard(medium)
            if not found[instance]:
                del found[instance]
        if key in self.have and not self.have[key]:
            del self.have[key]

    def match(self, raw: bytes, salt: str, blocks: int) -> dict[str, Holding]:
        out = {}
        for instance in self.instances:
            count = dram = 0
            for place in range(blocks):
                media = self.have.get((salt, raw[: (place + 1) * self.step]), {}).get(instance)
                if not media:
                    break
                count += 1
                dram += media == {1}
            if count:
                out[instance] = Holding(count, dram)
        return out

    def clear(self) -> None:
        self.have.clear()

    def check(self) -> None:
        pass
