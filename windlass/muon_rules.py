"""From a configuration and a device to the rules by which Muon works."""

from __future__ import annotations

from collections.abc import Collection

from windlass.accelerator.polar import COEFFICIENTS
from windlass.config import Config
from windlass.core.muon import MuonRules
from windlass.polar_choice import PolarChoice

_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def muon_rules(
    config: Config,
    matmul_dtypes: Collection[str],
    measured: PolarChoice | None = None,
    *,
    uniform_program: bool = False,
) -> MuonRules:
    """`matmul_dtypes`: in which the device multiplies at full speed; `measured`: what is known better than by it.
    Update inputs are kept and travel in bf16 unless products are in fp32: fp16 has not the range. Where every rank runs
    one program, the form is the standard one unless it is given."""
    muon = config.muon
    measured = measured or PolarChoice()
    chosen, form = muon.ns_dtype, muon.ns_method
    if chosen == "auto":
        fast = "bfloat16" in matmul_dtypes and measured.product_dtype != "float32" and form != "gram"
        chosen = "bf16" if fast else "fp32"
    if form == "auto" and uniform_program:
        form = "standard"
    return MuonRules(
        coefficients=COEFFICIENTS[muon.coefficients],
        product_dtype=_LONG[chosen],
        direction_dtype="float32" if chosen == "fp32" else "bfloat16",
        form=form,
        measured_forms=measured.forms,
        scale=muon.scale,
        clip=muon.clip,
        nesterov=muon.nesterov,
        momentum_dtype=_LONG[muon.momentum_dtype],
    )
