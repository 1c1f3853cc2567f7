"""A Gradio app for an elastic checkpoint: the same prompt answered at several sparsities, side by side.

    pip install ".[space]"
    gisp-hf elastic runs/quickstart --output elastic
    python recipes/space/app.py elastic          # a folder, or a repository on the Hub

One model is in memory. A switch between sparsities takes views of its weights. On the Hub, the variable ``MODEL`` of
the Space names the repository (README.md).
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gisp_hf.models.dtype import fast_dtype
from gisp_hf.models.modeling_elastic import ORDER, SizeTable  # its room teaches the Auto classes elastic checkpoints

if TYPE_CHECKING:
    import gradio

PROMPT = "The history of the city begins in"
MAX_NEW_TOKENS = 256  # a public Space must not be kept busy for minutes by one visitor
MAX_PROMPT_TOKENS = 1024
MOST_LEVELS = 4  # columns beside full width and the slider's setting
SLIDER = "Slider"


@dataclass(frozen=True)
class Size:
    """Parameters of the whole model and the bytes of their weights, at one sparsity."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Answer:
    """The new text at one sparsity; ``seconds`` include reading the prompt."""

    text: str
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


class Elastic:
    """An elastic model with its tokenizer, for one request at a time.

    Args:
        model: from an elastic checkpoint.
        name: how the page calls it.

    Raises:
        ValueError: the model is not elastic.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        if not hasattr(model, "set_sparsity"):
            raise ValueError(not_elastic(name))
        self.model = model.set_sparsity(0.0).eval()
        self.tokenizer = tokenizer
        self.name = name
        self._table = SizeTable(model.config.elastic, getattr(model, ORDER))
        self._parameters = model.num_parameters()  # at full width; tied weights count once
        self._lock = threading.Lock()  # the width belongs to the model, and requests come in several threads

    @classmethod
    def load(cls, source: str) -> "Elastic":
        """Loads a folder or a repository, in the dtype that this machine is fast at.

        Raises:
            ValueError: it is no elastic checkpoint.
        """
        if getattr(AutoConfig.from_pretrained(source), "elastic", None) is None:  # before the weights
            raise ValueError(not_elastic(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=fast_dtype())
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        name = os.path.basename(os.path.normpath(source)) if os.path.isdir(source) else source
        elastic = cls(model, AutoTokenizer.from_pretrained(source), name=name)
        elastic.answer(PROMPT, 0.0, max_new_tokens=2)  # the first call is slow, and its speed would be shown
        return elastic

    @property
    def highest(self) -> float:
        """The sparsity at which the removal order ends, rounded down to whole percents."""
        return int(100 * self._table.highest + 1e-9) / 100

    @property
    def settings(self) -> list[float]:
        """Full width and the levels of the checkpoint, of which at most `MOST_LEVELS` from all over the range."""
        levels = sorted(float(level) for level in self.model.config.elastic["levels"] if float(level) > 0)
        if len(levels) > MOST_LEVELS:
            levels = [levels[round(i * (len(levels) - 1) / (MOST_LEVELS - 1))] for i in range(MOST_LEVELS)]
        return [0.0, *levels]

    def size(self, sparsity: float) -> Size:
        """Read from the table of the checkpoint: the model may be at work at another width."""
        kept, table = self._table.counts(sparsity), self._table
        removed = sum((size - count) * cost for size, count, cost in zip(table.sizes, kept, table.costs))
        parameters = self._parameters - removed
        return Size(parameters, parameters * self.model.dtype.itemsize)

    def answer(self, prompt: str, sparsity: float, *, max_new_tokens: int) -> Answer:
        """Greedy decoding, so that settings differ by their weights alone.

        Raises:
            ValueError: the prompt is empty or too long, or the sparsity lies beyond the checkpoint.
        """
        ids = self._encode(prompt)
        with self._lock, torch.inference_mode():
            self.model.set_sparsity(sparsity)
            start = time.perf_counter()
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(int(max_new_tokens), MAX_NEW_TOKENS),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
            new = output[0, ids.shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - start
        return Answer(self.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)

    def _encode(self, prompt: str) -> torch.Tensor:
        """(1, T) token ids, by the chat template where there is one."""
        if not prompt.strip():
            raise ValueError("the prompt is empty; write one")
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        special = not self.tokenizer.chat_template  # the template has written them already
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
        if ids.shape[1] > MAX_PROMPT_TOKENS:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens; use at most {MAX_PROMPT_TOKENS}")
        return ids.to(self.model.device)


def not_elastic(source: str) -> str:
    return (
        f"{source} is no elastic checkpoint; `gisp-hf elastic RUN --output FOLDER` writes one from the folder or "
        "repository of a pruning run"
    )


def title_of(sparsity: float) -> str:
    return f"{sparsity:.0%} removed" if sparsity else "Full width"


def describe(size: Size, full: Size, answer: Answer | None = None) -> str:
    """Lines of Markdown: size beside that of full width, and speed once there is an answer."""
    million, megabytes = size.parameters / 1e6, size.bytes / 1e6
    digits = 1 if million >= 1 else 3
    lines = [
        f"**{million:,.{digits}f}** M parameters ({size.parameters / full.parameters:.0%})",
        f"**{megabytes:,.{digits}f}** MB of weights",
    ]
    lines.append(f"**{answer.tokens_per_second:,.1f}** tokens/s" if answer else "tokens/s: not yet measured")
    return "  \n".join(lines)


def answers(elastic: Elastic, prompt: str, sparsity: float, max_new_tokens: int) -> Iterator[tuple[int, str, str, str]]:
    """Answers at all settings and, last, at that of the slider.

    Yields:
        (number of the column, its heading, facts, text), one column after the other.
    """
    full = elastic.size(0.0)
    for column, setting in enumerate([*elastic.settings, sparsity]):
        answer = elastic.answer(prompt, setting, max_new_tokens=max_new_tokens)
        chosen = column == len(elastic.settings)
        heading = f"{SLIDER}: {title_of(setting)}" if chosen else title_of(setting)
        yield column, heading, describe(elastic.size(setting), full, answer), answer.text


def build(elastic: Elastic) -> "gradio.Blocks":
    """The page."""
    import gradio as gr

    full, settings = elastic.size(0.0), elastic.settings
    start = min(settings[-1] / 2, elastic.highest)
    columns = [*settings, start]
    with gr.Blocks(title=f"{elastic.name}: one model, every size") as page:
        gr.Markdown(
            f"# One model, every size\n`{elastic.name}` is an elastic checkpoint: structures are sorted by removal "
            "order, so each size is a prefix of the weights in memory. Decoding is greedy."
        )
        with gr.Row():
            prompt = gr.Textbox(value=PROMPT, label="Prompt", lines=2, scale=2)
            sparsity = gr.Slider(
                0, elastic.highest, value=start, step=0.01, label="Sparsity", info="of the decoder layers", scale=1
            )
            tokens = gr.Slider(8, MAX_NEW_TOKENS, value=32, step=8, label="New tokens", scale=1)
        with gr.Row():
            all_of_them = gr.Button("Answer at every setting", variant="primary")
            only = gr.Button("Answer at the slider's setting")
        shown: list[tuple[Any, Any, Any]] = []
        with gr.Row(equal_height=True):
            for number, setting in enumerate(columns):
                chosen = number == len(settings)
                with gr.Column(min_width=160, variant="panel" if chosen else "default"):
                    heading = gr.Markdown(
                        f"### {SLIDER}: {title_of(setting)}" if chosen else f"### {title_of(setting)}"
                    )
                    facts = gr.Markdown(describe(elastic.size(setting), full))
                    text = gr.Textbox(label="Answer", lines=8, max_lines=16, interactive=False)
                    shown.append((heading, facts, text))
        flat = [part for parts in shown for part in parts]

        def move(value: float) -> tuple[str, str, str]:
            return f"### {SLIDER}: {title_of(value)}", describe(elastic.size(value), full), ""

        def answer_all(prompt: str, value: float, most: int) -> Iterator[dict[Any, Any]]:
            yield {text: "" for _, _, text in shown}
            try:
                for column, title, facts, text in answers(elastic, prompt, value, most):
                    yield dict(zip(shown[column], (f"### {title}", facts, text)))
            except ValueError as error:
                raise gr.Error(str(error)) from error

        def answer_one(prompt: str, value: float, most: int) -> tuple[str, str, str]:
            try:
                answer = elastic.answer(prompt, value, max_new_tokens=most)
            except ValueError as error:
                raise gr.Error(str(error)) from error
            heading = f"### {SLIDER}: {title_of(value)}"
            return heading, describe(elastic.size(value), full, answer), answer.text

        # sizes follow the slider at once; text and speed wait for a button, since answers take time
        sparsity.change(move, sparsity, list(shown[-1]), show_progress="hidden")
        queue = {"concurrency_limit": 1, "concurrency_id": "model"}  # speeds are those of one request at a time
        inputs = [prompt, sparsity, tokens]
        all_of_them.click(answer_all, inputs, flat, api_name="all", **queue)
        only.click(answer_one, inputs, list(shown[-1]), api_name="one", **queue)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A page with a slider for the sparsity of an elastic checkpoint.")
    parser.add_argument(
        "source",
        nargs="?",
        default=os.environ.get("MODEL"),
        metavar="FOLDER_OR_REPO",
        help="the elastic checkpoint (default: the variable MODEL)",
    )
    parser.add_argument("--port", type=int, help="of the local server (default: Gradio's choice)")
    options = parser.parse_args(argv)
    if not options.source:
        parser.error("name an elastic checkpoint, or set the variable MODEL")
    try:
        elastic = Elastic.load(options.source)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    build(elastic).launch(server_port=options.port)


if __name__ == "__main__":
    main()
