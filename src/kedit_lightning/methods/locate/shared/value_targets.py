"""Values of the edited layers: optimised at the last (MEMIT), at each (BLUE) or forward (FE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.locate.shared.alignment import Alignment
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings, Targets
from kedit_lightning.methods.locate.shared.subject_states import Carried, subject_states
from kedit_lightning.methods.locate.shared.value_optimizer import ValueOptimizer
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.requests import EditRequest

#: Share of the largest norms that an anchor leaves out (NAS).
OUTLIERS = 0.05


class NormAnchor:
    """Gives all values the mean norm of the values of the first edit (NAS, arXiv 2602.02543).

    Args:
        memories: Memories of the edits on the stack, oldest first.
    """

    def __init__(self, memories: Sequence[Mapping[str, Tensor]]) -> None:
        self._memories = memories
        #: Norms to remember, ``[n]`` by name: those of modules without an anchor so far.
        self.memory: dict[str, Tensor] = {}

    def scale(self, values: Tensor, module: str) -> Tensor:
        """Scale values ``[n, d_out]`` of a module to the norm of its first, or of these."""
        name, norms = f"{module}.norms", values.norm(dim=1)
        first = next((memory[name] for memory in self._memories if name in memory), None)
        if first is None:
            first = self.memory[name] = norms
        usual = first.double().sort().values[: max(1, round((1 - OUTLIERS) * len(first)))]
        scaled: Tensor = values * (usual.mean().to(norms) / norms)[:, None]
        return scaled


@dataclass
class LastLayerValues:
    """Values of a batch of requests, optimised once, at the last layer (MEMIT).

    Args:
        base: The base model, as its stack stands.
        requests: The requests.
        sites: Where values are outputs, by layer.
        contexts: Texts put before each prompt while its value is optimised.
        settings: How values are optimised.
        mean_keys: Gives the keys of a module, ``[n, d_in]``, that values are aligned with (EAMET).
        anchor: Scales the values (NAS).
    """

    base: BaseModel
    requests: Sequence[EditRequest]
    sites: Mapping[int, Site]
    contexts: Sequence[str]
    settings: LocateSettings
    mean_keys: Callable[[str], Tensor] | None = None
    anchor: NormAnchor | None = None
    #: Which requests are still to be written, ``[n]``; the residuals of the others are 0.
    counting: Tensor | None = None
    _values: dict[int, Tensor] = field(default_factory=dict)

    #: Whether a layer takes a share of the residual and leaves the rest to those above.
    spreads: ClassVar[bool] = True
    #: Whether the values are those of the unedited layers, so that independent edits share them.
    independent: ClassVar[bool] = True
    #: Whether only the first and the last of the usual layers are edited.
    ends_only: ClassVar[bool] = False

    def site(self, layer: int) -> Site:
        """Where the values of a layer are outputs."""
        return self.sites[max(self.sites) if self.spreads else layer]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, optimised when first needed. Shape ``[n, d_out]``, float64."""
        if layer not in self._values:
            self._values |= self._find(layer)
        return self._values[layer]

    def residuals(self, layer: int, carried: Carried = None) -> Tensor:
        """Values minus present outputs of the bare prompts. Shape ``[n, d_out]``, float64."""
        residuals = self.values(layer) - self._outputs(self.site(layer), carried)
        return residuals if self.counting is None else residuals * self.counting[:, None]

    def _find(self, layer: int) -> dict[int, Tensor]:
        """Values of a layer, and of all that share its optimisation."""
        return dict.fromkeys(self.sites, self._optimised(layer))

    def _optimised(self, layer: int) -> Tensor:
        site, alignment = self.site(layer), None
        outputs = subject_states(self.base, site.modules, self.requests).outputs
        initial = torch.stack([outputs[name][:, 0] for name in site.modules], dim=1)
        optimizer = ValueOptimizer(self.base, site, self.contexts, self.settings)
        if self.mean_keys is not None:
            keys = self.mean_keys(self.base.layout.mlp_block(site.block).down)
            alignment = Alignment(keys, self.settings.clamp)
        delta = optimizer.run(self.requests, initial, alignment)
        values = initial[:, -1].double() + delta[:, -1].double()
        return values if self.anchor is None else self.anchor.scale(values, site.modules[-1])

    def _outputs(self, site: Site, carried: Carried = None) -> Tensor:
        module = site.modules[-1]
        states = subject_states(self.base, [module], self.requests, (), carried)
        return states.outputs[module][:, 0].double()


class OwnLayerValues(LastLayerValues):
    """Values optimised at each layer, which takes its whole residual (BLUE, arXiv 2502.03748)."""

    spreads = False
    independent = False
    ends_only = True

    def _find(self, layer: int) -> dict[int, Tensor]:
        return {layer: self._optimised(layer)}


class ForwardValues(LastLayerValues):
    """Values optimised at the first layer; one forward pass gives the others (FE, 2605.00358)."""

    spreads = False

    def _find(self, layer: int) -> dict[int, Tensor]:
        modules = {other: site.modules[-1] for other, site in self.sites.items()}
        change = self._optimised(layer) - self._outputs(self.site(layer))
        names, added = list(dict.fromkeys(modules.values())), (modules[layer], change)
        outputs = subject_states(self.base, names, self.requests, added=added).outputs
        return {other: outputs[module][:, 0].double() for other, module in modules.items()}


#: The ways to find values, by the setting ``targets``.
VALUE_TARGETS: Mapping[Targets, type[LastLayerValues]] = MappingProxyType(
    {"last": LastLayerValues, "own": OwnLayerValues, "forward": ForwardValues}
)
