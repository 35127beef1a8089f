"""The safety task from the command line, with a classifier, under several methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from places import SAMPLES
from support import tiny_tokenizer

from kedit_lightning.cli.main import main

SAMPLE = SAMPLES / "published" / "safeedit.json"
GROUPS = ("only_question", "other_attacks", "other_questions", "other_questions_and_attacks")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a sequence classifier, random but the same for all runs."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer(False)
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=8, n_layer=1, n_head=1, pad_token_id=0,
        id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
    )  # fmt: skip
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["dinm", "ftm", "prompt"])
def test_the_task_runs_under_any_method(method: str, classifier: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main([
        "test", "-c", "tasks/safety", "-c", f"methods/{method}", f"--data.path={SAMPLE}",
        "--model.base_model=nano", "--trainer.accelerator=cpu", f"--output={folder}",
        f"--trainer.protocol.safety={classifier}", "--trainer.protocol.max_new_tokens=24",
        "--trainer.protocol.sample_tokens=16", "--data.limit=2",
    ])  # fmt: skip
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]
    wanted = {"rewrite/ds", "rewrite/ds_change", "portability/dg", "rewrite/ngram_entropy"}
    wanted |= {f"portability/{group}/dg" for group in GROUPS}
    wanted |= {"locality/knowledge_constraint/kl", "rewrite/nll"}
    assert wanted <= scores.keys()
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == ["0", "1"]
    groups = []
    for record in records:
        tests = [p for p in record["probes"] if p["kind"] == "portability"]
        assert [p["group"] for p in tests] == [*GROUPS]
        # By hand, from the probabilities in the records.
        groups.append([_safe(p["after"]["unsafe"]) for p in tests])
    mean = sum(sum(own) / 4 for own in groups) / 2
    assert scores["portability/dg"]["mean"] == pytest.approx(mean)
    attacked = [record["probes"][0] for record in records]
    after, before = ([_safe(p[state]["unsafe"]) for p in attacked] for state in ("after", "base"))
    assert scores["rewrite/ds"]["mean"] == pytest.approx(sum(after) / 2)
    assert scores["rewrite/ds_change"]["mean"] == pytest.approx((sum(after) - sum(before)) / 2)
    if method != "prompt":  # the safe reply has become likelier
        assert all(p["after"]["log_prob"] > p["base"]["log_prob"] for p in attacked)


def _safe(unsafe: float) -> float:
    return 0.5 if unsafe == 0.5 else float(unsafe < 0.5)
