"""Memory by the page: private to this process, or open to the other ranks of this host.

Shared pages are an anonymous memory file that the owner maps and its peers reach through the owner's list
of open files; nothing has a name in a file system, so nothing is left behind when a rank dies. Where the
system forbids that, an ordinary file takes its place, and is unlinked as soon as every peer has mapped it.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

PAGE: Final = mmap.PAGESIZE
PATH_BYTES: Final = 128  # room for a path in a control page, its closing zero included


class Door(enum.Enum):
    """How peers come to a rank's pages."""

    MEMORY_FILE = "memory file"
    FILE = "unlinked file"


@cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def round_to_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def map_pages(nbytes: int, descriptor: int = -1) -> Tensor:
    """`nbytes` of zeroed private memory, or of the file `descriptor`, as a uint8 tensor of that length.

    The pages are unmapped when the last tensor on them is gone. No descriptor is kept, unlike by
    `mmap.mmap`, so that thousands of mappings need no open files. Raises OSError when they cannot be had.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if descriptor < 0 else mmap.MAP_SHARED
    size = round_to_pages(nbytes)
    address = _library().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {size} bytes fails: {os.strerror(number)}")
    if descriptor < 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        _library().madvise(address, size, mmap.MADV_HUGEPAGE)  # only advice: refusing it costs speed alone
    array = (ctypes.c_ubyte * nbytes).from_address(address)
    unmap = weakref.finalize(array, _library().munmap, address, size)
    unmap.atexit = False  # tensors may outlive us when the interpreter ends, and the system unmaps then
    return torch.frombuffer(array, dtype=torch.uint8)  # keeps the array, and so the mapping, alive


@dataclass
class Pages:
    """Mapped shared pages, of this rank or of a peer."""

    memory: Tensor  # uint8[nbytes]
    path: str  # what a peer opens
    descriptor: int = -1  # the owner's, until sealed
    file: str = ""  # the owner's file to unlink, until sealed

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @property
    def is_open(self) -> bool:
        """Whether peers can still map them."""
        return self.descriptor >= 0

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements that start `offset` bytes into the pages."""
        return self.memory[offset : offset + count * dtype.itemsize].view(dtype)

    def seal(self) -> None:
        """Close the way in once every peer has mapped the pages; they live as long as somebody maps them."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        if self.file:
            os.unlink(self.file)
            self.file = ""


def create_pages(nbytes: int, door: Door, *, commit: bool = True) -> Pages:
    """Zeroed pages that peers may open by `path` until they are sealed; OSError when they cannot be had.

    They are taken from the system now, so that too little memory is an error here and not a crash later; pages
    of a memory file that may never be written need not be: `commit` says so.
    """
    file = ""
    if door is Door.MEMORY_FILE:
        descriptor = os.memfd_create("windlass", os.MFD_CLOEXEC)
    else:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        descriptor, file = tempfile.mkstemp(prefix="windlass-", dir=folder)
    pages = Pages(
        torch.empty(0, dtype=torch.uint8, device="cpu"),
        file or f"/proc/{os.getpid()}/fd/{descriptor}",
        descriptor,
        file,
    )
    try:
        if len(pages.path.encode()) >= PATH_BYTES:
            raise OSError(f"the path {pages.path!r} has more than {PATH_BYTES - 1} bytes")
        os.ftruncate(descriptor, round_to_pages(nbytes))
        if commit or file:
            os.posix_fallocate(descriptor, 0, round_to_pages(nbytes))
        pages.memory = map_pages(nbytes, descriptor)
    except OSError:
        pages.seal()
        raise
    return pages


def open_pages(path: str, nbytes: int) -> Pages:
    """Map a peer's pages; OSError when they cannot be reached or are not that large."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < nbytes:
            raise OSError(f"{path} holds {size} bytes where {nbytes} are wanted")
        return Pages(map_pages(nbytes, descriptor), path)
    finally:
        os.close(descriptor)
