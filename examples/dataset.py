"""A dataset of your own: quiz questions with a new answer, one JSON object a line."""

import tempfile
from pathlib import Path

from kedit_lightning import EditExample, EditRequest, EditTrainer, Probe
from kedit_lightning.data import EditDataModule, Fields
from kedit_lightning.methods import FTM

SAMPLE = """\
{"question": "Flo aired on", "answer": "BBC", "reworded": ["Flo was first broadcast on"]}
{"question": "Pedro Beato plays as", "answer": "goalie", "keep": {"Krasnaya Nov is in": "Russian"}}
"""


class Quiz(EditDataModule):
    """Quiz questions; ``reworded`` asks again, ``keep`` maps other questions to their answers."""

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one line."""
        request = EditRequest(fields.text("question"), fields.text("answer"), id=id)
        answer = (request.target_new,)
        probes = [Probe("rephrase", text, answer) for text in fields.texts("reworded")]
        if "keep" in fields:
            keep = fields.fields("keep")
            probes += [Probe("locality", text, (keep.text(text),)) for text in keep.values]
        return EditExample.from_request(request, id, probes)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quiz.jsonl"
        path.write_text(SAMPLE)
        EditTrainer(logger=False).test(FTM(base_model="nano"), Quiz(path=path))  # prints a table
