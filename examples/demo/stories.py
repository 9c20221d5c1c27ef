"""A small generative grammar of children's stories, made for this demonstration.

A story is an opening, a wish, and five sentences (an event, a meeting, what the two do, a feeling, an ending), each of which
is pleasant, neutral or sad. The three moods are equally likely in every sentence, and a mood lasts into the next sentence a
little more often than chance. What makes the stories worth modelling is what must stay consistent: name, pronoun, friend,
object and its colour, places, and whether the hero still has the object (it may be broken or taken, and be given back).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MOODS = ("pleasant", "neutral", "sad")
PERSISTENCE = 0.25  # probability that a sentence keeps the mood of the last one, beyond the one in three of chance

PRONOUNS = {
    "she": {"he": "she", "He": "She", "his": "her", "him": "her"},
    "he": {"he": "he", "He": "He", "his": "his", "him": "him"},
}
NAMES = {
    "she": "Mia Lily Anna Rosa Nora Ella Zoe Lucy Tilly Grace Ruby Clara Daisy Maya Hazel Wren Ivy Stella".split(),
    "he": "Tom Ben Max Leo Sam Jack Finn Hugo Oscar Milo Theo Noah Felix Otto Jasper Toby Luca Ravi".split(),
}
PEOPLE = {"she": "girl", "he": "boy"}
ANIMALS = "rabbit fox bear mouse cat dog duck goat horse squirrel".split()
OBJECTS = "kite ball boat drum lantern basket book hat coat cup wagon flute bell map key puppet ladder scarf".split()
COLOURS = "red blue green yellow purple white black brown".split()
PLACES = "forest beach market hill river garden lake farm school park field mill village tower".split()

# Words that fill the slots of the same name. Those that carry feeling are in the lexicon of reward.py.
SLOTS = {
    "size": "little small young tall quiet busy curious".split(),
    "number": "two three four five six seven".split(),
    "time": "morning afternoon evening day".split(),
    "season": "spring summer autumn winter".split(),
    "food": "bread soup rice corn milk tea".split(),
    "thing": "tree wall gate well fence bench".split(),
    "glad": "happy glad proud cheerful joyful delighted calm hopeful excited".split(),
    "lovely": "lovely wonderful beautiful pretty nice perfect great good".split(),
    "mild": "sweet warm bright gentle funny".split(),
    "friendly": "kind gentle friendly caring brave".split(),
    "smiled": "smiled laughed cheered".split(),
    "sorry": "sad lonely upset unhappy worried afraid scared tired angry miserable".split(),
    "awful": "bad terrible awful horrible ugly scary".split(),
    "cried": "cried sobbed wept".split(),
    "mean": "mean rude cruel nasty grumpy".split(),
}

# Openings and wishes carry no feeling. The first kind brings in the object only with the wish.
OPENINGS_WITHOUT_OBJECT = """
Once there was a {size} {kind} named {name} who lived near the {home}.
{name} was a {size} {kind} who lived in a {other} house near the {home}.
Long ago, a {size} {kind} named {name} lived between the {home} and the {place}.
In a {other} house near the {home} lived a {size} {kind} named {name}.
"""
WISHES_FOR_OBJECT = """
{He} wanted to make a {colour} {object}.
One {time}, {he} was looking for a {colour} {object}.
One {time}, {he} went to the {place} to buy a {colour} {object}.
One {time}, {he} found a {colour} {object} near the {place}.
"""
OPENINGS_WITH_OBJECT = """
{name} was a {size} {kind} who had a {colour} {object}.
One {time}, a {kind} named {name} carried a {colour} {object} to the {place}.
There was a {size} {kind} named {name} who had a {colour} {object}.
{name} was a {size} {kind}. {He} kept a {colour} {object} near the door.
"""
WISHES_WITH_OBJECT = """
{He} wanted to show the {object} to someone.
{He} wanted to take the {object} over the {home}.
One {time}, {he} wanted to paint the {object}.
{He} went out with the {object} to look for {food}.
"""

# The sentences of each part by mood. "lose:" marks those after which the object is gone, "mend:" those that need it to be
# gone and bring it back; any other sentence that mentions the object needs the hero to have it.
PARTS: tuple[dict[str, str], ...] = (
    {
        "pleasant": """
