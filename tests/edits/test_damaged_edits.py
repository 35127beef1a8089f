"""Damaged and forged edit files: one sentence that names the file, or the edit its id names."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import serac_support
import torch
from byte_damage import WAYS, damage
from edit_kinds import KINDS, answers
from places import SAMPLES
from safetensors.torch import load, save
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import EditOrigin
from kedit_lightning.edits.edit_file import content_id, read_edit
from kedit_lightning.edits.kinds.scope.counterfactual import describe
from kedit_lightning.edits.kinds.scope.scope_edit import ScopeEdit, ScopeEntry
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.errors import BaseModelMismatchError, EditFileError, KEditError


def scope(base: BaseModel) -> Edit:
    """A memory with the small decoder over the base model's tokens."""
    return serac_support.serac(base, blocks=1).edit(REQUESTS[:2])


def scope_of_a_model(base: BaseModel) -> Edit:
    """A memory with a language model that has a tokenizer of its own."""
    made_of = describe(tiny_model("gpt2", n_layer=1), tiny_tokenizer(False))
    width = base.layout.hidden_size
    plan = ScopePlan("model.layers.1", width, 8, width, 1, 1.0, "gpt2", made_of, True)
    entries = [ScopeEntry(torch.ones(8), (40, 77, 2), 0.9)]
    return ScopeEdit(base, ScopeNetworks(plan), entries, serac_support.serac(base).origin(REQUESTS))


MAKERS: dict[str, Callable[[BaseModel], Edit]] = {
    **KINDS,
    "scope": scope,
    "scope of a model": scope_of_a_model,
}
each_kind = pytest.mark.parametrize("kind", MAKERS)
_base = cache(lambda: tiny_base("llama"))


@cache
def content(kind: str) -> bytes:
    """A saved edit of a kind, as bytes."""
    tensors, values = (edit := MAKERS[kind](_base())).state()
    origin = edit.origin.to_json()
    header = {"format_version": 1, "kind": edit.kind, "id": edit.id}
    return packed({**header, "origin": origin, "values": values}, tensors)


