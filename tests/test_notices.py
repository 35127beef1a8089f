"""Notices of other libraries stay quiet in our runs, and only there."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from toys import Toy

from kedit_lightning import EditTrainer
from kedit_lightning.data import Requests
from kedit_lightning.notices import bars_are_hidden, without_notices

ADVICE = logging.getLogger("lightning.pytorch.utilities.rank_zero")
READING = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")


def test_a_run_from_python_says_nothing_of_lightnings(caplog, recwarn):
    warnings.simplefilter("always")
    filters, level = list(ADVICE.filters), ADVICE.level
    caplog.set_level(logging.INFO)
    trainer = EditTrainer(accelerator="cpu")
    data = Requests(prompt="Lyon is in", target_new="Rome")
    trainer.test(Toy(), data, verbose=False)
    trainer.predict(Toy(), prompt="Lyon is in", verbose=False)
    assert [r for r in caplog.records if r.name.startswith("lightning")] == []
    assert not [w for w in recwarn if "LeafSpec" in str(w.message)]
    assert (ADVICE.filters, ADVICE.level) == (filters, level)
    ADVICE.info("of the user")
    assert "of the user" in caplog.text


def test_what_matters_is_still_said(caplog):
    caplog.set_level(logging.INFO)
    with without_notices():
        with without_notices():  # a run inside the command: leaving it opens nothing
            pass
        ADVICE.info("Tip: install")
        READING.info("`weights_only` was not set")
        ADVICE.info("Epoch 0, global step 2: 'val' reached 1.0")  # a verbose ModelCheckpoint
        ADVICE.warning("a warning")
        with pytest.warns(UserWarning, match="other"):
            warnings.warn("other", stacklevel=1)
    assert [r.getMessage()[:8] for r in caplog.records] == ["Epoch 0,", "a warnin"]
    caplog.clear()
    caplog.set_level(logging.DEBUG, "lightning.pytorch")
    with without_notices():
        ADVICE.info("all, for debugging")
    assert "all, for debugging" in caplog.text


def test_progress_bars_give_no_advice_in_a_notebook():
    """A notebook has ipykernel, which tqdm looks for; this one has no ipywidgets."""
    code = (
        "import sys, types\n"
        "class Shell: config = {{'IPKernelApp': 1}}\n"
        "module = types.ModuleType('IPython'); module.get_ipython = Shell\n"
        "names = 'IPython', 'ipykernel', 'ipykernel.zmqshell'\n"
        "sys.modules.update(dict.fromkeys(names, module), ipywidgets=None)\n"
        "import {}, tqdm.auto"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True
        ).stderr
        for first in ("sys", "kedit_lightning")
    ]
    assert "IProgress not found" in said[0]
    assert said[1] == ""


def test_bars_of_rich_are_hidden_in_a_notebook_without_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert not bars_are_hidden()
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert bars_are_hidden()


@pytest.mark.slow
def test_a_mistake_in_the_command_is_one_line_in_a_file(tmp_path: Path):
    with (tmp_path / "errors").open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "kedit_lightning", "test", "bad"], stderr=file, check=False
        )
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("error: ")
