"""The start of a kernel, `kernel[grid](...)`, in types that a checker knows.

Inside a kernel a parameter is a tensor of Triton's language, or a `tl.constexpr`; where it is started the same one is a
torch tensor or a number. What a checker still has to be told to ignore in kernels: names that are set and read under
the same `tl.constexpr` (Triton decides such branches when it compiles), operators of `tl.constexpr`, and `range`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Launchable(Protocol):
    """A function under `@triton.jit`, compiled or interpreted."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """What starts one program for each place of the grid."""
        ...


def launch(kernel: Launchable, grid: tuple[int, ...]) -> Callable[..., object]:
    """What takes the kernel's arguments and starts it on this grid."""
    return kernel[grid]


def num_pieces(count: int, size: int) -> int:
    """Pieces of `size` that cover `count`."""
    return -(-count // size)
