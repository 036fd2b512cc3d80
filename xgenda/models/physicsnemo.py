"""Networks of published models in `.mdlus` files: read without the framework that wrote them and without running what is in them, and written.

A `.mdlus` file is a ZIP, or up to release 1.3 a TAR, of ``args.json``, ``metadata.json`` and ``model.pt``, a state dict.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xgenda.diffusion.denoisers import EDMDenoiser
from xgenda.errors import CheckpointError, GendaError
from xgenda.files import aside, check_output
from xgenda.models.checkpoints import check_finite
from xgenda.networks.songunet import NoiseEmbedding, SongUNet

MEMBERS = ("args.json", "metadata.json", "model.pt")
LARGEST, LARGEST_TEXT = 4 * 2**30, 2**20  # bytes
LARGEST_GRID = 2**29  # numbers in the positional channels, which are made here
REGRESSION = ("UNet", "CorrDiffRegressionUNet", "StormCastUNet")
DIFFUSION = ("EDMPrecondSR", "EDMPrecondSRV2", "EDMPrecondSuperResolution", "EDMPrecond", "EDMPreconditioner")
BACKBONES = ("SongUNet", "SongUNetPosEmbd", "SongUNetPosLtEmbd")
WRAPPER = "ConcatConditionWrapper"
NESTED = "__physicsnemo.Module__"
#: The oldest files have the norm and projections of attention directly in the block.
OLD_NAMES = {"norm2": "attn.norm", "qkv": "attn.qkv", "proj": "attn.proj"}


class Preconditioned(nn.Module):
    r"""D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4, condition) of Karras et al. (2022, eq. 7).

    Parameters
    ----------
    model
        F(x, label, condition).
    sigma_data
        Of the data.
    scale_condition
        Whether the condition is multiplied by c_in too, as in the oldest files.
    """

    def __init__(self, model: SongUNet, sigma_data: float = 0.5, scale_condition: bool = False) -> None:
        super().__init__()
        self.model = model
        # not a submodule of its own: its weights are those of the model
        self._denoiser = [EDMDenoiser(model, sigma_data=sigma_data, scale_condition=scale_condition)]

    @property
    def denoiser(self) -> EDMDenoiser:
        """The same function in the form of every diffusion prior, called as ``denoiser(x, sigma, condition)``."""
        return self._denoiser[0]

    def forward(self, x: Tensor, condition: Tensor | None, sigma: Tensor | float, **where: Tensor | None) -> Tensor:
        """Return the denoised state for noise levels, one number or (batch,); `where` are `position` and `lead` of the model."""
        out: Tensor = self.denoiser(x, sigma, condition, **where)
        return out


class Regression(nn.Module):
    """The mean of a target given a condition: a network whose state and noise level are zero.

    Parameters
    ----------
    model
        F(x, label, condition).
    latent
        Channels of the state; 0 for networks that get the condition only (StormCast).
    """

    def __init__(self, model: SongUNet, latent: int) -> None:
        super().__init__()
        self.model, self.latent = model, latent

    def forward(self, condition: Tensor, **where: Tensor | None) -> Tensor:
        """Return (batch, channels, rows, columns); `where` are `position` and `lead` of the model."""
        x = condition.new_zeros(len(condition), self.latent, *condition.shape[-2:])
        out: Tensor = self.model(x, condition.new_zeros(len(condition)), condition, **where)
        return out


def read_mdlus(path: str | os.PathLike[str]) -> Preconditioned | Regression:
    """Return the network of a `.mdlus` file, in evaluation mode.

    Parameters
    ----------
    path
        The file. Nothing is unpacked, and only numbers are read from it.

    Returns
    -------
    Preconditioned or Regression
        Called as ``net(x, condition, sigma)`` and ``net(condition)``.

    Raises
    ------
    CheckpointError
        If the file is of another kind, truncated, too large, of a network that is not known, or its weights do not fit.
    """
    file = Path(path)
    members = _members(file)
    try:
        args = json.loads(members["args.json"])
        kind, given = str(args["__name__"]), dict(args["__args__"])
        if kind == "EDMPreconditioner":
            given = _flattened(args, given)
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file}: args.json does not describe a network: {problem!r}") from problem
    if kind not in (*REGRESSION, *DIFFUSION):
        raise CheckpointError(f"{file} holds a {kind!r}; this version reads {', '.join((*REGRESSION, *DIFFUSION))}.")
    described = _arguments(file, kind, given)
    try:
        # PhysicsNeMo's own format; weights_only lets nothing but numbers be read
        state = torch.load(io.BytesIO(members["model.pt"]), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as problem:
        raise CheckpointError(f"{file}: model.pt is no plain state dict ({str(problem).splitlines()[0]}).") from problem
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file}: model.pt is no plain state dict.")
    prefix = "model.model." if kind == "EDMPreconditioner" else "model."
    try:
        with torch.device("meta"):  # nothing is allocated until the weights are known to fit
            blank = SongUNet(**described)
        weights = _renamed(dict(state), blank, prefix)
        _check_fit(file, kind, weights, blank, prefix)
        check_finite(file, weights)
        model = SongUNet(**described)
    except (GendaError, RuntimeError) as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(f"{file}: args.json does not describe a network: {problem}") from problem
    model.load_state_dict(weights, strict=True)
    if kind in REGRESSION:
        return Regression(model, 0 if kind == "StormCastUNet" else given["img_out_channels"]).eval().requires_grad_(False)
    scaled = kind in ("EDMPrecondSR", "EDMPrecondSRV2") and given.get("scale_cond_input", kind == "EDMPrecondSR")
    return Preconditioned(model, given.get("sigma_data", 0.5), scaled).eval().requires_grad_(False)


def write_mdlus(
    network: Preconditioned | Regression | EDMDenoiser, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a network so that PhysicsNeMo 2 and `read_mdlus` read it; equal networks give equal files.

    Parameters
    ----------
    network
        As `read_mdlus` returns them, or a denoiser of a `SongUNet` without anchor.
    path
        A name that ends in ``.mdlus``; written aside and renamed.
    overwrite
        Whether an existing file is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        If the format has no place for such a network.
    OutputExistsError
        If there is such a file.
    """
    target = Path(path)
    if target.suffix != ".mdlus":
        raise CheckpointError(
            f"Such a file ends in .mdlus; got {target.name!r}. Type: write_mdlus(network, '{target.stem}.mdlus')"
        )
    check_output(target, "write_mdlus", overwrite=overwrite, error=CheckpointError)
    if not isinstance(network, (Preconditioned, Regression, EDMDenoiser)):
        raise CheckpointError(
            f"A .mdlus file holds one network, and this is a {type(network).__name__}; give model.denoiser, or model.regression of a "
            f"downscaler, or save all of it: model.save('{target.stem}.safetensors')"
        )
    denoiser = network.denoiser if isinstance(network, Preconditioned) else network
    model = denoiser.network if isinstance(denoiser, EDMDenoiser) else denoiser.model
    if not isinstance(model, SongUNet):
        raise CheckpointError(f"A .mdlus file holds a SongUNet, not a {type(model).__name__}; save the model as .safetensors.")
    if isinstance(denoiser, EDMDenoiser) and (denoiser.anchor is not None or denoiser.feeds_state):
        raise CheckpointError("A .mdlus file has no place for a Gaussian anchor; save the model as .safetensors.")
    own = model.arguments
    if not own["unbiased"]:
        raise CheckpointError(
            "Networks in .mdlus files are normalised by the n - 1 variance in evaluation, and this one is not; make it with unbiased=True."
        )
    given: dict[str, Any] = {"img_resolution": list(model.shape)}
    total, out = own["in_channels"], own["out_channels"]
    if isinstance(denoiser, Regression):
        kind, module, version = (
            ("CorrDiffRegressionUNet", "physicsnemo.models.diffusion_unets.unet", "0.2.0")
            if denoiser.latent
            else ("StormCastUNet", "physicsnemo.models.diffusion_unets.unet", "0.1.0")
        )
        if denoiser.latent not in (0, out):
            raise CheckpointError(
                f"A .mdlus file has no place for a regression of {out} channels with a state of {denoiser.latent}."
            )
        total -= denoiser.latent
    else:
        kind = "EDMPrecondSR" if denoiser.scale_condition else "EDMPrecondSuperResolution"
        module, version, total = "physicsnemo.diffusion.preconditioners.legacy", "0.1.0", total - out
        given["sigma_data"] = denoiser.sigma_data
        if denoiser.scale_condition:
            given |= {"img_channels": out, "scale_cond_input": True}
    given |= {"img_in_channels": total, "img_out_channels": out, "model_type": _backbone(own)}
    given |= {theirs: own[ours] for theirs, (ours, _, _) in ARGUMENTS.items() if ours in own and ours not in CHANNELS}
    if given["model_type"] == "SongUNet":
        given = {k: v for k, v in given.items() if k not in ("gridtype", "N_grid_channels")}
    elif own["grid"] == "none":
        given |= {"gridtype": "linear", "N_grid_channels": 0}
    if not own["lead_times"]:
        given = {k: v for k, v in given.items() if k not in ("lead_time_steps", "lead_time_channels", "prob_channels")}
    stream = io.BytesIO()
    torch.save({f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, stream)  # noqa: TID251
    content = {
        "args.json": json.dumps({"__name__": kind, "__module__": module, "__args__": given}).encode(),
        "metadata.json": json.dumps({"physicsnemo_version": "2.2.2", "mdlus_file_version": version}).encode(),
        "model.pt": stream.getvalue(),
    }
    with aside(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # with the date of 1980
    return target


def _members(file: Path) -> dict[str, bytes]:
    """Return the three members of an archive, read in memory; a TAR that holds a ZIP passes for one, so TAR comes first."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.")
    try:
        if tarfile.is_tarfile(file):
            with tarfile.open(file, "r:") as tar:
                entries = tar.getmembers()
                _check_entries(file, [(m.name, m.size, m.isfile()) for m in entries])
                return {m.name: stream.read() for m in entries if (stream := tar.extractfile(m)) is not None}
        with zipfile.ZipFile(file) as archive:
            _check_entries(file, [(m.filename, m.file_size, not m.is_dir()) for m in archive.infolist()])
            return {m.filename: archive.read(m) for m in archive.infolist()}
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as problem:
        raise CheckpointError(f"{file} is no .mdlus archive, or truncated ({problem}); fetch it again.") from problem


def _check_entries(file: Path, entries: list[tuple[str, int, bool]]) -> None:
    names = [n for n, _, _ in entries]
    if sorted(names) != sorted(MEMBERS) or not all(plain for _, _, plain in entries):
        raise CheckpointError(
            f"{file} holds {', '.join(map(repr, names[:5])) or 'nothing'}; a .mdlus file holds {', '.join(MEMBERS)}."
        )
    for name, size, _ in entries:
        limit = LARGEST if name == "model.pt" else LARGEST_TEXT
        if size > limit:
            raise CheckpointError(f"{file}: {name} has {size} bytes, and at most {limit} are read.")


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, f"an integer from {low} to {high}"


def _wholes(low: int, high: int, most: int) -> tuple[Callable[[Any], bool], str]:
    check, _ = _whole(low, high)
    return (
        lambda v: isinstance(v, list) and len(v) <= most and all(map(check, v)),
        f"at most {most} integers from {low} to {high}",
    )


def _number(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high,
        f"a number from {low:g} to {high:g}",
    )


def _only(*values: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: any(type(v) is type(w) and v == w for w in values), " or ".join(map(repr, values))


CHANNELS = ("in_channels", "out_channels", "shape")
_FLAG, _ANYTHING = _only(False, True), (lambda _: True, "anything")
#: The name of an argument: what it is called here ("" where it changes nothing that is computed), what is accepted, and that in words.
ARGUMENTS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "img_resolution": (
        "shape",
        lambda v: _whole(1, 2**15)[0](v) or (_wholes(1, 2**15, 2)[0](v) and len(v) == 2),
        "one or two integers from 1 to 32768",
    ),
    "img_in_channels": ("in_channels", *_whole(0, 2**14)),
    "img_out_channels": ("out_channels", *_whole(1, 2**14)),
    "in_channels": ("in_channels", *_whole(0, 2**14)),
    "out_channels": ("out_channels", *_whole(1, 2**14)),
    "img_channels": ("out_channels", *_whole(0, 2**14)),
    "model_type": ("", *_only(*BACKBONES)),
    "sigma_data": ("", *_number(1e-6, 1e6)),
    "scale_cond_input": ("", *_FLAG),
    "model_channels": ("width", *_whole(4, 2**12)),
    "channel_mult": ("multipliers", lambda v: _wholes(1, 64, 8)[0](v) and len(v) > 0, "1 to 8 integers from 1 to 64"),
    "num_blocks": ("blocks", *_whole(1, 32)),
    "attn_resolutions": ("attention", *_wholes(1, 2**15, 12)),
    "embedding_type": ("embedding", *_only("positional", "fourier", "zero")),
    "gridtype": ("grid", *_only("sinusoidal", "sinusoidal_octave", "linear", "learnable")),
    "N_grid_channels": ("grid_channels", *_whole(0, 2**10)),
    "dropout": ("dropout", *_number(0, 0.99)),
    "lead_time_steps": ("lead_times", *_whole(1, 2**12)),
    "lead_time_channels": ("lead_channels", *_whole(1, 2**10)),
    "prob_channels": ("probabilities", *_wholes(0, 2**14 - 1, 2**10)),
    "additive_pos_embed": ("additive", *_FLAG),
    "bottleneck_attention": ("bottleneck", *_FLAG),
    "label_dim": ("", *_only(0)),
    "augment_dim": ("", *_only(0)),
    "channel_mult_emb": ("", *_only(4)),
    "channel_mult_noise": ("", *_only(1)),
    "encoder_type": ("", *_only("standard")),
    "decoder_type": ("", *_only("standard")),
    "resample_filter": ("", *_only([1, 1])),
    "act": ("", *_only("silu")),
}
ARGUMENTS |= dict.fromkeys(
    ("use_fp16", "sigma_min", "sigma_max", "label_dropout", "use_apex_gn", "profile_mode", "amp_mode", "checkpoint_level", "lead_time_mode",
     "image_cond_key", "vector_cond_key"), ("", *_ANYTHING),
)  # fmt: skip


def _flattened(args: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a preconditioner, of the wrapper inside it, and of the network inside that."""
    for level, inner in enumerate((f"{NESTED}.model", f"{NESTED}.model.model")):
        if given.pop("model", None) != inner:
            raise ValueError(f"no module {inner!r}")
        name, more = str(args[inner]["__name__"]), dict(args[inner]["__args__"])
        if name not in ((WRAPPER,), BACKBONES)[level]:
            raise ValueError(f"a {name!r} in it is not known to this version")
        given |= more | ({"model_type": name} if level else {})
    return given


def _arguments(file: Path, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `SongUNet`, checked."""
    for name, value in given.items():
        if value is None and name in ("img_in_channels", "img_out_channels", "lead_time_channels"):
            continue
        if name not in ARGUMENTS:
            raise CheckpointError(f"{file}: the argument {name!r} of {kind} is not known to this version.")
        _, accepts, words = ARGUMENTS[name]
        if not accepts(value):
            what = "the backbone " if name == "model_type" else f"the argument {name}="
            raise CheckpointError(f"{file}: {what}{str(value)[:80]!r} of {kind} is not accepted; this version reads {words}.")
    wrapped = kind in ("EDMPrecond", "EDMPreconditioner")
    backbone = given.get(
        "model_type", "DhariwalUNet" if wrapped else "SongUNet" if kind == "StormCastUNet" else "SongUNetPosEmbd"
    )
    inside, outside = (
        next((given[k] for k in (f"{prefix}{way}_channels", "img_channels") if given.get(k) is not None), None)
        for prefix in ("" if kind == "EDMPreconditioner" else "img_",)
        for way in ("in", "out")
    )
    if backbone not in BACKBONES or inside is None or outside is None or "img_resolution" not in given:
        raise CheckpointError(f"{file}: args.json does not describe a network: resolution, channels or backbone are missing.")
    resolution, positional = given["img_resolution"], backbone != "SongUNet"
    defaults: dict[str, Any] = {
        "in_channels": inside + (0 if wrapped or kind == "StormCastUNet" else outside),
        "out_channels": outside,
        "shape": (resolution, resolution) if isinstance(resolution, int) else tuple(resolution),
        "multipliers": (1, 2, 2, 2, 2) if positional else (1, 2, 2, 2),
        "attention": (28,) if positional else (16,),
        "dropout": 0.13 if positional else 0.10,
        "grid": "sinusoidal" if positional else "none",
        "grid_channels": 4 if positional else 0,
        "unbiased": True,
    }
    out = defaults | {
        ours: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if (ours := ARGUMENTS[name][0]) and ours not in CHANNELS and value is not None
    }
    if backbone == "SongUNetPosLtEmbd":
        out.setdefault("lead_times", 9)
        if "lead_channels" not in out:
            raise CheckpointError(f"{file}: args.json does not describe a network: lead_time_channels is missing.")
    else:
        out |= {"lead_times": 0, "lead_channels": 0, "probabilities": ()}
    if not out["grid_channels"]:
        out["grid"] = "none"
    if out["grid_channels"] * math.prod(out["shape"]) > LARGEST_GRID or max((0, *out.get("probabilities", ()))) >= outside:
        raise CheckpointError(
            f"{file}: args.json does not describe a network: its positional or probability channels are out of range."
        )
    return out


def _backbone(own: dict[str, Any]) -> str:
    """Return the name that a network has in `.mdlus` files."""
    return "SongUNetPosLtEmbd" if own["lead_times"] else "SongUNet" if own["grid"] == "none" else "SongUNetPosEmbd"


def _check_fit(file: Path, kind: str, weights: dict[str, Tensor], blank: SongUNet, prefix: str) -> None:
    expected = blank.state_dict()
    lacking, stray = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    wrong = [k for k in expected if k in weights and expected[k].shape != weights[k].shape]
    if lacking or stray or wrong:
        first = (
            f"lacks {prefix + lacking[0]!r}"
            if lacking
            else f"has {stray[0]!r} in excess"
            if stray
            else f"has {prefix + wrong[0]!r} of another shape"
        )
        raise CheckpointError(
            f"{file}: the weights do not fit a {kind}: {len(lacking)} are missing, {len(stray)} too many, {len(wrong)} of another shape; "
            f"it {first}."
        )


def _renamed(state: dict[str, Tensor], blank: SongUNet, prefix: str) -> dict[str, Tensor]:
    """Return a state dict by today's names: without bookkeeping, and with the noise frequencies that the oldest files leave out."""
    expected = blank.state_dict()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        parts = name.split(".")
        if parts[-1] in ("device_buffer", "sigma_data") or (parts[-1] == "pos_embd" and name not in expected):
            continue
        if name not in expected and len(parts) > 2 and parts[-2] in OLD_NAMES:
            name = ".".join([*parts[:-2], OLD_NAMES[parts[-2]], parts[-1]])
        out[name] = tensor
    fixed = "map_noise.freqs"
    if blank.embedding == "positional" and fixed not in out:
        out[fixed] = NoiseEmbedding(blank.arguments["width"], "positional").state_dict()["freqs"]
    return out
