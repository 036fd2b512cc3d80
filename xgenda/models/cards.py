"""Model cards: what a model is, what it was trained on, how good it is and how to load it, as Markdown made from its description.

The front matter is that of the Hugging Face hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from xgenda.formatting import rounded
from xgenda.metadata import package_version
from xgenda.models.history import remarks_of
from xgenda.models.variables import VariableSpec

if TYPE_CHECKING:
    from xgenda.models.generative import GenerativeModel

# The identifiers of the hub, https://huggingface.co/docs/hub/repositories-licenses, among those that data and models have.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0",
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "odbl", "pddl", "odc-by", "eupl-1.1", "eupl-1.2", "etalab-2.0", "unlicense",
)  # fmt: skip
SCORES = re.compile(r"valid|score|crps|rmse|spread|skill|loss|ratio|card", re.IGNORECASE)
HEADINGS = {"asked": "Options of training"}
# Of `xgenda.train`, where they are not None: what nobody chose says nothing.
DEFAULTS: Mapping[str, Any] = {
    "task": "prior", "method": "diffusion", "stages": "both", "neighbours": [0], "context": 0, "time_features": "auto", "lead_time": False,
    "conserve": "auto", "calibrate": True, "mean_condition": True, "climatology": "auto", "transform": "none", "offset": 1e-3,
    "anchor": "auto", "window": 1, "architecture": "unet", "weights": "auto", "freeze": "none", "augment": "auto", "batch_size": 16, "seed": 0,
    "variational": True, "beta": 1.0, "latent_prior": "normal",
}  # fmt: skip
UNTOLD = ("ds", "target", "statics", "task", "start", "memory")  # sums of data and files, and what is told elsewhere
CALLS = {
    "prior": ("analysis = ds.genda.assimilate(obs, model=model, members=16, seed=0)", "data-assimilation"),
    "downscale": ("fine = coarse.genda.downscale(model=model, members=16, seed=0)", "downscaling"),
    "background": ("analysis = forecast.genda.assimilate(obs, model=model, members=16, seed=0)", "data-assimilation"),
    "forecast": ("later = ds.genda.forecast(model=model, members=16, seed=0)", "forecasting"),
}


def model_card(model: GenerativeModel, *, place: str | None = None) -> str:
    """Return the card of a model, with the line that loads it.

    Parameters
    ----------
    model
        Any.
    place
        What `xgenda.load_model` takes: a name, a path, or ``hf://organisation/repository@<commit>/file``. By default the name of the
        model.

    Returns
    -------
    str
        Markdown with the front matter of the Hugging Face hub.
    """
    spec = model.spec
    call, topic = CALLS.get(spec.task, ("", spec.task))
    said = remarks_of(spec.training)
    scores = {k: v for k, v in said.items() if SCORES.search(k)}
    training = {k: v for k, v in said.items() if k not in scores}
    if "asked" in training:
        training["asked"] = _chosen(training.pop("asked"), training)
    scores |= _last_scores(spec.training.get("history", {}))
    load = f"model = xgenda.load_model({json.dumps(spec.name if place is None else place)})"
    shape = {k: v for k, v in model.summary().items() if k in ("task", "inputs", "input grid", "grid", "mask", "window")}
    parts = [
        _front_matter(spec.licence, topic, spec.kind),
        f"# {spec.name}",
        spec.description,
        _table(shape.items()),
        "## Use",
        f"```python\nimport xgenda\n\n{load}\n{call}".rstrip() + "\n```",
        "Install xgenda from its source: `python -m pip install .`",
        "## Variables",
        _variables(spec.variables),
        *(["## Inputs", _variables(spec.inputs.variables)] if spec.inputs is not None else []),
        "## Training",
        _record(training) or "Nothing was recorded.",
        "## Scores",
        _record(scores) or "None were recorded.",
        "## Licence",
        spec.licence,
        *([f"DOI: [{spec.doi}](https://doi.org/{spec.doi})"] if spec.doi else []),
        *(["## Citation", spec.citation] if spec.citation else []),
        f"This card was written by xgenda {package_version()} from the description in the model file.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_licence(text: str) -> dict[str, str]:
    """Return the entries of the front matter for a licence in words; the hub knows identifiers, and 'other' with a name."""
    first = re.split(r"[;,(]", text)[0].strip()
    if first.lower() in LICENCES:
        return {"license": first.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", first.lower()).strip("-") or "not-stated"}


def _front_matter(licence: str, topic: str, kind: str) -> str:
    tags = dict.fromkeys(["xgenda", topic, kind, "xarray", "geoscience", "generative-model"])
    lines = [f"{k}: {json.dumps(v)}" for k, v in hub_licence(licence).items()]
    return "\n".join(["---", *lines, 'library_name: "xgenda"', "tags:", *(f"- {json.dumps(t)}" for t in tags), "---"])


def _variables(variables: Iterable[VariableSpec]) -> str:
    rows = [(v.name, v.standard_name or "", v.units or "", v.long_name or "") for v in variables]
    return _table(rows, ("name", "standard name", "units", "long name"))


def _record(given: Mapping[str, Any]) -> str:
    """Return a table of what is a value, and below it one for each mapping."""
    flat = {k: v for k, v in given.items() if v is not None and not isinstance(v, Mapping)}
    nested = {k: v for k, v in given.items() if isinstance(v, Mapping)}
    parts = [_table((str(k).replace("_", " "), _value(v)) for k, v in flat.items())] if flat else []
    for name, values in nested.items():
        parts += [f"### {HEADINGS.get(name, str(name).replace('_', ' ').capitalize())}", _record(values)]
    return "\n\n".join(part for part in parts if part)


def _chosen(asked: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that somebody chose and that the record of the training does not hold under the same name."""
    usual = {**DEFAULTS, "validation": str(None)}
    return {
        name: value
        for name, value in asked.items()
        if name not in UNTOLD and value is not None and value not in (usual.get(name), training.get(name))
    }


def _last_scores(history: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Return the last of each score that was taken in training; see `GenerativeModel.history`."""
    found = {}
    for stage, columns in history.items():
        for name, values in columns.items():
            taken = [v for v in values if v is not None]
            if name.startswith(("crps_", "validation")) and taken:
                found[name if len(history) == 1 else f"{stage} {name}"] = taken[-1]
    return found


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) if len(value) <= 12 else f"{len(value)} values"
    return rounded(value)


def _table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    lines = [header, ("---",) * len(header), *(tuple(" ".join(c.split()).replace("|", "\\|") for c in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
