"""Cards say what is true of the checkpoints, parse as the Hub wants them, and give nothing away."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoModelForCausalLM

from gisp_hf import Trajectory
from gisp_hf.hub import LevelInfo, cards, read_levels
from gisp_hf.hub.cards import check_card, level_card, main_card
from gisp_hf.levels.materialize import materialize
from gisp_hf.pruning.trajectory import Base
from gisp_hf.report.curves import has_curves, perplexity_picture
from tests.test_materialize import random_trajectory, save_base
from tests.tiny import tiny_model

REPO = "me/tiny-gisp"
LAYERS = 10
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "aB3" * 11
CALIBRATION: dict[str, Any] = {
    "name": "c4",
    "objective": "language_modelling",
    "tokens": 512_000,
    "seed": 0,
    "correct": None,
    "sources": [
        {"name": "c4", "hub_id": "allenai/c4", "config": "en", "split": "train", "revision": COMMIT, "records": 2000},
        {"name": "mine", "hub_id": None, "config": None, "split": None, "revision": None, "tokens": 7},
    ],
}


def perplexity(value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="Salesforce/wikitext",
        dataset_name="WikiText-2",
        dataset_config="wikitext-2-raw-v1",
        dataset_split="test",
        metric_type="perplexity",
        metric_value=value,
        dataset_args={"window": 128},
    )


METRICS = {0.0: [perplexity(12.19)], 0.2: [perplexity(17.014)], 0.5: [perplexity(1064.07)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with the levels 0.2 and 0.5, of a model whose two last layers stay as they are."""
    folder = tmp_path_factory.mktemp("cards")
    model = tiny_model(num_hidden_layers=LAYERS)
    random_trajectory(model, save_base(model, folder / "base"), last=LAYERS - 3).save(folder / "run")
    for level in (0.2, 0.5):
        materialize(folder / "run", folder / "run" / f"sparsity-{level:.2f}", sparsity=level)
    return folder / "run"


@pytest.fixture
def levels(run: Path) -> list[LevelInfo]:
    return read_levels(run)


