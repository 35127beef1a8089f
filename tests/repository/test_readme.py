"""Every command of the README and of the page of methods is run, in order, as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from places import ROOT

from kedit_lightning.cli.main import main

README = ROOT / "README.md"
CAPABILITIES = ROOT / "docs" / "capabilities.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(arguments: list[str]) -> object:
    """Exit code of a command; some end by leaving, such as those that print help."""
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    written = {"metrics.md", *(name for name in links if name.startswith(("api/", "methods/")))}
    assert {link for link in links if not (page.parent / link).exists()} <= written


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")
def test_python_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (source,) = blocks("python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 13
    exec(compile(source, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "Lyon" in said
    assert "rewrite" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")
def test_shell_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("Paris is the capital of France.\n" * 50)
    for line in "".join(blocks("sh")[1:] + blocks("sh", CAPABILITIES)).splitlines():
        if not line.startswith("kedit "):
            subprocess.run(line, shell=True, check=True)
            continue
        code = run(shlex.split(line)[1:])
        assert code in (0, None), f"{line} ended with {code}"
        said = capsys.readouterr().out
        if "--edits" in line:
            assert "Lyon" in said
        if "CausalTracing" in line:
            assert list((tmp_path / "traces").glob("*.png"))
        if "LayerSweep" in line:
            assert "best" in said
    assert (tmp_path / "run" / "stack.json").is_file()
    assert (tmp_path / "run2").is_dir()
