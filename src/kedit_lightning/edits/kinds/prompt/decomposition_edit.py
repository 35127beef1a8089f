"""Edits that answer multi-hop questions step by step from a store of facts (MeLLo)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from kedit_lightning.chat_turns import question_in, with_question
from kedit_lightning.edits.edit import Edit, EditableModel, Tensors, Values
from kedit_lightning.edits.effects import Effect, PromptFunction, RewritePrompt
from kedit_lightning.edits.kinds.prompt.decomposition import SLOT, Decomposition, decompose
from kedit_lightning.edits.kinds.prompt.fact_store import FactStore, StoredFact
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL
from kedit_lightning.edits.kinds.prompt.scratchpad import DEMONSTRATIONS, transcript
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_names, check_value
from kedit_lightning.errors import EditFileError
from kedit_lightning.sentence import answer_text


@dataclass(frozen=True)
class MultiHopPlan:
    """How multi-hop questions are taken apart.

    Args:
        decompositions: Forms of questions with their steps; without any the model writes a
            scratchpad with sub-questions of its own.
        demonstrations: Scratchpads before that of a question, each with an empty line.
        hops: Most sub-questions of a scratchpad.
        retriever: ``lexical``, or a sentence-transformers model.
        max_new_tokens: Longest text that the model writes in one piece.
    """

    decompositions: tuple[Decomposition, ...] = ()
    demonstrations: tuple[str, ...] = DEMONSTRATIONS
    hops: int = 4
    retriever: str = LEXICAL
    max_new_tokens: int = 64


@dataclass(frozen=True)
class _State:
    facts: list[StoredFact]
    plan: MultiHopPlan


class DecompositionEdit(Edit):
    """Facts of a store; all such edits on the stack form one store, read by the newest one's plan.

    A prompt is rewritten into all that leads to its answer: the base model itself, with the other
    edits on the stack, answers the questions on the way.
    """

    kind: ClassVar[str] = "decomposition"
    rows_apart: ClassVar[bool] = False

    def __init__(
        self,
        base: EditableModel,
        facts: Sequence[StoredFact],
        plan: MultiHopPlan,
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.facts, self.plan = tuple(facts), plan

    def effects(self) -> Sequence[Effect]:
        """The rewriting of prompts."""
        return [RewritePrompt(self.kind, _controllers, self)]

    def state(self) -> tuple[Tensors, Values]:
        """The texts; there are no tensors."""
        return {}, asdict(_State(list(self.facts), self.plan))

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> DecompositionEdit:
        """Rebuild from the texts."""
        check_value("the edit", values, _State)
        check_names("the edit", tensors, ())
        plan = dict(values["plan"])
        if not values["facts"] or min(plan.get(n, 1) for n in ("hops", "max_new_tokens")) < 1:
            raise EditFileError("the edit needs a fact, and counts of at least 1")
        given = plan.pop("decompositions", ())
        plan["decompositions"] = tuple(
            Decomposition(d["question"], tuple(d["steps"])) for d in given
        )
        for decomposition in plan["decompositions"]:
            decomposition.check()
        if "demonstrations" in plan:
            plan["demonstrations"] = tuple(plan["demonstrations"])
        facts = [StoredFact(**fact) for fact in values["facts"]]
        return cls(base, facts, MultiHopPlan(**plan), origin)


def _controllers(edits: Sequence[DecompositionEdit]) -> PromptFunction:
    return MultiHopController(edits)


class MultiHopController:
    """Rewrites prompts by the facts of all edits, oldest first."""

    def __init__(self, edits: Sequence[DecompositionEdit]) -> None:
        self._base, self._plan = edits[-1].base, edits[-1].plan
        facts = [fact for edit in edits for fact in edit.facts]
        self._store = FactStore(facts, self._plan.retriever)
        #: Texts that the base model continued on this stack up to some strings, and how.
        self._written: dict[tuple[str, tuple[str, ...]], str] = {}
        self._busy = False

    def __call__(
        self, prompt: str, fits: Callable[[str], bool], images: tuple[str, ...] = ()
    ) -> str:
        """The prompt behind which the answer follows."""
        if self._busy:  # a question on the way is asked as it is
            return prompt
        question = question_in(prompt)
        self._busy = True
        try:
            if self._plan.decompositions:
                text = self._last_step(question)
            else:
                text = self._scratchpad(question, lambda text: fits(with_question(prompt, text)))
        finally:
            self._busy = False
        return with_question(prompt, text)

    # ---- given decompositions

    def _last_step(self, question: str) -> str:
        """The last question on the way to the answer, behind a fact that concerns it."""
        name, steps = decompose(question, self._plan.decompositions) or (question, (SLOT,))
        for step in steps[:-1]:
            asked = step.replace(SLOT, name)
            fact = self._store.nearest(asked)
            name = fact.answer if fact.answers(asked) else self._answer(self._with_fact(asked))
        return self._with_fact(steps[-1].replace(SLOT, name))

    def _with_fact(self, question: str) -> str:
        fact = self._store.nearest(question)
        told = f"New Fact: {fact.sentence}\nPrompt: "
        return told + question if fact.concerns(question) else question

    def _answer(self, question: str) -> str:
        return answer_text(self._continued(question, ()))

    def _continued(self, text: str, stops: tuple[str, ...]) -> str:
        """What the base model writes behind a text: up to a stop, or a sentence without any."""
        if (text, stops) not in self._written:
            options = {"stop_strings": list(stops)} if stops else {"stop_at_sentence": True}
            new = self._base.generate([text], self._plan.max_new_tokens, 1, **options)
            self._written[text, stops] = new[0]
        return self._written[text, stops]

    # ---- a scratchpad of the model's own

    def _scratchpad(self, question: str, fits: Callable[[str], bool]) -> str:
        """The scratchpad, up to where the answer follows."""
        plan, store = self._plan, self._store
        return transcript(
            question,
            self._go_on,
            lambda asked: store.nearest(asked).sentence,
            plan.hops,
            plan.demonstrations,
            fits,
        )

    def _go_on(self, text: str, stops: Sequence[str]) -> tuple[str, str]:
        new = self._continued(text, tuple(stops))
        places = [(new.find(stop), stop) for stop in stops if stop in new]
        at, stop = min(places, default=(len(new), ""))
        return new[:at], stop
