"""The manifest of a level names every file that defines it, and notices every change."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from gisp_hf.levels.manifest import MANIFEST_FILE, check_manifest, write_manifest

FILES = {
    "config.json": b"{}\n",
    "model.safetensors": bytes(range(256)) * 16,
    "modeling_gisp.py": b"x = 1\n",
    "additional_chat_templates/tool.jinja": b"{{ x }}",
}
CHANGING = {"README.md": b"# A level\n", "metrics.json": b"{}\n"}
WAY_OUT = "save the level again; if you changed it on purpose"


@pytest.fixture
def level(tmp_path: Path) -> Path:
    """A saved level, with its manifest, a card and metrics."""
    folder = tmp_path / "sparsity-0.20"
    for name, data in {**FILES, **CHANGING, ".DS_Store": b"junk"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_manifest(folder)
    return folder


def test_manifest_is_size_and_sha256_of_what_defines_the_level(level: Path) -> None:
    assert json.loads((level / MANIFEST_FILE).read_text()) == {
        "format": 1,
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
        },
    }


def test_untouched_level_passes(level: Path) -> None:
    assert check_manifest(level) == frozenset(FILES)


def test_manifest_is_written_the_same_again_and_leaves_nothing(level: Path) -> None:
    first, names = (level / MANIFEST_FILE).read_bytes(), sorted(os.listdir(level))
    write_manifest(level)
    assert (level / MANIFEST_FILE).read_bytes() == first and sorted(os.listdir(level)) == names


def test_manifest_may_be_read_by_whoever_may_read_the_level(level: Path) -> None:
    assert (level / MANIFEST_FILE).stat().st_mode == (level / "config.json").stat().st_mode


def test_card_and_metrics_may_change(level: Path) -> None:
    (level / "README.md").write_text("another card")
    (level / "metrics.json").unlink()
    assert check_manifest(level) == frozenset(FILES)


def test_level_of_an_earlier_version_has_none(level: Path) -> None:
    (level / MANIFEST_FILE).unlink()
    assert check_manifest(level) is None


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(level: Path, name: str) -> None:
    (level / name).unlink()
    with pytest.raises(ValueError, match=f"{level} is not as it was saved: it lacks {name}; {WAY_OUT}"):
        check_manifest(level)


@pytest.mark.parametrize("name", FILES)
def test_other_size_is_named(level: Path, name: str) -> None:
    (level / name).write_bytes(FILES[name][:-1])
    size = len(FILES[name])
    with pytest.raises(ValueError, match=f"{level / name} has {size - 1:,} bytes, and had {size:,}.*{WAY_OUT}"):
        check_manifest(level)


def test_zeroed_tail_is_noticed(level: Path) -> None:
    data = FILES["model.safetensors"]
    (level / "model.safetensors").write_bytes(data[:-512] + bytes(512))
    with pytest.raises(ValueError, match=f"{level}/model.safetensors has other contents .*SHA-256.*{WAY_OUT}"):
        check_manifest(level)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_extra_weights_are_refused(level: Path, name: str) -> None:
    (level / name).write_bytes(b"other weights")
    with pytest.raises(ValueError, match=f"{level / name} was not there when the level was saved; remove it"):
        check_manifest(level)


def test_change_on_purpose_is_accepted_with_a_new_manifest(level: Path) -> None:
    (level / "model.safetensors").write_bytes(b"restored weights")
    write_manifest(level)
    assert check_manifest(level) == frozenset(FILES)


@pytest.mark.parametrize("name", ["model.safetensors", "sub", MANIFEST_FILE])
def test_symbolic_link_is_refused(level: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_bytes(FILES["model.safetensors"])
    (level / name).unlink(missing_ok=True)
    (level / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{level / name} is a symbolic link.*cp -rL"):
        check_manifest(level)


def test_link_to_a_folder_is_not_followed(level: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (level / "code").symlink_to(tmp_path / "secrets", target_is_directory=True)
    with pytest.raises(ValueError, match=f"{level}/code is a symbolic link"):
        write_manifest(level)


GOOD = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": []}',
        json.dumps({"format": 1, "files": {"../x": GOOD}}),
        json.dumps({"format": 1, "files": {"/etc/passwd": GOOD}}),
        json.dumps({"format": 1, "files": {"\x1b[2J": GOOD}}),
        json.dumps({"format": 1, "files": {"x": {"size": -1, "sha256": "0" * 64}}}),
        json.dumps({"format": 1, "files": {"x": {"size": True, "sha256": "0" * 64}}}),
        json.dumps({"format": 1, "files": {"x": {"size": 1, "sha256": "\x1b" * 64}}}),
        json.dumps({"format": 1, "files": {"x": 3}}),
        json.dumps({"format": 1, "files": {}, "padding": "x" * 2**24}),
    ],
    ids=range(13),
)
def test_hostile_manifest_is_refused_in_printable_words(level: Path, text: str) -> None:
    (level / MANIFEST_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{level / MANIFEST_FILE} cannot be used") as error:
        check_manifest(level)
    assert str(error.value).isprintable()


def test_full_disk_leaves_the_old_manifest(level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, names = (level / MANIFEST_FILE).read_bytes(), sorted(os.listdir(level))

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (level / "config.json").write_text('{"a": 1}')
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(level)
    assert (level / MANIFEST_FILE).read_bytes() == before and sorted(os.listdir(level)) == names
