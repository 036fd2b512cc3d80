"""A search of a latent space beside diffusion and Gaussian priors: sparse observations of withheld years.

python docs/benchmarks/latent.py [--steps 400] [--seeds 3] [--every 2] [--models DIR] [--brief]
python docs/benchmarks/latent.py --last

Temperature over North America, trained to 2039, tested on years from 2060 to 2099, 40 observations a year with an error of 0.5 K: the
experiment of sparse_prior.py. The variational autoencoder is trained by this program, once as a network alone, as published, and once on
principal components, where what does not help is left out; of the codes of each a diffusion is learned as well. The diffusion prior is the
bundled one, and the Gaussian priors have the options that cross-validation finds. In the end, or with --last alone, the bundled latent space
is searched for 3000 observations.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

import xgenda
from xgenda.demo import POINT_ERROR, SAMPLE_COVARIANCES, scores, sparse_observations, training_years, withheld_years
from xgenda.observations.networks import random_stations, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of training each network, and then again of the codes")
    parser.add_argument(
        "--minutes", type=float, default=None, help="of training each network instead, and a quarter of it of the codes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=2, help="take every so manyth test year")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--models", type=Path, default=None, help="where trained networks are kept; by default nowhere")
    parser.add_argument("--last", action="store_true", help="only the few thousand observations")
    parser.add_argument(
        "--brief", action="store_true", help="leave out the published searches and others that take long and score badly"
    )
    options = parser.parse_args()
    if options.last:
        few_thousand()
        return
    warnings.filterwarnings("ignore", category=xgenda.errors.LittleDataWarning)
    truth, train = withheld_years(options.every), training_years()
    grid_only = xr.zeros_like(truth)  # the values of a truth must not reach a prior
    grid_only["air_temperature"].attrs = truth["air_temperature"].attrs
    folder = options.models or Path(mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)

    def budget(share: float) -> dict[str, Any]:
        return {"steps": options.steps} if options.minutes is None else {"time_budget": 60 * share * options.minutes}

    networks: dict[str, Any] = {"VAE": {"anchor": None, "latent": 32}, "VAE on principal components": {}}
    methods: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, arguments in networks.items():
        path = folder / f"{name.lower().replace(' ', '-')}.safetensors"
        if not path.exists():
            begin = time.monotonic()
            xgenda.train(train, task="autoencoder", out=path, **budget(1), progress=False, **arguments)
            print(f"{name}: trained in {time.monotonic() - begin:.0f} s")
        model = xgenda.load_model(path)
        learned_path = path.with_stem(f"{path.stem}-diffusion")
        if not learned_path.exists():
            begin = time.monotonic()
            xgenda.train(
                train, task="autoencoder", start=model, latent_prior="diffusion", out=learned_path, progress=False, **budget(0.25)
            )  # fmt: skip
            print(f"{name}: diffusion of the codes trained in {time.monotonic() - begin:.0f} s")
        learned = xgenda.load_model(learned_path)
        print(
            f"{name}: {learned.spec.training['prior_steps']} steps of the codes, {learned.spec.training['latent_prior']}; "
            f"{learned.spec.training['prior_codes']}"
        )
        record = model.spec.training
        print(
            f"{name}: latent {record['latent']}, {record['steps']} steps, {record['card']}; decoder's error {record['decoder_error']}"
        )
        if name == "VAE":
            white = {"guidance_options": {"decoder_error": False}}
            # published searches end after about 100 steps
            adam: dict[str, Any] = {"guidance": "mse", "sampler_options": {"optimiser": "adam"}, "steps": 150}
            methods |= {
                f"{name}, rmap": (model, {"sampler": "rmap"}),
                f"{name}, rmap, without the decoder's error": (model, {"sampler": "rmap"} | white),
                f"{name}, map": (model, {"sampler": "map"}),
                f"{name}, hmc": (model, {"sampler": "hmc"}),
                f"{name}, as published, restarts": (model, {"sampler": "map", **adam}),
                f"{name}, as published, perturbed observations": (model, {"sampler": "rmap", **adam}),
                f"{name}, diffusion of the codes, mmps": (learned, {"guidance": "mmps"}),
                f"{name}, Gaussian of the codes, hmc": (learned, {"sampler": "hmc"}),
                f"{name}, Gaussian of the codes, rmap": (learned, {"sampler": "rmap"}),
            }
        else:
            methods |= {
                f"{name}, rmap": (model, {}),
                f"{name}, map": (model, {"sampler": "map"}),
                f"{name}, Gaussian of the codes, rmap": (learned, {"sampler": "rmap"}),
                f"{name}, diffusion of the codes": (learned, {}),
            }
    methods["diffusion prior"] = (xgenda.load_model("t2m-north-america"), {})
    for name, given in SAMPLE_COVARIANCES.items():
        methods[name] = (xgenda.gaussian_prior(train, **given), {})
    if options.brief:
        methods = {k: v for k, v in methods.items() if not any(w in k for w in ("as published", " map", "without", "localised"))}
    methods = {k: methods[k] for k in sorted(methods, key=lambda k: k.startswith("VAE,"))}  # those that take longest last
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for seed in range(options.seeds):
        obs = sparse_observations(truth, 40, POINT_ERROR, seed)
        for name, (model, given) in methods.items():
            begin = time.monotonic()
            analysis = grid_only.genda.assimilate(
                obs,
                model=model,
                error=POINT_ERROR,
                members=options.members,
                seed=seed,
                background_check=None,
                progress=False,
                **given,
            )
            seconds = (time.monotonic() - begin) / truth.sizes["time"]
            rows[name].append({**scores(analysis, truth), "s per analysis": seconds})
            print(seed, name, {k: round(v, 4) for k, v in rows[name][-1].items()}, flush=True)
        print(f"{seed + 1} seeds, {truth.sizes['time']} years, {options.members} members")
        table = pd.DataFrame({k: pd.DataFrame(v).mean() for k, v in rows.items()}).T
        table["CRPS standard error"] = [np.std([r["crps"] for r in v]) / max(1, len(v) - 1) ** 0.5 for v in rows.values()]
        print(table.round(4).to_string(), flush=True)
    if options.brief:
        return
    few_thousand()


def few_thousand(count: int = 3000, members: int = 10) -> None:
    """Search the latent space of the bundled model for a few thousand observations of points between the cells.

    The published search took under a minute on a laptop, for as many observations and members.
    """
    truth = withheld_years().isel(time=[0])
    rng = np.random.default_rng(0)
    places = random_stations(count, rng, latitude=(15, 60), longitude=(-135, -45))
    obs = sample(truth, places, {"air_temperature": POINT_ERROR}, rng).assign_coords(
        time=("obs", np.repeat(truth["time"].values, count))
    )
    model, blank = xgenda.load_model("t2m-north-america-vae"), xr.zeros_like(truth)
    blank["air_temperature"].attrs = truth["air_temperature"].attrs
    for sampler in ("map", "rmap", "hmc"):
        begin, used = time.monotonic(), time.process_time()
        found = blank.genda.assimilate(
            obs, model=model, members=members, seed=0, sampler=sampler, background_check=None, progress=False
        )
        seconds, used = time.monotonic() - begin, time.process_time() - used
        error = float(np.sqrt(((found["air_temperature"].mean("member") - truth["air_temperature"]) ** 2).mean()))
        print(
            f"{count} observations, {members} members, {sampler}: {seconds:.1f} s ({used:.1f} s of CPU, {torch.get_num_threads()} threads), "
            f"RMSE {error:.3f} K"
        )


if __name__ == "__main__":
    main()
