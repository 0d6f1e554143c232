"""A base for backends of devices that PyTorch itself knows: memory, lanes, collectives, random numbers.

It is no backend: it has no hooks and no name. `windlass.backends.generic.device.open_device` gives an accelerator
that a backend opens under its own name, after changing what it does better.
"""
