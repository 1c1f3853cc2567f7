"""The base of a run: id, revision and fingerprint of the model."""

import logging
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from transformers import PreTrainedModel

from gisp_hf.models import discover, family_of
from gisp_hf.models.shards import model_fingerprint, plain_parameters
from gisp_hf.models.surgery import CUT_IN_MEMORY, empty_copy
from gisp_hf.pruning.trajectory import Base, Trajectory

logger = logging.getLogger(__name__)


def identify(model: PreTrainedModel, *, name: str | None, revision: str | None, hide_path: bool) -> Base:
    """The model that is about to be pruned.

    Args:
        name: Hub id, for the record; the model's ``name_or_path`` if None, which a model that was pruned in memory is
            not any more: it then says so.
        revision: the commit; if None, the one in the Hub cache, where there is just one.
        hide_path: of a local folder, record the last name only.
    """
    if name is None:
        name = model.name_or_path or type(model).__name__
        name += ", pruned in memory" if model in CUT_IN_MEMORY else ""
    if hide_path and Path(name).is_dir():
        name = Path(name).resolve().name
    pruned = isinstance(model.config, family_of(model).pruned_config)
    return Base(
        id=name,
        revision=revision or cached_commit(name),
        fingerprint=model_fingerprint(plain_parameters(model)),
        unpruned=discover(empty_copy(model, unpruned=True)).total if pruned else None,
    )


def note_of_pruned_base(trajectory: Trajectory) -> str | None:
    """What to tell at the start of a run about a base that is pruned already; None if it is not."""
    if trajectory.base.unpruned is None:
        return None
    levels = ", ".join(
        f"{level:g} is {trajectory.of_unpruned(level):.4f}" for level in trajectory.config.sparsity_levels
    )
    now, before = trajectory.layout.total, trajectory.base.unpruned
    return (
        f"GISP: the model ({trajectory.base.id}) is pruned already: its decoder layers have {now:,} of {before:,} "
        f"parameters, sparsity {trajectory.of_unpruned(0):.4f}. Levels of this run are fractions of the {now:,}; "
        f"counted from the unpruned model, {levels}"
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
