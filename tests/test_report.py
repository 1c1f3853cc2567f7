"""The report of a run: its numbers are those of the levels, it loads nothing, and hostile texts stay texts."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_hf import Trajectory
from gisp_hf.cli.main import build_parser, main
from gisp_hf.hub import LevelInfo, read_levels, write_metrics
from gisp_hf.report.facts import report_facts
from gisp_hf.report.html import render_page, report_page
from gisp_hf.report.samples import Sample, generate_samples, read_samples, write_samples
from tests.hub_server import HubServer
from tests.runs import LEVELS, prune
from tests.tiny import tiny_model

NAMES = [f"sparsity-{level:.2f}" for level in LEVELS]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028"
BROWSER = shutil.which("chromium")

upload_warning = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    prune(tiny_model(), folder)
    for number, name in enumerate(NAMES):
        write_metrics(folder / "levels" / name, {"perplexity": 30.0 + number, "piqa/acc": 0.7 - number / 10})
    return folder / "levels"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


class Page(HTMLParser):
    """The elements of a page, with their attributes and the text directly inside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def facts(self) -> dict[str, Any]:
        (text,) = [text for tag, attributes, text in self.elements if attributes.get("id") == "facts"]
        return json.loads(text)


def page_of(folder: Path, **options: Any) -> str:
    return report_page(Trajectory.load(folder), read_levels(folder), source=folder, folder=folder, **options)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_facts_are_the_numbers_of_the_levels(run: Path) -> None:
    facts = Page(page_of(run)).facts()
    trajectory = Trajectory.load(run)
    dense = tiny_model()
    assert facts["dense"]["parameters"] == dense.num_parameters()
    assert [level["name"] for level in facts["levels"]] == NAMES
    for name, found in zip(NAMES, facts["levels"], strict=True):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        left = sum(parameter.numel() for parameter in model.model.layers.parameters())
        assert found["parameters"] == model.num_parameters()
        assert found["removed"] == pytest.approx(1 - left / trajectory.layout.total)
        assert found["bytes"] == (run / name / "model.safetensors").stat().st_size
        assert found["metrics"] == json.loads((run / name / "metrics.json").read_text())
        attention, mlp = facts["layers"]
        for number, (layer, before) in enumerate(zip(model.model.layers, dense.model.layers)):
            assert mlp["sizes"][number] == before.mlp.down_proj.in_features
            assert mlp["kept"][name][number] == layer.mlp.down_proj.in_features
            head_dim = layer.self_attn.head_dim
            assert attention["sizes"][number] == before.self_attn.k_proj.out_features // head_dim
            assert attention["kept"][name][number] == layer.self_attn.k_proj.out_features // head_dim


def test_charts_hold_the_metrics_and_the_loss(run: Path) -> None:
    rows = [{"level": "dense", "perplexity": 20.5, "text": "w4 w5 w6 w7"}]
    rows += [{"level": name, "pruned": 50.0 + n, "text": f"w4 w5 w8 w{10 + n}"} for n, name in enumerate(NAMES)]
    (run / "results.json").write_text(json.dumps(rows))
    (run / "speed.json").write_text(json.dumps([{"level": NAMES[1], "decode": 12.5, "prefill": None}]))
    facts = Page(page_of(run)).facts()
    removed = [level["removed"] for level in facts["levels"]]
    perplexity, accuracy, speed, loss = facts["charts"]
    assert (perplexity["name"], perplexity["dense"], perplexity["better"]) == ("perplexity", 20.5, "lower")
    assert perplexity["series"] == [
        {"label": "restored", "points": [[x, 30.0 + n] for n, x in enumerate(removed)]},
        {"label": "before restoration", "points": [[x, 50.0 + n] for n, x in enumerate(removed)]},
    ]
    assert (accuracy["name"], accuracy["dense"], accuracy["better"]) == ("piqa/acc", None, "higher")
    assert accuracy["series"][0]["points"] == [[x, 0.7 - n / 10] for n, x in enumerate(removed)]
    assert speed["name"] == "decode tokens/s" and speed["series"][0]["points"] == [[removed[1], 12.5]]
    steps = Trajectory.load(run).steps
    before = [0.0, *(step.sparsity for step in steps)]
    assert loss["series"][0]["points"] == [[x, step.loss] for step, x in zip(steps, before) if step.loss is not None]
    assert facts["samples"] == [
        {"prompt": "w4 w5", "texts": {"unpruned": "w6 w7", **{name: f"w8 w{10 + n}" for n, name in enumerate(NAMES)}}}
    ]


def test_results_of_another_shape_are_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = page_of(run)
    for text in ('{"level": 1}', "[1]", "no json", '[{"level": "dense", "text": 5}]', '[{"level": 3}]'):
        (run / "results.json").write_text(text)
        assert page_of(run) == expected
    assert caplog.text.count("the report leaves it out") == 4


