"""Read networks from `.mdlus` files, without the framework that wrote them and without running what is in them.

A `.mdlus` file is a ZIP, or up to release 1.3 a TAR, of ``args.json``, ``metadata.json`` and ``model.pt``, a state dict.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xgenda.errors import CheckpointError
from xgenda.models.checkpoints import check_finite
from xgenda.networks.songunet import SongUNet

MEMBERS = ("args.json", "metadata.json", "model.pt")
LARGEST, LARGEST_TEXT = 4 * 2**30, 2**20  # bytes
REGRESSION = ("UNet", "CorrDiffRegressionUNet")
DIFFUSION = ("EDMPrecondSR", "EDMPrecondSRV2", "EDMPrecondSuperResolution")
BACKBONES = ("SongUNet", "SongUNetPosEmbd")
#: Arguments that change speed, or nothing that is computed here.
IGNORED = (
    "use_fp16",
    "img_channels",
    "sigma_min",
    "sigma_max",
    "use_apex_gn",
    "act",
    "profile_mode",
    "amp_mode",
    "checkpoint_level",
)
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
        self.model, self.sigma_data, self.scale_condition = model, sigma_data, scale_condition

    def forward(self, x: Tensor, condition: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the denoised state for noise levels, one number or (batch,)."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)).reshape(-1, 1, 1, 1)
        total = (level.square() + self.sigma_data**2).sqrt()
        condition = condition / total if self.scale_condition else condition
        found = self.model(x / total, level.flatten().log() / 4, condition)
        out: Tensor = (self.sigma_data / total).square() * x + level * self.sigma_data / total * found
        return out


class Regression(nn.Module):
    """The mean of a target given a condition: a network whose state and noise level are zero."""

    def __init__(self, model: SongUNet, out_channels: int) -> None:
        super().__init__()
        self.model, self.out_channels = model, out_channels

    def forward(self, condition: Tensor) -> Tensor:
        """Return (batch, out_channels, rows, columns)."""
        x = condition.new_zeros(len(condition), self.out_channels, *condition.shape[-2:])
        out: Tensor = self.model(x, condition.new_zeros(len(condition)), condition)
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
    except (ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{file}: args.json does not describe a network: {problem}") from problem
    if kind not in (*REGRESSION, *DIFFUSION):
        raise CheckpointError(f"{file} holds a {kind!r}; this version reads {', '.join((*REGRESSION, *DIFFUSION))}.")
    try:
        state = torch.load(io.BytesIO(members["model.pt"]), map_location="cpu", weights_only=True)
    except Exception as problem:
        raise CheckpointError(f"{file}: model.pt is no plain state dict ({str(problem).splitlines()[0]}).") from problem
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{file}: model.pt is no plain state dict.")
    net = _network(file, kind, given)
    weights = _renamed(dict(state), net)
    expected = net.state_dict()
    lacking, stray = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    wrong = [k for k in expected if k in weights and expected[k].shape != weights[k].shape]
    if lacking or stray or wrong:
        first = (
            f"lacks {lacking[0]!r}"
            if lacking
            else f"has {stray[0]!r} in excess"
            if stray
            else f"has {wrong[0]!r} of another shape"
        )
        raise CheckpointError(
            f"{file}: the weights do not fit a {kind}: {len(lacking)} are missing, {len(stray)} too many, {len(wrong)} of another shape; "
            f"it {first}."
        )
    check_finite(file, weights)
    net.load_state_dict(weights, strict=True)
    return net.eval().requires_grad_(False)


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


def _network(file: Path, kind: str, given: dict[str, Any]) -> Preconditioned | Regression:
    known = {
        "img_resolution", "img_in_channels", "img_out_channels", "model_type", "sigma_data", "model_channels", "channel_mult", "num_blocks",
        "attn_resolutions", "N_grid_channels", "embedding_type", "gridtype", "dropout", "scale_cond_input", *IGNORED,
    }  # fmt: skip
    strange = sorted(set(given) - known)
    backbone = given.get("model_type", "SongUNetPosEmbd")
    if strange or backbone not in BACKBONES:
        what = f"the argument {strange[0]!r}" if strange else f"the backbone {backbone!r}"
        raise CheckpointError(f"{file}: {what} of {kind} is not known to this version.")
    resolution = given["img_resolution"]
    shape = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    positional = backbone == "SongUNetPosEmbd"
    grid = {"test": "none"}.get(str(given.get("gridtype", "sinusoidal")), str(given.get("gridtype", "sinusoidal")))
    out = int(given["img_out_channels"])
    try:
        model = SongUNet(
            int(given["img_in_channels"]) + out, out, shape, int(given.get("model_channels", 128)),
            tuple(given.get("channel_mult", (1, 2, 2, 2, 2))), int(given.get("num_blocks", 4)), tuple(given.get("attn_resolutions", (28,))),
            str(given.get("embedding_type", "positional")), grid if positional else "none",
            int(given.get("N_grid_channels", 4)) if positional else 0, float(given.get("dropout", 0.13 if positional else 0.10)), unbiased=True,
        )  # fmt: skip
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"{file}: args.json does not describe a network: {problem}") from problem
    if kind in REGRESSION:
        return Regression(model, out)
    return Preconditioned(model, float(given.get("sigma_data", 0.5)), bool(given.get("scale_cond_input", False)))


def _renamed(state: dict[str, Tensor], net: Preconditioned | Regression) -> dict[str, Tensor]:
    """Return a state dict by today's names: without bookkeeping, and with the noise frequencies that the oldest files leave out."""
    expected = net.state_dict()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[-1] == "device_buffer" or (parts[-1] == "pos_embd" and name not in expected):
            continue
        if name not in expected and len(parts) > 2 and parts[-2] in OLD_NAMES:
            name = ".".join([*parts[:-2], OLD_NAMES[parts[-2]], parts[-1]])
        out[name] = tensor
    fixed = "model.map_noise.freqs"
    if net.model.embedding == "positional" and fixed not in out:
        out[fixed] = expected[fixed]
    return out
