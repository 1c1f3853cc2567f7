"""Single tensors of a checkpoint: read by name, and overwritten in place."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gisp_hf.levels.files import INDEX_FILE, WEIGHTS_FILE, Files, read_weight_map
from gisp_hf.models.fingerprint import combine_checksums, tensor_checksum


class FileWeights:
    """Weights in the safetensors files of a folder or repository, read when they are asked for.

    Args:
        shell: the model that they belong to, without weights: names and shapes.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: if a parameter is missing.
    """

    def __init__(self, files: Files, shell: PreTrainedModel) -> None:
        self.files = files
        self._shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
        stored = stored_tensors(files)
        self._place: dict[str, tuple[str, str]] = {}  # name in the model -> file, name in the file
        names = [name for name, _ in shell.named_parameters()]
        buffers = [name for name, _ in shell.named_buffers() if name in stored]
        for filename, pairs in names_by_file(files, shell, [*names, *buffers]).items():
            self._place |= {name: (filename, own) for own, name in pairs}
        self._parameters = names

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = {}
        for filename in dict.fromkeys(self._place[name][0] for name in names):
            with self.files.opened(filename) as file:
                for name in names:
                    where, own = self._place[name]
                    if where == filename:
                        tensor = file.get_tensor(own)
                        if tuple(tensor.shape) != self._shapes[name] or not tensor.is_floating_point():
                            raise ValueError(
                                f"{own} of {self.files.label} is {tensor.dtype} of shape {tuple(tensor.shape)}; its "
                                f"config says {self._shapes[name]}, and quantized weights cannot be read"
                            )
                        found[name] = tensor
        return found

    def places(self, name: str) -> tuple[str, str]:
        """The file that holds a parameter, and its name there."""
        return self._place[name]

    def fingerprint(self) -> str:
        """That of the model, as a trajectory records it; reads every parameter once."""
        entries = []
        for name in self._parameters:
            tensor = self.read([name])[name]
            entries.append((name, tuple(tensor.shape), tensor_checksum(tensor)))
        return combine_checksums(entries)


def names_by_file(base: Files, dense: PreTrainedModel, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """File -> (name in the file, name in the model) of every parameter."""
    stored_in = stored_tensors(base)
    # Of tied weights a checkpoint holds any one; named_parameters lists them once, under the name of the source.
    tied: dict[str, str] = {source: target for target, source in dense.all_tied_weights_keys.items()}
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        stored = name if name in stored_in else tied.get(name, name)
        if stored not in stored_in:
            raise ValueError(
                f"the checkpoint of {base.label} lacks {name}; if transformers can load it all the same, use "
                "Trajectory.apply on the loaded model"
            )
        by_file.setdefault(stored_in[stored], []).append((stored, name))
    return by_file


def stored_tensors(base: Files) -> dict[str, str]:
    """Tensor -> the file it is in, for a checkpoint in one file or in shards."""
    if base.fetch(WEIGHTS_FILE) is not None:
        with base.opened(WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), WEIGHTS_FILE)
    if (index_file := base.fetch(INDEX_FILE)) is None:
        raise FileNotFoundError(
            f"{base.label} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; pickled weights are never read: load the "
            "model with transformers and save_pretrained it to a folder, then give that folder as base_model"
        )
    return read_weight_map(index_file, label=base.label)


def overwrite_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors over those of the same name, shape and dtype in a safetensors file; all other bytes stay.

    Raises:
        ValueError: if the file holds no such tensor of that size.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))  # format: https://huggingface.co/docs/safetensors
        header = json.loads(file.read(length))
        for name, tensor in tensors.items():
            first, end = header[name]["data_offsets"] if name in header else (0, -1)
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            if header.get(name, {}).get("shape") != list(tensor.shape) or len(values) != end - first:
                raise ValueError(f"{path} holds no {name} of shape {tuple(tensor.shape)} and {tensor.dtype}")
            file.seek(8 + length + first)
            file.write(values.tobytes())
