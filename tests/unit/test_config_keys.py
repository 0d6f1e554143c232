"""Every DeepSpeed key is in exactly one class, and every default is told as it is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from windlass.config import load_config
from windlass.config_absent import NOT_YET, REFUSED
from windlass.core.schedules import SCHEDULES
from windlass.deepspeed_keys import (
    ALIASES,
    DONE,
    IGNORED,
    MUON_PARAMS,
    OPTIMIZERS_DONE,
    OPTIMIZERS_NOT_YET,
    OPTIMIZERS_REFUSED,
    OWN,
    SCHEDULERS_DONE,
    classify,
)

# Written from DeepSpeed 0.19's documentation and schema, not from our tables: section -> its keys.
DEEPSPEED = {
    "": "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
    "communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor "
    "gradient_allreduce_op sparse_gradients disable_allgather gradient_clipping zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer use_data_before_expert_parallelism sequence_parallel_size data_parallel_size "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level dataloader_drop_last "
    "graph_harvesting vocabulary_size sparse_attention compression_training quantize_training weight_quantization "
    "datastates_ckpt",
    "optimizer": "type legacy_fusion",
    "optimizer.params": "lr betas eps weight_decay torch_adam adam_w_mode bias_correction amsgrad momentum muon_lr "
    "adam_lr ns_method",
    "scheduler": "type",
    "scheduler.params": "lr_range_test_min_lr lr_range_test_step_rate lr_range_test_step_size "
    "lr_range_test_staircase cycle_min_lr cycle_max_lr cycle_first_step_size cycle_second_step_size "
    "cycle_first_stair_count cycle_second_stair_count cycle_momentum cycle_min_mom cycle_max_mom decay_lr_rate "
    "decay_step_size decay_mom_rate warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps "
    "warmup_min_ratio cos_min_ratio",
    "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
    "min_loss_scale fp16_master_weights_and_grads",
    "bf16": "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    "amp": "enabled opt_level",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype",
    "zero_optimization": "stage contiguous_gradients reduce_scatter reduce_bucket_size "
    "use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights "
    "elastic_checkpoint sub_group_size ignore_unused_parameters legacy_stage1 round_robin_gradients "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
    "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential zero_hpz_partition_size "
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients zeropp_loco_param "
    "mics_shard_size mics_hierarchical_params_gather memory_efficient_linear override_module_apply "
    "pipeline_loading_checkpoint log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory "
    "cpu_offload cpu_offload_param cpu_offload_use_pin_memory zenflow",
    "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "zero_optimization.offload_optimizer": "device nvme_path buffer_count pin_memory pipeline_read pipeline_write "
    "fast_init ratio super_offload cpuadam_cores_perc",
    "zero_optimization.zenflow": "topk_ratio select_strategy select_interval update_interval overlap_step offload "
    "auto_ratio full_warm_up_rounds pt_reserved_cores_perc",
    "zero_optimization.leaf_module": "classes names name_suffixes",
    "aio": "block_size queue_depth intra_op_parallelism thread_count single_submit overlap_events use_gds",
    "tensor_parallel": "autotp_size tp_overlap_comm preset_model dtype injection_policy_tuple keep_module_on_host "
    "replace_with_kernel_inject",
    "tensor_parallel.partition_config": "use_default_specs layer_specs",
    "tensor_parallel.tp": "tp_size tp_grain_size mpu tp_group",
    "expert_parallel": "enabled autoep_size expert_tensor_parallel_size validate_folding_routing preset_model "
    "moe_layer_pattern router_pattern expert_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale "
    "score_func score_apply combine_impl num_expert_groups num_limited_groups top_k routed_scaling_factor "
    "load_balance_coeff expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
    "shared_experts_pattern shared_experts_gate_pattern",
    "compile": "deepcompile passes free_activation free_activation_threshold offload_activation "
    "offload_activation_pin_memory offload_opt_states offload_parameters double_buffer symmetric_memory debug_log "
    "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
    "keep_all_input_tensors autoep_non_moe",
    "pipeline": "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned",
    "activation_checkpointing": "partition_activations cpu_checkpointing contiguous_memory_optimization "
    "number_checkpoints synchronize_checkpoint_boundary profile",
    "checkpoint": "tag_validation load_universal use_node_local_storage checkpoint_serialization",
    "checkpoint.parallel_write": "pipeline_stage",
    "checkpoint.writer": "type decoupled io_buffer_size io_buffer_double show_statistics data_parallel io_multiplier",
    "nebula": "enabled enable_nebula_load nebula_load_path persistent_storage_path persistent_time_interval "
    "num_of_version_in_retention",
    "datastates_ckpt": "host_cache_size",
    "timers.throughput": "enabled synchronized",
    "comms_logger": "enabled verbose prof_all debug prof_ops",
    "tensorboard": "enabled output_path job_name",
    "csv_monitor": "enabled output_path job_name",
    "wandb": "enabled group team project",
    "comet": "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "autotuning": "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path "
    "tuner_type tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size min_train_batch_size "
    "max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes mp_size "
    "model_info_path",
    "autotuning.model_info": "profile num_params hidden_size num_layers",
    "elasticity": "enabled max_train_batch_size micro_batch_sizes min_gpus max_gpus min_time version "
    "prefer_larger_batch ignore_non_elastic_batch_info num_gpus_per_node model_parallel_size",
    "hybrid_engine": "enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters "
    "tp_gather_partition_size enable_cuda_graph",
    "data_efficiency": "enabled seed",
    "data_efficiency.data_sampling": "enabled num_epochs num_workers pin_memory",
    "data_efficiency.data_sampling.curriculum_learning": "enabled data_cluster_path",
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.seqlen": "index_to_sample_path "
    "index_to_metric_path difficulty_type clustering_type min_difficulty max_difficulty schedule_type schedule_config",
    "data_efficiency.data_sampling.dynamic_batching": "enabled metrics_path lr_scaling_method min_batch_size "
    "max_batch_size sequence_picking_order max_tokens verbose",
    "data_efficiency.data_routing": "enabled",
    "data_efficiency.data_routing.random_ltd": "enabled total_layer_num random_ltd_layer_num random_ltd_layer_id "
    "model_mask_name model_type hidden_state_order",
    "data_efficiency.data_routing.random_ltd.random_ltd_schedule": "min_value max_value schedule_type",
    "data_efficiency.data_routing.random_ltd.random_ltd_schedule.schedule_config": "require_steps seq_per_step",
    "data_efficiency.data_routing.random_ltd.layer_token_lr_schedule": "enabled",
    "curriculum_learning": "enabled curriculum_type min_difficulty max_difficulty schedule_type",
    "curriculum_learning.schedule_config": "total_curriculum_step difficulty_step root_degree difficulty max_step",
    "progressive_layer_drop": "enabled theta gamma",
    "eigenvalue": "enabled verbose max_iter tol stability gas_boundary_resolution layer_name layer_num",
    "sparse_attention": "mode block different_layout_per_head num_local_blocks num_global_blocks attention "
    "horizontal_global_attention num_different_global_patterns num_random_blocks local_window_blocks "
    "global_block_indices global_block_end_indices num_sliding_window_blocks",
    "compression_training": "weight_quantization activation_quantization sparse_pruning row_pruning head_pruning "
    "channel_pruning layer_reduction",
    "compression_training.weight_quantization.shared_parameters": "enabled schedule_offset method",
    "weight_quantization": "enabled num_bits q_type q_groups quantized_initialization post_init_quant",
}
KEYS = [f"{section}.{name}".lstrip(".") for section, names in DEEPSPEED.items() for name in names.split()]

# What DeepSpeed takes beyond its documented keys: settings of torch's Adam, and a setting of Apex's with its own error.
EXTRA = {f"optimizer.params.{name}" for name in ("set_grad_none", "fused", "foreach", "max_grad_norm")}


@pytest.mark.parametrize("key", KEYS)
def test_every_deepspeed_key_has_exactly_one_class(key: str) -> None:
    assert len(classify(key)) == 1


def test_no_table_invents_a_deepspeed_key() -> None:
    documented = {*KEYS, *EXTRA}
    free = [path.removesuffix("*") for path in (*DONE, *NOT_YET, *REFUSED) if path.endswith(".*")]
    for path in (*DONE, *IGNORED, *NOT_YET, *REFUSED):
        assert path in documented or any(path.startswith(prefix) for prefix in free), path
    assert not set(OWN) & documented
    assert all(classify(path) for path in ALIASES if path != "bfloat16")


def test_every_switch_is_an_entry_that_speaks() -> None:
    for table in (NOT_YET, REFUSED):
        for path, entry in table.items():
            if entry.switch is not None:
                assert table[entry.switch].switch is None, path


def test_documented_optimizers_and_schedules_are_known() -> None:
    documented = ("adam", "adamw", "lamb", "adagrad", "lion", "muon", "muadam", "muadamw", "musgd")
    compressed = ("onebitadam", "zerooneadam", "onebitlamb")
    groups = (OPTIMIZERS_DONE, OPTIMIZERS_NOT_YET, OPTIMIZERS_REFUSED)
    assert [sum(name in group for group in groups) for name in (*documented, *compressed)] == [1] * 12
    assert set(SCHEDULERS_DONE) == set(SCHEDULES)
    accepted = {name for rule in SCHEDULES.values() for name in inspect.signature(rule).parameters}
    assert accepted == set(DEEPSPEED["scheduler.params"].split())


def test_defaults_of_the_table_are_those_of_the_config() -> None:
    resolved = load_config(None, 1).resolved()
    derived = {"optimizer.type", "optimizer.params.adam_w_mode", "scheduler.type", "scheduler.params.*"}
    derived |= {path for path, entry in DONE.items() if "." not in path and entry.default is None}
    derived |= {f"optimizer.params.{name}" for name in MUON_PARAMS}
    for path, entry in {**DONE, **OWN}.items():
        if path not in derived:
            value: Any = resolved
            for name in path.split("."):
                value = value[name]
            assert value == entry.default, path
    assert resolved["optimizer"]["type"] == "adamw"
    assert resolved["optimizer"]["params"]["decoupled"] is True
    params = load_config({"optimizer": {"type": "Muon"}}, 1).resolved()["optimizer"]["params"]
    shared = ("lr", "betas", "eps", "weight_decay", "momentum")
    assert {name: DONE[f"optimizer.params.{name}"].default for name in shared} == {
        name: params[name] for name in shared
    }
    assert params["muon_lr"] == params["adam_lr"] == params["lr"]
