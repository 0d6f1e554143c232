"""The executor: carries out a plan, event by event, through the accelerator interface.

A step goes through the phases accumulating -> reducing -> checked -> stepped; anything else raises. The order of
operations is that of one optimizer step: accumulate, reduce, unscale and check, norm, clip, update, publish.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.adamw import AdamWSettings, update_region
from windlass.core.gradients import Gradients
from windlass.core.plan import Plan
from windlass.core.planner import STATISTICS
from windlass.core.residency import Residency
from windlass.core.state import STALE_WEIGHTS, ModelState


class Phase(enum.Enum):
    """Where in the optimizer step the executor is."""

    ACCUMULATING = "accumulating"
    REDUCING = "reducing"
    CHECKED = "checked"
    CLOSED = "closed"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank."""

    updated: bool  # False: nothing changed, since a gradient was not finite or there was none
    finite: bool
    norm: float  # of the mean gradient, before clipping; nan if skipped
    loss: float  # mean over ranks of what they reported
    stop: bool  # some rank wants to stop


@dataclass(frozen=True)
class _Statistics:
    """Read on the host once per step."""

    norm: float
    finite: bool
    loss: float
    stop: bool
    late: list[bool]  # per unit: some rank has gradients that missed their unit's reduction
    touched: set[str]  # parameters with a gradient on some rank
    gradient_scale: Tensor  # [] fp32 on the device: unscale, mean over ranks, and clip
    keep: Tensor  # [] bool on the device


