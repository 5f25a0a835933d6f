"""How the tree learns."""

from collections.abc import Sequence

from jmemserve.kvpool.events import Removed, Snapshot, Stored
from jmemserve.scheduler.prompt_tree import PromptTree


class EventFeed:
    def __init__(self, tree: PromptTree, instance: str):
        self.tree, self.instance, self.number = tree, instance, 0
        self.ids: dict[int, tuple[str, bytes]] = {}

    def apply(self, events: Sequence[Stored | Removed]) -> bool:
        for event in events:
            if event.number <= self.number:
                continue
            if event.number != self.number + 1:
                return False
            self.number = event.number
            if isinstance(event, Stored):
                if not self._store(event):
                    return False
            else:
                for one in event.ids:
                    self.tree.drop(self.ids[one], self.instance, event.medium)
        return True

    def _store(self, event: Stored) -> bool:
        salt = event.space.decode().split("\0", 2)[2]
        prefix = b""
        if event.parent:
            if event.parent not in self.ids:
                return False
            prefix = self.ids[event.parent][1]
        for place, one in enumerate(event.ids):
            prefix += event.tokens[place * self.tree.step : (place + 1) * self.tree.step]
            self.ids[one] = salt, prefix
            self.tree.put((salt, prefix), self.instance, event.medium)
        return True

    def restore(self, snapshot: Snapshot) -> None:
        self.close()
        self.number = snapshot.number
        self.extend(snapshot)

    def extend(self, snapshot: Snapshot) -> None:
        for stored in snapshot.stored:
            self._store(stored)

    def close(self) -> None:
        for key in self.ids.values():
            for medium in (0, 1):
                self.tree.drop(key, self.instance, medium)
        self.ids.clear()


class TtlFeed:
    def __init__(self, tree: PromptTree, instance: str, ttl_s: float, max_blocks: int):
        self.tree, self.instance, self.ttl_s, self.max_blocks = tree, instance, ttl_s, max_blocks
        self.times: dict[tuple[str, bytes], float] = {}

    def learn(self, raw: bytes, salt: str, now: float) -> None:
        for place in range(len(raw) // self.tree.step):
            key = salt, raw[: (place + 1) * self.tree.step]
            self.times[key] = now
            self.tree.put(key, self.instance, 0)

    def expire(self, now: float) -> None:
        for key, time in list(self.times.items()):
            if now - time >= self.ttl_s:
                del self.times[key]
                self.tree.drop(key, self.instance, 0)

    def close(self) -> None:
        for key in self.times:
            self.tree.drop(key, self.instance, 0)
        self.times.clear()
