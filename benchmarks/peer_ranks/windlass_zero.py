"""windlass at one ZeRO stage. Variant `autocast`: bf16 arithmetic over fp32 weights; `bf16`: bf16 weights.

With Muon, query, key and value are one matrix, as the other systems see them; in variant `apart`, which has bf16
weights too, they are three, which is what windlass makes of its own models.
"""

from __future__ import annotations

import workload

import windlass


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    config = workload.engine_config(settings)
    if settings.variant == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    else:
        config["bf16"] = {"enabled": True}
    if settings.optimizer == "muon":
        views = {} if settings.variant == "apart" else {"*query_key_value.weight": 1}
        config["muon"] = {"scale": "original", "views": views}
    engine = windlass.initialize(workload.build_model(), config)
    workload.measure(settings, engine, engine.backward, engine.step, versions={"windlass": windlass.__version__})
    engine.close()


if __name__ == "__main__":
    main()
