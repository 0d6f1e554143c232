"""What the workers of qk_clip_workers.py must come to: Muon and QK-clip by hand, one process, double precision."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from qk_clip_workers import (
    DECAY,
    EPS,
    HEADS,
    LENGTH,
    LR,
    MU,
    TAU,
    WIDTH,
    Fused,
    Grouped,
    Latent,
    Net,
    attend_by_hand,
    inputs,
)
from windlass.functional import QKProbe


def orthogonalise(matrix: Tensor) -> Tensor:
    """Jordan's Newton-Schulz iteration, in double precision."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def find_maxima(model: Net, x: Tensor) -> list[Tensor]:
    """The largest logit of each head of each attention, in double precision."""
    found: list[Tensor] = []

    def note(query: Tensor, key: Tensor, value: Tensor, probe: QKProbe) -> Tensor:
        key, value = (one.repeat_interleave(HEADS // one.shape[1], 1) for one in (key, value))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        logits = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
        found.append(logits.detach().amax((0, 2, 3)))
        output: Tensor = logits.softmax(-1) @ value
        return output

    keeps, model.attend = model.attend, note
    model(x)
    model.attend = keeps
    return found


@torch.no_grad()
def clip_by_hand(model: Net, maxima: list[Tensor]) -> list[int]:
    """Kimi K2's rule, head by head, and the one for grouped queries. Returns how many heads each attention clipped."""
    fused, grouped, latent = model.attentions
    assert isinstance(fused, Fused)
    assert isinstance(grouped, Grouped)
    assert isinstance(latent, Latent)
    gammas = [[min(1.0, TAU / float(one)) if one > TAU else 1.0 for one in each] for each in maxima]
    rows, plain, step = WIDTH // HEADS, Latent.PLAIN, Latent.PLAIN + Latent.ROTARY
    for head, gamma in enumerate(gammas[0]):
        for first in (head * rows, WIDTH + head * rows):
            fused.query_key_value.weight[first : first + rows] *= math.sqrt(gamma)
            fused.query_key_value.bias[first : first + rows] *= math.sqrt(gamma)
    for pair in range(2):
        mildest = max(gammas[1][2 * pair : 2 * pair + 2])
        grouped.key.weight[pair * rows : (pair + 1) * rows] *= math.sqrt(mildest)
        for head in (2 * pair, 2 * pair + 1):
            grouped.query.weight[head * rows : (head + 1) * rows] *= gammas[1][head] / math.sqrt(mildest)
            grouped.query.bias[head * rows : (head + 1) * rows] *= gammas[1][head] / math.sqrt(mildest)
    for head, gamma in enumerate(gammas[2]):
        latent.query.weight[head * step : head * step + plain] *= math.sqrt(gamma)
        latent.query.weight[head * step + plain : (head + 1) * step] *= gamma
        latent.key_value.weight[head * 2 * plain : head * 2 * plain + plain] *= math.sqrt(gamma)
    return [sum(gamma < 1 for gamma in each) for each in gammas]


@functools.cache
def train_oracle(steps: int) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The weights, and how many heads were clipped in each step and attention."""
    model = Net(attend_by_hand).double()
    matrices = [one for one in model.parameters() if one.dim() == 2]
    vectors = [one for one in model.parameters() if one.dim() != 2]
    adamw = torch.optim.AdamW(vectors, lr=LR, weight_decay=DECAY, eps=EPS)
    momenta = [torch.zeros_like(one) for one in matrices]
    clipped = []
    for step in range(steps):
        x = inputs(step).double()
        maxima = find_maxima(model, x)
        model.zero_grad()
        (model(x) - torch.linspace(-1, 1, WIDTH).double()).pow(2).mean().backward()
        adamw.step()
        for one, momentum in zip(matrices, momenta, strict=True):
            assert one.grad is not None
            momentum.lerp_(one.grad, 1 - MU)
            direction = orthogonalise(one.grad.lerp(momentum, MU)) * 0.2 * math.sqrt(max(one.shape))
            one.data.mul_(1 - LR * DECAY).sub_(LR * direction)
        clipped.append(clip_by_hand(model, maxima))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, clipped
