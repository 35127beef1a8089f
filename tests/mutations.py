"""Random damage to the bytes of a file: cuts, flipped bits, lost, doubled and overwritten parts."""

from __future__ import annotations

import random
from collections.abc import Callable


def cut(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(len(data))]


def flip(data: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice((1, 1, 4, 32))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def drop(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice((1, 7, 100)) :]


def double(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data))
    return data[: start + chance.choice((1, 50))] + data[start:]


def fill(data: bytearray, chance: random.Random) -> bytearray:
    start, size = chance.randrange(len(data)), chance.choice((1, 16, 512))
    data[start : start + size] = bytes([chance.choice((0, 32, 255))]) * size
    return data


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    *(cut, flip, drop, double, fill),
)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """The content with one kind of damage."""
    return bytes(chance.choice(MUTATIONS)(bytearray(content), chance)) if content else b"\0"
