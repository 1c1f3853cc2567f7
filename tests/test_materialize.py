"""Levels cut from the base checkpoint equal levels cut in memory, and cost no more memory than they hold."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.config import level_name
from gisp_hf.levels.materialize import load_level, load_trajectory, materialize
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.pruning.trajectory import Base
from tests.hub_server import HubServer
from tests.tiny import FAMILIES, tiny_blocks, tiny_model, tiny_tokenizer

TOKENS = torch.arange(3, 15)[None]
CASES = [(family, None, "5GB") for family in FAMILIES]
CASES += [("llama", True, "20KB"), ("llama", False, "20KB"), ("gemma2", False, "5GB"), ("qwen2", True, "5GB")]
# The client's own, in the upload of every LFS file.
upload_warning = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def random_trajectory(
    model: PreTrainedModel, base: str | Path, *, seed: int = 0, last: int = 99, **config: int
) -> Trajectory:
    """A random removal order: layers 1 to ``last`` lose all but structure 0 of every block, no other loses anything."""
    layout = discover(model)
    generator = torch.Generator().manual_seed(seed)
    blocks = [(number, block) for number, block in enumerate(layout.blocks) if 1 <= block.layer <= last]
    removable = [(number, index) for number, block in blocks for index in range(1, block.size)]
    order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
    for position, chosen in enumerate(torch.randperm(len(removable), generator=generator).tolist()):
        block, index = removable[chosen]
        order[block][index] = position
    made_from = Base(id=str(base), revision=None, fingerprint=fingerprint(model.named_parameters()))
    return Trajectory(layout=layout, order=tuple(order), config=GISPConfig(**config), base=made_from)


def save_base(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    model.generation_config.max_new_tokens = 7  # not a default, so that a lost generation config shows
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """(folder of the run, folder of the base): a tiny Llama and a random trajectory of it."""
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    random_trajectory(model, base).save(tmp_path / "run")
    return tmp_path / "run", base


def assert_same_model(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    buffers, wanted_buffers = dict(found.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == wanted_buffers.keys()
    for name, tensor in wanted_buffers.items():  # not in the state dict: rotary frequencies, the scale of embeddings
        assert torch.equal(buffers[name], tensor), name
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)


# ---- the same model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied", "shard"), CASES)
def test_a_level_from_files_equals_one_cut_in_memory(
    tmp_path: Path, family: str, tied: bool | None, shard: str
) -> None:
    changes = {} if tied is None else {"tie_word_embeddings": tied}
    model = tiny_model(family, **changes)
    base = save_base(model, tmp_path / "base", max_shard_size=shard)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard != "5GB")
    trajectory = random_trajectory(model, base, seed=len(family))
    trajectory.save(tmp_path / "run")
    generator = torch.Generator().manual_seed(1)
    for sparsity in (torch.rand(2, generator=generator) * trajectory.highest_sparsity()).tolist():
        found = load_level(tmp_path / "run", sparsity=sparsity)
        expected = trajectory.apply(AutoModelForCausalLM.from_pretrained(base), sparsity=sparsity)
        assert_same_model(found, expected)
        assert type(found) is type(expected) and not found.training
        ignored = {"_name_or_path", "name_or_path"}
        configs = [{k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (found, expected)]
        assert configs[0] == configs[1]
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()
        assert found.generation_config.max_new_tokens == 7
        if tied:
            assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_materialized_level_is_the_level_that_the_run_saved(tmp_path: Path) -> None:
    """Byte for byte, for every level of a real run, and a level between them loads as well."""
    model = tiny_model("llama", tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    run = tmp_path / "run"
    pruner = GISPPruner(GISPConfig(num_steps=3, protect_first=1), run, base_model=str(base))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tiny_blocks(24),
        callbacks=[pruner],
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    for level in pruner.config.sparsity_levels:
        written = materialize(run, tmp_path / "cut" / level_name(level), sparsity=level)
        found, saved = (
            {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (written, run / level_name(level))
        )
        facts, saved_facts = (json.loads(files.pop("trajectory.json")) for files in (found, saved))
        assert found == saved
        # while a level is saved, the Trainer has not logged the loss of the step yet
        assert [step["step"] for step in facts.pop("steps")] == [step["step"] for step in saved_facts.pop("steps")]
        assert facts == saved_facts
    between = materialize(run, tmp_path / "between", sparsity=0.37)
    assert AutoTokenizer.from_pretrained(between)("w5 w6")["input_ids"] == [5, 6]
    loaded = AutoModelForCausalLM.from_pretrained(between)
    assert_same_model(loaded, Trajectory.load(run).apply(AutoModelForCausalLM.from_pretrained(base), sparsity=0.37))
    assert str(tmp_path) not in (between / "config.json").read_text()
    order = Trajectory.load(between)
    assert order.highest_sparsity() == Trajectory.load(run).sparsity_at(len(order)) >= 0.37
    assert_same_model(load_level(between, sparsity=0.25), load_level(run, sparsity=0.25))


def test_channel_multiple_is_that_of_the_run_unless_given(tmp_path: Path) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base")
    trajectory = random_trajectory(model, base, channel_multiple=4)
    trajectory.save(tmp_path / "run")
    for multiple in (None, 8):
        found = load_level(tmp_path / "run", sparsity=0.4, channel_multiple=multiple)
        channels = [layer.intermediate_size for layer in found.config.per_layer_config]
        assert all(number % (multiple or 4) == 0 for number in channels) and min(channels) < 24
        dense = AutoModelForCausalLM.from_pretrained(base)
        assert_same_model(found, trajectory.apply(dense, sparsity=0.4, channel_multiple=multiple))
        written = materialize(tmp_path / "run", tmp_path / f"cut-{multiple}", sparsity=0.4, channel_multiple=multiple)
        order = Trajectory.load(written)  # describes the folder it lies in
        counts = [len(keep) for keep in order.kept_at(len(order))]
        assert counts[1::2] == channels and order.config.channel_multiple == (multiple or 4)
    with pytest.raises(ValueError, match="channel_multiple must be at least 1, got 0"):
        load_level(tmp_path / "run", sparsity=0.4, channel_multiple=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_dtype_is_as_asked_else_as_stored(tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None) -> None:
    model = tiny_model(dtype=stored)
    base = save_base(model, tmp_path / "base")
    trajectory = random_trajectory(model, base)
    trajectory.save(tmp_path / "run")
    found = load_level(tmp_path / "run", sparsity=0.3, dtype=asked, device="cpu")
    assert found.dtype == found.config.dtype == (asked or stored)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=asked or stored)
    assert_same_model(found, trajectory.apply(dense, sparsity=0.3))


def test_dtype_of_the_weights_where_the_config_names_none(llama: tuple[Path, Path]) -> None:
    run, base = llama
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    state = {name: tensor.bfloat16() for name, tensor in load((base / "model.safetensors").read_bytes()).items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert load_level(run, sparsity=0.3).dtype == torch.bfloat16  # the fingerprint holds over dtypes


def test_tensors_that_the_model_does_not_have_are_left_alone(llama: tuple[Path, Path]) -> None:
    """Old checkpoints hold the rotary frequencies of every layer."""
    run, base = llama
    expected = load_level(run, sparsity=0.5)
    state = load((base / "model.safetensors").read_bytes())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(load_level(run, sparsity=0.5), expected)


def test_of_tied_weights_either_name_will_do(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    random_trajectory(model, base).save(tmp_path / "run")
    expected = load_level(tmp_path / "run", sparsity=0.5)
    state = load((base / "model.safetensors").read_bytes())
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(load_level(tmp_path / "run", sparsity=0.5), expected)


def test_generation_config_and_tokenizer_may_be_missing(llama: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = llama
    for path in [base / "generation_config.json", *base.glob("tokenizer*"), *base.glob("special_tokens*")]:
        path.unlink(missing_ok=True)
    written = materialize(run, tmp_path / "cut", sparsity=0.5)
    assert not list(written.glob("tokenizer*"))
    assert AutoModelForCausalLM.from_pretrained(written).generation_config.max_new_tokens is None


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_one_changed_weight_is_noticed(tmp_path: Path, shard: str) -> None:
    model = tiny_model()
    random_trajectory(model, "some/base").save(tmp_path / "run")
    weight = model.get_parameter("model.layers.4.mlp.down_proj.weight").data
    weight[3, 5] = torch.nextafter(weight[3, 5].bfloat16(), torch.tensor(9.0).bfloat16())
    base = save_base(model, tmp_path / "base", max_shard_size=shard)
    with pytest.raises(ValueError, match=r"not those of some/base, .* fingerprint [0-9a-f]{12}, expected"):
        load_level(tmp_path / "run", sparsity=0.3, base_model=base)


def test_another_shape_another_family_and_a_pruned_model_are_refused(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    run, base = llama
    bigger = save_base(tiny_model(intermediate_size=32), tmp_path / "bigger")
    with pytest.raises(ValueError, match=r"6 layers, 32,640 .* has 6 layers and 37,248 parameters.*unpruned"):
        load_level(run, sparsity=0.3, base_model=bigger)
    other = save_base(tiny_model("mistral"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"\(type llama\); .*other is of type mistral. Give the unpruned model"):
        load_level(run, sparsity=0.3, base_model=str(other))
    pruned = materialize(run, tmp_path / "pruned", sparsity=0.3)
    with pytest.raises(ValueError, match=r"pruned \(already pruned\) has 6 layers"):
        load_level(run, sparsity=0.3, base_model=pruned)
    assert load_level(run, sparsity=0.3, base_model=base).dtype == torch.float32


def test_a_quantized_base_is_refused(llama: tuple[Path, Path]) -> None:
    run, base = llama
    config = json.loads((base / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ValueError, match="is quantized, and this trajectory was made from"):
        load_level(run, sparsity=0.3)
    (base / "config.json").write_text(json.dumps(config))
    state = load((base / "model.safetensors").read_bytes())
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is of type torch.int8: a quantized checkpoint"):
        load_level(run, sparsity=0.3)


def test_sparsity_beyond_the_trajectory_is_refused_before_the_base_is_looked_for(llama: tuple[Path, Path]) -> None:
    run, _ = llama
    with pytest.raises(ValueError, match="sparsity 0.95 lies beyond this trajectory"):
        load_level(run, sparsity=0.95, base_model="no/such-model")
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\), got 20"):
        load_level(run, sparsity=20, base_model="no/such-model")


def test_damaged_checkpoints_are_refused(llama: tuple[Path, Path]) -> None:
    run, base = llama
    whole = (base / "model.safetensors").read_bytes()
    state = load((base / "model.safetensors").read_bytes())

    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors of .* cannot be read"):
        load_level(run, sparsity=0.3)
    lacking = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    save_file(lacking, base / "model.safetensors")
    with pytest.raises(ValueError, match="lacks model.norm.weight; if transformers can load it"):
        load_level(run, sparsity=0.3)
    save_file({**state, "model.norm.weight": torch.ones(3)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\) in the checkpoint, its config says \(32"):
        load_level(run, sparsity=0.3)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        load_level(run, sparsity=0.3)


@pytest.mark.parametrize("filename", ["../base/secret.safetensors", "/etc/passwd", "weights.bin", 7])
def test_an_index_can_only_name_safetensors_beside_it(llama: tuple[Path, Path], filename: object) -> None:
    run, base = llama
    (base / "model.safetensors").rename(base / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": filename}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no safetensors file beside it"):
        load_level(run, sparsity=0.3)


def test_an_index_that_is_no_index_and_a_missing_shard(llama: tuple[Path, Path]) -> None:
    run, base = llama
    names = list(load((base / "model.safetensors").read_bytes()))
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="index.json of .* cannot be read"):
        load_level(run, sparsity=0.3)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="lacks model-00001-of-00001.safetensors, which its"):
        load_level(run, sparsity=0.3)


def test_folders_without_what_is_needed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = llama
    with pytest.raises(FileNotFoundError, match="base holds no trajectory.json and trajectory.safetensors"):
        load_level(base, sparsity=0.3)
    with pytest.raises(FileNotFoundError, match="is neither a folder here nor a repository"):
        load_level(tmp_path / "nowhere", sparsity=0.3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="base model was not found: .*empty holds no config.json; base_model="):
        load_level(run, sparsity=0.3, base_model=tmp_path / "empty")


def test_nothing_half_written_stays(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = llama
    output = tmp_path / "out" / "level"
    mine = tmp_path / "out" / "level.tmp"
    mine.mkdir(parents=True)
    stale = tmp_path / "out" / ".level.0123456789abcdef.tmp"  # of a run that was killed
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").touch()
    first = materialize(run, output, sparsity=0.3)
    assert sorted(path.name for path in output.parent.iterdir()) == ["level", "level.tmp"]
    assert [path.name for path in first.glob("model*.safetensors")] == ["model.safetensors"]
    with pytest.raises(FileExistsError, match="level exists already; remove it or choose another"):
        materialize(run, output, sparsity=0.4)

    def full_disk(self: Trajectory, folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(Trajectory, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        materialize(run, tmp_path / "out" / "second", sparsity=0.3)
    assert sorted(path.name for path in output.parent.iterdir()) == ["level", "level.tmp"]


# ---- from the Hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"hf_owner": "me", "hf_other": "you"}) as server:
        yield server


def upload(hub: HubServer, folder: Path, repo_id: str) -> str:
    """Uploads a folder and returns the commit."""
    api = HfApi(endpoint=hub.url, token="hf_owner")
    api.create_repo(repo_id, private=True, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder).oid


@upload_warning
def test_trajectory_and_base_come_from_the_hub_in_the_revisions_that_were_named(hub: HubServer, tmp_path: Path) -> None:
    model = tiny_model()
    base = save_base(model, tmp_path / "base", max_shard_size="20KB")
    commit = upload(hub, base, "me/base")
    trajectory = random_trajectory(model, "me/base")
    made_from = Base(id="me/base", revision=commit, fingerprint=trajectory.base.fingerprint)
    trajectory = Trajectory(trajectory.layout, trajectory.order, trajectory.config, made_from)
    trajectory.save(tmp_path / "run")
    levels_commit = upload(hub, tmp_path / "run", "me/levels")
    upload(hub, save_base(tiny_model(seed=1), tmp_path / "changed", max_shard_size="20KB"), "me/base")  # main moves on

    with pytest.raises(FileNotFoundError, match="me/levels is neither a folder here nor .* log in with"):
        load_trajectory("me/levels", endpoint=hub.url, token="hf_other")  # it is private
    hub.requests.clear()
    access = {"endpoint": hub.url, "token": "hf_owner"}
    found = load_level("me/levels", sparsity=0.45, **access)
    assert_same_model(found, trajectory.apply(AutoModelForCausalLM.from_pretrained(base), sparsity=0.45))
    asked = {(record.path.split("/resolve/")[0], record.path.split("/")[-2]) for record in hub.requests}
    assert {revision for path, revision in asked if path == "/me/base"} == {commit}
    assert {record.path.split("/")[-1] for record in hub.requests if "/me/levels/resolve" in record.path} == {
        "trajectory.json",
        "trajectory.safetensors",
    }
    written = materialize("me/levels", tmp_path / "cut", sparsity=0.45, revision=levels_commit, **access)
    assert_same_model(AutoModelForCausalLM.from_pretrained(written), found)
    assert AutoTokenizer.from_pretrained(written)("w5 w6")["input_ids"] == [5, 6]
    assert "hf_owner" not in "".join(path.read_text(errors="replace") for path in written.iterdir())

    with pytest.raises(ValueError, match=f"not those of me/base at revision {commit}"):
        load_level("me/levels", sparsity=0.45, base_revision="main", **access)
    with pytest.raises(ValueError, match="me/levels has no revision 'v9'; give a branch"):
        load_trajectory("me/levels", revision="v9", **access)
    with pytest.raises(FileNotFoundError, match="me/nothing is neither a folder here nor a repository on the Hub"):
        load_trajectory("me/nothing", **access)
    with pytest.raises(FileNotFoundError, match="me/base holds no trajectory.json"):
        load_trajectory("me/base", **access)


@upload_warning
def test_a_base_that_is_gone_is_asked_for(hub: HubServer, llama: tuple[Path, Path]) -> None:
    run, base = llama
    facts = json.loads((run / "trajectory.json").read_text())
    facts["base"]["id"] = "me/gone"
    (run / "trajectory.json").write_text(json.dumps(facts))
    with pytest.raises(FileNotFoundError, match="base model was not found: me/gone is neither .*; base_model= names"):
        load_level(run, sparsity=0.3, endpoint=hub.url, token="hf_owner")
    assert load_level(run, sparsity=0.3, base_model=base).dtype == torch.float32


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from gisp_hf import Trajectory
from gisp_hf.levels.materialize import load_level

way, run, base, small_run = sys.argv[1:]
load_level(small_run, sparsity=0.3)  # every import and every lazy table is there before measuring
def status(key):  # not ru_maxrss: a child of pytest inherits the peak of pytest itself
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

before = status("VmRSS")
if way == "streamed":
    model = load_level(run, sparsity=0.6)
else:
    model = Trajectory.load(run).apply(AutoModelForCausalLM.from_pretrained(base), sparsity=0.6)
print(status("VmHWM") - before, model.num_parameters() * 4)
"""


