"""How edits change the text that a model writes beyond answers."""

from __future__ import annotations

import math

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.text_match import ngram_entropy
from kedit_lightning.metrics.measurement import LOG_PROB, SAMPLE
from kedit_lightning.metrics.scores.case_mean import ProbeMean

#: Group of the locality probes that are halves of passages of plain text.
TEXT_GROUP = "text"


class Fluency(ProbeMean):
    """Weighted entropy of the bigrams and trigrams of a sampled continuation of the prompt.

    The mean of 2/3 times the bigram and 4/3 times the trigram entropy of its words, in bits
    (Zhang et al. 2018, arXiv:1809.05972; weights of Meng et al. 2022, arXiv:2202.05262). Without
    the prompt; tokens are drawn from the five likeliest with a seed. Measured where the protocol
    has ``sample_tokens``. A collapsed model that repeats itself scores low; texts of other lengths
    do not compare.
    """

    name = "ngram_entropy"
    kinds = ("rewrite",)
    measurements = (SAMPLE,)
    value_range = "0 bits and more"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The entropy after the edit, ``None`` without a sample."""
        text = SAMPLE.of(probe["after"])
        return None if text is None else ngram_entropy(text)


class FluencyChange(ProbeMean):
    """The same after the edit less that of the unedited base model, with the same draws."""

    name = "ngram_entropy_change"
    kinds = ("rewrite",)
    measurements = (SAMPLE,)
    value_range = "below 0 where text has become more repetitive, in bits"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The difference, ``None`` without samples."""
        texts = SAMPLE.of(probe["after"]), SAMPLE.of(probe["base"])
        if texts[0] is None or texts[1] is None:
            return None
        return ngram_entropy(texts[0]) - ngram_entropy(texts[1])


class TextPerplexity(ProbeMean):
    """Perplexity of the second half of a passage of plain text, given the first half.

    The exponential of the mean negative log-likelihood of its tokens, of locality probes that
    ``locality_path`` takes from a text file (``.txt``, a passage a line). Compare values of one
    model and one text only.
    """

    name = "perplexity"
    kinds = ("locality",)
    measurements = (LOG_PROB,)
    higher_is_better = False
    value_range = "1 and more"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The perplexity after the edit, ``None`` of other probes."""
        value = LOG_PROB.of(probe["after"]) if probe["group"] == TEXT_GROUP else None
        return None if value is None else math.exp(min(-value, 700.0))


FLUENCY_SCORES: tuple[type[ProbeMean], ...] = (Fluency, FluencyChange, TextPerplexity)
