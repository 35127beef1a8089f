"""Edits that answer the questions in their scope with a model of their own (SERAC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import ChangeLogits, Effect, Places, ReadStates
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.rounding import indistinct, state_rounding
from kedit_lightning.edits.row_context import RowContext, copies_of_rows
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.edits.weight_storage import loaded
from kedit_lightning.errors import EditFileError, UnsupportedUseError

_NETWORK = "network."
#: Logit of tokens that are excluded; sums of many stay finite.
_NEVER = -1e4


class _Values(TypedDict):
    plan: ScopePlan
    statements: list[list[int]]
    thresholds: list[float]


@dataclass(frozen=True)
class ScopeEntry:
    """A fact of the memory.

    Args:
        key: Its embedded prompt. Shape ``[scope_width]``.
        statement: Token ids that state the fact, the separator included.
        threshold: Similarity above which a question is in scope, between 0 and 1.
    """

    key: Tensor
    statement: tuple[int, ...]
    threshold: float = 0.5


class ScopeEdit(MemoryEdit):
    """Facts of a SERAC memory; all applied edits with equal networks form one memory.

    The output of one block of the base model tells which fact, if any, a question is about.  The
    logits of rows in scope are replaced by those of the counterfactual model.  The networks are
    saved with each edit, and must not be trained further.
    """

    kind: ClassVar[str] = "scope"

    def __init__(
        self,
        base: EditableModel,
        networks: ScopeNetworks,
        entries: Sequence[ScopeEntry],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.networks = networks.requires_grad_(False).eval()
        self.entries = tuple(entries)
        module = networks.plan.module
        if module not in dict(base.model.named_modules()):
            raise EditFileError(
                f"a scope edit reads the block '{module}', which '{base.name}' does not have"
            )
        decoder, width = self.networks.decoder, networks.plan.token_width
        own = decoder.model if isinstance(decoder, LanguageModel) else None
        if own is None and width != self.embedding.shape[1]:
            raise EditFileError(
                f"a counterfactual model of width {width} cannot read the token embeddings of "
                f"'{base.name}', which are {self.embedding.shape[1]} wide"
            )
        tokens = len(self.embedding if own is None else own.get_input_embeddings().weight)
        for entry in self.entries:
            check_finite("scope key", module, entry.key)
            if not entry.statement or not all(0 <= token < tokens for token in entry.statement):
                raise EditFileError(f"a statement must be ids of tokens below {tokens}")

    @cached_property
    def family(self) -> str:
        """The memory that this edit is part of: the hash of its networks."""
        return self.networks.digest()

    @property
    def embedding(self) -> Tensor:
        """Token embeddings of the base model. Shape ``[vocab, token_width]``."""
        module: Any = self.base.model.get_input_embeddings()  # type: ignore[operator]
        with loaded(module):
            return module.weight  # type: ignore[no-any-return]

    def effects(self) -> Sequence[Effect]:
        """The routing of questions at a block, and the answers to those in scope."""
        return [
            ReadStates(self.networks.plan.module, self.family, ScopeRouter, self),
            ChangeLogits(self.family, ScopeAnswers, self),
        ]

    def state(self) -> tuple[Tensors, Values]:
        """Keys as a matrix, the networks, and the statements as plain values."""
        networks = {_NETWORK + name: t for name, t in self.networks.state_dict().items()}
        return {"keys": torch.stack([entry.key for entry in self.entries]), **networks}, {
            "plan": asdict(self.networks.plan),
            "statements": [list(entry.statement) for entry in self.entries],
            "thresholds": [entry.threshold for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> ScopeEdit:
        """Rebuild networks and entries."""
        check_value("the edit", values, _Values)
        networks = [name for name in tensors if name.startswith(_NETWORK)]
        check_names("the edit", tensors, ["keys", *networks])
        weights = {name.removeprefix(_NETWORK): tensors[name] for name in networks}
        plan, keys, count = ScopePlan(**values["plan"]), tensors["keys"], len(values["statements"])
        if not count == len(values["thresholds"]) > 0:
            raise EditFileError(
                f"a memory of {count} statements and {len(values['thresholds'])} thresholds"
            )
        check_tensor("keys", keys, (count, plan.scope_width), FULL_PRECISION)
        statements = [tuple(ids) for ids in values["statements"]]
        rows = zip(keys, statements, values["thresholds"], strict=True)
        entries = [ScopeEntry(*row) for row in rows]
        return cls(base, ScopeNetworks.restored(plan, weights, keys.dtype), entries, origin)


def _decision_name(edits: Sequence[ScopeEdit]) -> str:
    """Name of a memory's decisions; a memory of other edits ignores them."""
    return ":".join((edits[0].family, *(edit.id for edit in edits)))


