"""How many updates each parameter has had: known on the host, or only on the device.

[Note: cohorts] Adam's bias correction needs the count of every parameter. Parameters with one count form a cohort and
share a kernel call. Where the host learns whether a step was skipped, a cohort is its count. Where it does not, the
count is a scalar on the device, which a skipped step leaves alone, and a cohort is a set of parameters that have had
gradients in the same steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, MutableMapping

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.core.scalars import send_scalar


class StepCounts(MutableMapping[str, int]):
    """Trainable parameter -> number of updates. Reading may take a host read."""

    @abstractmethod
    def cohort(self, name: str) -> int:
        """Equal for parameters that share a count."""

    @abstractmethod
    def next_count(self, cohort: int) -> int | Tensor:
        """The count that a good step leads to: a number, or a scalar [] fp32 on the device."""

    @abstractmethod
    def advance(self, names: Iterable[str], keep: Tensor | bool) -> None:
        """These parameters have been updated, if `keep`."""

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"the count of {name!r} cannot be deleted: a plan's parameters are fixed")


class HostStepCounts(StepCounts):
    """Counts as numbers on the host."""

    def __init__(self, names: Iterable[str]) -> None:
        self._counts = dict.fromkeys(names, 0)

    def cohort(self, name: str) -> int:
        return self._counts[name]

    def next_count(self, cohort: int) -> int:
        return cohort + 1

    def advance(self, names: Iterable[str], keep: Tensor | bool) -> None:
        for name in names if keep else ():
            self._counts[name] += 1

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def __setitem__(self, name: str, count: int) -> None:
        self._counts[name] = count

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


class DeviceStepCounts(StepCounts):
    """Counts as scalars on the device, one for each cohort. Cohorts only ever divide, the same way on every rank."""

    def __init__(self, names: Iterable[str], accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._cohorts = dict.fromkeys(names, 0)
        self._counts: dict[int, Tensor] = {0: self._make(0)}
        self._made = 1
        self._given: dict[int, int] = {}  # count -> the cohort of the parameters that it was given to, until a step
        self._read: dict[int, int] = {}  # cohort -> its count, as far as it has been read since the last step

    def cohort(self, name: str) -> int:
        return self._cohorts[name]

    def next_count(self, cohort: int) -> Tensor:
        return self._counts[cohort] + 1

    def advance(self, names: Iterable[str], keep: Tensor | bool) -> None:
        self._read.clear()
        self._given.clear()
        updated = set(names)
        added = torch.as_tensor(keep, device=self._accelerator.device).to(torch.float32)
        for cohort in sorted(set(self._cohorts.values())):
            members = [name for name, own in self._cohorts.items() if own == cohort]
            moving = [name for name in members if name in updated]
            if not moving:
                continue
            target = cohort
            if len(moving) < len(members):
                target = self._next()
                self._cohorts.update(dict.fromkeys(moving, target))
            self._counts[target] = self._counts[cohort] + added

    def __getitem__(self, name: str) -> int:
        cohort = self._cohorts[name]
        if cohort not in self._read:
            self._read[cohort] = int(self._accelerator.read_host(self._counts[cohort], tag="state")[0])
        return self._read[cohort]

    def __setitem__(self, name: str, count: int) -> None:
        if name not in self._cohorts:
            raise KeyError(name)
        if count not in self._given:
            self._given[count] = self._next()
            self._counts[self._given[count]] = self._make(count)
        self._cohorts[name] = self._given[count]
        used = set(self._cohorts.values())
        self._counts = {cohort: value for cohort, value in self._counts.items() if cohort in used}
        self._given = {given: cohort for given, cohort in self._given.items() if cohort in used}
        self._read.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._cohorts)

    def __len__(self) -> int:
        return len(self._cohorts)

    def _next(self) -> int:
        self._made += 1
        return self._made - 1

    def _make(self, count: int) -> Tensor:
        return send_scalar(count, self._accelerator.device)
