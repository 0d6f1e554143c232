"""The engine: one model, one plan, one rank. What users hold between `initialize` and `close`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from windlass import saving
from windlass.accelerator.interface import Accelerator
from windlass.config import Config
from windlass.core.exchange import require_same_plan
from windlass.core.executor import Executor
from windlass.core.handover import hand_over, put_back, take_over
from windlass.core.plan import Plan
from windlass.core.precision import WEIGHT_DTYPES
from windlass.core.specs import dtype_from_name
from windlass.core.state import WEIGHT
from windlass.core.trees import iterate_tensors, map_tensors
from windlass.core.unplanned import place_unplanned
from windlass.optimizer import (
    build_optimizer,
    build_scheduler,
    group_of_parameters,
    read_settings,
)
from windlass.planning import LONG_DTYPES, build_scaler, plan_training, why_not_captured
from windlass.polar_choice import PolarChooser
from windlass.step_books import StepBooks, Updated

logger = logging.getLogger("windlass")


class Engine:
    """Trains a model as its plan says. Made by `initialize`."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        accelerator: Accelerator,
        model_parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
        optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
        lr_scheduler: Any = None,
        *,
        owns_accelerator: bool = False,
    ) -> None:
        self.module = model
        self._owns_accelerator = owns_accelerator
        self.config = config
        self.accelerator = accelerator
        self._micro_steps = 0  # calls of step() since the last update
        self._calls = 0  # of the model
        self._loss_so_far: Tensor | None = None
        self._wants_to_stop = False
        self.optimizer = build_optimizer(model, config, model_parameters, optimizer)
        self._group = accelerator.collectives.world
        self._frozen: list[nn.Parameter] = []  # in a group, but without requires_grad when the plan was made
        if config.plan.device_memory_budget is not None:
            accelerator.memory.set_budget(config.plan.device_memory_budget)
        self.scaler = build_scaler(config)
        self.books = StepBooks(self.scaler, speaks=self.rank == 0)
        self._polar = PolarChooser(accelerator, self._group)
        self.executor = self._execute(self._agree_on_plan())
        self.lr_scheduler = build_scheduler(config, self.optimizer, lr_scheduler)
        self._tell(config.messages)
        if config.optimizer.type == "muon" and self.plan.muon is None:
            self._tell(["warning: Muon updates nothing yet: all the matrices that it is for are frozen"])
        if config.capture_update and (reason := why_not_captured(accelerator.capabilities)):
            self._tell([f"warning: capture_update has no effect on {accelerator.name}: {reason}; results are the same"])
        self._state_dict_hooks = [
            inner.register_state_dict_post_hook(partial(self._complete_state_dict, path))
            for path, inner in model.named_modules()
            if any(True for _ in inner.parameters(recurse=False))
        ]

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who owns which bytes, when they move, what is computed on them; print it."""
        return self.executor.plan

    @property
    def global_steps(self) -> int:
        """Optimizer steps that changed the weights. Like the four below: one host read where it is not known yet."""
        self.books.settle()
        return self.books.global_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that a gradient which was not finite has made void."""
        self.books.settle()
        return self.books.skipped_steps

    @property
    def grad_norm(self) -> float | None:
        """Of the mean gradient of the last step, before clipping; nan if it was not finite."""
        self.books.settle()
        return self.books.grad_norm

    @property
    def loss(self) -> float | None:
        """The mean over ranks and micro-steps of what `backward` was given for the last step."""
        self.books.settle()
        return self.books.loss

    @property
    def stop_requested(self) -> bool:
        """Whether some rank had called `request_stop` before the last step."""
        self.books.settle()
        return self.books.stop_requested

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def num_ranks(self) -> int:
        return self._group.size

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16; 1 otherwise."""
        return self.scaler.scale

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, for the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self, mode: bool = True) -> Engine:
        """Training mode, as in torch."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Evaluation mode, as in torch."""
        return self.train(False)

    # -- training ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Inputs go to the device; fp32 inputs are cast where the model is bf16 or fp16."""
        self._notice_unfrozen()
        args, kwargs = map_tensors(self._place_input, args), map_tensors(self._place_input, kwargs)
        self.executor.begin_forward()
        with self._autocast():
            output = self.module(*args, **kwargs)
        self._calls += 1
        if torch.is_grad_enabled():
            for tensor in iterate_tensors(output):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    self.executor.watch_output(tensor, self._calls)
        return output

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch's loss: divided by gradient_accumulation_steps, scaled for fp16."""
        if loss.numel() != 1:
            raise ValueError(
                f"engine.backward takes a scalar loss, got shape {tuple(loss.shape)}; reduce it with .mean(), or call "
                "output.backward(gradient) as in torch"
            )
        share = loss.detach().to(torch.float32) / self.config.gradient_accumulation_steps
        self._loss_so_far = share if self._loss_so_far is None else self._loss_so_far + share
        factor = self.loss_scale / self.config.gradient_accumulation_steps
        with self.executor.backward_pass():
            (loss * factor if factor != 1.0 else loss).backward()

    def step(self) -> bool | Updated:
        """Act at the accumulation boundary: when gradient_accumulation_steps micro-batches are in. True if the weights
        changed.

        Call it after every micro-batch, as with DeepSpeed, or once after all of them, as with PyTorch. A micro-batch is
        a call of the engine that had a backward, with any number of backward passes.

        Afterwards `grad_norm` is the norm of the mean gradient before clipping, `loss` the mean over ranks and
        micro-steps of what was given to `backward`, and `stop_requested` says whether any rank called
        `request_stop`: all that with one host read, and none beyond it. On a device that runs ahead of the host they
        are read when somebody asks, and so is the truth of what this returns; a scheduler or a dynamic loss scale asks
        at every step.
        """
        self._micro_steps += 1
        micro_batches = max(self._micro_steps, len(self.executor.micro_batches))
        if micro_batches < self.config.gradient_accumulation_steps:
            return False
        self._micro_steps = 0
        loss, self._loss_so_far = self._loss_so_far, None
        outcome = self.executor.step(
            read_settings(self.optimizer), self.loss_scale, self.config.gradient_clipping, loss, self._wants_to_stop
        )
        self.books.enter(outcome, has_loss=loss is not None)
        if outcome.touched and not outcome.known and self.lr_scheduler is None and self.scaler.static:
            self.optimizer.step()
            return Updated(outcome)
        self.books.settle()
        self.executor.landing_scale = self.loss_scale
        if not outcome.read().updated:
            return False
        self.optimizer.step()  # without gradients: only tells torch's schedulers that a step was taken
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return True

    def request_stop(self) -> None:
        """This rank wants to stop (a signal came, its data ended): after the next step every rank knows."""
        self._wants_to_stop = True

    def zero_grad(self) -> None:
        """Drop the gradients accumulated since the last step; the next micro-batch is the first again."""
        self._loss_so_far = None
        self._micro_steps = 0
        self.executor.drop_gradients()

    def mean_over_ranks(self, value: Tensor) -> float:
        """The mean of a scalar over ranks. A collective, and one host read."""
        total = value.detach().to(torch.float32).reshape(1).clone()
        self.accelerator.collectives.all_reduce(total, self._group, tag="logging").wait()
        return self.accelerator.read_host(total, tag="logging")[0] / self.num_ranks

    # -- logical state -----------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers on the host in logical shape, floating ones in fp32, on every rank."""
        values = dict(self.executor.state.named_values(WEIGHT))
        for alias, owner in self.plan.aliases.items():
            if owner in values:
                values[alias] = values[owner]
        result: dict[str, Tensor] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):  # extra state of a module
                continue
            value = values[name] if name in values else self.accelerator.to_host(tensor)
            result[name] = value.to(torch.float32) if value.is_floating_point() else value
        return result

    def load_full_state_dict(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers from tensors in logical shape, master weights included. A collective."""
        self.accelerator.collectives.barrier(self._group)
        managed = self.plan.placement_by_name
        plain = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, value in values.items():
            if name in managed:
                self.executor.state.write(name, WEIGHT, value.to(self.accelerator.device))
            elif name in plain:
                plain[name].data.copy_(value)
            else:
                raise ValueError(f"the model has no parameter or buffer named {name!r}")
        self.executor.share_written_weights()

    def full_gradient(self, name: str) -> Tensor:
        """The mean gradient of one parameter accumulated since the last step, unscaled: host, fp32, logical shape."""
        self._require_name(name)
        return self.executor.full_gradient(name, self.loss_scale)

    def full_optimizer_state(self, name: str) -> dict[str, Any]:
        """One parameter's moments (host, fp32, logical shape) and its `step` count: `exp_avg` and `exp_avg_sq` where
        AdamW updates it, `momentum` where Muon does."""
        self._require_name(name)
        region, placement = self.plan.placement_by_name[name]
        if not region.trainable:
            raise ValueError(f"parameter {name!r} is frozen, so it has no optimizer state")
        state = self.executor.state
        moments = {key: state.read(name, key) for key in state.moment_keys(region)}
        return {**moments, "step": state.steps[placement.name]}

    def save_checkpoint(
        self, directory: str | Path, tag: str | None = None, client_state: Mapping[str, Any] | None = None
    ) -> Path:
        """Write `directory/tag` (default `step<N>`) and point `latest` at it. `client_state`: the caller's own JSON."""
        return saving.save(self, Path(directory), tag, client_state)

    def load_checkpoint(self, directory: str | Path, tag: str | None = None) -> dict[str, Any]:
        """Continue from `directory/tag` (default: what `latest` points at), saved on any number of ranks and at any
        stage. Returns the caller's own `client_state`."""
        return saving.load(self, Path(directory), tag)

    def close(self) -> None:
        """Remove hooks and give back memory; close the accelerator too, unless the caller opened it. Safe to call
        twice."""
        try:
            self.books.settle()  # a problem that nobody has asked about is told now
        finally:
            for hook in self._state_dict_hooks:
                hook.remove()
            self.executor.close()
            if self._owns_accelerator:
                self.accelerator.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.books.forget()  # the error under way is the one to tell
        self.close()

    # -- parts -------------------------------------------------------------------------------------------------

    def _tell(self, messages: Iterable[str]) -> None:
        """What the configuration led to, once: "warning: ..." and "info: ..." lines."""
        for message in messages if self.rank == 0 else ():
            level, _, text = message.partition(": ")
            logger.log(logging.WARNING if level == "warning" else logging.INFO, text)

    def _place_input(self, tensor: Tensor) -> Tensor:
        target = WEIGHT_DTYPES[self.plan.precision]
        placed = self.accelerator.send(tensor)
        return placed.to(dtype_from_name(target)) if target is not None and tensor.dtype is torch.float32 else placed

    def _autocast(self) -> AbstractContextManager[Any]:
        section = self.config.torch_autocast
        if not section.enabled:
            return nullcontext()
        dtype = dtype_from_name(LONG_DTYPES[section.dtype])
        # The cache would keep a cast copy of every gathered weight alive until the end of forward.
        resident = self.plan.rules.weights == "resident"
        return torch.autocast(self.accelerator.device.type, dtype, cache_enabled=resident)

    def _notice_unfrozen(self) -> None:
        """A parameter of a group that was frozen when the plan was made and is not any more: make a new plan. A
        collective then; every rank unfreezes the same parameters."""
        if self._frozen and not self.executor.has_gradients and any(one.requires_grad for one in self._frozen):
            old = self.executor
            self.books.restart()
            handover = take_over(old.state)
            old.close()
            put_back(handover, old.state)
            self.executor = self._execute(self._agree_on_plan())
            hand_over(handover, self.executor.state)
            self.executor.share_written_weights()

    def _agree_on_plan(self) -> Plan:
        capabilities, measure = self.accelerator.capabilities, self._polar.choose
        plan = plan_training(self.module, self.config, self.optimizer, capabilities, measure)
        require_same_plan(plan, self.accelerator, self._group)
        return plan

    def _execute(self, plan: Plan) -> Executor:
        grouped = group_of_parameters(self.optimizer)
        place_unplanned(self.module, plan, self.accelerator, self._group)
        executor = Executor(plan, self.module, self.accelerator, self._group)
        executor.landing_scale = self.loss_scale
        self._frozen = [
            parameter
            for name, parameter in self.module.named_parameters()
            if name not in plan.parameter_index and id(parameter) in grouped
        ]
        return executor

    def _complete_state_dict(
        self, path: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        """Where weights are sharded: put the whole ones of one module into its `state_dict()`. A collective."""
        if self.executor.state.resident:
            return
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # parameters: keep_vars was given
                whole = self.executor.state.read(f"{path}.{name}" if path else name, WEIGHT)
                state_dict[prefix + name] = whole.to(self.accelerator.device, value.dtype)

    def _require_name(self, name: str) -> None:
        if name not in self.plan.placement_by_name:
            raise ValueError(f"the plan has no parameter named {name!r}; names are those of module.named_parameters()")
