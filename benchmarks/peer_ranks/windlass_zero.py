"""windlass at one ZeRO stage. Variant `autocast`: bf16 arithmetic over fp32 weights; `bf16`: bf16 weights."""

from __future__ import annotations

import workload

import windlass


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    precision = {
        "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "bf16": {"bf16": {"enabled": True}},
    }[settings.variant]
    engine = windlass.initialize(workload.build_model(), workload.engine_config(settings.stage) | precision)
    workload.measure(settings, engine, engine.backward, engine.step, versions={"windlass": windlass.__version__})
    engine.close()


if __name__ == "__main__":
    main()
