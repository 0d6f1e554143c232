"""The accelerator interface: all that a backend author has to read.

A backend implements four facets (memory, streams, collectives, kernels) over `torch.Tensor`, and never
meets ZeRO, plans or optimizers. What is abstract here is the mandatory core; everything else has a
default that is slow but right. A feature is either declared in `Capabilities` and works, or is not
declared and raises `Unsupported` with advice: never a None, a 0, or silence.

The rules a caller may rely on, and a backend must keep:

* Work is ordered by `Work` objects only. `work.wait()` orders whatever the current lane does next after
  that work; on a backend with one synchronous lane it blocks. Outputs may be read, and inputs may be
  rewritten or released, after `wait()` and not before.
* Nothing is chosen, probed or imported when a module is imported.
* A tensor given to a kernel as *consumed* may not be touched again; use what the kernel returns.
* A slice of an allocation may be made and used at once anywhere. Where `views` is not declared it may not be
  kept over a `boundary()`, and a parameter may not live in it: write parameters from their region instead.
"""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal

from windlass.accelerator.counters import Counters, ProgramCounts
from windlass.accelerator.errors import Unsupported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from windlass.accelerator.kernels import Kernels

INTERFACE_VERSION: Final = (1, 1)
LANES: Final = ("compute", "gather", "reduce", "up", "down")
ReduceOp = Literal["sum", "max"]
TensorFunction = Callable[["Sequence[Tensor]"], "Sequence[Tensor]"]


class Place(enum.Enum):
    """Where bytes live."""

    DEVICE = "device"
    HOST = "host"  # page-locked where the backend can; exact size, never rounded to a power of two
    DISK = "disk"


class Work(ABC):
    """Something under way on a lane: a copy, a collective, a recorded point."""

    @abstractmethod
    def wait(self) -> None:
        """Order what the current lane does next after this work (on synchronous lanes: block)."""

    @abstractmethod
    def done(self) -> bool:
        """True once the work has completed; never blocks."""


class DoneWork(Work):
    """Work that was complete when it was returned."""

    def wait(self) -> None:
        return None

    def done(self) -> bool:
        return True


Event = Work  # a recorded point of a lane is waited for like any other work


@dataclass(frozen=True)
class Measure:
    """A number of bytes and how far to trust it; `unknown` has no number, and is never written as 0."""

    kind: Literal["exact", "estimate", "unknown"]
    value: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "unknown") != (self.value is None):
            raise ValueError(f"a measure is unknown exactly when it has no value, got {self.kind} with {self.value}")


@dataclass(frozen=True)
class MemoryStats:
    """Memory of one place, in bytes. `by_tag` divides `used` by the tag given at allocation."""

    used: Measure
    reserved: Measure
    peak: Measure
    capacity: Measure
    by_tag: dict[str, int] = field(default_factory=dict)


class Memory(ABC):
    """Allocate, copy, release and account for memory, per place."""

    @abstractmethod
    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        place: Place = Place.DEVICE,
        *,
        tag: str = "",
        shared: Group | None = None,
    ) -> Tensor:
        """An uninitialised contiguous tensor, its start aligned to 128 bytes.

        `shared` says that the tensor will be an input or output of collectives of that group; all its
        ranks then make the same allocations in the same order. A backend may place it where the peers
        reach it (shared pages, registered memory); one that cannot ignores it. Raises `OutOfMemory`
        when the budget or the device is exhausted, `Unsupported` for a place it does not offer.
        """

    @abstractmethod
    def release(self, tensor: Tensor, *, after: Work | None = None) -> None:
        """Give back a tensor that `empty` returned, once `after` is done. Its contents, and every view
        of it, are invalid from now on. Releasing twice, or a foreign tensor, raises ValueError."""

    @abstractmethod
    def copy(self, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = "") -> Work:
        """Copy between places. Same shape and dtype, else ValueError: casting is a kernel."""

    @abstractmethod
    def stats(self, place: Place = Place.DEVICE) -> MemoryStats:
        """What is allocated through this facet now, and the peak since `reset_peak`."""

    @abstractmethod
    def reset_peak(self, place: Place = Place.DEVICE) -> None:
        """Let the peak start again from what is used now."""

    @abstractmethod
    def set_budget(self, limit: int | None, place: Place = Place.DEVICE) -> None:
        """Refuse allocations beyond `limit` bytes (None: the hardware's own limit)."""


