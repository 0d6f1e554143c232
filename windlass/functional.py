"""The accelerator's kernels for a model's own layers, as differentiable functions: norms, and the last linear layer
with its cross-entropy. And attention that tells QK-clip its largest logits.

Each that runs kernels takes the accelerator that holds the tensors, as `engine.accelerator`, and any leading
dimensions.
"""

from __future__ import annotations

import copyreg
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from windlass.accelerator.interface import Accelerator
from windlass.attention import attention as attention
from windlass.core.qk_probe import HeadRows as HeadRows
from windlass.core.qk_probe import QKProbe as QKProbe
from windlass.differentiable import cross_entropy, cross_entropy_of_each, norm_by_layer, norm_by_root

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS_AT_A_TIME = 2**27
"""Elements of the logits that exist at a time, about, unless `chunk` says otherwise: 256 MiB of 16 bits. Products of
that size run at full speed."""
Reduction = Literal["mean", "sum", "none"]
# torch.compile must not look into kernels, which are compiled already. Unlike torch.compiler.disable this loads the
# compiler when a function is first called and not before, as torch's optimizers do.
_untraced = _disable_dynamo


@_untraced
def linear_cross_entropy(
    hidden: Tensor,  # [..., h]
    weight: Tensor,  # [v, h]
    targets: Tensor,  # [...], integers below v, or ignore_index
    accelerator: Accelerator,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk: int | None = None,  # tokens
) -> Tensor:
    """The cross-entropy of F.linear(hidden, weight) with targets, fp32, without the logits of all tokens.

    With "mean", over the targets that are not ignored, and "sum" the gradients are made in forward, while a chunk's
    logits are there, and only multiplied in backward: 3 products of the size of the logits, as without this function.
    With "none" [...] each loss may have a gradient of its own; backward then makes the logits again, a fourth product.

    Beside arguments and gradients it takes a chunk's logits, in the dtype of `hidden`, and with 16-bit `hidden` and
    more than one chunk 2 v h bytes for sums in fp32. `hidden` and `weight` are of one dtype, or cast by autocast as
    for F.linear. Targets are never read on the host: one outside of the vocabulary makes the loss nan.

    In a model whose weights are sharded, call this in the forward of the module that owns `weight`; called elsewhere
    it costs that module memory of its own, as every weight that another module reads.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        _require_device("linear_cross_entropy", name, tensor, accelerator)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy got reduction {reduction!r}, wanted 'mean', 'sum' or 'none'")
    if targets.is_floating_point() or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy got targets of {targets.dtype}{list(targets.shape)} for hidden of shape "
            f"{list(hidden.shape)}, wanted integers of shape {list(hidden.shape[:-1])}: one class for each token"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype not in DTYPES or weight.dtype is not hidden.dtype or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"linear_cross_entropy got hidden of {hidden.dtype}{list(hidden.shape)} and weight of "
            f"{weight.dtype}{list(weight.shape)}, wanted one dtype of float32, bfloat16 and float16, and weight as "
            "[vocabulary, size of hidden]; cast them, or use torch.autocast"
        )
    rows, classes = _rows_of(hidden), targets.reshape(-1).to(torch.int64)
    tokens = max(1, chunk if chunk is not None else _choose_chunk(len(rows), len(weight)))
    wanted = tuple(torch.is_grad_enabled() and one.requires_grad for one in (hidden, weight))
    with torch.autocast(kind, enabled=False):
        if reduction == "none":
            losses = cross_entropy_of_each(rows, weight, classes, accelerator, ignore_index, tokens, wanted)
            return losses.view(targets.shape)
        mean = reduction == "mean"
        return cross_entropy(rows, weight, classes, accelerator, ignore_index, tokens, wanted, mean)


@_untraced
def rms_norm(x: Tensor, weight: Tensor | None, accelerator: Accelerator, eps: float | None = None) -> Tensor:
    """F.rms_norm over the last dimension, in the dtype of `x` whatever that of `weight`, statistics in fp32.

    `eps` None is that of fp32. Autocast does not change the dtype.
    """
    _require_norm("rms_norm", x, accelerator, weight)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return norm_by_root(_rows_of(x), weight, accelerator, eps).view(x.shape)


@_untraced
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, accelerator: Accelerator, eps: float = 1e-5
) -> Tensor:
    """F.layer_norm over the last dimension, in the dtype of `x` whatever that of `weight` and `bias`, which are of one
    dtype, statistics in fp32. Autocast does not change the dtype."""
    _require_norm("layer_norm", x, accelerator, weight, bias)
    return norm_by_layer(_rows_of(x), weight, bias, accelerator, eps).view(x.shape)


def use_kernels(model: nn.Module, accelerator: Accelerator) -> list[str]:
    """Let every nn.LayerNorm and nn.RMSNorm of a model that norms one dimension run the accelerator's kernels.

    Returns the names of those that did not before. Parameters, state_dict and repr stay as they are; a norm of a class
    of its own is left alone. Call it before or after `windlass.initialize`. Copies and pickles of the model are plain.
    Under autocast the norms keep the dtype of their input, where torch's own turn to fp32 on some devices.
    """
    changed = []
    for name, module in model.named_modules():
        kind = _KERNEL_NORMS.get(type(module))
        if kind is None or len(module.normalized_shape) != 1:
            continue
        if getattr(module, _ACCELERATOR, None) is not accelerator:
            changed.append(name)
        module.__class__ = kind
        setattr(module, _ACCELERATOR, accelerator)
    return changed


_ACCELERATOR = "_windlass_accelerator"


class _KernelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm by the accelerator's kernels; goes by the name of what it is."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, getattr(self, _ACCELERATOR), self.eps)

    def _get_name(self) -> str:
        return "LayerNorm"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _reduce_to(nn.LayerNorm, self)


class _KernelRMSNorm(nn.RMSNorm):
    """nn.RMSNorm by the accelerator's kernels; goes by the name of what it is."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, getattr(self, _ACCELERATOR), self.eps)

    def _get_name(self) -> str:
        return "RMSNorm"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _reduce_to(nn.RMSNorm, self)


