"""InstructEdit: MEND on requests with an instruction that describes their task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.chat_turns import put_before
from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError, article_list
from kedit_lightning.methods.hypernetwork.shared.hypernetwork_method import (
    HypernetworkMethod,
    HypernetworkSettings,
)
from kedit_lightning.methods.hypernetwork.shared.mend_network import (
    TEMPLATE,
    InstructEditPlan,
    MENDMethod,
    MENDMethodSettings,
)
from kedit_lightning.methods.method import MethodSettings, Need
from kedit_lightning.methods.shared.row_lengths import RowText, request_rows
from kedit_lightning.methods.training.episodes import Episode, rotate
from kedit_lightning.requests import EditBatch, EditExample, EditRequest


@dataclass(frozen=True)
class InstructEditSettings(MENDMethodSettings, HypernetworkSettings):
    """Settings of :class:`InstructEdit`."""

    tasks: dict[str, list[str]] | None
    held_out: list[str] | None
    template: str | None


class InstructEdit(MENDMethod, HypernetworkMethod):
    """MEND over several tasks with instructions (Zhang et al. 2024, arXiv 2402.16123).

    The gradient of a request is taken with an instruction before its prompt, which names and
    describes the request's ``task``, so that one network can tell tasks apart and edit facts of
    tasks it was not fitted on. Probes carry no instruction. ``fit`` draws another description for
    each request in each epoch; the last description of each task is kept for edits.

    Differences from the released code, beside those of :class:`MEND`: descriptions are drawn anew
    in each epoch, not once a record; nothing is added to the vocabulary; the edit loss is that of
    rephrases, not of the request's own prompt alone.

    Args:
        base_model: The model to edit.
        tasks: Descriptions by task: those of ``fit``, then the one of edits. A single one serves
            for both.
        held_out: Tasks that ``fit`` leaves out.
        template: The template of an instructed request: text with ``{task}``, ``{description}``
            and, at its end, ``{prompt}``. ``"{prompt}"`` alone gives MEND. The checkpoint's, or
            else one with all three.
        **settings: The settings of :class:`MEND`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"task"})
    settings_type: ClassVar[type[MethodSettings]] = InstructEditSettings
    plan_type = InstructEditPlan

    settings: InstructEditSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        tasks: dict[str, list[str]] | None = None,
        held_out: list[str] | None = None,
        template: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(base_model, **settings)

    # ---- building

    def plan(self, saved: Any = None) -> Any:
        """The architecture that the settings ask for; see the base class.

        Raises:
            UnsupportedUseError: The template does not end with its only ``{prompt}``.
        """
        plan: InstructEditPlan = super().plan(saved)
        template = plan.template
        if template.count("{prompt}") != 1 or not template.endswith("{prompt}"):
            raise UnsupportedUseError(
                f"template {template!r} must hold {{prompt}} once, at its end, where the answer "
                "begins"
            )
        return plan

    # ---- needs

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Descriptions by task."""
        return self.settings.tasks or {}

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Make sure that each request has a task with a description.

        Raises:
            MissingNeedsError: Names every request that has not.
        """
        super().check_requests(requests)
        tasks = self.tasks
        unknown = [
            f"{r.label} has task '{r.task}'" for r in requests if not tasks.get(r.task or "")
        ]
        if unknown:
            raise MissingNeedsError(
                f"there is no description of some tasks: {article_list(unknown)}; add descriptions "
                f"to `tasks`, which has {article_list(sorted(tasks)) if tasks else 'none'}"
            )

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure of probes, when fitting, and of tasks.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        super().check_examples(examples, fitting)
        if fitting:
            self.check_requests([r for example in examples for r in example.requests])

    def examples_to_fit(self, examples: Sequence[EditExample]) -> list[EditExample]:
        """The examples without a request of a task that is held out."""
        held_out = set(self.settings.held_out or ())
        return [e for e in examples if not any(r.task in held_out for r in e.requests)]

    def rows_of(self, example: EditExample) -> list[RowText]:
        """Also its requests with each instruction that they may get."""
        rows = super().rows_of(example)
        for request in example.requests:
            for description in self.tasks.get(request.task or "", ()):
                rows += request_rows(self._instructed(request, description))
        return rows

    # ---- editing and training

    def instruct(
        self, requests: Sequence[EditRequest], fitting: bool = False
    ) -> tuple[EditRequest, ...]:
        """Requests with an instruction before their prompts.

        Args:
            requests: The requests.
            fitting: Use the epoch's description of each, and not that of edits.
        """
        return tuple(
            self._instructed(request, self._description(request, fitting)) for request in requests
        )

    def _instructed(self, request: EditRequest, description: str) -> EditRequest:
        head = (self.settings.template or TEMPLATE).removesuffix("{prompt}")
        # Not str.format: other braces of a prompt or a description are ordinary text.
        text = head.replace("{task}", (request.task or "").replace("_", " "))
        text = text.replace("{description}", description)
        return replace(request, prompt=put_before(text, request.prompt))

    def _description(self, request: EditRequest, fitting: bool) -> str:
        """The last description of the task; in a fit, the epoch's one of all others."""
        *others, last = self.tasks[request.task or ""]
        if not fitting:
            return last
        key = self.settings.start, "description", request.id or request.prompt
        return rotate(others or [last], 1, self.epoch, *key)[0]

    def asked(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """The instructed requests."""
        return self.instruct(requests)

    def episodes(self, batch: EditBatch) -> list[Episode]:
        """The episodes of a batch, with instructed requests."""
        return [
            replace(e, requests=self.instruct(e.requests, True)) for e in super().episodes(batch)
        ]
