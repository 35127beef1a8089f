"""Fine-tuning off the directions that plain text depends on (CrispEdit, arXiv 2602.15823)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, EncodedRow
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.mixture import is_mixture
from kedit_lightning.base_models.taps import zero_leaves
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.errors import DataFileError, UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, Share
from kedit_lightning.methods.finetune.shared.fine_tuning_method import (
    FinetuneDefaults,
    FineTuningMethod,
    FineTuningSettings,
)
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.statistics import few_sample_texts

#: First and last block as shares of the depth (blocks 19 to 23 of 32).
FIRST, LAST = 0.6, 0.72
#: Texts of a forward pass.
TEXTS_PER_PASS = 8


@dataclass(frozen=True)
class CrispEditSettings(FineTuningSettings):
    """Settings of :class:`CrispEdit`."""

    energy: Share
    texts: str | None
    text_tokens: Count


class CurvatureProjection(NamedTuple):
    """Takes gradients off directions of high curvature, by K-FAC.

    Args:
        inputs: Eigenvectors of ``E[x xᵀ]``. Shape ``[d_in, d_in]``.
        outputs: Eigenvectors of ``E[g gᵀ]``. Shape ``[d_out, d_out]``.
        free: Which pairs of them may change. Bool, shape ``[d_out, d_in]``.
    """

    inputs: Tensor
    outputs: Tensor
    free: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, energy: float) -> CurvatureProjection:
        """From the factors; the fewest pairs are held that have a share of the curvature.

        Args:
            inputs: ``E[x xᵀ]``. Shape ``[d_in, d_in]``.
            outputs: ``E[g gᵀ]``. Shape ``[d_out, d_out]``.
            energy: The share; with 0 none is held.
        """
        values_in, vectors_in = torch.linalg.eigh(inputs.double())
        values_out, vectors_out = torch.linalg.eigh(outputs.double())
        products = values_out.clamp(min=0)[:, None] * values_in.clamp(min=0)
        sizes, order = products.flatten().sort(descending=True)
        before = sizes.cumsum(0) - sizes
        free = torch.empty_like(before, dtype=torch.bool)
        free[order] = before >= energy * sizes.sum()
        return cls(vectors_in, vectors_out, free.reshape(products.shape))

    def __call__(self, gradient: Tensor) -> Tensor:
        """``U_o ((U_oᵀ G U_i) ⊙ M) U_iᵀ``. Shape ``[d_out, d_in]``."""
        inputs, outputs = self.inputs.to(gradient), self.outputs.to(gradient)
        return outputs @ ((outputs.T @ gradient @ inputs) * self.free) @ inputs.T


class CrispEdit(FineTuningMethod):
    """Fine-tunes the down projections of some blocks where plain text does not mind.

    Each gradient is projected off the directions that hold most of the curvature of the loss on
    plain text, before Adam sees it. The curvature is that of K-FAC: the second moments of the
    inputs of a projection and of the gradients of its outputs. Biases stay as they are. The
    released code also adds the curvature of earlier edits, which is left out here.
    Paper: https://arxiv.org/abs/2602.15823.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks that are trained, negative numbers from the end; when absent those from 0.6 n
            to 0.72 n of n, as blocks 19 to 23 of 32 in the paper.
        modules: Projections of each of them, by their names inside the block, such as
            ``mlp.up_proj``; the down projection of its MLP when absent.
        energy: Share of the curvature whose directions are held; the paper has 0.8 to 0.99.
        texts: File of plain text, a paragraph a line; the small packaged text when absent. The
            paper reads 100 to 1000 articles.
        text_tokens: Tokens of a paragraph that are read at most.
        lr: Learning rate of Adam.
        steps: Maximum number of epochs over the requests; 25 when absent, 60 for the
            packaged model.
        batch_size: Requests of an optimizer step.
        norm_constraint: Largest change of any entry of the weights; none when absent.
        weight_decay: L2 penalty on the change.
        stop_loss: A batch with a lower loss is skipped, and training ends once the mean loss of an
            epoch is lower.
        eos_in_target: Train the end-of-text token after each answer, against run-on answers.
        seed: Seed of the order of requests, which depends on the requests too.
    """

    settings_type: ClassVar[type[MethodSettings]] = CrispEditSettings
    settings: CrispEditSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        energy: float = 0.9,
        texts: str | None = None,
        text_tokens: int = 128,
        lr: float = 5e-4,
        steps: int | None = None,
        batch_size: int = 32,
        norm_constraint: float | None = None,
        weight_decay: float = 0.0,
        stop_loss: float = 1e-2,
        eos_in_target: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self._held: dict[str, CurvatureProjection] = {}

    def usual(self) -> FinetuneDefaults:
        """Settings for the base model where none are given."""
        published = published_settings(self.base, "CrispEdit", FinetuneDefaults)
        if published is not None:
            return published
        layout, dense = self.base.layout, self.settings.modules is None
        known = layout.mlp_layers if dense else range(len(layout))
        depth = len(layout)
        wished = range(round(FIRST * depth), round(LAST * depth) + 1)
        return FinetuneDefaults(nearest_layers(known, wished))

    def build(self) -> None:
        """Find the projections to train.

        Raises:
            UnsupportedUseError: One is that of experts, or a setting cannot be met.
        """
        super().build()
        routed = [name for name in self.modules_trained if is_mixture(self.base.module(name))]
        if routed:
            raise UnsupportedUseError(
                f"CrispEdit knows the curvature of one matrix, and the experts in '{routed[0]}' "
                "have one each; use FTM"
            )

    @property
    def trains_rows(self) -> bool:
        """No: gradients of rows are projected one matrix at a time."""
        return False

    def projected(self, module: str, gradient: Tensor) -> Tensor:
        """A gradient of a weight off the directions that are held; that of a bias is none."""
        if gradient.dim() < 2:
            return torch.zeros_like(gradient)
        if not self._held:
            base, settings, names = self.base, self.settings, self.modules_trained
            with base.edits.suspended():
                factors = curvature_factors(base, names, self._texts(), settings.text_tokens)
            self._held = {n: CurvatureProjection.of(*factors[n], settings.energy) for n in names}
        return self._held[module](gradient)

    def _texts(self) -> list[str]:
        if self.settings.texts is None:
            return few_sample_texts()
        path = Path(self.settings.texts).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataFileError(f"texts '{path}' cannot be read as UTF-8 text: {error}") from error
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise DataFileError(f"texts '{path}' has no line with a word")
        return texts


def curvature_factors(
    base: BaseModel, modules: Sequence[str], texts: Sequence[str], tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """``E[x xᵀ]`` and ``E[g gᵀ]`` of modules over the tokens of texts, float64.

    ``x`` are inputs, and ``g`` gradients of the loss of the next tokens with respect to outputs.

    Args:
        base: The base model.
        modules: Names of projections.
        texts: The texts; those of one token are left out.
        tokens: Tokens of a text that are read at most.
    """
    read = [base.encoder.text(text).prompt[: min(tokens, base.max_tokens)] for text in texts]
    rows = [EncodedRow(ids[:1], ids[1:]) for ids in read if len(ids) > 1]
    sums: dict[str, list[Tensor]] = {}
    for part in chunks(rows, TEXTS_PER_PASS):
        batch = base.pad(part, "right")
        with torch.enable_grad(), zero_leaves(base.model, modules) as (seen, leaves):
            loss = -base.answer_log_probs(batch).sum()
        gradients = torch.autograd.grad(loss, [leaves[name] for name in modules])
        mask = batch.attention_mask.bool()
        for name, gradient in zip(modules, gradients, strict=True):
            states = seen.inputs[name][mask].double(), gradient[mask].double()
            grams = [each.T @ each / len(each) for each in states]
            weight = len(states[0])
            old = sums.get(name, [torch.zeros_like(gram) for gram in grams])
            sums[name] = [total + weight * gram for total, gram in zip(old, grams, strict=True)]
    count = sum(len(row.prompt) + len(row.answer) for row in rows)
    return {name: (inputs / count, outputs / count) for name, (inputs, outputs) in sums.items()}
