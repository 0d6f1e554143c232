"""The host as a device whose kernels are those of windlass.backends.triton, run by Triton's interpreter.

With it the conformance suite tests the kernels of a GPU without one: `windlass conform --accelerator interpreted
--level 1`. Importing this imports no framework.
"""

from windlass.accelerator import Probe, hookimpl

NAME = "interpreted"


@hookimpl
def windlass_probe():
    from importlib.metadata import version
    from importlib.util import find_spec

    found = find_spec("triton") is not None
    return Probe(
        usable=found,
        reason="" if found else "triton is not installed; pip install triton",
        devices=("the host's processor",) if found else (),
        real_device=False,
        version=f"Triton {version('triton')}, interpreted" if found else "",
        interface_version=(1, 1),
    )


@hookimpl
def windlass_open(name, index):
    if name != NAME:
        return None
    from interpreted_host.device import open_interpreted

    return open_interpreted(index)
