"""The arithmetic of the metrics: pure functions of tensors and text."""

from kedit_lightning.metrics.functional.bootstrap import (
    bootstrap_interval,
    loss_interval,
    paired_difference,
    share_interval,
    square_and_add_interval,
    wilson_interval,
)
from kedit_lightning.metrics.functional.divergence import (
    kl_divergence,
    rank_agreement,
    unchanged_text,
    unchanged_top1,
)
from kedit_lightning.metrics.functional.passage_match import (
    edit_success,
    mentions,
    nearest_cosine,
    passage_bleu,
    passage_rouge,
)
from kedit_lightning.metrics.functional.teacher_forcing import (
    exact_match,
    mean_log_prob,
    prefers,
    token_match,
    total_log_prob,
    widened,
)
from kedit_lightning.metrics.functional.text_match import (
    generation_contains,
    generation_exact,
    mean_ngram_entropy,
    ngram_entropy,
    normalise_answer,
    repetition_rate,
)
from kedit_lightning.metrics.functional.yes_no import share_of_yes, yes_or_no
from kedit_lightning.sentence import answer_text

__all__ = [
    "answer_text",
    "bootstrap_interval",
    "edit_success",
    "exact_match",
    "generation_contains",
    "generation_exact",
    "kl_divergence",
    "loss_interval",
    "mean_log_prob",
    "mean_ngram_entropy",
    "mentions",
    "nearest_cosine",
    "ngram_entropy",
    "normalise_answer",
    "paired_difference",
    "passage_bleu",
    "passage_rouge",
    "prefers",
    "rank_agreement",
    "repetition_rate",
    "share_interval",
    "share_of_yes",
    "square_and_add_interval",
    "token_match",
    "total_log_prob",
    "unchanged_text",
    "unchanged_top1",
    "widened",
    "wilson_interval",
    "yes_or_no",
]
