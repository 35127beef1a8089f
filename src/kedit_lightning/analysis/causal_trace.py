"""Causal tracing (Meng et al. 2022, arXiv 2202.05262, section 2): which states recall a fact.

Noise on the embeddings of the subject makes the model lose the answer. Hidden states of the clean
run are then restored, one layer and token at a time; the probability of the answer that returns is
the indirect effect of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.taps import Visit, capture, visiting
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics.functional import widened

#: Which states are restored: outputs of whole blocks, of their MLPs, or of their attention.
TraceKind: TypeAlias = Literal["block", "mlp", "attention"]

#: MLPs and attention are restored in 10 layers of 48 together, as in the paper.
_PART_WINDOW = 10 / 48


@dataclass(frozen=True)
class Trace:
    """Probability of an answer with hidden states of the clean run restored."""

    prompt: str
    tokens: tuple[str, ...]  # of the prompt, as text, those that a prompt edit adds included
    subject: tuple[int, int]  # indices of the subject's first and last token
    answer: str  # the token whose probability is measured, as text
    kind: TraceKind  # which states were restored
    window: int  # how many layers at a time, the named one in their middle
    high: float  # probability in the clean run
    low: float  # probability under noise, mean over its samples
    restored: Tensor  # mean over the samples, [layers, tokens], float64, on the CPU

    @property
    def effect(self) -> Tensor:
        """Indirect effect: restored minus corrupted probability. Shape ``[layers, tokens]``."""
        return self.restored - self.low

    @property
    def best_layer(self) -> int:
        """Layer with the largest effect at the subject's last token, where facts are edited."""
        return int(self.effect[:, self.subject[1]].argmax())

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, with the effects layer by layer."""
        tensors = {"restored": self.restored.tolist(), "effect": self.effect.tolist()}
        return {**vars(self), **tensors, "best_layer": self.best_layer}


@dataclass(frozen=True)
class Patch:
    """Hidden states that are restored together: those of layers, from 0, at prompt positions."""

    layers: range
    tokens: range


class Tracer:
    """One prompt, run under noise with hidden states of its clean run restored.

    The noise is drawn once and is the same for every patch, so that patches compare. Edits that are
    applied stay applied: the model is traced as it stands.

    Args:
        base: The base model.
        prompt: The prompt.
        subject: Part of the prompt whose embeddings get the noise.
        answer: Text whose first token is measured; the model's own greedy answer if not given.
        kind: Which states are restored: outputs of a ``block``, its ``mlp`` or its ``attention``.
        noise: Standard deviation of the noise, as a multiple of that of all numbers in the
            embeddings of the subject's tokens.
        samples: How often noise is drawn.
        seed: Seed of the noise.
        batch_size: Rows of a forward pass; it never changes a result.

    Raises:
        UnsupportedUseError: The model has an encoder, or a setting is out of range.
        InvalidRequestError: The subject is not in the prompt.
        ModuleNotLocatedError: The model has no blocks, or no dense MLP for the kind ``mlp``.
    """

    @torch.no_grad()
    def __init__(
        self,
        base: BaseModel,
        prompt: str,
        subject: str,
        answer: str | None = None,
        kind: TraceKind = "block",
        noise: float = 3.0,
        samples: int = 10,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        _check(base, kind, noise, {"samples": samples, "batch_size": batch_size})
        row = base.encode(prompt, answer, subject)
        self.base = base
        self.row: EncodedRow = replace(row, answer=())
        self.names = _states(base, kind)
        self._batch_size = batch_size
        names: dict[nn.Module, str] = {module: name for name, module in base.model.named_modules()}
        self._embedding = names[base.model.get_input_embeddings()]
        rows = base.pad([self.row])
        with capture(base.model, [self._embedding, *self.names]) as seen:
            logits = widened(base.logits_at(rows, rows.prompt_end[:, None]))[0, 0]
        #: Id of the token that is measured.
        self.token: int = row.answer[0] if row.answer else int(logits.argmax())
        #: Probability of it in the clean run.
        self.high: float = float(logits.softmax(-1)[self.token])
        self._clean = [seen.outputs[name][0] for name in self.names]  # [tokens, width] each
        # There is one prompt, so rows need no padding: a token's column is its index.
        self._span = slice(self.row.subject_start, self.row.subject_end + 1)
        plain = seen.outputs[self._embedding][0, self._span]
        draws = torch.randn(
            samples, *plain.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double
        )
        scale = noise * float(plain.double().std())
        self._noise = (scale * draws).to(plain)  # [samples, subject tokens, hidden]

    @torch.no_grad()
    def probabilities(self, patches: Sequence[Patch | None]) -> Tensor:
        """Probability of the answer under noise with each patch restored, mean over its samples.

        Shape ``[patches]``, float64, on the CPU. ``None`` is a patch of no state.
        """
        samples = len(self._noise)
        total, batches = len(patches) * samples, []
        for start in range(0, total, self._batch_size):
            rows = range(start, min(start + self._batch_size, total))
            noise = self._noise[[i % samples for i in rows]]
            batches.append(self._pass([patches[i // samples] for i in rows], noise))
        return torch.cat(batches).reshape(len(patches), samples).mean(1)

    def _pass(self, patches: list[Patch | None], noise: Tensor) -> Tensor:
        """One forward pass: row ``i`` has ``noise[i]`` and ``patches[i]``. Shape ``[rows]``."""

        def corrupt(x: Tensor, y: Tensor) -> Tensor:
            y = y.clone()
            y[:, self._span] += noise.to(y)
            return y

        def restore(layer: int) -> Visit:
            def visit(x: Tensor, y: Tensor) -> Tensor:
                y = y.clone()
                for i, patch in enumerate(patches):
                    if patch is not None and layer in patch.layers:
                        tokens = slice(patch.tokens.start, patch.tokens.stop)
                        y[i, tokens] = self._clean[layer][tokens]
                return y

            return visit

        restored = {layer for patch in patches if patch is not None for layer in patch.layers}
        visits = {self.names[layer]: restore(layer) for layer in restored}
        visits[self._embedding] = corrupt
        rows = self.base.pad([self.row] * len(patches))
        with visiting(self.base.model, visits):
            logits = widened(self.base.logits_at(rows, rows.prompt_end[:, None]))[:, 0]
        return logits.softmax(-1)[:, self.token].double().cpu()


def trace(
    base: BaseModel,
    prompt: str,
    subject: str,
    answer: str | None = None,
    kind: TraceKind = "block",
    window: int | None = None,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 32,
) -> Trace:
    """Trace a fact through all layers and tokens of a prompt.

    ``window`` layers are restored together: if not given, one of blocks, and of MLPs or attention
    the share of the depth that the paper takes (10 of 48). The other arguments, and what is raised,
    are those of :class:`Tracer`.
    """
    _check(base, kind, noise, {"window": 1 if window is None else window})
    tracer = Tracer(base, prompt, subject, answer, kind, noise, samples, seed, batch_size)
    depth, row = len(tracer.names), tracer.row
    if window is None:
        window = 1 if kind == "block" else max(1, round(_PART_WINDOW * depth))
    # Tokens before the subject do not attend to it, so there is nothing to restore.
    tokens = range(row.subject_start, len(row.prompt))
    windows = [
        range(max(0, layer - window // 2), min(depth, layer + (window + 1) // 2))
        for layer in range(depth)
    ]
    patches = [Patch(layers, range(token, token + 1)) for layers in windows for token in tokens]
    low, *effects = tracer.probabilities([None, *patches]).tolist()
    restored = torch.full((depth, len(row.prompt)), low, dtype=torch.double)
    restored[:, tokens.start :] = torch.tensor(effects, dtype=torch.double).reshape(depth, -1)
    texts = [str(base.tokenizer.decode([id])) for id in (*row.prompt, tracer.token)]
    tokens_as_text, answer_text = tuple(texts[:-1]), texts[-1].strip() or texts[-1]
    span = row.subject_start, row.subject_end
    return Trace(
        prompt, tokens_as_text, span, answer_text, kind, window, tracer.high, low, restored
    )


def _states(base: BaseModel, kind: TraceKind) -> list[str]:
    """Names of the modules whose outputs are restored, from the first layer to the last."""
    if kind == "mlp":
        # The projection and not the module around it, which in BLOOM and MPT adds the residual.
        return [block.down for block in base.layout.blocks]
    name = base.layout.attention if kind == "attention" else base.layout.block_name
    return [name(index) for index in range(len(base.layout))]


def _check(base: BaseModel, kind: TraceKind, noise: float, counts: dict[str, int]) -> None:
    if base.is_encoder_decoder:
        raise UnsupportedUseError(
            f"tracing follows a prompt through a decoder, and '{base.name}' reads it with an "
            "encoder; use a decoder-only model"
        )
    if kind not in get_args(TraceKind):
        raise UnsupportedUseError(
            f"kind of a trace must be one of {', '.join(get_args(TraceKind))}, got {kind!r}"
        )
    if not noise >= 0:
        raise UnsupportedUseError(f"noise of a trace must be 0 or more, got {noise}")
    for name, value in counts.items():
        if value < 1:
            raise UnsupportedUseError(f"{name} of a trace must be at least 1, got {value}")
