"""SERAC: a memory of edits, a classifier of their scope, and a model that answers inside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import ScopeEdit, ScopeEntry
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel, describe
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks, ScopePlan
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.errors import BaseModelMismatchError, UnsupportedUseError
from kedit_lightning.methods.memory.serac.scope_gradient import ScopeOutcome, learn
from kedit_lightning.methods.memory.serac.scope_losses import read_prompts, reader_of, statement_ids
from kedit_lightning.methods.method import Capabilities, Need
from kedit_lightning.methods.training.learned import LearnedNetwork, Plan
from kedit_lightning.methods.training.stepping import SteppedMethod
from kedit_lightning.requests import EditBatch, EditExample, EditRequest

_SCOPE_WIDTH, _BLOCKS = 64, 2


@dataclass(frozen=True)
class SeracPlan(Plan, ScopePlan):
    """Shape of the networks, as checkpoints hold it."""


class SeracNetwork(LearnedNetwork):
    """Both networks, with counts of how far they have learned.

    Args:
        plan: Their shape.
        seed: Fixes their random start.
        dtype: Number type, at least float32.
    """

    def __init__(self, plan: SeracPlan, seed: int, dtype: torch.dtype) -> None:
        super().__init__(plan)
        self.scope = ScopeNetworks(plan, seed, dtype)


class SERAC(SteppedMethod[ScopeOutcome]):
    """SERAC, from "Memory-Based Model Editing at Scale" (Mitchell et al. 2022).

    ``fit`` trains two networks: a scope classifier, which tells whether a question is about an
    edit, and a counterfactual model, which reads the statement of the edit and the question, and
    answers. An edit is then written into a memory without any gradient. A question that is more
    similar than ``threshold`` to an edit is answered by the counterfactual model, given the most
    similar edit; every other question by the base model, bit for bit.

    Here the classifier reads the mean of the base model's own hidden states over the tokens of the
    prompt, through a learned projection, where the paper has a DistilBERT; and the counterfactual
    model is a small decoder over the base model's token embeddings, so both share its tokenizer,
    unless ``counterfactual`` names another. A model with a tokenizer of its own answers greedily,
    as text, which is then told in the base model's tokens: scores of answers hold, and
    likelihoods are those of a choice. All its weights are learned, and stand in each edit's file.
    An answer is learned with the end-of-sequence token behind it, where the tokenizer has one.
    The two losses do not touch each other, as in the paper's supervised form. The switch between
    the models is hard; the paper's soft mixture is not needed where scope is labelled.

    Args:
        base_model: The model to edit.
        layer: Block whose output the classifier reads, of the encoder where there is one. The
            checkpoint's, or else the one at a third of the depth.
        counterfactual: Language model that answers in scope, by its name on the hub or its folder;
            a decoder, fine-tuned by ``fit``. The checkpoint's, or else a small one made here.
        scope_width: Width of the space in which questions and edits are compared. The checkpoint's,
            or else 64.
        blocks: Blocks of the counterfactual model. The checkpoint's, or else 2.
        threshold: Similarity above which a question is in scope of an edit, between 0 and 1.
        lr: Learning rate of both networks.
        lr_end: Share of the learning rate that is left at the end of a fit, reached in a straight
            line; it needs a fit of known length.
        c_edit: Weight of the loss of the new answers.
        c_loc: Weight of the loss of the classifier.
        clip: Largest norm of the gradient of a training step.
        batch_size: Examples a training step, on each process.
        vary_targets: Write another answer in each epoch, one that some record gives instead of the
            same old answer. It makes more of few records; they need ``target_old``.
        checkpoint: What to start from: a file that ``fit`` wrote, or ``none`` for untrained
            networks, which edit nothing well.
        seed: Start of all random choices.
    """

    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases"})
    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True)
    learns: ClassVar[str] = "a scope classifier and a counterfactual model"

    plan_type = SeracPlan
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "module": ("layer",),
        "scope_width": ("scope_width",),
        "blocks": ("blocks",),
        "counterfactual": ("counterfactual",),
        "made_of": (),
        "own_tokens": (),
        # The base model fixes these: `create` compares the widths.
        "hidden_width": (),
        "token_width": (),
        "embedding_scale": (),
    }

    network: SeracNetwork

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        counterfactual: str | None = None,
        scope_width: int | None = None,
        blocks: int | None = None,
        threshold: float = 0.5,
        lr: float = 1e-5,
        lr_end: float = 1.0,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        clip: float = 100.0,
        batch_size: int = 10,
        vary_targets: bool = False,
        checkpoint: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.fit_batch_size = batch_size
        self._kept: tuple[str, ScopeNetworks] | None = None
        self._other: BaseModel | None = None

    # ---- building

    def build(self) -> None:
        """Create the networks, from a checkpoint where one is named.

        Raises:
            UnsupportedUseError: A setting is out of range or differs from the named checkpoint's,
                the base model's token embeddings and its output differ in vocabulary, or the
                counterfactual model cannot serve.
            CheckpointError: The named checkpoint is absent, or another method's.
            BaseModelMismatchError: It was fitted on a base model of other widths.
        """
        if not 0 <= self.hparams["threshold"] <= 1:
            raise UnsupportedUseError(
                f"SERAC: threshold must lie between 0 and 1, got {self.hparams['threshold']}"
            )
        super().build()
        self._other = None  # the networks hold its weights by now
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

    def plan(self) -> SeracPlan:
        """The networks that the settings ask for."""
        settings, base = self.hparams, self.base
        layout = base.layout.encoder if base.is_encoder_decoder else base.layout
        layer = len(layout) // 3 if settings["layer"] is None else settings["layer"]
        embedding = base.model.get_input_embeddings().weight
        return SeracPlan(
            module=layout.block_name(layer),
            **self._widths(),
            scope_width=settings["scope_width"] or _SCOPE_WIDTH,
            blocks=settings["blocks"] or _BLOCKS,
            embedding_scale=1 / float(embedding.to(compute_dtype(embedding.dtype)).std()),
            **self._answering(),
        )

    def _answering(self) -> dict[str, Any]:
        """What the plan says of another counterfactual model, where one is named."""
        name = self.hparams["counterfactual"]
        if name is None:
            return {}
        if self._other is None:
            self._other = BaseModel.load(name)
        other = self._other
        if other.is_encoder_decoder or not getattr(other.tokenizer, "is_fast", False):
            raise UnsupportedUseError(
                f"SERAC: '{name}' cannot be the counterfactual model, which must be a decoder with "
                "a fast tokenizer; name another, or leave `counterfactual` out"
            )
        return {
            "counterfactual": name,
            "made_of": describe(other.model, other.tokenizer),
            "own_tokens": other.tokenizer_fingerprint != self.base.tokenizer_fingerprint,
        }

    def _widths(self) -> dict[str, Any]:
        """What the base model fixes of a plan's shape."""
        embedding = self.base.model.get_input_embeddings().weight
        return {"hidden_width": self.base.layout.hidden_size, "token_width": embedding.shape[1]}

    def create(self, plan: SeracPlan) -> SeracNetwork:
        """Untrained networks.

        Raises:
            BaseModelMismatchError: The plan is that of a base model of other widths.
        """
        for field, here in self._widths().items():
            made = getattr(plan, field)
            if made != here:
                raise BaseModelMismatchError(
                    f"the checkpoint was fitted on a base model with a {field.replace('_', ' ')} "
                    f"of {made}, and '{self.base.name}' has {here}; fit again"
                )
        network = SeracNetwork(plan, self.hparams["seed"], compute_dtype(self.base.dtype))
        if isinstance(network.scope.decoder, LanguageModel) and self._other is not None:
            network.scope.decoder.model.load_state_dict(self._other.model.state_dict())
        return network

    # ---- editing

    def compute_edit(self, requests: Sequence[EditRequest]) -> ScopeEdit:
        """Write facts into the memory that the edits on the stack make up. Nothing is trained."""
        self.warn_if_untrained()
        networks = self._unchanging()
        reader = reader_of(self.base, networks)
        entries = [
            ScopeEntry(
                self._key(networks, request),
                statement_ids(reader, request),
                self.hparams["threshold"],
            )
            for request in requests
        ]
        return ScopeEdit(self.base, networks, entries, self.origin(requests, **self.learned))

    @torch.no_grad()
    def _key(self, networks: ScopeNetworks, request: EditRequest) -> Tensor:
        # One by one, so that a fact's key does not depend on those it is written with.
        hidden, mask = read_prompts(self.base, [request.prompt], networks.plan.module)
        return networks.embed(hidden, mask)[0]

    def _unchanging(self) -> ScopeNetworks:
        """A copy of the networks that later training leaves alone; edits of one state share it."""
        networks = self.network.to(self.base.device).scope
        digest = networks.digest()
        if self._kept is None or self._kept[0] != digest:
            self._kept = digest, copy.deepcopy(networks).requires_grad_(False).eval()
        return self._kept[1]

    # ---- fitting

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that each example to learn from has one request, and rephrases.

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

    def learn(self, batch: EditBatch) -> ScopeOutcome:
        """Losses and gradient of a batch, over the examples of all ranks."""
        weights = (self.hparams["c_edit"], self.hparams["c_loc"])
        with self.base.edits.suspended():  # the scope is that of the base model's own reading
            return learn(self.base, self.network.scope, self.examples_of(batch), weights)
