"""The DeepSpeed keys that windlass does not carry out, with what happens instead or what to use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotYet:
    """A key that may come later: given with another value than the default, it warns, or fails if results change."""

    default: object
    instead: str  # completes "KEY is not done yet: ..."
    changes_meaning: bool = False
    switch: str | None = None  # the entry that speaks for this one, which does nothing alone


@dataclass(frozen=True, slots=True)
class Refused:
    """A key that will not come: given with another value than the default, it fails and names the alternative."""

    default: object
    alternative: str  # completes "KEY is refused: ..."
    switch: str | None = None


def _not_yet(
    switch: str, default: object, instead: str, names: str, *, changes_meaning: bool = False
) -> dict[str, NotYet]:
    """Enter the sub-key that turns a section on, and the names beside it that mean nothing while it is off."""
    section = switch.rpartition(".")[0]
    beside = (f"{section}.{name}" for name in names.split())
    return {
        switch: NotYet(default, instead, changes_meaning),
        **{path: NotYet(None, instead, changes_meaning, switch) for path in beside},
    }


def _not_yet_if_present(section: str, instead: str, names: str, *, changes_meaning: bool = False) -> dict[str, NotYet]:
    """Enter a section that is on as soon as it is there."""
    return {
        section: NotYet(None, instead, changes_meaning),
        **{f"{section}.{name}": NotYet(None, instead, changes_meaning, section) for name in names.split()},
    }


def _refused(switch: str, alternative: str, names: str) -> dict[str, Refused]:
    """Enter a section that is off by default, as `_not_yet` does."""
    section = switch.rpartition(".")[0]
    beside = (f"{section}.{name}" for name in names.split())
    return {switch: Refused(False, alternative), **{path: Refused(None, alternative, switch) for path in beside}}


def _refused_if_present(section: str, alternative: str) -> dict[str, Refused]:
    """Enter a section that is on as soon as it is there, whatever it holds."""
    return {section: Refused(None, alternative), f"{section}.*": Refused(None, alternative, section)}


_UNQUANTIZED = "weights and gradients travel unquantized, with more traffic and no loss of precision"
_FP32_STATES = "master weights, gradients and optimizer states stay in fp32, with more memory and no loss of precision"
_FP32_MASTERS = "master weights and gradients stay in fp32, with more memory and no loss of precision"
_MODEL_CHECKPOINTS = "activation checkpointing is left to the model, use torch.utils.checkpoint in its forward"
_NO_MONITOR = "nothing is sent there, log engine.grad_norm and engine.lr in the training loop"
_OWN_DATA_ORDER = "remove it and order the data in your data loader"
_OPTIMIZER_STAYS = "remove it, and the optimizer states stay on the device"
_PARAMETERS_STAY = "remove it, and the parameters stay on the device"

NOT_YET: dict[str, NotYet] = {
    "managed_gradient_accumulation": NotYet(
        True, "remove it, engine.step() acts once in gradient_accumulation_steps calls", changes_meaning=True
    ),
    "gradient_allreduce_op": NotYet(
        "mean", "remove it and multiply the loss by the number of ranks", changes_meaning=True
    ),
    "sparse_gradients": NotYet(False, "gradients travel dense, with more traffic and the same result"),
    "sequence_parallel_size": NotYet(1, "remove it, all ranks are data-parallel", changes_meaning=True),
    "memory_breakdown": NotYet(False, "no breakdown is printed, `windlass plan` predicts the memory"),
    "optimizer.params.bias_correction": NotYet(
        True, "remove it, the moments are always corrected", changes_meaning=True
    ),
    "optimizer.params.amsgrad": NotYet(False, "remove it, plain AdamW is used", changes_meaning=True),
    "fp16.auto_cast": NotYet(
        False, "remove it and cast the model's inputs to fp16 in the training loop", changes_meaning=True
    ),
    "fp16.fp16_master_weights_and_grads": NotYet(False, _FP32_STATES),
    "bf16.bf16_master_weights_and_grads": NotYet(False, _FP32_MASTERS),
    "bf16.check_grad_overflow": NotYet(True, "a step with a gradient that is not finite is skipped all the same"),
    "torch_autocast.lower_precision_safe_modules": NotYet(None, "torch.autocast chooses by operation"),
    "data_types.param_dtype": NotYet(None, "remove it and turn on fp16 or bf16", changes_meaning=True),
    "data_types.buffer_dtype": NotYet(
        None, "remove it and cast the buffers before windlass.initialize", changes_meaning=True
    ),
    "zero_optimization.load_from_fp32_weights": NotYet(True, "a checkpoint's fp32 master weights are always loaded"),
    "zero_optimization.ignore_unused_parameters": NotYet(True, "unused parameters are allowed all the same"),
    "zero_optimization.zero_hpz_partition_size": NotYet(1, "weights are gathered from all ranks"),
    "zero_optimization.mics_shard_size": NotYet(-1, "states are sharded over all ranks"),
    "zero_optimization.zero_quantized_weights": NotYet(False, _UNQUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": NotYet(False, _UNQUANTIZED),
    "zero_optimization.zero_quantized_gradients": NotYet(False, _UNQUANTIZED),
    "zero_optimization.zeropp_loco_param": NotYet(None, _UNQUANTIZED),
    "zero_optimization.cpu_offload": NotYet(False, _OPTIMIZER_STAYS, changes_meaning=True),
    "zero_optimization.cpu_offload_param": NotYet(False, _PARAMETERS_STAY, changes_meaning=True),
    **_not_yet(
        *("zero_optimization.offload_param.device", "none", _PARAMETERS_STAY),
        "nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        changes_meaning=True,
    ),
    **_not_yet(
        *("zero_optimization.offload_optimizer.device", "none", _OPTIMIZER_STAYS),
        "nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc",
        changes_meaning=True,
    ),
    **_not_yet_if_present(
        *("zero_optimization.zenflow", "remove it, every gradient is applied in its own step"),
        "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
        "full_warm_up_rounds pt_reserved_cores_perc",
        changes_meaning=True,
    ),
    **_not_yet(
        *("tensor_parallel.autotp_size", 0, "remove it and let stage 3 shard the weights"),
        "tp_overlap_comm preset_model partition_config.use_default_specs partition_config.layer_specs dtype "
        "tp.tp_size tp.tp_grain_size tp.mpu tp.tp_group injection_policy_tuple keep_module_on_host "
        "replace_with_kernel_inject",
        changes_meaning=True,
    ),
    **_not_yet(
        *("expert_parallel.enabled", False, "remove it, experts are trained like other parameters"),
        "autoep_size expert_tensor_parallel_size validate_folding_routing preset_model moe_layer_pattern "
        "router_pattern expert_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale score_func "
        "score_apply combine_impl num_expert_groups num_limited_groups top_k routed_scaling_factor "
        "load_balance_coeff expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern shared_experts_gate_pattern",
        changes_meaning=True,
    ),
    **_not_yet(
        *("compile.deepcompile", False, "no compiler pass runs, the plan itself prefetches and overlaps"),
        "passes free_activation free_activation_threshold offload_activation offload_activation_pin_memory "
        "offload_opt_states offload_parameters double_buffer symmetric_memory debug_log sync_before_reduce "
        "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
        "keep_all_input_tensors autoep_non_moe",
    ),
    **_not_yet(
        *("pipeline.stages", "auto", "remove it, every rank runs the whole model"),
        "partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned",
        changes_meaning=True,
    ),
    "activation_checkpointing.partition_activations": NotYet(False, _MODEL_CHECKPOINTS),
    "activation_checkpointing.cpu_checkpointing": NotYet(False, _MODEL_CHECKPOINTS),
    "activation_checkpointing.contiguous_memory_optimization": NotYet(False, _MODEL_CHECKPOINTS),
    "activation_checkpointing.number_checkpoints": NotYet(None, _MODEL_CHECKPOINTS),
    "activation_checkpointing.synchronize_checkpoint_boundary": NotYet(False, _MODEL_CHECKPOINTS),
    "activation_checkpointing.profile": NotYet(False, _MODEL_CHECKPOINTS),
    "checkpoint.tag_validation": NotYet("Warn", "tags are not compared over ranks"),
    "checkpoint.use_node_local_storage": NotYet(
        False, "remove it and save to a folder that all ranks can reach", changes_meaning=True
    ),
    **_not_yet_if_present("datastates_ckpt", "engine.save_checkpoint writes the checkpoint itself", "host_cache_size"),
    **_not_yet(
        *("comms_logger.enabled", False, "nothing is logged, engine.accelerator.counters hold calls and bytes"),
        "verbose prof_all debug prof_ops",
    ),
    **_not_yet("tensorboard.enabled", False, _NO_MONITOR, "output_path job_name"),
    **_not_yet("csv_monitor.enabled", False, _NO_MONITOR, "output_path job_name"),
    **_not_yet("wandb.enabled", False, _NO_MONITOR, "group team project"),
    **_not_yet(
        *("comet.enabled", False, _NO_MONITOR),
        "samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    ),
    **_not_yet(
        *("flops_profiler.enabled", False, "nothing is profiled, use torch.profiler"),
        "recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    ),
    **_not_yet(
        *("autotuning.enabled", False, "the settings are used as they stand"),
        "fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path tuner_type "
        "tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size min_train_batch_size "
        "max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes mp_size "
        "model_info.profile model_info.num_params model_info.hidden_size model_info.num_layers model_info_path",
    ),
    **_not_yet(
        *("elasticity.enabled", False, "remove it and set train_batch_size"),
        "max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time version prefer_larger_batch "
        "ignore_non_elastic_batch_info num_gpus_per_node model_parallel_size",
        changes_meaning=True,
    ),
    **_not_yet(
        *("data_efficiency.enabled", False, _OWN_DATA_ORDER),
        "seed data_sampling.enabled data_sampling.num_epochs data_sampling.num_workers data_sampling.pin_memory "
        "data_sampling.curriculum_learning.enabled data_sampling.curriculum_learning.data_cluster_path "
        "data_sampling.curriculum_learning.curriculum_metrics.* data_sampling.dynamic_batching.enabled "
        "data_sampling.dynamic_batching.metrics_path data_sampling.dynamic_batching.lr_scaling_method "
        "data_sampling.dynamic_batching.min_batch_size data_sampling.dynamic_batching.max_batch_size "
        "data_sampling.dynamic_batching.sequence_picking_order data_sampling.dynamic_batching.max_tokens "
        "data_sampling.dynamic_batching.verbose data_routing.enabled data_routing.random_ltd.enabled "
        "data_routing.random_ltd.total_layer_num data_routing.random_ltd.random_ltd_layer_num "
        "data_routing.random_ltd.random_ltd_layer_id data_routing.random_ltd.model_mask_name "
        "data_routing.random_ltd.model_type data_routing.random_ltd.hidden_state_order "
        "data_routing.random_ltd.random_ltd_schedule.* data_routing.random_ltd.layer_token_lr_schedule.*",
        changes_meaning=True,
    ),
    **_not_yet(
        *("curriculum_learning.enabled", False, _OWN_DATA_ORDER),
        "curriculum_type min_difficulty max_difficulty schedule_type schedule_config.*",
        changes_meaning=True,
    ),
    **_not_yet(
        *("progressive_layer_drop.enabled", False, "remove it and drop layers in the model's forward"),
        "theta gamma",
        changes_meaning=True,
    ),
}

_COMPRESS_LATER = "train first, then compress the exported weights with a quantization or pruning library"

REFUSED: dict[str, Refused] = {
    "optimizer.params.max_grad_norm": Refused(None, "set gradient_clipping at the top level instead"),
    **_refused("amp.enabled", "enable fp16, bf16 or torch_autocast instead", "*"),
    **_refused_if_present("sparse_attention", "use torch.nn.attention.flex_attention in the model"),
    **_refused_if_present("compression_training", _COMPRESS_LATER),
    **_refused_if_present("quantize_training", _COMPRESS_LATER),
    **_refused_if_present("weight_quantization", _COMPRESS_LATER),
    **_refused(
        *("eigenvalue.enabled", _COMPRESS_LATER),
        "verbose max_iter tol stability gas_boundary_resolution layer_name layer_num",
    ),
    **_refused(
        *("hybrid_engine.enabled", "load engine.full_state_dict() into an inference engine"),
        "max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size "
        "enable_cuda_graph",
    ),
    **_refused(
        *("nebula.enabled", "call engine.save_checkpoint with a folder on mounted storage"),
        "enable_nebula_load nebula_load_path persistent_storage_path persistent_time_interval "
        "num_of_version_in_retention",
    ),
}
