"""Nothing in core/ knows what it runs on; accelerator/ and the engine keep the part of that which is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from source_rules import RULES, find_violations

ROOT = Path(__file__).resolve().parents[2]

CORE_RULES = tuple(rule for rule in RULES if rule != "imports a framework at import time")
ENGINE_RULES = tuple(rule for rule in CORE_RULES if rule != "imports beyond the core's reach")
# The interface wraps torch, reads values for the host, and the registry has to name its fallback.
ACCELERATOR_RULES = (
    "imports a backend",
    "imports a vendor module",
    "imports a bare folder name",
    "imports a framework at import time",
    "uses a vendor's attribute",
    "uses a pointer or storage",
    "uses a stream object",
)

PLACES = {
    "core": (ROOT / "core", CORE_RULES),
    "accelerator": (ROOT / "accelerator", ACCELERATOR_RULES),
    "engine": (ROOT / "windlass" / "engine.py", ENGINE_RULES),
}
# The reference kernels are tensor arithmetic. A backend imports them when it is opened; nothing else in accelerator/
# may do so when it is imported, which tests/unit/test_imports.py measures.
EXEMPT = {
    (path.relative_to(ROOT).as_posix(), "imports a framework at import time")
    for path in (ROOT / "accelerator" / "reference").glob("*.py")
}


@pytest.mark.parametrize("place", PLACES)
def test_no_rule_is_broken(place: str) -> None:
    path, rules = PLACES[place]
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    found: list[str] = []
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        held = tuple(rule for rule in rules if (name, rule) not in EXEMPT)
        found += (
            f"{name}:{broken.line}: {broken.rule}: {broken.what}" for broken in find_violations(file.read_text(), held)
        )
    total = len(found)
    print(f"{place}: {len(files)} files, {len(rules)} rules, {total} places that break one")
    assert total == 0, f"{total} places in {place} break a rule of portability:\n" + "\n".join(found)


# For each rule, code that breaks it once, a line each.
BROKEN = {
    "imports a backend": (
        "import windlass.backends.cpu",
        "from windlass.backends import cpu",
        "from windlass import backends",
        "import backends.cpu",
        "def f():\n    from windlass.backends.cpu.memory import Region",
        "importlib.import_module('windlass.backends.cpu')",
    ),
    "imports a vendor module": (
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "import torch.backends.cudnn",
        "from torch.backends import mps",
        "from torch import xpu as x",
        "import torch_xla.core.xla_model",
        "import jax.numpy as jnp",
        "try:\n    import triton\nexcept ImportError:\n    pass",
        "from numba import njit",
        "__import__('triton')",
    ),
    "imports a bare folder name": ("import accelerator", "from core.plan import Plan"),
    "imports beyond the core's reach": (
        "import windlass.engine",
        "from windlass.config import Config",
        "from windlass import engine",
        "import windlass",
        "from windlass.accelerator import registry",
        "from windlass.accelerator.reference import adamw",
        "from . import plan",
        "from .plan import Plan",
        "import numpy as np",
        "import rich",
    ),
    "imports a framework at import time": (
        "import torch",
        "from torch import Tensor",
        "import numpy",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "try:\n    pass\nexcept ImportError:\n    import torch",
        "class Memory:\n    import torch",
        "with x:\n    import jax",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    ),
    "uses a vendor's attribute": (
        "torch.cuda.synchronize()",
        "torch.xpu.empty_cache()",
        "torch.mps",
        "torch.accelerator.current_device_index()",
        "torch.backends.cuda.matmul",
        "x.is_cuda",
        "f(x).is_mps",
        "model.cuda()",
    ),
    "uses a pointer or storage": (
        "x.data_ptr()",
        "x.untyped_storage().resize_(0)",
        "x.storage()",
        "map(T.data_ptr, xs)",
    ),
    "uses a stream object": (
        "x.record_stream(s)",
        "s = torch.Stream()",
        "torch.cuda.Event(enable_timing=True)",
        "from torch import Event",
        "from torch.cuda import Stream",
        "device.current_stream()",
    ),
    "reads a device value on the host": ("x.item()", "x.sum().tolist()", "x.cpu()", "x.detach().numpy()"),
    "names a device": (
        "torch.device('cuda')",
        "x.to('cuda:0')",
        "f(f'cuda:{index}')",
        "backend = 'gloo'",
        "if kind == 'cpu': pass",
        "raise ValueError('this needs NCCL')",
        "d = {'xla': 1}",
        "place = 'cpu_pinned'",
    ),
}

# Code that looks like the above and is allowed.
SOUND = (
    '"""Runs on cuda and cpu."""\ndef f():\n    """As on xla."""\nclass C:\n    x: int\n    """gloo"""',
    "import math\nfrom collections.abc import Sequence\nfrom torch import Tensor, nn\nimport torch.nn.functional",
    "from windlass.accelerator.interface import Event, Work\nfrom windlass.accelerator import errors, interface",
    "from windlass.core.plan import Plan\nfrom windlass.core import plan",
    "accelerator.read_host(values)\nd.items()\nx.to(torch.float32)\nself.storage = storage",
    "event = accelerator.streams.record()\nEvent()\nself.accelerator.memory",
    "x = 'host'\ny = 'occupancy'\nz = f'{name}: {got} against {wanted}'",
)


@pytest.mark.parametrize(("rule", "code"), [(rule, code) for rule, codes in BROKEN.items() for code in codes])
def test_each_rule_fires_on_planted_code(rule: str, code: str) -> None:
    found = find_violations(code, (rule,))
    assert len(found) == 1, f"{code!r} breaks the rule {len(found)} times: {found}"


def test_every_rule_has_planted_code() -> None:
    assert BROKEN.keys() == RULES.keys()


@pytest.mark.parametrize("code", SOUND)
def test_sound_code_breaks_no_rule_of_the_core(code: str) -> None:
    assert find_violations(code, CORE_RULES) == []


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    import torch",
        "if TYPE_CHECKING:\n    import torch",
        "if typing.TYPE_CHECKING:\n    import torch\nelse:\n    x = 1",
        "class C:\n    def f(self):\n        import torch",
        "import pluggy",
    ],
)
def test_late_imports_are_not_at_import_time(code: str) -> None:
    assert find_violations(code, ("imports a framework at import time",)) == []
