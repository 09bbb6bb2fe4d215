"""Chat templates: a conversation as the text that a model was trained to continue, by the template that came with it.

Templates are Jinja programs that come with a model, so they run in Jinja's immutable sandbox and see plain
JSON values only; one with loops in loops can still take long. They see what `transformers` shows them: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TEMPLATE_CHARACTERS = 1 << 20
# Before it, templates could leave the sandbox (CVE-2025-27516).
_MIN_JINJA = (3, 1, 6)
# What an assistant thought before it answered; templates read the first of these names, or the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text of a conversation.

    Args:
      messages: oldest first, each with `role` and `content`, and whatever else the template reads.
      add_generation_prompt: whether to begin the assistant's answer.
      variables: further names that the template sees, such as `bos_token` and `tools`.

    Raises:
      ValueError: if there are no messages, one is no mapping, or the template is wrong or refuses them.
      ImportError: without jinja2.
    """
    if not messages:
        raise ValueError("messages: got none, expected at least one, such as {'role': 'user', 'content': 'Hello'}")
    plain = [_message(number, message) for number, message in enumerate(messages)]
    names = {"tools": None, "documents": None, **{name: _plain(value) for name, value in variables.items()}}
    compiled = _compile(template)
    try:
        return compiled.render(messages=plain, add_generation_prompt=add_generation_prompt, **names)
    except Exception as error:  # The template's own code: it can raise anything.
        raise ValueError(
            f"chat template: {type(error).__name__}: {error}; are these messages as it expects?"
        ) from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"chat template: {len(template):,} characters, expected at most {MAX_TEMPLATE_CHARACTERS:,}")
    _check_jinja()
    from jinja2 import exceptions, ext, sandbox

    class Generation(ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what is trained on; the text is what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise exceptions.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals.pop("lipsum")
    try:
        return environment.from_string(template)
    except Exception as error:  # RecursionError and others beside Jinja's own: the text is a stranger's.
        raise ValueError(f"chat template: not a Jinja template: {type(error).__name__}: {error}") from error


def _check_jinja() -> None:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a chat template needs jinja2; pip install 'gptjax[tokenizers]'") from error
    found = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if found < _MIN_JINJA:
        raise ImportError(
            f"a chat template needs jinja2 of at least {'.'.join(map(str, _MIN_JINJA))}, whose sandbox holds, got "
            f"{jinja2.__version__}; pip install -U 'gptjax[tokenizers]'"
        )


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"messages[{number}]: got {type(message).__name__}, expected a mapping with 'role' and 'content'"
        )
    found = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING_KEYS if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Of JSON's types only: a method of anything else could do harm inside the sandbox."""
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if value is None else f"<{type(value).__name__}>"
