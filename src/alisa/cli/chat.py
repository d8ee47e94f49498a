"""`alisa chat`: a conversation in the terminal, with a model here or behind a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from alisa.cli.conversation import Conversation, load
from alisa.cli.screen import error_console, waiting
from alisa.cli.talkers import RemoteTalker, Talker, local_talker
from alisa.config import EngineConfig, SamplingParams
from alisa.errors import AlisaError, InputError

HELP = """/stats          what the last answer took; /stats on says it after each
/policy NAME S  another policy, at sparsity S
/system TEXT    what the model is told before everything else
/save FILE      the conversation as JSON; /load FILE goes on with one
/undo           takes the last question and answer back
/clear          begins again
/quit           or Ctrl-D
A line that ends in a backslash goes on; a text between lines of three quotes may have many. Ctrl-C ends an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatEngine(EngineConfig):
    """Which model answers, how it attends, and how much memory it may use."""

    prefix_cache: bool = True


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk with a model.

    For instance:
      alisa chat --model DIR
      alisa chat --model DIR --policy swa --sparsity 0.9 --system "Answer in one sentence."
      alisa chat --url http://127.0.0.1:8000
    """

    url: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """A server that answers in place of a model here; its key from ALISA_API_KEY."""
    system: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """What the model is told before everything else."""
    load: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A conversation that /save wrote, to go on with."""
    quiet: bool = False
    """Nothing but the answers."""
    engine: ChatEngine = field(default_factory=ChatEngine)
    sampling: UseAppendAction[SamplingParams] = field(default_factory=lambda: SamplingParams(max_tokens=1024))

    def run(self) -> int:
        """Do it; returns the exit status."""
        conversation = Conversation() if self.load is None else load(self.load)
        conversation.system = self.system or conversation.system
        if self.url is not None and self.engine != ChatEngine():
            raise InputError(
                "--url is for a model behind a server, which has options of its own; leave the others out."
            )
        if self.sampling.n != 1:
            raise InputError(f"A conversation goes on in one way, and --n is {self.sampling.n}.")
        if self.url is not None:
            talker: Talker = RemoteTalker(self.url, os.environ.get("ALISA_API_KEY"))
        else:
            with waiting("loading the model", show=sys.stderr.isatty()):
                talker = local_talker(self.engine)
                if not talker.was_trained_on_chats and not self.quiet:
                    error_console().print(
                        "This model has no chat template: it continues the text of the conversation.", style="dim"
                    )
        session = _Session(talker, conversation, self.sampling, quiet=self.quiet)
        try:
            session.run()
        finally:
            session.close()
        return 0


class _Session:
    """A conversation while it goes on."""

    def __init__(self, talker: Talker, conversation: Conversation, params: SamplingParams, *, quiet: bool) -> None:
        self._talker = talker
        self._conversation = conversation
        self._params = params
        self._quiet = quiet
        self._tells_stats = not quiet
        self._console = error_console()

    def run(self) -> None:
        """Read and answer until the end of the input."""
        if not self._quiet:
            self._note(f"{self._talker.name}. /help lists what else can be typed.")
        for words in _questions(show=sys.stdin.isatty() and not self._quiet):
            try:
                if words.startswith("/"):
                    if self._command(*words[1:].partition(" ")[::2]):
                        return
                else:
                    self._answer(words)
            except AlisaError as error:
                self._console.print(str(error), style="red", markup=False, soft_wrap=True)

    def close(self) -> None:
        """What the talker held is given back."""
        self._talker.close()

    def _answer(self, words: str) -> None:
        conversation = self._conversation
        messages = [*conversation.messages, {"role": "user", "content": words}]
        answer = ""
        try:
            with closing(self._talker.answer(messages, self._params)) as pieces:
                for piece in pieces:
                    answer += piece
                    sys.stdout.write(_shown(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            self._note(" stopped")
        finally:
            if answer:
                sys.stdout.write("\n")
                sys.stdout.flush()
        conversation.add("user", words)
        conversation.add("assistant", answer)
        if self._tells_stats:
            self._note(self._talker.stats())

    def _command(self, name: str, rest: str) -> bool:
        """Do what a line that begins with a slash says; True: it says to stop."""
        rest = rest.strip()
        match name:
            case "quit" | "exit" | "q":
                return True
            case "help":
                self._note(HELP)
            case "clear":
                self._conversation.turns.clear()
            case "undo":
                del self._conversation.turns[-2:]
            case "system":
                self._conversation.system = rest or None
            case "save" | "load" if not rest:
                raise InputError(f"/{name} needs a file.")
            case "save":
                self._conversation.save(Path(rest).expanduser())
                self._note(f"saved in {rest}")
            case "load":
                self._conversation = load(Path(rest).expanduser())
                self._note(f"{len(self._conversation.turns)} turns")
            case "stats":
                self._tells_stats = {"on": True, "off": False}.get(rest, self._tells_stats)
                self._note(self._talker.stats() or "Nothing was said yet.")
            case "policy":
                self._talker = self._talker.with_policy(*_policy(rest))
                self._note(self._talker.name)
            case _:
                raise InputError(f"There is no /{name}; /help lists what there is.")
        return False

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


def _policy(words: str) -> tuple[str, float | None]:
    name, _, sparsity = words.partition(" ")
    if not name:
        raise InputError("/policy needs a name, such as dense, swa or sketch, and may have a sparsity.")
    try:
        return name, float(sparsity) if sparsity.strip() else None
    except ValueError as error:
        raise InputError(f"{sparsity!r} is no sparsity; a number from 0 up to but not 1 is.") from error


def _questions(*, show: bool) -> Iterator[str]:
    """What the user types, one text after the other, until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history
    while (words := _question(show=show)) is not None:
        if words.strip():
            yield words


def _question(*, show: bool) -> str | None:
    """One text; None: there are no more."""
    words = _line("> " if show else "")
    if words is None:
        return None
    if words.strip() == '"""':
        lines: list[str] = []
        while (line := _line(". " if show else "")) is not None and line.strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while words.endswith("\\"):
        words = words[:-1] + "\n" + (_line(". " if show else "") or "")
    return words


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _shown(text: str) -> str:
    """Without characters that steer a terminal."""
    return "".join("�" if (char < " " and char not in "\n\t") or "\x7f" <= char < "\xa0" else char for char in text)
