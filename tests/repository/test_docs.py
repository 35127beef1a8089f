"""Pages of the documentation that are written from the code, and paths that pages name."""

from __future__ import annotations

import re

import pytest
import yaml
from docs_pages import pages
from method_pages import page as page_of
from papers import PAPERS
from places import ROOT

from kedit_lightning.registry import entries

METHODS = entries("method")
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md", ROOT / "tools/nano/README.md"]
#: A path from the root of the repository, with a folder, in backticks.
PATH = re.compile(
    r"`((?:src|tests|callbacks|configs|docs|examples|tools|benchmarks)/[\w./-]*[\w/])`"
)


def test_every_method_has_its_paper():
    assert set(PAPERS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_page_has_paper_settings_config_and_command(name):
    entry = METHODS[name]
    page = page_of(entry)
    assert page.startswith(f"# {name}\n")
    assert re.search(r"\[[^]]+\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", page)
    config = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (`.+?`|–) \| ", page, re.MULTILINE))
    for setting, value in config["model"].get("init_args", {}).items():
        if setting != "base_model":
            assert setting in rows, f"{setting} is in the config and not in the table"
            assert value is not None or rows[setting] == "`null`"
    assert rows["seed"] == "`null`"
    assert re.search(r"^kedit (edit|test|fit) -c ", page, re.MULTILINE)
    assert f"-c {entry.config}" in page


def test_the_table_of_settings_has_defaults_and_words():
    page = page_of(METHODS["ROME"])
    assert re.search(
        r"^\| `contexts` \| int \| `\d+` \| Number of texts .+ \|$", page, re.MULTILINE
    )


def test_every_metric_is_explained_on_a_page():
    page = pages()["metrics.md"]
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", page, re.MULTILINE))
    assert {entry.load().name for entry in entries("metric").values()} <= set(rows)
    assert {"rewrite", "locality", "edit/bytes"} <= set(rows)
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [
        "Kinds",
        "Metrics",
        "Stages of a sequence",
        "Streams with checkpoints",
        "Costs",
        "Definitions",
    ]
    for score in (entry.load() for entry in entries("metric").values()):
        definition = page.split(f"### `{score.name}`\n")[1].split("### ")[0]
        assert re.search(r"Asked of: .+ Range: .+ Better: (more|less)\.", definition)


def test_the_navigation_names_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./]+\.md\b", text))
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == written | set(pages())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page):
    named = {match for match in PATH.findall(page.read_text(encoding="utf-8")) if "<" not in match}
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_first_page_runs(capsys):
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(source, "index.md", "exec"), {})
    assert "football" in capsys.readouterr().out
