"""The core of all editors that find values at a located layer and solve for its weights.

A method declares where its values are optimised, what a change may cost (its prior), how a residual
is spread over layers, and which keys count.  One walk over the layers does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import CompositeEdit, DenseEdit, Edit, LowRankEdit, memories
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.methods.locate.shared import post
from kedit_lightning.methods.locate.shared.alignment import Alignment
from kedit_lightning.methods.locate.shared.locate_defaults import (
    LocateSettings,
    ModelKey,
    default_weight,
    model_key,
    several_layers,
)
from kedit_lightning.methods.locate.shared.locate_method import LocateMethod
from kedit_lightning.methods.locate.shared.reading import Reading, read
from kedit_lightning.methods.locate.shared.solve import (
    Prior,
    covariance_prior,
    ridge_update,
    with_history,
)
from kedit_lightning.methods.locate.shared.target import Site, TargetOptimizer, TargetSettings
from kedit_lightning.methods.method import Capabilities
from kedit_lightning.requests import EditRequest

#: Where values are found: at the ``last`` layer, for all (MEMIT); at each layer its ``own`` (BLUE);
#: or at the first, with those of the others read off one pass ``forward`` from it (FE).
Targets: TypeAlias = Literal["last", "own", "forward"]

#: Share of what is still missing that a layer takes, given how many layers are left.
SPREADS: Mapping[str, Callable[[int], float]] = {
    "linear": lambda left: 1 / left,
    "square_root": lambda left: 1 / math.sqrt(left),
}
#: Largest norm of a change in norms of its key, when values are aligned (EAMET).
ALIGNED_CLAMP = 2.0
#: Share of the largest norms that an anchor leaves out (NAS).
OUTLIERS = 0.05


class ClosedForm(LocateMethod):
    """Base of methods that optimise values and solve for weights.

    Settings left at ``None`` follow the base model: published ones where it is known, else rules.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        steps: Passes of the optimisation of values.
        lr: Learning rate of that optimisation.
        weight_decay: Weight of the size of the change of a value.
        clamp: Largest change of a value, relative to its size.
        kl_factor: Weight of keeping what the model says about the subject in general.
        stop_loss: The optimisation of a value ends once its loss is below this.
        preserve: How many keys of plain text count against one of a fact (lambda of the papers).
        history: Keep what earlier edits of this method wrote (MEMIT_seq, ENCORE).
        ridge: Cost of the size of the change, in keys (ENCORE).
        targets: Where values are found: at the last layer, at each layer its own (BLUE), or at the
            first and forward from there (FE).
        patience: Steps after which a value is left alone once its answer is the likeliest under
            every context (MPES, ENCORE).
        consistency: Weight of the differences between contexts in later blocks (CORE).
        aligned: Give similar keys similar values (EAMET); the clamp then counts in norms of keys.
        norm_anchor: Give all values the norm that those of the first edit have (NAS).
        keep_share: Keep this share of the entries, those that change most (RECT).
        restrain: Compress singular values of an edit above the largest of the weight (PRUNE). In a
            sequence it is each edit that is restrained, and not their sum.
        off_main: Take the change off the main directions of the weight, 1 for wholly (SPHERE).
        contexts: Number of texts put before each prompt.
        **settings: Those of the statistics of keys, and the seed.
    """

    needs = frozenset({"subject"})
    can = Capabilities(adapter=True, weights=True)
    published: ClassVar[Mapping[ModelKey, LocateSettings]] = MappingProxyType({})
    #: Settings where the model is in no table.
    otherwise: ClassVar[LocateSettings] = LocateSettings()
    #: What values are: outputs of the block, of its MLP, or of its attention and its MLP.
    site_of_values: ClassVar[Literal["block", "mlp", "attention and mlp"]] = "block"
    spread: ClassVar[str] = "linear"
    #: Whether edits remember their keys unless told otherwise.
    remembers: ClassVar[bool] = False
    relaxed: ClassVar[bool] = False

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
        **settings: Any,
    ) -> None:
        super().__init__(base_model, contexts=contexts, **settings)

    # ---- settings

    def default_layers(self) -> tuple[int, ...]:
        """Blocks to edit in a model that is in no table."""
        return several_layers(self.base)

    def build(self) -> None:
        """Derive settings that follow the base model, and find the layers."""
        given = dict(self.hparams)
        known = self.published.get(model_key(self.base), self.otherwise)
        if given["aligned"] and given["clamp"] is None:
            given["clamp"] = ALIGNED_CLAMP
        derived = {**asdict(known), **{k: v for k, v in given.items() if v is not None}}
        chosen = given.get("layers") or ([given["layer"]] if given.get("layer") is not None else [])
        layers = tuple(chosen) or known.layers or self.default_layers()
        if given["targets"] == "own" and not chosen:
            layers = tuple(dict.fromkeys((layers[0], layers[-1])))
        layout = self.base.layout
        for layer in layers:
            layout.block(layer)  # one that does not exist is refused
        # In the order they run, each once.
        self.layers = tuple(sorted({layer % len(layout) for layer in layers}))
        self.edited = tuple(layout.block(layer).down for layer in self.layers)
        if self.site_of_values == "block":
            with self.base.edits.suspended():
                for layer in self.layers:
                    layout.write_path(layer)
        self.preserve: float | None = derived["preserve"]
        self.remember = self.remembers if given["history"] is None else bool(given["history"])
        names = ("lr", "steps", "weight_decay", "clamp", "kl_factor", "stop_loss")
        self.target_settings = TargetSettings(
            **{name: derived[name] for name in names},
            patience=given["patience"],
            relaxed=self.relaxed,
            consistency=given["consistency"],
        )

    def site(self, layer: int) -> Site:
        """Where the values of a layer are optimised."""
        layout = self.base.layout
        block, index = layout.block(layer), layer % len(layout)
        if self.site_of_values == "attention and mlp":
            return Site((layout.attention(layer), block.down), index)
        if self.site_of_values == "block" and layout.write_path(layer).is_linear:
            return Site((block.name,), index, inside=False)
        # A block that normalises the MLP's output does not pass on what is added to it.
        return Site((block.down,), index)

    def _gain(self, layer: int, site: Site) -> float:
        return 1.0 if site.inside else self.base.layout.write_path(layer).gain

    # ---- what a method declares

    def prior(self, layer: int) -> Prior:
        """What a change of a layer costs, without what earlier edits remember."""
        module = self.base.layout.block(layer).down
        weight = default_weight(self.base, layer) if self.preserve is None else self.preserve
        factor = self.factor(module, self.hparams["ridge"] / weight)
        return covariance_prior(factor.to(self.base.device), weight)

    def mean_keys(self, inputs: Tensor) -> Tensor:
        """Mean of ``[n, contexts, d_in]`` over contexts, of which the bare prompt is half."""
        bare, rest = inputs[:, 0].double(), inputs[:, 1:].double()
        return (bare + rest.mean(1)) / 2 if rest.shape[1] else bare

    def update(
        self, module: str, reading: Reading, residuals: Tensor, prior: Prior
    ) -> tuple[Tensor, Tensor]:
        """Factors ``(A, B)`` of the change of a module.

        Args:
            module: The down projection.
            reading: What it sees and returns, by request and context.
            residuals: Wanted minus present values. Shape ``[n, d_out]``.
            prior: What a change costs.
        """
        keys = self.mean_keys(reading.inputs[module])
        return ridge_update(keys.T, residuals.T, prior, eps=1.0)

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Write all requests in one change."""
        return self.solve([requests])[0]

    def edit_each(self, requests_of_examples: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        """Edits of several examples, apart from each other; their values are found together."""
        groups = list(requests_of_examples)
        given = self.hparams
        # Values that depend on what they are found with, and dense changes, of which few fit.
        tied = given["targets"] == "own" or given["aligned"] or given["norm_anchor"]
        alone = tied or given["keep_share"] is not None or len(groups) < 2
        # A subclass that computes its edits in another way is asked for each of them.
        alone = alone or type(self).compute_edit is not ClosedForm.compute_edit
        if alone or not (self.can.batch or all(len(group) == 1 for group in groups)):
            return super().edit_each(groups)
        with self.computing([request for group in groups for request in group]):
            return self.solve(groups)

    def solve(self, groups: Sequence[Sequence[EditRequest]]) -> list[Edit]:
        """One edit for each group of requests, none of which knows of the others."""
        requests = [request for group in groups for request in group]
        changes: list[list[Edit]] = [[] for _ in groups]
        norms: dict[str, Tensor] = {}
        wanted: dict[int, tuple[Site, Tensor]] = {}
        for number, layer in enumerate(self.layers):
            with self._acting(groups, changes) as carried:
                if layer not in wanted:
                    wanted, found = self._wanted(layer, requests, carried)
                    norms |= found
                site, values = wanted[layer]
                missing = values - self._present(site, requests, carried)
                reading = self._read_keys([self.edited[number]], requests, carried)
            missing = missing * self._share(number) / self._gain(layer, site)
            solved = self._changes(layer, reading, missing, [len(group) for group in groups])
            for own, change in zip(changes, solved, strict=True):
                own.append(change)
        memory = self._memory(groups, changes, norms)
        notes = {"statistics": self.statistics_note, "layers": list(self.edited)}
        return [
            post.combined(self.base, own, self.origin(group, **notes), held)
            for group, own, held in zip(groups, changes, memory, strict=True)
        ]

    def _changes(
        self, layer: int, reading: Reading, missing: Tensor, sizes: Sequence[int]
    ) -> list[Edit]:
        """The change of one layer for each group of requests; its prior is dropped with it."""
        prior, start, changes = self._whole_prior(layer), 0, []
        module = self.base.layout.block(layer).down
        for size in sizes:
            part = slice(start, start := start + size)
            changes.append(self._change(module, reading.part(part), missing[part], prior))
        return changes

    @contextmanager
    def _acting(
        self, groups: Sequence[Sequence[EditRequest]], changes: Sequence[Sequence[Edit]]
    ) -> Iterator[list[Edit | None] | None]:
        """Put what is solved so far in force: for all rows, or each group's for its own."""
        whole = [CompositeEdit(self.base, own) if own else None for own in changes]
        if len(whole) > 1 and any(whole):
            yield [edit for edit, group in zip(whole, groups, strict=True) for _ in group]
            return
        with self.base.edits.restored():
            if whole[0] is not None:
                whole[0].apply()
            yield None

    def _read_keys(
        self,
        modules: Sequence[str],
        requests: Sequence[EditRequest],
        carried: Sequence[Edit | None] | None,
    ) -> Reading:
        return read(self.base, modules, requests, self.context_texts, carried)

    def _present(
        self, site: Site, requests: Sequence[EditRequest], carried: Sequence[Edit | None] | None
    ) -> Tensor:
        """Outputs of a site for the bare prompts as they are now. Shape ``[n, d_out]``, float64."""
        module = site.modules[-1]
        return read(self.base, [module], requests, (), carried).outputs[module][:, 0].double()

    def _share(self, number: int) -> float:
        if self.hparams["targets"] != "last":
            return 1.0
        return SPREADS[self.spread](len(self.layers) - number)

    def _whole_prior(self, layer: int) -> Prior:
        prior, module = self.prior(layer), self.base.layout.block(layer).down
        if not self.remember:
            return prior
        keys = [held[f"{module}.keys"] for held in self._memories() if f"{module}.keys" in held]
        if not keys:
            return prior
        # Those of edits that were read from files are on the CPU.
        moved = [own.to(self.base.device, torch.float64) for own in keys]
        return with_history(prior, torch.cat(moved, dim=1))

    def _memories(self) -> list[dict[str, Tensor]]:
        return memories(self.base, type(self).__name__)

    # ---- values

    def _wanted(
        self, layer: int, requests: Sequence[EditRequest], carried: Sequence[Edit | None] | None
    ) -> tuple[dict[int, tuple[Site, Tensor]], dict[str, Tensor]]:
        """Sites and values ``[n, d_out]`` for a layer and those that share its optimisation.

        Besides, the norms of the values by the module they were found at.
        """
        targets = self.hparams["targets"]
        site = self.site(self.layers[-1] if targets == "last" else layer)
        found = read(self.base, site.modules, requests)
        initial = torch.stack([found.outputs[name][:, 0] for name in site.modules], dim=1)
        optimizer = TargetOptimizer(self.base, site, self.context_texts, self.target_settings)
        alignment = self._alignment(site, requests) if self.hparams["aligned"] else None
        delta = optimizer.run(requests, initial, alignment)[:, -1].double()
        values = initial[:, -1].double() + delta
        own_norms = values.norm(dim=1)
        norms = {f"{site.modules[-1]}.norms": own_norms}
        if self.hparams["norm_anchor"]:
            values = values * (self._anchor(norms) / own_norms)[:, None]
        if targets == "own":
            return {layer: (site, values)}, norms
        if targets == "last":
            return dict.fromkeys(self.layers, (site, values)), norms
        sites = {own: self.site(own) for own in self.layers}
        names = list(dict.fromkeys(own.modules[-1] for own in sites.values()))
        change = values - initial[:, -1].double()
        passed = read(self.base, names, requests, added=(site.modules[-1], change))
        return {
            own: (place, passed.outputs[place.modules[-1]][:, 0].double())
            for own, place in sites.items()
        }, norms

    def _alignment(self, site: Site, requests: Sequence[EditRequest]) -> Alignment:
        module = self.base.layout.block(site.block).down
        keys = self.mean_keys(self._read_keys([module], requests, None).inputs[module])
        return Alignment(keys, self.target_settings.clamp)

    def _anchor(self, norms: Mapping[str, Tensor]) -> Tensor:
        """Mean norm of the values of the first edit of this method on the stack, or of this one."""
        ((name, own),) = norms.items()
        first = next((held[name] for held in self._memories() if name in held), own)
        usual = first.double().sort().values[: max(1, round((1 - OUTLIERS) * len(first)))]
        return usual.mean().to(own)

    # ---- changes

    def _change(self, module: str, reading: Reading, residuals: Tensor, prior: Prior) -> Edit:
        """The change of one module, as an edit of its own."""
        given = self.hparams
        a, b = self.update(module, reading, residuals, prior)
        if given["off_main"]:
            a = post.off_main_directions(a, self._weight(module, edited=True), given["off_main"])
        if given["restrain"]:
            a, b = post.restrained(a, b, self._weight(module, edited=False))
        dtype = compute_dtype(self.base.dtype)
        if given["keep_share"] is None:
            return LowRankEdit(self.base, {module: (a.to(dtype), b.to(dtype))})
        delta = post.keep_largest(b @ a, self._weight(module, edited=True), given["keep_share"])
        return DenseEdit(self.base, {module: (delta.to(dtype), None)})

    def _weight(self, module: str, edited: bool) -> Tensor:
        return post.weight_of(self.base, module, edited)

    def _memory(
        self,
        groups: Sequence[Sequence[EditRequest]],
        changes: Sequence[Sequence[Edit]],
        norms: Mapping[str, Tensor],
    ) -> list[dict[str, Tensor]]:
        """What later edits must know of each: its keys as they are now, and the first norms."""
        memory: list[dict[str, Tensor]] = [{} for _ in groups]
        sizes = [len(group) for group in groups]
        if self.remember:
            requests = [request for group in groups for request in group]
            with self._acting(groups, changes) as carried:
                reading = self._read_keys(self.edited, requests, carried)
            for module in self.edited:
                keys = self.mean_keys(reading.inputs[module]).split(sizes)
                for held, own in zip(memory, keys, strict=True):
                    held[f"{module}.keys"] = own.T.to(compute_dtype(self.base.dtype)).contiguous()
        known = {name for held in self._memories() for name in held}
        for name in norms.keys() - known if self.hparams["norm_anchor"] else ():
            for held, own in zip(memory, norms[name].split(sizes), strict=True):
                held[name] = own
        return memory
