"""The base of hypernetworks: what they edit, and what they ask of their data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from kedit_lightning.base_models.layout import Block, Layout
from kedit_lightning.edits.projections import check_editable, projection_shape
from kedit_lightning.methods.hypernetwork.shared.outcome import Outcome
from kedit_lightning.methods.method import Capabilities, Need
from kedit_lightning.methods.training.episodes import Episode, make_episodes, probes_of
from kedit_lightning.methods.training.stepping import SteppedMethod
from kedit_lightning.requests import EditExample


class HypernetworkMethod(SteppedMethod[Outcome]):
    """Steps networks on what edits cost that they have made.

    A subclass has the settings ``layers`` and ``modules`` and those of :meth:`draw_episodes`,
    beside those of its base.

    Args:
        base_model: The model to edit.
        seed: Start of all random choices.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True)
    needs_to_fit: ClassVar[frozenset[Need]] = frozenset({"rephrases", "locality"})
    learns: ClassVar[str] = "a hypernetwork that turns gradients into edits"
    #: Blocks at the end of a model that are edited unless a setting says otherwise.
    last_blocks: ClassVar[int] = 3
    #: The same of each half of an encoder-decoder, as MEND's paper edits T5 and BART.
    last_blocks_of_half: ClassVar[int] = 2

    # ---- building

    def edited_modules(self) -> tuple[str, ...]:
        """Names of the projections that the settings ask to edit, those of an encoder first."""
        modules: Iterable[str] | None = self.hparams["modules"]
        if modules is None:
            layout, halves = self.base.layout, self.base.is_encoder_decoder
            modules = [
                name
                for half in ([layout.encoder, layout] if halves else [layout])
                for i in self._layers_of(half)
                for name in self.projections_of(half.block(i))
            ]
        return tuple(dict.fromkeys(modules))

    def projections_of(self, block: Block) -> Sequence[str]:
        """Names of the projections of a block that are edited, unless modules are named."""
        return block.projections

    def _layers_of(self, layout: Layout) -> Iterable[int]:
        """The layers that the settings ask for, or else the last ones."""
        layers: Iterable[int] | None = self.hparams["layers"]
        if layers is not None:
            return layers
        last = self.last_blocks_of_half if self.base.is_encoder_decoder else self.last_blocks
        return range(max(0, len(layout) - last), len(layout))

    def shapes_of(self, modules: Sequence[str]) -> list[tuple[int, int]]:
        """``(d_in, d_out)`` of projections.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        return [projection_shape(check_editable(self.base.model, name)) for name in modules]

    # ---- fitting

    def draw_episodes(self, examples: Sequence[EditExample], size: int) -> list[Episode]:
        """What is written and asked in this epoch, ``size`` examples an episode."""
        settings = self.hparams
        return make_episodes(
            examples,
            size,
            self.turn,
            settings["seed"],
            settings["n_rephrases"],
            settings["n_locality"],
            settings["own_wording"],
        )

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that each example has rephrases, and that some have locality probes.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        if fitting and probes_of(examples, "locality"):
            examples = [e for e in examples if not probes_of([e], "rephrase")]
        super().check_examples(examples, fitting)
