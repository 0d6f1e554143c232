"""The systems that train, each as a function that makes one step: plain PyTorch in three precisions, and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import windlass
from gpu_parts.context import Context
from gpu_parts.gpt import model_shape
from windlass.models import GPT

_LEARNING_RATE: Final = 3e-4
_BETAS: Final = (0.9, 0.95)
_EPSILON: Final = 1e-8
_DECAY: Final = 0.1
_LARGEST_NORM: Final = 1.0

Step = Callable[[], Tensor]
"""Forward, backward and update with one batch; the loss, on the device."""


class KernelLossGPT(GPT):
    """The same model, whose loss comes from windlass.functional, so that its logits never exist together."""

    accelerator: Any

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        from windlass import functional

        assert targets is not None
        x = self.token_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return functional.linear_cross_entropy(self.norm(x), self.head.weight, targets, self.accelerator)


def build(context: Context, model_type: type[GPT] = GPT) -> GPT:
    """The model on the device, with the same first weights every time."""
    torch.manual_seed(0)
    with torch.device(context.device):
        return model_type(model_shape(context).shape)


def batch(context: Context, rows: int) -> tuple[Tensor, Tensor]:
    """Ids and next ids, the same in every step, so that the loss falls and can be compared."""
    shape = model_shape(context).shape
    ids = torch.randint(shape.vocabulary, (rows, shape.sequence_length + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(context.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def torch_adamw(parameters: Sequence[Tensor]) -> torch.optim.AdamW:
    """PyTorch's fastest."""
    return torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=_BETAS, eps=_EPSILON, weight_decay=_DECAY, fused=True)


def plain_bf16(context: Context, rows: int) -> Step:
    """bf16 weights, gradients and moments, and no fp32 master: the least memory, and another training."""
    model = build(context).to(torch.bfloat16)
    return _plain_step(model, batch(context, rows), torch_adamw(list(model.parameters())))


def plain_autocast(context: Context, rows: int) -> Step:
    """fp32 weights under autocast: every forward pass casts them."""
    model = build(context)
    amp = partial(torch.autocast, context.device.type, torch.bfloat16)
    return _plain_step(model, batch(context, rows), torch_adamw(list(model.parameters())), amp)


def plain_masters(context: Context, rows: int) -> Step:
    """bf16 weights with fp32 masters kept by hand: gradients are copied to fp32, masters are updated, and copied back.
    It is what windlass does with `bf16.enabled`."""
    model = build(context)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.to(torch.bfloat16)
    parameters = list(model.parameters())
    wide = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, wide, strict=True):
        master.grad = gradient
    optimizer = torch_adamw(masters)
    ids, targets = batch(context, rows)

    def step() -> Tensor:
        loss: Tensor = model(ids, targets)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(wide, [one.grad for one in parameters if one.grad is not None])
        torch.nn.utils.clip_grad_norm_(masters, _LARGEST_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([one.detach() for one in parameters], masters)
        for one in parameters:
            one.grad = None
        return loss.detach()

    return step


def _plain_step(
    model: GPT, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, amp: Callable[[], Any] | None = None
) -> Step:
    parameters = list(model.parameters())

    def step() -> Tensor:
        if amp is None:
            loss: Tensor = model(*data)
        else:
            with amp():
                loss = model(*data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def configuration(rows: int, **more: Any) -> dict[str, Any]:
    """In the keys that DeepSpeed and windlass share."""
    parameters = {"lr": _LEARNING_RATE, "betas": list(_BETAS), "eps": _EPSILON, "weight_decay": _DECAY}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": _LARGEST_NORM,
        "optimizer": {"type": "AdamW", "params": parameters},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
        **more,
    }


def engine_step(context: Context, engine: Any, rows: int) -> Step:
    """A step of an engine in the way of DeepSpeed, which windlass shares."""
    ids, targets = batch(context, rows)

    def step() -> Tensor:
        loss: Tensor = engine(ids, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


@contextmanager
def windlass_engine(
    context: Context, rows: int, *, capture: bool = False, norms: bool = False, loss: bool = False
) -> Iterator[windlass.Engine]:
    """An engine at stage 0, closed at the end."""
    model = build(context, KernelLossGPT if loss else GPT)
    if isinstance(model, KernelLossGPT):
        model.accelerator = context.accelerator
    if norms:
        from windlass import functional

        functional.use_kernels(model, context.accelerator)
    more = {"capture_update": True} if capture else {}
    engine = windlass.initialize(model, configuration(rows, **more), accelerator=context.accelerator)
    try:
        yield engine
    finally:
        engine.close()
