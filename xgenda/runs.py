"""What is kept of a cycle of forecasts and analyses, in memory or in a store: fields, diagnostics, notices."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xgenda import metadata, storage
from xgenda.analyses import Step, observations_of
from xgenda.ensembles import Arrays, Frame
from xgenda.errors import OptionError
from xgenda.formatting import user_level
from xgenda.observations.correlations import blocks
from xgenda.observations.operators import Located
from xgenda.observations.quality import MEANINGS, Quality
from xgenda.observations.times import DEFAULT_WINDOW
from xgenda.preparation import MANY, REJECTED, Prepared

#: Bytes of a result in memory of which a user is told.
LARGE = 2**33
STAGES = ("background", "analysis")
#: Bits of the variable `notice`.
EMPTY, RESTARTED, SUSPECT = 1, 2, 4
NOTICES = {
    "no_observation_used": EMPTY,
    "restarted_from_other_states": RESTARTED,
    "innovations_larger_than_their_errors": SUSPECT,
}
#: Variables along time beside those of the state.
DIAGNOSTICS = {
    "spread": "ensemble standard deviation",
    "innovation_mean": "mean innovation",
    "innovation_rms": "root mean square innovation",
    "chi2": "squared innovation over its expectation",
    "observations_used": "number of observations that are used",
    "observations_given": "number of observations in the window",
    "inflation": "inflation of the analysis",
    "notice": "what is to be known of this cycle",
}
#: What long names, which are those of the axes of pictures, have no room for.
COMMENTS = {
    "spread": "root mean ensemble variance over area and levels",
    "innovation_mean": "observation minus background, over observations that are used",
    "innovation_rms": "observation minus background, over observations that are used",
    "chi2": "mean over observations that are used or refused by the background check, each at most the square of its threshold, "
    "or 9; 1 where errors and spread are right",
    "inflation": "factor on the anomalies of the background, times how many times wider relaxation makes the analysis",
}


@dataclass(frozen=True, eq=False)
class Outline:
    """What the result of a run looks like.

    Attributes
    ----------
    frame, setup
        Of the run.
    times
        Of the analyses.
    attrs
        Of the result.
    """

    frame: Frame
    setup: Prepared
    times: np.ndarray
    attrs: Mapping[str, Any]


class Kept:
    """What is known of the cycles that are over."""

    outline: Outline
    done: int
    chi2: list[float]
    notices: list[int]
    leads: Sequence[float] = ()

    def restarts(self) -> int:
        """Return how many there were."""
        return sum(bool(n & RESTARTED) for n in self.notices)

    def chi2_since_restart(self) -> list[float]:
        """Return chi2 of the cycles since the last restart."""
        last = max((i for i, n in enumerate(self.notices) if n & RESTARTED), default=0)
        return self.chi2[last:]

    def values(self, state: Arrays, step: Step, notice: int) -> dict[str, np.ndarray]:
        """Return all that is kept of one cycle, by name."""
        frame = self.outline.frame
        spread = [frame.spread(x) if len(frame.numbers) > 1 else [np.nan] * len(frame.names) for x in (state, step.analysis)]
        return {
            **{n: np.stack([state[n], step.analysis[n]]) for n in frame.names},
            "spread": np.array(spread),
            "innovation_mean": step.innovation_mean,
            "innovation_rms": step.innovation_rms,
            "chi2": np.array(step.chi2),
            "observations_used": np.array(step.used),
            "observations_given": np.array(step.given),
            "inflation": np.array(step.inflation),
            "notice": np.array(notice, dtype=np.uint8),
        }


class Memory(Kept):
    """The result of a run that is kept in memory."""

    def __init__(self, outline: Outline) -> None:
        self.outline, self.done, self.chi2, self.notices = outline, 0, [], []
        self.arrays: dict[str, np.ndarray] = {}
        frame = outline.frame
        size = 2 * len(outline.times) * len(frame.numbers) * sum(frame.template[n].nbytes for n in frame.names)
        if size > LARGE:
            warnings.warn(
                f"The result takes {size / 2**30:.0f} GiB of memory. Write it to a disk instead: store='run.zarr'",
                stacklevel=user_level(),
            )

    def keep(self, t: int, state: Arrays, step: Step, notice: int, leads: Sequence[float] = ()) -> None:
        """Add a cycle."""
        for name, value in self.values(state, step, notice).items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((len(self.outline.times), *value.shape), dtype=value.dtype)
            self.arrays[name][t] = value
        self.chi2.append(step.chi2)
        self.notices.append(notice)
        self.done = t + 1

    def last_analysis(self) -> Arrays:
        """Return the state to go on from."""
        return {n: self.arrays[n][self.done - 1, 1] for n in self.outline.frame.names}

    def result(self) -> xr.Dataset:
        """Return all cycles so far."""
        if not self.arrays:
            return laid_out(self.outline, {}, 0)
        return laid_out(self.outline, {n: v[: self.done] for n, v in self.arrays.items()}, self.done)


class Stored(Kept):
    """The result of a run that is kept in a store."""

    def __init__(self, outline: Outline, store: storage.CycleStore, digest: str = "") -> None:
        self.outline, self.store, self.done, self.digest = outline, store, store.done, digest
        with storage.open_cycles(store.path) as before:
            self.chi2, self.notices = before["chi2"].values.tolist(), before["notice"].values.tolist()
        self.leads = tuple(store.record.get("leads", ()))

    @classmethod
    def of(cls, outline: Outline, path: Path, record: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Stored:
        """Return a new store, or the one to go on with."""
        layout = laid_out(outline, None, len(outline.times))
        if not (resume and path.exists()):
            return cls(outline, storage.create(path, layout, record, overwrite=overwrite))
        store = storage.reopen(path)
        store.compare(record["options"], record["content"], window_given=record["window_given"])
        store.check_layout(layout)
        with storage.open_cycles(path) as before:
            mine, theirs = outline.setup.labels, metadata.time_labels(before["time"])
        if (theirs[1:] <= theirs[:-1]).any():
            raise storage.damaged(path, f"its times do not ascend: {', '.join(t[:19] for t in theirs[:4])}")
        if len(mine) < len(theirs) or (mine[: len(theirs)] != theirs).any():
            spans = [f"{len(x)} from {x[0][:19]} to {x[-1][:19]}" for x in (theirs, mine)]
            raise OptionError(
                f"resume=True goes on with the same times, and {path} holds {spans[0]}; times has {spans[1]}. Call cycle as before, or start "
                f"again: resume=False, overwrite=True"
            )
        digest = _digest_of(outline.setup, store.done)
        if store.done and digest != store.record["observations"]:
            then, now = store.record["options"].get("window") or str(pd.Timedelta(DEFAULT_WINDOW)), record["options"]["window"]
            windows = "" if then == now else f" The window was {then} and is {now}, which may be why: window={then!r}"
            raise OptionError(
                f"resume=True goes on with the same observations, errors and operators, and those of the {store.done} cycles in {path} differ. "
                f"Only later ones may be added.{windows} Call cycle as before, or start again: resume=False, overwrite=True"
            )
        whole, why = store.whole(layout)
        if whole < store.done:
            warnings.warn(
                f"{path} is damaged: {why}. Of its {store.done} cycles the first {whole} are whole; the others are computed again.",
                stacklevel=user_level(),
            )
            digest = _digest_of(outline.setup, whole)
            store.back_to(whole, digest)
        store.adopt_window(record["options"]["window"], record["window_given"])
        store.extend(layout)
        return cls(outline, store, digest)

    def keep(self, t: int, state: Arrays, step: Step, notice: int, leads: Sequence[float] = ()) -> None:
        """Write a cycle."""
        self.digest = _chained(self.digest, observations_of(self.outline.setup, t))
        try:
            self.store.write(t, self.values(state, step, notice), self.digest, leads)
        except OSError as problem:
            problem.add_note(
                f"In xgenda.cycle: {self.store.path} is whole up to cycle {self.done}; go on from there with resume=True."
            )
            raise
        self.chi2.append(step.chi2)
        self.notices.append(notice)
        self.done = t + 1

    def last_analysis(self) -> Arrays:
        """Return the state to go on from."""
        return {n: self.store.read(n, self.done - 1)[1] for n in self.outline.frame.names}

    def result(self) -> xr.Dataset:
        """Return all cycles so far, lazily."""
        return storage.open_cycles(self.store.path)


def _digest_of(setup: Prepared, cycles: int) -> str:
    found = ""
    for t in range(cycles):
        found = _chained(found, observations_of(setup, t))
    return found


def _chained(before: str, located: Located | None) -> str:
    """Return a checksum of the observations of a cycle and of all before."""
    found = hashlib.sha256(before.encode())
    if located is not None:
        table = located.table
        columns = (
            table.latitude,
            table.longitude,
            table.value,
            table.error,
            table.level,
            table.variable,
            table.code,
            table.correlation,
        )
        matrix = located.operator.matrix
        for column in (*columns, matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data):
            found.update(np.ascontiguousarray(column).tobytes())
        for rows in blocks(table, located.time_index):
            given = table.correlated[table.correlation[rows[0]]]
            covariance = given.covariance(table.row[rows], table.latitude[rows], table.longitude[rows])
            found.update(np.ascontiguousarray(covariance).tobytes())
    return found.hexdigest()


def laid_out(outline: Outline, arrays: Mapping[str, np.ndarray] | None, size: int) -> xr.Dataset:
    """Return the result of arrays, or of None: lazy ones of the same shape."""
    frame, observed = outline.frame, [w.name for w in outline.setup.observable]
    member, time = frame.member, "time"
    template = frame.template
    dims: dict[str, tuple[str, ...]] = {n: (time, "stage", member, *frame.dims[n]) for n in frame.names}
    dims |= {
        "spread": (time, "stage", "field"), "innovation_mean": (time, "observed"), "innovation_rms": (time, "observed"),
        **dict.fromkeys(("chi2", "observations_used", "observations_given", "inflation", "notice"), (time,)),
    }  # fmt: skip
    sizes = {time: size, "stage": 2, member: len(frame.numbers), "field": len(frame.names), "observed": len(observed)}
    sizes |= {str(d): s for d, s in template.sizes.items()}
    kinds: dict[str, Any] = {"observations_used": np.int64, "observations_given": np.int64, "notice": np.uint8}
    kinds |= {n: template[n].dtype for n in frame.names}
    variables: dict[str, Any] = {}
    for name, along in dims.items():
        shape = tuple(sizes[d] for d in along)
        values: Any
        if arrays is None:
            import dask.array

            values = dask.array.zeros(shape, dtype=kinds.get(name, np.float64), chunks=shape)
        else:
            values = arrays.get(name, np.zeros(shape, dtype=kinds.get(name, np.float64)))
        attrs = dict(template[name].attrs) if name in frame.names else {"long_name": DIAGNOSTICS[name]}
        attrs |= {"comment": COMMENTS[name]} if name in COMMENTS else {}
        if name == "notice":
            attrs |= {"flag_masks": np.array(list(NOTICES.values()), dtype=np.uint8), "flag_meanings": " ".join(NOTICES)}
        variables[name] = (along, values, attrs)
    coords: dict[str, Any] = {str(n): template.variables[n] for n in template.coords if n != frame.time}
    coords |= {
        time: (time, outline.times[:size], {"standard_name": "time"} | dict(template[frame.time].attrs)),
        "stage": ("stage", np.array(STAGES), {"long_name": "before and after the analysis"}),
        member: (member, frame.numbers, metadata.MEMBER_ATTRS),
        "field": ("field", np.array(frame.names), {"long_name": "variable of the state"}),
        "observed": ("observed", np.array(observed), {"long_name": "what is observed"}),
    }
    others = {str(n): template.variables[n] for n in template.data_vars if n not in frame.names}
    out = xr.Dataset({**variables, **others}, coords, outline.attrs)
    for v in out.variables.values():
        v.encoding = {}
    return out


def warn_of_run(result: xr.Dataset, total: int, setup: Prepared, chi2: float) -> None:
    """Say once what a user should know of a run, of which `chi2` is beyond what is usual."""
    notice, used = (result[n].values for n in ("notice", "observations_used"))
    located = setup.located
    code = np.zeros(0, dtype=np.uint8) if located is None else located.table.code  # before they are compared with the background
    empty = int(((notice & EMPTY) > 0).sum())
    if empty:
        first = metadata.time_labels(result["time"])[int(np.flatnonzero(notice & EMPTY)[0])][:16]
        warnings.warn(
            f"In {empty} of {total} cycles no observation could be used, first at {first}: the analysis is the forecast. "
            f"{_reasons(code, int(used.sum()))} See the variable notice.",
            stacklevel=user_level(),
        )
    within = np.zeros(0, dtype=bool) if located is None else located.time_index >= 0
    judged = int((code[within] == Quality.USED).sum())
    refused = judged - int(used.sum())
    suspect = int(((notice & SUSPECT) > 0).sum())
    told = []
    if refused > max(MANY, REJECTED * judged):
        told.append(
            f"{refused} of {judged} observations were too far from the background or from their neighbours and were not used"
        )
    if suspect > max(2, total / 4):
        told.append(
            f"in {suspect} of {total} cycles squared innovations were more than {chi2:g} times what their errors let expect"
        )
    if told:
        text = ", and ".join(told)
        warnings.warn(f"{text[0].upper()}{text[1:]}. See the variables chi2 and innovation_mean.", stacklevel=user_level())
    outside = int((code == Quality.WINDOW).sum())
    if outside > max(MANY, REJECTED * len(code)):
        warnings.warn(
            f"{outside} of {len(code)} observations fall in no window of the {total} analysis times and are not used. Widen it: "
            f"window=..., or give more times.",
            stacklevel=user_level(),
        )


def _reasons(code: np.ndarray, used: int) -> str:
    """Return why observations of a run are not used, the most frequent reasons first."""
    count = {q: int((code == q).sum()) for q in Quality if q != Quality.USED}
    far = int((code == Quality.USED).sum()) - used
    found = {f"{n} {q.name.lower()} ({MEANINGS[q].partition(':')[0]})": n for q, n in count.items() if n}
    if far:
        found[f"{far} too far from the background or from their neighbours"] = far
    if not found:
        return f"There are {len(code) or 'no'} observations." if not used else "No other observation was refused."
    return (
        f"Of {len(code)} observations {len(code) - used} are not used: {', '.join(sorted(found, key=lambda k: -found[k])[:3])}."
    )
