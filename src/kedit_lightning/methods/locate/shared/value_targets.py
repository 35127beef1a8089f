"""Values of the edited layers: optimised at the last (MEMIT), at each (BLUE) or forward (FE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.methods.locate.shared.alignment import Alignment
from kedit_lightning.methods.locate.shared.closed_form_settings import Targets
from kedit_lightning.methods.locate.shared.locate_defaults import LocateSettings
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.locate.shared.value_optimizer import (
    Site,
    ValueOptimizer,
)
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
        """Scale values of a module to its anchor, which they are themselves if it has none.

        Args:
            values: Shape ``[n, d_out]``.
            module: Where the values are outputs.
        """
        name, norms = f"{module}.norms", values.norm(dim=1)
        known = [memory[name] for memory in self._memories if name in memory]
        if not known:
            self.memory[name] = norms
        first = known[0] if known else norms
        usual = first.double().sort().values[: max(1, round((1 - OUTLIERS) * len(first)))]
        return values * (usual.mean().to(norms) / norms)[:, None]


class LastLayerValues:
    """Values of a batch of requests, optimised once, at the last layer (MEMIT).

    Args:
        base: The base model, as its stack stands.
        requests: The requests; each has a subject.
        sites: Where values are outputs, by layer.
        contexts: Texts put before each prompt while its value is optimised, besides none.
        settings: How values are optimised.
        mean_keys: Gives the keys of a module, ``[n, d_in]``, that values are aligned with (EAMET).
        anchor: Scales the values (NAS).
    """

    #: Whether a layer takes a share of the residual and leaves the rest to those above.
    spreads: ClassVar[bool] = True
    #: Whether the values are those of the unedited layers, so that independent edits share them.
    independent: ClassVar[bool] = True

    def __init__(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        sites: Mapping[int, Site],
        contexts: Sequence[str],
        settings: LocateSettings,
        mean_keys: Callable[[str], Tensor] | None = None,
        anchor: NormAnchor | None = None,
    ) -> None:
        self.base, self.requests, self.sites = base, requests, sites
        self.contexts, self.settings, self.anchor = contexts, settings, anchor
        self._mean_keys = mean_keys
        self._values: dict[int, Tensor] = {}

    @staticmethod
    def default_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
        """The layers to edit of those that are usual for the base model."""
        return layers

    def site(self, layer: int) -> Site:
        """Where the values of a layer are outputs."""
        return self.sites[max(self.sites)]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, optimised when first needed. Shape ``[n, d_out]``, float64."""
        if layer not in self._values:
            self._values |= self._find(layer)
        return self._values[layer]

    def residuals(self, layer: int, carried: Sequence[Edit | None] | None = None) -> Tensor:
        """Values minus present outputs of the bare prompts. Shape ``[n, d_out]``, float64.

        Args:
            layer: The layer.
            carried: An edit for each request that acts on its rows alone.
        """
        return self.values(layer) - self._outputs(self.site(layer), carried)

    def _find(self, layer: int) -> dict[int, Tensor]:
        """Values of a layer, and of all that share its optimisation."""
        return dict.fromkeys(self.sites, self._optimised(layer))

    def _optimised(self, layer: int) -> Tensor:
        site = self.site(layer)
        outputs = subject_states(self.base, site.modules, self.requests).outputs
        initial = torch.stack([outputs[name][:, 0] for name in site.modules], dim=1)
        optimizer = ValueOptimizer(self.base, site, self.contexts, self.settings)
        delta = optimizer.run(self.requests, initial, self._alignment(site))
        values = initial[:, -1].double() + delta[:, -1].double()
        return values if self.anchor is None else self.anchor.scale(values, site.modules[-1])

    def _alignment(self, site: Site) -> Alignment | None:
        if self._mean_keys is None:
            return None
        keys = self._mean_keys(self.base.layout.block(site.block).down)
        return Alignment(keys, self.settings.clamp)

    def _outputs(self, site: Site, carried: Sequence[Edit | None] | None = None) -> Tensor:
        module = site.modules[-1]
        states = subject_states(self.base, [module], self.requests, (), carried)
        return states.outputs[module][:, 0].double()


class OwnLayerValues(LastLayerValues):
    """Values optimised at each layer, which takes its whole residual (BLUE, arXiv 2502.03748)."""

    spreads: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    @staticmethod
    def default_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
        """The first and the last."""
        return tuple(dict.fromkeys((layers[0], layers[-1])))

    def site(self, layer: int) -> Site:
        """Where the values of a layer are outputs."""
        return self.sites[layer]

    def _find(self, layer: int) -> dict[int, Tensor]:
        return {layer: self._optimised(layer)}


class ForwardValues(OwnLayerValues):
    """Values optimised at the first layer; one forward pass gives the others (FE, 2605.00358)."""

    independent: ClassVar[bool] = True
    default_layers = staticmethod(LastLayerValues.default_layers)

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
