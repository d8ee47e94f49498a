"""The metadata of one architecture, read to the last value: what nobody asked for is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alisa.errors import ModelError
from alisa.model.gguf.file import StoredTensor

# What every file may say and nothing depends on: whether a scaled model was trained on, the size of the vocabulary (the
# rows of the embedding table are counted), and the order of the rows, which follows from the architecture.
_INFORMATIVE = ("rope.scaling.finetuned", "vocab_size", "tensor_data_layout")


class ArchitectureFields:
    """Values under the name of an architecture, `llama.block_count` for one.

    Args:
        metadata: all named values of the file.
        tensors: the tensors of the file.
        architecture: its name, with which the names begin.
        read: the numbers of a tensor of the file.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        architecture: str,
        read: Callable[[str], list[float]],
    ) -> None:
        self._prefix = f"{architecture}."
        self._values = {
            name.removeprefix(self._prefix): _one_for_all_layers(value)
            for name, value in metadata.items()
            if name.startswith(self._prefix)
        }
        self._unread = set(self._values) - set(_INFORMATIVE)
        self._tensors = tensors
        self._read = read
        self._problems: list[str] = []

    def get(self, name: str) -> Any:  # noqa: ANN401 - a number, a text, or a list of them
        """The value of `{architecture}.{name}`, or None; an array that says the same of every layer is one number."""
        self._unread.discard(name)
        return self._values.get(name)

    def has_tensor(self, name: str) -> bool:
        """Whether the file holds a tensor."""
        return name in self._tensors

    def num_rows(self, tensor: str) -> int | None:
        """Rows of a tensor; None when it is not there."""
        return self._tensors[tensor].shape[0] if tensor in self._tensors else None

    def numbers(self, tensor: str) -> list[float] | None:
        """The numbers of a small tensor; None when it is not there."""
        return self._read(tensor) if tensor in self._tensors else None

    def refuse(self, name: str, reason: str) -> None:
        """Remember that the value of `{architecture}.{name}` is in the way, and why."""
        self._problems.append(f"{self._prefix}{name} is {_short(self._values.get(name))}, {reason}")

    def finish(self, file_name: str) -> None:
        """Return when everything was read and nothing is in the way.

        A zero, a false or an empty text switches nothing on, and is no reason to refuse.

        Raises:
            ModelError: names the values that were refused or not read.
        """
        rest = sorted(name for name in self._unread if _says_something(self._values[name]))
        problems = self._problems + [f"{self._prefix}{name} is {_short(self._values[name])}" for name in rest]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ModelError(f"{file_name} asks for what is not supported here: {'; '.join(problems[:3])}{more}.")


def _one_for_all_layers(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, np.ndarray):
        numbers = value.tolist()
        return numbers[0] if numbers and numbers.count(numbers[0]) == len(numbers) else numbers
    return value


def _says_something(value: Any) -> bool:  # noqa: ANN401
    return bool(value) and value != "none"


def _short(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
