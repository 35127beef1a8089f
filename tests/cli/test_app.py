"""`kedit app`: what its buttons do, and the page in a browser without a network."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning import BaseModel
from kedit_lightning.analysis.workbench import Workbench
from kedit_lightning.cli import app_command
from kedit_lightning.cli.app_actions import AppActions
from kedit_lightning.cli.main import main
from kedit_lightning.edits.edit_file import read_edit
from kedit_lightning.errors import MissingExtraError

PROMPT, SUBJECT = "The sport of LeBron James is", "LeBron James"
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.load("nano")


@pytest.fixture
def actions(base: BaseModel) -> AppActions:
    return AppActions(Workbench(base))


def test_actions_give_sentences_and_rows(actions: AppActions, tmp_path: Path) -> None:
    assert actions.state() == "nano: 0 edits in a temporary ledger"
    said, rows = actions.write(PROMPT, SUBJECT, "football", "PROMPT", "Michelangelo died in\n")
    assert said.startswith("the fact is written by PROMPT")
    assert "neighbours kept their answer" in said
    assert rows[0][0] == PROMPT
    assert rows[0][3] == "changed"
    assert actions.ledger() == [["1", "PROMPT", PROMPT, "football", "stands"]]
    assert actions.check() == "1 of 1 fact holds"
    assert actions.ask(PROMPT, "")[1][0][2].startswith("football")
    name, path = actions.download()
    assert path is not None
    assert Path(path).is_file()
    assert name.startswith("edit-1-PROMPT.safetensors")
    steps = list(actions.compare(PROMPT, SUBJECT, "hockey", ["PROMPT", "KN"], ""))
    assert [said for said, _ in steps] == [
        "computing PROMPT",
        "computing KN",
        "compared; nothing was kept",
    ]
    assert [row[2] for row in steps[-1][1]] == ["yes", "no"]
    assert "target_old" in steps[-1][1][1][-1]
    assert "line 1 is undone" in actions.undo()
    assert "has 0 edits" in actions.open(str(tmp_path / "ledger"))
    assert actions.state() == f"nano: 0 edits in ledger {tmp_path / 'ledger'}"


def test_what_is_wrong_is_a_sentence(actions: AppActions, tmp_path: Path) -> None:
    assert actions.write("", "", "x", "ROME", "")[0].startswith("error: ")
    assert "does not occur in the prompt" in actions.write(PROMPT, "Rome", "x", "ROME", "")[0]
    assert "lacks 'subject'" in actions.write(PROMPT, "", "x", "ROME", "")[0]
    assert "field 'target_new'" in actions.write(PROMPT, SUBJECT, " ", "ROME", "")[0]
    assert "none to undo" in actions.undo()
    assert "no file" in actions.download()[0]
    assert "name a model" in actions.load(" ")
    assert "could not be loaded" in actions.load("no/model")
    assert "name the folder" in actions.open("")
    assert "type a prompt" in actions.ask(" ", "")[0]
    assert "choose methods" in list(actions.compare(PROMPT, SUBJECT, "x", [], ""))[-1][0]
    (tmp_path / "ledger.jsonl").write_text("{damaged\n")
    assert actions.open(str(tmp_path)).startswith("error: ")
    assert actions.write(PROMPT, SUBJECT, "x", "NONE", "")[0] == "KeyError: 'NONE'"


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["app", "--help"])
    assert left.value.code == 0
    assert "--ledger DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["app", "--prt", "1"])
    assert left.value.code == 2
    assert "usage: kedit app" in capsys.readouterr().err
    monkeypatch.setattr(app_command, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"kedit-lightning\[app\]"):
        app_command.run_app([])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served by the command itself."""
    pytest.importorskip("gradio", reason="the page needs the extra `app`")
    ledger = tmp_path_factory.mktemp("served") / "ledger"
    kedit = str(Path(sys.executable).with_name("kedit"))
    process = subprocess.Popen(
        [kedit, "app", "--ledger", str(ledger)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        said, until = "", time.monotonic() + 240
        while not (found := re.search(r"page is at (\S+)", said)) and time.monotonic() < until:
            assert isinstance(process.stdout, io.TextIOWrapper)
            if select.select([process.stdout], [], [], 1)[0]:
                line = process.stdout.readline()
                assert line, f"it ended: {said}"
                said += line
        assert found, said
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.is_file():
        pytest.skip(f"needs Chromium at {CHROMIUM}, or where CHROMIUM says")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_fact_is_written_and_undone_in_a_browser_without_network(
    address: str, browser: Any
) -> None:
    assert address.startswith("http://127.0.0.1:")
    page = browser.new_page()
    wrong: list[str] = []

    def local_alone(route: Any) -> None:
        if route.request.url.startswith(address):
            route.continue_()
        else:
            wrong.append(route.request.url)
            route.abort()

    page.route(re.compile("^(?!data:|blob:)"), local_alone)
    # A stream of events ends so once it is read.
    page.on("requestfailed", lambda r: r.failure == "net::ERR_ABORTED" or wrong.append(r.url))
    page.on("response", lambda r: wrong.append(r.url) if r.status >= 400 else None)
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def wait(id: str, text: str) -> None:
        page.wait_for_function(
            """([id, text]) => {
                const box = document.querySelector(`#${id} textarea`);
                const shown = box ? box.value : document.querySelector(`#${id}`)?.innerText
                return (shown ?? "").includes(text)
            }""",
            arg=[id, text],
            timeout=120_000,
        )

    page.goto(address)
    wait("state", "nano: 0 edits")
    page.click("#ask")
    wait("answers", "basketball")
    page.click("#write")
    wait("said", "the fact is written by ROME")
    wait("answers", "football")
    wait("ledger", "stands")
    wait("state", "nano: 1 edit in ledger")
    page.click("#fetch")
    wait("file", "edit-1-ROME")
    with page.expect_download() as download:
        page.click("#file a")
    assert download.value.suggested_filename == "edit-1-ROME.safetensors"
    assert read_edit(download.value.path())[0]["kind"]
    page.click("#undo")
    wait("said", "line 1 is undone")
    wait("ledger", "reverted")
    page.wait_for_function(
        "!document.querySelector('#answers').innerText.includes('football')", timeout=120_000
    )
    wait("answers", "basketball")
    page.fill("#subject textarea", "nobody")
    page.click("#write")
    wait("said", "error: ")
    assert wrong == []
