"""Hidden states of the calibration tokens, batch by batch: in host memory, or in files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Hidden:
    """A list of tensors, one for each batch, that are moved to a device when they are asked for.

    Args:
        folder: where they are written; None keeps them in host memory.
        name: of this list; begins the names of its files.
    """

    def __init__(self, folder: Path | None = None, name: str = "hidden") -> None:
        self._folder, self._name = folder, name
        self._tensors: dict[int, torch.Tensor] = {}

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Keeps the tensor of a batch, in place of the one before."""
        if self._folder is None:
            self._tensors[number] = tensor.cpu()
        else:
            save_file({"hidden": tensor.cpu().contiguous()}, self._file(number))

    def get(self, number: int, device: torch.device) -> torch.Tensor:
        if self._folder is None:
            return self._tensors[number].to(device)
        return load_file(self._file(number))["hidden"].to(device)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{number}.safetensors"
