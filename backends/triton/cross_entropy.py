"""The last linear layer and its cross-entropy: logits of a chunk of tokens, turned where they lie into what goes back.

Products are torch's; one program takes one token's logits: their log-sum-exp in one pass, and then, in place, the
difference between softmax and target. So a chunk's logits are written twice and read three times, and nothing of the
size of the vocabulary is there for all tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.triton.launch import IMPLEMENTATION, TYPE_NAMES, Variant, launch
from windlass.backends.triton.numbers import round_to, widen
from windlass.backends.triton.products import exact_products

BLOCKS: Final = {1024: 4, 4096: 8}
"""Logits that a program takes at a time, and its warps: small vocabularies, and all others."""
PADDING: Final = 64
"""Rows of logits begin at multiples of so many elements, whatever the vocabulary: for wide loads and fast products."""
BOOST: Final = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 2.0**15}
"""What differences, which are at most 1, are multiplied with before they are rounded, and products divided by: fp16 has
no numbers below 2^-24, and the softmax over a large vocabulary is full of them."""


@triton.jit(do_not_specialize=["ignore_index"])
def compare_with_targets(
    logits: tl.tensor,  # [tokens, stride], of which the first `size` columns count
    losses: tl.tensor,
    targets: tl.tensor,
    scales: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    ignore_index: tl.tensor,
    boost: tl.tensor,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One token's loss; with GRADIENTS its logits become `boost` times its scale times (softmax - target)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    at = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENTS:
            start = 0
            while start < stride:
                tl.store(logits + start + at, 0.0, mask=at < stride - start)
                start += BLOCK
    else:
        known = (target >= 0) & (target < size)
        own = widen(tl.load(logits + target, mask=known, other=float("nan")))
        largest = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        start = 0
        while start < size:
            # The padding is loaded too, so that the mask does not keep threads from loading 16 bytes at once.
            x = widen(tl.load(logits + start + at, mask=at < stride - start, other=float("-inf")))
            x = tl.where(at < size - start, x, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(x, axis=0))
            base = tl.where(largest == float("-inf"), 0.0, largest)  # no difference of infinities
            total = total * tl.exp(before - base) + tl.exp(x - base)
            start += BLOCK
        log_total = tl.log(tl.sum(total, axis=0))
        tl.store(losses + row, (largest - own) + log_total)
        if GRADIENTS:
            factor = boost
            if scales is not None:
                factor = boost * tl.load(scales + row)
            log_sum = largest + log_total + tl.where(known, 0.0, float("nan"))
            start = 0
            while start < size:
                x = widen(tl.load(logits + start + at, mask=at < stride - start, other=0.0))
                difference = tl.exp(x - log_sum) - tl.where(start + at == target, 1.0, 0.0)
                y = round_to(difference * factor, logits.dtype.element_ty)
                tl.store(logits + start + at, y, mask=at < stride - start)
                start += BLOCK


@cache
def make_variant(dtype: torch.dtype, block: int, *, gradients: bool, scaled: bool) -> Variant:
    """The program for logits of a dtype."""
    vectors = {
        "logits": f"*{TYPE_NAMES[dtype]}",
        "losses": "*fp32",
        "targets": "*i64",
        "scales": "*fp32" if scaled else "constexpr",
    }
    constants: dict[str, Any] = {"GRADIENTS": gradients, "BLOCK": block} | ({} if scaled else {"scales": None})
    numbers = {"size": "i32", "stride": "i32", "ignore_index": "i32", "boost": "fp32"}
    what = f"{TYPE_NAMES[dtype]}, {'with' if gradients else 'without'} gradients{', scaled' if scaled else ''}"
    return Variant(
        name=f"compare_with_targets of {what}, BLOCK {block}",
        function=compare_with_targets,
        signature=vectors | numbers | dict.fromkeys(constants, "constexpr"),
        constants=constants,
        num_warps=BLOCKS[block],
        aligned=("logits", "losses", "targets", "stride", *(("scales",) if scaled else ())),
    )


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk: int = 1024,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.linear_cross_entropy`.

    Beside arguments and results this takes min(chunk, t) rows of v elements of hidden's dtype, v rounded up to a
    multiple of 64, and where that is bf16, as many rows of h in fp32; with 16-bit hidden and more than one chunk also
    2 v h bytes: weight's gradient is added up in fp32, in memory of which the result keeps one half and holds both.
    """
    _require(hidden, weight, targets, scales, chunk)
    (tokens, width), size = hidden.shape, weight.shape[0]
    device, dtype, most = hidden.device, hidden.dtype, min(chunk, tokens)
    kept = torch.float32 if dtype is torch.float16 else dtype
    alone = kept is dtype and tokens <= chunk
    losses = torch.empty(tokens, dtype=torch.float32, device=device)
    back = torch.empty(tokens, width, dtype=kept, device=device) if hidden_gradient else None
    total = torch.empty(size, width, dtype=kept if alone else torch.float32, device=device) if weight_gradient else None
    stride = triton.cdiv(size, PADDING) * PADDING
    all_rows = torch.empty(most, stride, dtype=dtype, device=device)
    wide = torch.empty(most if hidden_gradient and kept is not torch.float32 else 0, width, device=device)
    gradients = hidden_gradient or weight_gradient
    block = next((one for one in BLOCKS if size <= one), max(BLOCKS))
    variant = make_variant(dtype, block, gradients=gradients, scaled=gradients and scales is not None)
    with exact_products(device.type):
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            count = part.stop - start
            logits = all_rows[:count, :size]
            torch.mm(hidden[part], weight.mT, out=logits)
            given = {"logits": all_rows, "losses": losses[part], "targets": targets[part]}
            if scales is not None and gradients:
                given["scales"] = scales[part]
            numbers = {"size": size, "stride": stride, "ignore_index": ignore_index, "boost": BOOST[dtype]}
            launch(variant, (count,), device, **given, **numbers)
            if back is not None and wide.numel():
                back[part].copy_(_add_product(wide[:count], logits, weight, 0.0, 1 / BOOST[dtype]))
            elif back is not None:
                _add_product(back[part], logits, weight, 0.0, 1 / BOOST[dtype])
            if total is not None:
                _add_product(total, logits.mT, hidden[part], float(start > 0), 1 / BOOST[dtype])
    if total is not None and not tokens:
        total.zero_()
    return losses, back, total if total is None or total.dtype is kept else _narrow_in_place(total, kept)


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """total = beta total + alpha left right, in place; 16-bit factors may have a sum in fp32."""
    if total.dtype is left.dtype:
        return torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total)
    if _adds_in_float(left.device, left.dtype):
        more: dict[str, Any] = {"out_dtype": torch.float32}
        return torch.addmm(total, left, right, beta=beta, alpha=alpha, out=total, **more)
    return torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, alpha=alpha, out=total)


