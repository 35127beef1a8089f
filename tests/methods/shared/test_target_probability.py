"""Whether a fact was written stands in its edit, in results and in one warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import edit_kinds
import pytest
import torch
from support import tiny_base
from toys import Toy

from kedit_lightning import Edit, EditRequest, EditTrainer
from kedit_lightning.data import Requests
from kedit_lightning.edits import EditOrigin
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.errors import FactsNotWrittenWarning
from kedit_lightning.methods import FTM, GRACE, IKE
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.methods.shared.target_probability import (
    note_probabilities,
    target_probabilities,
    ways_out,
)

REQUESTS = [
    EditRequest("Amber Falls lies in", "Norway"),
    EditRequest("The Bolt river", "Peru Norway"),
    EditRequest("A longer prompt than the others, of more tokens, is", "Norway"),
]


class OneByOne(Toy):
    """Writes one fact at a time."""

    can: ClassVar[Capabilities] = Capabilities(batch=False)


def noted(edit: Edit) -> Any:
    return edit.origin.notes[TARGET_PROBABILITIES]


def by_hand(edit: Edit, request: EditRequest) -> float:
    base: Any = edit.base
    with edit:
        rows = base.rows([request.prompt], [request.target_new])
        return float(base.answer_log_probs(rows).sum().exp())


@pytest.mark.parametrize("kind", [Toy, OneByOne])
def test_the_note_is_the_probability_under_the_edit(kind):
    edit = kind(base_model=tiny_base("llama"), strength=300.0).edit(REQUESTS)
    assert noted(edit) == pytest.approx([by_hand(edit, r) for r in REQUESTS], abs=6e-5)
    assert noted(edit)[0] > 10 * target_probabilities(edit.base, REQUESTS)[0]
    assert not edit.applied


@pytest.mark.parametrize("kind", edit_kinds.KINDS)
def test_every_kind_of_edit_has_it(kind):
    edit = edit_kinds.KINDS[kind](tiny_base("llama"))
    edit.origin = EditOrigin(requests=tuple(REQUESTS))
    note_probabilities(edit, REQUESTS)
    assert noted(edit) == pytest.approx([by_hand(edit, r) for r in REQUESTS], abs=6e-5)


def test_equal_edits_have_equal_ids_however_they_are_computed(tmp_path):
    base = tiny_base("llama")
    toy = Toy(base_model=base)
    edit = toy.edit(REQUESTS[:1])
    (alone,) = toy.edit_each([REQUESTS[:1]])
    assert edit.id == alone.id
    loaded = Edit.load(edit.save(tmp_path / "edit"), base)
    assert (loaded.id, noted(loaded)) == (edit.id, noted(edit))


def test_the_id_is_that_of_the_notes_an_edit_has():
    edit = Toy(base_model=tiny_base("llama")).edit(REQUESTS[:1])
    before = edit.id
    edit.note(more=1)
    assert edit.id != before
    assert edit.origin.notes["more"] == 1


def test_a_probability_that_is_no_number_is_none_at_all():
    base = tiny_base("llama")
    head = base.model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head.fill_(float("nan"))
        assert target_probabilities(base, REQUESTS[:1]) == [0.0]
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_one_warning_counts_the_facts_that_were_not_written():
    toy = Toy(base_model=tiny_base("llama"), strength=0.0)
    with pytest.warns(FactsNotWrittenWarning, match=r"Toy did not write 3 of 3 facts") as caught:
        toy.edit(REQUESTS)
    assert len(caught) == 1
    assert "'Amber Falls lies in' -> 'Norway'" in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", FactsNotWrittenWarning)
        edit = Toy(base_model="nano", strength=300.0).edit(
            [EditRequest("The capital of France is", "Lyon")]
        )
    assert noted(edit)[0] > 0.5


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FTM, "another layer (--model.layers; the callback LayerSweep measures each), more steps"),
        (GRACE, "another layer (--model.layer; the callback LayerSweep measures each), more steps"),
        (IKE, "try another method"),
    ],
)
def test_the_ways_out_are_those_of_the_method(kind, words):
    said = ways_out(kind().settings)
    assert words in said
    assert said.endswith("another method")


def test_results_have_it_and_a_run_warns_of_none(tmp_path: Path):
    facts = tmp_path / "facts.json"
    facts.write_text(
        json.dumps([{"prompt": r.prompt, "target_new": r.target_new} for r in REQUESTS])
    )
    toy = Toy(base_model=tiny_base("llama"), strength=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FactsNotWrittenWarning)
        (scores,) = EditTrainer(accelerator="cpu").test(
            toy, Requests(path=facts), output=tmp_path / "run", verbose=False
        )
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    found = [json.loads(line)["edit"]["target_probability"] for line in lines]
    # With a strength of 0 they are those of the base model.
    assert found == target_probabilities(toy.base, REQUESTS)
    assert scores["edit/target_probability"] == pytest.approx(sum(found) / 3)
