"""Order, resumption and sharding of the loaders, alone and inside a real ``Trainer.fit``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import kedit_lightning.data.datamodule
import kedit_lightning.data.text.texts
from kedit_lightning.data import Requests, TextBatch, Texts
from kedit_lightning.data.dataloader import (
    BatchLoader,
    evaluation_chunks,
    process_rank,
    training_chunks,
)
from kedit_lightning.errors import ResumeError
from kedit_lightning.requests import EditBatch

# Lightning warns about a folder for checkpoints that holds some, which is what resuming needs.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.csv"
    path.write_text("prompt,target_new\n" + "".join(f"Town {i} lies in,C{i}\n" for i in range(23)))
    return path


def ids(batches: Any) -> list[list[str]]:
    return [[example.id for example in batch.examples] for batch in batches]


def in_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    for module in (kedit_lightning.data.datamodule, kedit_lightning.data.text.texts):
        monkeypatch.setattr(module, "process_rank", lambda: (rank, world_size))


def attach(data: Requests, **settings: Any) -> Requests:
    """Set up a data module as a method and its trainer do."""
    data.deals_out_chunks = settings.pop("mode", "single") != "sequential"
    data.chunk_size = settings.pop("chunk_size", 1)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(**settings)
    )
    return data


# Chunks and order ----------------------------------------------------------------------------


def test_batch_sizes_come_from_protocol_and_method(facts: Path) -> None:
    data = Requests(path=facts, train_path=facts)
    assert len(data.test_dataloader()) == 23
    assert len(data.train_dataloader()) == 23
    attach(data, chunk_size=10, fit_batch_size=4)
    assert ids(data.test_dataloader())[2] == ["20", "21", "22"]
    assert ids(data.predict_dataloader()) == ids(data.test_dataloader())
    assert len(data.train_dataloader()) == 6
    assert [len(batch) for batch in data.train_dataloader()] == [4, 4, 4, 4, 4, 3]
    assert all(isinstance(batch, EditBatch) for batch in data.train_dataloader())
    attach(data, fit_batch_size=None)
    assert len(data.test_dataloader()) == len(data.train_dataloader()) == 23


def test_training_order_follows_seed_and_epoch(
    facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(epoch: int = 0, **settings: Any) -> list[list[str]]:
        loader = Requests(train_path=facts, **settings).train_dataloader()
        loader.set_epoch(epoch)
        return ids(loader)

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    first = order()
    assert sorted(sum(first, []), key=int) == [str(i) for i in range(23)]  # noqa: RUF017
    assert first != sorted(first)
    assert order() == first
    assert order(epoch=1) != first
    assert order(seed=0) == first
    assert order(seed=1) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # what seed_everything sets
    assert order() == order(seed=1)
    assert order(seed=0) == first


def test_order_does_not_depend_on_python_or_machine() -> None:
    """Published runs are repeated on other machines: the order is written down."""
    assert list(training_chunks("abcdefgh", 8, seed=0, epoch=0)[0]) == [*"acbeghdf"]
    assert list(training_chunks("abcdefgh", 8, seed=0, epoch=1)[0]) == [*"gbacdefh"]


# Sharding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_rows_come_once_and_in_the_same_chunks(world_size: int, size: int) -> None:
    rows = list(range(23))
    alone = evaluation_chunks(rows, size)
    shared = [evaluation_chunks(rows, size, rank, world_size) for rank in range(world_size)]
    dealt = [chunk for chunks in shared for chunk in chunks if chunk]
    assert sorted(dealt) == alone
    # A rank without a batch would skip the loop in whose end all ranks meet.
    assert all(shared)
    assert evaluation_chunks([], size, 0, world_size) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_training_rows_come_at_most_once_and_ranks_keep_step(world_size: int) -> None:
    left_out = set()
    for epoch in range(20):
        shared = [
            training_chunks(range(23), 4, 0, epoch, rank, world_size) for rank in range(world_size)
        ]
        assert len({tuple(map(len, chunks)) for chunks in shared}) == 1
        rows = Counter(row for chunks in shared for chunk in chunks for row in chunk)
        assert set(rows.values()) == {1}
        assert len(rows) == 23 - 23 % world_size
        left_out |= set(range(23)) - set(rows)
    assert len(left_out) > 23 % world_size or world_size == 1


def test_data_modules_share_out_their_rows(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(loader: str, **settings: Any) -> list[list[list[str]]]:
        found = []
        for rank in range(2):
            in_process(monkeypatch, rank, 2)
            data = attach(Requests(path=facts, train_path=facts), fit_batch_size=4, **settings)
            batches = getattr(data, loader)()
            found.append(ids(batches))
            assert len(batches) == len(found[-1])
        return found

    for mode in ("single", "batch"):
        first, second = seen("test_dataloader", mode=mode, chunk_size=5)
        assert [first[0][0], second[0][0], first[1][0]] == ["0", "5", "10"]
        assert len(sum(first + second, [])) == 23  # noqa: RUF017
    first, second = seen("test_dataloader", mode="sequential", chunk_size=5)
    assert first == second
    assert len(sum(first, [])) == 23  # noqa: RUF017
    first, second = seen("train_dataloader")
    assert not set(sum(first, [])) & set(sum(second, []))  # noqa: RUF017


def _rank_of_a_real_group(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    assert process_rank() == (rank, 2)
    loader = Requests(path=Path(folder) / "facts.csv").test_dataloader()
    Path(folder, f"rank{rank}").write_text(" ".join(batch[0] for batch in ids(loader)))
    torch.distributed.barrier()  # leaving while the other one still connects would end it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_are_those_of_torch_distributed(facts: Path) -> None:
    assert process_rank() == (0, 1)
    torch.multiprocessing.spawn(_rank_of_a_real_group, (str(facts.parent),), nprocs=2)
    seen = [(facts.parent / f"rank{rank}").read_text().split() for rank in range(2)]
    assert [len(rows) for rows in seen] == [12, 11]
    assert not set(seen[0]) & set(seen[1])


# Resumption ----------------------------------------------------------------------------------


def loader(length: int | None = 5, ahead: int = 0, **identity: int) -> BatchLoader[str]:
    return BatchLoader(lambda epoch: [f"{epoch}{i}" for i in range(5)], length, identity, ahead)


def test_a_loader_continues_where_its_state_was_saved() -> None:
    broken, resumed = loader(), loader()
    broken.set_epoch(2)
    batches = iter(broken)
    assert [next(batches), next(batches)] == ["20", "21"]
    state = broken.state_dict()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == 5
    waiting = iter(resumed)
    resumed.set_epoch(2)  # as Lightning does after making the iterator
    assert list(waiting) == ["22", "23", "24"]
    assert list(resumed) == ["20", "21", "22", "23", "24"]


def test_a_state_from_the_end_of_an_epoch_starts_the_next() -> None:
    for exhaust in (False, True):
        broken, resumed = loader(), loader()
        batches = iter(broken)
        for _ in range(5):
            next(batches)
        if exhaust:
            assert next(batches, None) is None
        resumed.load_state_dict(broken.state_dict())
        assert list(resumed) == ["10", "11", "12", "13", "14"]


def test_a_new_epoch_forgets_where_the_last_one_stopped() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 3, "ended": False, "identity": {}})
    resumed.set_epoch(1)
    assert list(resumed) == ["10", "11", "12", "13", "14"]


def test_a_state_of_other_data_is_refused_inside_an_epoch() -> None:
    broken = loader(seed=0, records=23)
    batches = iter(broken)
    next(batches)
    state = broken.state_dict()
    with pytest.raises(
        ResumeError, match=r"after batch 1 of epoch 0.*: records 23 -> 24, seed 0 -> 1;"
    ):
        loader(seed=1, records=24).load_state_dict(state)
    list(batches)
    loader(seed=1, records=24).load_state_dict(broken.state_dict())


def test_an_unknown_length() -> None:
    unknown = loader(length=None, ahead=1)
    with pytest.raises(TypeError, match="not known"):
        len(unknown)
    batches = iter(unknown)
    next(batches)
    next(batches)
    assert unknown.state_dict()["batches"] == 1
    list(batches)
    assert unknown.state_dict() == {"epoch": 0, "batches": 5, "ended": True, "identity": {}}


# Lightning -----------------------------------------------------------------------------------


class Recorder(LightningModule):
    """A module that only notes what it is given."""

    def __init__(self, fit_batch_size: int = 3) -> None:
        super().__init__()
        self.fit_batch_size = fit_batch_size
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: EditBatch | TextBatch, batch_idx: int) -> torch.Tensor:
        rows = batch.texts if isinstance(batch, TextBatch) else ids([batch])[0]
        self.seen.append((self.current_epoch, " ".join(rows)))
        return self.weight * 1.0

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Interrupt(Callback):
    """Stops a run as a crash would, after so many batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if len(module.seen) == self.after:
            raise InterruptedError


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **settings},
    )


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.mark.usefixtures("_seed")
@pytest.mark.parametrize("stop", [1, 3, 7, 8, 9, 16, 19])
def test_fit_resumed_in_the_middle_of_an_epoch_sees_the_rows_of_an_unbroken_run(
    facts: Path, tmp_path: Path, stop: int
) -> None:
    """23 rows in batches of 3 are 8 batches an epoch; the last checkpoint is older than the end."""
    unbroken = Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(
        unbroken, datamodule=Requests(train_path=facts, val_path=facts)
    )
    assert len(unbroken.seen) == 24
    assert len({rows for _, rows in unbroken.seen}) > 12

    broken = Recorder()
    with pytest.raises(InterruptedError):
        trainer(tmp_path, every_step(tmp_path), Interrupt(stop)).fit(
            broken, datamodule=Requests(train_path=facts, val_path=facts)
        )
    assert broken.seen == unbroken.seen[:stop]

    resumed = Recorder()
    trainer(tmp_path, every_step(tmp_path)).fit(
        resumed,
        datamodule=Requests(train_path=facts, val_path=facts),
        ckpt_path=str(tmp_path / f"step={stop}.ckpt"),
        weights_only=True,
    )
    assert broken.seen + resumed.seen == unbroken.seen


