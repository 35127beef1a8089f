"""Damage to the bytes of a file, as disks, transfers and editors do it."""

from __future__ import annotations

import random

#: Ways of damage that :func:`damage` knows, numbered from 0.
WAYS = 5


def damage(new: bytearray, at: int, way: int, chance: random.Random) -> None:
    """Flip a bit, cut off the end, overwrite, insert or take out bytes at a place."""
    match way:
        case 0:
            new[at] ^= 1 << chance.randrange(8)
        case 1:
            del new[at:]
        case 2:
            new[at : at + chance.randrange(1, 64)] = bytes(chance.randrange(64))
        case 3:
            new[at:at] = chance.randbytes(chance.randrange(1, 16))
        case 4:
            del new[at : at + chance.randrange(1, 16)]
