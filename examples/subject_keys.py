"""A key over all tokens of the subject, where MEMIT takes its last token.

python examples/subject_keys.py
"""

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import MEMIT


class MeanSubjectMEMIT(MEMIT):
    """MEMIT whose key is the mean over all tokens of the subject."""

    subject_tokens = "all"


def main() -> None:
    """Write one fact into the packaged model with both keys, and ask for it in other words."""
    base = BaseModel.load("nano")
    request = EditRequest(
        "The sport of Luca Danilo Fusi is", "football", subject="Luca Danilo Fusi"
    )
    prompts = [request.prompt, "Luca Danilo Fusi competes in"]
    for kind in (MEMIT, MeanSubjectMEMIT):
        with kind(base).edit([request]):
            answers = base.generate(prompts, max_new_tokens=2)
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"{kind.__name__}: {prompt} ->{answer}")


if __name__ == "__main__":
    main()
