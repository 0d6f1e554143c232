"""Ranks arranged along named axes: today `replicate` and `shard`; nothing may assume that the world is one axis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Ranks 0..n-1 in row-major order over `axes`, for example (("replicate", 2), ("shard", 4))."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"mesh axes must have different names, got {', '.join(names)}")
        for name, size in self.axes:
            if size < 1:
                raise ValueError(f"mesh axis {name!r} must have at least one rank, got {size}")

    @property
    def num_ranks(self) -> int:
        count = 1
        for _, size in self.axes:
            count *= size
        return count

    def size(self, axis: str) -> int:
        """Ranks along one axis; 1 if the mesh does not have it."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        place: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, place[name] = divmod(rank, size)
        return place

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` only, in order."""
        here = self.coordinates(rank)
        return tuple(
            other
            for other in range(self.num_ranks)
            if all(self.coordinates(other)[name] == here[name] for name, _ in self.axes if name != axis)
        )


def data_parallel_mesh(num_ranks: int) -> Mesh:
    """Plain ZeRO: every rank holds its own part."""
    return Mesh((("replicate", 1), ("shard", num_ranks)))
