"""The shape of a configuration: what each section may hold, and the resolved whole that the engine reads."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

_DTYPE_NAMES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def _whole_number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON's 1e9 arrives as a float


def _short_dtype(value: object) -> object:
    return _DTYPE_NAMES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


def _autocast_dtype(value: object) -> object:
    return "bf16" if value is None else _short_dtype(value)


def _never(value: object) -> object:
    return None if isinstance(value, float) and value == math.inf else value


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("a list of two numbers")
    return tuple(value)


def _row_splits(value: object) -> object:
    parts = value if isinstance(value, list | tuple) else [value]
    whole = [_whole_number(part) for part in parts]
    if not whole or not all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in whole):
        raise ValueError("the rows of each part as a list, or a number of equal parts")
    return tuple(whole) if isinstance(value, list | tuple) else whole[0]


_Whole = Annotated[int, BeforeValidator(_whole_number)]
Positive = Annotated[_Whole, Field(gt=0)]
NotNegative = Annotated[_Whole, Field(ge=0)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Bytes = Positive
RowSplits = Annotated[int | tuple[int, ...], BeforeValidator(_row_splits)]
Dtype = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(_short_dtype)]


class Section(BaseModel):
    """Any part of a configuration: exact types, no unknown keys, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=False)


class AdamParams(Section):
    """The settings of Adam and AdamW."""

    lr: Number = 1e-3
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.01
    decoupled: bool = True  # weight decay acts on the weights (AdamW); False: on the gradient (L2)


class MuonParams(Section):
    """The settings of Muon for the matrices, and of AdamW for everything else."""

    lr: Number = 1e-3  # what a schedule's rates stand for
    muon_lr: Number = 1e-3  # of the matrices
    adam_lr: Number = 1e-3  # of everything else
    momentum: Fraction = 0.95
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.01  # of both


class OptimizerConfig(Section):
    """The optimizer that windlass builds when it is not given one."""

    type: Literal["adam", "adamw", "muon"] = "adamw"
    params: AdamParams | MuonParams = AdamParams()


class MuonConfig(Section):
    """How Muon works, for all groups."""

    coefficients: Literal["jordan", "you", "polar_express", "ten"] = "jordan"
    ns_dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(_short_dtype)] = (
        "auto"  # bf16 where its products are fast, else fp32
    )
    ns_method: Literal["auto", "standard", "gram"] = "auto"  # auto: for each shape what needs less
    scale: Literal["rms", "original", "spectral"] = "rms"
    clip: Literal["pre", "off"] = "pre"  # the gradients of the matrices: by the global norm, or not
    nesterov: bool = True
    momentum_dtype: Annotated[Literal["fp32", "bf16"], BeforeValidator(_short_dtype)] = "fp32"
    qk_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # largest attention logit; None: no bound
    roles: dict[str, Literal["muon", "adamw"]] = {}  # name pattern -> what updates the parameters that it fits
    views: dict[str, RowSplits] = {}  # name pattern -> rows of each part, or a number of equal parts


class SchedulerConfig(Section):
    """The learning-rate schedule that windlass builds when it is not given one."""

    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]
    params: dict[str, Any] = {}  # checked against the schedule's own rule when loading


class Fp16Config(Section):
    """fp16 weights with loss scaling."""

    enabled: bool = False
    loss_scale: Number = 0.0  # 0: dynamic
    initial_scale_power: Annotated[NotNegative, Field(le=126)] = 16  # 2**127 is the last power of two in fp32
    loss_scale_window: Positive = 1000
    hysteresis: Positive = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Bf16Config(Section):
    """bf16 weights."""

    enabled: bool = False
    bf16_optimizer_states: bool = False  # moments in bf16 too, rounded stochastically


class AutocastConfig(Section):
    """Forward under torch.autocast."""

    enabled: bool = False
    dtype: Annotated[Literal["bf16", "fp16"], BeforeValidator(_autocast_dtype)] = "bf16"


class DataTypesConfig(Section):
    """The dtype in which gradients accumulate over micro-batches; None: fp32."""

    grad_accum_dtype: Dtype | None = None


class ZeroConfig(Section):
    """What is sharded over the ranks."""

    stage: Annotated[_Whole, Field(ge=0, le=3)] = 0


class PlanConfig(Section):
    """What the planner may use."""

    prefetch: Annotated[_Whole, Field(ge=0, le=4)] = 1  # units gathered ahead of use
    device_memory_budget: Bytes | None = None  # bytes per device; None: all there is
    host_memory_budget: Bytes | None = None  # bytes per rank; None: all there is


class _Common(Section):
    """The keys whose given form is their resolved form."""

    gradient_clipping: Number = 1.0  # largest global norm; 0: off
    accelerator: str = "auto"
    fp16: Fp16Config = Fp16Config()
    bf16: Bf16Config = Bf16Config()
    torch_autocast: AutocastConfig = AutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    zero_optimization: ZeroConfig = ZeroConfig()
    plan: PlanConfig = PlanConfig()
    muon: MuonConfig = MuonConfig()
    capture_update: bool = False  # record the update once and replay it, where the device can
    seed: NotNegative = 1234
    steps_per_print: Annotated[Positive | None, BeforeValidator(_never)] = None  # None: never
    wall_clock_breakdown: bool = False


class GivenAdamParams(Section):
    """`optimizer.params` of Adam and AdamW as the file has it."""

    lr: Number = 1e-3
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number | None = None
    adam_w_mode: bool = True


class GivenMuonParams(Section):
    """`optimizer.params` of Muon as the file has it."""

    lr: Number = 1e-3
    muon_lr: Number | None = None
    adam_lr: Number | None = None
    momentum: Fraction = 0.95
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number | None = None
    ns_method: Literal["auto", "standard", "gram"] | None = None


class GivenOptimizer(Section):
    """`optimizer` as the file has it; its type decides which parameters it may have."""

    type: str = "AdamW"
    params: GivenAdamParams | GivenMuonParams = Field(default={}, validate_default=True)

    @field_validator("params", mode="plain")
    @classmethod
    def _validate_params(cls, value: object, info: ValidationInfo) -> GivenAdamParams | GivenMuonParams:
        is_muon = str(info.data.get("type")).lower() == "muon"
        return (GivenMuonParams if is_muon else GivenAdamParams).model_validate(value)


class GivenScheduler(Section):
    """`scheduler` as the file has it."""

    type: str | None = None
    params: dict[str, Any] = {}


class GivenConfig(_Common):
    """The keys that windlass carries out, as the file has them."""

    train_batch_size: Positive | None = None
    train_micro_batch_size_per_gpu: Positive | None = None
    gradient_accumulation_steps: Positive | None = None
    data_parallel_size: Positive | None = None
    communication_data_type: Dtype | None = None
    optimizer: GivenOptimizer | None = None
    scheduler: GivenScheduler | None = None


class Config(_Common):
    """A configuration for one number of ranks, with everything derived; frozen."""

    train_batch_size: int  # samples per optimizer step, over all ranks
    train_micro_batch_size_per_gpu: int  # samples per rank in one forward and backward
    gradient_accumulation_steps: int  # micro-batches per optimizer step
    num_ranks: int  # data-parallel ranks
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None
    messages: tuple[str, ...] = ()  # "info: ..." and "warning: ..." lines, to print once, on rank 0

    def resolved(self) -> dict[str, Any]:
        """Return every setting with its final value, as plain JSON values."""
        return self.model_dump(mode="json", exclude={"messages"})
