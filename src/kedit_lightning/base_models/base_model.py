"""The language model that is edited, with its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.batching import Batching, embedded_tokens
from kedit_lightning.base_models.blocks import naming_inputs
from kedit_lightning.base_models.fingerprint import ModelIdentity
from kedit_lightning.base_models.finiteness import check_finite_weights, checked_lengths
from kedit_lightning.base_models.generation import continuations
from kedit_lightning.base_models.layout import Layout
from kedit_lightning.base_models.rows import (
    EncodedRow,
    ImageEncoder,
    PaddingSide,
    RowEncoder,
    TokenRows,
    pad_encoder_decoder_rows,
    pad_rows,
)
from kedit_lightning.base_models.spec import BaseModelSpec, load_pretrained, longest_row
from kedit_lightning.base_models.taps import gathering
from kedit_lightning.base_models.text_inputs import call_parameters, language_part, refuse_one_text
from kedit_lightning.base_models.visual_features import VisualFeatures
from kedit_lightning.chat_turns import prompt_text
from kedit_lightning.decoding_settings import Generation, generation_config, neutral_options
from kedit_lightning.edits import EditStack, plain_model
from kedit_lightning.edits.adapter_state import model_inside
from kedit_lightning.edits.projections import compute_dtype, expert_projection
from kedit_lightning.edits.weight_storage import device_of, must_stay
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.image_reference import Image, references


class BaseModel:
    """A Hugging Face language model and its tokenizer, frozen, with a stack of edits.

    A model has one stack: a second base model on it, or on a copy of an edited one, takes over the
    edits that it carries.  One model serves one thread at a time; others wait for their turn.

    Args:
        model: The model; it is put into evaluation mode and its weights are frozen.  What
            ``torch.compile(model)`` returned is unwrapped, and so is a ``PeftModel``; its adapters
            stay in force.
        tokenizer: Its tokenizer.
        name: Name in reports; taken from the model's configuration if not given.
        chat: Put prompts into the user turn of the tokenizer's chat template.
        padding_side: Side of padding when rows are scored; it never changes a result.
        processor: Processor of a vision-language model, as ``AutoProcessor`` loads it.

    Raises:
        UnsupportedUseError: It needs more than token ids, or a part of it is a base model already.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str | None = None,
        chat: bool = False,
        padding_side: PaddingSide = "right",
        processor: Any = None,
    ) -> None:
        whole = model_inside(plain_model(model))
        model = language_part(whole)
        config = whole.config
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.name: str = name or getattr(config, "_name_or_path", "") or config.model_type
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.padding_side: PaddingSide = padding_side
        self.edits = EditStack.of(model)
        self.identity = ModelIdentity(model)
        images = None if processor is None else ImageEncoder(processor)
        self.encoder, taken = RowEncoder(tokenizer, chat, images), call_parameters(model)
        self.sight = VisualFeatures(whole, model, images, taken)
        self.layout = Layout(model)
        #: Which rows it may read together.
        self.batching = Batching(self)
        #: Whether its ``forward`` takes ``position_ids``.
        self.takes_positions = "position_ids" in taken
        #: Whether its passes can start in the middle; ``None`` until ``can_resume`` has tried.
        self.resumes: bool | None = None
        self.edits.adopt(self)

    @classmethod
    def load(cls, source: str | PathLike[str] | BaseModelSpec, **options: Any) -> BaseModel:
        """Load a base model.

        Args:
            source: Name on the hub, a folder, ``nano``, or a complete specification.
            **options: Fields of :class:`BaseModelSpec`, such as ``dtype="bfloat16"``.

        Raises:
            BaseModelNotFoundError: There is no such model.
        """
        given = source if isinstance(source, BaseModelSpec) else BaseModelSpec(fspath(source))
        spec = replace(given, **options)
        base = cls(**load_pretrained(spec), name=spec.name)
        base.revision = base.revision or spec.revision
        return base

    # ---- properties

    @property
    def device(self) -> torch.device:
        """Device that its first weights are computed with."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer go to different stacks of blocks."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def is_placed(self) -> bool:
        """Whether its weights must stay where they are: quantised, spread or offloaded."""
        return must_stay(self.model)

    def to(self, device: torch.device | str) -> BaseModel:
        """Move it, unless its weights must stay where they are."""
        if not self.is_placed:
            self.model.to(device)
            self.sight.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """Short hash of configuration and a sample of the weights, as they are now."""
        self.edits.check_alone()
        return self.identity.fingerprint

    @property
    def full_fingerprint(self) -> str:
        """Short hash of configuration and all weights; see :mod:`~.fingerprint` for its cost."""
        return self.fingerprints[1]

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Both of these; refused while the model carries edits that are not on the stack."""
        self.edits.check_alone()
        return self.identity.fingerprints

    @property
    def weights_fingerprint(self) -> str:
        """Short hash of its checkpoint, equal in every precision: :mod:`~.source_checkpoint`."""
        self.edits.check_alone()
        return self.identity.weights_fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """Short hash of the tokenizer."""
        return self.identity.of_tokenizer(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Id put where there is no token; masked, so any id serves that has an embedding."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        entries = embedded_tokens(self.model)
        return next(int(id) for id in ids if id is not None and id < entries)

    @cached_property
    def max_tokens(self) -> int:
        """Longest row it can take; asked for each row that is encoded."""
        return longest_row(self.model.config)

    def module(self, name: str) -> nn.Module:
        """The module with a dotted name, which may be that of an expert's projection."""
        return expert_projection(self.model, name) or self.model.get_submodule(name)

    def check_finite(self) -> None:
        """Check that all weights are finite.

        Raises:
            NonFiniteError: A weight is NaN or infinite; the message names the tensor.
        """
        check_finite_weights(self.model, self.name)

    # ---- rows

    def rows(
        self,
        prompts: Sequence[str],
        answers: Sequence[str | None] | None = None,
        subjects: Sequence[str | None] | None = None,
        padding_side: PaddingSide | None = None,
        images: Sequence[Image | None] | None = None,
    ) -> TokenRows:
        """Pad the rows of :meth:`encode`.

        Args:
            prompts: The prompts.
            answers: The text that follows each of them.
            subjects: The part of each prompt that the fact is about.
            padding_side: Side of padding; that of the base model if not given.
            images: Reference to the picture that each prompt is about, or several.
        """
        refuse_one_text(prompts)
        absent = [None] * len(prompts)
        columns = (prompts, answers or absent, subjects or absent, images or absent)
        encoded = [self.encode(*row) for row in zip(*columns, strict=True)]
        return self.pad(encoded, padding_side)

    def pad(
        self, encoded: Sequence[EncodedRow], padding_side: PaddingSide | None = None
    ) -> TokenRows:
        """Align and pad rows that are tokens already, and add the pixels of their pictures."""
        pad_id, entries = self.pad_id, embedded_tokens(self.model)
        for row in encoded:
            self.encoder.check_ids(row, entries, self.name)
        if self.is_encoder_decoder:
            start, suffix = self.model.config.decoder_start_token_id, self.encoder.suffix
            rows = pad_encoder_decoder_rows(encoded, pad_id, start, suffix, self.device)
        else:
            side = padding_side or self.padding_side
            lengths = checked_lengths(self.model, self.name, encoded)
            if side == "left" and len(lengths) > 1:  # behind the tokens, padding does no harm
                side = "left" if self.batching.reads_mask else "right"
            rows = pad_rows(encoded, pad_id, side, self.takes_positions, self.device)
        return self.sight.added(rows, encoded, self)

    def encode(
        self,
        prompt: str,
        answer: str | None = None,
        subject: str | None = None,
        image: Image | None = None,
    ) -> EncodedRow:
        """Tokenise one row, its prompt rewritten by prompt edits on the stack.

        Raises:
            InvalidRequestError: It is longer than the model allows, or lacks its subject.
            UnsupportedUseError: It has a picture, and the base model no processor.
        """
        images, prompt = references(image), prompt_text(prompt)
        reserve = 32 if answer is None else self.encoder.count(answer) + 2
        rendered = self.edits.render(
            prompt,
            lambda text: self.max_tokens - reserve - self.encoder.count_prompt(text, images),
            images,
        )
        row = self.encoder.encode(rendered, answer, subject, images)
        self.encoder.check_ids(row, embedded_tokens(self.model), self.name)
        length = len(row.prompt) + len(row.answer)
        if length > self.max_tokens:
            raise InvalidRequestError(
                f"prompt {prompt[:60]!r} takes {length} tokens with its answer, and base model "
                f"'{self.name}' takes at most {self.max_tokens}; shorten it"
            )
        return row

    def picture_vector(self, images: Sequence[str]) -> tuple[float, ...]:
        """What it sees of pictures, as a vector of length 1."""
        return self.sight.vector(images, self)

    # ---- answers

    def forward(self, rows: TokenRows, **options: Any) -> Any:
        """Run the model on rows; memory edits learn where the prompts end."""
        ends, shown = self.edits.prompts_end_at(rows.prompt_end, True), self.sight.embedded(rows)
        with ends, naming_inputs(self.model, self.edits), shown:
            return self.model(**{**rows.call, "use_cache": False, **options})

    def answer_logits(self, rows: TokenRows) -> Tensor:
        """Logits that predict the answer tokens. Shape ``[batch, width, vocab]``."""
        return self.logits_at(rows, rows.answer_columns)

    def logits_at(self, rows: TokenRows, columns: Tensor, **options: Any) -> Tensor:
        """Logits ``[batch, width, vocab]`` at some columns ``[batch, width]`` of each row."""
        at = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
        flat = self.logits_of(rows, (at.flatten(), columns.flatten()), **options)
        return flat.reshape(*columns.shape, -1)

    def logits_of(self, rows: TokenRows, places: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """Logits ``[n, vocab]`` at single places; the vocabulary projection runs on these only.

        Args:
            rows: The rows.
            places: Row and column of each place. Shape ``[n]`` each.
            **options: Passed to the model.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return self.forward(rows, **options).logits[places]  # type: ignore[no-any-return]
        with self.edits.logits_stand_at(places), gathering(head, places):
            return self.forward(rows, **options).logits[0]  # type: ignore[no-any-return]

    def answer_log_probs(self, rows: TokenRows) -> Tensor:
        """Log-probability of each answer token, in at least float32. Shape ``[batch, width]``.

        It is 0 on padding.
        """
        logits = self.answer_logits(rows)
        logits = logits.to(compute_dtype(logits.dtype))
        chosen = logits.log_softmax(-1).gather(-1, rows.answer_ids[..., None])[..., 0]
        return chosen * rows.answer_mask

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        batch_size: int = 32,
        stop_at_sentence: bool = False,
        images: Sequence[Image | None] | None = None,
        generation: Generation = "greedy",
        **options: Any,
    ) -> list[str]:
        """Continue prompts, greedily unless ``options`` say otherwise; prompts are not repeated.

        What the generation config of the model adds (penalties, beams, bans, forced tokens) is set
        aside; its end-of-sequence tokens are kept.

        Args:
            prompts: The prompts.
            max_new_tokens: Longest continuation.
            batch_size: Prompts answered together; it never changes an answer.
            stop_at_sentence: End once every row has ended a line or a sentence.
            images: Reference to the picture that each prompt is about, or several.
            generation: ``model`` lets the generation config act, except for sampling.
            **options: Passed to ``transformers``' ``generate``.
        """
        refuse_one_text(prompts)
        pictures = images or [None] * len(prompts)
        encoded = [self.encode(p, image=i) for p, i in zip(prompts, pictures, strict=True)]
        neutral = neutral_options(generation_config(self.model), generation)
        settings = {**neutral, "max_new_tokens": max_new_tokens, **options}
        return continuations(self, encoded, batch_size, stop_at_sentence, settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseModel:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.edits.adopt(twin, silently=True)
        return twin

    def __repr__(self) -> str:
        return f"BaseModel({self.name!r}, {self.model.config.model_type}, {len(self.edits)} edits)"
