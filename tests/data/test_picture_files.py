"""Pictures in files of facts: where they are, which are missing, and runs that ask about them."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT
from tiny_vision import draw, vision_base, vision_folder

from kedit_lightning import EditRequest, Probe, image_reference
from kedit_lightning.base_models.rows.image import _opened as opened
from kedit_lightning.cli.main import main
from kedit_lightning.data import EVQA, ADSEdit, Requests
from kedit_lightning.errors import DataFileError, InvalidRequestError, MissingExtraError
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


def test_a_file_is_hashed_once_until_it_changes(folder):
    path = folder / "a.png"
    reads = image_reference._hash_of.cache_info().misses
    first = [content_hash(str(path)) for _ in range(3)]
    assert {*first} == {hashlib.sha256(path.read_bytes()).hexdigest()[:24]}
    assert image_reference._hash_of.cache_info().misses == reads + 1
    path.write_bytes(path.read_bytes() + b"x")
    assert content_hash(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    frames = [f"{path}#frame={n}/2" for n in range(2)]
    assert len({content_hash(str(path)), *map(content_hash, frames)}) == 3


def test_missing_pictures_are_reported_together(folder):
    records = [{**FACT, "image": f"{name}.png"} for name in ("a", "c", "d")]
    with pytest.raises(DataFileError, match="2 bad records of 3") as caught:
        Requests(path=_file(folder, *records)).examples()
    for name in ("c", "d"):
        assert f"'{folder / f'{name}.png'}'" in str(caught.value)
    with pytest.raises(DataFileError, match=r"2 bad records of 2.*--data\.image_root FOLDER"):
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


def film(path: Path) -> str:
    """Ten frames, each brighter than the one before."""
    av = pytest.importorskip("av", reason="of the extra vision")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(10):
            shade = np.full((16, 32, 3), 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def test_frames_of_a_video_are_pictures(folder):
    path = film(folder / "drive.mp4")
    images = vision_base("llava").encoder.images
    fact = EditRequest("Which way?", " left", image=path)
    assert fact.image == tuple(f"{path}#frame={i}/8" for i in range(8))
    (record, _) = json.loads((SAMPLES / "adsedit.json").read_text(encoding="utf-8"))
    root = SAMPLES / "pictures"
    record |= {"image": path, "image_rephrase": str(root / "bridge.png")}
    record["m_loc"] = str(root / "tower.png")
    (example,) = ADSEdit(_file(folder, record), frames=3).examples()
    seen = example.requests[0].image
    assert seen == tuple(f"{path}#frame={i}/3" for i in range(3))
    shades = [np.asarray(opened(one)).mean() for one in seen]
    assert shades == pytest.approx([20, 100, 160], abs=8)  # of frames 1, 5 and 8
    assert len(images.seen(seen).values["pixel_values"]) == 3
    assert len({content_hash(one) for one in seen}) == 3
    assert images.usual_count(seen) == pytest.approx(images.count(seen), abs=3)
    (folder / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(InvalidRequestError, match=r"video '.*bad\.mp4' cannot be read"):
        opened(f"{folder / 'bad.mp4'}#frame=0/2")


def test_a_video_without_pyav_is_refused_with_the_extra(folder, monkeypatch):
    (folder / "drive.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kedit-lightning\[vision\]'"):
        opened(f"{folder / 'drive.mp4'}#frame=0/2")
    monkeypatch.setattr("kedit_lightning.data.picture_files.find_spec", lambda name: None)
    path = _file(folder, {**FACT, "image": "drive.mp4"})
    with pytest.raises(MissingExtraError, match=r"field 'image' names video 'drive\.mp4', whose"):
        Requests(path=path).examples()


def test_scenes_of_several_pictures(folder):
    first, second = ADSEdit(SAMPLES / "adsedit.json").examples()
    assert isinstance(first.requests[0].image, str)
    assert isinstance(second.requests[0].image, tuple)
    rows = vision_base("llava").rows(["Which way?"], images=[second.requests[0].image])
    assert len(rows.pictures[0].features.pooler_output) == 2
    (record, _) = json.loads((SAMPLES / "adsedit.json").read_text(encoding="utf-8"))
    path = _file(folder, {**record, "image": {"front": "a.png"}})
    with pytest.raises(DataFileError, match="field 'image' is an object; give a picture, a video"):
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
