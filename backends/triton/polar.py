"""Newton-Schulz on a device: symmetric products by our kernel, general ones by the vendor's library through torch.

Of the three products of a standard step two are symmetric, and of the Gram form all but those with the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.polar import Coefficients, plan_restarts
from windlass.accelerator.reference.polar import require_gram_dtype
from windlass.backends.triton.launch import IMPLEMENTATION, TYPE_NAMES, Variant
from windlass.backends.triton.normalize import normalize
from windlass.backends.triton.products import exact_products
from windlass.backends.triton.symmetric import PADDING, symmetric_product

SYMMETRIC_FROM: Final = 256
"""Rows from which half of a product, computed by our kernel, takes less time than all of it by the library: two tiles
of 128, below which nothing is left out. From "Gram Newton-Schulz" (Dao et al. 2026); to be measured anew."""


@dataclass(frozen=True)
class NewtonSchulz:
    """Both forms of the iteration, with symmetric products for matrices of `symmetric_from` rows or columns and more
    in 16 bits, the smaller number counts; with None never. In fp32 the library is as fast without."""

    symmetric_from: int | None = SYMMETRIC_FROM

    def polar(
        self,
        stack: Tensor,  # [b, n, m]
        coefficients: Coefficients,
        *,
        product_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Polar factors in the standard form; see `reference.polar`."""
        _check("polar", stack, product_dtype)
        if stack.numel() == 0:
            return stack.clone()
        with exact_products(stack.device.type):
            work = self._begin(stack, product_dtype)
            for a, b, c in coefficients:
                gram = work.make_gram()
                rest = work.multiply(gram, gram, alpha=c, beta=b, added=gram)
                if work.symmetric:  # the library would copy X first to add it
                    work.apply(_shift_in_place(rest, a))
                else:  # small ones, of which a rounding on the diagonal spoils more than a copy costs
                    work.apply(rest, beta=a)
            return work.finish()

    def polar_gram(
        self,
        stack: Tensor,  # [b, n, m]
        coefficients: Coefficients,
        *,
        product_dtype: torch.dtype = torch.float32,
        restarts: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Polar factors in the Gram form; see `reference.polar_gram`."""
        _check("polar_gram", stack, product_dtype)
        require_gram_dtype(product_dtype)
        if stack.numel() == 0:
            return stack.clone()
        if restarts is None:
            restarts = plan_restarts(coefficients, torch.finfo(product_dtype).eps)
        with exact_products(stack.device.type):
            work = self._begin(stack, product_dtype)
            gram: Tensor | None = None
            product: Tensor | None = None  # of the steps since the last restart
            for step, (a, b, c) in enumerate(coefficients):
                if step in restarts and product is not None:
                    work.apply(product)
                    gram = product = None
                gram = work.make_gram() if gram is None else gram
                rest = work.multiply(gram, gram, alpha=c, beta=b, added=gram)  # the step is a I + rest
                if step + 1 < len(coefficients) and step + 1 not in restarts:
                    once = work.multiply(rest, gram, beta=a, added=gram)
                    gram = work.multiply(rest, once, beta=a, added=once)
                if product is None:
                    product = _shift_in_place(rest, a)  # the step's own Gram matrix needs it no more
                else:
                    product = work.multiply(rest, product, beta=a, added=product)
            if product is not None:
                work.apply(product)
            return work.finish()

    def _begin(self, stack: Tensor, product_dtype: torch.dtype) -> _Work:
        rows, columns = stack.shape[1:]
        symmetric = (
            self.symmetric_from is not None
            and min(rows, columns) >= self.symmetric_from
            and product_dtype is not torch.float32
        )
        x = stack.contiguous()
        if symmetric and (rows % PADDING or columns % PADDING):
            x = torch.nn.functional.pad(x, (0, -columns % PADDING, 0, -rows % PADDING))
        return _Work(stack, normalize(x, product_dtype), symmetric)


@dataclass
class _Work:
    """Matrices on their way, and how their small side is multiplied."""

    stack: Tensor  # what was given
    x: Tensor  # of norm 1, padded with zeros where products are symmetric
    symmetric: bool

    @property
    def tall(self) -> bool:
        return self.stack.shape[1] > self.stack.shape[2]

    def make_gram(self) -> Tensor:
        """X X^T on the smaller side."""
        x = self.x.mT if self.tall else self.x
        return symmetric_product(x, x) if self.symmetric else _multiply(x, x.mT)

    def multiply(
        self, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 0.0, added: Tensor | None = None
    ) -> Tensor:
        """alpha left right + beta added of symmetric matrices that commute."""
        if self.symmetric:
            return symmetric_product(left, right, alpha=alpha, beta=beta, added=added)
        return _multiply(left, right, alpha=alpha, beta=beta, added=added)

    def apply(self, product: Tensor, *, beta: float | None = None) -> None:
        """X <- product X, and beta X besides, on the smaller side."""
        left, right = (self.x, product) if self.tall else (product, self.x)
        self.x = _multiply(left, right, beta=beta or 0.0, added=None if beta is None else self.x)

    def finish(self) -> Tensor:
        """The result in the shape and dtype of what was given."""
        _, rows, columns = self.stack.shape
        return self.x[:, :rows, :columns].to(self.stack.dtype).contiguous()


def _shift_in_place(matrices: Tensor, a: float) -> Tensor:
    """matrices + a I."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(a)
    return matrices


def _multiply(
    left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 0.0, added: Tensor | None = None
) -> Tensor:
    """alpha left right + beta added of general matrices, its terms added in fp32 and rounded once."""
    if left.device.type == "cpu":  # where kernels are interpreted; how a host adds up 16 bits is its own affair
        total = alpha * (left.float() @ right.float())
        return (total if added is None else total + beta * added.float()).to(left.dtype)
    if added is None:
        return torch.bmm(left, right) if alpha == 1.0 else alpha * torch.bmm(left, right)
    return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)


def _check(kernel: str, stack: Tensor, product_dtype: torch.dtype) -> None:
    if stack.dim() != 3 or stack.dtype not in TYPE_NAMES or product_dtype not in TYPE_NAMES:
        raise ValueError(
            f"kernel {kernel!r} got a stack {stack.dtype}{list(stack.shape)} and products in {product_dtype}, wanted "
            f"[b, n, m], and {_names(TYPE_NAMES)} for both; stack matrices of one shape"
        )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_WITH_SYMMETRIC, _BY_LIBRARY = NewtonSchulz(), NewtonSchulz(symmetric_from=None)

KERNELS: Final[tuple[Kernel, ...]] = (
    Kernel("polar", IMPLEMENTATION, _WITH_SYMMETRIC.polar),
    Kernel("polar_gram", IMPLEMENTATION, _WITH_SYMMETRIC.polar_gram),
    Kernel("polar", "torch", _BY_LIBRARY.polar, priority=50),
    Kernel("polar_gram", "torch", _BY_LIBRARY.polar_gram, priority=50),
)
VARIANTS: Final[tuple[Variant, ...]] = ()  # those of `normalize` and `symmetric`
