"""A configuration is read, checked and completed, and each mistake is told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from windlass.config import Config, ConfigError, load_config
from windlass.config_models import AdamParams

MINIMAL = {
    "train_batch_size": 64,
    "gradient_accumulation_steps": 4,
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 1},
}


def error_of(source: Any, num_ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, num_ranks)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 16), (2, 8), (4, 4)])
def test_minimal_file_works_as_it_is(tmp_path: Path, num_ranks: int, micro: int) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(MINIMAL))
    for source in (path, str(path), MINIMAL):
        config = load_config(source, num_ranks)
        assert (config.train_batch_size, config.gradient_accumulation_steps) == (64, 4)
        assert (config.train_micro_batch_size_per_gpu, config.num_ranks) == (micro, num_ranks)
        assert (config.fp16.enabled, config.bf16.enabled, config.zero_optimization.stage) == (True, False, 1)
        assert config.messages == ()


@pytest.mark.parametrize(
    ("kind", "reference"), [("AdamW", torch.optim.AdamW), ("adam", torch.optim.Adam), (None, torch.optim.AdamW)]
)
def test_optimizer_defaults_are_those_of_torch(kind: str | None, reference: type[torch.optim.Optimizer]) -> None:
    config = load_config({"optimizer": {"type": kind}} if kind else None, 1)
    defaults = reference([torch.zeros(1)]).defaults  # type: ignore[call-arg]
    params = config.optimizer.params
    assert config.optimizer.type == (kind or "adamw").lower()
    assert (params.lr, params.betas, params.eps, params.weight_decay) == tuple(
        defaults[name] for name in ("lr", "betas", "eps", "weight_decay")
    )


@pytest.mark.parametrize(
    ("kind", "adam_w_mode", "decoupled"),
    [("Adam", None, True), ("Adam", True, True), ("Adam", False, False), ("AdamW", None, True), ("AdamW", False, True)],
)
def test_adam_decays_as_adamw_unless_told_otherwise(kind: str, adam_w_mode: bool | None, decoupled: bool) -> None:
    params = {"weight_decay": 0.1} | ({} if adam_w_mode is None else {"adam_w_mode": adam_w_mode})
    config = load_config({"optimizer": {"type": kind, "params": params}}, 1)
    assert isinstance(config.optimizer.params, AdamParams)
    assert config.optimizer.params.decoupled is decoupled
    expected = ('warning: optimizer.params.adam_w_mode = false has no effect on "AdamW", use "Adam"',)
    assert config.messages == (expected if kind == "AdamW" and adam_w_mode is False else ())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,\n "b" 2}', "not JSON at line 2 column 6, Expecting ':' delimiter"),
        (b"", "not JSON at line 1 column 1, Expecting value"),
        (b"[1]", "must be one JSON object in braces, got a list"),
        (b'{"seed": 1, "fp16": {"enabled": true, "enabled": false}, "seed": 2, "seed": 3}',
         "fp16.enabled is given twice, keep one; seed is given twice, keep one"),
        (b'{"a": "\xff"}', "the file is not UTF-8 text, byte 7 is the first wrong one"),
        (None, "there is no such file, give the path of a JSON file"),
    ],
)  # fmt: skip
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    assert error_of(path) == f"{path}: {problem}"


def test_folder_and_wrong_sources_are_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"{tmp_path}: the file cannot be read, Is a directory"
    assert error_of(3) == "config: must be a dict or the path of a JSON file, got int"
    assert error_of({"fp16": {1: True}}) == "config: fp16 keys must be strings, got 1"


def test_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"seed": 3}), encoding="utf-8-sig")
    assert load_config(path, 1).seed == 3


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"trian_batch_size": 8}, "unknown key 'trian_batch_size' (did you mean 'train_batch_size'?)"),
        ({"fp16": {"enable": 1}}, "unknown key 'fp16.enable' (did you mean 'fp16.enabled'?)"),
        ({"stage": 1}, "unknown key 'stage' (did you mean 'zero_optimization.stage'?)"),
        ({"overlap_comm": True}, "unknown key 'overlap_comm' (did you mean 'zero_optimization.overlap_comm'?)"),
        ({"xyz": 1}, "unknown key 'xyz', remove it"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "unknown key 'zero_optimization.offload_optimizer.devise' "
            "(did you mean 'zero_optimization.offload_optimizer.device'?)",
        ),
        ({"plan": {"prefetsch": 1}}, "unknown key 'plan.prefetsch' (did you mean 'plan.prefetch'?)"),
        ({"zero_optimization": {"grad_hooks": True}}, "unknown key 'zero_optimization.grad_hooks', remove it"),
        ({"optimizer": {"type": "Adam", "params": {"learn": 1}}}, "unknown key 'optimizer.params.learn', remove it"),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrab": 1}}},
            "unknown key 'optimizer.params.amsgrab' (did you mean 'optimizer.params.amsgrad'?)",
        ),
        ({"gradient_clipping": "1"}, 'gradient_clipping must be a number, got "1"'),
        ({"gradient_clipping": True}, "gradient_clipping must be a number, got true"),
        ({"gradient_clipping": None}, "gradient_clipping must be a number, got null"),
        ({"gradient_clipping": -1}, "gradient_clipping must be at least 0, got -1"),
        ({"gradient_clipping": float("inf")}, "gradient_clipping must be a finite number, got Infinity"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got true"),
        ({"accelerator": 3}, "accelerator must be a string, got 3"),
        ({"fp16": True}, "fp16 must be an object, got true"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled must be true or false, got 1"),
        ({"fp16": {"min_loss_scale": 0}}, "fp16.min_loss_scale must be greater than 0, got 0"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be at most 3, got 4"),
        ({"plan": {"prefetch": 5}}, "plan.prefetch must be at most 4, got 5"),
        ({"torch_autocast": {"dtype": "fp8"}}, 'torch_autocast.dtype must be one of "bf16" or "fp16", got "fp8"'),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
            "optimizer.params.betas must be a list of two numbers, got [0.9]",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}},
            "optimizer.params.betas[1] must be less than 1, got 1",
        ),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "fp16.enabled and bf16.enabled are both true, set one of them to false",
        ),
        (
            {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}},
            "bf16 and bfloat16 are one key, keep bf16",
        ),
        (
            {"data_parallel_size": 4},
            "data_parallel_size = 4 contradicts the number of ranks = 1, set it to 1 or remove it",
        ),
        (
            {"communication_data_type": "fp16"},
            'communication_data_type = "fp16" is not done yet: remove it or set it to "fp32"',
        ),
    ],
)
def test_each_mistake_has_its_sentence(source: dict[str, Any], sentence: str) -> None:
    assert error_of(source) == f"config: {sentence}"


def test_all_mistakes_are_told_at_once() -> None:
    source = {"fp17": 1, "amp": {"enabled": True}, "seed": "x", "zero_optimization": {"stage": -1}}
    assert error_of(source) == (
        "config: unknown key 'fp17' (did you mean 'fp16'?); "
        "amp.enabled = true is refused: enable fp16, bf16 or torch_autocast instead; "
        'zero_optimization.stage must be at least 0, got -1; seed must be a whole number, got "x"'
    )


@pytest.mark.parametrize(
    ("source", "path", "value"),
    [
        ({"zero_optimization": True}, "zero_optimization.stage", 1),
        ({"zero_optimization": False}, "zero_optimization.stage", 0),
        ({"zero_optimization": None}, "zero_optimization.stage", 0),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, "torch_autocast.dtype", "bf16"),
        ({"data_types": {"grad_accum_dtype": "bfloat16"}}, "data_types.grad_accum_dtype", "bf16"),
        ({"steps_per_print": float("inf")}, "steps_per_print", None),
        ({"plan": {"device_memory_budget": 1e9}}, "plan.device_memory_budget", 10**9),
        ({"gradient_clipping": 0}, "gradient_clipping", 0.0),
        ({"communication_data_type": "fp32"}, "communication_data_type", None),
        ({"data_parallel_size": 1}, "num_ranks", 1),
        ({"torch_autocast": {"enabled": True, "dtype": None}}, "torch_autocast.dtype", "bf16"),
    ],
)
def test_other_spellings_are_understood(source: dict[str, Any], path: str, value: Any) -> None:
    config = load_config(source, 1)
    found: Any = config.resolved()
    for name in path.split("."):
        found = found.get(name)
    assert found == value


def test_old_form_of_zero_is_told() -> None:
    messages = load_config({"zero_optimization": True}, 1).messages
    assert messages == ("info: zero_optimization = true is the old form of stage 1",)


def test_auto_is_decided_and_told() -> None:
    source = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": "auto",
        "accelerator": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "adam_w_mode": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": 10}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "auto"}},
        "wandb": "auto",
    }
    config = load_config(source, 2)
    assert config.messages == (
        'info: "auto" is decided: train_batch_size = 8, gradient_clipping = 1.0, bf16.enabled = false, '
        "optimizer.params.lr = 0.001, optimizer.params.adam_w_mode = true, "
        "scheduler.params.warmup_min_lr = the schedule's default, "
        "zero_optimization.reduce_bucket_size = left to the plan, zero_optimization.offload_param.device = off, "
        "wandb = off",
    )
    assert config.scheduler is not None
    assert config.scheduler.params == {"warmup_num_steps": 10}


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        (
            {"type": "WarmupDecayLR", "params": {"warmup_nsteps": 4}},
            "unknown key 'scheduler.params.warmup_nsteps' for WarmupDecayLR (did you mean 'warmup_num_steps'?); "
            "scheduler.params.total_num_steps is missing, WarmupDecayLR needs it",
        ),
        (
            {"type": "Warmup"},
            'scheduler.type = "Warmup" is not one of "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", '
            '"LRRangeTest" (did you mean "WarmupLR"?)',
        ),
        (
            {"type": "StepLR"},
            'scheduler.type = "StepLR" is not one of "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", '
            '"LRRangeTest", pass any other schedule as lr_scheduler=',
        ),
        ({"params": {"warmup_num_steps": 4}}, 'scheduler.type is missing, add "type": "WarmupLR"'),
    ],
)
def test_wrong_scheduler_is_told(scheduler: dict[str, Any], sentence: str) -> None:
    assert error_of({"scheduler": scheduler}) == f"config: {sentence}"


def test_wrong_scheduler_value_is_told_before_training() -> None:
    text = error_of({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}})
    assert "warmup_type" in text
    assert "'cubic'" in text


def test_config_is_frozen_and_plain_json() -> None:
    source = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "OneCycle", "params": {
        "cycle_min_lr": 0.1, "cycle_max_lr": 1.0}}}  # fmt: skip
    before = json.dumps(source)
    config = load_config(source, 2)
    assert json.dumps(source) == before
    resolved = config.resolved()
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert set(resolved) == set(Config.model_fields) - {"messages"}
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2
    with pytest.raises(ValueError, match="frozen"):
        config.fp16.enabled = True


def test_loading_does_not_import_torch() -> None:
    code = (
        "import sys; from windlass.config import load_config; load_config(None, 2); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
