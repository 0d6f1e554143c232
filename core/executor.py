"""The executor: carries out a plan, event by event, through the accelerator interface.

A step goes through the phases accumulating -> reducing -> checked -> stepped; anything else raises. The order of
operations is that of one optimizer step: accumulate, reduce, unscale and check, norm, clip, update, publish.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.adamw import AdamWSettings
from windlass.core.captured import Issuer
from windlass.core.gradients import Gradients
from windlass.core.muon import MuonSettings
from windlass.core.muon_uniform import UniformMuonUpdate
from windlass.core.muon_update import MuonUpdate
from windlass.core.plan import Plan
from windlass.core.qk_clip import QKClip
from windlass.core.residency import Residency
from windlass.core.scalars import LastSent
from windlass.core.state import STALE_WEIGHTS, ModelState
from windlass.core.statistics import HostStatistics, LocalFacts, Outcome, StatisticsExchange, StepReport
from windlass.core.update import Update


class Phase(enum.Enum):
    """Where in the optimizer step the executor is."""

    ACCUMULATING = "accumulating"
    REDUCING = "reducing"
    CHECKED = "checked"
    CLOSED = "closed"


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
        self._skipped = 0  # steps, where the host decides
        self._in_backward = False
        self.state = ModelState(plan, module, accelerator, group)
        self.gradients = Gradients(self.state, self._notice_backward, self._gradient_landed)
        self.residency: Residency | None = None
        if plan.rules.weights == "gathered":
            self.residency = Residency(self.state, self.gradients.expects_more)
            self.accelerator.collectives.publish(group)
        self._issuer = Issuer(accelerator, captures=plan.rules.issue == "captured")
        self._unscale = LastSent(accelerator)
        self._muon: MuonUpdate | UniformMuonUpdate | None = None
        if plan.muon is not None:
            uniform = plan.rules.program == "uniform"
            self._muon = UniformMuonUpdate(self.state) if uniform else MuonUpdate(self.state, self._issuer)
        clips = plan.muon is not None and plan.muon.qk_clip is not None
        self._qk_clip = QKClip(self.state, self._issuer) if clips else None
        self._statistics = StatisticsExchange(accelerator, group, list(plan.parameter_index))
        accelerator.streams.boundary()  # what was laid out is no part of the first step

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
        groups: Sequence[AdamWSettings | MuonSettings],
        loss_scale: float,
        clip: float,  # largest norm; 0: no clipping
        loss: Tensor | None = None,  # this rank's, for the report
        stop: bool = False,  # this rank wants to stop, for the report
    ) -> Outcome:
        """Reduce, check, clip, update and publish. A collective."""
        self._require(Phase.ACCUMULATING, "take an optimizer step")
        if self._qk_clip is not None:
            self._qk_clip.require_fed(self.gradients.touched)
        self.phase = Phase.REDUCING
        if self.residency is not None:
            self.residency.settle()
        self.gradients.finish()
        uniform = self.plan.rules.program == "uniform"
        factor = self._unscale.send([1.0 / (loss_scale * self.group.size)])
        unscale = self._issuer.keep("unscale", factor.reshape(()))
        if uniform and any(late := self.gradients.leftovers()):
            self.gradients.reduce_again(late)  # the same units on every rank, or the collectives say so
        facts = self._facts(unscale, loss, stop)
        if uniform:
            touched = set(facts.touched)
            verdict, outcome = self._statistics.exchange(facts, clip)
        else:
            verdict, statistics = self._statistics.read(facts, clip, "step")
            if any(statistics.late):  # the ranks have agreed on it only now
                self.gradients.reduce_again(statistics.late)
                verdict, statistics = self._statistics.read(self._facts(unscale, loss, stop), clip, "late gradients")
            touched, outcome = statistics.touched, self._known(statistics)
        self.phase = Phase.CHECKED
        if self.plan.rules.update == "replicated":
            self.gradients.share_replicas()
        clipped = unscale * verdict.factor
        if touched:
            update = Update(self.state, self._issuer, groups, touched, clipped, verdict.keep)
            update.apply(self.gradients.for_update)
        # What is void needs no work where the host knows it; elsewhere ranks that have touched nothing join in too.
        if uniform or (touched and outcome.read().finite):
            if self._muon is not None:
                scale = clipped if self._muon.clips else unscale
                self._muon.apply(groups, touched, scale, verdict.keep, self.gradients.for_update)
            if self._qk_clip is not None:
                self._qk_clip.apply(verdict.keep)
        if touched:
            self.state.steps.advance(touched, verdict.keep if uniform else outcome.read().finite)
        if touched or uniform:  # a rank that has touched nothing must not leave the others alone in this
            self.share_weights()
        self.drop_gradients()
        self.accelerator.streams.boundary()
        self.phase = Phase.ACCUMULATING
        return outcome

    def _facts(self, unscale: Tensor, loss: Tensor | None, stop: bool) -> LocalFacts:
        shards = self.gradients.shards
        reduced = [shards[region.name] for region in self.plan.regions if region.name in shards]
        squares = self._issuer.run("squares", self._sum_squares, len(reduced), [unscale, *reduced])
        return LocalFacts(
            squares, loss, stop, self.gradients.leftovers(), self.gradients.touched, self.gradients.passes
        )

    def _sum_squares(self, _: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum of squares and finite check of each vector after the first tensor, which is their scale."""
        unscale, *vectors = tensors
        return [self.accelerator.kernels["square_sum"](vector, unscale) for vector in vectors]

    def _known(self, statistics: HostStatistics) -> Outcome:
        self._skipped += not statistics.finite
        report = StepReport(
            updated=statistics.finite and bool(statistics.touched),
            finite=statistics.finite,
            norm=statistics.norm,
            loss=statistics.loss,
            stop=statistics.stop,
            skipped=self._skipped,
        )
        outcome = Outcome(lambda: report, touched=bool(statistics.touched))
        outcome.read()
        return outcome

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

    def share_written_weights(self) -> None:
        """After `state.write`: bring what was written to whoever needs it. A collective."""
        # Each rank wrote its own part, in programs of its own; they end before those begin in which ranks meet.
        self.accelerator.streams.synchronize()
        self.share_weights()

    @property
    def has_gradients(self) -> bool:
        """True if gradients have landed on this rank since the last update."""
        return bool(self.gradients.touched)

    def drop_gradients(self) -> None:
        """Forget the gradients accumulated so far, on this rank."""
        self.micro_batches.clear()
        self.gradients.clear()
        if self._qk_clip is not None:
            self._qk_clip.forget()

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
        if self._muon is not None:
            self._muon.close()
        if self._qk_clip is not None:
            self._qk_clip.close()
        self._issuer.close()
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
