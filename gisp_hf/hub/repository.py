"""A repository on the Hub: idempotent writes, retries, errors with the way out."""

import hashlib
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, validate_repo_id

from gisp_hf.hub.failures import TRIES, BranchMoved, PushError, checked_token, delay, describe, root, way_out
from gisp_hf.hub.limits import check_timeout, time_limit
from gisp_hf.levels.manifest import file_sha256
from gisp_hf.version import __version__

START_BRANCH = "gisp-start"  # where level branches start if the repository's first commit holds a model
ATTRIBUTES_FILE = ".gitattributes"  # the Hub's own: it is in the first commit, and never deleted
HARMLESS_FILES = {ATTRIBUTES_FILE, ".gitignore", "LICENSE", "README.md"}  # a branch that holds no others does not load

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Content:
    """What a file is to hold: what a local file holds, or bytes."""

    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def sha256(self) -> str:
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return file_sha256(self.source)  # read once, though the weights are compared again and again

    def equals(self, entry: RepoFile) -> bool:
        """Whether the Hub holds this. It knows a large file by its sha256, others by git's hash of a blob."""
        if entry.size != self.size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.sha256
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Files = Mapping[str, Content]  # path in the repository -> what it is to hold


class Repository:
    """Creates the repository if it does not exist, and brings its branches and tags to where they should be.

    Every step first looks at what is there, does only what is missing, and looks again before it calls that done. It
    can therefore be repeated after any failure, one whose answer was lost included.

    Args:
        timeout: seconds that the Hub may be silent; then the request has failed, and is tried again.
        wait: is given the seconds until the next try.

    Attributes:
        folder: what is being pushed, for the way out that errors name.
        options: further options of the command that goes on with the push, for the same.
        sent: branch -> bytes, for the branches that had to be changed. What the repository is known to have stored
            already is not counted.

    Raises:
        ValueError: if the name or the token cannot be one.
        PushError: from any method, if the Hub refuses, or fails ``TRIES`` times.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        endpoint: str | None = None,
        timeout: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"{error} Give user/name, or organisation/name") from error
        self.repo_id = repo_id
        self.folder: Path | None = None
        self.options = ""
        self._timeout = check_timeout(timeout)
        self.sent: dict[str, int] = {}
        self._token = checked_token(token or get_token())
        self._api = HfApi(endpoint=endpoint, token=self._token, library_name="gisp_hf", library_version=__version__)
        self._wait = wait
        self._stored: set[str] = set()  # sha256 of large files
        self._refs: GitRefs | None = None
        self._listings: dict[str, Mapping[str, RepoFile]] = {}  # by commit: these never change
        self._start: str | None = None
        if "/" not in repo_id:
            self.repo_id = f"{self._persist('your name', self._api.whoami)['name']}/{repo_id}"
        self._persist("the repository", lambda: self._create(private))
        self.url = f"{self._api.endpoint}/{self.repo_id}"
        if private and not self._persist("the repository", lambda: self._api.model_info(self.repo_id)).private:
            raise PushError(
                f"{self.repo_id} exists and is public, but private=True was asked for; make it private in its "
                "settings, or choose another name"
            )

    def check_writable(self) -> None:
        """Asks how a small file should be uploaded: the Hub tells that only those who may upload it."""
        probe = CommitOperationAdd("probe.txt", b"probe")
        self._persist("the repository", lambda: self._api.preupload_lfs_files(self.repo_id, [probe]))

    def heads(self) -> dict[str, str]:
        """Branch -> commit, read after the last change that was made here."""
        return self._persist("the branches", self._heads)

    def tags(self) -> dict[str, str]:
        """Tag -> commit, read after the last change that was made here."""
        return self._persist("the tags", self._tags)

    def listing(self, commit: str) -> Mapping[str, RepoFile]:
        """Path -> what the Hub knows of the file."""
        return self._persist(f"commit {commit[:12]}", lambda: self._list(commit))

    def read(self, path: str, commit: str) -> bytes:
        """The contents of a small file."""
        return self._persist(f"{path} of commit {commit[:12]}", lambda: self._read(path, commit))

    def holds(self, branch: str, files: Files, *, is_leftover: Callable[[str], bool]) -> bool:
        """Whether ``settle`` would leave the branch alone."""
        head = self.heads().get(branch)
        return head is not None and not any(_difference(self.listing(head), files, is_leftover))

    def settle(
        self,
        branch: str,
        files: Files,
        *,
        is_leftover: Callable[[str], bool],
        message: str,
        expected: Mapping[str, str] | None = None,
    ) -> str:
        """Makes ``branch`` hold these files, and none that ``is_leftover``, by one atomic commit or by none.

        Args:
            expected: branch -> commit: where other branches must stand when this is done.

        Returns:
            The head of the branch, after the Hub has confirmed that it holds just that.
        """
        return self._persist(branch, lambda: self._settle(branch, files, is_leftover, message, expected or {}))

    def check_heads(self, expected: Mapping[str, str]) -> None:
        """Makes sure that no other push has moved these branches (branch -> commit).

        Raises:
            PushError: with their names.
        """
        self._persist("the branches", lambda: self._check_heads(expected))

    def tag(self, name: str, commit: str) -> None:
        """Makes ``name`` a tag of ``commit``; one that stands elsewhere is not moved."""
        self._persist(f"tag {name}", lambda: self._tag(name, commit))

    def _persist(self, what: str, action: Callable[[], T]) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                with time_limit(self._timeout):
                    return action()
            except PushError:
                raise
            except (BranchMoved, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
                self._refs = None
                self._listings.clear()
                cause = root(error)
                reason = f"{self.repo_id}, {what}: {describe(cause, self._token)}"
                seconds = delay(cause, attempt)
                if seconds is None or attempt == TRIES:
                    tries = f" ({attempt} tries)" if attempt > 1 else ""
                    raise PushError(
                        "; ".join(filter(None, [reason + tries, way_out(cause), self._resume()]))
                    ) from error
            logger.warning("%s; trying again in %.1f s", reason, seconds)
            self._wait(seconds)

    def _resume(self) -> str:
        if self.folder is None:
            return ""
        return f"what the Hub has confirmed stays there, and `{self._command()}` does the rest"

    def _command(self) -> str:
        return f"gisp-hf push {shlex.quote(str(self.folder))} --repo {self.repo_id}{self.options}"

    def _create(self, private: bool | None) -> None:
        try:
            self._api.create_repo(self.repo_id, private=private)
        except HfHubHTTPError as error:
            status = error.response.status_code
            # 403: a token may be allowed to write to a repository, and not to create one.
            if status != 409 and not (status == 403 and self._api.repo_exists(self.repo_id)):
                raise

    def _settle(
        self,
        branch: str,
        files: Files,
        is_leftover: Callable[[str], bool],
        message: str,
        expected: Mapping[str, str],
    ) -> str:
        if branch not in self._heads():
            self._create_branch(branch, self._empty_commit())
        head = self._heads()[branch]
        self._check_heads(expected)  # as they were when this branch was at head
        changed, gone = _difference(self._list(head), files, is_leftover)
        if not changed and not gone:
            return head
        size = sum(files[path].size for path in changed if files[path].sha256 not in self._stored)
        self.sent.setdefault(branch, size)
        # New objects for every try: used ones remember what the branch held before.
        additions = [CommitOperationAdd(path, files[path].source) for path in changed]
        # Uploaded by itself since create_commit would silently leave out what a .gitignore in the branch names.
        self._api.preupload_lfs_files(
            self.repo_id, additions, revision=branch, free_memory=False, gitignore_content="# nothing is ignored\n"
        )
        made = self._api.create_commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in gone)],
            commit_message=message,
            revision=branch,
            parent_commit=head,
        )
        self._refs = None
        changed, gone = _difference(self._list(made.oid), files, is_leftover)
        if changed or gone:
            raise ValueError(
                f"the Hub took the commit, but does not hold what lies here: {', '.join([*changed, *gone][:3])}; leave "
                "the files alone while they are pushed"
            )
        if self._heads().get(branch) != made.oid:
            raise BranchMoved
        logger.info("%s, %s: confirmed as commit %s", self.repo_id, branch, made.oid)
        return made.oid

    def _check_heads(self, expected: Mapping[str, str]) -> None:
        heads = self._heads()
        if moved := [branch for branch, commit in expected.items() if heads.get(branch) != commit]:
            raise PushError(
                f"{self.repo_id}: another push has moved {', '.join(moved)} meanwhile, and the levels there do not fit "
                f"together; see that it has ended, then push again: `{self._command()}`"
            )

    def _tag(self, name: str, commit: str) -> None:
        if name not in self._tags():
            self._api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True)
            self._refs = None
        found = self._tags().get(name)
        if found != commit:
            raise ValueError(f"it stands at {found}, this push is at {commit}; choose another tag, or delete that one")

    def _create_branch(self, branch: str, start: str) -> None:
        self._api.create_branch(self.repo_id, branch=branch, revision=start, exist_ok=True)
        self._refs = None
        if branch not in self._heads():
            raise BranchMoved

    def _empty_commit(self) -> str:
        """The repository's first commit; if that holds a model, as a squashed history's does, one that removes it."""
        if self._start is None:
            first = list(self._api.list_repo_commits(self.repo_id))[-1].commit_id
            if not HARMLESS_FILES.issuperset(self._list(first)):
                if START_BRANCH not in self._heads():
                    self._create_branch(START_BRANCH, first)
                first = self._settle(START_BRANCH, {}, is_not_attributes, "An empty start for the levels", {})
            self._start = first
        return self._start

    def _list(self, commit: str) -> Mapping[str, RepoFile]:
        if commit not in self._listings:
            entries = self._api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            self._stored |= {entry.lfs.sha256 for entry in files.values() if entry.lfs is not None}
            self._listings[commit] = files
        return self._listings[commit]

    def _read(self, path: str, commit: str) -> bytes:
        # Not hf_hub_download: it has time limits of its own, and hides the reason of a failure.
        url = hf_hub_url(self.repo_id, path, revision=commit, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._token, library_name="gisp_hf", library_version=__version__)
        response = get_session().get(url, headers=headers)
        hf_raise_for_status(response)
        return response.content

    def _heads(self) -> dict[str, str]:
        return {branch.name: branch.target_commit for branch in self._read_refs().branches}

    def _tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self._read_refs().tags}

    def _read_refs(self) -> GitRefs:
        if self._refs is None:
            self._refs = self._api.list_repo_refs(self.repo_id)
        return self._refs


def is_not_attributes(path: str) -> bool:
    return path != ATTRIBUTES_FILE


def _difference(
    listing: Mapping[str, RepoFile], files: Files, is_leftover: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """What has to be added or replaced, and what has to go."""
    changed = [path for path, content in files.items() if path not in listing or not content.equals(listing[path])]
    return changed, [path for path in listing if path not in files and is_leftover(path)]