def test_samples_are_greedy_continuations(run: Path) -> None:
    found = generate_samples(run, read_levels(run)[:2], ["w5 w9", "w7"], max_new_tokens=4)
    for sample in found:
        assert list(sample.texts) == NAMES[:2]
        for name, text in sample.texts.items():
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(run / name),
                AutoTokenizer.from_pretrained(run / name),
            )
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
            new = []
            for _ in range(4):
                with torch.no_grad():
                    token = model(ids).logits[:, -1:].argmax(-1)
                if token.item() == 2:  # end of text
                    break
                new.append(token.item())
                ids = torch.cat([ids, token], dim=1)
            assert text == tokenizer.decode(new, skip_special_tokens=True)
    write_samples(run, found)
    assert read_samples(run, NAMES) == found
    assert read_samples(run, NAMES[:1]) == [replace(one, texts={NAMES[0]: one.texts[NAMES[0]]}) for one in found]
    assert Page(page_of(run)).facts()["samples"] == [{"prompt": s.prompt, "texts": s.texts} for s in found]


def test_commands_can_be_typed(run: Path) -> None:
    trajectory, levels = Trajectory.load(run), read_levels(run)
    for source in (run, "me/tiny-gisp"):
        for name, found in report_facts(trajectory, levels, source=source, title="x")["commands"].items():
            texts = {one["title"]: one["text"] for one in found}
            assert list(texts) == ["Transformers", "PEFT", "vLLM", "llama.cpp", "Any other sparsity"]
            place = f"{run}/{name} " if source == run else f"me/tiny-gisp --revision {name} "
            assert texts["vLLM"].startswith(f"vllm serve {place}--trust-remote-code")
            compile(texts["Transformers"] + "\n" + texts["PEFT"], "commands", "exec")
            for line in (texts["llama.cpp"] + "\n" + texts["Any other sparsity"]).splitlines():
                if line.startswith("gisp-hf "):
                    build_parser().parse_args(line.split()[1:])
            assert (f'("me/tiny-gisp", revision="{name}")' in texts["Transformers"]) == (source != run)
    values: dict[str, Any] = {}
    found = report_facts(trajectory, levels, source=run, title="x")["commands"][NAMES[2]]
    exec(found[0]["text"], values)  # the command that a reader copies
    assert values["model"].num_parameters() == levels[2].parameters


# ---- safety ----------------------------------------------------------------------------------------------------------


def hostile_page(run: Path) -> str:
    trajectory = Trajectory.load(run)
    trajectory = replace(trajectory, base=replace(trajectory.base, id=HOSTILE[:150]))
    samples = [Sample(HOSTILE, {"unpruned": HOSTILE, NAMES[0]: HOSTILE})]
    return report_page(trajectory, read_levels(run), source=f"me/{HOSTILE}", title=HOSTILE, samples=samples)


def test_hostile_texts_stay_texts(run: Path) -> None:
    text = hostile_page(run)
    page = Page(text)
    harmless = Page(page_of(run))
    assert [tag for tag, _, _ in page.elements] == [tag for tag, _, _ in harmless.elements]
    assert page.facts()["samples"][0]["texts"]["unpruned"] == HOSTILE
    assert text.count("onerror") == 1 + text.count("\\u003cimg") and "<img" not in text and "\u2028" not in text
    (title,) = [found for tag, _, found in page.elements if tag == "title"]
    assert title.strip().startswith("</script>") and html.escape("</script>") in text


def test_the_page_loads_nothing(run: Path) -> None:
    text = page_of(run)
    page = Page(text)
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not attributes.keys() & {"src", "href", "srcset", "action", "style"}
        assert not any(name.startswith("on") for name in attributes)
    scripts = [found for tag, attributes, found in page.elements if tag == "script" and "type" not in attributes]
    styles = [found for tag, _, found in page.elements if tag == "style"]
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "innerHTML", "eval(", "import("):
        assert word not in scripts[0] + styles[0]
    (policy,) = [a["content"] for tag, a, _ in page.elements if tag == "meta" and "http-equiv" in a]
    for kind, (content,) in (("script", re.findall(r"<script>(.*?)</script>", text, re.DOTALL)),) + (
        ("style", re.findall(r"<style>(.*?)</style>", text, re.DOTALL)),
    ):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


def test_the_bytes_are_the_same_each_time(run: Path) -> None:
    first = page_of(run)
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
    assert page_of(run) == first