class Executor:
    """One plan on one rank. Forward and backward events come from the engine and from module hooks."""

    def __init__(self, plan: Plan, module: nn.Module, accelerator: Accelerator, group: Group) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.group = group
        self.phase = Phase.ACCUMULATING
        self.landing_scale = 1.0  # for gradients of backward passes that nobody announced, set by the engine
        self.micro_batches: set[int] = set()  # calls of the model that had a backward since the last update
        self._generation = 0  # of the weights
        self._in_backward = False
        self.state = ModelState(plan, module, accelerator, group)
        self.gradients = Gradients(self.state, self._notice_backward, self._gradient_landed)
        self.residency: Residency | None = None
        if plan.rules.weights == "gathered":
            self.residency = Residency(self.state, self.gradients.expects_more)
            self.accelerator.collectives.publish(group)

    # -- forward and backward ----------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """The model is about to be called; whatever a pass that ended in an exception left behind is over."""
        self._require(Phase.ACCUMULATING, "run a forward pass")
        if not _inside_autograd():
            self._in_backward = False
        self.state.check_bindings()
        if self.residency is not None:
            self.residency.begin_forward()

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """One backward pass that the caller runs inside; its end is the end of this block."""
        self._begin_backward()
        yield
        self._finish_backward()

    def watch_output(self, tensor: Tensor, call: int) -> None:
        """Notice a backward pass that reaches an output of the model; `call` numbers the model's calls."""
        generation = self._generation

        def begin(_: Tensor) -> None:
            if generation != self._generation:
                raise RuntimeError(STALE_WEIGHTS)
            self.micro_batches.add(call)
            self._notice_backward()

        tensor.register_hook(begin)

    def _notice_backward(self) -> None:
        """A backward pass that the user started is under way, through an output of the engine or not."""
        if self._in_backward:
            return
        self._begin_backward()
        self.gradients.landing_scale = self.landing_scale
        # Runs when the backward pass that we are inside of has ended.
        torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)

    def _begin_backward(self) -> None:
        self._require(Phase.ACCUMULATING, "run a backward pass")
        self._in_backward = True
        self.gradients.landing_scale = 1.0
        self.gradients.begin_backward()
        if self.residency is not None:
            self.residency.begin_backward()

    def _finish_backward(self) -> None:
        if not self._in_backward:
            return
        self._in_backward = False
        self.gradients.finish_backward()
        if self.residency is not None:
            self.residency.finish_backward()

    def _gradient_landed(self, unit: str) -> None:
        if self.residency is not None:
            self.residency.gradient_landed(unit)

    # -- the optimizer step ------------------------------------------------------------------------------------

    def step(
        self,
        groups: Sequence[AdamWSettings],
        loss_scale: float,
        clip: float,  # largest norm; 0: no clipping
        loss: Tensor | None = None,  # this rank's, for the report
        stop: bool = False,  # this rank wants to stop, for the report
    ) -> StepReport:
        """Reduce, check, clip, update and publish. A collective."""
        self._require(Phase.ACCUMULATING, "take an optimizer step")
        self.phase = Phase.REDUCING
        if self.residency is not None:
            self.residency.settle()
        self.gradients.finish()
        statistics = self._gather_statistics(loss_scale, clip, loss, stop)
        if any(statistics.late):
            self.gradients.reduce_again(statistics.late)
            statistics = self._gather_statistics(loss_scale, clip, loss, stop, tag="late gradients")
        self.phase = Phase.CHECKED
        if self.plan.rules.update == "replicated":
            self.gradients.share_replicas()
        scalars: dict[tuple[int, int], Tensor] = {}
        for region in self.plan.regions:
            if region.trainable and statistics.touched:
                update_region(
                    self.state, region, self.gradients.for_update(region), groups, statistics.touched,
                    statistics.gradient_scale, statistics.keep, scalars,
                )  # fmt: skip
        if statistics.touched:
            self.share_weights()
        if statistics.finite:
            for name in statistics.touched:
                self.state.steps[name] += 1
        self.drop_gradients()
        self.accelerator.streams.boundary()
        self.phase = Phase.ACCUMULATING
        updated = statistics.finite and bool(statistics.touched)
        return StepReport(updated, statistics.finite, statistics.norm, statistics.loss, statistics.stop)

    def share_weights(self) -> None:
        """Bring the weights that this rank owns to whoever needs them. A collective."""
        collectives = self.accelerator.collectives
        if self.plan.rules.after_update == "all_gather":
            works = []
            for region in self.plan.regions:
                if region.trainable:
                    whole, own = self.state.weights[region.name], self.state.owned_weights(region)
                    works.append(collectives.all_gather(whole, own, self.group, tag="weights"))
            for work in works:
                work.wait()
        elif self.plan.rules.after_update == "publish":
            collectives.publish(self.group)
        self._generation += 1
        if self.residency is not None:
            self.residency.weights_changed()
        self.state.rebind_copies()

    @property
    def has_gradients(self) -> bool:
        """True if gradients have landed on this rank since the last update."""
        return bool(self.gradients.touched)

    def drop_gradients(self) -> None:
        """Forget the gradients accumulated so far, on this rank."""
        self.micro_batches.clear()
        self.gradients.clear()

    def _gather_statistics(
        self, loss_scale: float, clip: float, loss: Tensor | None, stop: bool, *, tag: str = "step"
    ) -> _Statistics:
        """Norm, finite check, loss, late units and touched parameters of all ranks: one small vector from each.

        The step's one host read, under `tag`: ranks whose gradients were late must agree first, and read once more.
        """
        device, size = self.accelerator.device, self.group.size
        unscale = torch.full((), 1.0 / (loss_scale * size), dtype=torch.float32, device=device)
        squares = [
            self.accelerator.kernels["square_sum"](self.gradients.shards[region.name], unscale)
            for region in self.plan.regions
            if region.trainable and region.name in self.gradients.shards
        ]
        names = list(self.plan.parameter_index)
        flags = [float(stop), *map(float, self.gradients.leftovers())]
        flags += [float(name in self.gradients.touched) for name in names]
        mine = torch.cat(
            [
                torch.stack(squares).sum(0) if squares else torch.zeros(2, dtype=torch.float32, device=device),
                torch.zeros(1, dtype=torch.float32, device=device) if loss is None else loss.reshape(1),
                torch.tensor(flags, dtype=torch.float32, device=device),
            ]
        )
        everyone = torch.empty(size * mine.numel(), dtype=torch.float32, device=device)
        self.accelerator.collectives.all_gather(everyone, mine, self.group, tag="statistics").wait()
        total = everyone.view(size, -1).sum(0)
        norm = total[0].sqrt()
        keep = torch.logical_and(total[1] == 0, torch.isfinite(norm))
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else torch.ones_like(norm)
        vector = torch.cat([torch.stack([norm, keep.to(torch.float32)]), total[2:]])
        read = self.accelerator.read_host(vector, tag=tag)
        finite, first, units = bool(read[1]), STATISTICS, len(self.plan.units)
        return _Statistics(
            norm=read[0] if finite else math.nan,
            finite=finite,
            loss=read[2] / size,
            stop=read[3] > 0,
            late=[value > 0 for value in read[first : first + units]],
            touched={name for name, value in zip(names, read[first + units :], strict=True) if value > 0},
            gradient_scale=unscale * factor,
            keep=keep,
        )

    # -- life --------------------------------------------------------------------------------------------------

    def full_gradient(self, name: str, loss_scale: float) -> Tensor:
        """The mean gradient accumulated so far, on every rank: host fp32, logical shape. A collective."""
        region, placement = self.plan.placement_by_name[name]
        shard = self.gradients.peek(region) if region.trainable else None
        if shard is None:
            return torch.zeros(placement.shape)
        whole = self.state.gather_owned(region, shard, tag="state")
        flat = self.accelerator.to_host(whole[placement.start : placement.stop]).to(torch.float32)
        return flat.view(placement.shape) / (loss_scale * self.group.size)

    def close(self) -> None:
        """Give back hooks and memory; the module keeps working where its weights are resident."""
        if self.phase is Phase.CLOSED:
            return
        self.gradients.close()
        if self.residency is not None:
            self.residency.close()
        self.state.release()
        self.phase = Phase.CLOSED

    def _require(self, phase: Phase, action: str) -> None:
        if self.phase is not phase:
            raise RuntimeError(
                f"cannot {action} while the engine is {self.phase.value}; an earlier step failed or the engine was "
                "closed, so build a new engine"
            )


def _inside_autograd() -> bool:
    """True while a backward pass is running on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
