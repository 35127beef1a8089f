"""Saved edits: the same edit comes back, nothing but data is read, and refusals name both sides."""

from __future__ import annotations

import json
import os
import pickletools
import zipfile
from dataclasses import replace

import edit_kinds
import pytest
import torch
from edit_kinds import KINDS, answers, origin_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import REQUESTS, tiny_base

from kedit_lightning import Edit, EditRequest
from kedit_lightning.edits import EditOrigin, LowRankEdit, edit_file
from kedit_lightning.edits.edit_file import content_id, read_edit, write_atomically
from kedit_lightning.errors import BaseModelMismatchError, EditFileError


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_edit_comes_back_with_its_id_and_its_logits(kind, dtype, tmp_path):
    base = tiny_base("llama", dtype)
    edit = KINDS[kind](base)
    with edit:
        edited = answers(base)
    path = edit.save(tmp_path / "deep" / "edit.safetensors")
    fresh = tiny_base("llama", dtype)  # as in another process
    loaded = Edit.load(path, fresh)
    assert type(loaded) is type(edit)
    assert loaded.id == edit.id
    assert loaded.origin == edit.origin
    assert len(fresh.edits) == 0, "loading applied the edit"
    with loaded:
        assert torch.equal(answers(fresh), edited)


def test_a_memory_survives_also_inside_a_composite(tmp_path):
    base = tiny_base("llama")
    for edit in (edit_kinds.remembering(base), edit_kinds.composite(base)):
        loaded = Edit.load(edit.save(tmp_path / edit.kind), base).parts()[0]
        memory = edit.parts()[0].memory
        assert loaded.memory.keys() == memory.keys() == {"keys.A", "count"}
        assert all(torch.equal(loaded.memory[name], held) for name, held in memory.items())
        assert loaded.requires_its_stack


def test_the_origin_survives(tmp_path):
    base = tiny_base("llama")
    requests = (*REQUESTS, EditRequest("Wo liegt Łódź? In", "Polen", id="ł"))
    edit = edit_kinds.low_rank(
        base,
        method="ROME",
        settings={"layer": 1, "lr": 0.5, "names": ["a"], "10": 1, "9": 2},
        requests=requests,
        stack=("abc", "def"),  # as earlier releases wrote it
        notes={"statistics": "few samples"},
    )
    origin = Edit.load(edit.save(tmp_path / "edit"), base).origin
    assert origin == edit.origin
    assert origin.requests[-1].prompt == "Wo liegt Łódź? In"


def test_settings_that_json_does_not_know_are_kept_as_json_knows_them(tmp_path):
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base, settings={"path": tmp_path, "layers": (1, 2), 10: "ten"})
    loaded = Edit.load(edit.save(tmp_path / "edit"), base)
    assert loaded.origin.settings == {"path": str(tmp_path), "layers": [1, 2], "10": "ten"}
    assert loaded.id == edit.id


def test_a_file_holds_tensors_and_json_and_no_pickle(tmp_path):
    base = tiny_base("llama")
    for kind, make in KINDS.items():
        path = make(base).save(tmp_path / kind)
        assert not zipfile.is_zipfile(path)
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
            list(pickletools.genops(path.read_bytes()))
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["kedit"])
        assert header["format_version"] == 1
        assert header["origin"]["fingerprint"] == base.fingerprint


def test_layers_may_share_tensors(tmp_path):
    base = tiny_base("llama")
    names = [base.layout.block(i).down for i in range(3)]
    a, b = edit_kinds.factors(base, names[0])
    edit = LowRankEdit(base, {names[0]: (a, b), names[1]: (a, b), names[2]: (a[:1], b[:, :1])})
    assert Edit.load(edit.save(tmp_path / "edit"), base).id == edit.id


def test_another_base_model_is_refused_with_both_names_unless_forced(tmp_path):
    llama, other = tiny_base("llama"), tiny_base("llama", rms_norm_eps=1e-3)
    other.name = "llama-of-mine"
    path = edit_kinds.low_rank(llama).save(tmp_path / "edit")
    with pytest.raises(BaseModelMismatchError) as caught:
        Edit.load(path, other)
    for part in (str(path), "'llama'", "'llama-of-mine'", llama.fingerprint, other.fingerprint):
        assert part in str(caught.value)
    assert "force=True" in str(caught.value)
    with Edit.load(path, other, force=True) as forced:
        assert forced.applied


def test_another_dtype_or_tokenizer_is_another_base_model(tmp_path):
    base = tiny_base("llama")
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    with pytest.raises(BaseModelMismatchError, match="same dtype"):
        Edit.load(path, tiny_base("llama", torch.float32))
    same_weights = tiny_base("llama")
    same_weights.tokenizer = tiny_base("gpt2").tokenizer  # no beginning-of-sequence token
    with pytest.raises(BaseModelMismatchError, match="tokenizer of 'llama'"):
        Edit.load(path, same_weights)


def test_a_forced_edit_that_does_not_fit_is_still_refused(tmp_path):
    path = edit_kinds.low_rank(tiny_base("llama")).save(tmp_path / "edit")
    with pytest.raises(EditFileError, match="maps 40 to 32"):
        Edit.load(path, tiny_base("llama", intermediate_size=40), force=True)


def test_an_edit_of_unknown_origin_loads_on_what_it_fits(tmp_path):
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    by_hand = LowRankEdit(base, edit.factors)
    assert by_hand.origin == EditOrigin()
    other = tiny_base("llama", rms_norm_eps=1e-3)
    assert Edit.load(by_hand.save(tmp_path / "edit"), other).id == by_hand.id


