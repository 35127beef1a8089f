"""Each example runs as a user would run it, offline, and is as short as it claims.

What counts is the code that defines something: all lines, imports too, but for blank ones,
comments, docstrings, and what only shows the use: ``main``, and what stands under
``if __name__ == ...``.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize

import pytest
from places import ROOT

EXAMPLES = ROOT / "examples"
#: The most lines of code that each may take.
LIMITS = {
    "closed_form_prior.py": 30,
    "dataset.py": 40,
    "decoding_edit.py": 70,
    "edit_reader.py": 60,
    "lora_method.py": 60,
    "metric_plugin.py": 40,
    "sharded_editing.py": 25,
    "subject_keys.py": 15,
}
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstrings(tree):
    """Lines of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def left_out(tree):
    """Lines that show the use of a definition: ``main``, and what calls it."""
    for node in tree.body:
        is_main = isinstance(node, ast.FunctionDef) and node.name == "main"
        if is_main or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            yield from range(node.lineno, node.end_lineno + 1)


def code_lines(source):
    """How many lines of code the definitions of a script take."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    return len(lines - set(docstrings(tree)) - set(left_out(tree)))


def private_names(source):
    """Private names of the package that a script imports or looks up."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kedit_lightning"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and not _is_self(node.value):
            names = [node.attr]
        yield from (name for name in names if re.match(r"_[a-z]", name))


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def test_all_examples_are_there():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LIMITS)
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_an_example_is_short_and_uses_public_names(name):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert code_lines(source) <= LIMITS[name]
    assert list(private_names(source)) == []


@pytest.mark.slow  # each starts a process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LIMITS)
def test_an_example_runs(name, tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "KEDIT_CACHE": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example prints what it shows"


def test_lines_are_counted_as_stated():
    source = '''"""A script."""

import torch  # one


NAME = "x"  # two


class A:  # three
    """Not counted."""

    # nor this
    text = """four
    five"""

    def f(self):  # six
        return self._own(  # seven
            1  # eight
        )  # nine


def main():
    print(A())


if __name__ == "__main__":
    main()
'''
    assert code_lines(source) == 9
    assert list(private_names(source)) == []
    assert sorted(private_names("base._layout\nfrom kedit_lightning.edits import _x")) == [
        "_layout",
        "_x",
    ]
