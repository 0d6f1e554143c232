"""The last linear layer and its cross-entropy in one, so that the logits of all tokens never exist together."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema

LINEAR_CROSS_ENTROPY = KernelSchema(
    name="linear_cross_entropy",
    signature=(
        "(hidden f32|bf16|f16[t, h], weight as hidden [v, h], targets i64[t], *, ignore_index: int, chunk: int, tokens "
        "whose logits exist at a time, gradients: bool) -> (losses f32[t], hidden_gradient as hidden or None, "
        "weight_gradient as weight or None)"
    ),
    consumes=(),
    rounding=(
        "terms of products are added in fp32; logits, and the differences that go back, are rounded to the dtype of "
        "hidden or are wider; softmax in fp32; the gradient of weight is added up over chunks in fp32 and rounded once"
    ),
    tolerance=(
        "of a loss: the error of its logits, (h + 4) ulp of fp32 of the sum of the sizes of their terms and a unit of "
        "the dtype of hidden of the logit, twice, and 16 ulp of fp32 of the largest logit; of the gradients: what "
        "such errors do to the softmax, a unit of the dtype of hidden of each difference, and the same again for "
        "their sums. A token with ignore_index has loss 0 and no gradient; one whose target is outside the "
        "vocabulary has loss nan"
    ),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int = 1024,
    gradients: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each token's -log softmax(hidden weight^T)[target], and the gradients of the *sum* of these losses.

    The gradients are made on the way, while a chunk's logits are there; a mean's are a multiple of them. So nothing is
    computed twice, and backward needs neither logits nor weight.
    """
    tokens, size = hidden.shape[0], weight.shape[0]
    losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if gradients else None
    weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if gradients else None
    matrix = weight.to(torch.float32)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        rows = hidden[part].to(torch.float32)
        counted = targets[part] != ignore_index
        known = (targets[part] >= 0) & (targets[part] < size)
        place = torch.where(known, targets[part], 0)[:, None]
        logits = rows @ matrix.mT
        logs = logits - logits.logsumexp(-1, keepdim=True)
        found = torch.where(known, -logs.gather(1, place)[:, 0], torch.nan)
        losses[part] = torch.where(counted, found, 0.0)
        if hidden_gradient is None or weight_gradient is None:
            continue
        differences = logs.exp().scatter_add(1, place, torch.where(known, -1.0, torch.nan)[:, None])
        differences = torch.where(counted[:, None], differences, 0.0).to(hidden.dtype).to(torch.float32)
        hidden_gradient[part] = (differences @ matrix).to(hidden.dtype)
        weight_gradient += differences.mT @ rows
    return losses, hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype)
