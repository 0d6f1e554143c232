import torch

from windlass.accelerator import reference


def scale_cast(destination, source, scale):
    """destination = cast(scale * source), exactly as the reference rounds it."""
    if source.dtype is destination.dtype is torch.float32:
        return torch.mul(source, scale, out=destination)
    return reference.scale_cast(destination, source, scale)
