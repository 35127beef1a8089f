"""Records of scored examples for tests of the metrics, as a results file would hold them."""

import random

WORDS = ["Rome", "Rome. It is", "in Rome", "not Rome", "Paris"]


def probe(kind, group=None, after=None, base=None, before=None, answers=("Rome",), contrast=None):
    base = {} if base is None else base
    return {
        "kind": kind,
        "group": group or kind,
        "prompt": f"a {kind} prompt",
        "answers": list(answers),
        "contrast": contrast,
        "base": base,
        "before": base if before is None else before,
        "after": {} if after is None else after,
    }


def example(name, probes, stage="immediate", subject=None, **blocks):
    return {"id": name, "subject": subject, "stage": stage, "probes": probes, **blocks}


def reading(rng):
    """A reading with every entry, shares in quarters."""
    tf_tok = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0])
    return {
        "tf_tok": tf_tok,
        "tf_all": tf_tok == 1.0,
        "log_prob": -rng.random(),
        "contrast_log_prob": -rng.random(),
        "text": rng.choice(WORDS),
        "top1": [rng.randint(0, 1), 3],
        "kl": rng.random(),
    }


def random_records(count, seed=0, stages=("immediate",)):
    """Examples with every kind of probe, ragged groups, and two cases a subject."""
    rng = random.Random(seed)
    records = []
    for stage in stages:
        for index in range(count):
            probes = [
                probe(kind, group, reading(rng), reading(rng))
                for kind, group, repeats in (
                    ("rewrite", None, 1),
                    ("rephrase", None, rng.randint(0, 2)),
                    ("locality", "neighborhood", rng.randint(0, 3)),
                    ("locality", "v1.5", 1),
                    ("portability", "one_hop", rng.randint(0, 2)),
                )
                for _ in range(repeats)
            ]
            if index % 3 == 0:  # a task with metrics of its own
                said = {"passage": rng.choice(WORDS), **reading(rng)}
                long = probe("rewrite", "passage", said, reading(rng), answers=("Rome is old",))
                probes.append(long | {"task": {"name": "passage"}})
            records.append(
                example(
                    f"case {index}",
                    probes,
                    stage,
                    f"subject {index // 2}" if index % 5 else None,
                    edit={"bytes": 100 + index},
                    timing={"edit_seconds": rng.random()},
                    memory={"peak_bytes": None},
                )
            )
    return records
