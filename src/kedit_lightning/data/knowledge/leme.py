"""Long-form evaluation: LEME."""

from __future__ import annotations

from functools import cached_property

from kedit_lightning.data.knowledge.counterfact import CounterFact
from kedit_lightning.data.knowledge.zsre import ZsRE
from kedit_lightning.data.probe_fields import personas_and_hops
from kedit_lightning.data.records import Fields
from kedit_lightning.requests import EditExample, Probe


class LEME(ZsRE):
    """LEME, records of zsRE and CounterFact with prompts for long answers about related entities.

    The records are those of ZsRE or CounterFact, told apart by content, and are read as there.
    coupled_prompts_and_properties adds prompts for passages: that of the subject becomes locality
    long_form_subject, those of coupled entities locality long_form_coupled; their answers are the
    base model's own passages, so what is scored is what an edit changes in them. mhop with mhop_ans
    becomes portability multi_hop, personas portability personas. The licence is that of
    its repository. Paper: https://arxiv.org/abs/2402.09394.

    Args:
        path: File with the records to edit and test, such as
            ``counterfact_with_coupled_entities.json``.
    """

    where_to_get_it = (
        "; the files are published in the repository "
        "domenicrosati/longform-evaluation-model-editing"
    )

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        nested = "requested_rewrite" in fields
        example = self._counterfact.parse(fields, id) if nested else super().parse(fields, id)
        probes = list(example.probes)
        if "coupled_prompts_and_properties" in fields:
            coupled = fields.fields("coupled_prompts_and_properties")
            if "subject_entity" in coupled:
                text = coupled.fields("subject_entity").text("coupled_prompt")
                probes.append(Probe("locality", text, (), "long_form_subject"))
            for item in coupled.objects("coupled_entities"):
                text = item.text("coupled_prompt")
                probes.append(Probe("locality", text, (), "long_form_coupled"))
        probes += personas_and_hops(fields, example.requests[0].target_new)
        return EditExample(example.requests, tuple(probes), id)

    @cached_property
    def _counterfact(self) -> CounterFact:
        return CounterFact()
