"""Passages as answers: overlap of words or characters, and of meaning."""

from __future__ import annotations

from typing import ClassVar, Literal

from kedit_lightning.metrics.example_record import ProbeRecord
from kedit_lightning.metrics.functional.passage_match import Unit, passage_bleu, passage_rouge
from kedit_lightning.metrics.measurement import COSINE, PASSAGE
from kedit_lightning.metrics.scores.case_mean import ProbeMean
from kedit_lightning.probe_task import TaskName


class PassageBleu(ProbeMean):
    """BLEU of the free generation with the wanted passage, on words.

    Of up to four words in a row, without smoothing. The generation may be half as long again as the
    passage, ends where the model ends it, and is not cut to its first sentence. Published code
    gives BLEU texts in place of words, and so counts characters.
    """

    name = "gen_bleu"
    tasks = ("passage", "concept")
    measurements = (PASSAGE,)
    is_share = True

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The score after the edit."""
        text, answers = PASSAGE.of(probe["after"]), probe["answers"]
        return None if text is None or not answers else passage_bleu(text, answers)


class PassageRouge(ProbeMean):
    """ROUGE-L (F) of the free generation with the wanted passage, on words.

    The longest common subsequence, weighed by how much of the passage is said and how much else.
    """

    name = "gen_rougel_f"
    tasks: ClassVar[tuple[TaskName, ...]] = ("passage", "concept")
    measurements = (PASSAGE,)
    is_share = True
    key: ClassVar[Literal["rouge1", "rouge2", "rougeL"]] = "rougeL"
    part: ClassVar[Literal["recall", "fmeasure"]] = "fmeasure"
    unit: ClassVar[Unit] = "words"

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The score after the edit."""
        text, answers = PASSAGE.of(probe["after"]), probe["answers"]
        if text is None or not answers:
            return None
        return passage_rouge(text, answers, cls.key, cls.part, cls.unit)


class PassageRouge1Recall(PassageRouge):
    """Share of the wanted passage's words that the free generation has (ROUGE-1 recall).

    As UnKE (Deng et al. 2024) and AKEW report it; running on costs nothing.
    """

    name = "gen_rouge1"
    key = "rouge1"
    part = "recall"


class PassageRouge2Recall(PassageRouge):
    """Share of the wanted passage's pairs of words that the generation has (ROUGE-2 recall)."""

    name = "gen_rouge2"
    key = "rouge2"
    part = "recall"


class PassageRougeLRecall(PassageRouge):
    """Share of the wanted passage in the longest common subsequence of words (ROUGE-L recall)."""

    name = "gen_rougel"
    part = "recall"


class CharacterRouge(PassageRouge):
    """ROUGE-L (F) of the free generation with the wanted sentence, on characters.

    For Chinese, which has no spaces (CKnowEdit, Fang et al. 2024). Letters and digits count, marks
    do not.
    """

    name = "gen_char_rougel"
    tasks = ("characters",)
    unit = "characters"


class PassageCosine(ProbeMean):
    """Cosine of embeddings of the free generation and the wanted passage.

    By the sentence-transformers model that the protocol names (``protocol.embedder``); without one
    there is no such score. Published tables call it BERT score.
    """

    name = "gen_cosine"
    tasks: ClassVar[tuple[TaskName, ...]] = ("passage", "characters")
    value_range = "-1 to 1"
    measurements = (PASSAGE, COSINE)

    @classmethod
    def read(cls, probe: ProbeRecord) -> float | None:
        """The cosine after the edit."""
        value = COSINE.of(probe["after"])
        return None if value is None else float(value)


PASSAGE_SCORES: tuple[type[ProbeMean], ...] = (
    PassageBleu,
    PassageRouge,
    PassageRouge1Recall,
    PassageRouge2Recall,
    PassageRougeLRecall,
    CharacterRouge,
    PassageCosine,
)
