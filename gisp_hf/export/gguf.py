"""GGUF files of levels, for llama.cpp and the programs that are built on it (Ollama, LM Studio).

The file is written one tensor at a time, from the safetensors of the level; no model is built.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gisp_hf.atomic import replacement
from gisp_hf.export.architectures import (
    Architecture,
    choose_architecture,
    dense_sizes,
    head_dim,
    layer_sizes,
    rope_of,
    window_of,
)
from gisp_hf.export.tensors import Entry, Shapes, plan_tensors, quantisation_notes
from gisp_hf.export.tokenizer import read_vocabulary, write_tokenizer
from gisp_hf.levels.files import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    Files,
    load_tokenizer,
    pin,
    read_model_config,
    stored_tensors,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter  # an extra

FileType = Literal["f16", "f32"]
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)
PAD_NOTE = "padded with zeros to the size before pruning: it opens everywhere, and is neither smaller nor faster"


@dataclass(frozen=True)
class GGUFReport:
    """The file that was written: its architecture in llama.cpp, its size in bytes, and notes for its users."""

    path: Path
    architecture: str
    size: int
    notes: tuple[str, ...]


def export_gguf(
    repo_or_folder: str | Path,
    output: str | Path,
    *,
    file_type: FileType = "f16",
    pad: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> GGUFReport:
    """Writes a level as a GGUF file, with the sizes of each layer, the tokenizer and the chat template.

    Memory: one tensor at a time. The same level gives the same bytes.

    Args:
        repo_or_folder: a level's folder, or a repository on the Hub. An unpruned checkpoint can be exported too.
        output: the file; must not exist. It appears once everything is written.
        file_type: of the matrices; vectors (norms, biases) are float32 in both.
        pad: give each layer the size that it had before pruning, with zeros, for families that llama.cpp holds only
            with one size for all layers. Such a file saves nothing.
        revision: a level's branch, a tag or commit of the repository; of no effect on a folder.
        token: for private or gated repositories; the one you are logged in with if None.
        endpoint: of the Hub; the environment's ``HF_ENDPOINT`` if None.

    Raises:
        FileExistsError: if ``output`` exists.
        FileNotFoundError: if there is no checkpoint.
        ImportError: if the package ``gguf`` is not installed.
        ValueError: if llama.cpp cannot hold the model or its tokenizer; the message says what it lacks.
        OSError: if the file cannot be written; nothing of it is left.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already; remove it or choose another name")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent}; make it first")
    if file_type not in FILE_TYPES:
        raise ValueError(f"the type must be one of {', '.join(FILE_TYPES)}, got {file_type!r}; llama-quantize has more")
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'gisp_hf[export]'") from error

    files, config_file = pin(Files(repo_or_folder, revision, token, endpoint), CONFIG_FILE)
    if config_file is None:
        raise FileNotFoundError(f"{files.label} holds no {CONFIG_FILE}{_levels_in(repo_or_folder)}")
    config = read_model_config(config_file.parent, label=files.label)
    architecture = choose_architecture(config, pad=pad)
    tokenizer = _read_tokenizer(files)
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer, config.vocab_size)
    notes = [PAD_NOTE] if pad else []
    with _opened_weights(files) as (stored, read):
        entries = plan_tensors(config, architecture, stored, pad=pad)
        shapes = {entry.name: entry.shape(stored) for entry in entries}
        with replacement(output) as temporary:
            writer = GGUFWriter(temporary, architecture.name)
            writer.add_name(_name(files))
            if pad:
                writer.add_description(PAD_NOTE)
            writer.add_file_type({"f32": 0, "f16": 1}[file_type])
            _add_sizes(writer, config, architecture, pad=pad)
            if tokenizer is None or vocabulary is None:
                writer.add_tokenizer_model("none")
                notes.append("the level has no tokenizer: the file takes token ids, not text")
            else:
                write_tokenizer(writer, tokenizer, vocabulary)
                notes += vocabulary.notes
            _write_tensors(writer, entries, shapes, read=read, file_type=file_type)
    if (window := window_of(config)) and not architecture.window_every:
        notes.append(
            f"this model looks back {window:,} tokens at most, and llama.cpp's {architecture.name} has no such window: "
            f"results are those of Transformers up to {window:,} tokens, which is the context length in the file"
        )
    return GGUFReport(output, architecture.name, output.stat().st_size, (*notes, *quantisation_notes(shapes)))


