"""Prompts and lines to compare models and tokenizers on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

PROMPTS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a lighthouse in winter.",
    "Translate into Spanish: Where is the railway station?",
    "List three differences between a frog and a toad.",
    "A train leaves at 14:35 and arrives at 17:10. How long is the journey?",
    "Write a Python function that reverses the words of a sentence.",
    "Who wrote Pride and Prejudice, and in which year was it published?",
    "Give me a recipe for pancakes with 3 eggs, 250 g of flour and 500 ml of milk.",
    "Correct the grammar: he don't know nothing about they problems",
    "Summarise: The harbour was built in 1873. It silted up within forty years and was given up for one further south.",
    "What does `git rebase --onto main feature~3 feature` do?",
    "Is 2027 a prime number? Think step by step.",
    "Complete the story: The lift stopped between two floors, and the lights went out.",
    "Name the planets in order of their distance from the sun.",
    "Write an e-mail that politely declines an invitation to a wedding.",
    "Convert 72 degrees Fahrenheit to Celsius.",
    'Answer with JSON only: {"city": ?, "country": ?} for the Eiffel Tower.',
    "Přelož do angličtiny: Kde je nejbližší lékárna?",
    "東京の人口はどのくらいですか？",
]

_ROOT = Path(__file__).parents[2]
_CODE_POINTS = (range(0x20, 0x7F), range(0xA0, 0x250), range(0x370, 0x500), range(0x5D0, 0x5EB), range(0x900, 0x980))
_CODE_POINTS += (range(0x3040, 0x3100), range(0x4E00, 0x4F00), range(0x1F300, 0x1F650), range(0x300, 0x340))


def varied_lines(count: int) -> list[str]:
    """Lines of prose, code, tables and questions, and made-up ones of many scripts; the same in every run.

    They come from the text files under `ALISA_DATA` where that is set, else from this repository.
    """
    data = os.environ.get("ALISA_DATA")
    lines = sorted({line for line in (_data_lines(Path(data)) if data else _own_lines()) if line.strip()})
    rng = random.Random(0)
    made_up = [_made_up(rng) for _ in range(count // 5)]
    return rng.sample(lines, count - len(made_up)) + made_up


def _data_lines(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.suffix == ".txt":
            yield from path.read_text(encoding="utf-8", errors="replace")[:200_000].splitlines()
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")[:200_000]
            yield from (json.loads(line) for line in _strings(text))


def _strings(text: str) -> Iterator[str]:
    """JSON strings of some length, still quoted."""
    for piece in text.split('": "')[1:]:
        string = '"' + piece.split('"', 1)[0] + '"'
        if len(string) > 12 and not string.endswith('\\"'):
            yield string


def _own_lines() -> Iterator[str]:
    for pattern in ("*.md", "docs/*.md", "src/**/*.py", "src/**/*.h", "tests/**/*.py"):
        for path in sorted(_ROOT.glob(pattern)):
            yield from path.read_text(encoding="utf-8").splitlines()


def _made_up(rng: random.Random) -> str:
    """Words of one to eight characters of one script each, with runs of spaces, tabs, line ends and digits between."""
    words = []
    for _ in range(rng.randint(1, 12)):
        script = rng.choice(_CODE_POINTS)
        words.append("".join(chr(rng.choice(script)) for _ in range(rng.randint(1, 8))))
        words.append(
            rng.choice([" ", "  ", " " * rng.randint(3, 40), "\n", "\n\n\n", "\t", "", str(rng.randint(0, 10**9))])
        )
    return "".join(words)
