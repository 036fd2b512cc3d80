"""A `LinearMap` on torch tensors: the sparse product, whose derivative is the map and whose gradient is its adjoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xgenda.maps import LinearMap


class _Product(torch.autograd.Function):
    """A x for (n, size) rows of x; differentiable as often as wanted, in both modes."""

    @staticmethod
    def forward(x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        product: Tensor = torch.sparse.mm(matrix, x.T).T
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.matrices = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix, transposed = ctx.matrices
        return _Product.apply(gradients[0], transposed, matrix), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        product: Tensor = _Product.apply(tangents[0], *ctx.matrices)  # type: ignore[no-untyped-call]
        return product

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, matrix: Tensor, transposed: Tensor) -> tuple[Tensor, int]:
        rows = x.movedim(dims[0] or 0, 0)
        return _Product.apply(rows.flatten(0, 1), matrix, transposed).unflatten(0, rows.shape[:2]), 0  # type: ignore[no-untyped-call]


class TensorMap:
    """A linear map of fields as a differentiable function of tensors.

    Parameters
    ----------
    linear
        The map between the flattened fields.
    source, target
        Shapes of a field before and after, whose sizes are those of the map.
    mapped
        Cells of the target that get a value, flat, bool; the others are NaN, with a gradient of zero. None: all.
    """

    def __init__(
        self, linear: LinearMap, source: tuple[int, ...], target: tuple[int, ...], mapped: np.ndarray | None = None
    ) -> None:
        self.linear, self.source, self.target = linear, tuple(source), tuple(target)
        self.mapped = None if mapped is None or mapped.all() else torch.as_tensor(mapped.reshape(self.target))
        self._matrices: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, fields: Tensor) -> Tensor:
        """Return fields (..., *source) on the target, (..., *target), of the same dtype and on the same device.

        Raises
        ------
        ValueError
            If the last dimensions are not those of the source.
        """
        lead = fields.shape[: fields.ndim - len(self.source)]
        if fields.shape[len(lead) :] != self.source:
            raise ValueError(f"fields have shape {tuple(fields.shape)}; (..., {', '.join(map(str, self.source))}) is needed.")
        wide = fields if fields.dtype in (torch.float32, torch.float64) else fields.float()
        flat = wide.reshape(math.prod(lead), self.linear.size)
        out: Tensor = _Product.apply(flat, *self._on(flat))  # type: ignore[no-untyped-call]
        out = out.reshape(*lead, *self.target).to(fields.dtype if fields.is_floating_point() else wide.dtype)
        return out if self.mapped is None else torch.where(self.mapped.to(out.device), out, torch.nan)

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and A^T in the dtype and on the device of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._matrices:
            entries = self.linear.matrix.tocoo()
            places = torch.as_tensor(np.stack([entries.row, entries.col]).astype(np.int64))
            matrix = torch.sparse_coo_tensor(places, torch.as_tensor(entries.data), self.linear.shape, check_invariants=False)
            matrix = matrix.to(like.device, like.dtype).coalesce()
            self._matrices[key] = matrix, matrix.t().coalesce()
        return self._matrices[key]
