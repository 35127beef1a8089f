"""Records that are longer than the models of a run take are found before anything is computed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_support import fact
from hypernetwork_support import SMALL
from serac_support import serac
from support import tiny_base
from toys import Learner, Toy

from kedit_lightning import EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.errors import DataFileError, InvalidRequestError
from kedit_lightning.methods import IKE, MEND, InstructEdit
from kedit_lightning.methods.shared.row_lengths import RowText, Window, token_counts

#: Texts for a window of 128 tokens: too long, and most of it.
LONG, HALF = ("Rome is in Italy. " * 40)[:-1], ("Rome is the capital of Italy. " * 8)[:-1]
FITS = fact(id="fits")
BAD = [
    fact(id="prompt", prompt=f"{LONG} Amber Falls lies in"),
    fact(id="target", prompt="Rome lies in", subject="Rome", target_new=LONG),
    fact(id="old", target_old=LONG),
    fact(id="rephrase", rephrases=["Amber Falls is in", LONG]),
    fact(id="question", locality={"near": [{"prompt": LONG}]}),
    fact(id="answer", portability={"far": [{"prompt": "Rome", "answers": ["Italy", LONG]}]}),
]


def data(folder: Any, *records: Any, **settings: Any) -> Requests:
    path = folder / "facts.json"
    path.write_text(json.dumps(records))
    return Requests(path=path, train_path=path, val_path=path, **settings)


def run(method: Any, records: Requests, command: str = "test", mode: Any = "single") -> list[str]:
    """The examples that were scored."""
    protocol = Protocol(mode=mode, chunk_size=2, max_new_tokens=4)
    trainer = EditTrainer(
        accelerator="cpu",
        protocol=protocol,
        max_epochs=1,
        enable_checkpointing=False,
        usual_callbacks=False,
    )
    seen: list[str] = []
    take = trainer._take_record
    trainer._take_record = lambda record, edit: (seen.append(record["id"]), take(record, edit))
    getattr(trainer, command)(method, datamodule=records)
    return list(dict.fromkeys(seen))


def test_all_lengths_are_reported_together(tmp_path):
    Toy.computed.clear()
    with pytest.raises(DataFileError) as caught:
        run(Toy(base_model=tiny_base("gpt2")), data(tmp_path, FITS, *BAD))
    message = str(caught.value)
    assert "facts.json has 6 bad records of 7: " in message
    for number, record in enumerate(BAD, start=1):
        assert f"facts.json index {number} (id '{record['id']}'): its " in message
    assert "base model 'gpt2' takes at most 128" in message
    assert "on_bad_record: skip" in message
    assert Toy.computed == []


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_they_are_left_out_and_counted(mode, tmp_path):
    records = data(tmp_path, *BAD[:3], FITS, *BAD[3:], on_bad_record="skip")
    with pytest.warns(UserWarning, match="6 of 7 records of facts.json are left out"):
        seen = run(Toy(base_model=tiny_base("gpt2")), records, mode=mode)
    assert seen == ["fits"]
    source = records.source["test"]
    assert (source["records"], source["skipped"]) == (1, 6)
    assert len(source["skipped_records"]) == 6


@pytest.mark.parametrize(("command", "split"), [("fit", "train"), ("validate", "validation")])
def test_fit_and_validate_leave_them_out_too(command, split, tmp_path):
    records = data(tmp_path, FITS, BAD[0], on_bad_record="skip")
    with pytest.warns(UserWarning, match="1 of 2 records of facts.json are left out"):
        run(Learner(base_model=tiny_base("gpt2")), records, command)
    assert records.source[split]["records"] == 1
    assert records.source["validation"]["records"] == 1  # fit validates


def test_nothing_is_left_if_all_are_too_long(tmp_path):
    with pytest.raises(DataFileError, match="holds no usable record"):
        run(Toy(base_model=tiny_base("gpt2")), data(tmp_path, BAD[0], on_bad_record="skip"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_numbers_of_tokens_near_the_window_are_exact(family):
    base = tiny_base(family)
    window = Window.of(base)
    rows = [RowText("", "Rome is " * n + "of", "Italy") for n in range(1, 60)]
    counts = token_counts(window, rows)
    fits = 0
    for row in rows:
        exact = base.encoder.encode(row.prompt, row.answer)
        length = len(exact.prompt) + len(exact.answer)
        assert counts[row] == length or max(counts[row], length) < window.tokens
        if length <= window.tokens:
            base.encode(row.prompt, row.answer)
            fits += 1
        else:
            with pytest.raises(InvalidRequestError):
                base.encode(row.prompt, row.answer)
    assert 0 < fits < len(rows)
    bare = RowText("", rows[-1].prompt)  # something must follow
    assert token_counts(window, [bare])[bare] == len(base.encoder.encode(bare.prompt).prompt) + 1


# ---- a fact stated before each question


def test_ike_leaves_room_for_the_statement(tmp_path):
    near = fact(id="near", locality={"near": [{"prompt": HALF}]})
    twice = fact(id="twice", prompt=f"{HALF} Amber Falls lies in")
    plain = data(tmp_path, FITS, near, twice, on_bad_record="skip")
    assert run(Toy(base_model=tiny_base("gpt2")), plain) == ["fits", "near", "twice"]
    stated = data(tmp_path, FITS, near, twice, on_bad_record="skip")
    with pytest.warns(UserWarning, match=r"\(id 'twice'\): its rewrite probe takes"):
        seen = run(IKE(tiny_base("gpt2"), demonstrations=0), stated)
    assert seen == ["fits", "near"]


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_facts_in_force_together_may_meet_any_question(mode, tmp_path):
    near = fact(id="near", prompt="Rome lies in", subject="Rome")
    near["locality"] = {"near": [{"prompt": f"{HALF} {HALF[:60]}"}]}
    more = fact(id="more", prompt="Lyon lies in", subject="Lyon", target_new=HALF[:119])
    records = data(tmp_path, FITS, near, more, on_bad_record="skip")
    with pytest.warns(UserWarning, match=r"\(id 'more'\): a fact and a question take"):
        seen = run(IKE(tiny_base("gpt2"), demonstrations=0), records, mode=mode)
    assert seen == ["fits", "near"]
    assert len(run(IKE(tiny_base("gpt2"), demonstrations=0), data(tmp_path, FITS, near, more))) == 3


def test_ike_refuses_a_long_target_at_once():
    long = EditRequest("Amber Falls lies in", HALF, "Amber Falls")
    with pytest.raises(InvalidRequestError, match=r"request 'Amber Falls lies in' is too long"):
        IKE(tiny_base("gpt2"), demonstrations=0).edit([long])


@pytest.mark.parametrize("tokens", ["its own", "the same"])
def test_the_window_of_a_counterfactual_model_counts(tokens, tmp_path):
    other = tiny_base("llama", max_position_embeddings=64)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    base = tiny_base("gpt2" if tokens == "its own" else "llama")
    near = fact(id="near", locality={"near": [{"prompt": HALF}]})
    records = data(tmp_path, near, FITS, on_bad_record="skip")
    with pytest.warns(UserWarning, match=r"'near'\): a fact and a question .* counterfactual"):
        seen = run(serac(base, counterfactual=str(tmp_path / "other")), records)
    assert seen == ["fits"]


@pytest.mark.parametrize("given", ["prompt", "data"])
def test_prompts_are_measured_before_the_first_is_answered(given, tmp_path, monkeypatch):
    base = tiny_base("gpt2")
    monkeypatch.setattr(type(base), "generate", lambda *_, **__: pytest.fail("asked"))
    trainer = EditTrainer(accelerator="cpu", protocol=Protocol(max_new_tokens=4))
    prompts = ["Rome is in", LONG, "Lyon is in", f"{LONG} and"]
    records = [fact(id=str(i), prompt=p, subject=None) for i, p in enumerate(prompts)]
    asked = {"prompt": prompts} if given == "prompt" else {"datamodule": data(tmp_path, *records)}
    with pytest.raises((InvalidRequestError, DataFileError)) as caught:
        trainer.predict(Toy(base_model=base), **asked)
    assert str(caught.value).count("takes at most 128") == 2


def test_prompts_are_measured_under_the_edits_that_are_applied(tmp_path):
    base = tiny_base("gpt2")
    trainer = EditTrainer(accelerator="cpu", protocol=Protocol(max_new_tokens=4))
    ike = IKE(base_model=base, demonstrations=0)
    edit = ike.edit([EditRequest("Rome is the capital of", "the country of Italy and of Lyon")])
    edit.save(tmp_path / "edit.safetensors")
    prompts = ["Rome is in", ("Rome is the capital of Italy. " * 13)[:-1]]
    assert len(trainer.predict(ike, prompt=prompts, verbose=False)) == 2
    with pytest.raises(InvalidRequestError, match="1 of 2 prompts cannot be answered"):
        trainer.predict(ike, prompt=prompts, edits=tmp_path / "edit.safetensors")


@pytest.mark.filterwarnings("ignore:.*left out")
def test_facts_are_grouped_once_those_that_are_too_long_are_left_out(tmp_path):
    base, long = tiny_base("gpt2"), fact(id="long", target_new=LONG)
    for count, name in ((1, "fits"), (2, "chunk-00000")):
        prompts = {"fits": "Rome lies in", "more": "Bern lies in"}
        records = [fact(id=i, prompt=p, subject=p[:4]) for i, p in prompts.items()][:count]
        found = data(tmp_path, long, *records, on_bad_record="skip")
        trainer = EditTrainer(accelerator="cpu", protocol=Protocol(max_new_tokens=4))
        trainer.edit(Toy(base_model=base), found, output=tmp_path / name)
        assert [path.stem for path in (tmp_path / name / "edits").iterdir()] == [name]
        settings = json.loads((tmp_path / name / "run.json").read_text())
        assert settings["protocol"].get("chunk_size", 1) == count


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*has not been fitted")
def test_an_instruction_counts(command, tmp_path):
    words = {"long": ["Where?", f"{HALF} {HALF}"], "short": ["Where?"]}
    method = InstructEdit(base_model=tiny_base("gpt2"), tasks=words, **SMALL)
    probe = {"near": [{"prompt": "Rome is in", "answers": ["Italy"]}]}
    asked = {"locality": probe, "rephrases": ["Amber Falls is in"]}
    prompts = {"long": "Rome is in", "short": "Lyon is in"}
    records = [fact(id=t, task=t, prompt=p, subject=p[:4], **asked) for t, p in prompts.items()]
    found = data(tmp_path, *records, on_bad_record="skip")
    run(method, found, command)
    kept = found.source["train" if command == "fit" else "test"]
    assert kept["records"] == 1
    assert "(id 'long')" in kept["skipped_records"][0]


@pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*has not been fitted")
def test_answers_of_other_records_count_where_targets_vary(tmp_path):
    """The long answer fits behind its own prompt, and not behind the other one."""
    probes = {
        "locality": {"near": [{"prompt": "Rome is in", "answers": ["Italy"]}]},
        "rephrases": ["Rome is in"],
    }
    long = fact(id="long", prompt="Rome is in", subject="Rome", target_new=HALF, target_old="Peru")
    short = fact(id="short", prompt=f"{HALF} Lyon is in", subject="Lyon", target_old="Peru")
    for vary in (False, True):
        method = MEND(base_model=tiny_base("gpt2"), vary_targets=vary, **SMALL)
        found = data(tmp_path, {**long, **probes}, {**short, **probes}, on_bad_record="skip")
        run(method, found, "fit")
        assert found.source["train"]["records"] == 2 - vary
