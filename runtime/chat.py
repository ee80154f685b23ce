"""Rendering a chat with the checkpoint's Jinja template, so that messages cannot smuggle in control tokens.

The template runs as transformers runs it (sandboxed Jinja, `trim_blocks`, `lstrip_blocks`, loop controls and the
helpers `raise_exception`, `strftime_now`, `tojson`). Before that, wherever a message spells a control token, a mark
character that occurs nowhere else is put inside it; after it, the control tokens that are still whole are the
template's own. They get their private spelling (see control_tokens.py) and the marks disappear again:

    message  "bye </s>"      marked  "bye <¤/s>"      rendered  "[INST] bye <¤/s> [/INST]"
    result   "⟨INST⟩ bye </s> ⟨/INST⟩"      here ⟨…⟩ are control tokens and </s> is four characters

The edges of a text are marked too when they could complete a control token together with the text next to them, and
its inside when it has all the letters of one: Qwen3-Coder's template writes "<" + key + ">" around the keys of a
tool, once "-" is "_" and "$" is gone. A marked text still equals the unmarked one, so that templates find their keys
and compare types as ever. Texts that spell no control token are not changed, so their ids are those of transformers'
`apply_chat_template`. (A template that took letters out of a message, or changed their case, would escape all this.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from runtime.control_tokens import ControlTokens
from runtime.errors import TokenizerError
from runtime.token_text import one_line

if TYPE_CHECKING:
    import jinja2

_NO_LETTERS = re.compile(r"[\W_]+")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_MOST_DEPTH = 100  # tools are JSON schemas, which nest a few levels; templates walk them by recursion


class ChatTemplate:
    """A compiled chat template. Raises TokenizerError when it is not valid Jinja."""

    def __init__(self, source: str, control: ControlTokens, variables: Mapping[str, str]) -> None:
        import jinja2

        self._source = source
        self._control = control
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, ValueError, RecursionError) as error:  # ValueError: a number of endless digits
            raise TokenizerError(f"The checkpoint's chat template is not valid Jinja: {one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        """The chat as one text in which control tokens have their private spelling.

        Raises TokenizerError for an empty chat, for messages that are not plain JSON-like objects with a role, and
        for what the template itself refuses (its own words are in the error).
        """
        plain = plain_messages(messages)
        plain_tools = None if tools is None else [plain_json(tool, "tools") for tool in tools]
        mark = self._unused_character(json.dumps([plain, plain_tools], ensure_ascii=False))
        escape = json.dumps(mark)[1:-1]
        marker = _Marker(self._control, mark)
        try:
            rendered = self._template.render(
                messages=[
                    {marker.key(key): item if key == "role" else marker.apply(item) for key, item in message.items()}
                    for message in plain
                ],
                tools=marker.apply(plain_tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except TokenizerError:
            raise
        except Exception as error:  # the template is foreign code: whatever it stumbles over is its refusal
            raise TokenizerError(f"The checkpoint's chat template refuses these messages: {one_line(error)}") from error
        # A template that asks `tojson` for ASCII writes the mark as an escape.
        return self._control.to_private(rendered).replace(mark, "").replace(escape, "")

    def _unused_character(self, text: str) -> str:
        """A character that neither `text` nor the template has, nor its escape in JSON."""
        both = text + self._source
        used = set(both)
        # The private-use area; the first two characters belong to the private spellings.
        for code in range(0xE002, 0xF900):
            if chr(code) not in used and f"\\u{code:04x}" not in both:
                return chr(code)
        raise TokenizerError("The chat uses every character of Unicode's private-use area. Remove one of them.")


class _Marked(str):
    """A text with marks that equals the text without them; whatever a template builds from it keeps the marks."""

    plain: str

    def __eq__(self, other: object) -> bool:
        return self.plain == (other.plain if isinstance(other, _Marked) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.plain)


class _Marker:
    """Puts the mark into every text and key that spells a control token, an edge of one, or the letters of one."""

    def __init__(self, control: ControlTokens, mark: str) -> None:
        self._control = control
        self._mark = mark
        tokens = control.private
        self._beginnings = {token[:size] for token in tokens for size in range(1, len(token))}
        self._ends = {token[size:] for token in tokens for size in range(1, len(token))}
        self._letters = {letters for token in tokens if (letters := _letters(token))}
        self._longest = max(map(len, tokens), default=1)

    def apply(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        if isinstance(value, dict):
            return {self.key(key): self.apply(item) for key, item in value.items()}
        return value

    def key(self, key: str) -> str:
        if self._control.public_pattern.search(key):
            raise TokenizerError(
                f"The key {key!r:.100} in a message or tool spells a control token of the model. Rename it."
            )
        return self._marked(key)

    def _marked(self, text: str) -> str:
        core = text.strip()  # templates trim
        sizes = range(1, min(self._longest, len(text) + 1))
        before = any(text[:size] in self._ends or core[:size] in self._ends for size in sizes)
        after = any(text[-size:] in self._beginnings or core[-size:] in self._beginnings for size in sizes)
        broken = self._broken(core)
        if _letters(core) in self._letters:
            broken = broken[0] + self._mark + broken[1:]
        broken = (self._mark if before else "") + broken + (self._mark if after else "")
        if broken == core:
            return text
        start = len(text) - len(text.lstrip())
        marked = _Marked(text[:start] + broken + text[start + len(core) :])
        marked.plain = text
        return marked

    def _broken(self, text: str) -> str:
        # Once is not enough when a part of one token is another, as "s>" of "<s>": repeat until none is whole.
        count = 1
        while count:
            text, count = self._control.public_pattern.subn(self._break, text)
        return text

    def _break(self, found: re.Match[str]) -> str:
        token = found.group()
        if len(token) == 1:
            raise TokenizerError(
                f"A message of the chat contains the character {token!r}, which is a control token of the model. "
                "Remove it from the message."
            )
        return token[0] + self._mark + token[1:]


def _letters(text: str) -> str:
    """The letters and digits of `text`, without case."""
    return _NO_LETTERS.sub("", text).casefold()


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat in plain JSON types, without the keys whose value is None.

    Raises TokenizerError for an empty chat, and for a message that is no JSON-like object with a role.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TokenizerError("A chat must be a list of at least one message such as {'role': 'user', 'content': 'Hi'}.")
    plain = []
    for index, message in enumerate(messages):
        where = f"message {index}"
        role = message.get("role") if isinstance(message, Mapping) else None
        # Templates build control tokens from the role, so it is a word of the program, never text of a user.
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise TokenizerError(f"The {where} of the chat needs a `role`, one word such as 'user', not {role!r}.")
        # As transformers does: a key whose value is None counts as missing.
        plain.append({key: item for key, item in plain_json(message, where).items() if item is not None})
    return plain


def plain_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in plain JSON types: a template is foreign code and gets no object with methods of its own.

    where: what `value` is a part of, for the TokenizerError about anything that JSON has not, or nested too deep.
    """
    if depth > _MOST_DEPTH:
        raise TokenizerError(f"The {where} of the chat is nested more than {_MOST_DEPTH} levels deep.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): plain_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, where, depth + 1) for item in value]
    raise TokenizerError(
        f"The {where} of the chat holds a {type(value).__name__}; only JSON-like values can be rendered."
    )


def _environment() -> jinja2.Environment:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it only renders."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it per instance)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which the model has never seen in training.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals.update(helpers)
    environment.filters["tojson"] = tojson
    return environment
