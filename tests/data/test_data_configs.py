"""The YAML of each dataset fits its class, and the class explains itself on the command line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from places import ROOT

import kedit_lightning.data
from kedit_lightning.data import Requests

CONFIGS = ROOT / "configs" / "data"
CLASSES = {
    "requests": "Requests",
    "zsre": "ZsRE",
    "conceptedit": "ConceptEdit",
    "counterfact": "CounterFact",
    "nano_facts": "NanoFacts",
    "texts": "Texts",
    "akew": "AKEW",
    "cknowedit": "CKnowEdit",
    "adsedit": "ADSEdit",
    "comprehendedit": "ComprehendEdit",
    "editeverything": "EditEverything",
    "eic": "EIC",
    "evqa": "EVQA",
    "facts_30m": "Facts30M",
    "hallueditbench": "HalluEditBench",
    "knowedit": "KnowEdit",
    "known_facts": "KnownFacts",
    "leme": "LEME",
    "mquake": "MQuAKE",
    "personalityedit": "PersonalityEdit",
    "qaedit": "QAEdit",
    "rippleedits": "RippleEdits",
    "safeedit": "SafeEdit",
    "shapes": "Shapes",
    "truthfulqa": "TruthfulQA",
    "unke": "UnKE",
    "wikibigedit": "WikiBigEdit",
}


def parser() -> ArgumentParser:
    for name in CLASSES.values():  # as the command line does, so that short names are known
        getattr(kedit_lightning.data, name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser


def test_every_file_belongs_to_a_dataset() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(CLASSES)


@pytest.mark.parametrize(("name", "cls"), CLASSES.items())
def test_a_config_makes_its_dataset(name: str, cls: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    command = path.read_text(encoding="utf-8").splitlines()[0]
    assert command.startswith("# kedit ")
    assert f"-c data/{name} " in command
    config = parser().parse_args(["--config", str(path), "--data.limit", "3"])
    data = parser().instantiate(config).data
    assert type(data) is getattr(kedit_lightning.data, cls)
    assert data.limit == 3


def test_a_fact_on_the_command_line() -> None:
    options = ["--data=Requests", "--data.prompt=A is", "--data.subject=A", "--data.target_new=b"]
    config = parser().parse_args(options)
    data = parser().instantiate(config).data
    assert isinstance(data, Requests)
    assert data.examples()[0].requests[0].target_new == "b"


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_option_is_explained(cls: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--data.help={cls}"])
    text = capsys.readouterr().out
    options = text.split(" --data.")[2:] if "--data.help" in text else text.split(" --data.")[1:]
    assert len(options) > 4
    for option in options:
        # After the name and the type comes the text of the docstring.
        assert len(" ".join(option.split())) > len(option.split()[0]) + 30, option
    assert ":class:" not in text
