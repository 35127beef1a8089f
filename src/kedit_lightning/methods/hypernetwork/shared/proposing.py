"""Hypernetworks that propose a thin change for each gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch

from kedit_lightning.edits import Edit, LowRankEdit
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import HypernetworkMethod
from kedit_lightning.methods.hypernetwork.shared.learning import learn
from kedit_lightning.methods.hypernetwork.shared.network import ProposingNetwork
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.shared.gradient_factors import capture_factors
from kedit_lightning.methods.training.episodes import Episode
from kedit_lightning.requests import EditBatch, EditRequest


class ProposingMethod(HypernetworkMethod):
    """An edit is what the networks propose for one gradient of the requests.

    A subclass says with :attr:`loss_weights` what an edit costs, and has the settings ``n_edits``
    and ``at_once`` besides those of every hypernetwork.
    """

    network: ProposingNetwork

    @property
    @abstractmethod
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the loss of the new answers and of the divergence on locality probes."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss_weights")

    # ---- editing

    def worded(
        self, requests: Sequence[EditRequest], fitting: bool = False
    ) -> tuple[EditRequest, ...]:
        """Requests in the words whose gradient is taken: their own, unless a method adds some.

        Args:
            requests: The requests.
            fitting: Whether they belong to an episode of ``fit``, and not to an edit.
        """
        return tuple(requests)

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One gradient of the requests, sent through the networks. Statistics stay as they are."""
        network = self.network.to(self.base.device)
        self.warn_if_untrained()
        read = self.worded(requests)
        rows = self.base.rows([r.prompt for r in read], [r.target_new for r in read])
        factors = capture_factors(self.base, rows, network.plan.modules)
        together = torch.zeros(len(read), dtype=torch.long)
        with torch.no_grad():
            changes = network.propose(self.base, read, factors, together)
        return LowRankEdit(
            self.base,
            {name: (change.a, change.b.T) for name, change in changes.items()},
            self.origin(requests, **self.learned),
        )

    # ---- fitting

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch: ``n_edits`` examples each."""
        episodes = self.draw_episodes(self.examples_of(batch), self.hparams["n_edits"])
        return [replace(e, requests=self.worded(e.requests, fitting=True)) for e in episodes]

    def learn(self, batch: EditBatch) -> Outcome:
        """Losses and gradient of a batch, over the episodes of all ranks.

        Takes the batch into the statistics of the normalisers, and changes nothing else.
        """
        episodes, at_once = self.episodes(batch), self.hparams["at_once"]
        return learn(self.base, self.network, episodes, self.loss_weights, at_once)