def packed(header: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    flat = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    return save(flat, metadata={"kedit": json.dumps(header)})


def unpacked(raw: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    return json.loads(metadata["kedit"]), load(raw)


def forged(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """The content with the id that belongs to it."""
    parts = (header.get(name) for name in ("kind", "values", "origin"))
    return packed({**header, "id": content_id(*parts, tensors)}, tensors)


# ---- mutants


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A copy of a file with damage as disks, transfers and editors do it."""
    new, at = bytearray(raw), chance.randrange(len(raw))
    match chance.randrange(7):
        case way if way < WAYS:
            damage(new, at, way, chance)
        case 5:
            header = 8 + struct.unpack("<Q", raw[:8])[0]
            new[chance.randrange(header)] = chance.randrange(256)
        case 6:
            header = 8 + struct.unpack("<Q", raw[:8])[0]
            digits = [i for i in range(8, header) if raw[i] in b"0123456789"]
            new[chance.choice(digits)] = chance.choice(b"0123456789")
    return bytes(new)


STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 10**12, 10**400, 0.5, float("nan"), float("inf")),
    *("", "a", "model.layers.1", "lm_head", "\ud800", [], [[]], ["a"], {}, {"a": 1}, [None]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a nested one."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def change_value(header: dict[str, Any], chance: random.Random) -> None:
    """Replace, drop, double or add one value anywhere in a header."""
    path = chance.choice([p for p in places(header) if p[0] in ("origin", "values", "kind")])
    holder: Any = header
    for key in path[:-1]:
        holder = holder[key]
    match chance.randrange(6):
        case 0:
            del holder[path[-1]]
        case 1 if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        case 1:
            holder["more"] = copy.deepcopy(chance.choice(STRANGE))
        case 2 if isinstance(holder[path[-1]], str) and holder[path[-1]]:
            holder[path[-1]] = holder[path[-1]][: chance.randrange(len(holder[path[-1]]))]
        case _:
            holder[path[-1]] = copy.deepcopy(chance.choice(STRANGE))


def change_tensor(tensors: dict[str, torch.Tensor], chance: random.Random) -> None:
    """Rename, drop, add, cast, cut or spoil one tensor."""
    name = chance.choice(sorted(tensors)) if tensors else "a"
    tensor = tensors.pop(name, torch.ones(2))
    dtypes = (torch.int64, torch.float16, torch.bool, torch.complex64, torch.float8_e5m2)
    match chance.randrange(8):
        case 0:
            tensors[chance.choice(["", "a", "keys", name + ".A", "9/" + name, name[:-1]])] = tensor
        case 1:
            pass
        case 2:
            tensors |= {name: tensor, chance.choice(["a.A", "a.delta", "keys", "memory/a"]): tensor}
        case 3:
            tensors[name] = tensor.to(chance.choice(dtypes))
        case 4:
            tensors[name] = tensor[:-1] if tensor.dim() else tensor[None]
        case 5:
            tensors[name] = tensor.reshape(-1) if chance.random() < 0.5 else tensor[None]
        case 6:
            tensors[name] = tensor.new_empty((0, *tensor.shape[1:]))
        case 7:
            tensors[name] = torch.full_like(
                tensor, float("nan") if tensor.is_floating_point() else 9
            )


def altered(raw: bytes, chance: random.Random) -> bytes:
    """A copy with other content, whose header carries the id of that content."""
    header, tensors = unpacked(raw)
    for _ in range(chance.randrange(1, 3)):
        if chance.random() < 0.6:
            change_value(header, chance)
        else:
            change_tensor(tensors, chance)
    return forged(header, tensors)


def assert_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message
    assert len(message) < 1500
    assert all(part in message for part in parts), message


def check(path: Path, raw: bytes, expected: str | None, use: bool) -> bool:
    """Load a mutant: refused in one sentence (``False``), or the edit that its id names."""
    path.write_bytes(raw)
    try:
        edit = Edit.load(path, _base())
    except (EditFileError, BaseModelMismatchError) as error:
        assert_sentence(str(error), str(path))
        return False
    assert edit.id == (expected or unpacked(raw)[0]["id"])
    if use:
        try:
            with edit:
                answers(_base())
        except KEditError as error:
            assert_sentence(str(error))
        assert len(_base().edits) == 0
    return True


def run(kind: str, tmp_path: Path, seed: int, count: int) -> None:
    raw = content(kind)
    chance, own = random.Random(f"{kind} {seed}"), unpacked(raw)[0]["id"]
    for _ in range(count):
        check(tmp_path / "damaged", damaged(raw, chance), own, use=False)
        check(tmp_path / "altered", altered(raw, chance), None, use=True)


@each_kind
@pytest.mark.filterwarnings("ignore:edit .* was computed on top of")
def test_mutants_are_refused_in_one_sentence_or_are_what_their_id_says(kind, tmp_path):
    run(kind, tmp_path, seed=0, count=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@each_kind
@pytest.mark.filterwarnings("ignore:edit .* was computed on top of")
def test_thousands_of_mutants(kind, seed, tmp_path):
    run(kind, tmp_path, seed, count=200)


# ---- single faults


def forge(path: Path, kind: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    header, tensors = unpacked(content(kind))
    change(header, tensors)
    path.write_bytes(forged(header, tensors))
    return path


def test_one_bit_of_the_payload_is_noticed(tmp_path):
    raw = bytearray(content("low_rank"))
    raw[-2] ^= 0x40
    path = tmp_path / "edit"
    path.write_bytes(raw)
    with pytest.raises(EditFileError, match="its content is not that of the edit it names"):
        Edit.load(path, _base())


@pytest.mark.parametrize(
    ("shape", "end"),
    [((10**9,), 4 * 10**9), ((10**9,), 8), ((2**32, 2**31), 8), ((2,), 4), ((0, 2**63), 0)],
)
def test_declared_sizes_that_are_not_those_of_the_payload(shape, end, tmp_path):
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"__metadata__": {"kedit": "{}"}, "a": tensor}).encode()
    path = tmp_path / "edit"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(min(end, 8)))
    with pytest.raises(EditFileError, match=f"{path} is no saved edit") as caught:
        Edit.load(path, _base())
    assert_sentence(str(caught.value))


def test_an_absent_name_an_unknown_name_and_another_shape_are_told(tmp_path):
    def take(name: str) -> Callable[..., None]:
        return lambda header, tensors: tensors.pop(name)

    def put(name: str, *shape: int) -> Callable[..., None]:
        return lambda header, tensors: tensors.update({name: torch.ones(*shape)})

    down = "model.layers.1.mlp.down_proj"
    for kind, change, told in (
        ("low_rank", take(f"{down}.A"), f"unknown .*{down}.B"),
        ("low_rank", take(f"{down}.B"), f"lacks {down}.B"),
        ("low_rank", put("more", 2), "unknown .*more"),
        ("low_rank", put(f"{down}.A", 4), r"has shape \[4\], and \[any, any\] is needed"),
        ("dense", put("more", 2), "unknown .*more"),
        ("dense", put("lm_head.bias", 2, 2), r"has shape \[2, 2\]"),
        ("prompt", put("more", 2), "unknown .*more"),
        ("codebook", take("keys"), "lacks keys"),
        ("codebook", put("keys", 3, 48), r"has shape \[3, 48\], and \[1, any\] is needed"),
        ("composite", put("4/keys", 2), "unknown .*4/keys"),
        ("scope", take("network.norm.bias"), "lacks norm.bias"),
        ("scope", put("network.more", 2), "unknown .*more"),
    ):
        path = forge(tmp_path / "edit", kind, change)
        with pytest.raises(EditFileError, match=f"{path} .*{told}"):
            Edit.load(path, _base())


def test_what_an_edit_does_not_read_is_refused(tmp_path):
    path = forge(tmp_path / "edit", "bonus", lambda header, _: header["values"].update(more=1))
    with pytest.raises(EditFileError, match="holds what such an edit does not have"):
        Edit.load(path, _base())


#: The kind of these tests, and what is checked below.
ELSEWHERE = {"tokens", "made_of"}


def refused(kind: str, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    """``from_state`` refuses the values of an edit after a change of the item at a path."""
    header, tensors = unpacked(content(kind))
    holder: Any = header["values"]
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    read = Edit._kinds[header["kind"]].from_state
    with pytest.raises(EditFileError) as caught:
        read(_base(), EditOrigin(), tensors, header["values"])
    assert_sentence(str(caught.value))


@each_kind
@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: repr(value)[:20])
def test_values_of_another_type_are_refused_by_each_kind(kind, strange):
    for path in places(unpacked(content(kind))[0]["values"]):
        found: Any = unpacked(content(kind))[0]["values"]
        for key in path:
            found = found[key]
        numbers = {type(strange), type(found)} <= {int, float}  # they may stand for each other
        open_ended = strange is None and {"origin", "top_k"} & set(path)
        same = type(strange) is type(found) or numbers or open_ended
        if not same and not ELSEWHERE & set(path):
            refused(kind, path, lambda holder, key: holder.__setitem__(key, strange))


@each_kind
def test_missing_and_unknown_values_are_refused_by_each_kind(kind):
    for name in unpacked(content(kind))[0]["values"].keys() - ELSEWHERE:
        refused(kind, (name,), lambda holder, key: holder.pop(key))
    if kind != "bonus":
        refused(kind, ("more",), lambda holder, key: holder.__setitem__(key, 1))
    for nothing in (None, [], "text", 5):
        header, tensors = unpacked(content(kind))
        if kind != "bonus":
            with pytest.raises(EditFileError):
                Edit._kinds[header["kind"]].from_state(_base(), EditOrigin(), tensors, nothing)


# ---- networks


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """Devices on which networks are created."""
    devices: list[str] = []
    create = ScopeNetworks.__init__

    def spy(self, *args, **kwargs):
        devices.append(torch.empty(0).device.type)
        create(self, *args, **kwargs)

    content("scope"), content("scope of a model")
    monkeypatch.setattr(ScopeNetworks, "__init__", spy)
    return devices


@pytest.mark.parametrize("size", [-1, 0, 1, 33, 10**5, 10**12, 10**400])
@pytest.mark.parametrize("field", ["hidden_width", "scope_width", "token_width", "blocks"])
def test_networks_of_a_declared_size_are_not_created(field, size, built, tmp_path):
    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["values"]["plan"][field] = size if (field, size) != ("blocks", 1) else 2

    path = forge(tmp_path / "edit", "scope", change)
    with pytest.raises(EditFileError, match=str(path)) as caught:
        Edit.load(path, _base())
    assert_sentence(str(caught.value))
    assert "cpu" not in built


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"num_hidden_layers": 10**9},
        {"n_layer": 2},
        {"num_labels": 10**9},
        {"n_embd": 10**6},
        {"vocab_size": 10**9},
        {"n_positions": 10**8},
        {"n_head": 10**9},
        {"model_type": "llama"},
        {"model_type": "nothing"},
        {"sub": {"num_layers": 10**9}},
        {"attn_implementation": "somebody/kernel"},
        {"auto_map": {"AutoConfig": "somebody/model--code.Config"}},
    ],
    ids=str,
)
def test_a_language_model_of_a_declared_size_is_not_created(change, built, tmp_path):
    def into(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["values"]["plan"]["made_of"]["config"].update(change)

    path = forge(tmp_path / "edit", "scope of a model", into)
    with pytest.raises(EditFileError, match=str(path)) as caught:
        Edit.load(path, _base())
    assert_sentence(str(caught.value))
    assert "cpu" not in built


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "{}"},
        {"tokenizer": "no tokenizer"},
        {"special": {"tokenizer_file": "elsewhere"}},
        {"special": {"eos_token": 5}},
        {"config": {}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_description_of_a_language_model_that_makes_none(change, built, tmp_path):
    def into(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["values"]["plan"]["made_of"].update(change)

    path = forge(tmp_path / "edit", "scope of a model", into)
    with pytest.raises(EditFileError, match=str(path)):
        Edit.load(path, _base())
    assert "cpu" not in built


@pytest.mark.parametrize("ids", [[], [-1], [384], [10**30]], ids=str)
@pytest.mark.parametrize("kind", ["scope", "scope of a model"])
def test_statements_are_of_tokens_that_there_are(kind, ids, tmp_path):
    def change(header: dict[str, Any], tensors: dict[str, Any]) -> None:
        header["values"]["statements"][0] = ids

    with pytest.raises(EditFileError, match="ids of tokens below 384"):
        Edit.load(forge(tmp_path / "edit", kind, change), _base())


# ---- earlier releases


def test_a_file_of_an_earlier_release_keeps_its_id():
    """It was written when requests had neither a task nor an image."""
    path = SAMPLES / "rome_format_1.safetensors"
    header, _ = read_edit(path)
    assert not {"task", "image"} & header["origin"]["requests"][0].keys()
    # Forced, as the packaged model may be trained anew.
    assert Edit.load(path, BaseModel.load("nano"), force=True).id == header["id"]
