"""Pictures prepared by worker processes: equal scores and draws, errors, and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from tiny_vision import draw, vision_base, vision_folder
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import load_image

from kedit_lightning import EditRequest, EditTrainer
from kedit_lightning.base_models.rows import ImageEncoder
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cli.main import main
from kedit_lightning.data import EVQA
from kedit_lightning.data.dataloader import BatchLoader
from kedit_lightning.data.picture_workers import with_pictures
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.methods import FTM
from kedit_lightning.requests import EditBatch, EditExample

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = ROOT / "tests" / "samples" / "published" / "vqa_eval.json"


def _batch(*images: Any) -> EditBatch:
    facts = [EditRequest("It is a", " tower", image=image) for image in images]
    return EditBatch([EditExample.from_request(fact, str(i)) for i, fact in enumerate(facts)])


@pytest.fixture
def encoder() -> ImageEncoder:
    images = vision_base("llava").encoder.images
    assert images is not None
    return ImageEncoder(images.processor)


@pytest.mark.slow
def test_kedit_fits_a_hypernetwork_on_pictures_that_workers_open(tmp_path):
    data = [f"--data.train_path={FILE}", f"--data.path={FILE}", "--data.num_workers=2"]
    model = [f"--model.base_model={vision_folder(tmp_path / 'llava')}", "--model.rank=4"]
    run = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"]
    run += [f"--trainer.default_root_dir={tmp_path / 'fit'}", "--model.layers=[1]"]
    main(["fit", "-c", "methods/mend", "-c", "data/evqa", *model, *data, *run])
    (checkpoint,) = (tmp_path / "fit").rglob("*.ckpt")
    test = ["--model.layers=[1]", "--trainer.accelerator=cpu", f"--output={tmp_path / 'scores'}"]
    test += [f"--model.checkpoint={checkpoint}", "--trainer.protocol.generate=false"]
    main(["test", "-c", "methods/mend", "-c", "data/evqa", *model, *data, *test])
    lines = (tmp_path / "scores" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2


def test_scores_are_equal_with_and_without_workers():
    scores, draws = [], []
    for workers in (0, 2):
        trainer = EditTrainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            protocol=Protocol(mode="single", generate=False),
        )
        method = FTM(vision_base("llava"), lr=5e-2, steps=3)
        torch.manual_seed(3)
        (found,) = trainer.test(method, EVQA(FILE, num_workers=workers), verbose=False)
        scores.append(
            {k: v for k, v in found.items() if k.split("/")[0] not in ("timing", "memory")}
        )
        draws.append(torch.rand(()).item())
    assert scores[0] == scores[1]
    assert draws[0] == draws[1]


def test_the_model_finds_prepared_what_workers_have_seen(tmp_path, encoder):
    paths = [draw(tmp_path / f"{i}.png", 40 + i) for i in range(3)]
    batches = [_batch(paths[0], None), _batch(None), _batch((paths[1], paths[2]), paths[1])]
    rows = [(paths[0],), (paths[1], paths[2]), (paths[1],)]
    own = [ImageEncoder(encoder.processor).pixels(row) for row in rows]
    assert list(with_pictures(batches, 0, encoder)) == batches
    assert not encoder._seen
    assert list(with_pictures(batches, 2, encoder)) == batches
    assert len(encoder._seen) == len(rows)
    encoder.seen = None  # type: ignore[assignment,method-assign]  # nothing is seen anew
    for row, expected in zip(rows, own, strict=True):
        found = encoder.pixels(row)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    draw(tmp_path / "0.png", 50, width=14)  # a changed file is another picture
    with pytest.raises(TypeError):
        encoder.pixels(rows[0])


def test_a_picture_that_is_none_is_reported_where_it_is_asked_about(tmp_path, encoder):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken, good = str(tmp_path / "broken.png"), draw(tmp_path / "a.png", 60)
    batches = [_batch(broken, good)]
    assert list(with_pictures(batches, 1, encoder)) == batches
    assert len(encoder._seen) == 1
    with pytest.raises(InvalidRequestError, match=r"image '.*broken\.png' cannot be read"):
        encoder.pixels((broken,))


def test_pixels_are_kept_up_to_a_size(tmp_path, encoder):
    rows = [(draw(tmp_path / f"{i}.png", i),) for i in range(3)]
    encoder.kept_bytes = 2 * encoder.seen(rows[0]).nbytes
    for row in rows:
        encoder.pixels(row)
    assert len(encoder._seen) == 2
    # Workers send no more than half of it for one batch.
    again = ImageEncoder(encoder.processor)
    again.kept_bytes = encoder.kept_bytes
    list(with_pictures([_batch(*(row[0] for row in rows))], 1, again))
    assert len(again._seen) == 1


class Direct(LlavaProcessor):
    """A processor that does not call its image processor as others do."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        pixels = self.image_processor.preprocess(images, return_tensors="pt")
        return BatchFeature({**self.tokenizer(text, return_tensors="pt"), **pixels})


class Sized(LlavaProcessor):
    """A processor that counts tokens by the pictures themselves."""

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        width = np.asarray(images[0]).shape[1]
        return super().__call__(images=images, text=[text[0] + " a" * width], **options)


@pytest.mark.parametrize("kind", [Direct, Sized])
def test_processors_that_work_otherwise_are_called_anew(tmp_path, encoder, kind):
    own = encoder.processor
    processor = kind(
        own.image_processor,
        own.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    path = draw(tmp_path / "a.png", 1)
    other = ImageEncoder(processor)
    assert list(with_pictures([_batch(path)], 1, other)) == [_batch(path)]
    expected = processor(images=[load_image(path)], text=["<image> It"], return_tensors="pt")
    assert other.encode("<image> It", (path,), True).ids == tuple(expected["input_ids"][0].tolist())
    assert torch.equal(other.pixels((path,))["pixel_values"], expected["pixel_values"])


def test_what_resuming_skips_is_not_prepared():
    seen: list[int] = []

    def prepared(batches: Any) -> Any:
        for batch in batches:
            seen.append(batch)
            yield batch

    loader = BatchLoader(lambda epoch: [1, 2, 3], 3, {}, prepared=prepared)
    loader.load_state_dict({"epoch": 0, "batches": 2, "ended": False, "identity": {}})
    assert list(loader) == seen == [3]
