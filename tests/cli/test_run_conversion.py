"""``kedit convert``: settings and lists of requests of EasyEdit."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from easyedit_files import FILES, File
from places import ROOT
from support import tiny_base

from kedit_lightning import EditRequest, methods
from kedit_lightning.cli.easyedit.hparams_file import HparamsConversion, hparams_conversion
from kedit_lightning.cli.easyedit.method_keys import METHOD_NAMES
from kedit_lightning.cli.easyedit.request_lists import converted_requests
from kedit_lightning.cli.main import main
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.data import Requests

BY_ID = {file.id or file.name: file for file in FILES}
FACTS = [
    EditRequest("Amber Falls lies in", "Italy", subject="Amber Falls"),
    EditRequest("The company Bolt was founded in", "Rome", subject="Bolt"),
]


def conversion_of(file: File) -> HparamsConversion:
    return hparams_conversion(yaml.safe_load(file.whole))


def command(*words: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.parametrize("file", FILES, ids=BY_ID)
def test_settings_arrive(file: File) -> None:
    found = conversion_of(file)
    assert found.method.method == file.method
    expected = {"base_model.name": "nano", **file.base, **file.settings}
    for name, value in expected.items():
        assert found.settings[name] == value, name
    assert found.settings.keys() == expected.keys()
    assert tuple(found.differs) == file.differs
    assert not found.unknown


@pytest.mark.parametrize("file", FILES, ids=BY_ID)
def test_no_key_is_dropped(file: File) -> None:
    """A key is a setting, so that a file without it has other ones, or stands in the head."""
    found = conversion_of(file)
    values: dict[str, Any] = yaml.safe_load(file.whole)
    head = found.text("llama.yaml", "new.yaml").partition("model:\n")[0]
    said = {**found.differs, **found.remarks, **found.unused}
    for section, inner in values.items():
        for key in inner if isinstance(inner, dict) else [section]:
            name = f"{section}.{key}" if isinstance(inner, dict) else key
            without = {**values, section: {**inner}} if isinstance(inner, dict) else {**values}
            (without[section] if isinstance(inner, dict) else without).pop(key)
            if name in said:
                assert name in head
            else:
                assert hparams_conversion(without, file.name).settings != found.settings, name


@pytest.mark.parametrize("file", FILES, ids=BY_ID)
def test_methods_take_the_settings(file: File) -> None:
    found = conversion_of(file)
    given = dict(found.config["model"]["init_args"], base_model="nano")
    method = getattr(methods, found.method.method)(**given)
    for name, value in file.settings.items():
        if not name.startswith(("trainer.", "seed_everything")):
            assert getattr(method.settings, name) == value


#: The settings of files as one would write them.
BY_HAND: dict[str, dict[str, Any]] = {
    "ROME": {
        **{"layer": 1, "steps": 4, "lr": 0.4, "weight_decay": 0.002, "clamp": 3.0},
        **{"kl_factor": 0.05, "statistics": "identity", "contexts": 4},
    },
    "MEMIT": {
        **{"layers": [0, 1], "steps": 4, "lr": 0.4, "weight_decay": 0.002, "clamp": 3.0},
        **{"kl_factor": 0.05, "preserve": 70},
    },
    "FT-L": {
        **{"layers": [1], "steps": 3, "lr": 6e-4, "norm_constraint": 5e-4},
        "legacy_easyedit_objective": True,
    },
    "FT-M": {"layers": [1], "modules": ["mlp.up_proj"], "steps": 3, "lr": 6e-4,
             "norm_constraint": float("inf")},
    "GRACE": {
        **{"layer": 2, "lr": 0.9, "steps": 6, "radius": 1.5, "value_init": "warm"},
        "replacement": "prompt",
    },
    "MEND": {
        "modules": ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"],
        **{"blocks": 3, "rank": 12, "shared": False, "normalise": False, "edit_lr": 3e-4},
        "legacy_sign": True,
    },
}  # fmt: skip
_SLOW = {
    "WISE": {
        **{"layer": 2, "steps": 5, "lr": 0.8, "alpha": 4, "beta": 15, "gamma": 8},
        **{"activation_ratio": 0.8, "mask_ratio": 0.3, "norm_constraint": 0.9, "shard_size": 4},
        **{"shards_per_memory": 3, "merge": "dare_ties", "density": 0.6, "retrieve": False},
        "decay": False,
    },
    "LoRA": {
        **{"target_modules": ["q_proj", "v_proj"], "steps": 3, "lr": 6e-3, "rank": 4},
        **{"alpha": 16, "dropout": 0.2, "stop_loss": 0.0},
    },
    "AlphaEdit": {
        **{"layers": [0, 1], "steps": 4, "lr": 0.4, "weight_decay": 0.002, "clamp": 3.0},
        **{"kl_factor": 0.05, "threshold": 0.03, "legacy_size_cost": 2},
    },
}


@pytest.mark.parametrize(
    "id", [*BY_HAND, *(pytest.param(id, marks=pytest.mark.slow) for id in _SLOW)]
)
def test_the_edit_is_that_of_settings_given_by_hand(id: str) -> None:
    found, base = conversion_of(BY_ID[id]), tiny_base("llama")
    kind = getattr(methods, found.method.method)
    given = dict(found.config["model"]["init_args"])
    del given["base_model"]
    logits = []
    for settings in (given, {**BY_HAND, **_SLOW}[id], {}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # statistics of a small text, answers not written
            edit = kind(base_model=base, **settings).edit(FACTS[: 2 if kind.can.batch else 1])
        with edit:
            rows = base.tokenizer([FACTS[0].prompt], return_tensors="pt")
            logits.append(base.model(rows["input_ids"]).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])  # that of no settings at all is another


@pytest.mark.parametrize(
    "id", ["MEND", *(pytest.param(id, marks=pytest.mark.slow) for id in BY_ID if id != "MEND")]
)
def test_the_command_takes_the_config(
    id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(BY_ID[id].whole)
    command("convert", "old.yaml", "--output", "new/new.yaml", code=0, capsys=capsys)
    text = Path("new/new.yaml").read_text()
    first = text.splitlines()[0].removeprefix("# kedit ").split()
    assert "new/new.yaml" in first  # the command at its head
    printed = yaml.safe_load(command(*first, "--print_config", code=0, capsys=capsys))
    expected = {name: value for name, value in BY_ID[id].settings.items() if "." not in name}
    for name, value in expected.items():
        place = printed if name == "seed_everything" else printed["model"]["init_args"]
        assert place[name] == value, name
    assert printed["model"]["init_args"]["base_model"]["name"] == "nano"


def test_unknown_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rome.yaml"
    path.write_text(f"{BY_ID['ROME'].whole}v_lrr: 1\nown_key: x\n")
    said = command("convert", str(path), code=2, capsys=capsys)
    assert "'v_lrr' (was 'v_lr' meant?)" in said
    assert "'own_key'" in said
    assert "--skip_unknown" in said
    text = command("convert", str(path), "--skip_unknown", code=0, capsys=capsys)
    assert "Unknown keys, which are left out:\n#   v_lrr, own_key" in text
    out = tmp_path / "new.yaml"
    said = command("convert", str(path), f"--output={out}", "--skip_unknown", code=0, capsys=capsys)
    assert "left out: v_lrr, own_key" in said
    assert "exists" in command("convert", str(path), f"--output={out}", code=2, capsys=capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alg_name: SEEKR\nmodel_name: nano\n", "no counterpart of the method 'SEEKR'"),
        ("layers: [1]\nmodel_name: nano\n", "neither alg_name nor alg"),
        ("alg_name: FT\nobjective_optimization: promptz_last\n", "prompt_last (FT-L)"),
        ("alg_name: GRACE\ninner_params: 3\n", "inner_params is 3"),
        ("[1, 2]", "neither settings of EasyEdit nor a list of requests"),
        ("a: [", "is no YAML"),
    ],
)
def test_files_that_are_none(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    assert said in command("convert", str(path), code=2, capsys=capsys)
    assert "there is no file" in command("convert", f"{path}x", code=2, capsys=capsys)


def test_a_method_is_named_where_the_file_has_none() -> None:
    values = yaml.safe_load(BY_ID["MEND"].whole)
    assert (
        hparams_conversion(values, "InstructEdit").config["model"]["class_path"] == "InstructEdit"
    )


ARGUMENTS = {
    "prompts": ["The capital of Marland is", "Hask lies in"],
    "subject": ["Marland", "Hask"],
    "ground_truth": ["Lund", "<|endoftext|>"],
    "target_new": ["Veldt", "Marland"],
    "rephrase_prompts": ["Marland has the capital", "Hask is a town of"],
    "locality_inputs": {
        "near": {"prompt": ["The capital of Orm is", None], "ground_truth": ["Ness", None]},
        "far": {
            "prompt": [["Two and two is", "Milk is"], "Snow is"],
            "ground_truth": [["four", ["white", "pale"]], "white"],
        },
    },
    "portability_inputs": {
        "hop": {"prompt": [None, "The capital of the country of Hask is"],
                "ground_truth": [None, "Veldt"]},
    },
    "loc_prompts": ["Grass is green"],
}  # fmt: skip
RECORDS = [
    {
        **{"prompt": "The capital of Marland is", "target_new": "Veldt", "ground_truth": "Lund"},
        **{"subject": "Marland", "rephrase_prompt": "Marland has the capital"},
        **{"case_id": 4, "portability": {}, "loc_prompt": "Grass is green"},
        "locality": {
            "near": {"prompt": "The capital of Orm is", "ground_truth": "Ness"},
            "far": [
                {"prompt": "Two and two is", "ground_truth": ["four"]},
                {"prompt": "Milk is", "ground_truth": [["white", "pale"]]},
            ],
        },
    },
]


@pytest.mark.parametrize("form", ["arguments", "records"])
def test_lists_of_requests(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "requests.json", tmp_path / "facts.json"
    old.write_text(json.dumps(ARGUMENTS if form == "arguments" else RECORDS))
    said = command("convert", str(old), f"--output={new}", code=0, capsys=capsys)
    first, *more = Requests(path=new).examples()
    assert ("2 facts, as" if more else "1 fact, as") in said
    (request,) = first.requests
    assert (request.prompt, request.subject) == ("The capital of Marland is", "Marland")
    assert (request.target_new, request.target_old) == ("Veldt", "Lund")
    assert {(p.kind, p.group, p.prompt, p.answers) for p in first.probes} == {
        ("rewrite", "rewrite", "The capital of Marland is", ("Veldt",)),
        ("rephrase", "rephrase", "Marland has the capital", ("Veldt",)),
        ("locality", "near", "The capital of Orm is", ("Ness",)),
        ("locality", "far", "Two and two is", ("four",)),
        ("locality", "far", "Milk is", ("white", "pale")),
        ("locality", "unrelated", "Grass is green", ()),
    }
    if form == "records":
        assert request.id == "4"
        return
    (second,) = more
    assert second.requests[0].target_old is None
    kinds = {(p.kind, p.group): p.answers for p in second.probes}
    assert kinds[("portability", "hop")] == ("Veldt",)
    assert ("locality", "near") not in kinds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": ["Marland"]}, "subject has 1 items for 2 prompts"),
        ({"rephrase_promts": ["a", "b"]}, "was 'rephrase_prompts' meant?"),
        (
            {"locality_inputs": {"near": {"prompt": ["a"], "ground_truth": ["b"]}}},
            "locality_inputs.near has 1 prompts and 1 answers for 2 requests",
        ),
    ],
)
def test_lists_that_do_not_fit(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps({**ARGUMENTS, **change}))
    assert said in command("convert", str(path), code=2, capsys=capsys)


@pytest.mark.parametrize(
    ("locality", "said"),
    [
        ({"near": {"prompt": ["a", "b"], "ground_truth": "No"}}, "2 prompts and 1 answers"),
        ([], "locality must be an object of groups, got []"),
    ],
)
def test_groups_of_a_record_that_do_not_fit(locality: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        converted_requests([{**RECORDS[0], "locality": locality}])


@pytest.mark.parametrize("keys", [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_switch_that_is_off_does_not_undo_another(keys: tuple[str, str]) -> None:
    values = yaml.safe_load(BY_ID["ROME"].whole)
    values = {name: value for name, value in values.items() if name not in keys}
    found = hparams_conversion({**values, **{name: name == "bf16" for name in keys}})
    assert found.settings["base_model.dtype"] == "bfloat16"


def test_what_files_about_pictures_have_beside() -> None:
    lora = yaml.safe_load(BY_ID["LoRA"].whole)
    names = ["model.layers.*.self_attn.q_proj", "v_proj"]
    found = hparams_conversion({**lora, "target_modules": names, "sh_lr": 0.9, "coco_image": ".."})
    assert found.settings["target_modules"] == ["self_attn.q_proj", "v_proj"]
    assert "sh_lr" in found.differs
    wise = yaml.safe_load(BY_ID["WISE"].whole)
    found = hparams_conversion({**wise, "act_ratio": 1.1, "use_chat_template": True})
    assert found.settings["activation_ratio"] == 1.0
    assert {"act_ratio", "use_chat_template"} <= found.differs.keys()
    serac = {**yaml.safe_load(BY_ID["SERAC"].whole), "alg": "SERAC_MULTI", "name": "folder"}
    assert hparams_conversion(serac).settings["base_model.name"] == "folder"


def test_the_page_names_every_method() -> None:
    table = (ROOT / "docs/from_easyedit.md").read_text(encoding="utf-8").split("## Methods")[1]
    named = {name.casefold() for name in re.findall(r"`([\w-]+)`", table.split("## Settings")[0])}
    assert {name.casefold() for name in METHOD_NAMES} <= named
