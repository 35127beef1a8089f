"""Pictures of shapes, drawn from a description: colour, shape, count, place and a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from kedit_lightning.errors import InvalidRequestError

#: Pixels of a side of a picture; shapes stand in four cells of one quarter of it.
SIDE, CELL = 48, 12
_FILE = Path(__file__).parents[1] / "shapes_facts" / "questions.json"
_RGB = {
    "red": (215, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 70, 215),
    "yellow": (235, 215, 30),
    "purple": (120, 40, 150),
    "orange": (245, 140, 20),
    "black": (20, 20, 20),
    "pink": (245, 140, 190),
}


@cache
def questions() -> dict[str, Any]:
    """Values of the attributes, questions about them, and facts about words."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def contents() -> list[dict[str, str]]:
    """What pictures may show: all values of colour, shape, count and place."""
    values = questions()["values"]
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


@dataclass(frozen=True)
class Drawing:
    """Description of a picture; equal descriptions are drawn alike.

    Args:
        seed: Fixes what the other values leave open: sizes, exact places, tones.
        colour: Colour of the shapes; a picture without one is blank.
        shape: Their shape.
        count: Their number, as a word.
        place: The quarter of the picture that they are in.
    """

    seed: int
    colour: str | None = None
    shape: str = "circle"
    count: str = "one"
    place: str = "top left"

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Drawing:
        """The drawing of a record's field.

        Raises:
            InvalidRequestError: It has other fields than a drawing, or a value that none has.
        """
        known = questions()["values"]
        wrong = [
            name
            for name, value in description.items()
            if name != "seed" and value not in known.get(name, ())
        ]
        seed = description.get("seed")
        if wrong or not isinstance(seed, int):
            raise InvalidRequestError(
                f"describes no drawing ({', '.join(wrong) or 'seed'}); give a whole number as "
                f"seed, and {', '.join(known)} of those that {_FILE.name} lists"
            )
        return cls(**description)

    def image(self) -> Image.Image:
        """Draw it."""
        draws = random.Random(self.seed)
        tone = draws.randint(225, 255)
        picture = Image.new("RGB", (SIDE, SIDE), (tone, tone, tone))
        if self.colour is None:
            return picture
        vertical, horizontal = self.place.split()
        left = SIDE // 2 * (horizontal == "right")
        top = SIDE // 2 * (vertical == "bottom")
        count = questions()["values"]["count"].index(self.count) + 1
        shade = tuple(max(0, min(255, c + draws.randint(-15, 15))) for c in _RGB[self.colour])
        pen = ImageDraw.Draw(picture)
        for cell in draws.sample(range(4), count):
            size = draws.randint(8, 10)
            x = left + CELL * (cell % 2) + draws.randint(0, CELL - size)
            y = top + CELL * (cell // 2) + draws.randint(0, CELL - size)
            _draw(pen, self.shape, (x, y, x + size - 1, y + size - 1), shade)
        return picture


def _draw(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, ...], fill: Any) -> None:
    """One shape inside a box of left, top, right and bottom pixel."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=2)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), (x, top)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill)
    else:
        pen.line([(left, top), (right, bottom)], fill=fill, width=3)
        pen.line([(left, bottom), (right, top)], fill=fill, width=3)
