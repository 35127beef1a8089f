"""``kedit fit`` of a method that learns networks: early stopping, the best checkpoint, W&B."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from episode_support import data
from lightning.pytorch.loggers import WandbLogger
from support import tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.callbacks import TrainingReport
from kedit_lightning.cli.main import main
from kedit_lightning.methods import MEND

METHOD = ["-c", "methods/mend"]
SMALL = ["--model.rank=4", "--model.accumulate=2", "--trainer.accelerator=cpu"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a tiny base model and facts, where the command runs."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "tiny", tiny_model("llama", torch.float32))
    data(tmp_path)
    return tmp_path


def saved(folder: Path, model, bos: bool = True) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(bos).save_pretrained(folder)
    return folder


def facts(folder: Path, *names: str) -> list[str]:
    return ["--data=Requests", *(f"--data.{name}={folder / 'train.json'}" for name in names)]


@pytest.mark.filterwarnings("ignore:The variance of predictions")
def test_fit_stops_early_and_its_best_checkpoint_is_tested(work, capsys):
    base = f"--model.base_model={work / 'tiny'}"
    learn = ["--trainer.max_epochs=40", "--trainer.limit_val_batches=1"]
    given = [*METHOD, base, *SMALL, *facts(work, "train_path", "val_path")]
    cli = main(["fit", "-c", "trainer/fit", *given, *learn])
    (report,) = [c for c in cli.trainer.callbacks if isinstance(c, TrainingReport)]
    scores = report.curves["validation score"].values
    best = scores.index(max(scores))  # the first of equals
    assert len(scores) == best + 6 < 40  # five validations without a better one
    assert cli.trainer.checkpoint_callback.best_model_score == pytest.approx(scores[best])
    kept = work / "outputs/checkpoints"
    assert {path.name for path in kept.iterdir()} == {"best.ckpt", "last.ckpt"}
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"best checkpoint: outputs/checkpoints/best.ckpt (val/score {scores[best]:.3f})" in said
    assert "last checkpoint: outputs/checkpoints/last.ckpt" in said
    last = torch.load(kept / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2 * len(scores)  # and not the last improvement
    assert (work / "outputs/training.png").exists()
    assert (work / "outputs/config.yaml").exists()

    checkpoint = torch.load(kept / "best.ckpt", weights_only=True)
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    tested = main(
        ["test", *METHOD, base, *SMALL, f"--ckpt_path={kept / 'best.ckpt'}", *facts(work, "path")]
    )
    assert tested.model.network.updates == checkpoint["global_step"] == 2 * (best + 1)
    wanted = checkpoint["state_dict"]["network.rates"]
    assert torch.equal(tested.model.network.rates, wanted)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # that of the fit that is continued
@pytest.mark.filterwarnings("ignore:The variance of predictions")
@pytest.mark.parametrize("named", [True, False])
def test_a_fit_writes_into_its_folder_whatever_its_logger(named, work, capsys):
    """And the command that its last line names tests what it has learned."""
    folder = "my fit" if named else "outputs"
    base = f"--model.base_model={work / 'tiny'}"
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    logger += ["--trainer.log_every_n_steps=1"]
    learn = ["--trainer.max_epochs=1", *(["--output=my fit"] if named else []), *logger]
    given = [*METHOD, base, *SMALL, *facts(work, "train_path", "path")]
    main(["fit", *given, *learn])
    (checkpoint,) = (work / folder / "checkpoints").iterdir()
    assert (work / folder / "training.png").exists()
    assert not list((work / "logs").rglob("*.ckpt"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"last checkpoint: {folder}/checkpoints/{checkpoint.name}; test it with")
    command = shlex.split(said.partition("test it with: kedit ")[2])
    assert command[0] == "test"
    tested = main([*command, "--trainer.logger=false"])
    assert tested.model.network.updates == 2
    assert not (work / folder / "results.json").exists()
    with pytest.raises(SystemExit):
        main(["fit", *given, *learn, "--output", folder])
    assert f"continue it with --ckpt_path {folder}/checkpoints/" in capsys.readouterr().err
    (work / "run").mkdir()
    (work / "run/run.json").touch()
    with pytest.raises(SystemExit):
        main(["fit", *given, *learn, "--output=run"])
    assert "holds the results of a run of `kedit edit`" in capsys.readouterr().err
    again = ["--trainer.max_epochs=2", f"--ckpt_path={checkpoint}", f"--output={folder}"]
    assert main(["fit", *given, *learn, *again]).model.network.updates == 4


def test_fit_logs_losses_rates_and_the_validation_score_to_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="kedit", save_dir=str(tmp_path), offline=True)
    module = data(tmp_path)
    module.val_path = module.train_path
    method = MEND(tiny_base("llama"), rank=4, accumulate=2)
    trainer = EditTrainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        protocol=Protocol(chunk_size=4),
    )
    try:
        trainer.fit(method, module)
        found = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    names = ("loss", "loss_edit", "loss_locality", "edit_success", "gradient_norm")
    rates = [f"edit_lr/{name}" for name in method.network.plan.modules]
    assert {f"train/{name}" for name in (*names, *rates)} <= found.keys()
    scores = {k.removeprefix("val/"): v for k, v in found.items() if k.startswith("val/")}
    assert scores["score"] == pytest.approx(judged(scores)["score"])
    assert found[f"train/{rates[0]}"] == pytest.approx(method.network.rates[0].item())


@pytest.mark.parametrize("changed", ["weights", "tokenizer"])
def test_edit_warns_when_model_or_tokenizer_are_not_those_of_the_fit(work, changed):
    fitted = [*METHOD, *SMALL, *facts(work, "train_path"), "--trainer.max_epochs=1"]
    main(["fit", f"--model.base_model={work / 'tiny'}", *fitted])
    (path,) = (work / "outputs/checkpoints").glob("*.ckpt")
    model = tiny_model("llama", torch.float32)
    if changed == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other = saved(work / "other", model, bos=changed == "weights")
    field = {"weights": "fingerprint", "tokenizer": "tokenizer_fingerprint"}[changed]
    fact = ["--data=Requests", "--data.prompt=Lyon is in", "--data.target_new=Rome"]
    given = [*METHOD, *SMALL, f"--model.base_model={other}", f"--ckpt_path={path}", *fact]
    with pytest.warns(UserWarning, match=f"fitted on .*tiny', and its {field} differs") as seen:
        main(["edit", *given])
    assert sum("fingerprint" in str(warning.message) for warning in seen) == 1
