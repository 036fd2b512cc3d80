"""Krylov solvers for (I + K) v = b, one system per row, K given as a product; nothing is shared between rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SOLVERS = ("damped", "gmres", "cg")
Product = Callable[[Tensor], Tensor]


def conjugate_gradients(
    multiply: Product,
    target: Tensor,
    iterations: int,
    *,
    tolerance: float = 1e-6,
    preconditioner: Tensor | None = None,
    guess: Tensor | None = None,
) -> Tensor:
    """Solve symmetric positive definite systems.

    A row stops where it has converged or its curvature is not positive; the other rows are not affected.

    Parameters
    ----------
    multiply
        The matrix of each row times a vector of each row, (batch, m) to (batch, m).
    target
        Right-hand sides, shape (batch, m).
    iterations
        At most this many.
    tolerance
        Of the residual, relative to the target.
    preconditioner
        Approximate inverse diagonal, shape (batch, m).
    guess
        Where to start, shape (batch, m); zero by default.
    """

    def precondition(residual: Tensor) -> Tensor:
        return residual if preconditioner is None else preconditioner * residual

    solution = torch.zeros_like(target) if guess is None else guess
    residual = target.clone() if guess is None else target - multiply(guess)
    direction = precondition(residual)
    power = (residual * direction).sum(-1, keepdim=True)
    start = (target * precondition(target)).sum(-1, keepdim=True)
    for _ in range(iterations):
        open_rows = power > tolerance**2 * start
        if not open_rows.any():
            break
        product = multiply(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        alive = (curvature > 0) & open_rows & torch.isfinite(curvature)
        rate = torch.where(alive, power / torch.where(alive, curvature, 1.0), 0.0)
        solution = solution + rate * direction
        residual = residual - rate * torch.where(alive, product, 0.0)
        ahead = precondition(residual)
        following = (residual * ahead).sum(-1, keepdim=True)
        ratio = torch.where(alive, following / torch.where(power > 0, power, 1.0), 0.0)
        direction = torch.where(alive, ahead + ratio * direction, direction)
        power = torch.where(alive, following, power)
    return solution


def arnoldi_solve(spread: Product, target: Tensor, iterations: int, *, damped: bool) -> tuple[Tensor, Tensor]:
    r"""Solve (I + K) v = b in the Krylov space of K and b, for any K.

    With K V = V H + rest (Arnoldi, modified Gram-Schmidt), 'gmres' minimises the residual. The damped solver takes
    v = V (I + H+)^-1 V^T b, where H+ is the symmetric part of H without its negative eigenvalues: for the symmetric positive
    K that theory promises it is the method of conjugate gradients, and for the Jacobian of a network, which is neither, it can
    never return more than it was given, because (I + H+)^-1 has a norm of at most one.

    Returns
    -------
    solution, residual
        Shape (batch, m), and the norm of the residual over that of `target`, shape (batch,).
    """
    count = min(iterations, target.shape[1])
    size = target.norm(dim=1)
    safe = torch.where(size > 0, size, 1.0)
    basis = [target / safe[:, None]]
    hessenberg = torch.zeros(len(target), count + 1, count, dtype=target.dtype, device=target.device)
    for k in range(count):
        vector = spread(basis[k])
        for i in range(k + 1):
            hessenberg[:, i, k] = (vector * basis[i]).sum(1)
            vector = vector - hessenberg[:, i, k, None] * basis[i]
        length = vector.norm(dim=1)
        # an invariant space: what is left is rounding, and a direction made of it would be noise
        closed = length <= 1e-9 * hessenberg[:, : k + 1, k].norm(dim=1) + 1e-30
        hessenberg[:, k + 1, k] = torch.where(closed, 0.0, length)
        basis.append(torch.where(closed[:, None], 0.0, vector / torch.where(closed, 1.0, length)[:, None]))
    eye = torch.eye(count + 1, count, dtype=target.dtype, device=target.device)
    first = torch.zeros(len(target), count + 1, 1, dtype=target.dtype, device=target.device)
    first[:, 0, 0] = 1.0
    whole = hessenberg + eye
    finite = torch.isfinite(whole).all(2).all(1)
    whole = torch.where(finite[:, None, None], whole, eye)
    if damped:
        square = whole[:, :count] - eye[:count]
        # in rows of 64 bytes: what LAPACK rounds to depends on where in memory a matrix begins, and so on its place in the batch
        symmetric = torch.nn.functional.pad(0.5 * (square + square.transpose(1, 2)), (0, -count % 8, 0, -count % 8))
        values, vectors = torch.linalg.eigh(symmetric)
        inverse = vectors / (1 + values.clamp(min=0.0))[:, None, :] @ vectors.transpose(1, 2)
        short = inverse[:, :count, :count] @ first[:, :count]
    else:
        short = torch.linalg.lstsq(whole, first).solution
    residual = (first - whole @ short).norm(dim=1)[:, 0]
    stacked = torch.stack(basis[:count], 2)
    solution = (stacked @ short)[..., 0] * size[:, None]
    bad = ~finite | ~torch.isfinite(solution).all(1)
    return torch.where(bad[:, None], 0.0, solution), torch.where(bad, torch.inf, residual)
