"""Pictures in files of facts: where they are, which are missing, and runs that ask about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from tiny_vision import draw, vision_base, vision_folder

from kedit_lightning import EditRequest, Probe
from kedit_lightning.cli.main import main
from kedit_lightning.data import EVQA, ADSEdit, Requests
from kedit_lightning.errors import DataFileError, InvalidRequestError
from kedit_lightning.image_reference import content_hash

SAMPLES = ROOT / "tests" / "samples" / "published"
FACT: dict[str, Any] = {
    "prompt": "What is this? It is a",
    "target_new": "tower",
    "image": "a.png",
    "image_rephrases": ["b.png"],
    "rephrases": ["This is a"],
    "locality": {"near": [{"prompt": "Rome is in", "answers": ["Italy"]}]},
    "portability": {"hop": [{"prompt": "Is it high?", "answers": "yes", "image": "b.png"}]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        draw(tmp_path / f"{name}.png", seed)
    return tmp_path


def _file(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "facts.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_pictures_of_a_file_of_facts(folder):
    (example,) = Requests(path=_file(folder, FACT)).examples()
    a, b = (str(folder / f"{name}.png") for name in "ab")
    assert example.requests[0].image == a
    seen = {(p.kind, p.group): p.image for p in example.probes}
    assert seen == {
        ("rewrite", "rewrite"): a,
        ("rephrase", "rephrase"): a,
        ("rephrase", "image"): b,
        ("locality", "near"): None,
        ("portability", "hop"): b,
    }
    (several,) = Requests(path=_file(folder, {**FACT, "image": ["a.png", "b.png"]})).examples()
    assert several.requests[0].image == (a, b)


def test_missing_pictures_are_reported_together(folder):
    records = [{**FACT, "image": f"{name}.png"} for name in ("a", "c", "d")]
    with pytest.raises(DataFileError, match="2 bad records of 3") as caught:
        Requests(path=_file(folder, *records)).examples()
    for name in ("c", "d"):
        assert f"'{folder / f'{name}.png'}'" in str(caught.value)
    with pytest.raises(DataFileError, match="2 bad records of 2"):
        EVQA(SAMPLES / "vqa_eval.json", image_root=folder).examples()


def test_probes_of_evqa_ask_about_other_pictures():
    for example in EVQA(SAMPLES / "vqa_eval.json").examples():
        request = example.requests[0]
        image = {(p.kind, p.group): p for p in example.probes}
        assert image["rephrase", "text"].image == request.image
        other, unrelated = image["rephrase", "image"], image["locality", "image"]
        assert other.prompt == request.prompt
        assert isinstance(other.image, str)
        assert isinstance(request.image, str)
        assert content_hash(other.image) != content_hash(request.image)
        assert unrelated.prompt.startswith("Question: ")
        assert unrelated.prompt.endswith(" Short answer:")
        assert image["locality", "text"].image is None


def test_scenes_of_several_pictures_and_no_films(folder):
    first, second = ADSEdit(SAMPLES / "adsedit.json").examples()
    assert isinstance(first.requests[0].image, str)
    assert isinstance(second.requests[0].image, tuple)
    rows = vision_base("llava").rows(["Which way?"], images=[second.requests[0].image])
    assert len(rows.pictures[0].features.pooler_output) == 2
    (record, _) = json.loads((SAMPLES / "adsedit.json").read_text(encoding="utf-8"))
    path = _file(folder, {**record, "image": "drive.mp4"})
    with pytest.raises(DataFileError, match="field 'image' names a film; give its frames"):
        ADSEdit(path).examples()


def test_pictures_in_memory_become_text(folder):
    from PIL import Image

    path = folder / "a.png"
    with Image.open(path) as picture:
        held = EditRequest("It is a", " tower", image=picture)
    read = EditRequest("It is a", " tower", image=path.read_bytes())
    base = vision_base("llava")
    rows = [
        base.rows(["It is a"], [" tower"], images=[image])
        for image in (held.image, read.image, str(path))
    ]
    logits = [base.answer_logits(one) for one in rows]
    assert all((one == logits[0]).all() for one in logits)
    assert Probe("locality", "It is a", image=[path]).image == str(path)
    with pytest.raises(InvalidRequestError, match="field 'image' must be text"):
        EditRequest("It is a", " tower", image=3)
    with pytest.raises(InvalidRequestError, match="is an empty list"):
        EditRequest("It is a", " tower", image=[])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vision_folder(tmp_path_factory.mktemp("llava"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["one fact", "a file"])
def test_kedit_edit_about_a_picture(saved, folder, form):
    output = folder / "run"
    model = ["-c", "methods/ftm", f"--model.base_model={saved}", "--model.lr=0.05"]
    data = ["--data=Requests"]
    if form == "one fact":
        data += [f"--data.image={folder / 'a.png'}", "--data.target_new=tower"]
        data += ["--data.prompt=What is this? It is a"]
    else:
        data += [f"--data.path={_file(folder, FACT)}"]
    run = ["--trainer.accelerator=cpu", f"--output={output}"]
    main(["edit", *model, *data, *run])
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    probes = json.loads(lines[0])["probes"]
    assert len(probes) == (1 if form == "one fact" else 5)
    assert probes[0]["after"]["log_prob"] > probes[0]["base"]["log_prob"] + 1
