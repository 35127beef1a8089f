"""SERAC: an edit memory, a scope classifier, and a counterfactual model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layout import Layout
from kedit_lightning.base_models.rows import join_text
from kedit_lightning.edits import ScopeEdit, ScopeEntry
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel, describe
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.errors import BaseModelMismatchError, UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative, Share
from kedit_lightning.methods.memory.serac.scope_gradient import ScopeGradient, scope_gradient
from kedit_lightning.methods.memory.serac.scope_losses import (
    counterfactual_encoder,
    prompt_hidden_states,
    statement_ids,
)
from kedit_lightning.methods.method import Capabilities, MethodSettings, Need
from kedit_lightning.methods.shared.data_setup import refuse_images
from kedit_lightning.methods.shared.row_lengths import (
    RowText,
    Window,
    example_rows,
    free_rows,
    too_long_together,
)
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.methods.training.trained_method import TrainedMethod, TrainedSettings
from kedit_lightning.methods.training.trained_network import Plan, TrainedNetwork
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


@dataclass(frozen=True)
class SERACSettings(TrainedSettings):
    """Settings of :class:`SERAC`."""

    layer: int | None
    counterfactual: str | None
    scope_width: Count | None
    blocks: Count | None
    threshold: Share
    c_edit: NotNegative
    c_loc: NotNegative
    batch_size: Count


@dataclass(frozen=True)
class SERACPlan(Plan, ScopePlan):
    """Architecture of the networks, as checkpoints hold it."""


class SERACNetwork(TrainedNetwork):
    """Scope classifier and counterfactual model, with counters of their training."""

    def __init__(self, plan: SERACPlan, seed: int, dtype: torch.dtype) -> None:
        super().__init__(plan)
        self.scope = ScopeNetworks(plan, seed, dtype)


class SERAC(TrainedMethod):
    """SERAC, from "Memory-Based Model Editing at Scale" (Mitchell et al. 2022).

    ``fit`` trains two networks: a scope classifier, which tells whether a question is in the scope
    of an edit, and a counterfactual model, which answers a question given the statement of an edit.
    An edit is then stored in a memory without any gradient. A question whose similarity to an edit
    exceeds ``threshold`` is answered by the counterfactual model, given the most similar edit;
    every other question by the base model, bit for bit.

    Here the classifier takes the mean of the base model's own hidden states over the tokens of the
    prompt, through a learned projection, where the paper has a DistilBERT; and the counterfactual
    model is a small decoder over the base model's token embeddings, so both share its tokenizer,
    unless ``counterfactual`` names another. A model with a tokenizer of its own answers greedily,
    as text, which is then encoded in the base model's tokens: scores of answers are valid, and
    likelihoods are those of a choice. All its weights are trained, and stored in each edit's file.
    Answers are trained with the end-of-sequence token behind them, where the tokenizer has one.
    On a vision-language model the hidden states are those of tokens of the picture, too, so that
    scope follows text and picture. The counterfactual model does not see it: it is told the fact.
    The two losses are independent, as in the paper's supervised form. The switch between the
    models is hard; the paper's soft mixture is not needed where scope is labelled.

    Args:
        base_model: The model to edit.
        layer: Block whose output the classifier reads, of the encoder where there is one. The
            checkpoint's, or else the one at a third of the depth.
        counterfactual: Language model that answers in scope, by its name on the hub or its folder;
            a decoder, fine-tuned by ``fit``. The checkpoint's, or else a small one created here.
        scope_width: Width of the embeddings of questions and edits that are compared. The
            checkpoint's, or else 64.
        blocks: Blocks of the counterfactual model. The checkpoint's, or else 2.
        threshold: Similarity above which a question is in scope of an edit, between 0 and 1.
        c_edit: Weight of the edit loss, of the counterfactual model.
        c_loc: Weight of the loss of the scope classifier.
        batch_size: Examples of a training step, on each process.
        **settings: The settings of :class:`TrainedMethod`.
    """

    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases"})
    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True, images=True)
    learns: ClassVar[str] = "a scope classifier and a counterfactual model"

    settings_type: ClassVar[type[MethodSettings]] = SERACSettings
    plan_type = SERACPlan

    settings: SERACSettings
    network: SERACNetwork

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        counterfactual: str | None = None,
        scope_width: int | None = None,
        blocks: int | None = None,
        threshold: float = 0.5,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        batch_size: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)
        self.fit_batch_size = batch_size
        self._frozen_copy: tuple[str, ScopeNetworks] | None = None
        self._counterfactual: BaseModel | None = None

    # ---- building

    def build(self) -> None:
        """Create the networks, from a checkpoint where one is named.

        Raises:
            UnsupportedUseError: A setting differs from the named checkpoint's,
                the base model's token embeddings and its output differ in vocabulary, or the
                counterfactual model cannot serve.
            CheckpointError: The named checkpoint is absent, or another method's.
            BaseModelMismatchError: It was fitted on a base model of other widths.
        """
        super().build()
        self._counterfactual = None  # the networks hold its weights by now
        if self.network.scope.plan.made_of is None:
            self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        head = self.base.model.get_output_embeddings()
        outputs = getattr(head, "out_features", None)
        inputs = len(self.base.model.get_input_embeddings().weight)
        if outputs is not None and outputs != inputs:
            raise UnsupportedUseError(
                f"SERAC's counterfactual model answers in the vocabulary of the token embeddings, "
                f"and base model '{self.base.name}' has {inputs} of those and {outputs} outputs; "
                "resize one of them, or use another method"
            )

    @property
    def _layout(self) -> Layout:
        return self.base.layout.encoder if self.base.is_encoder_decoder else self.base.layout

    def default_plan(self) -> SERACPlan:
        """The architecture that the method has unless settings say otherwise."""
        embedding = self.base.model.get_input_embeddings().weight
        return SERACPlan(
            module=self._layout.block_name(len(self._layout) // 3),
            **self._widths(),
            scope_width=64,
            blocks=2,
            embedding_scale=1 / float(embedding.to(compute_dtype(embedding.dtype)).std()),
        )

    def plan(self, saved: SERACPlan | None = None) -> SERACPlan:
        """The architecture that the settings ask for; see the base class."""
        plan: SERACPlan = super().plan(saved)
        if self.settings.layer is not None:
            plan = replace(plan, module=self._layout.block_name(self.settings.layer))
        if saved is None and plan.counterfactual:
            plan = replace(plan, **self._counterfactual_entries(plan.counterfactual))
        return plan

    def resolved_settings(self, plan: SERACPlan) -> SERACSettings:
        """The settings, with the layer and the counterfactual model of a plan."""
        names = [self._layout.block_name(i) for i in range(len(self._layout))]
        settings: SERACSettings = super().resolved_settings(plan)
        counterfactual = plan.counterfactual or None
        return replace(settings, layer=names.index(plan.module), counterfactual=counterfactual)

    def _counterfactual_entries(self, name: str) -> dict[str, Any]:
        """The entries of a plan that describe a language model as the counterfactual model.

        Raises:
            UnsupportedUseError: The model is no decoder, or its tokenizer is slow.
        """
        if self._counterfactual is None:
            self._counterfactual = BaseModel.load(name)
        model = self._counterfactual
        if model.is_encoder_decoder or not getattr(model.tokenizer, "is_fast", False):
            raise UnsupportedUseError(
                f"SERAC: '{name}' cannot be the counterfactual model, which must be a decoder with "
                "a fast tokenizer; name another, or leave `counterfactual` out"
            )
        return {
            "counterfactual": name,
            "made_of": describe(model.model, model.tokenizer),
            "own_tokens": model.tokenizer_fingerprint != self.base.tokenizer_fingerprint,
        }

    def _widths(self) -> dict[str, Any]:
        """The entries of a plan that follow from the base model's widths."""
        embedding = self.base.model.get_input_embeddings().weight
        return {"hidden_width": self.base.layout.hidden_size, "token_width": embedding.shape[1]}

    def create(self, plan: SERACPlan) -> SERACNetwork:
        """Untrained networks.

        Raises:
            BaseModelMismatchError: The plan is that of a base model of other widths.
        """
        for field, width in self._widths().items():
            if getattr(plan, field) != width:
                raise BaseModelMismatchError(
                    f"the checkpoint was fitted on a base model with a {field.replace('_', ' ')} "
                    f"of {getattr(plan, field)}, and '{self.base.name}' has {width}; fit again"
                )
        network = SERACNetwork(plan, self.settings.start, compute_dtype(self.base.dtype))
        if isinstance(network.scope.decoder, LanguageModel) and self._counterfactual is not None:
            network.scope.decoder.model.load_state_dict(self._counterfactual.model.state_dict())
        return network

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> ScopeEdit:
        """Entries of the edit memory, one for each request. Nothing is trained."""
        # One by one, so that the key of a request does not depend on the others.
        networks = self._networks_for(requests)
        keys = [self._keys(networks, [request]) for request in requests]
        return self._edits(networks, [requests], torch.cat(keys))[0]

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose prompts fit into memory together, at least 1."""
        rows = [self.base.encode(request.prompt, image=request.image) for request in requests]
        last = len(self.base.layout) - 1  # no gradient needs those of a block that has run
        return requests_at_a_time(self.base, last, [[row] for row in rows])

    def edits_together(self, requests: Sequence[EditRequest]) -> list[ScopeEdit]:
        """The edit of each request, as it is without the others."""
        networks = self._networks_for(requests)
        keys = self._keys(networks, requests)
        return self._edits(networks, [[request] for request in requests], keys)

    def _edits(
        self, networks: ScopeNetworks, groups: Sequence[Sequence[EditRequest]], keys: Tensor
    ) -> list[ScopeEdit]:
        """An edit for each group of requests, whose keys stand one after another."""
        encoder, threshold = counterfactual_encoder(self.base, networks), self.settings.threshold
        rest = iter(keys)
        edits = []
        for group in groups:
            entries = [
                ScopeEntry(next(rest).clone(), statement_ids(encoder, request), threshold)
                for request in group
            ]
            edits.append(ScopeEdit(self.base, networks, entries, self.prepare_edit(group)))
        return edits

    @torch.no_grad()
    def _keys(self, networks: ScopeNetworks, requests: Sequence[EditRequest]) -> Tensor:
        """Embeddings of requests. Shape ``[requests, scope width]``."""
        hidden, mask = prompt_hidden_states(
            self.base,
            [request.prompt for request in requests],
            networks.plan.module,
            [request.image for request in requests],
        )
        return networks.embed(hidden, mask)

    def _check_pictures(self, requests: Sequence[EditRequest]) -> None:
        """Refuse facts about pictures for a counterfactual model that is a language model."""
        plan = self.network.scope.plan
        refuse_images(
            f"counterfactual model '{plan.counterfactual}' of SERAC", requests, plan.made_of is None
        )

    def _networks_for(self, requests: Sequence[EditRequest]) -> ScopeNetworks:
        """A copy of the networks that later training does not change; shared while it is equal."""
        self._check_pictures(requests)
        self.network.to(self.base.device)
        digest = self.network.scope.digest()
        if self._frozen_copy is None or self._frozen_copy[0] != digest:
            frozen = copy.deepcopy(self.network.scope).requires_grad_(False).eval()
            self._frozen_copy = digest, frozen
        return self._frozen_copy[1]

    # ---- training

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that each training example has one request, and rephrases.

        Raises:
            MissingNeedsError: Names every example that lacks rephrases.
            UnsupportedUseError: An example has several requests.
        """
        several = [example.id for example in examples if len(example.requests) > 1]
        if fitting and several:
            raise UnsupportedUseError(
                f"SERAC learns the scope of one request at a time, and example '{several[0]}' has "
                "several, whose rephrases cannot be told apart; split it into one for each request"
            )
        super().check_examples(examples, fitting)

    def too_long(self, examples: Sequence[EditExample]) -> dict[str, str]:
        """Also those that the counterfactual model cannot read together with a fact."""
        clauses = super().too_long(examples)
        self.configure_model()
        model, plan = self.network.scope.decoder, self.network.scope.plan
        if not isinstance(model, LanguageModel) or model.longest is None:
            return clauses
        protocol, encoder = self.run.protocol, counterfactual_encoder(self.base, self.network.scope)
        # With a tokenizer of its own it answers freely as far as there is room.
        free = protocol.max_new_tokens if protocol.generates and not plan.own_tokens else 0
        room = model.longest - 2 - len(self.base.encoder.suffix)  # two ends of a sequence
        left = [example for example in examples if example.id not in clauses]
        for taken, asked in ((0, example_rows), (free, free_rows)):
            window = Window(f"counterfactual model '{plan.counterfactual}'", encoder, room - taken)
            for part in (
                [[example] for example in left] if protocol.grouping == "single" else [left]
            ):
                facts = [
                    [RowText("", join_text(r.prompt, r.target_new)) for r in e.requests]
                    for e in part
                ]
                clauses |= too_long_together(window, part, facts, list(map(asked, part)))
        return clauses

    def batch_gradients(self, batch: EditBatch) -> Iterator[ScopeGradient]:
        """Loss and gradient of a batch, over the examples of all ranks."""
        weights = self.settings.c_edit, self.settings.c_loc
        examples = self.examples_of(batch)
        self._check_pictures([example.requests[0] for example in examples])
        with self.base.edits.suspended():  # the scope is learned on the base model's hidden states
            gradient = scope_gradient(self.base, self.network.scope, examples, weights)
        yield gradient
