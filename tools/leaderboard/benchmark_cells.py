"""The cells of the benchmark: what is run, each by one command.

A cell is a base model, a data set, a protocol and a method, such as `nano.nano_facts.single.memit`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kedit_lightning.base_models.spec import own_at_hand
from kedit_lightning.registry import entries

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
#: Facts of a protocol in the whole benchmark, and in its subset.
SIZES = {"single": (200, 30), "batch": (200, 30), "sequence": (500, 30)}
#: Validation facts on which settings are chosen, in the whole and in the subset, and trials.
CHOICE, TRIALS = (60, 24), 20
#: Data sets whose files are not packaged, by their path below the folder of real data.
FILES = {
    "counterfact": ("data/counterfact", "counterfact/counterfact_rome_format_1031.json"),
    "zsre": ("data/zsre", "zsre/zsre_mend_edit.json"),
    "wiki_counterfact": ("data/knowedit", "knowedit/wiki_counterfact_test_cf-generate-10.json"),
}
DATA = ("nano_facts", "facts_30m", *FILES)
MODELS = ("nano", "facts-30m")
#: Why cells of facts-30m, which is not packaged, are left out.
MAKE_MODEL = "facts-30m is not on this machine: the scripts of tools/facts_30m make it (README.md)"
#: Data sets that only one base model knows.
OWN_DATA = {"facts_30m": "facts-30m"}
#: Methods that are no editors of single facts, and why.
LEFT_OUT = {
    "DeCo": "writes no facts",
    "DoLa": "writes no facts",
    "MeLLo": "answers multi-hop questions",
    "QLoRA": "LoRA on quantised weights, for models that do not fit otherwise",
}
#: Methods that learn from a fit of minutes first, by their config in tools/nano.
FITTED = ("InstructEdit", "KE", "MALMEN", "RLEdit", "SERAC")
#: In the subset the real data sets are asked of these methods alone, in single edits.
SUBSET_REAL = ("ftm", "memit", "grace", "ike")
#: In the subset these methods, the quickest of their kind, go through batch and sequence too.
SUBSET_MANY = ("alphaedit", "emmet", "ftm", "grace", "ike", "memit", "rome", "ultraedit")
#: The slowest methods come last, so that a benchmark that is stopped early has more of the others.
SLOW = ("adalora", "calinet", "crispedit", "kn", "locftbf", "lora", "dpoedit", "melo", "tpatcher")
#: Facts of a cell of a real data set in the subset.
SUBSET_REAL_SIZE = 10


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        model: Name of the base model.
        data: Name of the data set here.
        protocol: single, batch or sequence.
        method: Name of the method's config.
        facts: Facts that are edited.
        folder: Folder of real data, as the command names it.
        settings: Packaged config of the settings that were chosen, if any.
        fitted: Checkpoint of a fit, for methods that learn.
    """

    model: str
    data: str
    protocol: str
    method: str
    facts: int
    folder: str
    settings: str = ""
    fitted: str = ""

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.model}.{self.data}.{self.protocol}.{self.method}"

    def arguments(self, output: str) -> list[str]:
        """Arguments of its `kedit` command."""
        config, file = FILES.get(self.data, (f"data/{self.data}", ""))
        words = ["test", "-c", f"methods/{self.method}", "-c", config]
        words += ["-c", f"benchmark/{self.protocol}"]
        words += ["-c", self.settings] if self.settings else []
        words += ["--model.base_model", self.model]
        if file:
            words += ["--data.path", f"{self.folder}/{file}", "--data.on_bad_record", "skip"]
        words += ["--data.limit", str(self.facts)]
        words += ["--ckpt_path", self.fitted] if self.fitted else []
        return [*words, "--verbose", "false", "--output", output]

    @property
    def command(self) -> str:
        """The command that anyone can run."""
        return shlex.join(["kedit", *self.arguments(f"runs/{self.name}")])


@dataclass(frozen=True)
class Sweep:
    """The choice of a method's settings on one base model."""

    model: str
    method: str
    facts: int

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.model}.settings.{self.method}"

    @property
    def own_data(self) -> str | None:
        """The data set of the facts that the base model knows, where it has one of its own."""
        return next((data for data, model in OWN_DATA.items() if model == self.model), None)

    def arguments(self, output: str) -> list[str]:
        """Arguments of its `kedit` command."""
        file = f"configs/benchmark/sweeps/{self.method}.yaml"
        words = ["sweep", file, "--trials", str(TRIALS), "--model.base_model", self.model]
        words += ["-c", f"data/{self.own_data}"] if self.own_data else []
        return [*words, "--data.limit", str(self.facts), "--output", output]

    @property
    def command(self) -> str:
        """The command that anyone can run."""
        return shlex.join(["kedit", *self.arguments(f"sweeps/{self.name}")])


