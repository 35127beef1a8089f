"""Two-hop questions after edits of their first hop: MeLLo on NanoFacts.

    python benchmarks/two_hop.py                 100 questions, the forms of questions given
    python benchmarks/two_hop.py --own           the model takes the questions apart itself
    python benchmarks/two_hop.py --facts 500     the same questions among more edits

Each question is a one-hop probe of an example: the edit says where somebody died, and the question
asks for the continent of that city.  The second hop is a fact that the base model knows.  All facts
are in one store.  ``PROMPT`` answers the question directly.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kedit_lightning import BaseModel, Edit
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.free_answers import free_answers
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods import PROMPT, MeLLo
from kedit_lightning.requests import EditExample, Probe
from kedit_lightning.sentence import answer_text

#: Forms of the questions, by the forms of the facts that are edited.
FORMS = {
    "{} died in": {"the city where {} died": "city"},
    "{} was born in": {"the city where {} was born": "city"},
    "{} worked in the city of": {"the city where {} worked": "city"},
    "{} was founded in": {"the city where {} was founded": "city"},
    "The headquarters of {} is in": {"the city where {} has its headquarters": "city"},
    "The capital of {} is": {"the capital of {}": "city"},
    "The employer of {} is": {"the employer of {}": "company"},
    "The developer of {} is": {"the developer of {}": "company"},
    "The manufacturer of {} is": {"the manufacturer of {}": "company"},
    "{} is located in the country of": {"the country of {}": "country"},
    "{} is a citizen of": {"the country of which {} is a citizen": "country"},
    "The country of origin of {} is": {"the country that {} originally comes from": "country"},
}
#: The second hop, as the base model was taught it, for each kind of first answer.
SECOND = (
    "The continent of {} is",
    "The official language of {} is",
    "The capital of {} is",
    "The currency of {} is the",
    "The headquarters of {} is in",
    "{} is located in the country of",
    "{} was founded in",
)


def decompositions() -> list[dict[str, object]]:
    """Every first hop with every second one."""
    return [
        {"question": _upper(second.replace("{}", described)), "steps": [first, second]}
        for first, descriptions in FORMS.items()
        for described in descriptions
        for second in SECOND
    ]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def two_hop(examples: Sequence[EditExample], count: int) -> list[tuple[EditExample, Probe]]:
    """Examples with their first one-hop question."""
    pairs = [(e, p) for e in examples for p in e.probes if p.group == "one_hop"]
    return list({e.id: (e, p) for e, p in reversed(pairs)}.values())[::-1][:count]


def right(base: BaseModel, probes: Sequence[Probe], edit: Edit | None) -> tuple[int, int]:
    """How many free answers are accepted ones, without and with an edit."""
    protocol = Protocol(max_new_tokens=12)
    prompts = [probe.prompt for probe in probes]
    if edit is None:
        answers = free_answers(base, prompts, protocol)
    else:
        with edit:
            answers = free_answers(base, prompts, protocol)
    counts = [0, 0]
    for probe, answer in zip(probes, answers, strict=True):
        accepted = {text.casefold() for text in probe.answers}
        for i, name in enumerate(("base", "edited")):
            counts[i] += answer_text(answer[name]).casefold() in accepted
    return counts[0], counts[1]


def main() -> None:
    """Print how many questions each way answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--facts", type=int, default=0, help="edits, if more than questions")
    parser.add_argument("--own", action="store_true", help="the model writes a scratchpad")
    parser.add_argument("--model", default="nano", help="name or folder")
    args = parser.parse_args()
    base = BaseModel.load(args.model)
    examples = NanoFacts().examples("test")
    asked = two_hop(examples, args.limit)
    chosen = [example for example, _ in asked]
    chosen += [e for e in examples if e not in chosen][: max(0, args.facts - len(chosen))]
    requests, probes = [r for e in chosen for r in e.requests], [p for _, p in asked]
    print(f"{len(probes)} questions, {len(requests)} edits in one store")
    with tempfile.TemporaryDirectory() as folder:
        forms = Path(folder) / "decompositions.json"
        forms.write_text(json.dumps(decompositions()), encoding="utf-8")
        ways = {"MeLLo, own scratchpad": MeLLo(base)}
        if not args.own:
            ways = {
                "PROMPT": PROMPT(base),
                "MeLLo, forms of questions given": MeLLo(base, decompositions=str(forms)),
            }
        for name, method in ways.items():
            started = time.process_time()
            before, after = right(base, probes, method.edit(requests))
            seconds = time.process_time() - started
            print(f"{name}: {after} of {len(probes)} (unedited {before}), {seconds:.0f} s")


if __name__ == "__main__":
    main()
