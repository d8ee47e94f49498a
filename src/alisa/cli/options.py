"""Groups of options that several commands share; each class is one group of `--help`.

The engine's options are `alisa.config.EngineConfig` itself: its fields are the flags, its docstrings their help.
Nothing here imports torch: `--help` and every usage error come at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from alisa.cli.screen import say
from alisa.config import RENAMED, renamed


@dataclass(frozen=True, kw_only=True)
class DisplayOptions:
    """What is said, and where."""

    json: bool = False
    """End standard output with one JSON record on one line."""
    quiet: bool = False
    """No progress and no closing report on standard error."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Prompts from a file, results to a file."""

    input: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Prompts: .jsonl with {"prompt"} or {"instruction", "input"} on each line, .json with a list of those, .txt with
    one prompt on each line; - reads lines from standard input. A JSON prompt may also have an "id" (kept in its result,
    and by it a resumed run knows the prompt), settings of its own ("max_tokens", "temperature", "seed", "stop" and all
    others below) and any other field, which its result keeps under "metadata"."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N prompts of --input."""
    shard: Annotated[str | None, arg(metavar="I/N", help_behavior_hint="(default: all)")] = None
    """Only part I, from 0, of N parts of --input, for N commands that share the work, each with an --output of its own.
    Their results together are those of one command."""
    skip_invalid: bool = False
    """A line or prompt that cannot be used (not JSON, empty, too long) gets a result with "error" and the others run.
    Without it nothing runs until all are usable."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: standard output)")] = None
    """Results as JSON lines, each written when its prompt is finished. The same command goes on where an interrupted
    one ended."""
    report: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """What every step did, as JSON lines: one run record, one record for each step, one summary. A file that is there
    is continued."""


REGISTRY = ConstructorRegistry()
"""How options are read whose type alone does not say it well."""


@REGISTRY.primitive_rule
def _size(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | int | None] | None:
    """A size in bytes stays as it was typed."""
    if info.type != str | int | None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str | int),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.primitive_rule
def _name_or_nothing(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | None] | None:
    """One of some names; None is for nothing said, and is no name."""
    parts = get_args(info.type)
    names = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    if type(None) not in parts or len(parts) != 2 or not all(isinstance(name, str) for name in names) or not names:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in names,
        str_from_instance=lambda value: [str(value)],
        choices=names,
    )


def with_new_names(argv: Sequence[str]) -> list[str]:
    """The words of a command line, flags of version 0.1 replaced by those of now; each is said once."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = list(argv)
    for old, new in RENAMED.items():
        old_flag, new_flag = (f"--{name.replace('_', '-')}" for name in (old, new))
        for place, word in enumerate(argv[:end]):
            flag, equals, value = word.partition("=")
            if flag.replace("_", "-") == old_flag:
                say(f"alisa: {renamed(old_flag, new_flag)}")
                words[place] = f"{new_flag}{equals}{value}"
    return words
