"""Compiles every Triton kernel for GPUs that need not be there, as the launches would: a program, not a test.

    python -m tests.kernels.compile_triton selection|float32|bfloat16|float16|int8|int4

Interpreted kernels accept much that a compiler refuses (shapes that are no power of two, variables of changing type,
products too small for a tensor core). So the kernels are launched with real arguments on the CPU, the launch is caught,
and what it would have compiled on a GPU is compiled down to machine code: ptxas comes with triton. A kernel that spills
registers fails too. It must be a process of its own, because the tests' one interprets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from alisa.kernels.base import Ranking
from alisa.kernels.reference.sketch import make_sketch
from alisa.kernels.triton.kernels import TritonKernels
from tests.kernels.cases import make_problem

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")


class Compiler:
    """Stands in for the launch of a kernel: compiles it for every target and remembers what it needs."""

    def __init__(self, variants: list[tuple[int, bool]]) -> None:
        self.variants = (
            variants  # (compute capability, whether addresses and sizes are multiples of 16 where they can be)
        )
        self.failures: list[str] = []

    def launch(self, kernel, *args, grid, warmup, num_warps=4, **constants) -> None:
        signature, divisible = {}, {}
        for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            if parameter.is_constexpr:
                signature[name] = "constexpr"
            elif isinstance(args[index], torch.Tensor):
                signature[name] = POINTERS[args[index].dtype]
                divisible[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(args[index], float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if args[index] < 2**31 else "i64"
                if args[index] % 16 == 0 and not parameter.do_not_specialize:
                    divisible[(index,)] = [["tt.divisibility", 16]]
        for capability, aligned in self.variants:
            source = ASTSource(kernel, signature, constants, divisible if aligned else {})
            target, options = GPUTarget("cuda", capability, 32), {"num_warps": num_warps}
            compiled = triton.compile(source, target=target, options=options)
            registers, stack = resources(compiled.asm["cubin"])
            line = f"{kernel.__name__} sm_{capability}: {registers} registers, {stack} bytes of stack, {constants}"
            print(line)  # noqa: T201
            if stack and aligned:
                self.failures.append(line)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack (spilled registers) in the machine code of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def launch_rows(row_dtype: str, shapes: list[tuple[int, int]]) -> None:
    """Decode attention and append, for (heads to a KV head, head_dim)."""
    kernels = TritonKernels()
    for group, head_dim in shapes:
        problem = make_problem(
            row_dtype, num_rows=20, kv_heads=4, group=group, head_dim=head_dim, q_dtype=torch.bfloat16
        )
        for softcap in (None, 50.0):
            kernels(*replace(problem, softcap=softcap).args())
        k = torch.zeros(3, 4, head_dim, dtype=torch.bfloat16)
        kernels.append(problem.rows, problem.codec.format, torch.arange(3), k, k)


def launch_selection(dtypes: list[torch.dtype], shapes: list[tuple[int, int]], bits: list[int]) -> None:
    """Everything else, for scores of these dtypes."""
    kernels = TritonKernels()
    integers = torch.ones(3, dtype=torch.int32)
    for dtype in dtypes:
        kernels.select(torch.zeros(9000, dtype=dtype), torch.arange(3) * 3000, integers, integers, integers, 5, 3000)
    rows = torch.arange(3)
    mass = torch.zeros(3, 40)
    kernels.observe(torch.zeros(99).double(), torch.zeros(99), rows, rows, mass.int(), integers, mass)
    for num_bits in bits:
        for group, head_dim in shapes:
            keys = torch.zeros(50, 4, head_dim)
            sketched, values = make_sketch(keys, num_bits), make_sketch(keys, 2)
            kernels.sketch_append(sketched, torch.arange(50), keys.bfloat16())
            query = torch.zeros(3, 4 * group, head_dim, dtype=torch.bfloat16)
            ranking = Ranking(rows, integers, integers, integers, integers, 5, 40, 1)
            kernels.sketch_select(query, sketched, ranking)
            kernels.sketch_complete(query, sketched, values, ranking)
            kernels.rest_blend(query, torch.zeros(query.shape[:2]), query.float())
            sums = torch.zeros(3, 4, head_dim).double()
            kernels.mean_blend(sums, rows, integers, query, torch.zeros(query.shape[:2]))


def main(extent: str) -> int:
    """Compile what is asked for; how many kernels spill."""
    shapes = [(1, 80), (1, 128), (4, 128), (8, 64), (7, 256), (32, 64)]
    compiler = Compiler([(80, False), (80, True), (90, True)])
    JITFunction.run = lambda kernel, *args, **options: compiler.launch(kernel, *args, **options)
    match extent:
        case "selection":
            launch_selection([torch.float32, torch.float64], shapes, [2, 4, 8])
        case row_dtype:
            launch_rows(row_dtype, shapes)
    if compiler.failures:
        print("spilled registers:", *compiler.failures, sep="\n", file=sys.stderr)  # noqa: T201
    return len(compiler.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
