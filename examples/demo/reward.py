"""A reward that is known exactly, bounded, and not won by repetition: how pleasant the words of a text are.

    s = sum of the valences of the distinct words of the text,      R = s / sqrt(s² + 15)  in (-1, 1)

The normalisation is that of the compound score of VADER (Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model
for Sentiment Analysis of Social Media Text", ICWSM 2014). The lexicon below is our own. It covers the feelings in
grammar.py and words that are frequent in other simple stories, so that the same reward can judge other models.

>>> reward("She was happy and her friend smiled.")  # 2 + 2 + 2
0.8401680504168059
>>> reward("happy happy happy") == reward("Happy!") == 2 / 19**0.5
True
>>> reward("The box was on the table.")
0.0
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_WORDS_BY_VALENCE = {
    3: """love loved loves loving wonderful amazing perfect best joy joyful delighted""",
    2: """happy happily happiness glad great fun smile smiled smiles smiling laugh laughed laughs laughing friend
        friends hug hugged hugs hugging kiss kissed beautiful lovely proud excited cheerful celebrate celebrated win
        won friendly kind enjoy enjoyed favorite brave""",
    1: """good nice pretty warm sweet gentle gently safe help helped helping helpful share shared thank thanked thanks
        gift bright calm better funny cheered cozy cute yummy delicious hope hoped hopeful care cared caring special
        clever smart peaceful welcome comfort comforted kindly""",
    -1: """bad alone cold dark tired sorry wrong dirty hungry missed problem trouble grumpy bored stuck sighed rude
        nervous poor sore monster""",
    -2: """sad sadly sadness cry cried cries crying scared afraid scary hurt hurts lost broke broken angry mad mean
        worry worried upset lonely unhappy pain frightened fight fighting fought ugly sick tears wept sobbed cruel
        nasty stole danger dangerous yelled screamed ashamed fear""",
    -3: """hate hated died dead death kill killed terrible awful horrible miserable terrified worst""",
}
VALENCES = {word: valence for valence, words in _WORDS_BY_VALENCE.items() for word in words.split()}
NORMALISATION = 15.0


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def reward(text: str) -> float:
    """R of a text, in (-1, 1); 0 where it has no word of the lexicon. Each distinct word counts once."""
    total = sum(VALENCES.get(word, 0) for word in set(words(text)))
    return total / math.sqrt(total * total + NORMALISATION)


def rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """R of each completion; what `rollout.reward` calls."""
    return [reward(text) for text in completions]
