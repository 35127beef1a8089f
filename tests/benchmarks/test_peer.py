"""The incumbent beside ours, with a small stand-in for the foreign program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peer
import peer_incumbent
import pytest
import yaml

#: The entry points of EasyEdit: settings from a file, an editor from settings, and ``edit``.
STAND_IN = """
import os
import torch
import yaml

class FTHyperParams:
    @classmethod
    def from_hparams(cls, path):
        self = cls()
        with open(path) as file:
            vars(self).update(yaml.safe_load(file))
        return self

class BaseEditor:
    @classmethod
    def from_hparams(cls, hparams):
        self = cls()
        assert sorted(os.listdir(hparams.model_name))[0] == "config.json"
        assert hparams.layers == [1] and hparams.alg_name == "FT"
        self.weight = torch.nn.Linear(8, 8).to(f"cuda:{hparams.device}")
        return self

    def edit(self, prompts, target_new, ground_truth=None, rephrase_prompts=None,
             locality_inputs=None, sequential_edit=False, verbose=True, **more):
        assert len(more["subject"]) == len(prompts) == len(target_new)
        assert len(locality_inputs["neighborhood"]["prompt"]) == len(prompts)
        print("INFO: much of it")
        for _ in range(2000):
            self.weight(torch.ones(1, 8, device="cuda:0")).sum().backward()
        open("run.log", "a").write("edited")
        return [], self.weight, {}
"""

FT = {
    "alg_name": "FT",
    "model_name": "./hugging_cache/gpt2-xl",
    "device": 0,
    "layers": [21],
    "num_steps": 2,
    "lr": 5e-4,
    "weight_decay": 0,
    "kl_factor": 0,
    "norm_constraint": False,
    "objective_optimization": "target_new",
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj.weight",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
    "model_parallel": False,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package, hparams = tmp_path / "clone" / "easyeditor", tmp_path / "clone" / "hparams" / "FT"
    for folder in (package, hparams):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (hparams / "gpt2-xl.yaml").write_text(yaml.safe_dump(FT))
    return tmp_path / "clone"


def measured(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(peer.__file__)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_that_is_no_clone_is_said(tmp_path: Path, checkout: Path) -> None:
    for folder, words in ((tmp_path, "easyeditor/__init__.py"), (checkout / "x", "no checkout")):
        with pytest.raises(peer.PeerError, match=words):
            peer.check_checkout(folder, sys.executable)
    with pytest.raises(peer.PeerError, match=r"no interpreter '.*absent'"):
        peer.check_checkout(checkout, str(tmp_path / "absent"))
    with pytest.raises(peer.PeerError, match="no settings for llama"):
        peer.settings_of(checkout, "FT", "llama")


def test_models_are_named_by_their_folder_alone() -> None:
    with peer.neutral_folder() as folder:
        assert not any(name in str(folder).lower() for name in ("t5", "gpt", "llama"))
        peer.save_model("gpt2", folder / "gpt2")
        names = {path.name for path in (folder / "gpt2").iterdir()}
        assert {"config.json", "vocab.json", "merges.txt", "model.safetensors"} <= names
        vocabulary = json.loads((folder / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(257))


def test_names_of_settings_are_found_however_they_are_written() -> None:
    class Package:
        R_ROMEHyperParams = 1
        GraceHyperParams = 2

    found = [peer_incumbent.settings_class(Package, name) for name in ("R-ROME", "GRACE")]
    assert found == [1, 2]


@pytest.mark.slow
def test_both_take_turns(checkout: Path) -> None:
    options = ("--methods", "FT", "--models", "gpt2", "--facts", 2, "--pairs", 3)
    done = measured("--checkout", checkout, "--python", sys.executable, *options)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("| FTM | gpt2 | ")
    low, high = line.rpartition("(")[2].rstrip(") |").split(" to ")
    assert 0 < float(low) <= float(line.split("|")[5].split("(")[0]) <= float(high)
    (checkout / "easyeditor" / "__init__.py").write_text("raise ImportError('no higher')")
    done = measured("--checkout", checkout, "--python", sys.executable, *options)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ImportError: no higher")
