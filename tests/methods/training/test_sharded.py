"""A base model that is sharded over processes: hypernetworks touch activations alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, data, spoiled_losses
from places import TESTS
from support import REQUESTS, tiny_base

from kedit_lightning import EditBatch
from kedit_lightning.callbacks.rollback_guard import state_of
from kedit_lightning.methods import MEND
from kedit_lightning.methods.hypernetwork.shared import meta_gradient

SETTINGS = {"rank": 8, "lr": 1e-4, "edit_lr": 0.01, "accumulate": 4, "checkpoint": "none"}
SCRIPT = """
import sys
from pathlib import Path
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
sys.path[:0] = [{tests!r}, {here!r}]
from support import tiny_base
from test_sharded import EXAMPLES, fitted, results

torch.set_num_threads(1)
folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
base = tiny_base(sys.argv[2])
prefix, blocks = base.layout._found
for block in blocks:
    fully_shard(block)
fully_shard(base.model)
assert base.model.get_parameter(f"{{base.layout.block(0).down}}.weight").to_local().numel()
share = EXAMPLES[distributed.get_rank() :: 2]
found = results(base, share)
two = {{"devices": 2, "strategy": "ddp", "accelerator": "cpu"}}
found["fitted"] = fitted(base, folder, accumulate=2, **two)
torch.save(found, folder / f"{{distributed.get_rank()}}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def results(base, examples):
    """What MEND learns from its share of the examples, what it writes, and the answers under it.

    One of the examples is tried a second time with a loss that is NaN, which one rank alone sees.
    """
    method = MEND(base, **SETTINGS)
    method.configure_model()
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    outcome = batch_gradient(method, EditBatch(examples))
    state = state_of(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_gradient, "outer_losses", spoiled_losses)
        without = batch_gradient(method, EditBatch(examples))
    edit = method.edit(REQUESTS)
    before = base.answer_logits(rows).detach()
    with edit:
        under = base.answer_logits(rows).detach()
        assert state_of(base) != state
    assert torch.equal(base.answer_logits(rows), before)
    assert state_of(base) == state
    return {
        "fingerprints": [base.fingerprint, edit.origin.fingerprint],
        "gradients": outcome.mean_gradients,
        "loss": outcome.loss,
        "counts": [without.episodes, without.skipped],
        "gradients without an episode": without.mean_gradients,
        "normalisers": dict(method.network.named_buffers()),
        "deltas": edit.deltas(),
        "before": before,
        "under": under,
    }


def fitted(base, folder, accumulate, **options):
    """What a fit of two epochs ends with."""
    method = MEND(base, **{**SETTINGS, "accumulate": accumulate})
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(method, data(folder))
    assert method.network.updates == 2
    return method.state_dict()


def assert_close(found, wanted, where=""):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, list):
        for number, value in enumerate(wanted):
            assert_close(found[number], value, f"{where}/{number}")
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=lambda m: where + m)
    else:
        assert found == wanted, where


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_mend_on_a_sharded_model_equals_mend_on_a_whole_one(tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), here=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launch, str(script), str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    wanted = results(tiny_base(kind), EXAMPLES)
    wanted["fitted"] = fitted(tiny_base(kind), tmp_path, accumulate=4, accelerator="cpu")
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=False), wanted)
