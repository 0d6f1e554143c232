"""Level 0: random numbers of the device, seeded, saved and restored to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_same_bits
from windlass.conformance.requirements import requires

COUNT = 1000
Draw = Callable[[torch.device], Tensor]
DRAWS: dict[str, Draw] = {
    "rand": lambda device: torch.rand(COUNT, device=device),
    "randn": lambda device: torch.randn(COUNT, device=device),
    "randint": lambda device: torch.randint(0, 1_000_000, (COUNT,), device=device),
    "dropout": lambda device: torch.nn.functional.dropout(torch.ones(COUNT, device=device), 0.5),
    "uniform_": lambda device: torch.zeros(COUNT, device=device).uniform_(),
    "bernoulli": lambda device: torch.bernoulli(torch.full((COUNT,), 0.5, device=device)),
}
EVERY_DRAW = pytest.mark.parametrize("draw", DRAWS)


def draw_on_device(accelerator: Accelerator, draw: str = "rand") -> Tensor:
    return accelerator.to_host(DRAWS[draw](accelerator.device))


def draw_sequence(accelerator: Accelerator) -> list[Tensor]:
    """Draws of every kind, one after another."""
    return [draw_on_device(accelerator, draw) for draw in (*DRAWS, *reversed(DRAWS))]


def assert_same_sequence(found: list[Tensor], wanted: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(one, other, f"draw {number}")


@requires(level=0, must="After the same seed the device draws the same numbers, whatever was drawn before.")
@EVERY_DRAW
def test_seed_of_device(accelerator: Accelerator, draw: str) -> None:
    accelerator.seed(7)
    first, second = draw_on_device(accelerator, draw), draw_on_device(accelerator, draw)
    assert not torch.equal(first, second), "a random stream moves on"
    draw_sequence(accelerator)
    accelerator.seed(7)
    assert_same_bits(draw_on_device(accelerator, draw), first, "the first draw")
    assert_same_bits(draw_on_device(accelerator, draw), second, "the second draw")


@requires(level=0, must="After the same seed the host draws the same numbers, too.")
@pytest.mark.parametrize("draw", ["rand", "randn", "randint"])
def test_seed_of_host(accelerator: Accelerator, draw: str) -> None:
    host = torch.device("cpu")
    accelerator.seed(7)
    first = DRAWS[draw](host)
    torch.rand(13)
    accelerator.seed(8)
    other = DRAWS[draw](host)
    accelerator.seed(7)
    assert_same_bits(DRAWS[draw](host), first, "the draw of the host")
    assert not torch.equal(first, other), "another seed gives other numbers"


@requires(level=0, must="Different seeds give different numbers.")
def test_seeds_differ(accelerator: Accelerator) -> None:
    drawn = []
    for seed in (0, 1, 2, 2**31, 2**31 + 1):
        accelerator.seed(seed)
        drawn.append(tuple(draw_on_device(accelerator).tolist()))
    assert len(set(drawn)) == len(drawn)


@requires(level=0, must="The random state is a tensor of bytes on the host.")
def test_state_is_bytes(accelerator: Accelerator) -> None:
    state = accelerator.rng_state()
    assert state.dtype == torch.uint8
    assert state.device.type == "cpu"
    assert state.numel() > 0


@requires(level=0, must="After a state is restored, the draws that followed it follow again, to the bit.")
def test_state_is_restored(accelerator: Accelerator) -> None:
    accelerator.seed(3)
    draw_sequence(accelerator)  # from the middle of a stream, too
    state = accelerator.rng_state()
    wanted = draw_sequence(accelerator)
    accelerator.set_rng_state(state)
    assert_same_sequence(draw_sequence(accelerator), wanted)
    accelerator.seed(4)
    assert not torch.equal(draw_on_device(accelerator), wanted[0])
    accelerator.set_rng_state(state)
    assert_same_sequence(draw_sequence(accelerator), wanted)


@requires(level=0, must="Asking for the random state changes no draw.")
def test_asking_for_state_draws_nothing(accelerator: Accelerator) -> None:
    accelerator.seed(5)
    wanted = draw_sequence(accelerator)
    accelerator.seed(5)
    found = []
    for draw in (*DRAWS, *reversed(DRAWS)):
        accelerator.rng_state()
        found.append(draw_on_device(accelerator, draw))
    assert_same_sequence(found, wanted)


@requires(level=0, must="A random state is a copy: later draws do not change it, nor does restoring it.")
def test_state_is_a_copy(accelerator: Accelerator) -> None:
    accelerator.seed(11)
    state = accelerator.rng_state()
    kept = state.clone()
    wanted = draw_on_device(accelerator)
    assert_same_bits(state, kept, "the state after a draw")
    for _ in range(2):
        accelerator.set_rng_state(state)
        assert_same_bits(draw_on_device(accelerator), wanted, "the draw after restoring")
        assert_same_bits(state, kept, "the state after restoring and a draw")
    later = accelerator.rng_state()
    assert not torch.equal(later, kept), "a state says where the stream is"
    state.zero_()
    accelerator.set_rng_state(kept)
    assert_same_bits(draw_on_device(accelerator), wanted, "the draw after restoring a clone")


@requires(level=0, must="A random state can be written to a file and restored from its bytes.")
def test_state_survives_a_file(accelerator: Accelerator) -> None:
    accelerator.seed(12)
    draw_on_device(accelerator)
    written = accelerator.to_bytes(accelerator.rng_state())
    wanted = draw_sequence(accelerator)
    accelerator.set_rng_state(torch.frombuffer(bytearray(written), dtype=torch.uint8))
    assert_same_sequence(draw_sequence(accelerator), wanted)
