"""The kernels as differentiable functions: values and gradients of plain torch in float64, whatever calls them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import windlass
from windlass import functional
from windlass.accelerator.interface import Accelerator

UNITS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPE = pytest.mark.parametrize("dtype", list(UNITS), ids=str)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    opened = windlass.open_accelerator("cpu")
    yield opened
    opened.close()


def make_layer(
    *shape: int, vocabulary: int = 50, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets; every seventh target is ignored."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, shape[-1], generator=random) / 4).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, shape[:-1], generator=random)
    targets.view(-1)[3::7] = -100
    return hidden, weight, targets


def in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", ignore: int = -100) -> Tensor:
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction, ignore_index=ignore)
    return loss.view(targets.shape) if reduction == "none" else loss


def assert_near(found: Tensor | None, wanted: Tensor | None, unit: float) -> None:
    """Within 8 units of the largest element, or of each where it is larger."""
    assert found is not None
    assert wanted is not None
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() if wanted.numel() else torch.tensor(0.0)
    limit = 8 * unit * (wanted.abs().max() if wanted.numel() else torch.tensor(0.0))
    assert error <= limit, f"off by {float(error):.3g} where {float(limit):.3g} is allowed"


@DTYPE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_cross_entropy_is_that_of_torch(
    accelerator: Accelerator, dtype: torch.dtype, reduction: functional.Reduction, chunk: int | None
) -> None:
    hidden, weight, targets = make_layer(3, 8, 24, dtype=dtype)
    wide = in_double(hidden), in_double(weight)
    wanted = plain_loss(*wide, targets, reduction)
    loss = functional.linear_cross_entropy(hidden, weight, targets, accelerator, reduction=reduction, chunk=chunk)
    assert loss.dtype is torch.float32
    assert_near(loss, wanted, UNITS[torch.float32])
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5))
    wanted.backward(upstream.double())
    loss.backward(upstream)
    for found, exact in zip((hidden, weight), wide, strict=True):
        assert found.grad is not None
        assert found.grad.dtype is dtype
        assert_near(found.grad, exact.grad, UNITS[dtype])


@pytest.mark.parametrize("ignore", [0, 49, -1])
def test_cross_entropy_ignores_what_it_is_told_to(accelerator: Accelerator, ignore: int) -> None:
    hidden, weight, targets = make_layer(40, 12)
    targets[targets == -100] = ignore
    wide = in_double(hidden), in_double(weight)
    loss = functional.linear_cross_entropy(hidden, weight, targets, accelerator, ignore_index=ignore)
    wanted = plain_loss(*wide, targets, ignore=ignore)
    assert_near(loss, wanted, UNITS[torch.float32])
    loss.backward()
    wanted.backward()
    assert_near(weight.grad, wide[1].grad, UNITS[torch.float32])
    assert hidden.grad is not None
    assert not hidden.grad[targets == ignore].any()


def test_cross_entropy_of_nothing(accelerator: Accelerator) -> None:
    hidden, weight, targets = make_layer(4, 6)
    nothing = torch.full_like(targets, -100)
    for mean in (
        functional.linear_cross_entropy(hidden, weight, nothing, accelerator),
        F.cross_entropy(F.linear(hidden, weight), nothing),
    ):
        assert mean.isnan()
        assert not any(one.any() for one in torch.autograd.grad(mean, (hidden, weight)))
    total = functional.linear_cross_entropy(hidden, weight, nothing, accelerator, reduction="sum")
    total.backward()
    assert total == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    none_at_all = functional.linear_cross_entropy(hidden[:0], weight, targets[:0], accelerator, reduction="sum")
    assert none_at_all == 0


def test_an_unknown_target_makes_the_loss_nan(accelerator: Accelerator) -> None:
    hidden, weight, targets = make_layer(4, 6)
    targets[2] = 50
    losses = functional.linear_cross_entropy(hidden, weight, targets, accelerator, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_has_no_gradient(accelerator: Accelerator, reduction: functional.Reduction, frozen: str) -> None:
    hidden, weight, targets = make_layer(9, 5)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    loss = functional.linear_cross_entropy(hidden, weight, targets, accelerator, reduction=reduction).sum()
    loss.backward()
    assert [hidden.grad is None, weight.grad is None] == [frozen == "hidden", frozen == "weight"]


def test_without_gradients_there_is_no_graph(accelerator: Accelerator) -> None:
    layer = make_layer(9, 5)
    gain = nn.Parameter(torch.ones(5))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = functional.linear_cross_entropy(*layer, accelerator)
            normed = functional.rms_norm(layer[0], gain, accelerator)
        assert not loss.requires_grad
        assert not normed.requires_grad


def test_a_kept_graph_can_be_gone_through_twice(accelerator: Accelerator) -> None:
    hidden, weight, targets = make_layer(9, 5, dtype=torch.bfloat16)
    loss = functional.linear_cross_entropy(hidden, weight, targets, accelerator, chunk=4) * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_under_autocast_it_casts_as_linear_does(accelerator: Accelerator) -> None:
    hidden, weight, targets = make_layer(3, 8, 24)
    others = [one.detach().clone().requires_grad_() for one in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.linear_cross_entropy(hidden, weight, targets, accelerator)
        plain = F.cross_entropy(F.linear(*others).flatten(0, 1).float(), targets.flatten())
    loss.backward()
    plain.backward()
    assert loss.dtype is torch.float32
    assert_near(loss, plain.double(), 2.0**-9)
    for one, other in zip((hidden, weight), others, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype is torch.float32
        assert_near(one.grad, other.grad.double(), UNITS[torch.bfloat16])


def test_fp16_neither_underflows_nor_overflows(accelerator: Accelerator) -> None:
    """A large vocabulary makes a softmax of numbers that fp16 does not have, and many tokens a sum that it does not."""
    hidden, weight, targets = make_layer(2048, 16, vocabulary=4000, dtype=torch.float16, seed=3)
    targets.fill_(7)
    with torch.no_grad():
        hidden.fill_(60.0)  # so that the sum of the gradients of row 7 is beyond 65504
        weight.mul_(2.0**-8)
    wide = in_double(hidden), in_double(weight)
    scale = 2.0**10
    (functional.linear_cross_entropy(hidden, weight, targets, accelerator, chunk=512) * scale).backward()
    (plain_loss(*wide, targets) * scale).backward()
    for found, exact in zip((hidden, weight), wide, strict=True):
        assert found.grad is not None
        assert exact.grad is not None
        assert found.grad.isfinite().all()
        error = (found.grad.double() - exact.grad).abs()
        assert (error <= 4 * UNITS[torch.float16] * exact.grad.abs() + 2.0**-24).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "got reduction 'median', wanted 'mean', 'sum' or 'none'"),
        ({"targets": torch.zeros(9)}, r"got targets of torch.float32\[9\]"),
        ({"targets": torch.zeros(8, dtype=torch.int64)}, r"wanted integers of shape \[9\]"),
        ({"weight": torch.zeros(50, 5, dtype=torch.bfloat16)}, "wanted one dtype of float32, bfloat16 and float16"),
        ({"weight": torch.zeros(50, 6)}, r"wanted one dtype .* and weight as \[vocabulary, size of hidden\]"),
        ({"hidden": torch.zeros(9, 5, dtype=torch.float64)}, "cast them, or use torch.autocast"),
        ({"hidden": torch.zeros(9, 5, device="meta")}, "got hidden on meta, wanted it on cpu"),
        ({"weight": torch.zeros(50, 5, device="meta")}, "got weight on meta, wanted it on cpu"),
        ({"targets": torch.zeros(9, dtype=torch.int64, device="meta")}, "got targets on meta, wanted it on cpu"),
    ],
)
def test_cross_entropy_says_what_it_cannot_take(
    accelerator: Accelerator, change: dict[str, object], message: str
) -> None:
    hidden, weight, targets = make_layer(9, 5)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        functional.linear_cross_entropy(accelerator=accelerator, **arguments)  # type: ignore[arg-type]


@DTYPE
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 4, 100), (0, 6)], ids=str)
@pytest.mark.parametrize(
    ("centred", "parts"), [(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)],
    ids=["layer", "layer weight", "layer weight bias", "rms", "rms weight"],
)  # fmt: skip
def test_norms_are_those_of_torch(
    accelerator: Accelerator, dtype: torch.dtype, shape: tuple[int, ...], parts: int, centred: bool
) -> None:
    random = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=random) * 3 + 1).to(dtype).requires_grad_()
    vectors = [torch.randn(shape[-1:], generator=random).to(dtype).requires_grad_() for _ in range(parts)]
    wide = [in_double(one) for one in (x, *vectors)]
    weight, bias = [*vectors, None, None][:2]
    exact, wide_weight, wide_bias = [*wide, None, None][:3]
    assert exact is not None
    if centred:
        found = functional.layer_norm(x, weight, bias, accelerator, 1e-3)
        wanted = F.layer_norm(exact, shape[-1:], wide_weight, wide_bias, eps=1e-3)
    else:
        found = functional.rms_norm(x, weight, accelerator, 1e-3)
        wanted = F.rms_norm(exact, shape[-1:], wide_weight, eps=1e-3)
    assert found.dtype is dtype
    assert_near(found, wanted, UNITS[dtype])
    upstream = torch.randn(shape, generator=random).to(dtype)
    found.backward(upstream)
    wanted.backward(upstream.double())
    for one, other in zip((x, *vectors), wide, strict=True):
        assert_near(one.grad, other.grad, UNITS[dtype])


def test_a_norm_keeps_the_dtype_of_its_input(accelerator: Accelerator) -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
    with torch.autocast("cpu", torch.bfloat16):
        results = [functional.layer_norm(x, weight, bias, accelerator), functional.rms_norm(x, weight, accelerator)]
    assert [one.dtype for one in results] == [torch.bfloat16] * 2
    (results[0].sum() + results[1].sum()).backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def test_norms_say_what_they_cannot_take(accelerator: Accelerator) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"rms_norm got x as torch.float64\[4, 8\], wanted float32"):
        functional.rms_norm(x.double(), None, accelerator)
    with pytest.raises(ValueError, match=r"layer_norm got x of shape \[4, 8\] and a weight or bias of \[4\]"):
        functional.layer_norm(x, None, torch.ones(4), accelerator)
    with pytest.raises(ValueError, match="pass the accelerator that holds the model"):
        functional.rms_norm(x.to("meta"), None, accelerator)


class OwnNorm(nn.LayerNorm):
    """Not the norm that its name says."""

    def forward(self, input: Tensor) -> Tensor:
        return input + 1


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.RMSNorm(8), OwnNorm(8), nn.Sequential(nn.LayerNorm(8, bias=False)),
        nn.LayerNorm((5, 8)), nn.RMSNorm(8, elementwise_affine=False), nn.LayerNorm(8, elementwise_affine=False),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_use_kernels_changes_what_runs_and_nothing_else(accelerator: Accelerator) -> None:
    model, plain = make_model(), make_model()
    assert functional.use_kernels(model, accelerator) == ["1", "2", "4.0", "6", "7"]
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 5, 6)
    found, wanted = model(x), plain(x)
    assert_near(found, wanted.double(), UNITS[torch.float32])
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    wanted.backward(upstream)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is None:  # of the norm that is none
            continue
        assert_near(one.grad, other.grad.double(), 4 * UNITS[torch.float32])
    calls = {name: tally.calls for (name, _), tally in accelerator.counters.kernels.items()}
    assert calls == {"layer_norm": 3, "layer_norm_backward": 3, "rms_norm": 2, "rms_norm_backward": 2}
    assert functional.use_kernels(model, accelerator) == []


def test_copies_and_pickles_are_plain(accelerator: Accelerator) -> None:
    model = make_model()
    x = torch.randn(3, 5, 6)
    wanted = model(x)
    functional.use_kernels(model, accelerator)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is nn.LayerNorm
        assert type(other[2]) is nn.RMSNorm
        assert torch.equal(other(x), wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, where graphs break
def test_a_compiled_model_may_use_kernels(accelerator: Accelerator) -> None:
    model = make_model()
    x = torch.randn(3, 5, 6)
    wanted = model(x)
    functional.use_kernels(model, accelerator)
    compiled = torch.compile(model, backend="eager")
    found = compiled(x)
    assert_near(found, wanted.double(), UNITS[torch.float32])
    found.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name[0] != "3")
