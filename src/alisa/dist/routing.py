"""Calls that begin alike go to one replica, because it has K and V of the beginning in its prefix cache.

Which replica that is follows from a hash of the call and of the replicas' names alone (rendezvous hashing, Thaler and
Ravishankar 1998), so that every front decides alike without asking, and a replica that comes or goes moves only its own
calls. A replica whose batch is full passes a call on to the next in its order. SGLang's router and Ray Serve's own for
vLLM keep a tree of prefixes instead; a hash is enough where the beginning of a conversation never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SESSION_HEADER = "x-session-id"
"""A client that sends it says itself what belongs together."""

_FIELD = "prompt_cache_key"
"""OpenAI's word for the same, in the body."""

PREFIX_CHARS = 256
"""Characters of a prompt, or a quarter as many tokens, that decide where no conversation does."""


def routing_key(headers: Mapping[str, str], body: bytes) -> str:
    """What two calls share that should meet at one replica; empty: any will do.

    Args:
        headers: with names in small letters.
        body: of the call, as it came; what is wrong with it is for the replica to say.
    """
    if session := headers.get(SESSION_HEADER):
        return _digest(session)
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return _digest(_beginning(call)) if isinstance(call, dict) else ""


def _beginning(call: Mapping[str, Any]) -> object:
    """A conversation up to its first question, which its later calls begin with too; or the beginning of a prompt."""
    if call.get(_FIELD):
        return call[_FIELD]
    messages, prompt = call.get("messages"), call.get("prompt")
    if isinstance(messages, list):
        roles: list[object] = [message.get("role") if isinstance(message, dict) else None for message in messages]
        return messages[: roles.index("user") + 1] if "user" in roles else messages[:1]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts the first decides
    if isinstance(prompt, list):
        return prompt[: PREFIX_CHARS // 4]
    return prompt[:PREFIX_CHARS] if isinstance(prompt, str) else None


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """The replicas in the order in which a call with this key prefers them."""
    return sorted(replicas, key=lambda replica: hashlib.sha256(f"{key}/{replica}".encode()).digest())


def _digest(value: object) -> str:
    return "" if value is None else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
