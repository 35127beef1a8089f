"""Sweep over layers: which layer of a base model a method edits best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kedit_lightning.benchmark import ProtocolRunner, RunContext
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.runs.results import summary_of


def sweep_layers(
    method: EditMethod, split: Split, layers: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Score a method at one layer after another, its other settings unchanged.

    Args:
        method: A method with the setting ``layer`` or ``layers``, in a run whose protocol, seed
            and data are used.
        split: The split of the data whose examples are edited and scored at each layer.
        layers: Layers, counted from 0; all with a dense MLP if not given.

    Yields:
        For each layer its number as ``layer``, and the result of :func:`measure`.

    Raises:
        UnsupportedUseError: The method has learned weights, which belong to its own layers.
        ModuleNotLocatedError: There is no such layer.
    """
    if any(tensor.numel() for tensor in method.state_dict().values()):
        raise UnsupportedUseError(
            f"what {type(method).__name__} has learned belongs to its own layers, so "
            "LayerSweep cannot move it to others; fit it anew for each choice of layers"
        )
    layout = method.base.layout
    layers = list(dict.fromkeys(layout.dense_layers if layers is None else layers))
    for layer in layers:
        layout.block(layer)  # one that does not exist is refused before any work
    for layer in layers:
        yield {"layer": layer, **measure(at_layer(method, layer), method.run, split)}


def at_layer(method: EditMethod, layer: int) -> EditMethod:
    """A method of the same class and settings, ``layer`` or ``layers`` aside."""
    # As given, and not as resolved for the method's own layers.
    settings = dict(vars(method.given))
    settings |= {"layer": layer} if "layer" in settings else {"layers": [layer]}
    kind: Any = type(method)
    moved: EditMethod = kind(base_model=method.base, **settings)
    return moved


def measure(method: EditMethod, run: RunContext, split: Split) -> dict[str, Any]:
    """Score a method on a split of a run's data; the stack is restored afterwards.

    Returns:
        The scores of :func:`judged` with their harmonic mean as ``score``, and all scores with
        intervals as ``scores``; or the ``error`` of a method that computed non-finite values.
    """
    assert isinstance(run.data, EditDataModule)
    examples = run.data.examples(split)
    parts = chunks(examples, run.protocol.read_together)
    # Without output and sinks: edits of the sweep are no edits of the run.
    inner = RunContext(run.protocol, run.seed, run.data)
    runner = ProtocolRunner(method.base, method.noted_edit, inner, split, method.edit_each)
    runner.chunks = len(parts)
    records: list[ExampleRecord] = []
    try:
        for index, part in enumerate(parts):
            records += runner.chunk(part, index)
        records += runner.finish()
    except NonFiniteError as error:  # this layer cannot be edited; the others may be
        return {"error": str(error)}
    finally:
        runner.close()
    scores = summary_of(records, run.protocol, run.seed)["scores"]
    means = {key: entry["mean"] for key, entry in scores.items()}
    return {**judged(means), "scores": scores}


def best_layer(entries: Sequence[dict[str, Any]]) -> int | None:
    """The layer with the highest score in a sweep, the first of several; ``None`` without scores.

    >>> best_layer([{"layer": 0, "score": 0.5}, {"layer": 1, "score": 0.7}, {"layer": 2}])
    1
    """
    scored = [entry for entry in entries if entry.get("score") is not None]
    return max(scored, key=lambda entry: entry["score"])["layer"] if scored else None