@dataclass(frozen=True)
class Plan:
    """What is run, and what is left out, by a sentence.

    Args:
        sweeps: Choices of settings, which come first.
        cells: The cells.
        skipped: Why some are left out.
    """

    sweeps: tuple[Sweep, ...]
    cells: tuple[Cell, ...]
    skipped: tuple[str, ...]


def plan(
    subset: bool = False,
    part: str = "*",
    folder: str = "../shared/data",
    fits: Path = Path("outputs/fits"),
    models: Sequence[str] = (),
) -> Plan:
    """The cells of the benchmark, or of its subset, whose names fit a part.

    Args:
        subset: The subset of the nano model.
        part: A name, its beginning, or a pattern with * and ?.
        folder: Folder of the real data sets.
        fits: Folder of checkpoints of methods that learn.
        models: Base models that can be loaded; found out if not given.
    """
    skipped: list[str] = []
    found = list(_cells(subset, folder, fits, models or _models(skipped), skipped))
    cells = tuple(cell for cell in found if _fits(cell.name, part))
    pairs = dict.fromkeys((cell.model, cell.method) for cell in cells)
    sweeps = tuple(
        Sweep(model, method, CHOICE[subset])
        for model, method in pairs
        if (CONFIGS / "benchmark" / "sweeps" / f"{method}.yaml").is_file()
    )
    return Plan(sweeps, cells, tuple(dict.fromkeys(skipped)))


def methods() -> dict[str, str]:
    """Configs of the methods of the benchmark, by class name, in the order of the alphabet."""
    found = {name: entry.config.partition("/")[2] for name, entry in entries("method").items()}
    kept = {name: config for name, config in found.items() if name not in LEFT_OUT}
    return dict(sorted(kept.items(), key=lambda item: item[1]))


def turn(method: str) -> tuple[bool, bool, str]:
    """When a method's turn comes.

    >>> sorted(["kn", "anyedit", "memit"], key=turn)
    ['memit', 'anyedit', 'kn']
    """
    return method in SLOW, method not in SUBSET_MANY, method


def _models(skipped: list[str]) -> list[str]:
    found = [model for model in MODELS if model in own_at_hand()]
    skipped += [MAKE_MODEL] if MODELS[1] not in found else []
    return found


def _cells(
    subset: bool, folder: str, fits: Path, models: Sequence[str], skipped: list[str]
) -> Iterator[Cell]:
    skipped += [f"{name}: {reason}" for name, reason in LEFT_OUT.items()]
    for model in models[:1] if subset else models:
        for data in DATA:
            if OWN_DATA.get(data, model) != model:
                continue
            if data in FILES and not (ROOT / folder / FILES[data][1]).is_file():
                skipped.append(f"{data}: no file {folder}/{FILES[data][1]}; name the folder "
                               "with DATA=")  # fmt: skip
                continue
            for protocol in SIZES:
                for name, method in methods().items():
                    if subset and not _in_subset(data, protocol, method):
                        continue
                    fitted = fits / model / method / "checkpoints" / "best.ckpt"
                    if name in FITTED and not fitted.is_file():
                        skipped.append(f"{name} on {model}: needs a fit first, of minutes; see "
                                       "docs/benchmark.md")  # fmt: skip
                        continue
                    facts = SIZES[protocol][subset]
                    facts = SUBSET_REAL_SIZE if subset and data in FILES else facts
                    own = f"benchmark/settings/{model}/{method}"
                    own = own if (CONFIGS / f"{own}.yaml").is_file() else ""
                    at = fitted.as_posix() if name in FITTED else ""
                    yield Cell(model, data, protocol, method, facts, folder, own, at)


def _in_subset(data: str, protocol: str, method: str) -> bool:
    if data in FILES:
        return protocol == "single" and method in SUBSET_REAL
    return protocol == "single" or method in SUBSET_MANY


def _fits(name: str, part: str) -> bool:
    """Whether a name is a part, begins with it, or fits its pattern.

    >>> _fits("nano.zsre.single.ftm", "nano.zsre"), _fits("nano.zsre.single.ftm", "*.ftm")
    (True, True)
    """
    return name == part or name.startswith(f"{part}.") or fnmatchcase(name, part)