class ScopeRouter:
    """Decides during prefill which entry of a family, if any, each row's question is about.

    ``carriers`` are the rows that carry each edit, ``[rows, edits]``; ``None`` if all rows do.
    """

    def __init__(self, edits: Sequence[ScopeEdit], carriers: Tensor | None) -> None:
        self._name = _decision_name(edits)
        device = edits[0].embedding.device
        self._networks = edits[0].networks.to(device)
        self._rounding = state_rounding(edits[0].base.dtype)
        entries = [entry for edit in edits for entry in edit.entries]
        self.keys = torch.stack([entry.key.to(device) for entry in entries])
        self.thresholds = self.keys.new_tensor([entry.threshold for entry in entries])
        self._carriers: Tensor | None = None
        if carriers is not None:
            counts = torch.tensor([len(edit.entries) for edit in edits])
            self._carriers = carriers.repeat_interleave(counts, dim=1).to(device)

    def __call__(self, hidden: Tensor, context: RowContext) -> None:
        """Store the entry of each row, from the output ``[batch, tokens, hidden_width]``."""
        if not context.prefill:
            return
        with torch.no_grad():
            index = self.route(self._networks.embed(hidden, _question_mask(context)))
        context.decisions[self._name] = index

    def route(self, questions: Tensor) -> Tensor:
        """Index of the nearest entry of each embedded question, ``-1`` out of scope.

        Shape ``[batch]`` from ``[batch, scope_width]``.
        """
        questions = questions.to(self.keys)
        distances = self._networks.distances(questions, self.keys)
        if self._carriers is not None:
            copies = copies_of_rows(len(questions), len(self._carriers))
            carriers = self._carriers.repeat_interleave(copies, dim=0)
            distances = distances.masked_fill(~carriers, torch.inf)
        nearest, at = distances.min(dim=1)
        numbers = torch.arange(len(self.keys), device=distances.device)
        # Of facts with equal prompts the newest answers; rounding may tell their keys apart.
        between = self._networks.distances(self.keys[at], self.keys).sqrt()
        equal = indistinct(between, self.keys, self._rounding) & distances.isfinite()
        index = torch.where(equal, numbers, -1).amax(dim=1)
        return torch.where((-nearest).exp() > self.thresholds[index], index, -1)