@cache
def _adds_in_float(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of this dtype to a sum in fp32 here: on CUDA since 2.10, on the host not at all.

    It is tried, because neither a version nor a device's name says so for every device that Triton compiles for.
    """
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    more: dict[str, Any] = {"out_dtype": torch.float32}
    try:
        torch.addmm(total, factor, factor, out=total, **more)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def _narrow_in_place(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of fp32 rounded to 16 bits, in the first half of its own memory.

    After row 0, as many rows follow at a time as are done: they end, being half as long, where they began.
    """
    narrow = total.view(-1).view(dtype)[: total.numel()].view(total.shape)
    narrow[:1].copy_(total[:1].clone())
    done = 1
    while done < len(total):
        following = slice(done, min(2 * done, len(total)))
        narrow[following].copy_(total[following])
        done = following.stop
    return narrow


def _require(hidden: Tensor, weight: Tensor, targets: Tensor, scales: Tensor | None, chunk: int) -> None:
    """Raise ValueError unless the arguments fit together."""
    tokens = hidden.shape[0]
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and len(weight) > 0
    if not fits or hidden.dtype is not weight.dtype or hidden.dtype not in TYPE_NAMES:
        raise ValueError(
            f"kernel 'linear_cross_entropy' got hidden as {hidden.dtype}{list(hidden.shape)} and weight as "
            f"{weight.dtype}{list(weight.shape)}, wanted [tokens, size] and [vocabulary, size] of one dtype of 16 bits "
            "or float32; cast and flatten them first"
        )
    for name, vector, dtype in (("targets", targets, torch.int64), ("scales", scales, torch.float32)):
        if vector is not None and (vector.shape != (tokens,) or vector.dtype is not dtype or vector.stride() != (1,)):
            raise ValueError(
                f"kernel 'linear_cross_entropy' got {name} as {vector.dtype}{list(vector.shape)} with strides "
                f"{vector.stride()}, wanted contiguous {dtype}[{tokens}]; flatten them as hidden was flattened"
            )
    if chunk < 1:
        raise ValueError(f"kernel 'linear_cross_entropy' got chunk {chunk}, wanted 1 token at a time or more")


_FORMS: Final = ((True, False), (True, True), (False, False))

VARIANTS: tuple[Variant, ...] = tuple(
    make_variant(dtype, block, gradients=gradients, scaled=scaled)
    for dtype in TYPE_NAMES
    for block in BLOCKS
    for gradients, scaled in _FORMS
)

KERNELS: tuple[Kernel, ...] = (Kernel("linear_cross_entropy", IMPLEMENTATION, linear_cross_entropy),)
