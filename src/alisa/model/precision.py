"""Which device and which dtype a model runs in when the user leaves it open, and why."""

from __future__ import annotations

import torch

from alisa.errors import InputError
from alisa.kernels.native.prefill import prefill_isa_names

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(asked: str) -> torch.device:
    """The device meant by `auto`, `cpu` or `cuda`; `auto` takes a GPU when torch sees one.

    Raises:
        InputError: a GPU is asked for and there is none, or the name is unknown.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {asked!r} is unknown, there is auto, cpu, cuda.")
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        built = torch.version.cuda is not None
        why = "sees no GPU" if built else "is a build without CUDA"
        raise InputError(f"device cuda is asked for, but torch {torch.__version__} {why}; use --device cpu or auto.")
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda and asked != "cpu" else torch.device("cpu")


def resolve_dtype(asked: str, checkpoint_dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype a model computes in.

    `auto` never rounds a float32 checkpoint: whoever wants that asks for it. A 16-bit checkpoint keeps its dtype on a
    GPU. On a CPU it becomes bfloat16 where that is fast (float16 has no fast path in oneDNN on most CPUs, and its
    weights fit bfloat16's range), and float32 elsewhere: where the CPU has no instructions for it, torch multiplies
    bfloat16 more slowly than float32.

    Args:
        asked: `auto`, `float32`, `bfloat16` or `float16`.
        checkpoint_dtype: name of the dtype the weights are stored in; None when unknown, treated as 16-bit.
        device: where the model will run.

    Raises:
        InputError: the name is unknown.
    """
    if asked in _DTYPES:
        return _DTYPES[asked]
    if asked != "auto":
        raise InputError(f"dtype {asked!r} is unknown, there is auto, {', '.join(_DTYPES)}.")
    if checkpoint_dtype in ("float32", "float64"):
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bfloat16() else torch.float32
    return _DTYPES.get(checkpoint_dtype or "bfloat16", torch.bfloat16)


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is at least about as fast as float32 on this CPU.

    It is where the CPU multiplies it (AMX tiles or AVX512_BF16 on x86, the bf16 extension on ARM), and where our
    kernels for AVX2 widen it as they go: products read half the bytes, prompts do not wait for torch.
    """
    return has_native_bfloat16() or bool(prefill_isa_names())


def has_native_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products (AMX tiles or AVX512_BF16 on x86, the bf16 extension on ARM)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if "AVX" in capabilities:
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return capabilities.startswith(("SVE", "NEON")) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
