"""The host's processor with a faster scale_cast. Importing this imports no framework."""

from windlass.accelerator import Accelerator, Kernel, Probe, hookimpl


class QuickHost(Accelerator):
    """The facets of the host's accelerator under a name of its own."""

    def __init__(self, name, host):
        facets = (host.memory, host.streams, host.collectives, host.kernels)
        super().__init__(name, host.device, *facets, host.capabilities, host.counters, host.facts)
        self._host = host

    def seed(self, seed):
        self._host.seed(seed)

    def rng_state(self):
        return self._host.rng_state()

    def set_rng_state(self, state):
        self._host.set_rng_state(state)


@hookimpl
def windlass_probe():
    return Probe(
        usable=True,
        reason="",
        devices=("the host's processor",),
        real_device=False,
        version="quickhost 0.1.0",
        interface_version=(1, 0),
    )


@hookimpl
def windlass_open(name, index):
    if name != "quick":
        return None
    from windlass.backends.cpu.device import open_cpu

    return QuickHost(f"quick:{index}", open_cpu(index))


@hookimpl
def windlass_kernels(accelerator):
    from quickhost.kernels import scale_cast

    return [Kernel("scale_cast", "one-pass", scale_cast, priority=200)]
