"""All benchmarks in one report: what is done is kept, and a failure stops nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import run_all

SCRIPTS = {
    "good": "import sys; print('| ratio |', sys.argv[1])",
    "bad": "import sys; print('half of it'); sys.exit('out of luck')",
    "last": "print('the end')",
}


def test_each_runs_once_and_what_failed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(code)
    output = tmp_path / "output"
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "SHORT", {"good": ["two words"], "bad": [], "last": []})

    def ran(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--output", str(output), *arguments])
        code = run_all.main()
        capsys.readouterr()
        return code, (output / "report.md").read_text()

    code, text = ran("--only", "good", "bad", "last")
    assert code == 1
    assert "| good | `python benchmarks/good.py 'two words'` | done |" in text
    assert "| bad | `python benchmarks/bad.py` | failed (1) |" in text
    assert "| ratio | two words" in text
    assert "half of it\nout of luck" in text
    assert "the end" in text
    assert "torch 2" in text
    (tmp_path / "good.py").write_text("print('other')")
    (tmp_path / "bad.py").write_text("print('mended')")
    code, text = ran()
    assert code == 0
    assert "mended" in text
    assert "other" not in text
    assert "other" in ran("--only", "good", "--again", "good")[1]


def test_scripts_that_compare_need_something_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path), "--only", "end_to_end"]
    monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
    with pytest.raises(SystemExit):
        run_all.main()
    assert "end_to_end needs --against" in capsys.readouterr().err


def test_every_script_is_there() -> None:
    for name in (*run_all.SHORT, *run_all.COMPARING):
        assert (run_all.HERE / f"{name}.py").is_file()
