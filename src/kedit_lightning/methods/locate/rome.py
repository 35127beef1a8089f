"""Rank-one model editing (Meng et al. 2022) and its symmetric variant (Gupta et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import Edit, LowRankEdit
from kedit_lightning.edits.modules import compute_dtype
from kedit_lightning.methods.base import Capabilities
from kedit_lightning.methods.locate.base import LocateMethod, StatisticsMode
from kedit_lightning.methods.locate.presets import rome_settings
from kedit_lightning.methods.locate.solve import rank_one_update
from kedit_lightning.methods.locate.target import (
    KeyReading,
    TargetOptimizer,
    TargetSettings,
    read_keys,
)
from kedit_lightning.requests import EditRequest


class ROME(LocateMethod):
    """Rank-one model editing: makes one MLP layer map the subject to a value that gives the answer.

    Settings left at ``None`` follow the base model: published ones where it is known, else a rule.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose MLP is edited.
        steps: Passes of the optimisation of the value.
        lr: Learning rate of that optimisation.
        weight_decay: Weight of the size of the change of the value.
        clamp: Largest change of the value, relative to its size.
        kl_factor: Weight of keeping what the model says about the subject in general.
        stop_loss: The optimisation ends once the loss is below this.
        statistics: Where the statistics of keys come from: ``auto``, ``required`` or ``identity``.
        contexts: Number of texts put before the prompt while the value is optimised.
        fit_length: Tokens after which ``fit`` cuts a text.
        fit_tokens: Tokens after which ``fit`` stops; it reads all text if not given.
        fit_error: Relative standard error of the statistics at which ``fit`` stops, once it has
            read 10 tokens a dimension; it reads all text if not given.
        seed: Start of all random choices.
    """

    needs = frozenset({"subject"})
    can = Capabilities(batch=False, adapter=True, weights=True)
    #: Whether the mean key over contexts is used throughout, rather than the bare prompt's key.
    mean_key: ClassVar[bool] = False

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        steps: int | None = None,
        lr: float = 0.5,
        weight_decay: float | None = None,
        clamp: float | None = None,
        kl_factor: float = 0.0625,
        stop_loss: float = 0.05,
        statistics: StatisticsMode = "auto",
        contexts: int = 20,
        fit_length: int = 512,
        fit_tokens: int | None = None,
        fit_error: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            base_model,
            statistics,
            contexts,
            fit_length=fit_length,
            fit_tokens=fit_tokens,
            fit_error=fit_error,
            seed=seed,
        )

    def build(self) -> None:
        """Derive settings that follow the base model, and find the layer."""
        derived = rome_settings(self.base)
        given = self.hparams

        def pick(name: str) -> float:
            value = given[name]
            return float(getattr(derived, name) if value is None else value)

        self.target_settings = TargetSettings(
            lr=given["lr"],
            steps=int(pick("steps")),
            weight_decay=pick("weight_decay"),
            clamp=pick("clamp"),
            kl_factor=given["kl_factor"],
            stop_loss=given["stop_loss"],
        )
        self.module = self.base.layout.block(int(pick("layer"))).down

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Compute the rank-one update for one request."""
        base, module = self.base, self.module
        (reading,) = read_keys(base, module, requests, self.context_texts)
        optimizer = TargetOptimizer(base, module, self.context_texts, self.target_settings)
        delta = optimizer.run(requests, reading.outputs[:1])[0]
        key, residual = self._constraint(reading, delta)
        factor = self.factor(module).to(base.device)
        a, b = rank_one_update(key, residual, reading.keys.double().mean(0), factor, module)
        dtype = compute_dtype(base.dtype)
        origin = self.origin(requests, statistics=self.statistics_note, layer=module)
        return LowRankEdit(base, {module: (a.to(dtype), b.to(dtype))}, origin)

    def _constraint(self, reading: KeyReading, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The key that gets the value ``z + δ``, and what its output lacks of it."""
        if not self.mean_key:
            return reading.keys[0].double(), delta.double()
        outputs = reading.outputs.double()
        return reading.keys.double().mean(0), outputs[0] + delta.double() - outputs.mean(0)


class RROME(ROME):
    """ROME with the mean key over contexts throughout, which keeps updates bounded.

    Takes the settings of ``ROME``.
    """

    mean_key: ClassVar[bool] = True