The sun came out, and {he} had fun on the way.
{He} {smiled} because the {object} was {lovely}.
On the way {he} sang a {mild} song.
{He} felt {glad} when {he} looked at the {object}.
The {time} was {mild}, and {he} {smiled} at the birds.
Near the {thing} {he} found a {lovely} flower.
It was a {lovely} {time} to play with the {object}.
""",
        "neutral": """
{He} walked along the path for a long time.
{He} put the {object} beside the {thing} and sat down.
The path went around the {thing} and over a bridge.
{He} sat under a tree and looked at the {object}.
The wind moved the leaves, and {he} counted {number} birds.
{He} opened the gate and carried the {object} to the road.
{He} stopped at the {thing} to drink some water.
""",
        "sad": """
lose: The {object} fell on a rock and broke.
lose: In the tall grass {he} lost the {object}.
{He} fell near the {thing} and hurt {his} leg.
It began to rain, and {he} felt {sorry}.
There was an {awful2} noise, and {he} was {sorry}.
A {awful1} wind blew, and {he} held the {object} and {cried}.
{He} did not know the way and was {sorry}.
""",
    },
    {
        "pleasant": """
Then {friend} the {fkind} came and gave {him} a hug.
A {friendly} {fkind} named {friend} came to play with {him}.
{friend} the {fkind} saw {him} and {smiled}.
At the {place} {he} met a {lovely} {fkind} named {friend}.
A {fkind} named {friend} shared some {mild} {food} with {him}.
mend: A {friendly} {fkind} named {friend} came and brought a new {object}.
""",
        "neutral": """
Then {friend} the {fkind} came along the road.
At the {place} {he} met a {fkind} named {friend}.
{friend} the {fkind} was standing beside the {thing}.
A {fkind} named {friend} asked {him} about the {object}.
Near the {thing} sat a {fkind} named {friend}.
Then a {fkind} named {friend} walked by with {number} bags.
""",
        "sad": """
Then {friend} the {fkind} came and was {mean} to {him}.
{friend} the {fkind} sat beside the {thing} and {cried}.
At the {place} {he} met a {mean} {fkind} named {friend}.
lose: A {mean} {fkind} named {friend} came and took the {object}.
Near the {thing} sat a {sorry} {fkind} named {friend}.
A {fkind} named {friend} had an {awful2} cut and {cried}.
""",
    },
    {
        "pleasant": """
They played by the {thing} and {smiled}.
{friend} told a {mild} story, and they {smiled}.
{name} and {friend} played with the {object} and had fun.
{friend} said that the {object} was {lovely}.
They sang together until they were {glad}.
mend: {friend} helped {him} to mend the {object}.
mend: {friend} was {friendly} and found the {object}.
""",
        "neutral": """
They talked about the {home} and the rain.
{friend} showed {him} the road to the {home}.
They sat down and had some {food}.
{name} and {friend} watched {number} clouds.
{friend} looked at the {object} and turned it around.
They carried {number} bags to the {place}.
mend: {friend} gave {him} another {object}.
""",
        "sad": """
lose: {friend} pulled at the {object} until it broke.
lose: {friend} threw the {object} in the water, and {name} {cried}.
They had a {awful1} fight beside the {thing}.
{friend} said a {mean} word, and {name} {cried}.
{friend} fell over and hurt {fhis} foot.
Then the sky turned black, and they were {sorry}.
{friend} said that the {object} was {awful}.
""",
    },
    {
        "pleasant": """
{name} felt {glad}.
{He} was so {glad} that {he} {smiled}.
{name} thought that it was a {lovely} {time}.
{He} gave {friend} a {mild} smile.
{name} liked {friend} and was {glad}.
""",
        "neutral": """
{name} thought about it for a while.
{He} looked up at the clouds.
{name} said nothing and waited.
{He} washed {his} hands at the {thing}.
{name} put the {object} in a bag.
""",
        "sad": """
{name} felt {sorry}.
{He} was so {sorry} that {he} {cried}.
{name} thought that it was a {awful1} {time}.
{He} looked at {friend} with tears.
{name} was {sorry} and wanted to go away.
""",
    },
    {
        "pleasant": """
