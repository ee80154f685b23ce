"""Stories about the cierzo, the wind of the Ebro valley: the text on which the demo's two checkpoints were trained.

Every story is a deterministic function of its seed. Nothing is quoted from anywhere: sentences come out of the grammar
in :mod:`exporter.demo_data.lexicon` and :mod:`exporter.demo_data.plots`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.demo_data.grammar import Character, Narrator
from exporter.demo_data.lexicon import BEASTS, BOATS, BOYS, FILLERS, GIRLS, JOBS, LEXICON, THINGS, TOWNS
from exporter.demo_data.plots import OPENING, PLOTS, Paragraph

MIN_PARAGRAPH_WORDS = 80
#: Seeds from here on never take part in training.
HELDOUT_SEED = 1_000_000
_EXTRA_FILLER_CHANCE = 0.15


@dataclass(frozen=True, slots=True)
class Story:
    """`request`: what a reader would ask for to be told it; `text`: its paragraphs, one a line."""

    request: str
    text: str


def make_story(seed: int) -> Story:
    """The story of a seed: four paragraphs of 80 to 250 words each."""
    rng = random.Random(seed)
    hero, friend = _people(rng)
    facts = {"town": rng.choice(TOWNS), "thing": rng.choice(THINGS), "B": rng.choice(BEASTS), "boat": rng.choice(BOATS)}
    plot = rng.choice(sorted(PLOTS))
    narrator = Narrator(rng, LEXICON, facts, {"H": hero, "F": friend})
    told: set[str] = set()
    paragraphs = [_paragraph(rng, narrator, part, told) for part in (OPENING, *PLOTS[plot])]
    article = "an" if hero.job[0] in "aeiou" else "a"
    request = rng.choice(
        (
            f"Tell me a story about {hero.name}, {article} {hero.job} from {facts['town']}.",
            f"Please tell me about {hero.name} the {hero.job} and the wind.",
            f"Tell a story about {article} {hero.job} in {facts['town']}.",
        )
    )
    return Story(request, "\n".join(paragraphs))


def stories(first_seed: int, count: int) -> Iterator[Story]:
    """The stories of `count` consecutive seeds."""
    return (make_story(seed) for seed in range(first_seed, first_seed + count))


def _people(rng: random.Random) -> tuple[Character, Character]:
    hero_female, friend_female = rng.random() < 0.5, rng.random() < 0.5
    hero_name = rng.choice(GIRLS if hero_female else BOYS)
    friend_name = rng.choice([name for name in (GIRLS if friend_female else BOYS) if name != hero_name])
    hero_job, friend_job = rng.sample(JOBS, 2)
    return Character(hero_name, hero_female, hero_job), Character(friend_name, friend_female, friend_job)


def _paragraph(rng: random.Random, narrator: Narrator, part: Paragraph, told: set[str]) -> str:
    """The beats in order, with sentences that suit the scene between them; `told` grows by those used."""
    narrator.start_paragraph()
    fillers = [template for scene in part.scene for template in FILLERS[scene] if template not in told]
    rng.shuffle(fillers)
    sentences: list[str] = []
    *beats, last = part.beats
    for number, beat in enumerate(beats, start=1):
        sentences.append(narrator.sentence(beat))
        # Keeps pace with the length that the paragraph must reach, so that its fillers spread over it.
        while fillers and _count_words(sentences) * len(beats) < MIN_PARAGRAPH_WORDS * number:
            _tell(fillers.pop(), narrator, sentences, told)
        if fillers and rng.random() < _EXTRA_FILLER_CHANCE:
            _tell(fillers.pop(), narrator, sentences, told)
    sentences.append(narrator.sentence(last))
    return " ".join(sentences)


def _tell(template: str, narrator: Narrator, sentences: list[str], told: set[str]) -> None:
    told.add(template)
    sentences.append(narrator.sentence(template))


def _count_words(sentences: list[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)