@pytest.fixture
def trajectory(run: Path) -> Trajectory:
    """As if the base model had come from the Hub."""
    found = Trajectory.load(run)
    return replace(found, base=Base("HuggingFaceTB/Tiny", COMMIT, found.base.fingerprint), calibration=CALIBRATION)


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without the line of rules."""
    lines = text.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len({len(row) for row in rows}) == 1 and set(rows[1]) == {"---"}
    return [rows[0], *rows[2:]]


def spans(rows: list[list[str]]) -> dict[int, list[str]]:
    """Layer -> cells, of a table whose first column is ``3`` or ``4-5``."""
    cells = {}
    for first, *rest in rows[1:]:
        start, _, end = first.partition("-")
        cells |= {layer: rest for layer in range(int(start), int(end or start) + 1)}
    return cells


# ---- what the Hub reads ----------------------------------------------------------------------------------------------


def test_metadata_of_main_and_of_a_level(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    main = metadata(main_card(trajectory, levels, repo_id=REPO, metrics=METRICS, license="apache-2.0"))
    index = main.pop("model-index")
    assert main == {
        "base_model": "HuggingFaceTB/Tiny",
        "base_model_relation": "finetune",
        "datasets": ["allenai/c4"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["perplexity"],
        "pipeline_tag": "text-generation",
        "tags": ["gisp", "pruning", "structured-pruning", "model-compression"],
    }
    text = level_card(trajectory, levels[1], repo_id=REPO, metrics=METRICS, license="apache-2.0", datasets=["me/data"])
    level = metadata(text)
    assert level.pop("model-index") != index  # main holds the mildest level, so its results are those
    assert level == {**main, "datasets": ["me/data"]}
    assert ModelCard(text).data.eval_results == METRICS[0.5]
    assert ModelCard(main_card(trajectory, levels, repo_id=REPO, metrics=METRICS)).data.eval_results == METRICS[0.2]
    assert index[0]["name"] == "tiny-gisp"


def test_no_results_no_model_index(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    for text in (main_card(trajectory, levels, repo_id=REPO), level_card(trajectory, levels[0], repo_id=REPO)):
        assert not {"model-index", "metrics", "model_name", "license"} & set(metadata(text))
        assert "No results came with this card: measure" in text


def test_a_base_that_is_not_on_the_hub_is_not_named(run: Path, levels: list[LevelInfo], monkeypatch: Any) -> None:
    trajectory = Trajectory.load(run)
    monkeypatch.chdir(run.parent)
    for base in (trajectory.base.id, "run/sparsity-0.20", "LlamaForCausalLM", "../base", "C:\\models\\x"):
        for render in (lambda t: main_card(t, levels, repo_id=REPO), lambda t: level_card(t, levels[0], repo_id=REPO)):
            text = render(replace(trajectory, base=Base(base, None, trajectory.base.fingerprint)))
            assert "base_model" not in metadata(text) and base not in text
            assert "A model that is not on the Hub" in text
            assert 'base_model="folder of the unpruned model")' in text


LICENSES = [
    ("license: mit", {"license": "mit"}, "That of the base model: `mit`."),
    (
        "license: other\nlicense_name: tiny\nlicense_link: LICENSE.md",
        {
            "license": "other",
            "license_name": "tiny",
            "license_link": "https://huggingface.co/HuggingFaceTB/Tiny/blob/main/LICENSE.md",
        },
        "That of the base model: `tiny`.",
    ),
    (
        "license: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny",
        {"license": "other", "license_name": "tiny", "license_link": "https://example.org/tiny"},
        "`tiny`",
    ),
    ("license:\n- mit\n- apache-2.0", {"license": ["mit", "apache-2.0"]}, "`mit, apache-2.0`"),
    ("tags: [a]", {}, "so the metadata name none."),
    ("tags: [", {}, "so the metadata name none."),
    ("- a list", {}, "so the metadata name none."),
]


@pytest.mark.parametrize(("front", "expected", "sentence"), LICENSES)
def test_the_license_is_inherited_from_the_cached_card(
    trajectory: Trajectory,
    levels: list[LevelInfo],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    front: str,
    expected: dict[str, Any],
    sentence: str,
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    asked = []

    def cached(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "README.md")

    monkeypatch.setattr(cards, "try_to_load_from_cache", cached)
    text = level_card(trajectory, levels[0], repo_id=REPO)
    assert {key: value for key, value in metadata(text).items() if key.startswith("license")} == expected
    assert sentence in text.split("## License")[1]
    assert asked == [("HuggingFaceTB/Tiny", "README.md", COMMIT)]
    assert metadata(level_card(trajectory, levels[0], repo_id=REPO, license="gpl-3.0"))["license"] == "gpl-3.0"


# ---- what people read ------------------------------------------------------------------------------------------------


def test_the_tables_tell_the_sizes_of_the_checkpoints(run: Path, trajectory: Trajectory) -> None:
    levels = [replace(level, commit=COMMIT) for level in read_levels(run)]
    main = main_card(trajectory, levels, repo_id=REPO, metrics=METRICS)
    head, *rows = table(main, "Levels")
    assert head == ["revision", "removed", "parameters", "WikiText-2 perplexity", "commit"]
    dense = tiny_model(num_hidden_layers=LAYERS)
    assert rows[0] == ["unpruned", "0.0 %", f"{dense.num_parameters():,}", "12.19", "-"]
    in_main = spans(table(main, "What is left in each layer"))
    for column, (level, shown) in enumerate(zip(levels, ("17.01", "1,064"))):
        pruned = AutoModelForCausalLM.from_pretrained(run / level.name)
        removed = 1 - sum(p.numel() for p in pruned.model.layers.parameters()) / trajectory.layout.total
        numbers = [f"{100 * removed:.1f} %", f"{pruned.num_parameters():,}", shown, "`01234567`"]
        assert rows[column + 1] == [f"`{level.name}`", *numbers]

        text = level_card(trajectory, level, repo_id=REPO, metrics=METRICS)
        assert f"**{numbers[0]}** of the parameters" in text
        assert f"**{numbers[1]}** parameters instead of {dense.num_parameters():,}." in text
        layers = spans(table(text, "What is left in each layer"))
        assert sorted(layers) == sorted(in_main) == list(range(LAYERS))
        gone = [0, 0]
        for number, layer in enumerate(pruned.model.layers):
            heads, groups = (layer.self_attn.get_submodule(f"{x}_proj").out_features // 4 for x in "qk")
            channels = layer.mlp.down_proj.in_features
            assert layers[number] == [f"{heads} of 8", f"{groups} of 4", f"{channels} of 24"]
            assert in_main[number][0] == "4 / 24" and in_main[number][column + 1] == f"{groups} / {channels}"
            gone[0], gone[1] = gone[0] + 4 - groups, gone[1] + 24 - channels
        sentence = (
            f"{gone[0]} of 40 key/value groups and {gone[1]} of 240 MLP channels are gone (a group has 2 query heads)"
        )
        assert sentence in " ".join(text.split())
        assert table(text, "Results")[1:] == [["unpruned", "12.19"], [f"`{level.name}`", shown]]
        assert "WikiText-2 perplexity with window 128." in text
    assert table(main, "What is left in each layer")[-1][0] == "8-9"  # one row for layers that are alike


def test_plain_numbers_are_shown_where_there_are_no_results(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    levels = [replace(levels[0], metrics={"tokens/s": 31.25}), levels[1]]
    rows = table(main_card(trajectory, levels, repo_id=REPO), "Levels")
    assert [row[3] for row in rows] == ["tokens/s", "-", "31.25", "-"] and rows[0][-1] == "tokens/s"
    assert table(level_card(trajectory, levels[0], repo_id=REPO), "Results")[1:] == [["`sparsity-0.20`", "31.25"]]


def test_the_code_in_the_cards_runs(run: Path, trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    """With the repository's name replaced by folders, as nothing is on the Hub."""
    for text in (main_card(trajectory, levels, repo_id=REPO), level_card(trajectory, levels[1], repo_id=REPO)):
        load, remote, cut, adapt = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for source in (load, remote):
            assert source.count(f'"{REPO}"') == source.count('revision="sparsity-0.50"') > 0
            compile(source, "card", "exec")
        names: dict[str, Any] = {}
        source = load.replace(f'"{REPO}"', repr(str(run / "sparsity-0.50"))).replace('revision="sparsity-0.50"', "")
        exec(source, names)
        assert names["model"].num_parameters() == levels[1].parameters
        assert names["tokenizer"]("w5")["input_ids"] == [5]
        exec(adapt, names)
        trained = {name.split(".lora_")[0] for name, p in names["adapted"].named_parameters() if p.requires_grad}
        assert len(trained) == 2 * LAYERS and all(name.endswith(("q_proj", "v_proj")) for name in trained)
        base = f", base_model={str(run.parent / 'base')!r})"
        exec(cut.replace(f'"{REPO}"', repr(str(run))).replace(")", base), names)
        assert levels[1].parameters < names["model"].num_parameters()


