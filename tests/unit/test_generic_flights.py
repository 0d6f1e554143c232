"""Collectives under way on streams: who is lost or late is named with the call, and nobody is blamed for slow work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fake_plugins import raises_sentence
from windlass.accelerator.errors import CollectiveTimeout, PeerLost
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu.peers import Peer, describe_self
from windlass.backends.cpu.transport import Call
from windlass.backends.generic.flights import DEATH_SECONDS, Flights

WORLD = Group("world", (0, 1), 0)
NORM = Call("all_reduce", "norm", 16, torch.float32, op="sum")
WEIGHTS = Call("all_gather", "weights", 64, torch.float32)
TIMEOUT = 5.0


class Point(Work):
    def __init__(self, reached: bool = False) -> None:
        self.reached = reached

    def wait(self) -> None:
        raise AssertionError("nobody waits here")

    def done(self) -> bool:
        return self.reached


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dead() -> Peer:
    """A process that has ended."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return Peer(1, describe_self(0).host, int(ended.stdout), "0")


@pytest.fixture
def living() -> Peer:
    me = describe_self(1)
    assert me.pid == os.getpid()
    return me


def test_a_dead_peer_is_named_with_the_call_that_waits(clock: Clock, dead: Peer) -> None:
    flights = Flights(WORLD, [dead], TIMEOUT, clock)
    flights.add(NORM, Point(True), Point())
    flights.look()  # what it sent before its end may still be on its way
    clock.now += DEATH_SECONDS
    with raises_sentence(PeerLost, f"rank 1 (pid {dead.pid}) died while rank 0 waited for it in all_reduce 'norm'"):
        flights.look()


def test_a_peer_that_left_after_its_part_was_done_is_no_loss(clock: Clock, dead: Peer) -> None:
    flights, ended = Flights(WORLD, [dead], TIMEOUT, clock), Point()
    flights.add(NORM, Point(True), ended)
    flights.look()
    ended.reached = True
    clock.now += DEATH_SECONDS
    flights.look()
    assert flights.oldest is None


def test_a_rank_that_does_not_come_is_given_the_time_from_when_it_was_waited_for(clock: Clock, living: Peer) -> None:
    flights, begun = Flights(WORLD, [living], TIMEOUT, clock), Point()
    flights.add(WEIGHTS, begun, Point())
    clock.now += 10 * TIMEOUT  # the device has not come to the collective: its own work is slow
    flights.look()
    begun.reached = True
    flights.look()
    clock.now += 0.9 * TIMEOUT
    flights.look()
    clock.now += 0.1 * TIMEOUT
    with raises_sentence(
        CollectiveTimeout,
        "a rank did not arrive in all_gather 'weights' within 5 s while rank 0 waited; see what keeps it, or set "
        "WINDLASS_TIMEOUT to more seconds",
    ):
        flights.look()


def test_calls_are_forgotten_in_order_as_they_end(clock: Clock, living: Peer) -> None:
    flights = Flights(WORLD, [living], TIMEOUT, clock)
    first, second = Point(), Point()
    flights.add(NORM, Point(True), first)
    flights.add(WEIGHTS, Point(True), second)
    assert flights.oldest == NORM
    first.reached = True
    assert flights.oldest == WEIGHTS
    flights.look()
    clock.now += 0.9 * TIMEOUT  # counted from when the second was first waited for
    flights.look()
    second.reached = True
    assert flights.oldest is None
