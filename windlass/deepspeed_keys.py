"""Every key of DeepSpeed's `ds_config.json`, each in one of four tables: done, ignored, not yet, refused.

A key is its dotted path from the top of the file; `*` as the last part stands for any name. The defaults are
DeepSpeed's: a key given with its default asks for nothing, so it is never warned about. The keys that are not done
yet or refused fill the two tables of `windlass.config_absent`; `classify` looks through all four.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from windlass.config_absent import NOT_YET, REFUSED

__all__ = [
    "ADAM_PARAMS",
    "ALIASES",
    "DONE",
    "IGNORED",
    "MUON_PARAMS",
    "NOT_YET",
    "OPTIMIZERS_DONE",
    "OPTIMIZERS_NOT_YET",
    "OPTIMIZERS_REFUSED",
    "OWN",
    "REFUSED",
    "SCHEDULERS_DONE",
    "Done",
    "classify",
]

KeyClass = Literal["done", "ignored", "not yet", "refused"]


@dataclass(frozen=True, slots=True)
class Done:
    """A key that windlass carries out."""

    default: object  # what counts when the key is absent or "auto"; None where other keys decide
    meaning: str


DONE: dict[str, Done] = {
    "train_batch_size": Done(None, "samples per optimizer step, over all ranks"),
    "train_micro_batch_size_per_gpu": Done(None, "samples per rank in one forward and backward"),
    "gradient_accumulation_steps": Done(None, "micro-batches per optimizer step"),
    "gradient_clipping": Done(1.0, "largest global gradient norm; 0 turns clipping off"),
    "data_parallel_size": Done(None, "must equal the number of data-parallel ranks"),
    "communication_data_type": Done(None, '"fp32": gradients are reduced in fp32, as they are anyway'),
    "optimizer.type": Done("AdamW", '"Adam", "AdamW" or "Muon", in any case'),
    "optimizer.params.lr": Done(1e-3, "learning rate; with Muon what muon_lr and adam_lr are unless given"),
    "optimizer.params.betas": Done([0.9, 0.999], "decay of the first and the second moment"),
    "optimizer.params.eps": Done(1e-8, "added to the root of the second moment"),
    "optimizer.params.weight_decay": Done(0.01, "0 for Adam, as in torch.optim"),
    "optimizer.params.adam_w_mode": Done(True, "Adam decays its weights as AdamW does; false: the L2 form"),
    "optimizer.params.momentum": Done(0.95, "of Muon"),
    "optimizer.params.muon_lr": Done(None, "learning rate of what Muon updates; null: lr"),
    "optimizer.params.adam_lr": Done(None, "learning rate of what AdamW updates beside Muon; null: lr"),
    "optimizer.params.ns_method": Done(None, "of Muon: another spelling of muon.ns_method"),
    "scheduler.type": Done(None, '"WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle" or "LRRangeTest"'),
    "scheduler.params.*": Done(None, "the parameters of that schedule"),
    "fp16.enabled": Done(False, "fp16 weights and gradients with fp32 master weights"),
    "fp16.loss_scale": Done(0.0, "a fixed loss scale; 0: dynamic"),
    "fp16.initial_scale_power": Done(16, "the dynamic scale starts at 2 to this power"),
    "fp16.loss_scale_window": Done(1000, "good steps before the scale doubles"),
    "fp16.hysteresis": Done(2, "the scale halves at this many overflows"),
    "fp16.consecutive_hysteresis": Done(False, "a good step restores the hysteresis"),
    "fp16.min_loss_scale": Done(1.0, "the dynamic scale never falls below this"),
    "bf16.enabled": Done(False, "bf16 weights and gradients with fp32 master weights"),
    "bf16.bf16_optimizer_states": Done(False, "Adam's moments in bf16, rounded stochastically, where bf16 is enabled"),
    "torch_autocast.enabled": Done(False, "run the forward under torch.autocast, weights in fp32"),
    "torch_autocast.dtype": Done("bf16", '"bf16" or "fp16"'),
    "data_types.grad_accum_dtype": Done(None, '"fp32", "bf16" or "fp16"; null: fp32'),
    "zero_optimization.stage": Done(0, "what is sharded: 1 optimizer states, 2 gradients too, 3 weights too"),
    "steps_per_print": Done(None, "print progress every so many steps; null: never"),
    "wall_clock_breakdown": Done(False, "time forward, backward and step"),
}

# Keys that DeepSpeed does not have.
OWN: dict[str, Done] = {
    "accelerator": Done("auto", "the backend, as `windlass doctor` names it"),
    "seed": Done(1234, "seeds the random streams of all ranks"),
    "capture_update": Done(False, "record the optimizer's update once and replay it, where the device can"),
    "muon.coefficients": Done("jordan", '"jordan", "you", "polar_express" or "ten": steps of Newton-Schulz'),
    "muon.ns_dtype": Done("auto", '"fp32", "bf16" or "fp16" products; auto: bf16 where the device is good at them'),
    "muon.ns_method": Done("auto", '"standard" or "gram" form; auto: for each shape what needs less'),
    "muon.scale": Done("rms", '"rms", "original" or "spectral": how an update goes with its shape'),
    "muon.clip": Done(
        "pre", '"pre": gradients of matrices are clipped by the global norm as all are; "off": they are not'
    ),
    "muon.nesterov": Done(True, "blend the gradient into the momentum, as Nesterov does"),
    "muon.momentum_dtype": Done("fp32", '"fp32" or "bf16", rounded stochastically'),
    "muon.qk_clip": Done(None, "largest attention logit: heads beyond it shrink (Kimi K2 takes 100); null: no bound"),
    "muon.roles": Done({}, 'name pattern -> "muon" or "adamw", where the modules\' roles are not what is wanted'),
    "muon.views": Done({}, "name pattern -> rows of each part of a fused matrix, or a number of equal parts"),
    "plan.prefetch": Done(1, "units gathered ahead of use, 0 to 4"),
    "plan.device_memory_budget": Done(None, "bytes per device that the plan may use; null: all"),
    "plan.host_memory_budget": Done(None, "bytes of host memory per rank that the plan may use; null: all"),
}

_STAGE3 = (
    "max_live_parameters",
    "max_reuse_distance",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

# They steer buffers, schedules and implementations that the plan chooses: with or without them, results are the same.
IGNORED = frozenset(
    {
        "optimizer.legacy_fusion",
        *(f"optimizer.params.{name}" for name in ("torch_adam", "set_grad_none", "fused", "foreach")),
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "use_data_before_expert_parallelism",
        "dump_state",
        "log_level",
        "dataloader_drop_last",
        "graph_harvesting",
        "vocabulary_size",
        "bf16.immediate_grad_update",
        "timers.throughput.enabled",
        "timers.throughput.synchronized",
        *(
            f"zero_optimization.{name}"
            for name in (
                "contiguous_gradients",
                "reduce_scatter",
                "reduce_bucket_size",
                "use_multi_rank_bucket_allreduce",
                "allgather_partitions",
                "allgather_bucket_size",
                "overlap_comm",
                "elastic_checkpoint",
                "sub_group_size",
                "legacy_stage1",
                "round_robin_gradients",
                *(f"stage3_{name}" for name in _STAGE3),
                "mics_hierarchical_params_gather",
                "memory_efficient_linear",
                "override_module_apply",
                "pipeline_loading_checkpoint",
                "log_trace_cache_warnings",
                "enable_sanity_checks",
                "save_muon_momentum_buffer_in_memory",
                "cpu_offload_use_pin_memory",
                "leaf_module.classes",
                "leaf_module.names",
                "leaf_module.name_suffixes",
            )
        ),
        *(
            f"aio.{name}"
            for name in (
                "block_size",
                "queue_depth",
                "intra_op_parallelism",
                "thread_count",
                "single_submit",
                "overlap_events",
                "use_gds",
            )
        ),
        "checkpoint.load_universal",
        "checkpoint.parallel_write.pipeline_stage",
        "checkpoint.checkpoint_serialization",
        *(
            f"checkpoint.writer.{name}"
            for name in (
                "type",
                "decoupled",
                "io_buffer_size",
                "io_buffer_double",
                "show_statistics",
                "data_parallel",
                "io_multiplier",
            )
        ),
    }
)

# Another spelling -> the path it stands for.
ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    **{f"zero_optimization.{name}": f"zero_optimization.stage3_{name}" for name in _STAGE3},
}

SCHEDULERS_DONE = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")

OPTIMIZERS_DONE = ("adam", "adamw", "muon")

# Names in optimizer.params that only one optimizer knows.
ADAM_PARAMS = ("adam_w_mode",)
MUON_PARAMS = ("momentum", "muon_lr", "adam_lr", "ns_method")

OPTIMIZERS_NOT_YET = (
    *("lion", "lamb", "adagrad", "sgd", "muadam", "muadamw", "musgd"),
    # The rest are the other names of torch.optim.
    *("adadelta", "adafactor", "adamax", "asgd", "lbfgs", "nadam", "radam", "rmsprop", "rprop", "sparseadam"),
)

OPTIMIZERS_REFUSED = ("onebitadam", "zerooneadam", "onebitlamb")


_TABLES: tuple[tuple[KeyClass, Container[str]], ...] = (
    ("done", DONE),
    ("ignored", IGNORED),
    ("not yet", NOT_YET),
    ("refused", REFUSED),
)


def classify(path: str) -> tuple[KeyClass, ...]:
    """Name the tables that hold a DeepSpeed key, under its own name or under `*`: one, or none for an unknown key."""
    path = ALIASES.get(path, path)
    parts = path.split(".")
    for candidate in (path, *(".".join((*parts[:depth], "*")) for depth in range(len(parts) - 1, 0, -1))):
        if found := tuple(name for name, table in _TABLES if candidate in table):
            return found
    return ()
