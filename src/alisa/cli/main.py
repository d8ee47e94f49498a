"""The `alisa` command: picks the subcommand and turns every expected failure into one sentence and an exit status.

Exit status: 0 done; 2 the caller can mend it (one line on standard error); 130 Ctrl-C; 141 the reader of standard
output went away; 143 SIGTERM. A traceback means a bug of ours.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Protocol

import tyro
from tyro.extras import SubcommandApp

from alisa import __version__
from alisa.cli.bench import BenchKernels
from alisa.cli.bench_suite import BenchCompare, BenchPlot, BenchRun
from alisa.cli.chat import Chat
from alisa.cli.doctor import Doctor
from alisa.cli.eval import Generation, Ppl, Qa, Recall, Sparsity
from alisa.cli.generate import Generate
from alisa.cli.options import REGISTRY, with_new_names
from alisa.cli.plan import Plan
from alisa.cli.plot import Plot
from alisa.cli.profile import Profile
from alisa.cli.screen import say
from alisa.cli.serve import Serve
from alisa.cli.signals import mend_standard_streams, stop_on_sigterm, stop_status
from alisa.cli.tune import Tune
from alisa.errors import AlisaError, InputError


class Command(Protocol):
    """A frozen dataclass whose fields are the options of one subcommand and whose docstring is its help."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "eval ppl": Ppl,
    "eval qa": Qa,
    "eval recall": Recall,
    "eval generation": Generation,
    "eval sparsity": Sparsity,
    "tune": Tune,
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

_GROUPS = {
    "eval": "What reading less of the cache costs in perplexity, answers, recall and attention.",
    "bench": "Measurements of kernels and of whole engines.",
}


def run(commands: Mapping[str, type[Command]] = COMMANDS) -> None:
    """Entry point of the `alisa` script."""
    mend_standard_streams()
    stop_on_sigterm()
    sys.exit(main(sys.argv[1:], commands))


def main(argv: Sequence[str], commands: Mapping[str, type[Command]] = COMMANDS) -> int:
    """Run one command line; returns the exit status.

    Args:
        argv: the words after `alisa`.
        commands: the subcommands there are.

    Raises:
        SystemExit: from the option parser, after `--help` (0) and on usage errors (2).
    """
    try:
        if argv[:1] == ["--version"]:
            sys.stdout.write(f"alisa {__version__}\n")
            return 0
        status = parse(argv, commands).run()
        sys.stdout.flush()
    except AlisaError as error:
        say(f"alisa: error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        say("interrupted before the first result.")
        return stop_status(stop)
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except OSError as error:
        _abandon_stdout()
        say(f"alisa: error: {error.filename or 'standard output'}: {error.strerror}.")
        return 2
    return status


def parse(argv: Sequence[str], commands: Mapping[str, type[Command]] = COMMANDS) -> Command:
    """The command that these words mean, as its own dataclass.

    Raises:
        InputError: there is no such command, or a value is out of range.
        SystemExit: after `--help` (0) and on usage errors (2).
    """
    words = with_new_names(argv)
    name = " ".join(words[: 2 if words[:1] and words[0] in _GROUPS else 1])
    if not name or name in _GROUPS:
        words.append("--help")
    elif name not in commands and not {"-h", "--help"} & {*name.split()}:
        near = get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "alisa --help lists the commands."
        raise InputError(f"There is no command {name!r}; {hint}")
    return _app(commands, name).cli(
        prog="alisa",
        description="Text generation where the KV cache does not fit: sparse window attention, token by token.\n"
        "alisa COMMAND --help shows the options and examples of a command, alisa --version the version.",
        args=words,
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.DisallowNone,
        ),
        registry=REGISTRY,
    )


def _app(commands: Mapping[str, type[Command]], chosen: str) -> SubcommandApp:
    """The commands as tyro wants them; all but the chosen one are described in one line."""
    app = SubcommandApp()
    groups = {name.split()[0]: SubcommandApp() for name in commands if " " in name}
    for name, kind in commands.items():
        group, _, own_name = name.rpartition(" ")
        text = inspect.getdoc(kind) or ""
        help_text = text if name == chosen else text.partition("\n")[0]
        groups.get(group, app).command(name=own_name, help=help_text)(kind)
    for name, group in groups.items():
        app.command(group, name=name, help=_GROUPS[name])
    return app


def _abandon_stdout() -> None:
    """Let the interpreter's last flush of standard output go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
