"""A probabilistic grammar small enough to read: it expands sentences and keeps pronouns in agreement with names.

Notation: ``{a|b|c}`` chooses one alternative (they nest); ``<rule>`` expands a rule of the lexicon; ``<town>``,
``<thing>``, ``<B>`` are facts of the story; ``<H>`` and ``<F>`` mention the hero and the friend by name or by pronoun,
as the sentence before allows; ``<H.name>``, ``<H.he>``, ``<H.He>``, ``<H.him>``, ``<H.his>``, ``<H.himself>``,
``<H.poss>``, ``<H.job>`` name one form.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOUÍ]|hon|hour)")
_FIRST_LETTER = re.compile(r"^([^\w]*)(\w)")
_PRONOUN_CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody in the story; the pronouns follow from `female`."""

    name: str
    female: bool
    job: str

    def form(self, form: str) -> str:
        """One grammatical form of the character. Raises KeyError for a form that does not exist."""
        she = self.female
        forms = {
            "name": self.name,
            "job": self.job,
            "he": "she" if she else "he",
            "He": "She" if she else "He",
            "him": "her" if she else "him",
            "his": "her" if she else "his",
            "himself": "herself" if she else "himself",
        }
        return forms[form]


class Narrator:
    """Expands templates for one story: holds its facts, its random source and who was spoken of last."""

    def __init__(
        self,
        rng: random.Random,
        rules: Mapping[str, Sequence[str]],
        facts: Mapping[str, str],
        characters: Mapping[str, Character],
    ) -> None:
        self._rng = rng
        self._rules = rules
        self._facts = facts
        self._characters = characters
        self._focus: str | None = None
        self._drawn: set[str] = set()

    def start_paragraph(self) -> None:
        """A new paragraph names people again before it uses pronouns."""
        self._focus = None

    def sentence(self, template: str) -> str:
        """The template expanded, with articles and the first capital put right."""
        self._drawn.clear()
        text = self._expand(template)
        text = _ARTICLE.sub(r"\1n ", text)
        return _FIRST_LETTER.sub(lambda match: match[1] + match[2].upper(), text, count=1)

    def _expand(self, template: str) -> str:
        parts: list[str] = []
        position = 0
        while position < len(template):
            character = template[position]
            if character == "{":
                end = _closing_brace(template, position)
                parts.append(self._expand(self._rng.choice(_alternatives(template[position + 1 : end]))))
                position = end + 1
            elif character == "<":
                end = template.index(">", position)
                parts.append(self._refer(template[position + 1 : end]))
                position = end + 1
            else:
                parts.append(character)
                position += 1
        return "".join(parts)

    def _refer(self, reference: str) -> str:
        role, _, form = reference.partition(".")
        if role in self._characters:
            return self._mention(role, form)
        if reference in self._facts:
            return self._facts[reference]
        # "figs, bread and figs" is no enumeration: within a sentence a rule gives a new word each time.
        rule = self._rules[reference]
        fresh = [word for word in rule if word not in self._drawn]
        word = self._rng.choice(fresh or rule)
        self._drawn.add(word)
        return self._expand(word)

    def _mention(self, role: str, form: str) -> str:
        person = self._characters[role]
        in_focus = self._focus == role
        if form == "" or form == "poss":
            pronoun = in_focus and self._rng.random() < _PRONOUN_CHANCE
            self._look_at(role)
            if form == "":
                return person.form("he") if pronoun else person.name
            return person.form("his") if pronoun else person.name + "’s"
        if form == "name":
            self._look_at(role)
        return person.form(form)

    def _look_at(self, role: str) -> None:
        """A pronoun may stand for `role` next, unless another of the same gender was in view."""
        other = self._focus
        clash = other not in (None, role) and self._same_gender(str(other), role)
        self._focus = None if clash else role

    def _same_gender(self, one: str, other: str) -> bool:
        return self._characters[one].female == self._characters[other].female


def _closing_brace(template: str, start: int) -> int:
    depth = 0
    for position in range(start, len(template)):
        depth += {"{": 1, "}": -1}.get(template[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brace in template: {template!r}")


def _alternatives(body: str) -> list[str]:
    """`body` split at the bars outside nested braces."""
    alternatives = [""]
    depth = 0
    for character in body:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "|" and depth == 0:
            alternatives.append("")
        else:
            alternatives[-1] += character
    return alternatives
