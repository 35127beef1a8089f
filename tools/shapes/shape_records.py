"""Write the records of ``Shapes``: ``python tools/shapes/shape_records.py``.

The same seed gives the same records. Contents of the test split are those that the model has not
learned from.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sequences import forms, word_facts
from train_shapes import split

from kedit_lightning.data.multimodal.drawing import questions

FOLDER = Path(__file__).parents[2] / "src/kedit_lightning/data/shapes_facts"
SIZES = {"train": 600, "validation": 60, "test": 200}


def other(draws: random.Random, attribute: str, value: str) -> str:
    """Another value of an attribute."""
    return str(draws.choice([v for v in questions()["values"][attribute] if v != value]))


def picture(draws: random.Random, content: dict[str, str]) -> dict[str, Any]:
    """The description of a new drawing."""
    return {**content, "seed": draws.randrange(1 << 30)}


def record(
    draws: random.Random, content: dict[str, str], pool: list[dict[str, str]], attribute: str
) -> dict[str, Any]:
    """One record: a question about a picture with a false answer, and its probes."""
    wordings = forms(attribute)
    new = other(draws, attribute, content[attribute])
    unrelated = draws.choice([c for c in pool if sum(c[a] != content[a] for a in c) >= 2])
    # One in two asks the question of the edit; the others ask anything.
    asked = attribute if draws.random() < 0.5 else draws.choice(list(content))
    changed = draws.choice(list(content))
    near = {**content, changed: other(draws, changed, content[changed])}
    beside = draws.choice([a for a in content if a != attribute])
    words, answer = draws.choice(word_facts())
    return {
        "src": wordings[0],
        "pred": content[attribute],
        "alt": new,
        "rephrase": draws.choice(wordings[1:]),
        "image": picture(draws, content),
        "image_rephrase": picture(draws, content),
        "loc": words,
        "loc_ans": answer,
        "m_loc": picture(draws, unrelated),
        "m_loc_q": forms(asked)[0],
        "m_loc_a": unrelated[asked],
        "near": [{"image": picture(draws, near), "prompt": wordings[0], "answer": near[attribute]}],
        "same": [{"prompt": forms(beside)[0], "answer": content[beside]}],
    }


def main() -> None:
    """Write the three splits."""
    known, apart = split()
    # The last of the known contents are kept for validation.
    pools = {"train": known[:-60], "validation": known[-60:], "test": apart}
    for name, size in SIZES.items():
        draws, pool = random.Random(f"shapes {name}"), pools[name]
        rows = []
        for number in range(size):
            content = pool[number % len(pool)]
            attribute = list(content)[(number + number // len(pool)) % len(content)]
            rows.append(json.dumps(record(draws, content, pool, attribute)))
        (FOLDER / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
