"""Reverting by solving: later edits as if an earlier one had never been, of the same targets."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_kinds import answers
from method_examples import METHODS, make
from mixtures import routed_layer, tiny_mixture
from support import REQUESTS, tiny_base
from torch import Tensor

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.cli.ledger_commands import log_lines
from kedit_lightning.errors import EditFileError, LedgerError
from kedit_lightning.methods import FTM, UltraEdit
from kedit_lightning.methods.locate.shared.closed_form import ClosedForm
from kedit_lightning.runs import Ledger
from kedit_lightning.runs.ledger_solution import read_equations

pytestmark = [
    pytest.mark.filterwarnings("ignore:UltraEdit has seen"),
    pytest.mark.filterwarnings("ignore::kedit_lightning.errors.FactsNotWrittenWarning"),
    pytest.mark.filterwarnings("ignore:.*target.*"),
]
SETTINGS = dict(METHODS)
#: Edited at one layer, whose keys do not depend on the edits of the method.
ONE_LAYER = (
    *("ROME", "MEMIT", "AlphaEdit"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("RROME", "EMMET", "PMET")),
)
#: Two facts of one subject, whose keys are equal, and others.
FACTS = [*REQUESTS[:3], EditRequest("Marie Curie died in", "Rome", "Marie Curie"), REQUESTS[3]]
GONE = 2  # the line of the first fact about Marie Curie


def one_layer(name: str, base: BaseModel) -> Any:
    place = {"layer": 1} if name in ("ROME", "RROME", "EMMET") else {"layers": [1]}
    return make(name, {**SETTINGS[name], **place}, base)


def written(path: Path, method: Any, facts: list[EditRequest]) -> Ledger:
    ledger = Ledger(path)
    for fact in facts:
        ledger.append(method, [fact])
    return ledger


def deltas(ledger: Ledger, base: BaseModel) -> list[dict[str, Tensor]]:
    return [edit.deltas() for edit in ledger.edits(base)]


def close(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    assert len(ours) == len(others)
    scale = max(float(delta.abs().max()) for edit in others for delta in edit.values())
    return all(
        mine.keys() == other.keys()
        and all(torch.allclose(mine[n], other[n], rtol=0, atol=1e-9 * scale) for n in mine)
        for mine, other in zip(ours, others, strict=True)
    )


@contextmanager
def targets_kept(found: dict[str, Any], given: bool) -> Iterator[None]:
    """Inside, the targets of facts are noted, or those that were noted are taken."""
    original: Callable[..., Any] = ClosedForm.layer_values

    def layer_values(self: ClosedForm, requests: list[EditRequest]) -> Any:
        values = original(self, requests)
        name = requests[0].prompt
        if given:
            values._values = found[name]._values
        else:
            found[name] = values
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClosedForm, "layer_values", layer_values)
        yield


@pytest.mark.parametrize("name", ONE_LAYER)
def test_at_one_layer_it_is_the_stream_of_the_same_targets(name: str, tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method, found = one_layer(name, base), dict[str, Any]()
    with targets_kept(found, given=False):
        ledger = written(tmp_path / "ledger", method, FACTS)
    before = deltas(ledger, base)
    line = ledger.revert(GONE, base, methods=[method])
    assert line.later == "solve"
    assert list(line.edits) == ["3", "4", "5"]
    with targets_kept(found, given=True):
        facts = [fact for n, fact in enumerate(FACTS, start=1) if n != GONE]
        fresh = written(tmp_path / "fresh", method, facts)
    assert close(deltas(ledger, base), deltas(fresh, base))
    assert not close(before[2:], deltas(fresh, base)[1:])
    with fresh.applied(base):
        expected = answers(base)
    with ledger.applied(base):
        assert torch.allclose(answers(base), expected, rtol=0, atol=1e-9)
        assert [edit.origin.stack for edit in base.edits][-1] == ledger.edits(base)[-1].origin.stack
    again = Ledger(shutil.copytree(ledger.path, tmp_path / "moved"))
    assert again.append(method, [EditRequest("Oslo lies in", "Peru", "Oslo")]).number == 7


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit"])
def test_at_several_layers_each_projection_keeps_what_it_was_asked(
    name: str, tmp_path: Path
) -> None:
    """The oracle solves from the unedited weight, by dense normal equations."""
    base = tiny_base("gpt2")
    method = make(name, {**SETTINGS[name], "layers": [0, 1]}, base)
    ledger = written(tmp_path / "ledger", method, FACTS)
    old = ledger.edits(base)
    kept = [read_equations(ledger.equations_path(one.id), one) for one in ledger.standing.values()]
    ledger.revert(GONE, base, later="solve", methods=[method])
    new = dict(zip(ledger.standing, ledger.edits(base), strict=True))
    for layer, module in zip(method.layers, method.edited, strict=True):
        inverse = method.prior(layer)(torch.eye(base.module(module).weight.shape[0]).double())
        with_all, without = torch.zeros(2, *old[0].factors[module].dense.shape).double()
        remembered: list[Tensor] = []
        for number, (edit, equations) in enumerate(zip(old, kept, strict=True), start=1):
            keys, present, residuals = (
                equations[f"{module}/{part}"] for part in ("keys", "present", "residuals")
            )
            wanted = residuals + present @ with_all.T
            with_all = with_all + edit.factors[module].dense
            if number == GONE:
                continue
            rest = inverse
            for past in remembered:  # with each key of an earlier edit: Sherman and Morrison
                for k in past.T:
                    rest = rest - torch.outer(rest @ k, k @ rest) / (1 + k @ rest @ k)
            gram = torch.eye(len(keys)).double() + keys @ rest @ keys.T
            solved = (wanted - present @ without.T).T @ torch.linalg.solve(gram, keys @ rest)
            scale = float(solved.abs().max())
            ours = new[number].factors[module].dense
            assert torch.allclose(ours, solved, rtol=0, atol=1e-9 * scale)
            without = without + solved
            remembered += [edit.memory[f"{module}.keys"]] if edit.memory else []


def test_two_reverts_come_to_the_same_in_either_order(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method = one_layer("MEMIT", base)
    first = written(tmp_path / "first", method, FACTS)
    second = Ledger(shutil.copytree(first.path, tmp_path / "second"))
    for ledger, order in ((first, (2, 3)), (second, (3, 2))):
        for number in order:
            assert ledger.revert(number, base, methods=[method]).later == "solve"
    assert close(deltas(first, base), deltas(second, base))
    assert "revert of line 2; solved again: lines 3, 4, 5" in log_lines([str(first.path)])
    assert "computed again" not in log_lines([str(first.path)])


def test_statistics_of_gradients_forget_an_edit(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method = make("UltraEdit", SETTINGS["UltraEdit"], base)
    seen: dict[str, Any] = {}
    capture = UltraEdit._capture

    def captured(self: UltraEdit, requests: list[EditRequest]) -> Any:
        return seen.setdefault(requests[0].prompt, capture(self, requests))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UltraEdit, "_capture", captured)
        ledger = written(tmp_path / "ledger", method, FACTS)
        before = deltas(ledger, base)
        fresh = written(tmp_path / "fresh", method, [FACTS[0], *FACTS[GONE:]])
    assert ledger.revert(GONE, base, methods=[method]).later == "solve"
    assert close(deltas(ledger, base), deltas(fresh, base))
    assert not close(before[2:], deltas(fresh, base)[1:])


@pytest.mark.parametrize("name", ["MALMEN", pytest.param("RLEdit", marks=pytest.mark.slow)])
def test_value_differences_stand_by_themselves(name: str, tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method = make(name, SETTINGS[name], base)
    ledger = written(tmp_path / "ledger", method, FACTS[:4])
    before = deltas(ledger, base)
    assert ledger.revert(GONE, base).later == "solve"  # no network is needed for it
    assert close(deltas(ledger, base), [before[0], *before[2:]])
    with ledger.applied(base):  # each stands on those below it, without a warning
        assert next(edit.origin.stack for edit in base.edits) == ()


# ---- what cannot be solved


def test_what_was_not_solved_is_computed_again(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    ledger = written(tmp_path / "ledger", one_layer("MEMIT", base), FACTS[:2])
    ledger.append(FTM(base_model=base, lr=1e-2, steps=2), [FACTS[2]])
    with pytest.raises(LedgerError, match="line 3 holds no equations"):
        ledger.revert(1, base, later="solve")
    assert ledger.revert(1, base).later == "replay"
    assert ledger.revert(2, base).later == "replay"


def test_constrained_changes_hold_no_equations(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method = make("MEMIT", {**SETTINGS["MEMIT"], "keep_share": 0.4}, base)
    ledger = written(tmp_path / "ledger", method, FACTS[:2])
    assert [line.edit.equations for line in ledger.entries] == ["", ""]


def test_layers_of_which_one_has_experts_are_computed_again(tmp_path: Path) -> None:
    base = tiny_mixture("jamba")
    routed = routed_layer(base)
    method = make("MEMIT", {**SETTINGS["MEMIT"], "layers": [routed, routed + 1]}, base)
    ledger = written(tmp_path / "ledger", method, FACTS[:2])
    assert [line.edit.equations for line in ledger.entries] == ["", ""]
    assert ledger.revert(1, base).later == "replay"


def test_a_run_without_a_ledger_keeps_none() -> None:
    edit: Edit = one_layer("MEMIT", tiny_base("gpt2")).edit([FACTS[0]])
    assert edit.equations is None


def test_changed_equations_are_noticed(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method = one_layer("MEMIT", base)
    ledger = written(tmp_path / "ledger", method, FACTS[:3])
    paths = [ledger.equations_path(saved.id) for saved in ledger.standing.values()]
    shutil.copy(paths[0], paths[2])
    with pytest.raises(EditFileError, match=f"{paths[2]} is not what the ledger names"):
        ledger.revert(1, base, methods=[method])
    assert list(Ledger(ledger.path).standing) == [1, 2, 3]
    paths[2].unlink()
    with pytest.raises(EditFileError, match="is absent"):
        ledger.revert(1, base, methods=[method])


# ---- random sequences, and growth


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_of_solved_reverts(seed: int, tmp_path: Path) -> None:
    """Methods that edit one layer, in turn: what stands is the stream of the same targets."""
    base, chance, found = tiny_base("gpt2"), random.Random(seed), dict[str, Any]()
    methods = [one_layer(name, base) for name in ("ROME", "MEMIT", "AlphaEdit", "EMMET", "PMET")]
    subjects = ("Marie Curie", "Lyon", "Oslo")
    ledger, made = Ledger(tmp_path / "ledger"), dict[int, tuple[Any, EditRequest]]()
    with targets_kept(found, given=False):
        for step in range(14):
            if step > 3 and chance.random() < 0.4:
                number = chance.choice(list(ledger.standing))
                ledger.revert(number, base, later="solve", methods=methods)
                del made[number]
                ledger = Ledger(shutil.copytree(ledger.path, tmp_path / str(step)))
                continue
            subject = chance.choice(subjects)
            fact = EditRequest(f"{subject} has the number {step} in", "Rome", subject)
            method = chance.choice(methods)
            made[ledger.append(method, [fact]).number] = method, fact
    fresh = Ledger(tmp_path / "fresh")
    with targets_kept(found, given=True):
        for method, fact in made.values():
            fresh.append(method, [fact])
    assert close(deltas(ledger, base), deltas(fresh, base))
    with fresh.applied(base):
        expected = answers(base)
    with ledger.applied(base):
        assert torch.allclose(answers(base), expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_what_an_append_writes_does_not_grow(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    method, ledger, sizes = one_layer("MEMIT", base), Ledger(tmp_path / "ledger"), list[int]()
    with ledger.applied(base):
        for number in range(90):
            subject, before = f"Person {number:03d}", total(ledger.path)
            line = ledger.append(method, [EditRequest(f"{subject} lives in", "Rome", subject)])
            ledger.load(line.edit, base).apply()
            sizes.append(total(ledger.path) - before)
    assert max(sizes[-20:]) <= 1.01 * min(sizes[10:30])


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
