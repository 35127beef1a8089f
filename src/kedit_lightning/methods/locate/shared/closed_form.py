"""Base of the methods that optimise values at a located layer and solve for its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.mixture import is_mixture
from kedit_lightning.contradictions import consistent
from kedit_lightning.edits import Edit, LowRankDelta, memories
from kedit_lightning.edits.kept_equations import keeps_equations
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.closed_form_settings import (
    TEXT_SHARE,
    LocatedSettings,
    LocateSettings,
    Targets,
    default_weight,
)
from kedit_lightning.methods.locate.shared.covariance_factors import CovarianceFactors
from kedit_lightning.methods.locate.shared.edit_groups import EditGroups, add_to, remembered_keys
from kedit_lightning.methods.locate.shared.equations import Equation, Memories, solved_again
from kedit_lightning.methods.locate.shared.least_squares import Prior, ridge_update
from kedit_lightning.methods.locate.shared.statistics_fit import TextPassHooks
from kedit_lightning.methods.locate.shared.subject_states import (
    Carried,
    SubjectStates,
    SubjectTokens,
    subject_states,
)
from kedit_lightning.methods.locate.shared.value_scale import scaled_settings
from kedit_lightning.methods.locate.shared.value_site import Site, SiteOfValues
from kedit_lightning.methods.locate.shared.value_targets import (
    VALUE_TARGETS,
    LastLayerValues,
    NormAnchor,
)
from kedit_lightning.methods.locate.shared.weight_constraints import WeightConstraints
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.methods.shared.contexts import sample_contexts
from kedit_lightning.methods.shared.joint_edits import Groups, JointEdits, ReadyEdits
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.methods.shared.target_probability import note_each
from kedit_lightning.requests import EditRequest


class ClosedForm(TextPassHooks, EditMethod):
    """Base of methods that optimise values and solve for weights.

    Settings left at ``None`` follow the base model: published ones where it is known, else rules.
    ``fit`` collects the second moments of keys; they live in the cache, not in checkpoints.
    In a block with routed experts alone, all that the router picks for the subject are solved for
    together, by their keys times its weights; each expert has second moments of its own.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        steps: Passes of the target optimisation.
        lr: Learning rate of the target optimisation.
        weight_decay: Weight of the size of the change of a value.
        clamp: Largest change of a value, relative to its size.
        kl_factor: Weight of the divergence of the model's essence of the subject.
        stop_loss: The optimisation of a value ends once its loss is below this.
        preserve: How many keys of plain text count against one of a fact (lambda of the papers);
            if none is published, as many as let a lone fact reach 94 % of its value; it is noted.
        history: Keep the outputs at the keys of earlier edits of this method (MEMIT_seq, ENCORE).
        ridge: Cost of the size of the change, in keys (ENCORE).
        targets: Where values are optimised: at the last layer, at each layer its own (BLUE), or at
            the first and forward from there (FE).
        patience: Steps after which the optimisation of a value ends once its answer is the
            likeliest under every context (MPES, ENCORE).
        consistency: Weight of the differences between contexts in later blocks (CORE).
        aligned: Give similar keys similar values (EAMET); the clamp then counts in norms of keys.
        norm_anchor: Give all values the norm that those of the first edit have (NAS).
        keep_share: Keep this share of the entries, those that change most (RECT).
        restrain: Compress singular values of an edit above the largest of the weight (PRUNE). In a
            sequence it is each edit that is restrained, and not their sum.
        off_main: Take the change off the main directions of the weight, 1 for wholly (SPHERE).
        contexts: Number of texts put before each prompt while its value is optimised.
        statistics: Where the statistics of keys come from: ``auto``, ``required``, ``identity``, or
            the path of a file of statistics, or of a folder of them.
        fit_length: Tokens of a row in ``fit``; a longer text is read in several.
        fit_tokens: Tokens after which ``fit`` stops; it reads all text if not given.
        fit_error: Relative standard error of the statistics at which ``fit`` stops, once it has
            read 10 tokens a dimension; it reads all text if not given.
        seed: Start of all random choices; that of the run when absent.
    """

    needs = frozenset({"subject"})
    can = Capabilities(adapter=True, weights=True, images=True)
    fit_epochs = 1
    learns = "second moments of the keys of every layer, from plain text"
    settings: LocatedSettings
    #: Table of published settings.
    published: ClassVar[str] = ""
    site_of_values: ClassVar[SiteOfValues] = "block"
    #: Subject tokens whose inputs of the MLP's down projection are the key.
    subject_tokens: ClassVar[SubjectTokens] = "last"
    #: A layer takes the residual over this power of the number of layers left.
    spread: ClassVar[float] = 1.0
    #: Whether edits keep a history of keys unless told otherwise.
    keeps_history: ClassVar[bool] = False
    relaxed: ClassVar[bool] = False
    #: Lengths in tokens of the texts put before prompts; each makes an equal part of them.
    context_lengths: ClassVar[tuple[int, ...]] = (10,)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        steps: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        clamp: float | None = None,
        kl_factor: float | None = None,
        stop_loss: float = 0.05,
        preserve: float | None = None,
        history: bool | None = None,
        ridge: float = 0.0,
        targets: Targets = "last",
        patience: int | None = None,
        consistency: float = 0.0,
        aligned: bool = False,
        norm_anchor: bool = False,
        keep_share: float | None = None,
        restrain: bool = False,
        off_main: float = 0.0,
        contexts: int = 5,
        statistics: str = "auto",
        *,
        fit_length: int = 512,
        fit_tokens: int | None = None,
        fit_error: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self._solved = ReadyEdits()
        self._stand_in: torch.nn.Parameter | None = None
        # Statistics are a pass over text without an optimizer.
        self.automatic_optimization = False

    @cached_property
    def context_texts(self) -> tuple[str, ...]:
        """Context prefixes that the base model wrote once for this method object."""
        count, seed = self.settings.contexts, self.settings.start
        return sample_contexts(self.base, count, seed, self.context_lengths)

    @cached_property
    def covariances(self) -> CovarianceFactors:
        """Factors of the covariances of keys."""
        return CovarianceFactors(self.base, self.settings.statistics, type(self).__name__)

    # ---- settings

    def build(self) -> None:
        """Resolve settings that follow the base model, and find the layers."""
        given, layout = self.settings, self.base.layout
        known = published_settings(self.base, self.published, LocateSettings)
        layers = (known.layers if known else ()) or given.default_layers(self.base)
        if VALUE_TARGETS[given.targets].ends_only:
            layers = [layers[0], layers[-1]]
        layers = given.chosen_layers or layers
        # Each once, in the order they run; ``block`` refuses one that does not exist.
        blocks = {layer % len(layout): layout.mlp_block(layer) for layer in layers}
        self.layers = tuple(sorted(blocks))
        self.edited = tuple(blocks[layer].down for layer in self.layers)
        if self.site_of_values == "block":
            with self.base.edits.suspended():
                for layer in self.layers:
                    layout.write_path(layer)
        used = given.over(known or scaled_settings(self.base, self.site(self.layers[-1])))
        self.locate = replace(used, layers=self.layers, relaxed=self.relaxed)
        history = self.keeps_history if given.history is None else given.history
        self.settings = given.resolved(self.locate, history)
        self.constraints = WeightConstraints(given.off_main, given.restrain, given.keep_share)
        self.constraints.check(self.base, self.edited)

    def site(self, layer: int) -> Site:
        """Where the values of a layer are outputs."""
        return Site.of(self.base.layout, layer, self.site_of_values)

    # ---- the method's own part

    def prior(self, layer: int) -> Prior:
        """The cost of a change of a layer, without history; keys of facts scale it (``_cost``)."""
        preserve, module = self.settings.preserve, self.base.layout.mlp_block(layer).down
        weight = default_weight(self.base, layer) if preserve is None else preserve
        ridge = self.settings.ridge / weight
        return self.covariances.prior(module, 1.0 if preserve is None else preserve, ridge)

    def mean_keys(self, inputs: Tensor) -> Tensor:
        """Mean of ``[n, contexts, d_in]`` over contexts, of which the bare prompt is half."""
        bare, rest = inputs[:, 0].double(), inputs[:, 1:].double()
        return (bare + rest.mean(1)) / 2 if rest.shape[1] else bare

    def update(
        self, module: str, states: SubjectStates, residuals: Tensor, prior: Prior
    ) -> LowRankDelta:
        """The change of a module that maps its keys to its values.

        Args:
            module: The down projection.
            states: Its keys and present outputs, by request and context.
            residuals: Values minus present outputs. Shape ``[n, d_out]``.
            prior: The cost of a change.
        """
        return self.solution(module, self.equation(module, states, residuals), prior)

    def equation(self, module: str, states: SubjectStates, residuals: Tensor) -> Equation:
        """What the change of a module is solved from; arguments are those of :meth:`update`."""
        inputs = states.inputs[module]
        return Equation(self.mean_keys(inputs), inputs[:, 0], residuals)

    def solution(self, module: str, equation: Equation, prior: Prior) -> LowRankDelta:
        """The change of a module, from its equation and the cost of a change."""
        return ridge_update(equation.keys.T, equation.residuals.T, prior, eps=1.0)

    solved_again = solved_again

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Write all requests in one change."""
        return self._solved.pop(requests) or self.solve([requests])[0]

    def edit_each(self, requests_of_examples: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        """Edits of several examples, apart from each other; their values are found together."""
        groups = [consistent(group) for group in requests_of_examples]
        apart = self.settings.apart or not VALUE_TARGETS[self.settings.targets].independent
        several = any(len(group) > 1 for group in groups)
        if apart or len(groups) < 2 or (several and not self.can.batch):
            return super().edit_each(groups)
        return JointEdits(groups, range(len(groups)), self.noted_edit, self._together)

    def _together(self, groups: Groups) -> Sequence[Edit]:
        requests = [request for group in groups for request in group]
        with self.computing(requests), self._solved.holding(groups, self.solve(groups)):
            if any(len(group) > 1 for group in groups):  # a subclass may do more in compute_edit
                return [*map(self.noted_edit, groups)]
            return note_each([*map(self.compute_edit, groups)], [g[0] for g in groups])

    def solve(self, groups: Sequence[Sequence[EditRequest]]) -> list[Edit]:
        """One edit for each group of requests, independent of the others."""
        batch = EditGroups(self.base, groups, [self.places(group) for group in groups])
        values = self.layer_values(batch.requests)
        self.walk(batch, values)
        self._remember(batch, values.anchor)
        notes: dict[str, Any] = {"statistics": self.covariances.note, "layers": [*self.edited]}
        return batch.edits(partial(self.origin, **notes))

    def places(self, requests: Sequence[EditRequest]) -> int:
        """Number of keys that requests have in a layer: one each."""
        return len(requests)

    def walk(self, batch: EditGroups, values: LastLayerValues) -> None:
        """Solve for one layer after another, and add its changes to those of the batch."""
        for number, (layer, module) in enumerate(zip(self.layers, self.edited, strict=True)):
            with batch.in_force() as carried:
                residuals = values.residuals(layer, carried)
                states = self._states([module], batch.requests, carried)
            share = (len(self.layers) - number) ** -self.spread if values.spreads else 1.0
            residuals = residuals * share / values.site(layer).gain_of(self.base.layout, layer)
            prior, history, counting = self.prior(layer), self._history(module), values.counting
            keeps = keeps_equations() and self._solves_again(module)
            keys = [self.mean_keys(states.part(part).inputs[module]).T for part in batch.parts]
            for changes, part, weights, own_keys, known in batch.changing(keys, prior):
                if counting is not None and not bool(counting[part].any()):
                    continue  # all of it is written, whatever the others need
                own, noted = states.part(part), weights if counting is None else []
                cost = self._cost(known, own_keys, history, noted)
                delta = self.update(module, own, residuals[part], cost)
                add_to(changes, self.constraints.changes(self.base, module, delta))
                if keeps:
                    batch.keep(part, module, self.equation(module, own, residuals[part]))
            del prior, known  # wide layers have large ones

    def layer_values(self, requests: Sequence[EditRequest]) -> LastLayerValues:
        """Values of requests at the edited layers, optimised when first needed."""

        def mean_keys(module: str) -> Tensor:
            return self.mean_keys(self._states([module], requests).inputs[module])

        return VALUE_TARGETS[self.settings.targets](
            self.base,
            requests,
            {layer: self.site(layer) for layer in self.layers},
            self.context_texts,
            self.locate,
            mean_keys if self.settings.aligned else None,
            NormAnchor(self._memories()) if self.settings.norm_anchor else None,
        )

    def _states(
        self, modules: Sequence[str], requests: Sequence[EditRequest], carried: Carried = None
    ) -> SubjectStates:
        tokens, contexts = self.subject_tokens, self.context_texts
        return subject_states(self.base, modules, requests, contexts, carried, tokens=tokens)

    def _cost(
        self, prior: Prior, keys: Tensor, history: Tensor | None, found: list[float]
    ) -> Prior:
        """Cost of a change at keys ``[d_in, n]`` on earlier edits; a weight ``found`` is noted."""
        if self.settings.preserve is None and self.settings.weighs_text:
            weight = least_squares.relative_weight(prior, keys, TEXT_SHARE)
            prior = least_squares.weighted_prior(prior, weight)
            found.append(float(f"{weight:.4g}"))
        return prior if history is None else least_squares.with_history(prior, history)

    def cost(self, layer: int, module: str, keys: Tensor, past: Memories) -> Prior:
        """The cost of a change at keys ``[d_in, n]``, with the memories of edits below it."""
        history = remembered_keys(self.base, past, module) if self.settings.history else None
        return self._cost(self.prior(layer), keys, history, [])

    def _solves_again(self, module: str) -> bool:
        """Whether a change follows from keys, wanted outputs and the cost of a change alone."""
        plain = type(self).update is ClosedForm.update and self.subject_tokens == "last"
        plain = plain and self.constraints == WeightConstraints()
        return plain and not (self.settings.norm_anchor or is_mixture(self.base.module(module)))

    def _history(self, module: str) -> Tensor | None:
        """Keys of a module that earlier edits remember. Shape ``[d_in, N]``."""
        past = self._memories() if self.settings.history else []
        return remembered_keys(self.base, past, module)

    def _memories(self) -> list[dict[str, Tensor]]:
        return memories(self.base, type(self).__name__)

    def _remember(self, batch: EditGroups, anchor: NormAnchor | None) -> None:
        """Give edits their memory: keys as they are now, and norms of values without an anchor."""
        if self.settings.history:
            with batch.in_force() as carried:
                inputs = self._states(self.edited, batch.requests, carried).inputs
            for module in self.edited:
                keys = self.mean_keys(inputs[module]).to(compute_dtype(self.base.dtype))
                batch.remember(f"{module}.keys", keys.T)
        for name, norms in anchor.memory.items() if anchor else ():
            batch.remember(name, norms)

    # ---- fit

    def configure_model(self) -> None:
        """Build what the method needs, and a stand-in for the parameters it does not have."""
        super().configure_model()
        if self._stand_in is None and self._trainer is not None:  # DDP wants a parameter
            self._stand_in = torch.nn.Parameter(torch.zeros(0))
