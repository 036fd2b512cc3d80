"""The coloured noise of a diffusion prior: what is asked for, and the random field of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xgenda.diffusion.kernels import KINDS, Kernel
from xgenda.diffusion.random_fields import TorusField
from xgenda.errors import OptionError, check_choice, check_count

OPTIONS = ("kind", "length", "nu", "cutoff", "norm")
NORMS = ("l2", "cameron-martin")
EXAMPLE = "noise={'kind': 'exponential', 'length': 0.1}"


def check_noise(given: Any) -> dict[str, Any]:
    """Return all options of coloured noise, checked; an empty mapping for white noise.

    Parameters
    ----------
    given
        None, or a mapping with 'kind' (one of `xgenda.diffusion.kernels.KINDS`), 'length' (as a share of the longer side of the box), 'nu'
        for 'matern', 'cutoff', the largest number of waves across the longer side, and 'norm', in which space the loss is, one of `NORMS`.

    Raises
    ------
    OptionError
        Saying what would be accepted.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not given:
        raise OptionError(f"noise={given!r} is not accepted; give a mapping: {EXAMPLE}")
    if stray := sorted(set(map(str, given)) - set(OPTIONS)):
        raise OptionError(f"noise has {stray}, which coloured noise does not take; it takes {', '.join(map(repr, OPTIONS))}.")
    if missing := {"kind", "length"} - set(given):
        raise OptionError(
            f"noise={dict(given)} has no {sorted(missing)[0]!r}; give it too: {EXAMPLE}, with one of the kinds {', '.join(KINDS)}."
        )
    kernel = Kernel(given["kind"], given["length"], given.get("nu"))
    out: dict[str, Any] = {"kind": kernel.kind, "length": float(kernel.length)}
    if kernel.nu is not None:
        out["nu"] = float(kernel.nu)
    if given.get("cutoff") is not None:
        out["cutoff"] = check_count("noise['cutoff']", given["cutoff"])
    if check_choice("noise['norm']", given.get("norm", "l2"), NORMS) != "l2":
        out["norm"] = given["norm"]
    return out


def check_coloured(
    noise: Mapping[str, Any], task: str, periodic: object, anchor: str | None, window: int, start: object
) -> str | None:
    """Return the Gaussian to train with, which for coloured noise is none, or refuse what does not go with it.

    Raises
    ------
    OptionError
        Saying what to type.
    """
    if not noise:
        return anchor
    if task != "prior":
        raise OptionError(f"noise= belongs to task='prior', and has no effect with task={task!r}. Leave it out.")
    if periodic != "both":
        raise OptionError("noise= is for doubly periodic boxes; pass periodic='both' too, or leave it out.")
    if anchor not in ("auto", None):
        raise OptionError(
            f"anchor={anchor!r} is a denoiser of white noise, and noise= is another one; pass anchor=None, or leave noise out."
        )
    if window > 1:
        raise OptionError(f"noise= is for single states, and window={window}; leave one of them out.")
    if start is not None:
        raise OptionError("noise= cannot be combined with start, whose network knows its own noise. Leave one of them out.")
    return None


def noise_on(noise: Mapping[str, Any] | None, plane: tuple[int, int]) -> TorusField | None:
    """Return the random field of checked options on a box of square cells; None for white noise."""
    if not noise:
        return None
    longer = max(plane)
    if (noise.get("cutoff") or 0) > (longer - 1) // 2:
        raise OptionError(
            f"noise['cutoff']={noise['cutoff']} is more waves than {longer} cells show; give at most {(longer - 1) // 2}, or leave it out."
        )
    kernel = Kernel(noise["kind"], noise["length"], noise.get("nu"))
    return TorusField(plane, kernel, size=(plane[0] / longer, plane[1] / longer), cutoff=noise.get("cutoff"))