class ScopeAnswers:
    """Replaces the logits of rows in scope by those of the counterfactual model."""

    def __init__(self, edits: Sequence[ScopeEdit]) -> None:
        self._name = _decision_name(edits)
        self._base, self._embedding = edits[0].base, edits[0].embedding
        device = self._embedding.device
        self._networks = edits[0].networks.to(device)
        entries = [entry for edit in edits for entry in edit.entries]
        self._statements = [torch.tensor(entry.statement, device=device) for entry in entries]

    def __call__(self, logits: Tensor, places: Places, context: RowContext) -> Tensor:
        """New logits ``[n, vocab]``; the same tensor if no row is in scope."""
        index = context.decisions.get(self._name)
        if index is None or not bool((index >= 0).any()):
            # None where the edit was applied in the middle of an answer.
            return logits
        rows, columns = places.rows.to(index.device), places.columns.to(index.device)
        # Logits inside the prompt stay: the question is not yet complete there.
        wanted = (index[rows] >= 0) & (columns >= context.prompt_end.to(index.device)[rows])
        if not bool(wanted.any()):
            return logits
        logits_of = self._text_logits if self._networks.plan.own_tokens else self._logits
        answers = logits_of(context, index, rows[wanted], columns[wanted])
        # A vocabulary may be padded; tokens that the other model does not have are excluded.
        kept = min(answers.shape[-1], logits.shape[-1])
        new, at = logits.clone(), wanted.to(logits.device)
        new[at] = _NEVER
        new[at, :kept] = answers[:, :kept].to(new)
        return new

    @torch.no_grad()
    def _logits(self, context: RowContext, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at places of rows in scope. Shape ``[n, vocab]``; rows and columns ``[n]``."""
        ids, attended, first_column = _text(context, index.device)
        hits = rows.unique()
        texts, first = [], torch.zeros(len(index), dtype=torch.long, device=index.device)
        for row in hits.tolist():
            statement = self._statements[int(index[row])]
            texts.append(torch.cat([statement, ids[row][attended[row]]]))
            first[row] = len(statement) - 1
        # A token's place among the attended ones of its row, behind the statement.
        place = first[:, None] + attended.cumsum(1)
        number = torch.zeros_like(first).index_copy(0, hits, torch.arange(len(hits)).to(hits))
        at = number[rows], place[rows, columns + first_column]
        return self._networks.answer_logits(
            pad_sequence(texts, batch_first=True), at, self._embedding
        )

    @torch.no_grad()
    def _text_logits(
        self, context: RowContext, index: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Logits ``[n, vocab]`` of answers that a model with its own tokenizer gave as text.

        They express a choice, not a distribution: the token that the answer has at each place,
        whatever was generated before it, and the end-of-sequence token behind the answer.
        """
        answers = context.decisions.get(f"{self._name}/answer")
        if answers is None:
            answers = self._answers(context, index)
            context.decisions[f"{self._name}/answer"] = answers
        step = columns - context.prompt_end.to(columns.device)[rows]
        ids = answers[rows, step.clamp(max=answers.shape[1] - 1)]
        logits = torch.full((len(ids), len(self._embedding)), _NEVER, device=ids.device)
        return logits.scatter(1, ids[:, None], 0.0)

    def _answers(self, context: RowContext, index: Tensor) -> Tensor:
        """Answers in tokens of the base model, ``[batch, longest]``, filled up with the last."""
        model, base = self._networks.decoder, self._base
        assert isinstance(model, LanguageModel)
        ids = context.question_ids if context.has_encoder else context.token_ids
        mask = _question_mask(context)
        assert ids is not None
        hits = (index >= 0).nonzero()[:, 0].tolist()
        questions = [
            base.tokenizer.decode(ids[row][mask[row].to(ids.device)], skip_special_tokens=True)
            for row in hits
        ]
        encoder = base.encoder.of(model.tokenizer)
        statements = [self._statements[i].tolist() for i in index[hits].tolist()]
        prompts = zip(statements, questions, strict=True)
        texts = model.answers([[*fact, *encoder.encode(text).prompt] for fact, text in prompts])
        pairs = zip(questions, texts, strict=True)
        encoded = [base.encoder.encode(*pair).answer if pair[1] else () for pair in pairs]
        end = base.tokenizer.eos_token_id
        fill = 0 if end is None else int(end)
        answers = index.new_full((len(index), max(map(len, encoded)) + 1), fill)
        for row, tokens in zip(hits, encoded, strict=True):
            answers[row, : len(tokens)] = index.new_tensor(tokens)
        return answers


def _question_mask(context: RowContext) -> Tensor:
    """Mask of the question, ``[batch, tokens]``: in a decoder, tokens up to the prompt's end."""
    if context.has_encoder:
        return _known_tokens(context.question_ids, context.question_mask)[1]
    mask = _known_tokens(context.token_ids, context.token_mask)[1]
    columns = torch.arange(mask.shape[1], device=mask.device)
    return mask & (columns <= context.prompt_end.to(mask.device)[:, None])


def _text(context: RowContext, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Question and answer as one text, without the start token of a decoder with an encoder.

    Token ids and their mask, ``[batch, tokens]`` each, and the column where the decoder starts.
    """
    ids, mask = (t.to(device) for t in _known_tokens(context.token_ids, context.token_mask))
    if not context.has_encoder:
        return ids, mask, 0
    question, asked = (
        t.to(device) for t in _known_tokens(context.question_ids, context.question_mask)
    )
    columns = torch.arange(mask.shape[1], device=device)
    mask = mask & (columns > context.prompt_end.to(device)[:, None])
    return torch.cat([question, ids], 1), torch.cat([asked, mask], 1), question.shape[1]


def _known_tokens(ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if ids is None or mask is None:
        raise UnsupportedUseError(
            "the model was called with embeddings in place of token ids while an edit answers by "
            "the tokens of a question; call it with input_ids, or roll the edit back"
        )
    return ids, mask
