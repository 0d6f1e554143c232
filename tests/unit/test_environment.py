"""The environment is read in one place, and a malformed variable is named."""

from __future__ import annotations

import pytest

from windlass.accelerator.environment import Environment, prefer_variable, read_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_empty_environment_is_a_world_of_one() -> None:
    assert read_environment({}) == Environment(0, 1, 0, 1, "127.0.0.1", 29500, False, 0, 600.0, None, None)


def test_variables_of_torchrun() -> None:
    assert read_environment(TORCHRUN) == Environment(5, 8, 1, 4, "node0", 1234, True, 2)


def test_rank_and_size_alone_mean_one_host() -> None:
    found = read_environment({"RANK": "1", "WORLD_SIZE": "2"})
    assert (found.local_rank, found.local_num_ranks, found.master_address) == (1, 2, "127.0.0.1")


def test_choices_of_the_user() -> None:
    chosen = {"WINDLASS_ACCELERATOR": " cuda:1 ", "WINDLASS_BACKENDS": "cpu, cuda", "WINDLASS_TIMEOUT": "2.5"}
    found = read_environment(chosen)
    assert (found.accelerator, found.backends, found.timeout_seconds) == ("cuda:1", ("cpu", "cuda"), 2.5)
    assert read_environment(dict.fromkeys(chosen, "")) == Environment()


def test_switches_and_the_client_of_a_runtime() -> None:
    found = read_environment({"PJRT_DEVICE": " CPU ", "WINDLASS_DEBUG": "1"})
    assert (found.pjrt_device, found.debug) == ("CPU", True)
    assert read_environment({"PJRT_DEVICE": "", "WINDLASS_DEBUG": "0"}) == Environment()


def test_a_preferred_variable_gives_way_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    prefer_variable("PJRT_DEVICE", "CPU")
    assert read_environment().pjrt_device == "TPU"
    monkeypatch.setenv("PJRT_DEVICE", "")
    prefer_variable("PJRT_DEVICE", "CPU")
    assert read_environment().pjrt_device == "CPU"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"RANK": "8"}, "RANK must be a whole number from 0 to 7, got '8'"),
        ({"RANK": "one"}, "RANK must be a whole number from 0 to 7, got 'one'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1, got '0'"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK must be a whole number from 0 to 3, got '4'"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE must be a whole number from 1 to 8, got '9'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a whole number from 1 to 65535, got '99999'"),
        ({"WINDLASS_TIMEOUT": "0"}, "WINDLASS_TIMEOUT must be a number of seconds above 0, got '0'"),
        ({"WINDLASS_TIMEOUT": "soon"}, "WINDLASS_TIMEOUT must be a number of seconds above 0, got 'soon'"),
        ({"WINDLASS_TIMEOUT": "inf"}, "WINDLASS_TIMEOUT must be a number of seconds above 0, got 'inf'"),
        ({"WINDLASS_DEBUG": "yes"}, "WINDLASS_DEBUG must be 1 or 0, got 'yes'"),
        ({"WINDLASS_BACKENDS": "cpu,,cuda"}, "WINDLASS_BACKENDS must be names separated by commas, got 'cpu,,cuda'"),
    ],
)
def test_malformed_variable_is_named(changed: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        read_environment({**TORCHRUN, **changed})
    assert str(caught.value) == text


@pytest.mark.parametrize(("given", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_a_launcher_is_refused(given: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"{given} is set and {missing} is not"):
        read_environment({given: "1"})
