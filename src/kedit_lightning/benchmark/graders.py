"""What is measured of the texts of finished records: by a judge, a classifier, an encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import product
from typing import Any, NamedTuple, TypeAlias, cast

import torch

from kedit_lightning.benchmark.answer_cache import AnswersCache, key_of
from kedit_lightning.benchmark.classifiers import TEXT_CLASSES, Classifier, TextClass
from kedit_lightning.benchmark.judge import (
    Judge,
    Judgement,
    Respondent,
    rating,
    rating_prompt,
    respondent,
    verdict,
)
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.chat_turns import question_in
from kedit_lightning.edits.kinds.prompt.retriever import sentence_encoder
from kedit_lightning.metrics import (
    AdjectiveShift,
    ConsistencyCosine,
    ConsistencyJudged,
    ExampleRecord,
    Measurement,
    PassageCosine,
    ProbeMean,
    ProbeReading,
    ProbeRecord,
)
from kedit_lightning.metrics.functional import nearest_cosine
from kedit_lightning.metrics.measurement import COSINE, JUDGED, PASSAGE, RATING, TEXT
from kedit_lightning.probe_task import scored_by
from kedit_lightning.requests import EditExample

#: Tasks whose passages are compared by their embeddings.
_COMPARED = (*PassageCosine.tasks, *ConsistencyCosine.tasks)
#: Embeddings of texts, ``[texts, dimension]``.
Encoder: TypeAlias = Callable[[Sequence[str]], Any]

#: Scores that need a judge, and of what, for warnings.
_UNJUDGED: dict[type[ProbeMean], str] = {
    ConsistencyJudged: "definitions",
    AdjectiveShift: "opinions",
}


class JudgeQuestion(NamedTuple):
    """What a judge is asked for: where it is recorded, how a reply is read, and in which score."""

    measurement: Measurement
    read: Callable[[str], Any]
    unread: str
    score: str


VERDICT = JudgeQuestion(JUDGED, verdict, "said neither yes nor no", "gen_judge")
MARK = JudgeQuestion(RATING, rating, "gave no mark from 1 to 5", AdjectiveShift.name)

#: Failures in a row after which a judge is not asked any more.
_PATIENCE = 5


class Graders:
    """Measures the texts of records, as far as a protocol names what measures them.

    A measurement that failed is ``None`` in the record, and its score is left out; nothing else is
    put in its place.

    Args:
        protocol: Names judge, classifier and encoder.
        device: Where local models compute.
    """

    def __init__(self, protocol: Protocol, device: torch.device) -> None:
        self.protocol, self.device = protocol, device
        self._warned: set[str] = set()
        self._failures = 0

    def load(self, examples: Iterable[EditExample]) -> None:
        """Load what the protocol names and examples need, before edits cost time.

        Raises:
            BaseModelNotFoundError: One of them is not there.
            UnsupportedUseError: A classifier lacks the class that is asked for.
        """
        if not self.protocol.generates:
            return
        tasks = [probe.task for example in examples for probe in example.probes]
        known = {task.name for task in tasks if task is not None}
        for wanted in TEXT_CLASSES:
            if wanted.task in known and getattr(self.protocol, wanted.option) is not None:
                self._classifier(wanted)
        if self.protocol.embedder is not None and known.intersection(_COMPARED):
            _ = self._encoder
        if self.protocol.judge is not None:
            _ = self._verdicts

    def complete(self, record: ExampleRecord) -> ExampleRecord:
        """The record with what is measured of its texts."""
        if not self.protocol.generates:
            return record
        probes = record["probes"]
        found: list[dict[str, dict[str, Any]]] = [{"base": {}, "after": {}} for _ in probes]
        self._judge(probes, found)
        self._compare(probes, found)
        self._classify(probes, found)
        if not any(states["base"] or states["after"] for states in found):
            return record
        # Copies: readings of the base model are those of the cache.
        completed = [
            {**probe, **{name: {**probe[name], **new} for name, new in states.items()}}  # type: ignore[literal-required]
            for probe, states in zip(probes, found, strict=True)
        ]
        return cast(ExampleRecord, {**record, "probes": completed})

    def _warn(self, about: str, sentence: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(sentence, stacklevel=2)

    # ---- judge

    @cached_property
    def _verdicts(self) -> tuple[AnswersCache, Respondent]:
        judge = cast(Judge, self.protocol.judge)
        ask = respondent(judge, self.device)
        settings = {"judge": judge.facts(), "weights": ask.fingerprint}
        return AnswersCache(settings, cache_dir() / "judge"), ask

    def _judge(self, probes: Sequence[ProbeRecord], found: list[dict[str, dict[str, Any]]]) -> None:
        """What the judge makes of free answers: whether they are right, and how a trait fits."""
        judge = self.protocol.judge
        if judge is None:
            for score, what in _UNJUDGED.items():
                if any(scored_by(probe.get("task"), score.tasks) for probe in probes):
                    self._warn(
                        score.name,
                        f"{what} of this dataset are also compared by a judge, and protocol.judge "
                        f"names none; {score.name} is left out",
                    )
            return
        asked: dict[int, Judgement] = {}
        rated: dict[tuple[int, str], str] = {}
        for index, probe in enumerate(probes):
            text = PASSAGE.of(probe["after"]) or TEXT.of(probe["after"])
            wanted = probe["kind"] != "locality" and probe["answers"]
            if wanted and text is not None and scored_by(probe.get("task"), ()):
                asked[index] = Judgement(
                    question_in(probe["prompt"]), tuple(probe["answers"]), text
                )
            if scored_by(probe.get("task"), AdjectiveShift.tasks):
                for state in found[index]:
                    opinion = PASSAGE.of(probe[state])  # type: ignore[literal-required]
                    if opinion is not None and opinion.strip():
                        rated[index, state] = rating_prompt(probe["task"]["label"], opinion)
        prompts = {key_of(*item): item.prompt(judge.prompt) for item in asked.values()}
        verdicts = self._replies(prompts, VERDICT)
        for index, item in asked.items():
            found[index]["after"][JUDGED.name] = verdicts.get(key_of(*item))
        marks = self._replies({key_of(prompt): prompt for prompt in rated.values()}, MARK)
        for (index, state), prompt in rated.items():
            found[index][state][RATING.name] = marks.get(key_of(prompt))

    def _replies(self, prompts: Mapping[str, str], question: JudgeQuestion) -> dict[str, Any]:
        """What the judge says to prompts by key; what it fails to say is absent."""
        judge = cast(Judge, self.protocol.judge)
        if not prompts:
            return {}
        cache, ask = self._verdicts
        name = question.measurement.name
        missing = [key for key in prompts if key not in cache.known]
        fresh: dict[str, ProbeReading] = {}
        if missing and self._failures < _PATIENCE:
            replies = ask([prompts[key] for key in missing])
            for key, reply in zip(missing, replies, strict=True):
                said = None if isinstance(reply, Exception) else question.read(reply)
                self._failures = self._failures + 1 if isinstance(reply, Exception) else 0
                if said is not None:
                    fresh[key] = cast(ProbeReading, {name: said})
                    continue
                reason = "failed" if isinstance(reply, Exception) else question.unread
                self._warn(
                    reason,
                    f"judge '{judge.model}' {reason} ({reply!s:.120}); {question.score} leaves out "
                    "what it did not judge, and no other score stands in for it",
                )
            if self._failures >= _PATIENCE:
                self._warn(
                    "given up",
                    f"judge '{judge.model}' failed {self._failures} times in a row and is not "
                    "asked any more in this run",
                )
        cache.add(fresh)
        known: Mapping[str, Any] = cache.known
        return {key: known[key][name] for key in prompts if key in known}

    # ---- embeddings

    @cached_property
    def _encoder(self) -> Encoder:
        named = self.protocol.embedder
        if callable(named):
            return named
        model = sentence_encoder(
            str(named), f"protocol.embedder '{named}'", "leave protocol.embedder out"
        )

        def encode(texts: Sequence[str]) -> Any:
            return model.encode([*texts], convert_to_tensor=True, show_progress_bar=False)

        return encode

    def _compare(
        self, probes: Sequence[ProbeRecord], found: list[dict[str, dict[str, Any]]]
    ) -> None:
        """Cosine of passages with the answers that they should be."""
        for probe, states in zip(probes, found, strict=True):
            text = PASSAGE.of(probe["after"])
            compared = scored_by(probe.get("task"), _COMPARED)
            if text is None or not probe["answers"] or not compared:
                continue
            if self.protocol.embedder is None:
                of_concept = scored_by(probe.get("task"), ConsistencyCosine.tasks)
                score = (ConsistencyCosine if of_concept else PassageCosine).name
                self._warn(
                    "embedder",
                    "answers of this dataset are also compared by their embeddings, and "
                    f"protocol.embedder names no sentence-transformers model; {score} is left out",
                )
                return
            # One text at a time, so that no padding changes a score.
            vectors = [torch.as_tensor(self._encoder([t]))[0] for t in (text, *probe["answers"])]
            cosine = nearest_cosine(vectors[0], torch.stack(vectors[1:]))
            states["after"][COSINE.name] = cosine

    # ---- classes

    @cache  # noqa: B019 - graders live as long as a run
    def _classifier(self, wanted: TextClass) -> Classifier:
        return wanted.classifier(getattr(self.protocol, wanted.option), self.device)

    @cache  # noqa: B019 - as above; texts of the base model come again at every stage
    def _share(self, wanted: TextClass, text: str) -> Any:
        """How likely a text is of a class; of several classes a list."""
        if wanted.empty is not None and not text.strip():
            return wanted.empty
        said = self._classifier(wanted)([text])[0]
        return torch.as_tensor(said, dtype=torch.float64).tolist()

    def _classify(
        self, probes: Sequence[ProbeRecord], found: list[dict[str, dict[str, Any]]]
    ) -> None:
        """How likely free answers are of a class, without and with the edit."""
        for wanted, (probe, states) in product(TEXT_CLASSES, zip(probes, found, strict=True)):
            if not scored_by(probe.get("task"), (wanted.task,)):
                continue
            if getattr(self.protocol, wanted.option) is None:
                self._warn(wanted.option, wanted.absence)
                continue
            for state, new in states.items():
                reading: ProbeReading = probe[state]
                text = PASSAGE.of(reading)
                if (text := TEXT.of(reading) if text is None else text) is not None:
                    new[wanted.measurement.name] = self._share(wanted, text)
