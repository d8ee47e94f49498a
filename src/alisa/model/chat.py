"""Chat templates: the Jinja program in a model's tokenizer files that turns messages into a prompt.

Templates come from strangers, so they run in Jinja's immutable sandbox. The few names beyond plain Jinja are those that
Hugging Face documents (https://huggingface.co/docs/transformers/chat_templating_writing).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from alisa.errors import InputError


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is simply kept."""

    tags = {"generation"}  # noqa: RUF012 - Jinja wants a plain class attribute

    # typing.override needs Python 3.12.
    def parse(  # pyrefly: ignore[missing-override-decorator]
        self, parser: jinja2.parser.Parser
    ) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        special_tokens: `bos_token`, `eos_token` and the like, as the template may spell them out.

    Raises:
        InputError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source, globals=functions)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(
                f"The model's chat template is not usable ({error}); send a plain prompt instead."
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: mappings with `role` and `content`, oldest first; a key that is None is left out, because many
                templates would write the word.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions that the model may call; None: none.
            template_kwargs: what else the template knows, such as `enable_thinking`; None: nothing.

        Raises:
            InputError: the template refuses these messages; its own words are in the message.
        """
        try:
            names: dict[str, Any] = {"documents": None, **(template_kwargs or {})}
            names["messages"] = [
                {key: value for key, value in message.items() if value is not None} for message in messages
            ]
            names["tools"] = None if not tools else [dict(tool) for tool in tools]
            names["add_generation_prompt"] = add_generation_prompt
            return self._template.render(self._special_tokens | names)
        except RecursionError as error:
            raise InputError(
                "The model's chat template calls itself without end; send a plain prompt instead."
            ) from error
        # A template is a program: it may fail in any way a program can.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise InputError(f"The model's chat template refuses these messages: {error}.") from error
