"""What every backend that trains must stand: models with a corner, events around a step, uses beyond the plain loop.

The models are names in `windlass.conformance.models`; events and uses are workers that take the ZeRO stage.
"""

from __future__ import annotations

import events
import uses
from windlass.conformance import precision_workers, training_workers

PER_RANK = {"Branching"}  # what they compute depends on the rows that a rank sees

CASES = [
    "Tied", "Checkpointed", "CheckpointedReentrant", "UnusedEverywhere", "Branching", "CalledOften", "Frozen",
    "Adapted", "TinyPieces", "OneParameter", "ReadsAnother", "ReturnsDataclass", "ReturnsDict", "ReturnsTuple",
    "Attention", "GivesItsWeight", "OneBlockInFourPlaces", "InPlaceFirst", "OddBuffers",
]  # fmt: skip

EVENTS = [
    training_workers.evaluate_between_steps,
    training_workers.raise_in_forward_then_train,
    training_workers.several_backwards_per_step,
    training_workers.state_dict_in_mid_training,
    events.unfreeze_in_mid_run,
    events.parameter_groups_and_torch_scheduler,
    events.own_torch_optimizer,
    events.build_on_meta,
    events.train_compiled,
    events.gradients_and_state_in_full,
    events.close_gives_back,
    events.dropped_gradients_leave_no_trace,
    events.two_engines_in_one_process,
    events.loss_and_wish_to_stop_travel_with_the_step,
    training_workers.seeds_rule_dropout,
    training_workers.recomputation_draws_the_same_mask,
    precision_workers.mixed_dtypes_in_one_module,
]

USES = [
    uses.backward_twice_through_one_graph,
    uses.two_losses_per_micro_batch,
    uses.one_step_after_all_micro_batches,
    uses.evaluate_in_inference_mode,
    uses.plain_backward_in_fp16,
    uses.frozen_weights_in_bf16_come_from_rank_0,
    uses.many_backwards_in_bf16,
    uses.stale_and_changed_models_are_refused,
    uses.ways_round_a_units_outputs_are_refused,
    uses.parts_of_the_model_can_be_saved,
    uses.schedulers_that_cannot_work_are_refused,
    uses.closed_shards_are_not_trained_on,
]