def test_how_it_was_made(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    text = main_card(
        trajectory, levels, repo_id=REPO, versions={"torch": "2.13.0", "gisp_hf": "0.1.0"}, command="prune me --twice"
    )
    made = text.split("## How it was made")[1]
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", made, re.DOTALL)[0]) == trajectory.config.to_dict()
    assert f"revision `{COMMIT}` (`llama`)" in made and f"`{trajectory.base.fingerprint}`" in made
    assert "- calibration data: name c4, objective language_modelling, tokens 512,000, seed 0\n" in made
    assert f"- calibration source: allenai/c4, en, train, revision {COMMIT}, 2,000 records\n" in made
    assert "- calibration source: a local file, 7 tokens\n" in made
    assert "- versions: gisp_hf 0.1.0, torch 2.13.0\n" in made
    assert "```bash\nprune me --twice\n```" in made
    assert "in 80 steps with new scores in each" in made and "2510.18030" in made
    plain = main_card(replace(trajectory, calibration={}), levels, repo_id=REPO)
    assert "calibration data: not recorded" in plain and "versions:" not in plain and "```bash" not in plain


def test_the_same_arguments_give_the_same_text(
    trajectory: Trajectory, levels: list[LevelInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = main_card(trajectory, levels, repo_id=REPO, metrics=METRICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert main_card(trajectory, levels, repo_id=REPO, metrics=METRICS) == first
    assert first.endswith("\n") and not first.endswith("\n\n") and "\n\n\n" not in first
    pushed = [replace(level, commit=COMMIT) for level in levels]  # a level's card must not change when it is pushed
    assert level_card(trajectory, pushed[0], repo_id=REPO) == level_card(trajectory, levels[0], repo_id=REPO)


@pytest.mark.parametrize("template", ["main.md", "level.md"])
def test_templates_and_code_agree_on_names(
    trajectory: Trajectory, levels: list[LevelInfo], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """A name that only one of them knows would render as nothing, without an error."""
    given: Mapping[str, Any] = {}
    from_template = ModelCard.from_template

    def spy(data: Any, **names: Any) -> ModelCard:
        nonlocal given
        given = names
        return from_template(data, **names)

    monkeypatch.setattr(ModelCard, "from_template", spy)
    main_card(trajectory, levels, repo_id=REPO) if template == "main.md" else level_card(
        trajectory, levels[0], repo_id=REPO
    )
    used = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(given["template_str"]))
    assert used == {*given, "card_data"} - {"template_str"}


# ---- what nobody should read -----------------------------------------------------------------------------------------

SECRETS = [
    (f"prune.py --hub-token {TOKEN} --x", "prune.py --hub-token <token> --x"),
    ("prune.py --token=swordfish", "prune.py --token=<token>"),
    ("HF_TOKEN=swordfish prune.py", "HF_TOKEN=<token> prune.py"),
    (f"prune.py {TOKEN}", "prune.py <token>"),
    ("prune.py --out /home/me/runs/x", "prune.py --out <path>"),
    ("prune.py --out=/home/me --data ~/c4 ../x ~me/y", "prune.py --out=<path> --data <path> <path> <path>"),
    ("prune.py 'C:\\Users\\me\\x' \\\\server\\share", "prune.py '<path>' <path>"),
    ("prune.py --url https://example.org/a/b --model me/x", "prune.py --url https://example.org/a/b --model me/x"),
    ("prune.py --data file:///srv/c4", "prune.py --data <path>"),
]


@pytest.mark.parametrize(("command", "shown"), SECRETS)
def test_tokens_and_paths_are_taken_out(
    trajectory: Trajectory, levels: list[LevelInfo], command: str, shown: str
) -> None:
    text = level_card(trajectory, levels[0], repo_id=REPO, command=command)
    assert f"```bash\n{shown}\n```" in text
    noted = replace(trajectory, calibration={"name": command, "other": [command], "sources": [{"hub_id": command}]})
    text = main_card(noted, levels, repo_id=REPO, versions={"x": command}, datasets=["me/data"])
    assert text.count(" ".join(shown.split())) == 3 and (command == shown or command not in text)


def test_values_cannot_break_out_of_their_place(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    nasty = "x | y\n\n# Heading `code` {{ repo_id }} {% raise %}"
    noted = replace(trajectory, calibration={"name": nasty})
    text = main_card(noted, levels, repo_id=REPO, versions={nasty: nasty}, command="a\n```\n# Heading")
    assert "name x \\| y # Heading 'code' {{ repo_id }} {% raise %}" in text
    assert text.count("```") == main_card(noted, levels, repo_id=REPO, command="a").count("```")
    assert "\n# Heading `" not in text


def test_requests_that_cannot_be_met(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    with pytest.raises(ValueError, match="levels is empty"):
        main_card(trajectory, [], repo_id=REPO)
    with pytest.raises(ValueError, match=r"metrics has results for \[0.3\], and the levels are \[0.2, 0.5\]"):
        main_card(trajectory, levels, repo_id=REPO, metrics={0.3: [perplexity(1.0)]})
    for name in ("no-user", "/home/me/x", "me/a/b"):
        with pytest.raises(ValueError, match="is no id on the Hub; use user/name"):
            main_card(trajectory, levels, repo_id=name)
    with pytest.raises(ValueError, match="license 'Apache License' is no identifier of the Hub"):
        main_card(trajectory, levels, repo_id=REPO, license="Apache License")
    with pytest.raises(ValueError, match="license other needs license_name and license_link too"):
        main_card(trajectory, levels, repo_id=REPO, license="other")
    with pytest.raises(ValueError, match="datasets names '/srv/c4', which is no id on the Hub"):
        main_card(trajectory, levels, repo_id=REPO, datasets=["/srv/c4"])
    with pytest.raises(ValueError, match="the result perplexity is nan; give a finite number"):
        main_card(trajectory, levels, repo_id=REPO, metrics={0.2: [perplexity(float("nan"))]})


BROKEN = [
    (r"\A---\n", "", "the card has no metadata"),
    ("library_name: transformers", "library_name: [", "no valid YAML"),
    ("library_name: transformers\n", "", "lack library_name"),
    ("pipeline_tag: text-generation\n", "", "lack pipeline_tag"),
    ("base_model_relation: finetune", "base_model_relation: pruned", "the Hub knows adapter, finetune, merge"),
    ("base_model: HuggingFaceTB/Tiny", "base_model: a/b/c", "base_model names 'a/b/c'"),
    ("dataset:\n      name: WikiText-2", "dataset:\n      title: WikiText-2", "Invalid `model_index`"),
    ("value: 17.014", "value: '17'", "the result perplexity is '17'"),
    ("## Limits", f"## Limits\n\n{TOKEN}", r"shows a token \(hf_aB3...\)"),
    ("## Limits", "## Limits\n\nsee /home/me/notes.txt", r"a path of a machine \(/home/me/notes.txt\)"),
]


@pytest.mark.parametrize(("pattern", "replacement", "message"), BROKEN)
def test_check_card_refuses(
    trajectory: Trajectory, levels: list[LevelInfo], pattern: str, replacement: str, message: str
) -> None:
    text = main_card(trajectory, levels, repo_id=REPO, metrics=METRICS)
    check_card(text)
    broken = re.sub(pattern, lambda match: replacement, text, count=1)
    assert broken != text
    with pytest.raises(ValueError, match=message):
        check_card(broken)


# ---- vLLM, report, curves --------------------------------------------------------------------------------------------


def test_the_command_for_vllm(trajectory: Trajectory, levels: list[LevelInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"vllm serve {REPO} --revision {levels[0].name}"
    card = level_card(trajectory, levels[0], repo_id=REPO)
    assert f"{command} --trust-remote-code\n" in card and "tried with levels of Llama models only" not in card
    mistral = replace(trajectory, layout=replace(trajectory.layout, architecture="mistral"))
    assert "tried with levels of Llama models only" in level_card(mistral, levels[0], repo_id=REPO)
    monkeypatch.setattr(cards, "is_plain", lambda trajectory: True)
    assert f"{command}\n" in level_card(trajectory, levels[0], repo_id=REPO)


def test_the_main_card_shows_what_lies_beside_it(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    card = main_card(trajectory, levels, repo_id=REPO, report="report.html", curves="perplexity.png")
    assert "![Perplexity by sparsity](perplexity.png)" in card and "[`report.html`](report.html)" in card
    check_card(card)
    alone = main_card(trajectory, levels, repo_id=REPO)
    assert "report.html" not in alone and "perplexity.png" not in alone


def test_the_picture_needs_a_perplexity_of_two_levels(levels: list[LevelInfo]) -> None:
    measured = [replace(level, metrics={"perplexity": 20.0 + i}) for i, level in enumerate(levels)]
    assert len(levels) > 1 and has_curves(measured)
    assert perplexity_picture(measured) == perplexity_picture(measured)
    assert perplexity_picture(measured).startswith(b"\x89PNG")
    assert not has_curves([replace(level, metrics={"accuracy": 0.5}) for level in levels])
    assert not has_curves([measured[0], *(replace(level, metrics={}) for level in levels[1:])])


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def test_the_commands_for_llama_cpp(trajectory: Trajectory, levels: list[LevelInfo]) -> None:
    card = level_card(trajectory, levels[0], repo_id=REPO, license="mit")
    name = f"{REPO.rpartition('/')[2]}-sparsity-0.20-F16.gguf"
    assert f"gisp-hf export {REPO} --revision sparsity-0.20 --gguf {name}\nllama-cli -m {name}" in card
    assert f'echo "FROM {name}" > Modelfile' in card and "hf download" not in card
    card = level_card(trajectory, levels[0], repo_id=REPO, license="mit", gguf="mine.gguf")
    assert f"hf download {REPO} mine.gguf --revision sparsity-0.20 --local-dir .\nllama-cli -m mine.gguf" in card
    assert "gisp-hf export" not in card
    assert f"--revision sparsity-0.50 --gguf {name.replace('0.20', '0.50')}" in main_card(
        trajectory, levels, repo_id=REPO, license="mit"
    )


@pytest.mark.parametrize(("family", "padded"), [("gemma2", True), ("unknown", None)])
def test_families_that_llama_cpp_holds_at_full_size_or_not_at_all(
    family: str, padded: bool | None, trajectory: Trajectory, levels: list[LevelInfo]
) -> None:
    other = replace(trajectory, layout=replace(trajectory.layout, architecture=family))
    card = level_card(other, levels[0], repo_id=REPO, license="mit")
    assert ("F16.gguf --pad\n" in card) is bool(padded) and ("neither smaller nor faster" in card) is bool(padded)
    assert ("## llama.cpp" in card) is (padded is not None)
