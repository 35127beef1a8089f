"""Edit eight facts in the packaged model with three methods, show what happened, and undo it.

Run it with ``make demo``, or ``python tools/demo.py --output FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from demo_figure import draw
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kedit_lightning import BaseModel, EditExample
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods import FTM, MEND, ROME
from kedit_lightning.metrics.functional import answer_text, generation_exact

FACTS, SEED = 8, 2026
METHODS = (FTM, ROME, MEND)


@dataclass(frozen=True)
class Outcome:
    """What one method did to one fact.

    Args:
        method: Name of the method.
        fact: Number of the fact.
        after: The edited model's answer to the edited prompt.
        rephrase: Its answer to the same question in other words.
        neighbour: Its answer about another subject, whose fact was not edited.
        written: Whether ``after`` is the wanted answer.
        generalised: Whether ``rephrase`` is.
        neighbour_kept: Whether ``neighbour`` is what the model said before.
        rolled_back: Whether all logits are bit-equal to those before the edit.
        seconds: Time to compute the edit.
        file: The saved edit.
    """

    method: str
    fact: int
    after: str
    rephrase: str
    neighbour: str
    written: bool
    generalised: bool
    neighbour_kept: bool
    rolled_back: bool
    seconds: float
    file: str


@dataclass(frozen=True)
class Fact:
    """One fact and what is asked about it.

    Args:
        prompt: The prompt that is edited.
        wanted: The new answer.
        before: The unedited model's answers to the prompt, a rephrase and a neighbour.
        questions: These three prompts.
    """

    prompt: str
    wanted: str
    before: tuple[str, ...]
    questions: tuple[str, ...]


def ask(base: BaseModel, questions: tuple[str, ...]) -> tuple[str, ...]:
    """Free answers, cut at the end of the sentence."""
    texts = base.generate(questions, max_new_tokens=24, stop_at_sentence=True)
    return tuple(answer_text(text) for text in texts)


def describe(base: BaseModel, example: EditExample) -> Fact:
    """Choose the questions about a fact and have the unedited model answer them."""
    request = example.requests[0]
    rephrase = next(p.prompt for p in example.probes if p.kind == "rephrase")
    neighbour = next(p.prompt for p in example.probes if p.group == "neighborhood")
    questions = (request.prompt, rephrase, neighbour)
    return Fact(request.prompt, request.target_new, ask(base, questions), questions)


@torch.no_grad()
def logits(base: BaseModel, facts: list[Fact]) -> torch.Tensor:
    """Logits after all questions, to compare the model with itself."""
    rows = base.rows([question for fact in facts for question in fact.questions])
    return base.logits_at(rows, rows.prompt_end[:, None])


def run(
    base: BaseModel, examples: list[EditExample], folder: Path
) -> tuple[list[Fact], list[Outcome]]:
    """Edit each fact with each method; every edit is saved, applied, asked about and undone."""
    outcomes: list[Outcome] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("Asking the unedited model", total=len(examples) * len(METHODS))
        facts = [describe(base, example) for example in examples]
        untouched = logits(base, facts)
        for kind in METHODS:
            method = kind(base_model=base)
            for number, (example, fact) in enumerate(zip(examples, facts, strict=True)):
                progress.update(task, description=f"{kind.__name__}: {fact.prompt[:40]}")
                started = time.perf_counter()
                edit = method.edit(example.requests)
                seconds = time.perf_counter() - started
                file = edit.save(
                    folder / "edits" / f"{kind.__name__.lower()}-{number + 1}.safetensors"
                )
                with edit:
                    after, rephrase, neighbour = ask(base, fact.questions)
                outcomes.append(
                    Outcome(
                        method=kind.__name__,
                        fact=number,
                        after=after,
                        rephrase=rephrase,
                        neighbour=neighbour,
                        written=bool(generation_exact(after, [fact.wanted])),
                        generalised=bool(generation_exact(rephrase, [fact.wanted])),
                        neighbour_kept=neighbour == fact.before[2],
                        rolled_back=torch.equal(logits(base, facts), untouched),
                        seconds=round(seconds, 3),
                        file=str(file.relative_to(folder)),
                    )
                )
                progress.advance(task)
    return facts, outcomes


def marked(text: str, good: bool) -> str:
    """An answer with its verdict, for the terminal."""
    short = text if len(text) <= 24 else text[:23] + "…"
    return f"[green]✓ {short}[/]" if good else f"[red]✗ {short}[/]"


def table(facts: list[Fact], outcomes: list[Outcome]) -> Table:
    """One row for each fact and method."""
    result = Table(title="Eight facts, three methods, each edit undone before the next")
    for name in ("prompt", "before", "wanted", "method", "after", "rephrase", "neighbour"):
        result.add_column(name, overflow="fold")
    result.add_column("rolled back")
    for number, fact in enumerate(facts):
        for index, outcome in enumerate(o for o in outcomes if o.fact == number):
            head = (fact.prompt, fact.before[0], fact.wanted) if index == 0 else ("", "", "")
            result.add_row(
                *head,
                outcome.method,
                marked(outcome.after, outcome.written),
                marked(outcome.rephrase, outcome.generalised),
                marked(outcome.neighbour, outcome.neighbour_kept),
                "[green]✓ bit for bit[/]" if outcome.rolled_back else "[red]✗ changed[/]",
                end_section=index == len(METHODS) - 1,
            )
    return result


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Counts and mean time of each method."""
    found: dict[str, dict[str, float]] = {}
    for kind in METHODS:
        own = [o for o in outcomes if o.method == kind.__name__]
        found[kind.__name__] = {
            "facts": len(own),
            "written": sum(o.written for o in own),
            "rephrased": sum(o.generalised for o in own),
            "neighbours kept": sum(o.neighbour_kept for o in own),
            "rolled back": sum(o.rolled_back for o in own),
            "seconds an edit": round(sum(o.seconds for o in own) / len(own), 3),
        }
    return found


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="result folder")
    folder: Path = parser.parse_args().output
    # Where there is no terminal, as in a log, the table is not squeezed to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    # The model is so small that a second thread costs more than it brings on a busy machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    base = BaseModel.load("nano")
    examples = NanoFacts(limit=FACTS, seed=SEED).examples("test")
    facts, outcomes = run(base, examples, folder)
    counts = summary(outcomes)
    report = {
        "base_model": {"name": base.name, "fingerprint": base.fingerprint},
        "seed": SEED,
        "facts": [asdict(fact) for fact in facts],
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "summary": counts,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False))
    draw(facts, outcomes, folder / "demo.png")
    console.print(table(facts, outcomes))
    for name, values in counts.items():
        console.print(f"{name}: " + ", ".join(f"{value:g} {key}" for key, value in values.items()))
    console.print(
        f"\n✓ is the wanted answer (or, for the neighbour, the same answer as before); "
        f"✗ is a failure, shown as it is.\nWritten to {folder}: edits/, report.json, demo.png "
        f"({time.perf_counter() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
