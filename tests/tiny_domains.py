"""The tiny model and words in the place of SmolLM2 and its three domains, for the studies of restored levels."""

import pytest

from recipes import restore_study
from recipes.demo_data import DOMAINS, Domain
from tests.tiny import tiny_blocks, tiny_model, tiny_tokenizer


def documents(seed: int) -> list[str]:
    return [tiny_tokenizer().decode(block["input_ids"]) for block in tiny_blocks(120, 64, seed=seed)]


def domain(name: str) -> Domain:
    seed = list(DOMAINS).index(name)
    return Domain(documents(seed), documents(seed + 10))


def use_tiny_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_study, "load_smollm2", lambda dtype: (tiny_model(dtype=dtype), tiny_tokenizer()))
    monkeypatch.setattr(restore_study, "load_domain", domain)
