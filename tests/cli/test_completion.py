"""What the command says beside its runs: the names of scores, and scripts for shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kedit_lightning.cli.main import main
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.registry import Entry, entries, register, unregister

#: Completes the last of its words as bash does when the tab key is pressed.
PRESS_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
complete=$(complete -p kedit | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$complete kedit "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


class Added(ProbeMean):
    """Share of answers that a plug-in likes."""

    name = "liked"


def test_every_metric_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    added = register(Entry("metric", "Added", __name__, "of a plug-in"))
    try:
        names = {entry.load().name for entry in entries("metric").values()}
        with pytest.raises(SystemExit) as stop:
            main(["metrics"])
    finally:
        unregister(added)
    assert not stop.value.code
    text = capsys.readouterr().out
    explained = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert names | {"rewrite", "locality", "forget/...", "edit/bytes"} <= explained
    assert "Share of answers that a plug-in likes." in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_shell_without_completion_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", "cmd"])
    assert stop.value.code == 2
    assert "takes the name of a shell: bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.slow
def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    kedit = [sys.executable, "-m", "kedit_lightning", "completion", "bash"]
    script = tmp_path / "kedit.bash"
    with script.open("w") as file:
        subprocess.run(kedit, stdout=file, check=True)

    def completed(*words: str) -> list[str]:
        bash = ["bash", "-c", PRESS_TAB, "bash", str(script), "kedit", *words]
        return subprocess.run(bash, capture_output=True, text=True, check=True).stdout.split()

    assert completed("ed") == ["edit"]
    assert completed("comp") == ["compare", "completion"]
    assert completed("edit", "--outp") == ["--output"]
    assert "--trainer.protocol.mode" in completed("test", "--trainer.proto")
    assert completed("test", "--trainer.protocol.mode", "s") == ["single", "sequential"]
    assert completed("test", "--model", "ROM") == ["ROME"]
    assert completed("edit", "--data", "Count") == ["CounterFact"]
    assert completed("test", "--help") == ["--help", "--help-all"]


#: Completes a line as fish and zsh do when the tab key is pressed; zsh writes what it has then.
FISH = 'source "$argv[1]"; complete -C "$argv[2]"'
ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; fpath=(${1:h} \$fpath); autoload -Uz compinit; compinit -u -D"
zpty -w z "said() { print -r -- \$BUFFER > $3; zle kill-whole-line }; zle -N said"
zpty -w z "bindkey '^X' said; bindkey '^I' complete-word; touch $3.ready"
until [[ -e $3.ready ]]; do sleep 0.1; done
zpty -n -w z "$2"$'\t'$'\C-X'
for try in {1..300}; do [[ -s $3 ]] && break; sleep 0.1; done
cat $3
"""


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_other_shells_complete_too(shell: str, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "_kedit"
    with script.open("w") as file:
        kedit = [sys.executable, "-m", "kedit_lightning", "completion", shell]
        subprocess.run(kedit, stdout=file, check=True)

    def completed(line: str) -> str:
        given = [str(script), line, str(tmp_path / f"zsh-{len(line)}")]
        words = ["fish", "-c", FISH, *given[:2]] if shell == "fish" else ["zsh", "-fc", ZSH, "z"]
        words += given if shell == "zsh" else []
        done = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return done.split("\t")[0].split()[-1]

    assert completed("kedit repl") == "replay"
    assert completed("kedit test --trainer.protocol.mode si") == "single"
