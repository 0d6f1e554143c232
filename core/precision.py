"""Loss scaling for fp16, with DeepSpeed's keys and behaviour, and the dtype that a precision means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WEIGHT_DTYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}  # None: as the model has them


@dataclass
class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018): back off on overflow, grow after a quiet window.

    `hysteresis` overflows are forgiven before the scale backs off. They are counted anew after a window of good
    steps (or after every good step with `consecutive_hysteresis`). `static` fixes the scale.
    """

    scale: float = 1.0
    static: bool = True
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0
    factor: float = 2.0
    forgiven: int = 0  # overflows since hysteresis was refilled
    good_steps: int = 0  # since the last overflow or growth

    def update(self, overflow: bool) -> None:
        """Called once per optimizer step, with the same answer on every rank."""
        if self.static:
            return
        if overflow:
            self.good_steps = 0
            if self.forgiven + 1 >= self.hysteresis:
                self.scale = max(self.scale / self.factor, self.minimum)
            else:
                self.forgiven += 1
            return
        self.good_steps += 1
        if self.consecutive_hysteresis:
            self.forgiven = 0
        if self.good_steps >= self.window:
            self.good_steps = 0
            self.forgiven = 0
            self.scale *= self.factor

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"scale": self.scale, "forgiven": self.forgiven, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. A static scale stays what the configuration says."""
        if not self.static:
            self.scale = float(state["scale"])
            self.forgiven = int(state["forgiven"])
            self.good_steps = int(state["good_steps"])