# ---- files that are no edits


def _tampered(path, **changes):
    """Write an edit's tensors again with another header, and the id that belongs to it."""
    header, tensors = read_edit(path)
    header = {**header, **changes}
    parts = (header[name] for name in ("kind", "values", "origin"))
    header["id"] = content_id(*parts, tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, path, {"kedit": json.dumps(header)})
    return path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EditFileError, match=r"no saved edit at .*nowhere"):
        Edit.load(tmp_path / "nowhere", tiny_base("llama"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(share, tmp_path):
    base = tiny_base("llama")
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(EditFileError, match=f"{path} is no saved edit"):
        Edit.load(path, base)


def test_other_files_are_refused(tmp_path):
    base = tiny_base("llama")
    text, tensors, pickled = (tmp_path / name for name in ("text", "tensors", "pickled"))
    text.write_text("an edit, honestly")
    save_file({"a": torch.ones(2)}, tensors)
    torch.save({"a": torch.ones(2)}, pickled)
    with pytest.raises(EditFileError, match=f"{text} is no saved edit"):
        Edit.load(text, base)
    with pytest.raises(EditFileError, match="holds tensors but is no saved edit"):
        Edit.load(tensors, base)
    with pytest.raises(EditFileError, match="is no saved edit"):
        Edit.load(pickled, base)
    with pytest.raises(EditFileError, match="no saved edit at"):
        Edit.load(tmp_path, base)


def test_a_header_that_cannot_be_read_is_refused(tmp_path):
    base = tiny_base("llama")
    path = tmp_path / "edit"
    for header in ("{not json", "[1, 2]", '"text"'):
        save_file({"a": torch.ones(2)}, path, metadata={"kedit": header})
        with pytest.raises(EditFileError, match="header cannot be read"):
            Edit.load(path, base)
    save_file({"a": torch.ones(2)}, path, metadata={"kedit": '{"format_version": 1}'})
    with pytest.raises(EditFileError, match="lacks id, kind, origin, values"):
        Edit.load(path, base)


def test_a_newer_format_and_an_unknown_kind_say_so(tmp_path):
    base = tiny_base("llama")
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    with pytest.raises(EditFileError, match=r"format version 99.*install a newer"):
        Edit.load(_tampered(path, format_version=99), base)
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    with pytest.raises(EditFileError, match=r"unknown kind of edit 'magic'; known are .*low_rank"):
        Edit.load(_tampered(path, kind="magic"), base)


def test_an_edit_with_parts_missing_is_refused(tmp_path):
    base = tiny_base("llama")
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    with pytest.raises(EditFileError, match="no whole edit of kind 'codebook'"):
        Edit.load(_tampered(path, kind="codebook"), base)
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    origin = read_edit(path)[0]["origin"]
    with pytest.raises(EditFileError, match=r"its origin has unknown \['flavour'\]"):
        Edit.load(_tampered(path, origin={**origin, "flavour": "sweet"}), base)


# ---- writing


def test_a_crash_while_writing_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    base = tiny_base("llama")
    path = edit_kinds.low_rank(base).save(tmp_path / "edit")
    before = path.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="No space left"):
            edit_kinds.low_rank(base, seed=5).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["edit"]  # noqa: PTH208


def test_readers_never_see_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    original = type(path).write_bytes

    def spy(self, content):
        written = original(self, content)
        seen.append((self != path, path.read_bytes()))
        return written

    monkeypatch.setattr(type(path), "write_bytes", spy)
    write_atomically(path, b"new content")
    assert seen == [(True, b"old")]
    assert path.read_bytes() == b"new content"


def test_saving_over_an_edit_replaces_it(tmp_path):
    base = tiny_base("llama")
    path = tmp_path / "edit"
    edit_kinds.low_rank(base).save(path)
    second = edit_kinds.dense(base)
    second.save(str(path))
    assert Edit.load(str(path), base).id == second.id
    assert origin_of(base) == second.origin


def test_requests_of_any_number_are_saved_and_read(tmp_path, monkeypatch):
    base = tiny_base("llama")
    requests = [replace(REQUESTS[0], id=str(number)) for number in range(50)]
    edit = edit_kinds.low_rank(base, requests=requests)
    short = edit.save(tmp_path / "short.safetensors")
    monkeypatch.setattr(edit_file, "_LONGEST", 2000)
    long = edit.save(tmp_path / "long.safetensors")
    sizes = []
    for path in (short, long):
        again = Edit.load(path, base)
        assert (again.id, again.origin) == (edit.id, edit.origin)
        sizes.append(int.from_bytes(path.read_bytes()[:8], "little"))
    assert sizes[0] > 5000 > 2000 > sizes[1], "the header of safetensors has a limit"
    # A flipped bit of a request is seen there too.
    content = bytearray(long.read_bytes())
    content[content.index(b'"subject"') + 2] ^= 1
    long.write_bytes(content)
    with pytest.raises(EditFileError, match=r"long.safetensors is (damaged|no saved edit)"):
        Edit.load(long, base)
    tensors = load_file(short)
    save_file(tensors, long, {"kedit": json.dumps({"format_version": 2, "beside": "kedit/header"})})
    with pytest.raises(EditFileError, match=r"long.safetensors is no saved edit"):
        Edit.load(long, base)
