"""Requests of lm-evaluation-harness, answered by a base model under the edits that are applied.

Prompts go through the base model's own rows, so that edits of every kind act: hooks on weights,
memories that look where a prompt ends, and edits that rewrite prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.batching import logit_batches
from kedit_lightning.base_models.generation import continuations
from kedit_lightning.decoding_settings import generation_config, neutral_options
from kedit_lightning.errors import MissingExtraError, UnsupportedUseError
from kedit_lightning.metrics.functional import exact_match, widened

#: Longest free answer where a task names none, as in the harness.
_LONGEST = 256


class RequestAnswers:
    """Log-likelihoods and free answers of a base model as it stands.

    Args:
        base: The base model.
        batch_size: Rows of a forward pass; it changes no answer.
    """

    def __init__(self, base: BaseModel, batch_size: int = 16) -> None:
        self.base, self.batch_size = base, batch_size

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation of a context, and whether it is the greedy one."""
        return self._scored([self._row(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length.

        There is no prompt in it, so edits of prompts do not act. Windows are a token shorter than
        the harness's own, so texts longer than the model's window differ slightly.
        """
        rows = [list(self._windows(text)) for text in texts]
        return [sum(value for value, _ in self._scored(windows)) for windows in rows]

    def generated(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Greedy continuations of contexts up to one of the texts that end them.

        Raises:
            UnsupportedUseError: A task wants sampled answers, whose score would not repeat.
        """
        texts: dict[int, str] = {}
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, (_, options) in enumerate(asked):
            if options.get("do_sample"):
                raise UnsupportedUseError(
                    "a task asks for sampled answers (do_sample), whose score would not repeat; "
                    "take a task with greedy answers, or set do_sample: false in its YAML"
                )
            until = options.get("until") or ()
            ends = (until,) if isinstance(until, str) else tuple(until)
            length = int(options.get("max_gen_toks", _LONGEST))
            groups.setdefault((tuple(filter(None, ends)), length), []).append(index)
        for (ends, length), places in groups.items():
            room = self.base.max_tokens - min(length, self.base.max_tokens // 2)
            shown = (self._shown(asked[at][0], length) for at in places)
            rows = [EncodedRow(self._prompt(text)[-room:], ()) for text in shown]
            options = neutral_options(generation_config(self.base.model))
            options |= {"max_new_tokens": length, **({"stop_strings": list(ends)} if ends else {})}
            answers = continuations(self.base, rows, self.batch_size, False, options)
            for at, answer in zip(places, answers, strict=True):
                stops = [found for end in ends if (found := answer.find(end)) >= 0]
                texts[at] = answer[: min(stops, default=len(answer))]
        return [texts[at] for at in range(len(asked))]

    # ---- rows

    def _shown(self, context: str, room: int) -> str:
        """A context, rewritten by edits of prompts, which leave room for so many more tokens."""
        base, most = self.base, self.base.max_tokens - room
        return base.edits.render(context, lambda text: most - base.encoder.count_prompt(text))

    def _prompt(self, shown: str) -> tuple[int, ...]:
        """Ids of a context as it is shown; that of an empty one begins a text."""
        if not shown:
            return self.base.encoder.prefix or (int(self.base.tokenizer.eos_token_id),)
        return self.base.encoder.encode(shown).prompt

    def _row(self, context: str, continuation: str) -> EncodedRow:
        """Context and continuation, split where the harness splits them."""
        base = self.base
        if base.is_encoder_decoder:
            return base.encode(context, continuation)
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        shown = self._shown(kept, base.encoder.count(continuation)) if kept else ""
        prompt, answer = self._prompt(shown), tuple[int, ...]()
        if shown and not base.encoder.chat:  # tokens at the border are those of the whole text
            answer = base.encoder.encode(shown + continuation).prompt[len(prompt) :]
        answer = answer or self._ids(continuation)
        return EncodedRow(prompt[-max(1, base.max_tokens - len(answer)) :], answer)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _windows(self, text: str) -> Iterator[EncodedRow]:
        """Rows that predict each token of a text once; later ones see as much as fits."""
        ids, most = self._ids(text), self.base.max_tokens - 1
        for start in range(0, len(ids), most):
            end = min(start + most, len(ids))
            before = ids[max(0, end - most - 1) : start] or self._prompt("")[:1]
            yield EncodedRow(before, ids[start:end])

    @torch.no_grad()
    def _scored(self, rows: Sequence[EncodedRow]) -> list[tuple[float, bool]]:
        """Summed log-probability of each answer, and whether all its tokens are arg-max."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda at: (len(rows[at].answer), rows[at].prompt))
        vocabulary = int(self.base.model.config.get_text_config().vocab_size)
        batches = logit_batches(order, lambda at: len(rows[at].answer), vocabulary, self.batch_size)
        for places in batches:
            tokens = self.base.pad([rows[at] for at in places])
            logits = widened(self.base.answer_logits(tokens))  # [batch, width, vocab]
            ids, mask = tokens.answer_ids, tokens.answer_mask
            chosen = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask
            greedy = exact_match(logits.argmax(-1), ids, mask)
            values = zip(chosen.sum(-1).tolist(), greedy.tolist(), strict=True)
            found |= {at: (value, bool(same)) for at, (value, same) in
                      zip(places, values, strict=True)}  # fmt: skip
        return [found[at] for at in range(len(rows))]


def harness() -> Any:
    """The package lm_eval.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtraError(
            "general ability is measured with lm-evaluation-harness: "
            "pip install 'kedit-lightning[ability]'"
        ) from error
    return lm_eval


def harness_model(base: BaseModel, batch_size: int) -> Any:
    """A base model as lm-evaluation-harness takes one."""
    kind: Any = harness().api.model.LM
    answers = RequestAnswers(base, batch_size)

    class EditedModel(kind):  # type: ignore[misc]  # the harness need not be installed
        """Hands requests on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return answers.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return answers.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return answers.generated([request.args for request in requests])

    return EditedModel()