_KERNEL_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: _KernelLayerNorm,
    _KernelLayerNorm: _KernelLayerNorm,
    nn.RMSNorm: _KernelRMSNorm,
    _KernelRMSNorm: _KernelRMSNorm,
}


def _reduce_to(kind: type[nn.Module], module: nn.Module) -> tuple[Any, ...]:
    """For copy and pickle: a plain module, because an accelerator is open in one process."""
    state = {name: value for name, value in vars(module).items() if name != _ACCELERATOR}
    return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]


def _rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _choose_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens at a time: chunks of about one size, of whole multiples of 128."""
    chunks = -(-tokens * vocabulary // LOGITS_AT_A_TIME)
    return -(-tokens // max(1, chunks) // 128) * 128


def _require_device(function: str, name: str, tensor: Tensor, accelerator: Accelerator) -> None:
    if tensor.device.type != accelerator.device.type:
        raise ValueError(
            f"{function} got {name} on {tensor.device}, wanted it on {accelerator.device}, the device of accelerator "
            f"{accelerator.name}; pass the accelerator that holds the model, as engine.accelerator"
        )


def _require_norm(function: str, x: Tensor, accelerator: Accelerator, *vectors: Tensor | None) -> None:
    _require_device(function, "x", x, accelerator)
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ValueError(
            f"{function} got x as {x.dtype}{list(x.shape)}, wanted float32, bfloat16 or float16 of one dimension or "
            "more; cast it, or use torch's own"
        )
    for vector in vectors:
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{function} got x of shape {list(x.shape)} and a weight or bias of {list(vector.shape)}, wanted "
                f"{list(x.shape[-1:])}: it norms the last dimension"
            )
