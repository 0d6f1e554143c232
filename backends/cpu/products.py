"""Matrix products as `polar` needs them: into given memory, symmetric ones by one triangle, in any of three dtypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor

from windlass.backends.cpu.transposition import mirror

STRIP: Final = 128  # rows of a strip: fewer are multiplied more slowly, more leave less to be saved
LEAST: Final = 384  # rows of a symmetric product from which on strips pay


class Products(ABC):
    """How two matrices are multiplied, what lies between the products, and in which memory."""

    dtype: torch.dtype  # of all matrices that are given and returned

    @abstractmethod
    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Left [n, k] times right [k, m], terms added in fp32; `out` overlaps neither."""

    @abstractmethod
    def add(self, addend: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        """`beta` times the addend [n, m] plus `alpha` times left [n, k] times right [k, m]."""

    def multiply_symmetric(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """A product [n, n] that is known to be symmetric. `out` is contiguous."""
        rows = len(out)
        if rows < LEAST:
            self.multiply(left, right, out)
            return
        for start in range(0, rows, STRIP):
            part = slice(start, start + STRIP)
            self.multiply(left[part], right[:, start:], out[part, start:])
        mirror(out, STRIP)

    def add_symmetric(self, matrix: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        """`beta` times a symmetric matrix [n, n] plus `alpha` times its square. `out` is contiguous."""
        rows = len(out)
        if rows < LEAST:
            self.add(matrix, matrix, matrix, beta, alpha, out)
            return
        for start in range(0, rows, STRIP):
            part = slice(start, start + STRIP)
            self.add(matrix[part, start:], matrix[part], matrix[:, start:], beta, alpha, out[part, start:])
        mirror(out, STRIP)


class OwnProducts(Products):
    """Those of torch in the dtype itself, which rounds once, after the last addition."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.mm(left, right, out=out)

    def add(self, addend: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        torch.addmm(addend, left, right, beta=beta, alpha=alpha, out=out)


class RoundedProducts(Products):
    """fp32 products of factors rounded to a dtype in which this processor multiplies slowly or not at all."""

    dtype = torch.float32

    def __init__(self, rounding: torch.dtype) -> None:
        self._rounding = rounding

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        torch.mm(self._round(left), self._round(right), out=out)

    def add(self, addend: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> None:
        torch.addmm(addend, self._round(left), self._round(right), beta=beta, alpha=alpha, out=out)

    def _round(self, factor: Tensor) -> Tensor:
        return factor.to(self._rounding).to(torch.float32)


def choose_products(dtype: torch.dtype) -> Products:
    """Products of factors in this dtype, the fastest way that this processor has."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16()):
        return OwnProducts(dtype)
    return RoundedProducts(dtype)


def multiplies_bfloat16() -> bool:
    """Whether torch has fast products of bfloat16 here, which add in fp32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
