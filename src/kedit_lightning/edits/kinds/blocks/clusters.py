"""The clusters of MELO: keys of facts, grouped by their answers (Yu et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kedit_lightning.edits.rounding import indistinct

#: Gap left between two clusters that are kept apart, as in MELO's code.
GAP = 1e-5
_EXACT = "donot_use_mm_for_euclid_dist"  # the other form loses digits that small radii need


@dataclass(frozen=True)
class BlockEntry:
    """The key of one fact, and the block that answers it.

    Args:
        key: Output of the key module at the last prompt token. Shape ``[d]``.
        label: Token ids of the answer; facts with equal labels may share a cluster.
        radius: Smallest radius of a cluster with this key.
        block: Number of the block.
    """

    key: Tensor
    label: tuple[int, ...]
    radius: float
    block: int


@dataclass
class Cluster:
    """Facts with one answer that lie together.

    Args:
        centre: Mean of the keys. Shape ``[d]``.
        radius: Distance from the centre within which a prompt belongs to it.
        members: The facts.
    """

    centre: Tensor
    radius: float
    members: list[BlockEntry]

    @classmethod
    def around(cls, entry: BlockEntry, radius: float) -> Cluster:
        """A cluster of one fact."""
        return cls(entry.key, radius, [entry])

    @property
    def keys(self) -> Tensor:
        """Keys of the members. Shape ``[n, d]``."""
        return torch.stack([entry.key for entry in self.members])

    def add(self, entry: BlockEntry) -> None:
        """Take a fact in: the centre moves to the mean, and the radius reaches all members."""
        self.members.append(entry)
        keys = self.keys
        self.centre = keys.mean(0)
        farthest = float((keys - self.centre).norm(dim=1).max())
        self.radius = max(farthest, *(member.radius for member in self.members))

    def shrink(self, radius: float) -> list[BlockEntry]:
        """Shrink the radius, and give up the members that are outside; the nearest one stays."""
        self.radius = min(self.radius, radius)
        distances = (self.keys - self.centre).norm(dim=1)
        nearest = int(distances.argmin())
        outside = [float(d) > self.radius for d in distances]
        outside[nearest] = False
        lost = [entry for entry, out in zip(self.members, outside, strict=True) if out]
        self.members = [e for e, out in zip(self.members, outside, strict=True) if not out]
        return lost


@dataclass
class ClusterIndex:
    """Clusters of facts that were inserted one after another.

    Where an answer pushes another one's cluster back, the code of MELO forgets the facts that are
    left outside.  Here they get clusters of their own, and each fact knows its own prompt.

    Args:
        rounding: Relative distance within which keys are equal.
        clusters: The clusters.
    """

    rounding: float
    clusters: list[Cluster] = field(default_factory=list)

    @classmethod
    def of(cls, entries: Iterable[BlockEntry], rounding: float) -> ClusterIndex:
        """Insert facts in their order."""
        index = cls(rounding)
        for entry in entries:
            index.insert(entry)
        return index

    def insert(self, entry: BlockEntry) -> str:
        """Insert a fact, and return what was done: ``new``, ``grow`` or ``split``.

        A fact with the same key is replaced, whatever its answer.
        """
        self._remove(entry.key)
        if not self.clusters:
            self.clusters.append(Cluster.around(entry, entry.radius))
            return "new"
        centres = torch.stack([cluster.centre for cluster in self.clusters])
        distances = (centres - entry.key).norm(dim=1)
        nearest = self.clusters[int(distances.argmin())]
        distance = float(distances.min())
        if distance > nearest.radius + entry.radius:
            self.clusters.append(Cluster.around(entry, entry.radius))
            return "new"
        if nearest.members[0].label == entry.label:
            nearest.add(entry)
            return "grow"
        half = distance / 2
        for lost in nearest.shrink(half - GAP):
            away = float((lost.key - entry.key).norm()) / 2
            self.clusters.append(Cluster.around(lost, min(lost.radius, away)))
        self.clusters.append(Cluster.around(entry, min(entry.radius, half)))
        return "split"

    def _remove(self, key: Tensor) -> None:
        """Remove the facts with a key; a cluster that loses one keeps its place."""
        for cluster in self.clusters:
            keys = cluster.keys
            same = indistinct((keys - key).norm(dim=1), keys, self.rounding).tolist()
            if any(same):
                kept = zip(cluster.members, same, strict=True)
                cluster.members = [entry for entry, equal in kept if not equal]
        self.clusters = [cluster for cluster in self.clusters if cluster.members]

    def table(self) -> ClusterTable:
        """The clusters as tensors."""
        members = [(n, entry) for n, c in enumerate(self.clusters) for entry in c.members]
        keys = torch.stack([entry.key for _, entry in members])
        return ClusterTable(
            torch.stack([cluster.centre for cluster in self.clusters]),
            keys.new_tensor([cluster.radius for cluster in self.clusters]),
            keys,
            torch.tensor([number for number, _ in members], device=keys.device),
            torch.tensor([entry.block for _, entry in members], device=keys.device),
            self.rounding,
        )


@dataclass(frozen=True)
class ClusterTable:
    """Clusters as tensors: what a query is compared with.

    Args:
        centres: Shape ``[clusters, d]``.
        radii: Shape ``[clusters]``.
        keys: Keys of the facts. Shape ``[n, d]``.
        owners: Cluster of each fact. Shape ``[n]``.
        blocks: Block of each fact. Shape ``[n]``.
        rounding: Relative distance within which a key is itself.
    """

    centres: Tensor
    radii: Tensor
    keys: Tensor
    owners: Tensor
    blocks: Tensor
    rounding: float

    def on(self, device: torch.device) -> ClusterTable:
        """The same on a device."""
        names = ("centres", "radii", "keys", "owners", "blocks")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def lookup(self, queries: Tensor) -> Tensor:
        """The block of each query, ``-1`` outside of all clusters. ``[batch]`` from ``[batch, d]``.

        It is that of the nearest fact in the nearest cluster, or of the fact whose key it is.
        """
        queries = queries.to(self.keys)
        to_centres = torch.cdist(queries, self.centres, compute_mode=_EXACT).min(dim=1)
        to_keys = torch.cdist(queries, self.keys, compute_mode=_EXACT)
        inside = to_centres.values <= self.radii[to_centres.indices]
        foreign = self.owners[None] != to_centres.indices[:, None]
        found = self.blocks[to_keys.masked_fill(foreign, torch.inf).argmin(dim=1)]
        itself = to_keys.min(dim=1)
        known = indistinct(itself.values, self.keys[itself.indices], self.rounding)
        found = torch.where(known, self.blocks[itself.indices], found)
        return torch.where(inside | known, found, -1)
