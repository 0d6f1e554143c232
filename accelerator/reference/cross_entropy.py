"""The last linear layer and its cross-entropy in one, so that the logits of all tokens never exist together."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema

LINEAR_CROSS_ENTROPY = KernelSchema(
    name="linear_cross_entropy",
    signature=(
        "(hidden f32|bf16|f16[t, h], weight as hidden [v, h], targets i64[t], scales f32[t] or None, by which each "
        "token's loss counts in the gradients, at most 1 in size, *, ignore_index: int, chunk: int, tokens whose "
        "logits exist at a time, hidden_gradient: bool, weight_gradient: bool) -> (losses f32[t], hidden_gradient "
        "[t, h] or None, weight_gradient [v, h] or None); gradients are as hidden, but f32 where it is f16, whose "
        "range a sum over tokens may leave"
    ),
    consumes=(),
    rounding=(
        "terms of products are added in fp32; logits, and the scaled differences between softmax and target that go "
        "back, are rounded to the dtype of hidden, these perhaps times a power of two, or stay wider; softmax in fp32; "
        "the gradient of weight is added up over chunks in fp32 and rounded once"
    ),
    tolerance=(
        "with e the eps of the dtype of hidden and f that of fp32: of a logit e of it and (h + 4) f of the sum of the "
        "sizes of its terms; of a loss what that does to log-sum-exp and to the target's logit, and (16 + v / 16) f of "
        "the largest of 1, the logits and the loss; of a difference what both do to the softmax, e of it and 2^-38; of "
        "a gradient what that does to its sum, (v + 4) f or (t + 4) f of the sum of the sizes of its terms, and e of "
        "it. A token with ignore_index has loss 0 and hidden_gradient 0, whatever its logits; of one whose target is "
        "outside the vocabulary both are nan, and so is some weight_gradient; of one with a logit that is not finite "
        "neither is"
    ),
)


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
    """Each token's -log softmax(hidden weight^T)[target], and the gradients of the *sum* of `scales` times these.

    The gradients are made on the way, while a chunk's logits are there; a mean's are a multiple of them. So nothing is
    computed twice, and backward needs neither logits nor weight.
    """
    tokens, size = hidden.shape[0], weight.shape[0]
    kept = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
    losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
    back = torch.empty_like(hidden, dtype=kept) if hidden_gradient else None
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if weight_gradient else None
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
        if back is None and total is None:
            continue
        differences = logs.exp().scatter_add(1, place, torch.where(known, -1.0, torch.nan)[:, None])
        if scales is not None:
            differences = differences * scales[part, None]
        differences = torch.where(counted[:, None], differences, 0.0)
        if back is not None:
            back[part] = (differences @ matrix).to(kept)
        if total is not None:
            total += differences.mT @ rows
    return losses, back, None if total is None else total.to(kept)
