"""Models on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from xgenda.errors import OptionError, PublishingError, check_flag
from xgenda.models.cards import model_card
from xgenda.models.checkpoints import write_model
from xgenda.models.entries import is_below
from xgenda.models.sources import hub_endpoint, hub_error, is_offline

if TYPE_CHECKING:
    from xgenda.models.generative import GenerativeModel


def push_model(
    model: GenerativeModel,
    repo_id: str,
    *,
    file: str,
    private: bool | None,
    card: bool,
    message: str | None,
    token: str | None,
) -> str:
    """Publish a model; see `GenerativeModel.push_to_hub`.

    The card goes in a commit of its own: it tells the commit that the model is in.
    """
    _check(repo_id, file, private, card)
    if is_offline():
        raise PublishingError(f"{repo_id}: HF_HUB_OFFLINE forbids to reach the hub. Unset it: unset HF_HUB_OFFLINE")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=hub_endpoint(), token=token, library_name="xgenda")
    about = message or f"{model.spec.name} by xgenda"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model.safetensors"
        write_model(model, local)
        try:
            repo = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            added = api.create_commit(repo, [CommitOperationAdd(file, local)], commit_message=about)
            place = f"hf://{repo}@{added.oid}/{file}"
            if card:
                text = model_card(model, place=place).encode()
                api.create_commit(repo, [CommitOperationAdd("README.md", text)], commit_message=f"Card of {model.spec.name}")
        except Exception as error:  # the hub's errors have no common base across its versions
            problem = hub_error(error, repo_id, f"{hub_endpoint()}/{repo_id}", token)
            raise PublishingError(f"The model could not be put on the hub: {problem}") from None
    return place


def _check(repo_id: object, file: object, private: object, card: object) -> None:
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise OptionError(f"repo_id={repo_id!r} is not accepted; give 'organisation/repository'.")
    if not isinstance(file, str) or not file.endswith(".safetensors") or not is_below(file):
        raise OptionError(f"file={file!r} is not accepted; it must end in .safetensors: file='model.safetensors'")
    if private is not None:
        check_flag("private", private)
    check_flag("card", card)
