"""What the tests of fleets share: an input, the command in a process of its own, and what one process makes of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from alisa.config import SamplingParams, per_request
from alisa.llm import LLM

ROOT = Path(__file__).parents[2]
WORDS = "the old ship was at sea and a storm came up in the night while captain men sailed home".split()  # noqa: SIM905
OPTIONS = ("--max-tokens", "12", "--temperature", "0.8", "--seed", "5")
# Workers import what a test gives them, and two busy processes must not fight over the cores.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def write_prompts(path: Path, num_prompts: int, poison: Mapping[int, str] | None = None) -> list[str]:
    """Prompts of different lengths with ids that are not in order, some with a word before them; returns the texts."""
    draw = random.Random(num_prompts)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(num_prompts)]
    for index, word in (poison or {}).items():
        texts[index] = f"{word} {texts[index]}"
    lines = [json.dumps({"id": f"p{-index}", "prompt": text}) for index, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return texts


def start(source: Path, output: Path, address: str, *options: str) -> subprocess.Popen[str]:
    """The command, with replicas that can be made to die."""
    words = [sys.executable, "-m", "tests.dist.mortal", "generate", "--input", str(source), "--output", str(output)]
    return subprocess.Popen(
        [*words, "--ray", address, "--json", *OPTIONS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
    )


def one_process(texts: list[str]) -> list[tuple[int, ...]]:
    """The tokens that one engine gives."""
    rules = SamplingParams(max_tokens=12, temperature=0.8, seed=5)
    with LLM() as llm:
        outputs = llm.generate(texts, [per_request(rules, index) for index in range(len(texts))])
    return [output.token_ids for output in outputs]


def check(output: Path, expected: Sequence[tuple[int, ...]], errors: tuple[int, ...] = ()) -> None:
    """Every prompt has one result, in order, and what is no error is what one process gives."""
    lines = results(output)
    assert [line["index"] for line in lines] == [*range(len(expected))]
    assert [line["id"] for line in lines] == [f"p{-index}" for index in range(len(expected))]
    assert tuple(line["index"] for line in lines if "error" in line) == errors
    for line in lines:
        if "error" not in line:
            assert tuple(line["token_ids"]) == expected[line["index"]], line["index"]


def end(driver: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """What the command wrote, once it has ended as it should."""
    out, err = driver.communicate(timeout=800)
    assert driver.returncode == status, err
    assert "Traceback" not in err
    return out, err


def results(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def finished(output: Path) -> int:
    """Lines of results that are on disk."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob("shards/*") if path.suffix != ".running")


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it has not come to it in time"
        time.sleep(0.05)


def replicas(ancestor: int, name: str = "ray::Replica") -> Iterator[psutil.Process]:
    """The processes of replicas below one of ours."""
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                yield process
        except psutil.Error:
            continue
