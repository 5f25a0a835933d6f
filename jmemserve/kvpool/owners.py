"""Whose the reference of an allocation is, where it is somebody's by name: a peer, mostly."""

from collections.abc import Iterable


class Owners:
    """Locations by owner. A location has at most one named reference: that of its allocation."""

    __slots__ = ("_by_owner", "_of")

    def __init__(self) -> None:
        self._of: dict[int, str] = {}
        self._by_owner: dict[str, set[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def __contains__(self, location: int) -> bool:
        return location in self._of

    def owner(self, location: int) -> str | None:
        """Whose it is, if anybody's by name."""
        return self._of.get(location)

    def of(self, owner: str) -> list[int]:
        """The locations of an owner."""
        return sorted(self._by_owner.get(owner, ()))

    def counts(self) -> dict[str, int]:
        """How many references each owner has."""
        return {owner: len(locations) for owner, locations in self._by_owner.items()}

    def add(self, locations: list[int], owner: str) -> None:
        """These were allocated for this owner."""
        if locations:
            self._of.update(dict.fromkeys(locations, owner))
            self._by_owner.setdefault(owner, set()).update(locations)

    def forget(self, locations: Iterable[int], owner: str) -> None:
        """The owner's references on these are given back, or somebody else's now."""
        owned = self._by_owner.get(owner, set())
        for location in locations:
            del self._of[location]
            owned.remove(location)
        if not owned:
            self._by_owner.pop(owner, None)

    def check(self) -> set[int]:
        """Assert that both tables agree; return every location with an owner."""
        expected = {location: owner for owner, locations in self._by_owner.items() for location in locations}
        assert expected == self._of, f"{expected=} != {self._of=}"
        assert all(self._by_owner.values()), f"an owner of nothing is kept: {self._by_owner}"
        return set(expected)
