"""What the names of scores mean, from the registry of metrics."""

from __future__ import annotations

import inspect
from textwrap import wrap

from kedit_lightning.registry import entries

_KINDS = {
    "rewrite": "the prompts of the requests themselves",
    "rephrase": "the same facts asked in other words",
    "portability": "what follows from the facts",
    "locality": "what must stay as it was",
}
_STAGES = {
    "final/...": "scored once more after the last edit of a sequence",
    "after_<n>/...": "scored once more after n facts of a sequence",
    "forget/...": "lost between the score after an edit of its own and the one at the end",
}
_STREAM = {
    "matrix": "mean score of each cohort of facts (column) at each checkpoint (row); a cohort is "
    "what was written between two checkpoints",
    "age": "mean score by the number of facts written since, over all facts and checkpoints",
    "ends": "mean score of the first and of the last 100 facts (half of a shorter stream) at its "
    "end",
    "composite": "harmonic mean, at a checkpoint, of the scores of rewrites, rephrases and what "
    "was known elsewhere: gen_em, or tf_all without free answers, and known, or keep_top1",
    "collapse": "first checkpoint whose composite is below 60% of that at 100 facts, or at a tenth "
    "of a shorter stream",
    "drift": "exp of the mean negative log-likelihood (perplexity) of plain text, mean KL "
    "divergence from the base model on it, and norms ‖W - W₀‖ / ‖W₀‖ and ‖W‖ / ‖W₀‖ of the edited "
    "weights; collapsed where the perplexity is ten times that of the base model",
}
_COSTS = {
    "edit/bytes": "size of the edit's tensors",
    "timing/...": "seconds to compute an edit, and to score it",
    "memory/...": "peak memory",
}


def metric_meanings() -> dict[str, dict[str, str]]:
    """Meanings of names, by what they name; a metric of a plug-in stands among them."""
    scores = [entry.load() for entry in entries("metric").values()]
    meanings = {s.name: (inspect.getdoc(s) or "").split("\n\n")[0] for s in scores}
    blocks = {
        "A score is KIND/METRIC, or KIND/GROUP/METRIC for a group of questions. Kinds:": _KINDS,
        "Metrics, each the mean over cases (the interval resamples subjects):": meanings,
        "Stages of a sequence; scores right after an edit have none:": _STAGES,
        "Streams with checkpoints, in results.json (retention) and drift.json:": _STREAM,
        "Costs, once a case:": _COSTS,
    }
    return {
        title: {name: " ".join(meaning.split()) for name, meaning in rows.items()}
        for title, rows in blocks.items()
    }


def metric_glossary() -> str:
    """Text of ``kedit metrics``."""
    lines: list[str] = []
    for title, rows in metric_meanings().items():
        lines += [*([""] if lines else []), title]
        for name, meaning in rows.items():
            first, *others = wrap(meaning, 76)
            lines += [f"  {name:<15} {first}", *(f"{'':18}{other}" for other in others)]
    return "\n".join(lines) + "\n"
