"""The files of a folder, or of one revision of a repository on the Hub, checked before anything is made of them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import errors, hf_hub_download, is_offline_mode
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gisp_hf.untrusted import check_model_config, check_weight_map, odd_contents, read_json

T = TypeVar("T")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# A tokenizer is one of the first three, with whatever there is of the others.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def checked_token(token: str | None) -> str:
    """The token, if it can be one.

    Raises:
        ValueError: if not. The HTTP library would quote it in its own error.
    """
    if not token:
        raise ValueError("there is no token for the Hub; log in with `hf auth login`, or give one that may write")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("the token holds spaces, line ends or letters that no token has; copy it again")
    return token


CHECKS: dict[str, Callable[[dict[str, Any]], object]] = {
    CONFIG_FILE: check_model_config,
    INDEX_FILE: check_weight_map,
}


@dataclass(frozen=True)
class Files:
    """The files of a folder, or of one revision of a repository, by exact name."""

    source: str | Path
    revision: str | None
    token: str | None
    endpoint: str | None

    @property
    def label(self) -> str:
        return f"{self.source} at revision {self.revision}" if self.revision else str(self.source)

    def fetch(self, filename: str) -> Path | None:
        """A local copy of the file, or None if there is no such file.

        Raises:
            ValueError: if it is JSON that is damaged, or larger or deeper than any that is needed.
        """
        path = self._fetch(filename)
        if path is not None and path.suffix == ".json":
            try:
                CHECKS.get(filename, dict)(read_json(path))  # before any library parses it
            except ValueError as error:
                raise ValueError(f"{filename} of {self.label} cannot be read: {error}") from error
        return path

    def _fetch(self, filename: str) -> Path | None:
        if Path(self.source).is_dir():
            path = Path(self.source) / filename
            return path if path.is_file() else None
        return self._ask(lambda: Path(hf_hub_download(filename=filename, **self._where)))

    def commit_of(self, filename: str) -> str | None:
        """The commit that the revision stands for, or None if it has no such file. Nothing is downloaded."""
        return self._ask(lambda: hf_hub_download(filename=filename, dry_run=True, **self._where).commit_hash)

    @property
    def _where(self) -> dict[str, Any]:
        facts = {"repo_id": str(self.source), "revision": self.revision}
        return {**facts, "token": self.token, "endpoint": self.endpoint}

    @staticmethod
    def _ask(request: Callable[[], T]) -> T | None:
        """The answer of the Hub or of its cache; None where there is no such file."""
        try:
            return request()
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.LocalEntryNotFoundError:
            if is_offline_mode():  # what is not in the cache cannot be told from what does not exist
                return None
            raise

    @contextmanager
    def opened(self, filename: str) -> Iterator[Any]:
        """A safetensors file, open for reading. A missing one, or one that is damaged, is an error of the user's."""
        if (path := self.fetch(filename)) is None:
            raise FileNotFoundError(f"{self.label} lacks {filename}, which its {INDEX_FILE} names")
        try:
            # pread: mapped pages would count as memory, and stay until the file is closed
            with safe_open(path, framework="pt", backend="pread") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{filename} of {self.label} cannot be read: {error}") from error


def pin(files: Files, filename: str) -> tuple[Files, Path | None]:
    """The same files in one commit, even if a branch moves meanwhile, and the first file that is asked of them."""
    if Path(files.source).is_dir():
        files = replace(files, revision=None)
        return files, files.fetch(filename)
    try:
        commit = files.commit_of(filename)
        if commit is None:
            return files, None
        files = replace(files, revision=commit)
        return files, files.fetch(filename)
    except errors.GatedRepoError:
        raise  # says itself what to do
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{files.source} is neither a folder here nor a repository on the Hub that you can read; check the name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{files.source} has no revision {files.revision!r}; give a branch, tag or commit") from error


def read_model_config(folder: str | Path, *, label: str | None = None) -> PreTrainedConfig:
    """The config of the checkpoint in a folder; its sizes are bounded before any library sees them.

    Args:
        label: what errors call the checkpoint; the folder if None.

    Raises:
        FileNotFoundError: if there is no ``config.json``.
        ValueError: if it cannot be that of a model that is known here. No remote code is run.
    """
    with odd_contents(f"{CONFIG_FILE} of {label or folder}"):
        check_model_config(read_json(Path(folder) / CONFIG_FILE))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def empty_model(config: PreTrainedConfig, *, label: str) -> PreTrainedModel:
    """The model of a config, without weights: on the meta device.

    Args:
        label: what errors call the checkpoint that the config comes from.

    Raises:
        ValueError: if no model can be built from it.
    """
    with odd_contents(f"{CONFIG_FILE} of {label}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_weight_map(path: Path, *, label: str | None = None) -> dict[str, str]:
    """Tensor -> file beside it, from the index of a checkpoint in shards.

    Raises:
        ValueError: if it is damaged, or names a file that cannot lie there.
    """
    with odd_contents(f"{path.name} of {label or path.parent}"):
        return check_weight_map(read_json(path))


def stored_tensors(files: Files) -> dict[str, str]:
    """Tensor -> the file it is in, for a checkpoint in one file or in shards.

    Raises:
        FileNotFoundError: if there are no safetensors.
    """
    if files.fetch(WEIGHTS_FILE) is not None:
        with files.opened(WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), WEIGHTS_FILE)
    if (index_file := files.fetch(INDEX_FILE)) is None:
        raise FileNotFoundError(
            f"{files.label} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; pickled weights are never read: load the "
            "model with transformers and save_pretrained it to a folder, then give that folder"
        )
    return read_weight_map(index_file, label=files.label)


def load_tokenizer(folder: str | Path, *, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, without remote code.

    Raises:
        ValueError: if its files are damaged.
    """
    with odd_contents(f"the tokenizer of {label}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def check_loads(source: str | Path, *, revision: str | None = None) -> None:
    """Makes sure that a checkpoint can be loaded, as far as its small files tell: config, tokenizer, generation config.

    Args:
        source: a folder, or a repository on the Hub; with ``revision`` of the repository.

    Raises:
        FileNotFoundError: if there is no config.
        ValueError: if a file is damaged; the message names it.
    """
    files, config_file = pin(Files(source, revision, None, None), CONFIG_FILE)
    if config_file is None:
        raise FileNotFoundError(f"{files.label} holds no {CONFIG_FILE}")
    empty_model(read_model_config(config_file.parent, label=files.label), label=files.label)
    if files.fetch(GENERATION_FILE) is not None:
        with odd_contents(f"{GENERATION_FILE} of {files.label}"):
            GenerationConfig.from_pretrained(config_file.parent)
    found = [files.fetch(name) for name in TOKENIZER_FILES]
    if any(found[:3]):
        load_tokenizer(config_file.parent, label=files.label)
