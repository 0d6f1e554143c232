"""The norms in Triton against torch in float64, beyond what the suite asks: every size of block, and the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from windlass.backends.triton import norm_variants, norms
from windlass.backends.triton.norm_variants import LONGEST

UNITS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NORMS = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, centred: bool) -> list[Tensor]:
    """output, and the gradients of input, weight and, of LayerNorm, bias."""
    if centred:
        gradients: tuple[Tensor | None, ...]
        output, mean, rstd = norms.layer_norm(x, weight, bias, eps=1e-5)
        gradients = norms.layer_norm_backward(upstream, x, weight, mean, rstd, bias=True)
    else:
        output, rstd = norms.rms_norm(x, weight, eps=1e-5)
        gradients = norms.rms_norm_backward(upstream, x, weight, rstd)
    return [output, *(one for one in gradients if one is not None)]


def run_torch(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, centred: bool) -> list[Tensor]:
    wide = [one.double().requires_grad_() for one in (x, weight, bias)]
    shape = weight.shape
    output = (
        F.layer_norm(wide[0], shape, wide[1], wide[2]) if centred else F.rms_norm(wide[0], shape, wide[1], eps=1e-5)
    )
    output.backward(upstream.double())
    return [output.detach(), *(one.grad for one in wide if one.grad is not None)]


@NORMS
@pytest.mark.parametrize("size", [100, 200, 513, 1500, 3000, LONGEST, LONGEST + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_block(size: int, dtype: torch.dtype, centred: bool) -> None:
    arguments = (
        normal(2, size, dtype=dtype),
        normal(size, seed=1),
        normal(size, seed=2),
        normal(2, size, seed=3, dtype=dtype),
    )
    found, wanted = run(*arguments, centred), run_torch(*arguments, centred)
    for one, exact in zip(found, wanted, strict=True):
        error = (one.double() - exact).abs().max() / exact.abs().max()
        assert error < 2 * UNITS[one.dtype], f"off by {float(error):.3g}"


@NORMS
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 300])
def test_groups_of_short_rows(tokens: int, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows are one program's; few programs make each go through several groups of them."""
    monkeypatch.setattr(norms, "PARTIALS", 128 * 5)
    arguments = (normal(tokens, 24), normal(24, seed=1), normal(24, seed=2), normal(tokens, 24, seed=3))
    for one, exact in zip(run(*arguments, centred), run_torch(*arguments, centred), strict=True):
        error = (one.double() - exact).abs().max() / exact.abs().max()
        assert error < UNITS[torch.float32], f"off by {float(error):.3g}"


@NORMS
def test_many_long_rows(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "PARTIALS", LONGEST * 2)
    size = LONGEST + 100
    arguments = (normal(3, size), normal(size, seed=1), normal(size, seed=2), normal(3, size, seed=3))
    for one, exact in zip(run(*arguments, centred), run_torch(*arguments, centred), strict=True):
        error = (one.double() - exact).abs().max() / exact.abs().max()
        assert error < UNITS[torch.float32], f"off by {float(error):.3g}"


@NORMS
def test_a_row_has_the_same_bits_wherever_it_lies(centred: bool) -> None:
    x, weight, bias, upstream = normal(21, 40), normal(40, seed=1), normal(40, seed=2), normal(21, 40, seed=3)
    whole = run(x, weight, bias, upstream, centred)
    again = run(x, weight, bias, upstream, centred)
    part = run(x[5:14], weight, bias, upstream[5:14], centred)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    for one, other in zip(part[:2], whole[:2], strict=True):
        assert torch.equal(one, other[5:14])


@NORMS
def test_strided_rows_are_taken(centred: bool) -> None:
    x, upstream = normal(9, 80)[:, ::2], normal(40, 9, seed=3).mT
    weight, bias = normal(40, seed=1), normal(40, seed=2)
    strided = run(x, weight, bias, upstream, centred)
    for one, other in zip(strided, run(x.contiguous(), weight, bias, upstream.contiguous(), centred), strict=True):
        assert torch.equal(one, other)


def test_sums_depend_on_the_shape_alone() -> None:
    """Not on how many programs a device runs at a time: these are what a GPU of any size is given."""
    assert norm_variants.PARTIALS // LONGEST == 128
    assert norm_variants.PARTIALS // norm_variants.TILE == 1024


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (normal(4, 8).double(), None, r"got input as torch.float64\[4, 8\], wanted \[tokens, size\] of float32"),
        (normal(2, 4, 8), None, "flatten the leading dimensions"),
        (normal(4, 8), normal(7), r"got weight as torch.float32\[7\] with strides \(1,\), wanted contiguous"),
        (normal(4, 8), normal(16)[::2], r"with strides \(2,\), wanted contiguous float32 or bfloat16 or float16\[8\]"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms.rms_norm(x, weight, eps=1e-5)


def test_gradients_that_do_not_fit_are_refused() -> None:
    x, rstd = normal(4, 8), torch.ones(4)
    with pytest.raises(ValueError, match=r"got output_gradient as torch.bfloat16\[4, 8\], wanted it as input"):
        norms.rms_norm_backward(x.bfloat16(), x, None, rstd)
    with pytest.raises(ValueError, match=r"got rstd as torch.float32\[3\]"):
        norms.rms_norm_backward(x, x, None, rstd[:3])
