"""What a model answers under a ledger: which facts hold, and which edits touch an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.contradictions import contradictions
from kedit_lightning.requests import EditRequest, Probe
from kedit_lightning.runs.ledger_record import LedgerRecord, apply_edits

#: What became of a fact: a later one contradicts it; it held, and was lost with a later edit; it
#: never held.
FactState: TypeAlias = Literal["holds", "overwritten", "lost", "not written"]


class CheckedFact(NamedTuple):
    """A fact of a ledger, asked again.

    Args:
        number: The line of its edit.
        request: The fact.
        holds: Whether each token of its answer is the most likely one.
        state: What became of it.
        by: The line of the later edit that overwrote it, or that it was lost with.
    """

    number: int
    request: EditRequest
    holds: bool
    state: FactState
    by: int | None = None


class Touch(NamedTuple):
    """What an edit does to an answer.

    Args:
        number: The line of the edit.
        without: The answer without this edit alone.
        change: What the edit adds to the log-probability of the present answer.
    """

    number: int
    without: str
    change: float


class Blame(NamedTuple):
    """Which edits touch an answer.

    Args:
        unedited: The answer of the base model.
        answer: The answer under all edits.
        touches: What each edit does to it, the largest change first.
    """

    unedited: str
    answer: str
    touches: list[Touch]


class LedgerDiff(NamedTuple):
    """What differs between two states of a ledger, as numbers of lines.

    Args:
        added: Edits that stand in the second state alone.
        removed: Edits that stand in the first state alone.
        recomputed: Edits of both states that were solved or computed again between them.
    """

    added: list[int]
    removed: list[int]
    recomputed: list[int]


def check_facts(ledger: LedgerRecord, base: BaseModel) -> list[CheckedFact]:
    """Ask all facts that stand again, under all edits together.

    A fact that does not hold is asked under the first edits of the ledger as well, to find the edit
    that it was lost with.
    """
    numbered = [(line.number, request) for line in ledger.entries for request in line.requests]
    requests = [request for _, request in numbered]
    later = {pair.earlier: numbered[pair.later][0] for pair in contradictions(requests)}
    with ledger.applied(base) as edits:
        holds = facts_hold(base, requests)
        lost = [i for i, held in enumerate(holds) if not held and i not in later]
        lost_with: dict[int, int | None] = {}
        base.edits.clear()
        for number, edit in zip(ledger.standing, edits if lost else (), strict=False):
            apply_edits([edit])
            written = [i for i in lost if numbered[i][0] <= number]
            for i, held in zip(
                written, facts_hold(base, [requests[i] for i in written]), strict=True
            ):
                if held:
                    lost_with[i] = None  # it is lost later
                elif lost_with.get(i, 0) is None:
                    lost_with[i] = number
        apply_edits(edits)
    found = []
    for i, ((number, request), held) in enumerate(zip(numbered, holds, strict=True)):
        state: FactState = "holds"
        if i in later:
            state = "overwritten"
        elif not held:
            state = "lost" if lost_with.get(i) else "not written"
        by = later.get(i) or (None if held else lost_with.get(i))
        found.append(CheckedFact(number, request, held, state, by))
    return found


def blame_answer(
    ledger: LedgerRecord, base: BaseModel, prompt: str, max_new_tokens: int = 20
) -> Blame:
    """Which edits touch the answer to a prompt: each is left out alone, and nothing computed again.

    Args:
        ledger: The ledger.
        base: The base model.
        prompt: The prompt.
        max_new_tokens: Longest answer.
    """

    def answered() -> str:
        return base.generate([prompt], max_new_tokens, stop_at_sentence=True)[0]

    with ledger.applied(base) as edits:
        with base.edits.suspended():
            unedited = answered()
        answer = answered()
        before = _log_prob(base, prompt, answer)
        touches = []
        for number, edit in zip(ledger.standing, edits, strict=True):
            with base.edits.restored():
                base.edits.remove(edit)
                change = before - _log_prob(base, prompt, answer)
                touches.append(Touch(number, answered(), change))
    touches.sort(key=lambda touch: -abs(touch.change))
    return Blame(unedited, answer, touches)


def compare_states(ledger: LedgerRecord, first: int | str, second: int | str) -> LedgerDiff:
    """What differs between the states after two lines; 0 is the state before all."""
    then, now = ledger.after(first), ledger.after(second)
    return LedgerDiff(
        [number for number in now if number not in then],
        [number for number in then if number not in now],
        [number for number in now if number in then and now[number] != then[number]],
    )


def _readings(base: BaseModel, asked: Sequence[tuple[EditRequest, str]]) -> list[dict[str, object]]:
    probes = [Probe("rewrite", r.prompt, (answer,), image=r.image) for r, answer in asked]
    reader = Reader(base, Protocol(generate=False), "ledger")
    return [dict(reading) for reading in reader.readings(probes, reader.base_readings(probes))]


def facts_hold(base: BaseModel, requests: Sequence[EditRequest]) -> list[bool]:
    """Whether each token of the answers to facts is the most likely one, as the model stands."""
    if not requests:
        return []
    return [bool(r["tf_all"]) for r in _readings(base, [(r, r.target_new) for r in requests])]


def _log_prob(base: BaseModel, prompt: str, answer: str) -> float:
    """Log-probability of an answer; 0 of one without text."""
    if not answer.strip():
        return 0.0
    asked = EditRequest(prompt, answer)
    return float(str(_readings(base, [(asked, asked.target_new)])[0]["log_prob"]))
