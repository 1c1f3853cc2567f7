"""Guards against overwriting another run: compares the levels of a repository with the run at hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.hf_api import RepoFile

from gisp_hf.hub.failures import PushError
from gisp_hf.hub.repository import Files, Repository
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE, Trajectory

MAIN = "main"
LEVEL_PREFIX = "sparsity-"  # begins the names of levels' branches

_FILES = (FACTS_FILE, ORDER_FILE)
_LARGEST = 2**28  # bytes of a trajectory's file


def check_repository(repository: Repository, run: Trajectory, own: Mapping[str, Files]) -> None:
    """Refuses a repository that another run was pushed to, before anything is written.

    Looks at ``main``, and at the levels' branches: all of them if no run was pushed to the end.

    Args:
        run: the run at hand. Its order is empty if it has not begun.
        own: branch -> files that are to be pushed there. A branch that holds the same trajectory is not read.

    Raises:
        PushError: with the branch and the difference.
    """
    heads = repository.heads()
    finished = MAIN in heads and _has_trajectory(repository.listing(heads[MAIN]))
    for branch in sorted(heads):
        if branch == MAIN or (branch.startswith(LEVEL_PREFIX) and (branch in own or not finished)):
            check_branch(repository, branch, run, own.get(branch, {}))


def check_branch(repository: Repository, branch: str, run: Trajectory, own: Files) -> None:
    """Refuses a branch that holds a level, or the trajectory, of another run. Arguments as ``check_repository``.

    Raises:
        PushError: with the difference.
    """
    head = repository.heads().get(branch)
    listing = {} if head is None else repository.listing(head)
    if head is None or not _has_trajectory(listing) or _is_equal(listing, own):
        return
    try:
        reason = difference(_read(repository, head, listing), run)
    except (ValueError, RecursionError, OverflowError) as error:
        reason = f"its trajectory cannot be read ({error.__cause__ or error})"
    if reason:
        raise PushError(
            f"{repository.repo_id} holds another run ({branch}): {_printable(reason)}. Give another repository; or "
            f"replace that run for good, with replace=True or `gisp-hf push --replace`"
        )


def stale_levels(repository: Repository, own: Mapping[str, Files]) -> tuple[str, ...]:
    """The levels' branches that the run does not have: they are left of another run, or of more levels of this one."""
    return tuple(sorted(name for name in repository.heads() if name.startswith(LEVEL_PREFIX) and name not in own))


def difference(first: Trajectory, second: Trajectory) -> str | None:
    """What makes two trajectories two runs; None if they are the same run, of which one may have come further.

    Two removal orders belong together if one begins with the other. Where one is still empty, settings and calibration
    data must be equal.
    """
    if first.base.fingerprint != second.base.fingerprint:
        return (
            f"it was made from {first.base.id} with fingerprint {first.base.fingerprint[:12]}, this one from "
            f"{second.base.id} with fingerprint {second.base.fingerprint[:12]}"
        )
    if [order.shape for order in first.order] != [order.shape for order in second.order]:
        return "its blocks have other sizes"
    length = min(len(first), len(second))
    if length == 0:
        settings = second.config.to_dict()
        changed = [key for key, value in first.config.to_dict().items() if settings.get(key) != value]
        if changed:
            return f"it was made with another configuration (differs in {', '.join(changed)})"
        if _as_json(first.calibration) != _as_json(second.calibration):
            return "it was made with other calibration data"
    # Both tensors: the position of what is among the first `length` removals, -1 for all others.
    pairs = ((torch.where(order < length, order, -1) for order in pair) for pair in zip(first.order, second.order))
    if not all(torch.equal(one, other) for one, other in pairs):
        return "its removal order differs"
    return None


def _has_trajectory(listing: Mapping[str, RepoFile]) -> bool:
    return all(name in listing for name in _FILES)


def _is_equal(listing: Mapping[str, RepoFile], own: Files) -> bool:
    return all(name in own and own[name].equals(listing[name]) for name in _FILES)


def _read(repository: Repository, commit: str, listing: Mapping[str, RepoFile]) -> Trajectory:
    with TemporaryDirectory() as folder:
        for name in _FILES:
            if listing[name].size > _LARGEST:
                raise ValueError(f"{name} has {listing[name].size:,} bytes")
            Path(folder, name).write_bytes(repository.read(name, commit))
        return Trajectory.load(folder)


def _as_json(facts: Mapping[str, object]) -> object:
    return json.loads(json.dumps(facts))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]