def _levels_in(source: str | Path) -> str:
    """Names the levels in a folder that is no level, for an error."""
    found = sorted(path.name for path in Path(source).glob("sparsity-*")) if Path(source).is_dir() else []
    return f"; it holds the levels {', '.join(found)}: give one of these folders" if found else ""


def _name(files: Files) -> str:
    """A name without the paths of this machine."""
    is_folder = Path(files.source).is_dir()
    return Path(files.source).resolve().name if is_folder else str(files.source).rpartition("/")[2]


def _read_tokenizer(files: Files) -> PreTrainedTokenizerBase | None:
    found = [files.fetch(name) for name in TOKENIZER_FILES]
    folder = next((path.parent for path in found[:3] if path is not None), None)
    return None if folder is None else load_tokenizer(folder, label=files.label)


@contextmanager
def _opened_weights(files: Files) -> Iterator[tuple[Shapes, Callable[[str], torch.Tensor]]]:
    """The shapes of the checkpoint's tensors, and a function that reads one of them."""
    with ExitStack() as stack:
        where = stored_tensors(files)
        opened = {name: stack.enter_context(files.opened(name)) for name in sorted(set(where.values()))}
        slices = {name: opened[file].get_slice(name) for name, file in where.items()}
        for name, part in slices.items():
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{name} of {files.label} is of type {part.get_dtype()}: export the unquantised level")
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        yield shapes, lambda name: opened[where[name]].get_tensor(name)


def _add_sizes(writer: "GGUFWriter", config: PreTrainedConfig, architecture: Architecture, *, pad: bool) -> None:
    sizes = [dense_sizes(config)] * config.num_hidden_layers if pad else layer_sizes(config)
    heads, groups = [size.heads for size in sizes], [size.groups for size in sizes]
    channels = [size.channels for size in sizes]
    writer.add_block_count(len(sizes))
    writer.add_embedding_length(config.hidden_size)
    # one number for all layers is what architectures without sizes of each layer read
    writer.add_head_count(heads if architecture.per_layer else heads[0])
    writer.add_head_count_kv(groups if architecture.per_layer else groups[0])
    writer.add_feed_forward_length(channels if architecture.per_layer else channels[0])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    length, window = config.max_position_embeddings, window_of(config)
    if window and architecture.window_every:
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    elif window:
        length = min(length, window)
    writer.add_context_length(length)
    rope = rope_of(config, "full_attention")
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{architecture.name}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(rope["factor"])
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _write_tensors(
    writer: "GGUFWriter",
    entries: Sequence[Entry],
    shapes: Shapes,
    *,
    read: Callable[[str], torch.Tensor],
    file_type: FileType,
) -> None:
    """Writes the header, then one tensor after the other.

    Raises:
        ValueError: if a weight does not fit into float16.
    """
    matrices = {"f16": torch.float16, "f32": torch.float32}[file_type]
    dtypes = {name: matrices if len(shape) > 1 else torch.float32 for name, shape in shapes.items()}
    for name, shape in shapes.items():
        like = torch.empty(0, dtype=dtypes[name]).numpy().dtype
        writer.add_tensor_info(name, shape, like, torch.Size(shape).numel() * dtypes[name].itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            tensor = entry.transform(*map(read, entry.sources)).to(dtypes[entry.name])
            if not tensor.isfinite().all():
                raise ValueError(f"{entry.name} has weights beyond the range of {file_type}; use --type f32")
            writer.write_tensor_data(tensor.contiguous().numpy())
    finally:
        writer.close()
