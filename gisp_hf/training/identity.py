"""The base of a run: id, revision and fingerprint of the model."""

import logging
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from transformers import PreTrainedModel

from gisp_hf.models.shards import model_fingerprint, plain_parameters
from gisp_hf.pruning.trajectory import Base

logger = logging.getLogger(__name__)


def identify(model: PreTrainedModel, *, name: str | None, revision: str | None, hide_path: bool) -> Base:
    """The model that is about to be pruned.

    Args:
        name: Hub id, for the record; the model's ``name_or_path`` if None.
        revision: the commit; if None, the one in the Hub cache, where there is just one.
        hide_path: of a local folder, record the last name only.
    """
    name = name or model.name_or_path or type(model).__name__
    if hide_path and Path(name).is_dir():
        name = Path(name).resolve().name
    return Base(
        id=name, revision=revision or cached_commit(name), fingerprint=model_fingerprint(plain_parameters(model))
    )


def cached_commit(model_id: str) -> str | None:
    """The one commit of a Hub model whose weights are in the cache.

    A model does not know the revision that it was loaded in. With several in the cache, none is recorded: a wrong one
    would make ``load_level`` refuse the true base.
    """
    if Path(model_id).is_dir():
        return None
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return None
    commits = [
        revision.commit_hash
        for repo in repos
        if repo.repo_type == "model" and repo.repo_id == model_id
        for revision in repo.revisions
        if any(file.file_name.endswith((".safetensors", ".bin")) for file in revision.files)
    ]
    if len(commits) > 1:
        logger.warning(
            "%s is in the cache in %d revisions, and a model does not know which of them it is: the trajectory names "
            "none. GISPPruner(base_revision=...) records it",
            model_id,
            len(commits),
        )
    return commits[0] if len(commits) == 1 else None
