"""The `alisa` command: picks the subcommand and turns every expected failure into one sentence and an exit status.

Exit status: 0 done; 2 the caller can mend it (one line on standard error); 130 Ctrl-C; 141 the reader of standard
output went away. A traceback means a bug of ours.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Protocol

import tyro

from alisa import __version__
from alisa.cli.bench import BenchKernels
from alisa.cli.bench_suite import BenchCompare, BenchPlot, BenchRun
from alisa.cli.doctor import Doctor
from alisa.cli.eval import Ppl, Qa, Recall, Sparsity
from alisa.cli.generate import INTERRUPTED, Generate
from alisa.cli.plan import Plan
from alisa.cli.plot import Plot
from alisa.cli.profile import Profile
from alisa.cli.screen import say
from alisa.errors import AlisaError, InputError


class Command(Protocol):
    """A frozen dataclass whose fields are the options of one subcommand and whose docstring is its help."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "eval ppl": Ppl,
    "eval qa": Qa,
    "eval recall": Recall,
    "eval sparsity": Sparsity,
    "plan": Plan,
    "plot": Plot,
    "bench kernels": BenchKernels,
    "bench run": BenchRun,
    "bench compare": BenchCompare,
    "bench plot": BenchPlot,
    "doctor": Doctor,
    "profile": Profile,
}
"""Every subcommand by name, of one word or two; importing one must not import torch."""


def main(argv: Sequence[str], commands: Mapping[str, type[Command]] = COMMANDS) -> int:
    """Run one command line; returns the exit status.

    Args:
        argv: the words after `alisa`.
        commands: the subcommands there are.

    Raises:
        SystemExit: from the option parser, after `--help` (0) and on usage errors (2).
    """
    try:
        status = _dispatch(argv, commands)
        sys.stdout.flush()
    except AlisaError as error:
        say(f"alisa: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted before the first result.")
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except OSError as error:
        _abandon_stdout()
        say(f"alisa: error: {error.filename or 'standard output'}: {error.strerror}.")
        return 2
    return status


def run() -> None:
    """Entry point of the `alisa` script."""
    # A terminal that cannot show a character gets its code instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))


def parse(name: str, kind: type[Command], options: Sequence[str]) -> Command:
    """The options of command `name` as its own dataclass.

    Raises:
        InputError: a value is out of range.
        SystemExit: after `--help` (0) and on usage errors (2).
    """
    return tyro.cli(
        kind,
        prog=f"alisa {name}",
        description=inspect.getdoc(kind),
        args=options,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def _dispatch(argv: Sequence[str], commands: Mapping[str, type[Command]]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help(commands))
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"alisa {__version__}\n")
        return 0
    family = {name: kind for name, kind in commands.items() if name.startswith(f"{argv[0]} ")}
    if family and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        sys.stdout.write(_help(family))
        return 0
    name, options = (" ".join(argv[:2]), argv[2:]) if family else (argv[0], argv[1:])
    if name not in commands:
        near = get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "alisa --help lists the commands."
        raise InputError(f"There is no command {name!r}; {hint}")
    return parse(name, commands[name], options).run()


def _help(commands: Mapping[str, type[Command]]) -> str:
    lines = [f"  {name:<15}{(inspect.getdoc(kind) or '').splitlines()[0]}" for name, kind in commands.items()]
    return (
        "usage: alisa COMMAND [OPTIONS]\n\n"
        "Text generation where the KV cache does not fit: sparse window attention, token by token.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "alisa COMMAND --help shows the options and examples of a command, alisa --version the version.\n"
    )


def _abandon_stdout() -> None:
    """Let the interpreter's last flush of standard output go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
