"""Requests, probes, examples and batches: what is accepted, and what the refusals say."""

from __future__ import annotations

import ast
import builtins
import inspect
from dataclasses import FrozenInstanceError, replace

import lightning.pytorch as pl
import pytest
import torch

from kedit_lightning import EditBatch, EditExample, EditRequest, Probe, errors
from kedit_lightning.edits.edit import EditOrigin

PROMPT = "The Eiffel Tower is in the city of"


def test_a_request_needs_only_prompt_and_target():
    request = EditRequest(PROMPT, "Rome")
    assert (request.subject, request.target_old, request.id) == (None, None, None)


def test_fields_stand_in_the_order_of_the_documentation():
    request = EditRequest(PROMPT, "Rome", "Eiffel Tower", "Paris", "tower")
    assert request == EditRequest(
        prompt=PROMPT, target_new="Rome", subject="Eiffel Tower", target_old="Paris", id="tower"
    )


@pytest.mark.parametrize("field", ["prompt", "target_new", "subject", "target_old", "id", "image"])
@pytest.mark.parametrize("value", ["", "  \n", 7])
def test_a_text_that_is_empty_or_no_text_is_refused_by_name(field, value):
    fields = {"prompt": PROMPT, "target_new": "Rome", "id": "r1", field: value}
    with pytest.raises(errors.InvalidRequestError, match=f"field '{field}' must be text") as caught:
        EditRequest(**fields)
    assert repr(value) in str(caught.value)
    if field != "id":
        assert "request 'r1'" in str(caught.value)


def test_a_subject_outside_its_prompt_is_refused_with_both_texts_and_a_way_out():
    with pytest.raises(errors.InvalidRequestError) as caught:
        EditRequest(PROMPT, "Rome", subject="eiffel tower", id="r1")
    for part in ("request 'r1'", "'subject'", "'eiffel tower'", PROMPT, "exactly"):
        assert part in str(caught.value)


def test_requests_cannot_change_and_can_be_compared_and_hashed():
    request = EditRequest(PROMPT, "Rome")
    with pytest.raises(FrozenInstanceError):
        request.target_new = "Oslo"  # type: ignore[misc]
    assert len({request, EditRequest(PROMPT, "Rome"), EditRequest(PROMPT, "Oslo")}) == 2


def test_messages_name_a_request_by_its_id_or_else_by_its_prompt():
    assert EditRequest(PROMPT, "Rome", id="r1").label == "request 'r1'"
    assert PROMPT in EditRequest(PROMPT, "Rome").label


def test_a_probe_is_grouped_under_its_kind_unless_it_names_a_group():
    assert Probe("rephrase", PROMPT, ("Rome",)).group == "rephrase"
    assert Probe("locality", PROMPT, group="neighborhood").group == "neighborhood"


def test_answers_from_json_are_kept_as_a_tuple():
    probe = Probe("rewrite", PROMPT, ["Rome", "Roma"])  # type: ignore[arg-type]
    assert probe.answers == ("Rome", "Roma")
    assert hash(probe) == hash(Probe("rewrite", PROMPT, ("Rome", "Roma")))


@pytest.mark.parametrize(
    ("fields", "named", "reason"),
    [
        ({"kind": "paraphrase", "answers": ("Rome",)}, "kind", "rewrite, rephrase, locality"),
        ({"kind": "rewrite", "prompt": " ", "answers": ("Rome",)}, "prompt", "not empty"),
        ({"kind": "rewrite"}, "answers", "at least one"),
        ({"kind": "portability", "answers": ()}, "answers", "at least one"),
        ({"kind": "rewrite", "answers": ("Rome", "")}, "answers", "not empty"),
        ({"kind": "rewrite", "answers": (3,)}, "answers", "not empty"),
        ({"kind": "rewrite", "answers": "Rome"}, "answers", "list of texts"),
        ({"kind": "rewrite", "answers": ("Rome",), "contrast": ""}, "contrast", "not empty"),
        ({"kind": "locality", "image": " "}, "image", "not empty"),
        ({"kind": "locality", "group": 3}, "group", "must be text"),
    ],
)
def test_a_bad_probe_is_refused_with_the_field(fields, named, reason):
    with pytest.raises(errors.InvalidRequestError, match=f"field '{named}' .*{reason}"):
        Probe(**{"prompt": PROMPT, **fields})


def test_locality_may_ask_without_an_answer():
    assert Probe("locality", PROMPT).answers == ()


