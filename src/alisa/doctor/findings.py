"""What the facts mean for a user: one finding a topic, each with the way out where there is one to take."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from alisa.config import format_bytes
from alisa.doctor.facts import EXTRAS, Facts
from alisa.doctor.finding import REINSTALL, Finding, Status
from alisa.machine import ASK_FOR_HUGE_PAGES, Place

_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
"""Instruction sets that make a difference here."""

_GIB = 1024**3


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """Every finding, from the installation itself outwards to the machine."""
    return tuple(_findings(facts))


def _findings(facts: Facts) -> Iterator[Finding]:
    build = f"for CUDA {facts.cuda}" if facts.cuda else "without CUDA"
    yield Finding(Status.OK, "versions", f"alisa {facts.alisa}, Python {facts.python}, torch {facts.torch} ({build})")
    yield _embedded_model(facts)
    flags = [label for flag, label in _FLAGS.items() if flag in facts.cpu.flags]
    yield Finding(
        Status.OK, "processor", f"{facts.cpu.name}: {', '.join(flags) or 'no vector instructions known here'}"
    )
    yield from _native(facts)
    yield _threads(facts)
    yield _dtype(facts)
    yield _packed(facts)
    yield _gpu(facts)
    yield _memory(facts)
    tier = f"rows that fit no memory may take {format_bytes(facts.kv_disk_bytes)}" if facts.kv_disk_bytes else ""
    if facts.temporary.path != facts.disk_tier.path:
        yield _place("temporary files", facts.temporary, "")
    yield _place("disk", facts.disk_tier, tier)
    yield _huge_pages(facts)
    yield _extras(facts)


def _embedded_model(facts: Facts) -> Finding:
    if facts.embedded_model:
        return Finding(Status.OK, "model", "the small model is inside the package; alisa generate runs without --model")
    return Finding(Status.NOTE, "model", "the small model is not inside the package", "name one with --model")


def _native(facts: Facts) -> Iterator[Finding]:
    native = facts.native
    if not native.isas:
        if native.built:
            yield Finding(Status.PROBLEM, "native kernels", f"built, but they do not load: {native.reason}", REINSTALL)
            return
        install = "a compiler is here now" if native.compiler else "install a C++ compiler (apt install g++)"
        yield Finding(
            Status.NOTE,
            "native kernels",
            "not built: attention over chosen tokens runs in plain torch, many times slower",
            f"{install}; then {REINSTALL}",
        )
        return
    others = f" (also there: {', '.join(native.isas[1:])})" if native.isas[1:] else ""
    yield Finding(Status.OK, "native kernels", f"{native.isas[0]} runs{others}; layers: {native.products[0]}")
    test = native.self_test
    assert test is not None, "kernels that are there were tried"
    if test.passed:
        difference = f"{test.largest_difference:.0e}"
        yield Finding(
            Status.OK, "self test", f"a decode step agrees with plain torch (largest difference {difference})"
        )
    else:
        what = test.failure or f"results differ from plain torch by {test.largest_difference:.1e}"
        yield Finding(Status.PROBLEM, "self test", f"native kernels fail: {what}", REINSTALL)


def _threads(facts: Facts) -> Finding:
    text = f"torch uses {facts.num_threads}, {facts.num_cpus:g} processors may be used"
    if facts.num_threads > ceil(facts.num_cpus) and facts.threads_fixed:
        return Finding(
            Status.NOTE, "threads", f"{text}: they wait for each other", f"OMP_NUM_THREADS={int(facts.num_cpus) or 1}"
        )
    if facts.num_threads > ceil(facts.num_cpus):
        text = (
            f"an engine uses {int(facts.num_cpus) or 1} of torch's {facts.num_threads}, {facts.num_cpus:g} may be busy"
        )
    if facts.num_threads * 2 < facts.num_cpus:
        return Finding(Status.NOTE, "threads", f"{text}: most are idle", "raise or unset OMP_NUM_THREADS")
    if facts.native.isas and not facts.native.shares_threads:
        return Finding(
            Status.NOTE,
            "threads",
            f"{text}; the native kernels start their own, because torch's OpenMP runtime was not found",
            "install torch from PyPI, whose builds bring one",
        )
    shared = "; the native kernels run on torch's" if facts.native.isas else ""
    load = "; fixed by the environment" if facts.threads_fixed else "; fewer while other programs are busy"
    return Finding(Status.OK, "threads", f"{text}{shared}{load} (waiting: {facts.spinning})")


def _dtype(facts: Facts) -> Finding:
    text = f"auto keeps float32 checkpoints, and runs 16-bit ones in {facts.dtype_16bit}"
    if facts.gpu is None and facts.native.isas:
        text += "; weights of GGUF files in Q4_0 or Q4_1 stay in 4 bits"
    if facts.gpu is None and not facts.fast_bfloat16:
        return Finding(
            Status.NOTE,
            "dtype",
            f"{text}, twice the memory: neither this CPU nor a native kernel multiplies bfloat16",
            "--dtype bfloat16 halves the memory and is slower",
        )
    return Finding(Status.OK, "dtype", text)


def _packed(facts: Facts) -> Finding:
    if facts.packed:
        return Finding(Status.OK, "linear layers", f"packed for the CPU in {' and '.join(facts.packed)}")
    return Finding(
        Status.NOTE,
        "linear layers",
        "not packed: this torch has no oneDNN for this CPU, so that each step converts the weights again",
        "install torch from PyPI",
    )


def _gpu(facts: Facts) -> Finding:
    if facts.gpu is None:
        if facts.nvidia_driver:
            way_out = "pip install a CUDA build of torch" if facts.cuda is None else "nvidia-smi tells more"
            return Finding(Status.NOTE, "GPU", "there is an NVIDIA driver, but torch sees no GPU", way_out)
        return Finding(Status.OK, "GPU", "none; everything runs on the CPU")
    size = f"{format_bytes(facts.gpu.free_bytes)} of {format_bytes(facts.gpu.total_bytes)} free"
    text = f"{facts.gpu.name}, {size}"
    if facts.triton_failure:
        return Finding(Status.PROBLEM, "GPU", f"{text}; Triton fails: {facts.triton_failure}", "pip install triton")
    triton = facts.extras["triton"]
    if triton is None:
        return Finding(Status.NOTE, "GPU", f"{text}; Triton is not installed", "pip install triton")
    return Finding(Status.OK, "GPU", f"{text}, Triton {triton}")


def _memory(facts: Facts) -> Finding:
    limit = f" (the container may use {format_bytes(facts.memory_limit)})" if facts.memory_limit else ""
    text = f"{format_bytes(facts.free_bytes)} free{limit}; KV rows get up to {format_bytes(facts.kv_bytes)}"
    text += " of the GPU's" if facts.gpu else " of it"
    if facts.kv_bytes < _GIB:
        return Finding(Status.NOTE, "memory", text, "end other programs, or choose with --kv-device-memory")
    return Finding(Status.OK, "memory", f"{text} unless --kv-device-memory says otherwise")


def _place(topic: str, place: Place, use: str) -> Finding:
    if place.free_bytes is None:
        return Finding(Status.PROBLEM, topic, f"{place.path} is not a directory", "make it, or choose another")
    text = f"{place.path} ({place.kind or 'unknown file system'}): {format_bytes(place.free_bytes)} free"
    if not place.writable:
        return Finding(Status.PROBLEM, topic, f"{text}, but it cannot be written to", "choose another directory")
    if place.is_ram:
        way_out = "choose a directory on a disk with --kv-disk-path or TMPDIR"
        return Finding(Status.NOTE, topic, f"{text}, but this is RAM and not a disk", way_out)
    if place.free_bytes < _GIB:
        return Finding(Status.NOTE, topic, text, "make room, or choose another directory")
    return Finding(Status.OK, topic, f"{text}; {use}" if use else text)


def _huge_pages(facts: Facts) -> Finding:
    # Three pairs of runs of OPT-1.3B, batch 16, 8-bit weights and rows, on two shared Zen 5 cores: a decode step took
    # 88, 80 and 74 ms without and 65, 64 and 86 ms with them; the last fell in a slow minute.
    if facts.huge_pages is None:
        return Finding(Status.OK, "huge pages", "this kernel does not say")
    if facts.huge_pages == "always" or (facts.huge_pages == "madvise" and facts.huge_pages_asked):
        return Finding(Status.OK, "huge pages", f"{facts.huge_pages}: large tensors get them")
    if facts.huge_pages == "madvise":
        return Finding(
            Status.NOTE,
            "huge pages",
            f"madvise, and {ASK_FOR_HUGE_PAGES} says not to ask: a step can take a fifth longer",
            f"{ASK_FOR_HUGE_PAGES}=1, or nothing, in the environment makes torch ask",
        )
    return Finding(
        Status.NOTE,
        "huge pages",
        f"{facts.huge_pages}: a step can take a fifth longer",
        "an administrator can allow them (/sys/kernel/mm/transparent_hugepage/enabled)",
    )


def _extras(facts: Facts) -> Finding:
    # Triton is listed with the GPU.
    there = [f"{name} {version}" for name, version in facts.extras.items() if version and name != "triton"]
    missing = [name for name, version in facts.extras.items() if not version and name != "triton"]
    text = ", ".join(there) or "none"
    if not missing:
        return Finding(Status.OK, "extras", text)
    names = ",".join(EXTRAS[name] for name in missing)
    return Finding(Status.NOTE, "extras", f"{text}; not there: {', '.join(missing)}", f"pip install 'alisa[{names}]'")
