"""`ClassicalModel`: downscaling without networks, with the same verb, so that every claim of skill has a reference.

- ``bilinear``: the coarse values, interpolated.
- ``bcsd``: bias correction and spatial disaggregation (Wood et al. 2004, doi:10.1023/B:CLIM.0000013685.99609.9e): quantiles of the coarse
  anomalies are mapped to those of the fine fields' means over coarse cells, and interpolated onto the fine climatology.
- ``ridge``: what interpolation leaves, regressed on all coarse fields everywhere, the penalty chosen by cross-validation.

Members are the prediction plus whole fields of errors that the method made on training times it was not fitted to.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from xgenda.errors import OptionError, check_choice
from xgenda.models.features import Features
from xgenda.models.generative import STAGES, GenerativeModel, Request, SamplingOptions
from xgenda.models.means import LinearMean
from xgenda.models.spec import ModelSpec

METHODS = ("bilinear", "bcsd", "ridge")


class ClassicalModel(GenerativeModel):
    """A downscaler in closed form.

    Parameters
    ----------
    spec
        With grid, scaling, inputs, and ``options['matched']``: the input of each variable, or None.
    mean
        For 'bcsd' and 'ridge': from coarse anomalies to fine ones, standardised.
    errors
        Past errors, standardised, shape (n, channels, rows, columns).
    tables
        For 'bcsd': quantiles of standardised inputs and of what they are mapped to, each shape (quantiles, channels, coarse cells).
    """

    def __init__(self, spec: ModelSpec, mean: LinearMean, errors: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> None:
        if spec.grid is None or spec.scaling is None or spec.inputs is None:
            raise OptionError("A downscaling model needs a grid, a scaling and inputs.")
        self.spec, self.mean, self.errors, self.tables = spec, mean, errors, tables
        self.scaling, self.inputs = spec.scaling, spec.inputs
        self.features = Features(spec.inputs, spec.grid, None, spec.wraps)

    def plan(self, asked: SamplingOptions, *, linear: bool = True) -> SamplingOptions:
        """Resolve the options; there is nothing to sample."""
        asked.refuse_all_but(("tile", "stage"), f"{self.spec.kind} has a closed form")
        check_choice("stage", asked.stage, STAGES)
        if asked.tile not in ("auto", None):
            raise OptionError(f"tile={asked.tile!r} has no effect: {self.spec.kind} has a closed form. Leave it out.")
        return SamplingOptions("none", "none", None, asked.batch_size, "none", stage=asked.stage)

    def predict(self, coarse: Tensor, fields: Tensor, climatology: Tensor) -> Tensor:
        """Return the prediction, standardised, shape (t, channels, rows, columns).

        Parameters
        ----------
        coarse
            Standardised, shape (t, inputs, cells).
        fields
            The same in the units of the model.
        climatology
            Of the fine fields, shape (t, channels, rows, columns).
        """
        everywhere = self.features.everywhere()
        if self.spec.kind == "bilinear":
            values = self.features.interpolated(fields[:, self._matched()], everywhere).double().numpy()
            return (torch.as_tensor(self.scaling.transform(self.scaling.clipped(values, 1))) - climatology) / torch.as_tensor(
                self.scaling.std
            )
        if self.tables is not None:
            coarse = mapped_quantiles(coarse[:, self._matched()], *self.tables)
        return self.mean.at(coarse, self.features.interpolated(coarse, everywhere), everywhere)

    def _matched(self) -> list[int]:
        return [int(k) for k in self.spec.options["matched"]]

    def posterior(self, request: Request) -> Tensor:
        """Return the prediction plus past errors; which ones is a function of seed, time label and member number."""
        assert request.standardised is not None
        assert request.climatology is not None
        shape = self.mean.shape
        climatology = request.climatology.reshape(-1, *shape).double()
        std = torch.as_tensor(self.scaling.std)
        z = self.predict(request.standardised, request.fields, climatology)[:, None]
        if request.options.stage == "all":
            chosen = [self._draw(request.seed, label, request.members) for label in request.labels]
            z = z + torch.stack([self.errors[c].double() for c in chosen])
        out = z * std + climatology[:, None]
        request.advance(len(request.labels))
        return torch.as_tensor(self.scaling.clipped(self.scaling.untransformed(out.numpy(), 2), 2)).flatten(-2)

    def _draw(self, seed: int, label: str, members: Sequence[int]) -> list[int]:
        """Return one past error for each member, none twice before all were used."""
        order = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(label.encode())]).permutation(len(self.errors))
        return [int(order[m % len(order)]) for m in members]

    def tensors(self) -> dict[str, Tensor]:
        """Return the linear map, the past errors and the tables."""
        out = self.mean.tensors() | {"errors": self.errors.float()}
        if self.tables is not None:
            out |= {"tables.given": self.tables[0].float(), "tables.wanted": self.tables[1].float()}
        return out

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: dict[str, Tensor]) -> ClassicalModel:
        """Rebuild the model; the tensors must be exactly those that it stores."""
        if spec.grid is None:
            raise KeyError("grid")
        mean = LinearMean.from_tensors((spec.channels, *spec.grid.plane), tensors)
        errors, tables = tensors.pop("errors"), None
        if spec.kind == "bcsd":
            tables = tensors.pop("tables.given").double(), tensors.pop("tables.wanted").double()
        if tensors:
            raise KeyError(f"unexpected tensors {sorted(tensors)}")
        return cls(spec, mean, errors, tables)


def mapped_quantiles(values: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
    """Return values (t, channels, cells) where those of the table `given` go to those of `wanted`.

    Between the quantiles the map is linear; beyond the outermost it keeps the difference that it has there.
    """
    flat = values.flatten(1).T.contiguous()  # series by series
    low, high = given.flatten(1).T.contiguous(), wanted.flatten(1).T.contiguous()
    place = torch.searchsorted(low, flat).clamp(1, low.shape[1] - 1)
    x0, x1 = low.gather(1, place - 1), low.gather(1, place)
    y0, y1 = high.gather(1, place - 1), high.gather(1, place)
    part = ((flat - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    beyond = flat - flat.clamp(low[:, :1], low[:, -1:])
    return (y0 + part * (y1 - y0) + beyond).T.reshape(values.shape)
