"""The base of methods that write many requests by one solve a projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layout import Block
from kedit_lightning.edits import Edit
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.hypernetwork.malmen.massive import (
    Group,
    Part,
    Weights,
    capture_parts,
    collect,
    edit_of,
    learn_shifts,
    meet_keys,
    solve,
)
from kedit_lightning.methods.hypernetwork.malmen.normal_equations import RidgeShift, smaller_dense
from kedit_lightning.methods.hypernetwork.malmen.tensor_file import TensorFile
from kedit_lightning.methods.hypernetwork.malmen.value_networks import (
    ShiftSize,
    Tokens,
    ValueNetworks,
    ValuePlan,
)
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import HypernetworkMethod
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import EditRequest

#: Projections of an MLP: the one that writes into the residual stream, those that read it, or all.
Projections: TypeAlias = Literal["down", "up", "all"]


class MassiveMethod(HypernetworkMethod):
    """Turns requests into wanted changes of values, and these into one shift a projection.

    Args:
        base_model: The model to edit.
        layers: Blocks that are edited; negative numbers count from the end. The checkpoint's, or
            else the last six (MALMEN) or nine (RLEdit).
        projections: Which of their MLP projections: ``down``, the one that writes into the residual
            stream, ``up``, those that read it, or ``all``. The checkpoint's, or else
            ``down`` (MALMEN) or ``up`` (RLEdit).
        modules: Names of the projections to edit instead, by their names in the model.
        tokens: Tokens of a request that give keys: those that predict its ``answer``, or ``all``.
            The checkpoint's, or else ``answer``.
        shift_size: What ``ridge`` makes costly: the squared ``norm`` of a shift, as published, or
            its mean squared effect on the ``keys`` of the fit's requests and questions, with which
            later edits disturb earlier ones less. Text behind an answer gives no keys, so with
            large edits see that free answers still end well. Both are the same before a fit. The
            checkpoint's, or else ``norm``.
        rank: Rank of the networks' matrices. The checkpoint's, or else 1920
            (MALMEN) or 1024 (RLEdit).
        blocks: Residual blocks of each network. The checkpoint's, or else 2 (MALMEN) or 4
            (RLEdit).
        shared: One network for all projections of the same shape, rather than one each. The
            checkpoint's, or else true.
        normalise: Bring inputs and gradients to mean 0 and standard deviation 1 first.
        lr: Learning rate of the networks.
        lr_lr: Learning rate at which the logarithms of ``edit_lr`` and ``ridge`` learn.
        lr_end: Share of the learning rates that is left at the end of the fit; they fall evenly.
        edit_lr: Starting size of the wanted changes, one number a projection, which is learned.
        ridge: Starting cost of a shift of size 1, one number a projection, which is learned.
        c_edit: Weight of the new answers in the loss.
        c_loc: Weight of locality in the loss.
        n_edits: Examples written together in training.
        at_once: Most examples that run through the model together, in training and in editing.
        n_rephrases: Rephrases asked an example; the next ones in each epoch.
        own_wording: Ask the request's own prompt too, beside the rephrases.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        n_locality: Locality probes asked an example; the next ones in each epoch.
        clip: Largest norm of the gradient of a training step.
        checkpoint: What to start from: a file that ``fit`` wrote, or ``none`` for untrained
            networks.
        seed: Start of all random choices.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True)
    learns: ClassVar[str] = "a hypernetwork that turns gradients into wanted changes of outputs"
    plan_type = ValuePlan
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "modules": ("layers", "projections", "modules"),
        "tokens": ("tokens",),
        "shift_size": ("shift_size",),
        "rank": ("rank",),
        "blocks": ("blocks",),
        "shared": ("shared",),
    }
    #: Projections that are edited unless a setting says otherwise.
    usual_projections: ClassVar[Projections] = "down"
    #: Largest rank of the networks, and their blocks, unless a setting says otherwise.
    usual_rank: ClassVar[int] = 1920
    usual_blocks: ClassVar[int] = 2

    network: ValueNetworks

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        projections: Projections | None = None,
        modules: list[str] | None = None,
        tokens: Tokens | None = None,
        shift_size: ShiftSize | None = None,
        rank: int | None = None,
        blocks: int | None = None,
        shared: bool | None = None,
        normalise: bool = True,
        lr: float = 1e-5,
        lr_lr: float = 1e-3,
        lr_end: float = 1.0,
        edit_lr: float = 1e-6,
        ridge: float = 1.0,
        c_edit: float = 1.0,
        c_loc: float = 1.0,
        n_edits: int = 512,
        at_once: int = 32,
        n_rephrases: int = 1,
        own_wording: bool = False,
        vary_targets: bool = False,
        n_locality: int = 1,
        clip: float = 1.0,
        checkpoint: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.fit_batch_size = n_edits

    # ---- building

    def projections_of(self, block: Block) -> Sequence[str]:
        """Those that the settings ask for."""
        wanted = self.hparams["projections"] or self.usual_projections
        if wanted == "all":
            return block.projections
        return [name for name in block.projections if (name == block.down) == (wanted == "down")]

    def plan(self) -> ValuePlan:
        """The networks that the settings ask for."""
        settings = self.hparams
        return ValuePlan(
            modules=self.edited_modules(),
            rank=settings["rank"] or self.usual_rank,
            blocks=settings["blocks"] or self.usual_blocks,
            shared=True if settings["shared"] is None else settings["shared"],
            normalise=settings["normalise"],
            tokens=settings["tokens"] or "answer",
            shift_size=settings["shift_size"] or "norm",
        )

    def create(self, plan: ValuePlan) -> ValueNetworks:
        """Untrained networks.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        shapes, settings = self.shapes_of(plan.modules), self.hparams
        dtype, scales = compute_dtype(self.base.dtype), (settings["edit_lr"], settings["ridge"])
        return ValueNetworks(plan, shapes, *scales, dtype, settings["seed"])

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One solve for all requests. Statistics stay as they are.

        Raises:
            NonFiniteError: Factors of a projection are NaN, or its ridge has vanished.
            TemporaryFileError: There is no space for rows that wait for the solve.
        """
        network = self.network.to(self.base.device)
        self.warn_if_untrained()
        parts = capture_parts(self.base, network, requests, self.hparams["at_once"])
        origin = self.origin(requests, **self.learned)
        with TensorFile() as file:
            left = collect(network, parts, file)
            dense = smaller_dense(own.sizes for own in left.values())
            shifts = ((name, solve(network, name, left.pop(name))) for name in network.shapes)
            return edit_of(self.base, shifts, dense, origin)

    # ---- fitting

    def write(self, examples: Sequence[Episode]) -> tuple[list[Part], dict[str, RidgeShift]]:
        """Factors of the requests of examples, taken into the statistics, and the shifts.

        The shifts write the requests of all ranks; the factors are those of this one.
        """
        requests = [request for example in examples for request in example.requests]
        parts = []
        for part in capture_parts(self.base, self.network, requests, self.hparams["at_once"]):
            self.network.observe([part])
            parts.append({name: factors.to("cpu") for name, factors in part.items()})
        if self.network.plan.shift_size == "keys":
            questions = [probe for e in examples for probe in (*e.asked, *e.kept)]
            meet_keys(self.base, self.network, parts, questions, self.hparams["at_once"])
        with TensorFile() as file:
            left = collect(self.network, parts, file)
            return parts, {n: solve(self.network, n, own, True) for n, own in left.items()}

    def cost(
        self,
        parts: Sequence[Part],
        shifts: Mapping[str, RidgeShift],
        asked: Sequence[Group],
        c_reg: float = 0.0,
    ) -> Outcome:
        """What shifts cost, with the gradient of the networks.

        Args:
            parts: The factors that the shifts came from.
            shifts: The shifts.
            asked: The examples whose questions are asked, in groups; those written come first.
            c_reg: Weight of the squared norm of the shifts.
        """
        settings = self.hparams
        weights = Weights(settings["c_edit"], settings["c_loc"], c_reg)
        at_once = settings["at_once"]
        return learn_shifts(self.base, self.network, parts, shifts, asked, weights, at_once)
