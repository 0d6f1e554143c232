"""The training core: specs, planner, plan, executor. Written only against the accelerator interface."""
