"""Edits that answer the questions in their scope with a model of their own (SERAC).

The base model runs as ever.  While it reads a prompt, the output of one of its blocks tells which
edit, if any, the question is about.  The logits of rows in scope are then replaced by those of the
counterfactual model; rows out of scope keep the very tensors that the base model gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kedit_lightning.edits.edit import Edit, EditableModel, EditOrigin, check_finite
from kedit_lightning.edits.kinds.codebook.codebook_edit import MemoryEdit
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.edits.projections import first_tensor
from kedit_lightning.edits.row_context import RowContext, copies_of_rows
from kedit_lightning.errors import EditFileError, UnsupportedUseError

_NETWORK = "network."
#: Logit of tokens that are out of the question; sums of many stay finite.
_NEVER = -1e4


@dataclass(frozen=True)
class ScopeEntry:
    """What one fact writes into the memory.

    Args:
        key: Where its prompt lies in the space of comparisons. Shape ``[scope_width]``.
        statement: Token ids that state the fact, the separator included.
        threshold: Similarity above which a question is in scope, between 0 and 1.
    """

    key: Tensor
    statement: tuple[int, ...]
    threshold: float = 0.5


class ScopeEdit(MemoryEdit):
    """Facts of a SERAC memory; all such edits on the stack with equal networks act as one memory.

    The networks are saved with each edit, so that its file needs no other file.

    Args:
        base: The base model.
        networks: Scope classifier and counterfactual model; they must not change any more.
        entries: The facts.
        origin: Where the edit comes from.
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
        for entry in self.entries:
            check_finite("scope key", module, entry.key)

    @cached_property
    def family(self) -> str:
        """What edits must share to form one memory: the networks."""
        return self.networks.digest()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keys as a matrix, the networks, and the statements as plain values."""
        tensors = {"keys": torch.stack([entry.key for entry in self.entries])}
        for name, tensor in self.networks.state_dict().items():
            tensors[_NETWORK + name] = tensor
        return tensors, {
            "plan": self.networks.plan.to_json(),
            "statements": [list(entry.statement) for entry in self.entries],
            "thresholds": [entry.threshold for entry in self.entries],
        }

    @classmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> ScopeEdit:
        """Rebuild networks and entries."""
        plan, keys = ScopePlan(**values["plan"]), tensors["keys"]
        networks = ScopeNetworks(plan, dtype=keys.dtype)
        held = {n.removeprefix(_NETWORK): t for n, t in tensors.items() if n.startswith(_NETWORK)}
        networks.load_state_dict(held)
        entries = [
            ScopeEntry(key, tuple(ids), threshold)
            for key, ids, threshold in zip(
                keys, values["statements"], values["thresholds"], strict=True
            )
        ]
        return cls(base, networks, entries, origin)


class ScopeMemory:
    """What the scope edits of one family do together, as hooks of a base model.

    Args:
        model: The base model.
        edits: The edits of the family, oldest first, each with the rows that it holds for;
            ``None`` for all rows.
        rows: How many rows edits were given for, ``None`` when all edits hold for all rows.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[tuple[ScopeEdit, Sequence[int] | None]],
        rows: int | None,
    ) -> None:
        first = edits[0][0]
        self.module = first.networks.plan.module
        #: Name of its decisions, which mean nothing to a memory of other edits.
        self.name = ":".join((first.family, *(edit.id for edit, _ in edits)))
        self.embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        device = self.embedding.device
        self.networks, self.base = first.networks.to(device), first.base
        entries = [(entry, at) for edit, at in edits for entry in edit.entries]
        self.keys = torch.stack([entry.key.to(device) for entry, _ in entries])
        self.thresholds = self.keys.new_tensor([entry.threshold for entry, _ in entries])
        self.statements = [torch.tensor(entry.statement, device=device) for entry, _ in entries]
        self._allowed: Tensor | None = None
        if rows is not None:
            self._allowed = torch.zeros(rows, len(entries), dtype=torch.bool, device=device)
            for number, (_, at) in enumerate(entries):
                self._allowed[slice(None) if at is None else list(at), number] = True

    # ---- which entry a question is about

    def decide(self, output: Any, context: RowContext) -> None:
        """Hook of the block that is read: note the entry of each row, ``-1`` out of scope."""
        if not context.prefill:
            return
        hidden = first_tensor(output)
        with torch.no_grad():
            index = self.route(self.networks.embed(hidden, _question_mask(context)))
        context.decisions[self.name] = index

    def route(self, questions: Tensor) -> Tensor:
        """Nearest entry of each question, ``-1`` out of scope. ``[batch]`` from ``[batch, d]``."""
        questions = questions.to(self.keys)
        distances = self.networks.distances(questions, self.keys)
        if self._allowed is not None:
            copies = copies_of_rows(len(questions), len(self._allowed))
            allowed = self._allowed.repeat_interleave(copies, dim=0)
            distances = distances.masked_fill(~allowed, torch.inf)
        nearest = distances.min(dim=1).values
        numbers = torch.arange(len(self.keys), device=distances.device)
        # Of facts with equal prompts the newest answers.
        index = torch.where(distances == nearest[:, None], numbers, -1).amax(dim=1)
        return torch.where((-nearest).exp() > self.thresholds[index], index, -1)

    # ---- what the answer is

    def answer(self, output: Any, context: RowContext, places: tuple[Tensor, Tensor] | None) -> Any:
        """Hook of the whole model: put in the counterfactual model's logits.

        Args:
            output: What the model returned.
            context: The rows of the call.
            places: Row and column of each logit, where only some were computed.
        """
        index = context.decisions.get(self.name)
        if index is None or not bool((index >= 0).any()):
            # None where the edit was applied in the middle of an answer.
            return output
        logits = output.logits
        if getattr(output, "loss", None) is not None:
            raise UnsupportedUseError(
                "the model was asked for its loss while an edit answers some rows with another "
                "model; compute the loss from the logits, or roll the edit back"
            )
        rows, columns = places if places is not None else self._all_places(logits, context)
        rows, columns = rows.to(index.device), columns.to(index.device)
        # Logits inside the prompt stay: the question is not yet known there.
        wanted = (index[rows] >= 0) & (columns >= context.prompt_end.to(index.device)[rows])
        if not bool(wanted.any()):
            return output
        new = logits.reshape(-1, logits.shape[-1]).clone()
        logits_of = self._named if self.networks.plan.own_tokens else self._logits
        own = logits_of(context, index, rows[wanted], columns[wanted])
        # A vocabulary may be padded; what the other model has no token for is out of the question.
        kept = min(own.shape[-1], new.shape[-1])
        at = wanted.to(new.device)
        new[at] = _NEVER
        new[at, :kept] = own[:, :kept].to(new)
        output["logits"] = new.reshape(logits.shape)
        return output

    @staticmethod
    def _all_places(logits: Tensor, context: RowContext) -> tuple[Tensor, Tensor]:
        """Places of logits ``[batch, kept, vocab]``: the last ``kept`` columns of each row."""
        batch, kept = logits.shape[:2]
        width = _read_tokens(context.token_ids, context.token_mask)[0].shape[1]
        columns = torch.arange(width - kept, width)
        return torch.arange(batch).repeat_interleave(kept), columns.repeat(batch)

    @torch.no_grad()
    def _logits(self, context: RowContext, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at places of rows in scope. Shape ``[n, vocab]``; rows and columns ``[n]``."""
        ids, attended, first_column = _text_of(context, index.device)
        hits = rows.unique()
        texts, first = [], torch.zeros(len(index), dtype=torch.long, device=index.device)
        for row in hits.tolist():
            statement = self.statements[int(index[row])]
            texts.append(torch.cat([statement, ids[row][attended[row]]]))
            first[row] = len(statement) - 1
        # A token's place among the attended ones of its row, behind the statement.
        place = first[:, None] + attended.cumsum(1)
        number = torch.zeros_like(first).index_copy(0, hits, torch.arange(len(hits)).to(hits))
        at = number[rows], place[rows, columns + first_column]
        return self.networks.answer_logits(
            pad_sequence(texts, batch_first=True), at, self.embedding
        )

    @torch.no_grad()
    def _named(self, context: RowContext, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits that name the tokens of answers which the other model gave as text.

        They are those of a choice, not of a distribution. Named is the token that the answer has
        at a place, whatever was written before it, and behind the answer its end.

        Returns:
            Shape ``[n, vocab]``.
        """
        answers = context.decisions.get(f"{self.name}/answer")
        if answers is None:
            answers = self._answers(context, index)
            context.decisions[f"{self.name}/answer"] = answers
        step = columns - context.prompt_end.to(columns.device)[rows]
        ids = answers[rows, step.clamp(max=answers.shape[1] - 1)]
        named = torch.full((len(ids), len(self.embedding)), _NEVER, device=ids.device)
        return named.scatter(1, ids[:, None], 0.0)

    def _answers(self, context: RowContext, index: Tensor) -> Tensor:
        """Answers to the questions of rows in scope, in tokens of the base model.

        Shape ``[batch, longest]``, filled up with the end-of-sequence token.
        """
        model, base = self.networks.decoder, self.base
        assert isinstance(model, LanguageModel)
        ids = context.question_ids if context.has_encoder else context.token_ids
        mask = _question_mask(context)
        assert ids is not None
        hits = (index >= 0).nonzero()[:, 0].tolist()
        asked = [
            base.tokenizer.decode(ids[row][mask[row].to(ids.device)], skip_special_tokens=True)
            for row in hits
        ]
        reader = base.encoder.of(model.tokenizer)
        found = model.answers(
            [
                [*self.statements[int(index[row])].tolist(), *reader.encode(question).prompt]
                for row, question in zip(hits, asked, strict=True)
            ]
        )
        end = base.tokenizer.eos_token_id
        told = [
            [*base.encoder.encode(question, answer).answer] if answer else []
            for question, answer in zip(asked, found, strict=True)
        ]
        fill = 0 if end is None else int(end)
        answers = index.new_full((len(index), max(map(len, told)) + 1), fill)
        for row, tokens in zip(hits, told, strict=True):
            answers[row, : len(tokens)] = index.new_tensor(tokens)
        return answers


def _question_mask(context: RowContext) -> Tensor:
    """Tokens of the question, ``[batch, tokens]``: in a decoder, those up to the prompt's end."""
    if context.has_encoder:
        return _read_tokens(context.question_ids, context.question_mask)[1]
    mask = _read_tokens(context.token_ids, context.token_mask)[1]
    columns = torch.arange(mask.shape[1], device=mask.device)
    return mask & (columns <= context.prompt_end.to(mask.device)[:, None])


def _text_of(context: RowContext, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Question and answer as one text, without the start token of a decoder with an encoder.

    Returns:
        Token ids and where they are no padding, ``[batch, tokens]`` each, and the place of the
        decoder's first column among them.
    """
    ids, mask = (t.to(device) for t in _read_tokens(context.token_ids, context.token_mask))
    if not context.has_encoder:
        return ids, mask, 0
    question, asked = (
        t.to(device) for t in _read_tokens(context.question_ids, context.question_mask)
    )
    columns = torch.arange(mask.shape[1], device=device)
    mask = mask & (columns > context.prompt_end.to(device)[:, None])
    return torch.cat([question, ids], 1), torch.cat([asked, mask], 1), question.shape[1]


def _read_tokens(ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if ids is None or mask is None:
        raise UnsupportedUseError(
            "the model was called with embeddings in place of token ids while an edit answers by "
            "the tokens of a question; call it with input_ids, or roll the edit back"
        )
    return ids, mask


def scope_memories(
    model: nn.Module, edits: Sequence[Edit], carried: Sequence[Edit | None]
) -> list[ScopeMemory]:
    """The memories that edits of the stack, and those that rows carry, make up."""
    found: list[tuple[ScopeEdit, list[int] | None]] = [
        (part, None) for edit in edits for part in edit.parts() if isinstance(part, ScopeEdit)
    ]
    for edit in dict.fromkeys(edit for edit in carried if edit is not None):
        rows = [row for row, other in enumerate(carried) if other is edit]
        found += [(part, rows) for part in edit.parts() if isinstance(part, ScopeEdit)]
    families: dict[str, list[tuple[ScopeEdit, list[int] | None]]] = {}
    for part, at in found:
        families.setdefault(part.family, []).append((part, at))
    count = len(carried) if any(at is not None for _, at in found) else None
    return [ScopeMemory(model, members, count) for members in families.values()]
