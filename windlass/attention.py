"""Scaled dot-product attention that tells a probe the largest logit of each head, for QK-clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from windlass.core.qk_probe import QKProbe

LOGITS_AT_A_TIME = 2**24
"""Elements of the logits that exist at a time, about, while the largest are looked for."""
QUERIES_AT_A_TIME = 128
"""Of each head, then: few, so that with a causal mask half of the products are spared, and enough for full speed."""


def attention(
    query: Tensor,  # [..., heads, queries, size]
    key: Tensor,  # [..., key heads, keys, size]; as many key heads, or fewer, that divide heads
    value: Tensor,  # [..., key heads, keys, size of values]
    probe: QKProbe | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,  # bool, broadcastable to [..., heads, queries, keys]: where it is true they meet
    scale: float | None = None,  # None: 1 / sqrt(size)
    dropout: float = 0.0,
) -> Tensor:  # [..., heads, queries, size of values]
    """torch's scaled_dot_product_attention, and nothing but that unless `muon.qk_clip` is on.

    With it, in passes that may have a backward, the largest logit q.k * scale of each head goes to `probe`: one more
    product of queries and keys without gradients, in chunks, in the dtype of the attention (fp32 for fp16, which has
    not the range). Checkpointing that calls this twice finds the same maxima twice.
    """
    if mask is not None and mask.dtype is not torch.bool:
        raise ValueError(
            f"attention got a mask of {mask.dtype}, wanted bool, true where a query meets a key; add other terms in an "
            "attention of your own, and tell probe.observe the largest logits"
        )
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    if probe is not None and probe.listens and output.requires_grad:
        _observe(probe, output, query, key, causal, mask, scale)
    return output


@_disable_dynamo
def _observe(
    probe: QKProbe, output: Tensor, query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> None:
    if (query.shape[-3], key.shape[-3]) != (probe.heads, probe.key_heads):
        raise ValueError(
            f"attention got queries of {query.shape[-3]} heads and keys of {key.shape[-3]} for a probe of "
            f"{probe.heads} and {probe.key_heads}; give tensors as [..., heads, length, size], and the probe the "
            "numbers of the module"
        )
    if query.numel() and key.numel():
        probe.observe(find_largest_logits(query, key, causal=causal, mask=mask, scale=scale), output)


@torch.no_grad()
def find_largest_logits(
    query: Tensor,  # [..., heads, queries, size]
    key: Tensor,  # [..., key heads, keys, size]
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    at_a_time: int = LOGITS_AT_A_TIME,
    rows: int = QUERIES_AT_A_TIME,
) -> Tensor:  # [heads] fp32
    """The largest logit q.k * scale of each head where queries meet keys; -inf where none do."""
    if query.dtype is torch.float16:
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False):  # it would round products to its dtype again
        return _find_largest(query, key, causal, mask, scale, at_a_time, rows)


def _find_largest(
    query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, scale: float | None, at_a_time: int, rows: int
) -> Tensor:
    heads, queries, size = query.shape[-3:]
    keys, per_key = key.shape[-2], heads // key.shape[-3]
    grouped = query.reshape(-1, per_key, queries, size)  # a key head of a sample, and the query heads that read it
    turned = key.reshape(-1, keys, size).transpose(-1, -2)
    if mask is not None:
        mask = mask.expand(*query.shape[:-1], keys).reshape(-1, per_key, queries, keys)
    factor = size**-0.5 if scale is None else scale
    together = max(1, at_a_time // (per_key * min(rows, queries) * keys))
    largest = []
    for first in range(0, queries, rows):
        stop = min(first + rows, queries)
        met = min(stop, keys) if causal else keys  # query i meets the keys up to i
        found = []
        for begin in range(0, len(grouped), together):
            part = slice(begin, begin + together)
            own = (grouped[part, :, first:stop] * factor).flatten(1, 2)
            logits = (own @ turned[part, :, :met]).unflatten(1, (per_key, stop - first))
            if mask is not None:
                logits = logits.masked_fill(~mask[part, :, first:stop, :met], -torch.inf)
            if causal and first + 1 < met:
                later = torch.ones(stop - first, met - first, dtype=torch.bool, device=logits.device).triu(1)
                logits[..., first:].masked_fill_(later, -torch.inf)
            found.append(logits.amax((2, 3)))
        largest.append(torch.cat(found))
    return torch.stack(largest).amax(0).view(-1, heads).amax(0).to(torch.float32)
