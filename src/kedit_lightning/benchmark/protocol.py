"""How a benchmark applies edits and what it asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from kedit_lightning.benchmark.judge import Judge
from kedit_lightning.contradictions import OnConflict
from kedit_lightning.decoding_settings import Generation
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics.functional.text_match import AnswerRule
from kedit_lightning.requests import EditExample, EditRequest

Mode: TypeAlias = Literal["single", "batch", "sequential"]
Moment: TypeAlias = Literal["immediate", "final"]
Scoring: TypeAlias = Literal["default", "legacy_easyedit"]
Grid: TypeAlias = Literal["log"]

#: Part of every protocol id; raised when the same settings would give other numbers.
READING_VERSION = 2
#: Examples that are read together in ``single`` mode unless the user says how many.
EXAMPLES_AT_A_TIME = 32
#: Fields that name what measures finished texts.
_GRADERS = ("judge", "sentiment", "safety", "traits", "embedder")


def _name_of(grader: Any) -> Any:
    """Plain values of a judge, or the name of a model or function."""
    if isinstance(grader, Judge):
        return grader.facts()
    if isinstance(grader, str):
        return grader
    return f"{grader.__module__}.{getattr(grader, '__qualname__', type(grader).__qualname__)}"


@dataclass(frozen=True)
class Protocol:
    """How edits are applied and scored.

    Args:
        mode: ``single`` scores each example under an edit of its own; ``batch`` edits
            ``chunk_size`` examples at once, scores them and rolls back; ``sequential`` keeps all
            edits in force.  Not given, it is ``single``; ``kedit edit`` then writes all facts so
            that they hold together, in one batch where the method can and else in a sequence.
        chunk_size: Examples read together.  In ``batch`` and ``sequential`` one edit writes them
            all, and it is 1 if not given; in ``single`` each has its own, which its rows carry in
            passes they share, and the size changes no score; it is then 32 if not given. Processes
            take whole chunks, so give a smaller one where they are many and examples few.
        evaluate: When sequential edits are scored: ``immediate`` (right after their own chunk),
            ``final`` (after the last one), or both as ``immediate,final``.
        every: In ``sequential``, score all examples edited so far whenever this many more are.
            ``log`` does so after 1, 2, 5, 10, 20, 50, ... of them.
        orders: In ``sequential``, how many orders of the examples ``kedit test`` goes through, each
            a stream of its own: that of the file, and permutations drawn from the run's seed.
        order: The first of these orders; 0 is that of the file.
        scoring: What is measured: our definitions, or those of EasyEdit for comparison.
        score_batch_size: Rows of a forward pass while scoring, short ones up to four times as many;
            it never changes a score.
        generate: Let the model answer freely, beside reading its probabilities.
        max_new_tokens: Longest free answer.
        sample_tokens: Length of a sampled continuation of each request's own prompt, for its n-gram
            entropy (100 in ROME's paper); none when 0.
        answers: When a free answer is the wanted one: ``words`` lets marks count where they tell
            numbers or names apart (C# is not C++), ``squad`` drops all as SQuAD's script does.
        on_conflict: What is done where requests that hold together give one fact different answers:
            ``last`` writes the last one alone, but each in its turn in a sequence of
            ``kedit test``; ``refuse`` ends the run before anything is computed.
        generation: ``greedy`` sets aside penalties, beams, bans and forced tokens of the base
            model's generation config, and names them in the results; with ``model`` they act, all
            but sampling.
        judge: A model that judges free answers (``gen_judge``, ``consistency_judge``, ``pae``).
        sentiment: Sequence classifier of opinions (name, folder, or function of texts that gives
            probabilities of positive sentiment), for ``gen_sentiment``.
        safety: Sequence classifier of replies (name, folder, or function of texts that gives
            probabilities of unsafe), for ``ds`` and ``dg``; a second class without name is unsafe.
        traits: Sequence classifier of opinions (name, folder, or function of texts that gives
            probabilities of neuroticism, agreeableness, extraversion), for ``trait_acc`` and
            ``tpei``.
        embedder: Model of sentence-transformers (name, folder, or function of texts that gives
            vectors) that compares passages, for ``gen_cosine``.
    """

    mode: Mode | None = None
    chunk_size: int | None = None
    evaluate: list[Moment] | str = "immediate,final"
    every: int | Grid | None = None
    orders: int = 1
    order: int = 0
    scoring: Scoring = "default"
    score_batch_size: int = 32
    generate: bool = True
    max_new_tokens: int = 64
    sample_tokens: int = 0
    answers: AnswerRule = "words"
    on_conflict: OnConflict = "last"
    generation: Generation = "greedy"
    judge: Judge | None = None
    sentiment: str | Callable[..., Any] | None = None
    safety: str | Callable[..., Any] | None = None
    traits: str | Callable[..., Any] | None = None
    embedder: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"scoring": Scoring, "answers": AnswerRule}
        kinds |= {"on_conflict": OnConflict, "generation": Generation}
        kinds |= {} if self.mode is None else {"mode": Mode}
        for field, kind in kinds.items():
            if getattr(self, field) not in get_args(kind):
                raise self._refuse(field, f"must be one of {', '.join(get_args(kind))}")
        if not self.moments or set(self.moments) - set(get_args(Moment)):
            raise self._refuse("evaluate", "must be immediate, final, or both: immediate,final")
        sizes = ["score_batch_size", "max_new_tokens", "orders"]
        sizes += ["chunk_size"] if self.chunk_size is not None else []
        sizes += ["every"] if self.every not in (None, *get_args(Grid)) else []
        for field in sizes:
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise self._refuse(field, "must be a whole number of at least 1")
        for field in ("sample_tokens", "order"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 0:
                raise self._refuse(field, "must be a whole number of at least 0")
        plain = {"every": None, "orders": 1, "order": 0}
        for field, unset in plain.items():
            if getattr(self, field) != unset and self.mode != "sequential":
                raise self._refuse(field, "only means something in sequential mode; leave it out")

    def _refuse(self, field: str, reason: str) -> UnsupportedUseError:
        return UnsupportedUseError(
            f"protocol.{field} {reason} (--trainer.protocol.{field}), got {getattr(self, field)!r}"
        )

    @property
    def grouping(self) -> Mode:
        """The mode, ``single`` where none is given."""
        return self.mode or "single"

    @property
    def written_at_once(self) -> int:
        """Examples whose facts one edit writes."""
        return 1 if self.grouping == "single" else self.chunk_size or 1

    @property
    def read_together(self) -> int:
        """Examples of a chunk.

        It depends on neither their number nor that of the processes, so that a run with more of
        either computes the same edits.  What a chunk holds in memory is bounded where it is held:
        rows, edits that rows carry, and what is trained.

        >>> Protocol().read_together, Protocol(mode="sequential").read_together
        (32, 1)
        """
        if self.chunk_size is not None or self.grouping != "single":
            return self.chunk_size or 1
        return EXAMPLES_AT_A_TIME

    def for_editing(self, batch: bool, sequential: bool, examples: int) -> Protocol:
        """The same where edits are wanted for use: facts hold together, and are scored at the end.

        Args:
            batch: Whether the method writes several facts in one computation.
            sequential: Whether it keeps earlier edits in force while it writes new ones.
            examples: How many are edited.

        Raises:
            UnsupportedUseError: It has several orders.
        """
        if self.orders > 1:
            raise self._refuse("orders", "is for kedit test; edits for use are written once")
        if self.mode == "single" or (self.mode is None and examples < 2):
            return replace(self, mode="single")
        mode = self.mode or ("batch" if batch or not sequential else "sequential")
        if mode == "batch" and sequential and 1 < (self.chunk_size or 1) < examples:
            mode = "sequential"  # a batch that is rolled back does not hold beside the next one
        size = self.chunk_size or 1 if mode == "sequential" else max(1, examples)
        return replace(self, mode=mode, chunk_size=size, evaluate="final")

    @property
    def moments(self) -> tuple[str, ...]:
        """When edits are scored, as names."""
        given = self.evaluate.split(",") if isinstance(self.evaluate, str) else self.evaluate
        return tuple(dict.fromkeys(str(moment).strip() for moment in given))

    def reaches(self, before: int, after: int) -> bool:
        """Whether a stream that grows from ``before`` to ``after`` facts passes a checkpoint.

        >>> log = Protocol(mode="sequential", every="log")
        >>> [count for count in range(1, 101) if log.reaches(count - 1, count)]
        [1, 2, 5, 10, 20, 50, 100]
        """
        if self.every is None:
            return False
        if isinstance(self.every, int):
            return before // self.every < after // self.every
        power = int(10 ** (len(str(after)) - 1))
        return max(n * power for n in (1, 2, 5) if n * power <= after) > before

    def written_together(self, examples: Sequence[EditExample]) -> Iterator[list[EditRequest]]:
        """The requests of examples, in groups of those that hold together."""
        size = len(examples) if self.grouping == "sequential" else self.written_at_once
        for start in range(0, len(examples), size or 1):
            chunk = examples[start : start + size]
            yield [request for example in chunk for request in example.requests]

    @property
    def generates(self) -> bool:
        """Whether free answers are asked for; the scores of EasyEdit know none."""
        return self.generate and self.scoring == "default"

    def facts(self) -> dict[str, Any]:
        """What the scores depend on, as plain values."""
        plain = replace(self, judge=None, sentiment=None, safety=None, traits=None, embedder=None)
        facts = asdict(plain) | {"evaluate": sorted(self.moments), "version": READING_VERSION}
        facts |= {"generate": self.generates, "mode": self.grouping}
        facts |= {"chunk_size": self.written_at_once}
        # Neither the rows of a forward pass nor how many examples are read together change a score,
        # and a run that refuses conflicts has none.
        del facts["score_batch_size"], facts["on_conflict"], facts["orders"]
        if self.grouping == "single":
            del facts["chunk_size"]
        if self.grouping != "sequential":
            del facts["evaluate"], facts["every"]
        if not self.order:
            del facts["order"]
        if not (self.generates and self.sample_tokens):
            del facts["sample_tokens"]
        if not self.generates:
            del facts["max_new_tokens"], facts["answers"], facts["generation"]
        # Absent where none is named or asked, so that ids made without them stay.
        for name in _GRADERS:
            grader = getattr(self, name)
            del facts[name]
            if grader is not None and self.generates:
                facts[name] = _name_of(grader)
        return facts

    @property
    def id(self) -> str:
        """Short hash of what the scores depend on; numbers with different ids do not compare."""
        text = json.dumps(self.facts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