@pytest.mark.usefixtures("_seed")
def test_fit_with_fewer_batches_than_the_loader_has(facts: Path, tmp_path: Path) -> None:
    """The next epoch starts at its own first row, not where the last one stopped."""
    settings: dict[str, Any] = {"limit_train_batches": 2, "max_epochs": 2}
    module = Recorder()
    trainer(tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), **settings).fit(
        module, datamodule=Requests(train_path=facts)
    )
    loader = attach(Requests(train_path=facts), fit_batch_size=3).train_dataloader()
    expected = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        expected += [(epoch, " ".join(rows)) for rows in ids(loader)[:2]]
    assert module.seen == expected
    resumed = Recorder()
    trainer(tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), **settings).fit(
        resumed, datamodule=Requests(train_path=facts), ckpt_path=str(tmp_path / "epoch=0.ckpt")
    )
    assert resumed.seen == expected[2:]


def test_fit_refuses_to_resume_with_another_batch_size(facts: Path, tmp_path: Path) -> None:
    trainer(tmp_path, every_step(tmp_path), max_steps=2).fit(
        Recorder(), datamodule=Requests(train_path=facts)
    )
    with pytest.raises(ResumeError, match="batch size 3 -> 4"):
        trainer(tmp_path, every_step(tmp_path)).fit(
            Recorder(4), datamodule=Requests(train_path=facts), ckpt_path=f"{tmp_path}/step=2.ckpt"
        )


