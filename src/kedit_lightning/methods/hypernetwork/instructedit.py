"""InstructEdit: MEND on requests that say what kind of fact they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.methods.hypernetwork.mend.mend import MEND
from kedit_lightning.methods.hypernetwork.shared.gradient_transform import TransformPlan
from kedit_lightning.methods.hypernetwork.shared.instructions import (
    TEMPLATE,
    check_tasks,
    check_template,
    drawn,
    instructed,
)
from kedit_lightning.methods.method import Need
from kedit_lightning.requests import EditExample, EditRequest


@dataclass(frozen=True)
class InstructPlan(TransformPlan):
    """The networks of MEND, and the instructions they were fitted with.

    Args:
        template: What requests are put into.
    """

    template: str = TEMPLATE


class InstructEdit(MEND):
    """MEND over several tasks with instructions (Zhang et al. 2024, arXiv 2402.16123).

    The gradient of a request is taken with an instruction before its prompt, which names and
    describes the request's ``task``, so that one network can tell tasks apart and edit facts of
    tasks it was not fitted on. The questions asked afterwards are as they are. ``fit`` draws
    another description for each request in each epoch; the last description of each task is kept
    for edits.

    Differences from the released code, beside those of :class:`MEND`: descriptions are drawn anew
    in each epoch, not once a record; nothing is added to the vocabulary; the new answer is asked
    for in other wordings, not in that of the request alone.

    Args:
        base_model: The model to edit.
        tasks: Descriptions by task: those of ``fit``, then the one of edits. A single one serves
            for both.
        held_out: Tasks that ``fit`` leaves out.
        template: What a request is put into: text with ``{task}``, ``{description}`` and, at its
            end, ``{prompt}``. ``"{prompt}"`` alone gives MEND. The checkpoint's, or else one with
            all three.
        **settings: Those of MEND.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"task"})
    plan_type = InstructPlan
    packaged: ClassVar[str] = ""
    settles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **MEND.settles,
        "template": ("template",),
    }

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

    def plan(self) -> InstructPlan:
        """The networks that the settings ask for.

        Raises:
            UnsupportedUseError: The template does not end with the prompt.
        """
        plan, template = super().plan(), self.hparams["template"]
        template = TEMPLATE if template is None else template
        check_template(template)
        own = {field.name: getattr(plan, field.name) for field in fields(plan)}
        return InstructPlan(**own, template=template)

    # ---- needs

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Descriptions by task."""
        tasks: dict[str, list[str]] | None = self.hparams["tasks"]
        return tasks or {}

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Make sure that each request has a task that is described.

        Raises:
            MissingNeedsError: Names every request that has not.
        """
        super().check_requests(requests)
        check_tasks(requests, self.tasks)

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure of probes, when fitting, and of tasks.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        super().check_examples(examples, fitting)
        if fitting:
            self.check_requests([r for example in examples for r in example.requests])

    def examples_to_fit(self, examples: Sequence[EditExample]) -> list[EditExample]:
        """Those without a request of a task that is held out."""
        held_out = set(self.hparams["held_out"] or ())
        return [e for e in examples if not any(r.task in held_out for r in e.requests)]

    # ---- editing and fitting

    def worded(
        self, requests: Sequence[EditRequest], fitting: bool = False
    ) -> tuple[EditRequest, ...]:
        """The requests with instructions before their prompts; see the base class."""
        plan, seed = self.network.plan, self.hparams["seed"]
        assert isinstance(plan, InstructPlan)
        read = []
        for request in requests:
            descriptions = self.tasks[request.task or ""]
            text = drawn(request, descriptions, self.turn, seed) if fitting else descriptions[-1]
            read.append(instructed(request, plan.template, text))
        return tuple(read)
