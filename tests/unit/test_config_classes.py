"""Each class of DeepSpeed key behaves as it says: silence, one line of information, a warning or an error."""

from __future__ import annotations

from typing import Any

import pytest

from windlass.config import ConfigError, load_config
from windlass.deepspeed_keys import NOT_YET

# DeepSpeed's own defaults, spelled out: a file that asks for nothing.
DEFAULTS: dict[str, Any] = {
    "managed_gradient_accumulation": True,
    "gradient_allreduce_op": "mean",
    "sparse_gradients": False,
    "communication_data_type": None,
    "gradient_clipping": 1.0,
    "memory_breakdown": False,
    "fp16": {"enabled": False, "auto_cast": False, "loss_scale": 0, "fp16_master_weights_and_grads": False},
    "bf16": {"enabled": False, "check_grad_overflow": True, "bf16_optimizer_states": False},
    "amp": {"enabled": False, "opt_level": "O1"},
    "torch_autocast": {"enabled": False, "dtype": None, "lower_precision_safe_modules": None},
    "data_types": {"grad_accum_dtype": None, "param_dtype": None, "buffer_dtype": None},
    "zero_optimization": {
        "stage": 0,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zeropp_loco_param": None,
        "mics_shard_size": -1,
        "offload_param": {"device": "none", "buffer_count": 5, "max_in_cpu": 1e9, "pin_memory": True},
        "offload_optimizer": {"device": None, "ratio": 1.0, "super_offload": False},
    },
    "tensor_parallel": {"autotp_size": 0, "tp": {"tp_size": 1}},
    "expert_parallel": {"enabled": False, "autoep_size": 1},
    "compile": {"deepcompile": False, "double_buffer": True},
    "pipeline": {"stages": "auto", "partition": "best"},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "checkpoint": {"tag_validation": "Warn", "use_node_local_storage": False},
    "nebula": {"enabled": False, "persistent_time_interval": 100},
    "comms_logger": {"enabled": False, "prof_all": True, "prof_ops": []},
    "wandb": {"enabled": False, "project": "deepspeed"},
    "autotuning": {"enabled": False, "fast": True, "model_info": {"profile": False}},
    "elasticity": {"enabled": False, "micro_batch_sizes": [2, 4, 6]},
    "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
    "data_efficiency": {"enabled": False, "data_sampling": {"curriculum_learning": {"enabled": False}}},
    "curriculum_learning": {"enabled": False, "schedule_config": {"max_step": 3}},
    "progressive_layer_drop": {"enabled": False, "theta": 1.0},
    "eigenvalue": {"enabled": False, "layer_num": 0},
    "sparse_attention": None,
    "compression_training": {},
}


def test_deepspeeds_defaults_ask_for_nothing() -> None:
    assert load_config(DEFAULTS, 1).messages == ()
    assert load_config(DEFAULTS, 1) == load_config(None, 1)


def test_ignored_keys_make_one_line() -> None:
    source = {"zero_optimization": {"overlap_comm": True, "prefetch_bucket_size": 1e7}, "aio": {"queue_depth": 4}}
    assert load_config(source, 1).messages == (
        "info: ignored, the plan decides and results are the same: zero_optimization.overlap_comm, "
        "zero_optimization.prefetch_bucket_size, aio.queue_depth",
    )


def test_not_yet_warns_where_results_stay_the_same() -> None:
    source = {
        "activation_checkpointing": {"partition_activations": True, "profile": False, "cpu_checkpointing": True},
        "tensorboard": {"enabled": True, "output_path": "logs"},
        "zero_optimization": {"mics_shard_size": 8},
    }
    assert load_config(source, 1).messages == (
        "warning: activation_checkpointing.partition_activations, activation_checkpointing.cpu_checkpointing are not "
        "done yet: activation checkpointing is left to the model, use torch.utils.checkpoint in its forward",
        "warning: tensorboard.enabled is not done yet: nothing is sent there, log engine.grad_norm and engine.lr in "
        "the training loop",
        "warning: zero_optimization.mics_shard_size is not done yet: states are sharded over all ranks",
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5}}},
            'zero_optimization.offload_optimizer.device = "cpu" is not done yet: '
            "remove it, and the optimizer states stay on the device",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/scratch"}}},
            'zero_optimization.offload_param.device = "nvme" is not done yet: '
            "remove it, and the parameters stay on the device",
        ),
        (
            {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
            "zero_optimization.zenflow is not done yet: remove it, every gradient is applied in its own step",
        ),
        (
            {"managed_gradient_accumulation": False},
            "managed_gradient_accumulation = false is not done yet: "
            "remove it, engine.step() acts once in gradient_accumulation_steps calls",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
            "optimizer.params.amsgrad = true is not done yet: remove it, plain AdamW is used",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm = 1.0 is refused: set gradient_clipping at the top level instead",
        ),
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "use_triton": True}}},
            'optimizer.type = "Lion" is not done yet: use "Adam", "AdamW" or "Muon"',
        ),
        ({"optimizer": {"type": "SGD"}}, 'optimizer.type = "SGD" is not done yet: use "Adam", "AdamW" or "Muon"'),
        (
            {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 400}}},
            'optimizer.type = "OneBitAdam" is refused: gradients are not compressed, use "Adam", "AdamW" or "Muon"',
        ),
        ({"optimizer": {"type": "AdamX"}}, 'optimizer.type = "AdamX" is unknown (did you mean "Adam"?)'),
        ({"optimizer": {"params": {"lr": 1}}}, 'optimizer.type is missing, add "type": "AdamW"'),
        (
            {"amp": {"enabled": True, "opt_level": "O1"}},
            "amp.enabled = true is refused: enable fp16, bf16 or torch_autocast instead",
        ),
        (
            {"sparse_attention": {"mode": "fixed"}},
            "sparse_attention is refused: use torch.nn.attention.flex_attention in the model",
        ),
        (
            {"compression_training": {"layer_reduction": {"enabled": True}}},
            "compression_training is refused: "
            "train first, then compress the exported weights with a quantization or pruning library",
        ),
    ],
)
def test_what_changes_results_is_an_error(source: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source, 1)
    assert str(caught.value) == f"config: {sentence}"


@pytest.mark.parametrize("path", sorted(path for path, entry in NOT_YET.items() if entry.switch is None))
def test_each_key_not_done_yet_warns_or_fails_as_the_table_says(path: str) -> None:
    source: Any = {"host_cache_size": 1} if path == "datastates_ckpt" else {} if path.endswith("zenflow") else "other"
    source = {"offload": False} if path.endswith("zenflow") else source
    for name in reversed(path.split(".")):
        source = {name: source}
    if path.startswith("optimizer"):
        source["optimizer"]["type"] = "Adam"
    if NOT_YET[path].changes_meaning:
        with pytest.raises(ConfigError, match="is not done yet"):
            load_config(source, 1)
    else:
        (message,) = load_config(source, 1).messages
        assert message == f"warning: {path} is not done yet: {NOT_YET[path].instead}"
