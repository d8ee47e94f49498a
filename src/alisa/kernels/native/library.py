"""The native library: whether it can be used, the threads that its calls run on, and moving rows.

It is optional (no compiler, no library) and knows nothing of torch: the files of this package check dtypes, shapes and
strides, allocate the results and hand over addresses. They also hand over torch's own OpenMP runtime, so that both
share one pool of threads.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info
from torch import Tensor

if TYPE_CHECKING:
    from alisa.kernels._native import Threads

try:
    from alisa.kernels import _native
except ImportError as error:
    _native = None
    _MISSING = f"the native kernels are not installed ({error}); they are built when a C++ compiler is present"
else:
    _MISSING = ""

VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of `Dtype` in native/task.h, of inputs and outputs."""


def available() -> bool:
    """Whether the native library can be used."""
    return _native is not None


def unavailable_reason() -> str:
    """Why not, in one sentence; empty where it can."""
    return _MISSING


def isa_names() -> tuple[str, ...]:
    """Instruction sets that this build and this CPU have in common, fastest first; empty without the library."""
    return tuple(_native.isa_names()) if _native is not None else ()


class OpenMP(NamedTuple):
    """Addresses in the OpenMP runtime that torch has loaded; 0: there is none that has them."""

    parallel: int = 0
    team_size: int = 0
    team_rank: int = 0


@cache
def openmp() -> OpenMP:
    """`GOMP_parallel`, and how a thread learns of its team."""
    for pool in threadpool_info():
        if pool["user_api"] != "openmp":
            continue
        runtime = ctypes.CDLL(pool["filepath"])
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        found = [getattr(runtime, name) for name in names if getattr(runtime, name, None) is not None]
        if len(found) == len(names):
            return OpenMP(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found))
    return OpenMP()


def move_rows(
    file: int,
    offsets: NDArray[np.int64],
    memory: NDArray[np.uint8],
    rows: NDArray[np.int64],
    *,
    write: bool,
) -> int:
    """Bytes moved between rows of `memory` (UInt8[N, row_bytes]) and a file, at ascending offsets (Int64[n]).

    Rows that lie next to each other in the file go in one system call; the interpreter is not held meanwhile.

    Raises:
        OSError: the system refused.
    """
    moved = native().move_rows(
        write=write,
        file=file,
        offsets=offsets.ctypes.data,
        memory=memory.ctypes.data,
        stride=memory.strides[0],
        rows=rows.ctypes.data,
        count=len(rows),
        row_bytes=memory.shape[1],
    )
    if moved < 0:
        raise OSError(-moved, os.strerror(-moved))
    return moved


def native():  # noqa: ANN201 - the module itself, or an error
    """The native module; see `available`.

    Raises:
        RuntimeError: there is none.
    """
    if _native is None:
        raise RuntimeError(_MISSING)
    return _native


class Team:
    """The threads that native calls run on.

    Args:
        num_threads: how many; None: as many as torch uses at the time of the call.
        share: on torch's OpenMP threads where they can be found.
    """

    __slots__ = ("_make", "_num_threads", "_openmp")

    def __init__(self, num_threads: int | None = None, *, share: bool = True) -> None:
        self._make = native().Threads
        self._num_threads = num_threads
        self._openmp = openmp() if share else OpenMP()

    def threads(self) -> Threads:
        """The team of one call."""
        parallel, team_size, team_rank = self._openmp
        return self._make(parallel, self._num_threads or torch.get_num_threads(), team_size, team_rank)


def dense_tokens(values: Tensor) -> Tensor:
    """`[N, G, D]` with each token's values in one run; a copy only where they are not."""
    is_dense = values.stride(2) == 1 and (values.shape[1] == 1 or values.stride(1) == values.shape[2])
    return values if is_dense else values.contiguous()
