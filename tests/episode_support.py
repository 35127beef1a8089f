"""A few facts with rephrases and locality probes, to fit methods on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import REQUESTS

from kedit_lightning import EditExample, EditRequest, Probe
from kedit_lightning.data import Requests


def example(request: EditRequest) -> EditExample:
    """A request with two rephrases and two locality probes, one without an answer."""
    probes = [
        Probe("rephrase", f"It is known that {request.prompt}", (request.target_new,)),
        Probe("rephrase", f"Question: {request.prompt}", (request.target_new,)),
        Probe("locality", "The company Bolt was founded in", ("Berlin",), "neighborhood"),
        Probe("locality", "She was born in", (), "neighborhood"),
    ]
    return EditExample.from_request(request, request.id, probes)


EXAMPLES = [example(request) for request in REQUESTS]


def data(folder: Path, repeat: int = 1, **settings: Any) -> Requests:
    """The examples as a file to fit on, so many times."""
    path = folder / "train.json"
    records = [
        {
            "prompt": e.requests[0].prompt,
            "target_new": e.requests[0].target_new,
            "target_old": e.requests[0].target_old.replace("Paris", "France"),
            "id": f"{e.id}{number or ''}",
            "rephrases": [p.prompt for p in e.probes if p.kind == "rephrase"],
            "locality": {
                "neighborhood": [
                    {"prompt": p.prompt, "answers": list(p.answers)}
                    for p in e.probes
                    if p.kind == "locality"
                ]
            },
        }
        for number in range(repeat)
        for e in EXAMPLES
    ]
    path.write_text(json.dumps(records))
    return Requests(train_path=path, seed=3, **settings)