def test_a_damaged_samples_file_is_named(run: Path) -> None:
    for text in ("{}", '{"format": 1, "samples": [{"prompt": 5, "texts": {}}]}', '{"format": 1, "samples": 3}'):
        (run / "samples.json").write_text(text)
        with pytest.raises(ValueError, match="samples.json cannot be used: .*; remove it"):
            page_of(run)


def test_levels_of_another_run_are_refused(run: Path) -> None:
    trajectory = Trajectory.load(run)
    level = LevelInfo("sparsity-0.20", 0.2, 10**9, 10**8)
    with pytest.raises(ValueError, match="belongs to another run"):
        report_facts(trajectory, [level], source="me/x", title="x")
    with pytest.raises(ValueError, match="levels is empty"):
        report_facts(trajectory, [], source="me/x", title="x")
    with pytest.raises(ValueError):
        render_page({"title": "x", "value": float("nan")})


# ---- the command and the push ----------------------------------------------------------------------------------------


def test_the_command_writes_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == page_of(run)
    assert capsys.readouterr().out.startswith(f"{output}: 4 levels, ")
    assert main(["report", str(run), "--output", str(output), "--prompt", "w5 w9", "--max-new-tokens", "3"]) == 0
    assert output.read_text(encoding="utf-8") == page_of(run)  # with the samples that lie in the folder now
    assert [sample.prompt for sample in read_samples(run, NAMES)] == ["w5 w9"]


def test_the_command_refuses_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        ([tmp_path / "nothing"], "neither a folder here nor a repository"),
        ([run, "--output", tmp_path / "no" / "x.html"], "there is no folder"),
        ([run, "--output", tmp_path / "x.html", "--prompt", " "], "a prompt is empty"),
        ([run, "--output", tmp_path / "x.html", "--prompt", "w5", "--max-new-tokens", "0"], "at least 1, got 0"),
        ([run, "--output", tmp_path / "x.html", "--base-model", "x"], "give --prompt as well"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists() and not (run / "samples.json").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"hf_owner": "me"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        yield server


@upload_warning
def test_push_adds_the_page_and_a_second_push_changes_nothing(
    run: Path, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(run, [Sample("w5", {NAMES[0]: "w6"})])
    assert main(["push", str(run), "--repo", "me/reported", "--license", "mit"]) == 0
    facts = Page(hub.files("me/reported")["report.html"].decode()).facts()
    assert facts["title"] == "me/reported" and str(tmp_path) not in json.dumps(facts)
    assert {level["name"]: level["commit"] for level in facts["levels"]} == {
        name: hub.head("me/reported", name) for name in NAMES
    }
    assert facts["samples"] == [{"prompt": "w5", "texts": {NAMES[0]: "w6"}}]
    assert not any("report.html" in hub.files("me/reported", name) for name in NAMES)
    main_files = hub.files("me/reported")
    assert main_files["perplexity.png"].startswith(b"\x89PNG") and b"(perplexity.png)" in main_files["README.md"]
    capsys.readouterr()
    assert main(["push", str(run), "--repo", "me/reported", "--license", "mit"]) == 0
    assert "(nothing had changed)" in capsys.readouterr().out

    hub.requests.clear()
    output = tmp_path / "again.html"
    assert main(["report", "me/reported", "--output", str(output)]) == 0  # from the repository: files only
    found = Page(output.read_text(encoding="utf-8")).facts()
    assert not any("safetensors" in str(request) and "trajectory" not in str(request) for request in hub.requests)
    for key in ("title", "base", "charts", "layers", "commands"):
        assert found[key] == facts[key]
    assert [{**level, "bytes": None} for level in facts["levels"]] == found["levels"]


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_the_numbers_and_runs_no_hostile_script(run: Path, tmp_path: Path) -> None:
    def dump(text: str) -> str:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
        with tempfile.TemporaryDirectory() as profile:
            command = [str(BROWSER), *flags, f"--user-data-dir={profile}", "--dump-dom", str(tmp_path / "page.html")]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    shown = Page(dump(page_of(run)))
    texts = [text for tag, _, text in shown.elements if tag == "td"]
    for level in read_levels(run):
        assert f"{level.parameters:,}" in texts and level.name in texts
    assert sum(tag == "svg" for tag, _, _ in shown.elements) == 3  # perplexity, accuracy, loss
    cells = [attributes for tag, attributes, _ in shown.elements if attributes.get("class") == "cell"]
    assert len(cells) == 2 * Trajectory.load(run).layout.num_layers
    hostile = Page(dump(hostile_page(run)))
    assert not any(tag == "img" for tag, _, _ in hostile.elements)
    title = next(text for tag, _, text in hostile.elements if tag == "title")  # later ones are tooltips
    assert title.strip() != "owned"
    assert sum(attributes.get("class") == "answers" for _, attributes, _ in hostile.elements) == 1
