"""Everything the doctor looks at, gathered in one place and judged in another (`findings`)."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from alisa import __version__
from alisa.attention.caps import device_cap, disk_cap
from alisa.config import EngineConfig
from alisa.doctor.self_test import SelfTest, run_self_test
from alisa.engine.loaded import embedded_model
from alisa.engine.threads import is_fixed
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.native import product as cpu_product
from alisa.machine import Cpu, Place, free_memory, huge_pages, huge_pages_asked, memory_limit, num_cpus, spinning
from alisa.model.choose_linear import choose_linear
from alisa.model.linear import PlainLinear
from alisa.model.precision import has_fast_bfloat16, resolve_device, resolve_dtype

EXTRAS: Mapping[str, str] = {
    "fastapi": "server",
    "llguidance": "grammar",
    "ray": "ray",
    "transformers": "hf",
    "matplotlib": "plot",
    "lm_eval": "lm_eval",
}
"""The package by which each extra of ours is known to be there, and the name of the extra."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The native CPU kernels."""

    isas: tuple[str, ...]
    """Instruction sets that build and processor have in common, the one that runs first; empty without kernels."""
    products: tuple[str, ...]
    """The same of products with 8-bit weights."""
    reason: str
    """Why there are none; empty where there are."""
    built: bool
    """Whether the library was built, whether it loads or not."""
    shares_threads: bool
    """Whether they run on torch's OpenMP threads."""
    compiler: str | None
    """A C++ compiler that could build them."""
    self_test: SelfTest | None
    """None without kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The GPU that torch sees."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found on this machine and in this installation."""

    alisa: str
    python: str
    torch: str
    cuda: str | None
    """CUDA version that torch was built for."""
    cpu: Cpu
    num_threads: int
    """That torch uses."""
    num_cpus: float
    """That this process may keep busy."""
    spinning: str
    """How long threads spin that wait for each other, as far as the environment says."""
    threads_fixed: bool
    """Whether the environment fixes the threads, so that they do not follow the load."""
    native: Native
    fast_bfloat16: bool
    """Whether this CPU multiplies bfloat16."""
    dtype_16bit: str
    """What `--dtype auto` makes of a 16-bit checkpoint."""
    packed: tuple[str, ...]
    """Dtypes whose linear layers are packed for the CPU's matrix library."""
    gpu: Gpu | None
    nvidia_driver: bool
    """Whether the system has an NVIDIA driver, whatever torch sees."""
    triton_failure: str
    """Why Triton is installed and cannot be imported; empty where it can or is not there."""
    free_bytes: int
    memory_limit: int | None
    """What the container allows."""
    kv_bytes: int
    """Default of `--kv-device-memory`."""
    kv_disk_bytes: int | None
    """What `--kv-disk-memory` may come to when it is not given; None where the directory is not there."""
    temporary: Place
    disk_tier: Place
    huge_pages: str | None
    huge_pages_asked: bool
    """Whether torch was told to ask for huge pages."""
    extras: Mapping[str, str | None]
    """Version of the package of each extra, and of Triton; None where it is absent."""
    embedded_model: bool
    """Whether the small model is inside the package."""


def gather(temporary: Path, disk_tier: Path) -> Facts:
    """Look at everything; takes well under a second once torch is imported.

    Args:
        temporary: directory for temporary files.
        disk_tier: directory where rows would go that fit no memory.
    """
    device = resolve_device("auto")
    return Facts(
        alisa=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cpu=Cpu.read(),
        num_threads=torch.get_num_threads(),
        num_cpus=num_cpus(),
        spinning=spinning(),
        threads_fixed=is_fixed(),
        native=_native(),
        fast_bfloat16=has_fast_bfloat16(),
        dtype_16bit=str(resolve_dtype("auto", "float16", device)).removeprefix("torch."),
        packed=_packed((torch.float32, torch.bfloat16)),
        gpu=_gpu(device),
        nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
        triton_failure=_import_failure("triton"),
        free_bytes=free_memory(),
        memory_limit=memory_limit(),
        kv_bytes=device_cap(EngineConfig(), device),
        kv_disk_bytes=disk_cap(EngineConfig(kv_disk_path=disk_tier)) if disk_tier.is_dir() else None,
        temporary=Place.read(temporary),
        disk_tier=Place.read(disk_tier),
        huge_pages=huge_pages(),
        huge_pages_asked=huge_pages_asked(),
        extras={name: _version(name) for name in (*EXTRAS, "triton")},
        embedded_model=(embedded_model() / "model.safetensors").exists(),
    )


def _native() -> Native:
    return Native(
        isas=library.isa_names(),
        products=cpu_product.model_isa_names(),
        reason=library.unavailable_reason(),
        built=find_spec("alisa.kernels._native") is not None,
        shares_threads=library.openmp().parallel != 0,
        compiler=next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
        self_test=run_self_test(cpu.CpuKernels()) if library.available() else None,
    )


def _packed(dtypes: Sequence[torch.dtype]) -> tuple[str, ...]:
    weights = {dtype: torch.ones(32, 32, dtype=dtype) for dtype in dtypes}
    layers = {
        dtype: choose_linear("float", dtype, weight.device).layer(weight, None) for dtype, weight in weights.items()
    }
    return tuple(
        str(dtype).removeprefix("torch.") for dtype, layer in layers.items() if not isinstance(layer, PlainLinear)
    )


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(name=torch.cuda.get_device_name(device), total_bytes=total, free_bytes=free)


def _import_failure(name: str) -> str:
    if find_spec(name) is None:
        return ""
    try:
        import_module(name)
    except Exception as error:  # a broken package may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