class Streams:
    """Named lanes on which work is ordered. This default is one synchronous lane: slow, but right."""

    @contextmanager
    def lane(self, name: str) -> Iterator[None]:
        """Issue the work of this block on lane `name`, one of `LANES`."""
        if name not in LANES:
            raise ValueError(f"there is no lane named {name!r}; the lanes are {', '.join(LANES)}")
        yield

    def record(self) -> Event:
        """A point after every operation of the current lane so far, and every work that it has waited for. A work
        that nobody waited for is no part of it, though it was issued here."""
        self.synchronize()
        return DoneWork()

    def wait(self, event: Event) -> None:
        """Order the current lane after `event`."""
        event.wait()

    def synchronize(self) -> None:
        """Block until every lane is idle."""
        return None

    def boundary(self) -> None:
        """End of an optimizer step, always called by the core, and once before the first step. Lazy backends begin
        here to run what they have deferred, as one program, without waiting for it."""
        return None


@dataclass(frozen=True)
class Group:
    """An ordered set of ranks that meet in collectives. `rank` is this process's place in it."""

    name: str
    ranks: tuple[int, ...]  # global ranks
    rank: int

    @property
    def size(self) -> int:
        return len(self.ranks)


class Collectives(ABC):
    """Communication among the ranks of a group: explicit outputs, each call counted under `tag`.

    All ranks of the group make the same calls in the same order. Calls that do not match (kind, tag,
    bytes, dtype) raise `CollectiveMismatch` on every rank; a dead peer raises `PeerLost`, one that does
    not come `CollectiveTimeout`. Nothing hangs. Tensors are contiguous and one-dimensional.
    """

    @property
    @abstractmethod
    def world(self) -> Group:
        """All ranks of the job."""

    @abstractmethod
    def group(self, ranks: Sequence[int], name: str) -> Group:
        """A group of some ranks. Collective over the world: every rank calls it, members or not."""

    @abstractmethod
    def all_gather(self, output: Tensor, input: Tensor, group: Group, *, tag: str = "") -> Work:
        """output[i * n : (i + 1) * n] = input of rank i. The input may be this rank's part of the output."""

    @abstractmethod
    def reduce_scatter(
        self, output: Tensor, input: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = ""
    ) -> Work:
        """output = the parts of this rank from all ranks' inputs, reduced in the dtype of `output`.

        The input has `size * len(output)` elements and may be of a narrower dtype. Where the capability
        `ordered_reduction` is declared, terms are added in rank order, so the result depends on
        neither where a part lies nor how it was bucketed. The output may be this rank's part of the input.
        """

    @abstractmethod
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        group: Group,
        *,
        tag: str = "",
    ) -> Work:
        """Send `input_splits[i]` elements to rank i, receive `output_splits[i]` from it; splits are static."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = "") -> Work:
        """Reduce a small vector in place, in its own dtype, to the same bits on every rank."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int, group: Group, *, tag: str = "") -> Work:
        """Copy `tensor` of the rank with index `source` in the group into everybody's `tensor`."""

    @abstractmethod
    def barrier(self, group: Group) -> None:
        """Return after every rank of the group has called it."""

    def fetch(self, output: Tensor, shard: Tensor, group: Group, *, tag: str = "") -> Work:
        """All-gather of shards that were published. Where `one_sided` is declared a rank may fetch without
        the others taking part; elsewhere this is an all-gather that everybody joins. Counted as an
        all_gather either way."""
        return self.all_gather(output, shard, group, tag=tag)

    def publish(self, group: Group) -> None:
        """Every rank has written its shards; they stay unchanged until a later collective that all
        ranks enter after their last fetch. The default needs nothing, because its fetch is a meeting."""
        return None

    def close(self) -> None:
        """Leave all groups and give back what they hold. Safe to call twice."""
        return None


