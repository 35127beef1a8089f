"""Names for somebody or something that is no subject of a listed fact."""

from __future__ import annotations

import random

NOUNS = {
    "person": (
        "my neighbour",
        "the old man",
        "a certain woman",
        "this artist",
        "her uncle",
        "his teacher",
        "a friend of mine",
        "our guest",
        "the stranger",
        "that young lady",
        "the boy next door",
        "someone",
        "the author",
        "my aunt",
    ),
    "place": (
        "this place",
        "that village",
        "the old castle",
        "our valley",
        "the museum",
        "this lake",
        "the tower",
        "that island",
        "our town hall",
        "the park",
    ),
    "land": (
        "this land",
        "that republic",
        "the kingdom",
        "our province",
        "the island state",
        "their homeland",
        "this little country",
        "the new state",
    ),
    "work": (
        "this book",
        "that film",
        "the show",
        "her first novel",
        "the series",
        "this song",
        "our favourite comedy",
        "the magazine",
        "that old story",
        "the band",
    ),
    "company": (
        "this company",
        "that band",
        "the firm",
        "our bank",
        "the club",
        "her company",
        "the orchestra",
        "that business",
    ),
    "product": (
        "this machine",
        "that car",
        "the program",
        "our old computer",
        "the new phone",
        "his camera",
        "this game",
        "the engine",
    ),
    "star": (
        "this star",
        "that bright star",
        "the double star",
        "a faint star",
        "our nearest star",
        "the red star",
    ),
}
SYLLABLES = (
    "bal",
    "ben",
    "bri",
    "cor",
    "dal",
    "den",
    "dor",
    "el",
    "fan",
    "fel",
    "gar",
    "gil",
    "hal",
    "hem",
    "il",
    "jor",
    "kal",
    "kir",
    "lan",
    "lem",
    "lor",
    "mar",
    "mil",
    "mor",
    "nal",
    "nor",
    "ol",
    "pel",
    "quin",
    "ral",
    "ren",
    "ros",
    "sal",
    "sil",
    "tam",
    "tor",
    "ul",
    "val",
    "ven",
    "vor",
    "wen",
    "wil",
    "yar",
    "zan",
    "zel",
)


def stand_in(kind: str, rng: random.Random) -> str:
    """A noun phrase of this kind, or an invented name of one to three words.

    Args:
        kind: a key of ``NOUNS``.
        rng: the seeded source of every choice.

    Returns:
        The name; lower case where it is a phrase.
    """
    if rng.random() < 0.35:
        return rng.choice(NOUNS[kind])
    words = [
        "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
        for _ in range(rng.choice((1, 2, 2, 3)))
    ]
    return " ".join(words)