def test_an_example_from_a_request_asks_for_its_rewrite_first():
    request = EditRequest(PROMPT, "Rome", target_old="Paris")
    rephrase = Probe("rephrase", "Where is it?", ("Rome",))
    example = EditExample.from_request(request, "e1", [rephrase])
    assert example.requests == (request,)
    assert example.probes == (Probe("rewrite", PROMPT, ("Rome",), contrast="Paris"), rephrase)
    assert example.id == "e1"


def test_a_picture_goes_from_the_request_to_its_rewrite_probe():
    request = EditRequest(PROMPT, "Rome", image="tower.png")
    assert EditExample.from_request(request, "e1").probes[0].image == "tower.png"


def test_plain_values_are_those_of_earlier_releases_where_there_is_no_picture():
    plain = EditExample.from_request(EditRequest(PROMPT, "Rome"), "e1").to_json()
    fields = ["prompt", "target_new", "subject", "target_old", "id", "task"]
    assert list(plain["requests"][0]) == fields
    assert list(plain["probes"][0]) == ["kind", "prompt", "answers", "group", "contrast"]
    seen = EditExample.from_request(EditRequest(PROMPT, "Rome", image="a.png"), "e1").to_json()
    assert seen["requests"][0]["image"] == seen["probes"][0]["image"] == "a.png"


def test_an_edit_records_a_picture_only_where_there_is_one():
    request = EditRequest(PROMPT, "Rome")
    origin = EditOrigin("ROME", {}, (request,))
    assert not {"task", "image"} & set(origin.to_json()["requests"][0])
    seen = EditOrigin("ROME", {}, (replace(request, image="a.png"),))
    assert EditOrigin.from_json(seen.to_json()) == seen


def test_an_example_without_requests_is_refused():
    with pytest.raises(errors.InvalidRequestError, match="example 'e1': field 'requests'"):
        EditExample((), (), "e1")


def test_a_batch_gives_the_requests_of_its_examples_in_order():
    requests = [EditRequest(PROMPT, answer) for answer in ("Rome", "Oslo", "Bern")]
    batch = EditBatch(
        [EditExample(tuple(requests[:2]), (), "a"), EditExample((requests[2],), (), "b")]
    )
    assert batch.requests == requests
    assert len(batch) == 2


def test_a_batch_passes_through_lightning_unchanged():
    batch = EditBatch([EditExample.from_request(EditRequest(PROMPT, "Rome"), "a")])
    moved = pl.LightningModule().transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert moved is batch


def test_every_error_is_a_built_in_one_too():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.KEditError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        if kind is not errors.KEditError:
            bases = [b for b in kind.__mro__ if b.__module__ == "builtins"]
            assert bases[0] is not Exception, kind
            assert getattr(builtins, bases[0].__name__) is bases[0]
        assert kind.__doc__


def test_a_request_in_a_file_keeps_the_white_space_its_edit_was_computed_for():
    values = EditOrigin("ROME", {}, (EditRequest(PROMPT, "Rome"),)).to_json()
    values["requests"][0]["target_new"] = "Rome "
    assert EditOrigin.from_json(values).to_json() == values


@pytest.mark.parametrize("kind", [EditRequest, Probe])
def test_what_type_checkers_read_of_a_constructor_is_what_it_takes(kind):
    (definition,) = ast.parse(inspect.getsource(kind)).body
    (init,) = (n for n in ast.walk(definition) if getattr(n, "name", "") == "__init__")
    given, defaults = init.args.args[1:], init.args.defaults
    written = [f"{argument.arg}" for argument in given], list(map(ast.literal_eval, defaults))
    taken = inspect.signature(kind).parameters.values()
    assert written[0] == [parameter.name for parameter in taken]
    assert written[1] == [p.default for p in taken if p.default is not inspect.Parameter.empty]


def test_a_constraint_is_a_question_with_its_answer():
    whole = EditRequest("p", "t", constraint_prompt="q", constraint_answer=" a ")
    assert whole.constraint_answer == "a"
    for field in ("constraint_prompt", "constraint_answer"):
        with pytest.raises(errors.InvalidRequestError, match="a constraint is a question with it"):
            EditRequest("p", "t", **{field: "x"})
    # Ids of edits and hashes of data made without it stay.
    plain = EditExample.from_request(EditRequest("p", "t"), "1").to_json()
    assert not any("constraint" in name for name in plain["requests"][0])
    origin = EditOrigin(requests=(whole, EditRequest("p", "t")))
    assert EditOrigin.from_json(origin.to_json()).requests == origin.requests
    assert not any("constraint" in name for name in origin.to_json()["requests"][1])