def measure(way: str, run: Path, base: Path, small_run: Path) -> tuple[int, int]:
    """Bytes by which the highest resident size of a fresh process exceeds what it held before; bytes of the model."""
    command = [sys.executable, "-c", MEASURE, way, str(run), str(base), str(small_run)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    increase, size = done.stdout.split()
    return int(increase), int(size)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_peak_memory_is_the_pruned_model_and_little_more(tmp_path: Path, llama: tuple[Path, Path]) -> None:
    """Measured as resident size, in which mapped files count too, so that mapping the checkpoint would show."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 4096}
    model = tiny_model("llama", **sizes)
    base = save_base(model, tmp_path / "large")
    random_trajectory(model, base).save(tmp_path / "large-run")
    dense_size = sum(parameter.numel() for parameter in model.parameters()) * 4
    del model
    assert 150e6 < dense_size < 250e6
    streamed, pruned_size = measure("streamed", tmp_path / "large-run", base, llama[0])
    print(f"dense {dense_size / 1e6:.0f} MB, pruned {pruned_size / 1e6:.0f} MB, peak {streamed / 1e6:.0f} MB")
    assert pruned_size < 0.55 * dense_size
    assert streamed >= pruned_size  # the measure does see the model
    # A tensor, its checksum, and what the allocator keeps of freed ones: 64 MB, whatever the size of the model.
    assert streamed < pruned_size + 64e6 < dense_size
