"""The app of the Space on a tiny elastic model; the page itself where Gradio is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gisp_hf.levels.elastic import make_elastic, save_elastic
from tests.test_materialize import random_trajectory
from tests.tiny import tiny_model, tiny_tokenizer

SPACE = Path(__file__).parents[1] / "recipes" / "space"


def load_app() -> ModuleType:
    """The folder is a Space of its own and no package."""
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


app = load_app()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(tie_word_embeddings=True)
    trajectory = random_trajectory(model, "some/base")
    make_elastic(model, trajectory, levels=(0.2, 0.4))
    return save_elastic(
        model, tmp_path_factory.mktemp("space") / "elastic", trajectory=trajectory, tokenizer=tiny_tokenizer()
    )


@pytest.fixture
def elastic(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "fast_dtype", lambda: torch.float32)
    return app.Elastic.load(str(folder))


def greedy(model, prompt: str, count: int) -> str:
    """Without a cache and without ``generate``."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        token = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == model.config.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.37])
def test_sizes_are_those_of_saved_levels(elastic, sparsity: float, tmp_path: Path) -> None:
    size = elastic.size(sparsity)
    elastic.model.set_sparsity(sparsity).save_pretrained(tmp_path)
    level = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = list(level.parameters())  # a tied weight once
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.bytes == sum(p.numel() * p.element_size() for p in parameters)


def test_answers_are_those_of_the_levels(elastic, folder: Path) -> None:
    rows = list(app.answers(elastic, "w5 w6 w7", 0.37, 8))
    headings = ["Full width", "20% removed", "40% removed", "Slider: 37% removed"]
    assert [(column, heading) for column, heading, _, _ in rows] == list(enumerate(headings))
    for sparsity, (_, _, facts, text) in zip((0.0, 0.2, 0.4, 0.37), rows, strict=True):
        level = AutoModelForCausalLM.from_pretrained(folder, sparsity=sparsity)
        assert text == greedy(level, "w5 w6 w7", 8)
        share = elastic.size(sparsity).parameters / elastic.size(0.0).parameters
        assert f"({share:.0%})" in facts and "tokens/s" in facts
    assert len({text for *_, text in rows}) > 1


def test_speed_is_new_tokens_in_a_second(elastic) -> None:
    answer = elastic.answer("w5 w6", 0.2, max_new_tokens=4)
    assert 1 <= answer.new_tokens <= 4 and answer.seconds > 0
    assert app.Answer("", 30, 1.5).tokens_per_second == 20
    facts = app.describe(app.Size(75_000_000, 150_000_000), app.Size(100_000_000, 200_000_000), app.Answer("", 30, 1.5))
    assert facts.splitlines() == [
        "**75.0** M parameters (75%)  ",
        "**150.0** MB of weights  ",
        "**20.0** tokens/s",
    ]


def test_a_chat_template_is_used(elastic) -> None:
    elastic.tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }} w9"
    assert elastic._encode("w5 w6").tolist() == [[1, 5, 6, 9]]


def test_the_slider_ends_where_the_order_ends(elastic) -> None:
    elastic.size(elastic.highest)
    with pytest.raises(ValueError, match="beyond this checkpoint"):
        elastic.size(elastic.highest + 0.01)


def test_many_levels_become_a_few_columns(elastic) -> None:
    levels = elastic.model.config.elastic["levels"]
    row = levels["0.2"]
    elastic.model.config.elastic["levels"] = {f"{number / 20:g}": row for number in range(1, 11)}
    assert elastic.settings == [0.0, 0.05, 0.2, 0.35, 0.5]


def test_requests_that_cannot_be_met(elastic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        elastic.answer("  ", 0.2, max_new_tokens=4)
    with pytest.raises(ValueError, match="the prompt has 2000 tokens; use at most 1024"):
        elastic.answer("w5 " * 2000, 0.2, max_new_tokens=4)
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit, match="plain is no elastic checkpoint; `gisp-hf elastic RUN --output FOLDER`"):
        app.main([str(tmp_path / "plain")])
    with pytest.raises(SystemExit, match="error: "):
        app.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        app.main([])
    assert "name an elastic checkpoint, or set the variable MODEL" in capsys.readouterr().err


def test_the_space_names_what_it_needs() -> None:
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60  # the Hub's limit
    wanted = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    setup = (SPACE.parents[1] / "setup.cfg").read_text(encoding="utf-8")
    required = setup.split("install_requires =\n")[1].split("\n\n")[0].split()
    assert wanted == required  # the package lies beside the app, so that pip does not see what it needs


def test_the_page(elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[space]'")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = app.build(elastic)
    functions = {function.api_name: function for function in page.fns.values()}
    heading, facts, text = functions["one"].fn("w5 w6 w7", 0.37, 8)
    assert heading == "### Slider: 37% removed" and "tokens/s" in facts
    assert text == elastic.answer("w5 w6 w7", 0.37, max_new_tokens=8).text
    first, *steps = functions["all"].fn("w5 w6 w7", 0.37, 8)
    assert set(first.values()) == {""} and len(steps) == 4
    assert list(steps[-1].values())[0] == heading and list(steps[-1].values())[2] == text
    heading, facts, text = functions["move"].fn(0.2)
    assert heading == "### Slider: 20% removed" and "not yet measured" in facts and text == ""
    assert app.describe(elastic.size(0.2), elastic.size(0.0)) == facts
