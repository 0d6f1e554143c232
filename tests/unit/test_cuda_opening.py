"""What is settled when a GPU is opened: that each rank has one of its own, how calls are agreed on, which dtypes are
fast and which kernels there are."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_plugins import raises_sentence
from pretend_driver import PretendGpu, make_driver
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable
from windlass.backends.cuda import device
from windlass.backends.cuda.device import choose_agreement, choose_matmul_dtypes, load_kernels
from windlass.backends.cuda.own_device import check_own_devices, check_ranks, describe_own_device
from windlass.backends.generic.captures import CapturedFunction
from windlass.backends.generic.device import GenericAccelerator, open_device
from windlass.backends.generic.host_memory import HostAllocator


def test_what_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `open_cuda`, with the host in place of the GPU."""
    given: dict[str, Any] = {}

    def open_host(device_type: str, index: int, **options: Any) -> GenericAccelerator:
        given.update(options, device_type=device_type, index=index)
        return open_device("cpu", index, **{key: options[key] for key in ("name", "accelerator_class", "kernels")})

    monkeypatch.setattr(device, "Driver", lambda: make_driver(PretendGpu(), PretendGpu()))
    monkeypatch.setattr(device, "open_device", open_host)
    monkeypatch.setattr(device, "make_host_allocator", lambda driver, index: (HostAllocator(), "the only node"))
    monkeypatch.setattr(device, "load_kernels", lambda: ((), "reference, because"))
    module = torch.get_device_module("cuda")
    monkeypatch.setattr(module, "set_device", lambda index: None)
    monkeypatch.setattr(module, "init", lambda: None)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    with contextlib.closing(device.open_cuda(0)) as accelerator:
        assert accelerator.name == "cuda:0"
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
        assert (given["device_type"], given["index"], given["process_group"]) == ("cuda", 0, "nccl")
        assert (given["agreement"], given["matmul_dtypes"]) == ("first use", ("float32", "bfloat16", "float16"))
        assert "shared_device" not in given  # each rank has its own
        facts = accelerator.facts
        assert (facts["compute_capability"], facts["pci_address"]) == ("9.0", "0000:9b:00.0")
        assert (facts["kernels"], facts["host_memory_lies"]) == ("reference, because", "the only node")
        assert isinstance(accelerator.capture(list), CapturedFunction)


def rows(*owned: tuple[str, str]) -> list[str]:
    return [json.dumps([host, identity, f"0000:0{identity}:00.0"]) for host, identity in owned]


def test_more_ranks_than_gpus() -> None:
    environment = Environment(local_rank=0, local_num_ranks=4, num_ranks=4)
    with raises_sentence(
        BackendUnusable,
        "cuda:0 cannot be opened: there are 4 ranks on this host and 2 GPUs, and each needs its own; start 2 ranks "
        "here",
    ):
        check_ranks("cuda:0", environment, 2)
    check_ranks("cuda:0", environment, 4)
    check_ranks("cuda:0", environment, 1)  # a launcher may show each rank its own


def test_each_rank_has_its_own() -> None:
    check_own_devices("cuda:0", rows(("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")))


def test_two_ranks_with_one_gpu_are_named_on_every_rank() -> None:
    with raises_sentence(
        BackendUnusable,
        "cuda:0 cannot be opened: ranks 1 and 3 have the same GPU at 0000:01:00.0, for there are 3 ranks on their host "
        "and 1 GPU; start one rank for each GPU, or see CUDA_VISIBLE_DEVICES",
    ):
        check_own_devices("cuda:0", rows(("b", "1"), ("a", "1"), ("b", "2"), ("a", "1"), ("a", "1")))


def test_what_ranks_tell_each_other() -> None:
    driver = make_driver(PretendGpu(), PretendGpu(identity=b"another one here"))
    told = [describe_own_device(driver, index) for index in (0, 1)]
    check_own_devices("cuda:0", told)
    assert all(len(row) < 2000 for row in told)
    with pytest.raises(BackendUnusable, match=r"at 0000:9b:00\.0, for there are 2 ranks on their host and 1 GPU;"):
        check_own_devices("cuda:0", [told[1], told[1]])


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((10, 0), ("float32", "bfloat16", "float16")),
        ((9, 0), ("float32", "bfloat16", "float16")),
        ((8, 0), ("float32", "bfloat16", "float16")),
        ((7, 5), ("float32", "float16")),
        ((7, 0), ("float32", "float16")),
        ((6, 1), ("float32",)),
    ],
)
def test_fast_dtypes(capability: tuple[int, int], dtypes: tuple[str, ...]) -> None:
    assert choose_matmul_dtypes(capability) == dtypes


def test_every_call_is_agreed_on_when_mistakes_are_looked_for() -> None:
    assert choose_agreement(Environment()) == "first use"
    assert choose_agreement(Environment(debug=True)) == "always"


def test_without_triton_the_reference_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", None)
    with caplog.at_level(logging.WARNING, "windlass"):
        kernels, words = load_kernels()
    assert tuple(kernels) == ()
    assert words.startswith("reference, because Triton cannot be used: ")
    assert "install triton and a C compiler" in caplog.text


def test_without_the_drivers_library_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asserts that it finds it."""

    class Active:
        def get_current_target(self) -> None:
            raise AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up")

    driver = SimpleNamespace(driver=SimpleNamespace(active=Active()))
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", driver)
    kernels, words = load_kernels()
    assert tuple(kernels) == ()
    assert words == "reference, because Triton cannot be used: AssertionError: libcuda.so cannot found!"