@dataclass(frozen=True)
class Capabilities:
    """What a backend declares. Declared means it works; these choose schedules, never correctness."""

    dtypes: tuple[str, ...] = ("float32",)
    """Names of the floating torch dtypes that memory, kernels and collectives accept, float64 apart. uint8, int32
    and int64 always work in memory and in collectives that move without reducing."""
    matmul_dtypes: tuple[str, ...] = ("float32",)
    """Dtypes whose matrix products run at native speed."""
    views: bool = False
    """A view of an allocation aliases it as long as the allocation lives, so that parameters can live inside
    their region and one buffer can be read as several dtypes."""
    asynchronous_lanes: bool = False
    """Work on different lanes overlaps."""
    one_sided: bool = False
    """`fetch` needs no partner."""
    ordered_reduction: bool = False
    """Reductions add in rank order."""
    uniform_program: bool = False
    """Every rank must run the same program: no rank-dependent shapes or constants. The core then asks nothing of the
    host before an update, so what was touched must be the same on every rank."""
    lazy: bool = False
    """Operations are deferred and compiled; host reads and new shapes are expensive."""
    host_place: bool = False
    """Memory offers Place.HOST apart from the device."""
    disk_place: bool = False
    """Memory offers Place.DISK."""
    float64: bool = False
    """Double precision exists on the device."""
    shared_device: bool = False
    """Several ranks may open the same device, so that any number of ranks runs on one machine."""

    def require(self, name: str, advice: str) -> None:
        """Raise `Unsupported` with `advice` unless capability `name`, or value "dtypes:float16" of one, is declared."""
        capability, colon, value = name.partition(":")
        if capability not in {f.name for f in fields(self)}:
            raise ValueError(f"there is no capability named {capability!r}")
        declared = getattr(self, capability)
        if not (value in declared if colon else declared):
            raise Unsupported(f"this backend does not declare {name!r}; {advice}")


class Accelerator(ABC):
    """One open device: four facets plus facts. Passed as an argument, never kept in a global."""

    interface_version: tuple[int, int] = INTERFACE_VERSION

    def __init__(
        self,
        name: str,  # "cuda:0"
        device: torch.device,
        memory: Memory,
        streams: Streams,
        collectives: Collectives,
        kernels: Kernels,
        capabilities: Capabilities,
        counters: Counters,
        facts: dict[str, Any] | None = None,  # JSON-ready: model name, cores, link rates, ...
    ) -> None:
        self.name = name
        self.device = device
        self.memory = memory
        self.streams = streams
        self.collectives = collectives
        self.kernels = kernels
        self.capabilities = capabilities
        self.counters = counters
        self.facts = facts or {}

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the random streams of the device and of the host."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """The device's random state as a byte tensor on the host."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` returned: the same draws follow, to the bit."""

    def read_host(self, tensor: Tensor, *, tag: str = "step") -> list[float]:
        """Read a small device vector on the host: the one sanctioned place where a step may block.

        Reads tagged "step" belong to an optimizer step, which makes at most one between two boundaries. Other tags
        are for what a user asks for besides: an evaluation, or what a step that is over came to.
        """
        self.counters.host_reads += 1
        return [float(value) for value in tensor.detach().reshape(-1).tolist()]

    def send(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device, for what the current lane does next: itself where the host is the device, else a
        copy that later changes do not reach. Where the host need not wait for the device, it does not. (Since 1.1.)"""
        return tensor.to(self.device)

    def to_host(self, tensor: Tensor) -> Tensor:
        """An ordinary host copy of a tensor, for what happens between steps: saving, printing, comparing."""
        self.counters.count_copy("down", "to_host", tensor.numel() * tensor.element_size())
        return tensor.detach().to("cpu", copy=True)

    def to_bytes(self, tensor: Tensor) -> bytes:
        """The raw little-endian bytes of a tensor, for files and messages."""
        import torch

        if tensor.numel() == 0:
            return b""
        return self.to_host(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def clock(self) -> float:
        """Seconds on the device's clock once all issued work is over, for measuring rates. A simulated device counts
        simulated seconds."""
        self.streams.synchronize()
        return time.perf_counter()

    def program_counts(self) -> ProgramCounts:
        """Programs compiled and run so far, on a device that is `lazy`; elsewhere `Unsupported`."""
        raise Unsupported(f"{self.name} runs each operation as it comes and compiles no programs; ask a lazy device")

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A faster equivalent of a pure tensor function, or the function itself."""
        return function

    def capture(self, function: TensorFunction) -> TensorFunction:
        """A cheaper way to issue what `function` issues: recorded once, replayed afterwards, or the function itself.

        For a function from a list of tensors to a list of tensors that reads nothing on the host, brings no values from
        there, allocates nothing through `memory`, stays on its lane, takes every tensor that it uses from its list or
        keeps it for good, and may write into those in place. It is recorded anew when the list holds other tensors.
        Results are valid until the next call. (Since 1.1.)
        """
        return function

    def close(self) -> None:
        """Give back groups and memory. Safe to call twice."""
        self.collectives.close()
