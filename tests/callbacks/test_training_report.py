"""What a fit leaves behind: its picture, its best checkpoint, its curves in W&B."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from episode_support import data
from lightning.pytorch.callbacks import ModelCheckpoint
from support import tiny_base

from kedit_lightning import EditTrainer
from kedit_lightning.analysis.figures.training_figure import draw_training, panels_of
from kedit_lightning.analysis.learning_curve import Curve
from kedit_lightning.callbacks import TrainingReport
from kedit_lightning.methods import MEND

SMALL = {"rank": 8, "lr": 1e-4, "edit_lr": 1e-3, "accumulate": 2}


def facts(folder: Path):
    """The examples to fit on, and the same ones to validate and test."""
    module = data(folder)
    module.val_path = module.path = module.train_path
    return module


def trainer(folder: Path, *callbacks, **options) -> EditTrainer:
    return EditTrainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "default_root_dir": folder,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
            **options,
        }
    )


def report_of(trainer: pl.Trainer) -> TrainingReport:
    (found,) = [c for c in trainer.callbacks if isinstance(c, TrainingReport)]
    return found


# ---- curves


@pytest.mark.parametrize("count", [3, 8, 9, 100])
def test_a_curve_stays_small_and_keeps_its_mean(count):
    curve, values = Curve(most=8), [float(i * i) for i in range(count)]
    for step, value in enumerate(values):
        curve.add(step, value)
    assert len(curve.steps) <= 8
    assert curve.steps[-1] == count - 1
    assert curve.steps == sorted(set(curve.steps))
    state = curve.state()
    weights = [point[2] for point in state["points"]]
    assert sum(v * w for v, w in zip(curve.values, weights, strict=True)) == sum(values)
    again = Curve.from_state(json.loads(json.dumps(state)))
    assert (again.steps, again.values) == (curve.steps, curve.values)


def test_a_value_that_is_not_finite_is_left_out_of_a_curve():
    curve = Curve()
    for step, value in enumerate([1.0, float("nan"), float("inf"), 3.0]):
        curve.add(step, value)
    assert (curve.steps, curve.values) == ([0, 3], [1.0, 3.0])


# ---- the picture


def test_scalars_of_a_kind_share_a_panel():
    names = ["loss", "loss_edit", "edit_success", "validation rewrite", "edit_lr/a", "norm/of_it"]
    found = [(panel.title, own) for panel, own in panels_of(names)]
    assert found == [
        ("Losses", ["loss", "loss_edit"]),
        ("Edit success and locality", ["edit_success", "validation rewrite"]),
        ("Learning rates of the edits", ["edit_lr/a"]),
        ("Norm, of it", ["norm/of_it"]),
    ]


def test_the_picture_is_written_beside_the_config_with_what_was_logged(tmp_path, capsys):
    method = MEND(tiny_base("llama"), **SMALL)
    run = trainer(tmp_path)
    run.fit(method, facts(tmp_path))
    picture = tmp_path / "training.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out.replace("\n", "")
    curves = report_of(run).curves
    assert curves["loss"].steps == curves["loss_edit"].steps == [1, 2, 3, 4]
    assert curves["loss"].values[-1] == pytest.approx(float(run.callback_metrics["train/loss"]))
    assert curves["validation score"].steps == curves["validation rewrite"].steps == [2, 4]
    rates = {name for name in curves if name.startswith("edit_lr/")}
    assert rates == {f"edit_lr/{name}" for name in method.network.plan.modules}
    judged_by = {name for name in curves if name.startswith("validation ")}
    assert {"validation rewrite", "validation rephrase", "validation kept"} <= judged_by


def test_the_same_curves_give_the_same_picture(tmp_path):
    curve = Curve()
    for step in range(5):
        curve.add(step, 1.0 / (step + 1))
    curves = {"loss": curve, "edit_lr/some.matrix": curve, "skipped_episodes": Curve()}
    first, second = (draw_training(curves, tmp_path / f"{i}/a.png", "A fit") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert draw_training({}, tmp_path / "nothing.png", "A fit").exists()


class Stop(pl.Callback):
    """Breaks a fit off, as the user does with Ctrl-C."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_an_interrupted_fit_leaves_its_picture_and_a_resumed_one_goes_on(tmp_path):
    base = tiny_base("llama")
    keep = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, keep, Stop()).fit(MEND(base, **SMALL), facts(tmp_path))
    (tmp_path / "training.png").unlink()
    rest = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        rest.fit(
            MEND(base, **SMALL), facts(tmp_path), ckpt_path=tmp_path / "checkpoints/step=3.ckpt"
        )
    whole = trainer(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.fit(MEND(base, **SMALL), facts(tmp_path))
    wanted = report_of(whole).curves
    for name, curve in report_of(rest).curves.items():
        assert curve.steps == wanted[name].steps, name
        assert curve.values == pytest.approx(wanted[name].values), name
    assert report_of(rest).curves.keys() == wanted.keys()


def test_a_second_fit_starts_a_picture_of_its_own(tmp_path):
    base, run = tiny_base("llama"), trainer(tmp_path, max_epochs=1)
    run.fit(MEND(base, **SMALL), facts(tmp_path))
    report = report_of(run)
    again = trainer(tmp_path, report, max_epochs=1)
    again.fit(MEND(base, **SMALL), facts(tmp_path))
    assert report.curves["loss"].steps == [1, 2]
