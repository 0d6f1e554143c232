"""From a configuration to what the core takes: the plan's settings, the precision, the loss scaler."""

from __future__ import annotations

import torch
from torch import nn

from windlass.accelerator.interface import Capabilities
from windlass.config import Config
from windlass.core.mesh import data_parallel_mesh
from windlass.core.plan import Plan
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.precision import WEIGHT_DTYPES, LossScaler
from windlass.core.qk_clip_plan import plan_qk_clip
from windlass.core.specs import describe_model
from windlass.muon_groups import assign_matrices
from windlass.muon_rules import muon_rules
from windlass.optimizer import build_optimizer, group_of_parameters
from windlass.polar_choice import Measure

LONG_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def plan_for(model: nn.Module, config: Config) -> Plan:
    """The plan that `initialize` would make, without a device; the model may be on the meta device."""
    return plan_training(model, config, build_optimizer(model, config, None, None))


def precision_of(config: Config) -> str:
    """ "fp32" (weights as the model has them), "bf16" or "fp16"."""
    return "bf16" if config.bf16.enabled else "fp16" if config.fp16.enabled else "fp32"


def plan_training(
    model: nn.Module,
    config: Config,
    optimizer: torch.optim.Optimizer,
    capabilities: Capabilities | None = None,
    measure: Measure | None = None,
) -> Plan:
    """Describe the model and plan its training with the groups of this optimizer, for a device that can do this.
    `measure` says what is fastest there for Muon; without it, numbers of operations decide."""
    precision = precision_of(config)
    groups = group_of_parameters(optimizer)
    target = WEIGHT_DTYPES[precision]
    specs, units = describe_model(model, groups, dtype=target)
    muon = qk_clip = None
    if config.optimizer.type == "muon":
        specs = assign_matrices(specs, optimizer.param_groups, model, config)
    if any(spec.algorithm == "muon" for spec in specs):  # not while all matrices are frozen
        able = capabilities or Capabilities(matmul_dtypes=())
        measured = measure(config, specs) if measure else None
        muon = muon_rules(config, able.matmul_dtypes, measured, uniform_program=able.uniform_program)
        if config.muon.qk_clip is not None:
            qk_clip = plan_qk_clip(model, specs, config.muon.qk_clip)
    accumulation = config.data_types.grad_accum_dtype
    narrow = config.bf16.enabled and config.bf16.bf16_optimizer_states
    settings = PlanSettings(
        stage=config.zero_optimization.stage,
        precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_dtype=None if accumulation is None else LONG_DTYPES[accumulation],
        prefetch=config.plan.prefetch,
        device_memory_budget=config.plan.device_memory_budget,
        views=capabilities is None or capabilities.views,
        uniform_program=capabilities is not None and capabilities.uniform_program,
        capture_update=config.capture_update and not why_not_captured(capabilities),
        moment_dtype="bfloat16" if narrow else "float32",
        seed=config.seed,
        muon=muon,
        qk_clip=qk_clip,
    )
    return make_plan(specs, units, data_parallel_mesh(config.num_ranks), settings)


def why_not_captured(capabilities: Capabilities | None) -> str:
    """What there is about a device that makes nothing of capture_update; empty if nothing does."""
    if capabilities is not None and capabilities.uniform_program:
        return "it compiles and runs whole steps as one program anyway"
    if capabilities is not None and not capabilities.views:
        return "its buffers are made anew for each use"
    return ""


def build_scaler(config: Config) -> LossScaler:
    """The loss scaler that the fp16 section asks for; a constant 1 in other precisions."""
    section = config.fp16
    if not section.enabled:
        return LossScaler()
    if section.loss_scale > 0:
        return LossScaler(scale=section.loss_scale)
    return LossScaler(
        scale=float(2**section.initial_scale_power),
        static=False,
        window=section.loss_scale_window,
        hysteresis=section.hysteresis,
        consecutive_hysteresis=section.consecutive_hysteresis,
        minimum=section.min_loss_scale,
    )