From then on, {name} and {friend} were friends.
They walked home and felt {glad}.
That night {he} had a {lovely} dream about the {place}.
{name} went home with the {object} and was {glad}.
At home {his} mother gave {him} a hug and some {mild} {food}.
It was a {lovely} end to the {season}.
""",
        "neutral": """
Then {name} went home and had some {food}.
In the evening {he} walked back to the {home}.
The next day {he} went to the {place} again.
When the moon came up, {name} went to bed.
At home {he} put the {object} on the table.
{friend} went to the {place}, and {name} went home.
""",
        "sad": """
{name} went home alone and {cried}.
They never met again, and {name} was {sorry}.
That night {he} had a {awful1} dream about the {place}.
{name} lay in bed and felt {sorry}.
At home {he} was sick for the rest of the {season}.
lose: On the way home {he} lost the {object}, and {he} {cried}.
""",
    },
)


@dataclass(frozen=True)
class Story:
    """A story as sentences, the first `num_prompt` of which are its prompt, and the moods of its last five sentences."""

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
    name = rng.choice(NAMES[pronoun])
    friend = rng.choice([n for n in NAMES[friend_pronoun] if n != name])
    home, place = rng.sample(PLACES, 2)
    colour, other = rng.sample(COLOURS, 2)
    kinds = [rng.choice([PEOPLE[p], rng.choice(ANIMALS)]) for p in (pronoun, friend_pronoun)]
    facts = {"name": name, "kind": kinds[0], "friend": friend, "fkind": kinds[1], "home": home, "place": place}
    facts |= {"object": rng.choice(OBJECTS), "colour": colour, "other": other, "fhis": PRONOUNS[friend_pronoun]["his"]}
    return facts | PRONOUNS[pronoun]


def _fill(template: str, facts: dict[str, str], rng: random.Random) -> str:
    slots = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    # "a terrible", "an awful": the article stands in the template, so the word must fit it.
    slots["awful1"] = rng.choice([word for word in SLOTS["awful"] if word[0] not in "aeiou"])
    slots["awful2"] = rng.choice([word for word in SLOTS["awful"] if word[0] in "aeiou"])
    return template.format(**slots, **facts)


def _possible(template: str, has_object: bool) -> bool:
    if template.startswith("mend: "):
        return not has_object
    return has_object or "{object}" not in template


def write_story(rng: random.Random) -> Story:
    """Draw one story."""
    facts = _facts(rng)
    if rng.random() < 0.5:
        opening, wish = rng.choice(_lines(OPENINGS_WITHOUT_OBJECT)), rng.choice(_lines(WISHES_FOR_OBJECT))
        # Someone who only looks for the object, or wants one, still gets it: stories stay short.
    else:
        opening, wish = rng.choice(_lines(OPENINGS_WITH_OBJECT)), rng.choice(_lines(WISHES_WITH_OBJECT))
    start = [part if part.endswith(".") else part + "." for part in _fill(opening, facts, rng).split(". ")]
    sentences, moods, has_object = [*start, _fill(wish, facts, rng)], [], True
    mood = rng.choice(MOODS)
    for part in PARTS:
        if rng.random() > PERSISTENCE:
            mood = rng.choice(MOODS)
        template = rng.choice([line for line in _lines(part[mood]) if _possible(line, has_object)])
        mark, colon, sentence = template.rpartition(": ")
        if colon:
            has_object = mark == "mend"
        sentences.append(_fill(sentence, facts, rng))
        moods.append(mood)
    return Story(tuple(sentences), len(start), tuple(moods))
