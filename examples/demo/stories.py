"""A small generative grammar of simple stories, made for this demonstration.

A story is an opening, a wish, and five sentences (an event, a meeting, what the two do, a feeling, an ending), each of
which is pleasant, neutral or sad. The three moods are equally likely in every sentence, and a sentence has the mood of
the one before it half of the time. What makes the stories worth modelling is what must stay consistent: name, pronoun,
friend, object, places, and whether the hero still has the object (it may be broken or taken, and come back).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import grammar

MOODS = ("pleasant", "neutral", "sad")
PERSISTENCE = 0.25  # 0.25 + 0.75 / 3: a sentence has the mood of the one before it half of the time


@dataclass(frozen=True)
class Story:
    """A story as sentences, the first `num_prompt` of which are its prompt, and the moods of its last five."""

    sentences: tuple[str, ...]
    num_prompt: int
    moods: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole story."""
        return " ".join(self.sentences)

    @property
    def prompt(self) -> str:
        """The opening: 8 to 16 words that carry no feeling."""
        return " ".join(self.sentences[: self.num_prompt])


def _lines(block: str) -> list[str]:
    return block.strip().splitlines()


def _facts(rng: random.Random) -> dict[str, str]:
    """What stays the same through one story."""
    pronoun, friend_pronoun = rng.choice(("she", "he")), rng.choice(("she", "he"))
    name = rng.choice(grammar.NAMES[pronoun])
    friend = rng.choice([n for n in grammar.NAMES[friend_pronoun] if n != name])
    home, place = rng.sample(grammar.PLACES, 2)
    colour, other = rng.sample(grammar.COLOURS, 2)
    kinds = [rng.choice([grammar.PEOPLE[p], rng.choice(grammar.ANIMALS)]) for p in (pronoun, friend_pronoun)]
    facts = {"name": name, "kind": kinds[0], "friend": friend, "fkind": kinds[1], "home": home, "place": place}
    facts |= {
        "object": rng.choice(grammar.OBJECTS),
        "colour": colour,
        "other": other,
        "fhis": grammar.PRONOUNS[friend_pronoun]["his"],
    }
    return facts | grammar.PRONOUNS[pronoun]


def _fill(template: str, facts: dict[str, str], rng: random.Random) -> str:
    slots = {slot: rng.choice(words) for slot, words in grammar.SLOTS.items()}
    # "a terrible", "an awful": the article stands in the template, so the word must fit it.
    slots["awful1"] = rng.choice([word for word in grammar.SLOTS["awful"] if word[0] not in "aeiou"])
    slots["awful2"] = rng.choice([word for word in grammar.SLOTS["awful"] if word[0] in "aeiou"])
    return template.format(**slots, **facts)


def _possible(template: str, has_object: bool) -> bool:
    if template.startswith("mend: "):
        return not has_object
    return has_object or "{object}" not in template


def write_story(rng: random.Random) -> Story:
    """Draw one story."""
    facts = _facts(rng)
    openings, wishes = rng.choice(grammar.BEGINNINGS)
    opening, wish = rng.choice(_lines(openings)), rng.choice(_lines(wishes))
    start = [part if part.endswith(".") else part + "." for part in _fill(opening, facts, rng).split(". ")]
    sentences, moods, has_object = [*start, _fill(wish, facts, rng)], [], True
    mood = rng.choice(MOODS)
    for part in grammar.PARTS:
        if rng.random() > PERSISTENCE:
            mood = rng.choice(MOODS)
        template = rng.choice([line for line in _lines(part[mood]) if _possible(line, has_object)])
        mark, colon, sentence = template.rpartition(": ")
        if colon:
            has_object = mark == "mend"
        sentences.append(_fill(sentence, facts, rng))
        moods.append(mood)
    return Story(tuple(sentences), len(start), tuple(moods))
