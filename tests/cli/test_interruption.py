"""Ctrl-C before and after a run, and while a run is under way, ends in one line."""

from __future__ import annotations

from typing import Any

import pytest

from kedit_lightning.cli import main as command


@pytest.mark.parametrize("arguments", [["test", "-c", "methods/rome"], ["metrics"]])
def test_an_interruption_outside_of_a_run_is_one_line(arguments, monkeypatch, capsys):
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "import_module", interrupt)  # as Ctrl-C does while torch loads
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted while no run was under way\n"