def test_seed_everything_orders_the_training(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards
    orders = []
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        orders.append(ids(Requests(train_path=facts).train_dataloader()))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("known_length", [True, False])
def test_a_pass_over_text_is_resumed(
    tmp_path: Path, stop: int, known_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the length is not known, Lightning fetches ahead, and no text may be lost by that."""
    corpus = tmp_path / "c.txt"
    corpus.write_text("".join(f"line {i}\n" for i in range(9)))

    def texts() -> Texts:
        data = Texts(path=corpus, batch_size=2, max_chars=8)
        if not known_length:
            data.setup()
            monkeypatch.setitem(data._source, "records", None)
        return data

    unbroken, broken, resumed = Recorder(), Recorder(), Recorder()
    once: dict[str, Any] = {"max_epochs": 1}
    trainer(tmp_path, enable_checkpointing=False, **once).fit(unbroken, datamodule=texts())
    assert len(unbroken.seen) == 5
    with pytest.raises(InterruptedError):
        trainer(tmp_path, every_step(tmp_path), Interrupt(stop), **once).fit(
            broken, datamodule=texts()
        )
    checkpoint = str(tmp_path / f"step={stop}.ckpt")
    trainer(tmp_path, every_step(tmp_path), **once).fit(
        resumed, datamodule=texts(), ckpt_path=checkpoint
    )
    assert broken.seen + resumed.seen == unbroken.seen
