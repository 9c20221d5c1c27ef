"""The words and sentences of the demonstration's stories; stories.py puts them together."""

from __future__ import annotations


def _words(line: str) -> list[str]:
    return line.split()


PRONOUNS = {
    "she": {"he": "she", "He": "She", "his": "her", "him": "her"},
    "he": {"he": "he", "He": "He", "his": "his", "him": "him"},
}
NAMES = {
    "she": _words("Mia Lily Anna Rosa Nora Ella Zoe Lucy Tilly Grace Ruby Clara Daisy Maya Hazel Wren Ivy Stella"),
    "he": _words("Tom Ben Max Leo Sam Jack Finn Hugo Oscar Milo Theo Noah Felix Otto Jasper Toby Luca Ravi"),
}
PEOPLE = {"she": "girl", "he": "boy"}
ANIMALS = _words("rabbit fox bear mouse cat dog duck goat horse squirrel")
OBJECTS = _words("kite ball boat drum lantern basket book hat coat cup wagon flute bell map key puppet ladder scarf")
COLOURS = _words("red blue green yellow purple white black brown")
PLACES = _words("forest beach market hill river garden lake farm school park field mill village tower")

# Words that fill the slots of the same name; every sentence draws its own. Those that carry feeling are in the lexicon
# of reward.py.
SLOTS = {
    "size": _words("little small young tall quiet busy curious"),
    "number": _words("two three four five six seven"),
    "time": _words("morning afternoon evening day"),
    "season": _words("spring summer autumn winter"),
    "food": _words("bread soup rice corn milk tea"),
    "thing": _words("tree wall gate well fence bench"),
    "glad": _words("happy glad proud cheerful joyful delighted calm hopeful excited"),
    "lovely": _words("lovely wonderful beautiful pretty nice perfect great good"),
    "mild": _words("sweet warm bright gentle funny"),
    "friendly": _words("kind gentle friendly caring brave"),
    "smiled": _words("smiled laughed cheered"),
    "sorry": _words("sad lonely upset unhappy worried afraid scared tired angry miserable"),
    "awful": _words("bad terrible awful horrible ugly scary"),
    "cried": _words("cried sobbed wept"),
    "mean": _words("mean rude cruel nasty grumpy"),
}

# Openings and wishes carry no feeling. The first kind brings in the object only with the wish.
OPENINGS_WITHOUT_OBJECT = """
Once there was a {size} {kind} named {name} who lived near the {home}.
{name} was a {size} {kind} who lived in a {other} house near the {home}.
Long ago, a {size} {kind} named {name} lived between the {home} and the {place}.
In a {other} house near the {home} lived a {size} {kind} named {name}.
"""
WISHES_FOR_OBJECT = """
{He} had made a {colour} {object}.
One {time}, {he} got a {colour} {object} from {his} mother.
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
BEGINNINGS = ((OPENINGS_WITHOUT_OBJECT, WISHES_FOR_OBJECT), (OPENINGS_WITH_OBJECT, WISHES_WITH_OBJECT))

# The sentences of each part by mood. "lose:" marks those after which the object is gone, "mend:" those that need it to
# be gone and bring it back; any other sentence that mentions the object needs the hero to have it.
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
Near the {thing} sat {friend} the {fkind}, who was {sorry}.
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
