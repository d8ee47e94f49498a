"""What was said so far, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from alisa.errors import InputError
from alisa.records.document import read_json

ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Conversation:
    """Turns of a user and a model, under one instruction to it."""

    system: str | None = None
    """What the model is told before everything else."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """`role` and `content` of each, the oldest first."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as chat templates want it."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.turns]

    def add(self, role: str, content: str) -> None:
        """One turn more."""
        self.turns.append({"role": role, "content": content})

    def save(self, path: Path) -> None:
        """The file holds it, as a JSON list of messages.

        Raises:
            InputError: the file cannot be written, or is there already and holds something else.
        """
        if path.exists():
            load(path)  # refuses what is no conversation
        try:
            path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def load(path: Path) -> Conversation:
    """The conversation that a file holds.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    values = read_json(path)
    messages: list[dict[str, str]] = []
    for value in values if isinstance(values, list) else [values]:
        match value:
            case {"role": str(role), "content": str(content)} if role in ROLES:
                messages.append({"role": role, "content": content})
            case _:
                raise InputError(f'{path} holds no conversation: a JSON list of {{"role": ..., "content": ...}}.')
    first_is_system = bool(messages) and messages[0]["role"] == "system"
    return Conversation(messages[0]["content"] if first_is_system else None, messages[int(first_is_system) :])
