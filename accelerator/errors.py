"""The errors that a device, a plugin or a peer can cause; bad input from a user is a plain ValueError."""

from __future__ import annotations


class WindlassError(RuntimeError):
    """Base of everything that a device, a backend or another rank can make fail."""


class Unsupported(WindlassError):
    """The backend does not declare this capability; the message says what to do instead."""


class OutOfMemory(WindlassError):
    """A tier cannot hold an allocation: asked, free, capacity, and what would make room."""


class BackendNotFound(WindlassError):
    """No installed package offers a backend of this name."""


class BackendUnusable(WindlassError):
    """A backend is installed but cannot be loaded or opened here; the original cause is chained."""


class BackendAmbiguous(WindlassError):
    """Several real devices could be meant and nobody chose."""


class InterfaceMismatch(WindlassError):
    """A backend was built for another version of the interface."""


class CollectiveMismatch(WindlassError):
    """Ranks met in a collective with different calls: kind, tag, sizes or dtype."""


class PeerLost(WindlassError):
    """Another rank of the group died or left; the message names it."""


class CollectiveTimeout(WindlassError):
    """Another rank did not arrive in time; the message names it and the collective."""
