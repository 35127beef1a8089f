"""What is measured of the texts of records: by a judge, an encoder, a classifier."""

import http.server
import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from metric_records import example, probe
from scripted_model import scripted_model
from support import REQUESTS, tiny_base, tiny_tokenizer
from toys import Toy

from kedit_lightning import EditExample
from kedit_lightning.benchmark import Protocol, ProtocolRunner, RunContext, judge
from kedit_lightning.benchmark.classifiers import POSITIVE
from kedit_lightning.benchmark.graders import Graders
from kedit_lightning.benchmark.judge import KEY_VARIABLE, Judge, Judgement, verdict
from kedit_lightning.chat_turns import prompt_text
from kedit_lightning.errors import BaseModelNotFoundError, UnsupportedUseError
from kedit_lightning.metrics import EditMetrics

CPU = torch.device("cpu")
SECRET = "sk-not-to-be-seen"
SHORT = "{question}|{answers}|{answer}"


class Server(http.server.BaseHTTPRequestHandler):
    """Says yes where the given answer is about Rome; `status` is what it answers with."""

    status = 200
    asked: list  # headers, paths and bodies

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((dict(self.headers), self.path, body))
        prompt = body["messages"][0]["content"]
        given = prompt.partition("Given answer: ")[2].partition("\n")[0]
        reply = "I cannot say" if "?" in given else "Yes" if "Rome" in given else "No."
        content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content if self.status == 200 else b"{}")

    do_GET = do_POST  # noqa: N815 - the name that http.server calls

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    monkeypatch.setattr(judge, "_PAUSES", (0.0,))
    handler = type("Handler", (Server,), {"asked": []})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{running.server_port}/v1/"
    yield handler
    running.shutdown()
    running.server_close()


def answered(*texts, kind="rewrite"):
    """A record with a probe for each text."""
    return example("1", [probe(kind, after={"text": text}) for text in texts])


def judged(graders, *texts, **given):
    record = graders.complete(answered(*texts, **given))
    return [p["after"].get("judged") for p in record["probes"]], record


def test_an_endpoint_judges_and_is_asked_once(server):
    protocol = Protocol(judge=Judge("big", server.url))
    verdicts, record = judged(Graders(protocol, CPU), "in Rome", "Milan", "in Rome")
    assert verdicts == [True, False, True]
    assert len(server.asked) == 2  # the same answer to the same question, once
    headers, path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert (body["model"], body["temperature"]) == ("big", 0)
    assert "Right answers: Rome\n" in body["messages"][0]["content"]
    computed = EditMetrics.from_records([record]).compute()
    assert computed["rewrite/gen_judge"] == pytest.approx(2 / 3)
    # A later run reads the file; another model, prompt or answer is asked anew.
    assert judged(Graders(protocol, CPU), "in Rome", "Milan", "Oslo")[0] == [True, False, False]
    assert len(server.asked) == 3
    judged(Graders(Protocol(judge=Judge("other", server.url)), CPU), "in Rome")
    assert len(server.asked) == 4


@pytest.mark.filterwarnings("ignore:judge 'big' said neither")
def test_the_key_stands_nowhere(server, tmp_path):
    protocol = Protocol(judge=Judge("big", server.url))
    verdicts, record = judged(Graders(protocol, CPU), "in Rome", "Rome?")
    assert verdicts == [True, None]
    files = [path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert files
    assert not any(SECRET in text for text in (*files, json.dumps(record), str(protocol.facts())))


@pytest.mark.parametrize("status", [302, 401, 429, 500])
def test_a_judge_that_fails_is_missing_and_nothing_stands_in_for_it(server, status):
    server.status = status
    graders = Graders(Protocol(judge=Judge("big", server.url)), CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdicts, record = judged(graders, *(f"in Rome {i}" for i in range(6)))
        again, _ = judged(graders, "in Rome 7")
    assert verdicts == [None] * 6
    assert again == [None]
    said = [str(one.message) for one in caught]
    assert [text.partition("(")[0] for text in said[:1]] == ["judge 'big' failed "]
    assert f"it answered {status}" in said[0]
    assert "is not asked any more" in said[1]
    assert SECRET not in "".join(said)
    # One that is busy is asked twice; where it points to another address nothing is sent.
    assert len(server.asked) == 6 * (1 if status in (302, 401) else 2)
    assert {path for _, path, _ in server.asked} == {"/v1/chat/completions"}
    computed = EditMetrics.from_records([record]).compute()
    assert not any("judge" in key for key in computed)
    assert computed["rewrite/gen_contains"] == 1.0
    # What failed is not remembered.
    server.status = 200
    graders = Graders(Protocol(judge=Judge("big", server.url)), CPU)
    assert judged(graders, "in Rome 0")[0] == [True]


@pytest.mark.filterwarnings("ignore:judge 'big' failed")
def test_an_endpoint_that_is_not_there_is_missing(monkeypatch):
    monkeypatch.setattr(judge, "_PAUSES", ())
    graders = Graders(Protocol(judge=Judge("big", "http://127.0.0.1:9/v1", timeout=1.0)), CPU)
    assert judged(graders, "in Rome")[0] == [None]


def test_of_messages_the_question_is_judged(server):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    record = example(
        "1", [probe("rewrite", after={"text": "Rome"}) | {"prompt": prompt_text(turns)}]
    )
    Graders(Protocol(judge=Judge("big", server.url)), CPU).complete(record)
    assert server.asked[0][2]["messages"][0]["content"].startswith("Question: Where?\n")


def test_a_reply_that_is_no_verdict_is_missing(server):
    graders = Graders(Protocol(judge=Judge("big", server.url)), CPU)
    with pytest.warns(UserWarning, match="said neither yes nor no .I cannot say."):
        assert judged(graders, "Rome?", "Milan")[0] == [None, False]


def test_locality_and_conditions_are_not_judged(server):
    graders = Graders(Protocol(judge=Judge("big", server.url)), CPU)
    apart = probe("rewrite", after={"text": "Rome"})
    apart["task"] = {"name": "ripple", "condition": True}
    record = example("1", [probe("locality", after={"text": "Rome"}), apart, probe("rewrite")])
    assert graders.complete(record) == record
    assert server.asked == []
    long = {"text": "Milan", "passage": "Milan. Later in Rome"}
    passage = probe("rewrite", after=long) | {"task": {"name": "passage"}}
    with pytest.warns(UserWarning, match="gen_cosine is left out"):
        record = graders.complete(example("1", [passage]))
    assert record["probes"][0]["after"]["judged"] is True  # the whole passage


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("yes", True), ("NO!", False), ("**Yes**, it does", True), ("Yesterday", None), ("", None),
     ("Let me think.\nIs it so?\n\nno", False), ("Yes\nQuestion: next", True), ("maybe yes", None)],
)  # fmt: skip
def test_what_a_reply_says(reply, expected):
    assert verdict(reply) is expected


def test_braces_of_answers_are_ordinary_text():
    asked = Judgement("{answer} of {x}", ("{question}", "b"), " {answers} ")
    assert asked.prompt(SHORT) == "{answer} of {x}|{question} | b|{answers}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"prompt": "{question} {answer}"}, r"must hold \{answers\}"),
     ({"url": "file:///etc"}, "http"), ({"timeout": 0}, "must be positive")],
)  # fmt: skip
def test_a_judge_that_cannot_be_asked_is_refused(settings, words):
    with pytest.raises(UnsupportedUseError, match=words):
        Judge("big", **settings)


@pytest.fixture
def scripted(tmp_path):
    """A folder with a judge that says yes to Rome and no to Milan."""
    model, tokenizer = scripted_model({"a Rome!": "yes", "a Milan?": "no", "a Bonn;": "k"})
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


def test_a_local_model_judges(scripted):
    graders = Graders(Protocol(judge=Judge(scripted, prompt=SHORT, max_new_tokens=4)), CPU)
    with pytest.warns(UserWarning, match="said neither yes nor no"):
        verdicts, _ = judged(graders, "a Rome!", "a Milan?", "a Bonn;")
    assert verdicts == [True, False, None]


def test_a_local_judge_that_is_not_there_is_an_error(tmp_path):
    graders = Graders(Protocol(judge=Judge(str(tmp_path / "none"))), CPU)
    with pytest.raises(BaseModelNotFoundError):
        judged(graders, "Rome")


def test_a_judge_is_part_of_the_protocol_and_of_the_records(server):
    plain, named = (
        Protocol(max_new_tokens=4),
        Protocol(max_new_tokens=4, judge=Judge("b", server.url)),
    )
    assert named.id != plain.id
    assert "judge" not in plain.facts()
    assert Protocol(generate=False).id == Protocol(generate=False, judge=Judge("b")).id
    assert named.id == Protocol(max_new_tokens=4, judge=Judge("b", server.url, timeout=1.0)).id
    base = tiny_base("llama")
    runner = ProtocolRunner(base, Toy(base_model=base).edit, RunContext(named))
    examples = [EditExample.from_request(request, str(i)) for i, request in enumerate(REQUESTS)]
    records = [record for e in examples for record in runner.chunk([e], 0)]
    verdicts = [p["after"]["judged"] for record in records for p in record["probes"]]
    assert len(verdicts) == 4
    assert all("judged" not in p["base"] for record in records for p in record["probes"])
    assert EditMetrics.from_records(records).compute()["rewrite/gen_judge"] == sum(verdicts) / 4
    # Nothing of it enters the answers of the base model.
    assert all("judged" not in reading for reading in runner.reader.cache.known.values())


# Embeddings and sentiment ----------------------------------------------------------------------


def of_task(name, **readings):
    task = {"name": name, "label": "negative"}
    return example("1", [probe("rewrite", answers=("aa", "ab"), **readings) | {"task": task}])


def letters(texts):
    """A scripted encoder: how often a and b occur."""
    return torch.tensor([[text.count("a"), text.count("b")] for text in texts], dtype=torch.float)


def test_passages_are_compared_with_the_nearest_answer():
    graders = Graders(Protocol(embedder=letters), CPU)
    record = graders.complete(of_task("passage", after={"text": "b", "passage": "abab"}))
    assert record["probes"][0]["after"]["cosine"] == pytest.approx(1.0)
    record = graders.complete(of_task("characters", after={"passage": "bb"}))
    computed = EditMetrics.from_records([record]).compute()
    assert computed["rewrite/gen_cosine"] == pytest.approx(0.5**0.5)
    assert Protocol(embedder=letters).facts()["embedder"].endswith("test_graders.letters")


@pytest.mark.parametrize(("task", "key"), [("passage", "gen_cosine"), ("opinion", "gen_sentiment")])
def test_what_no_model_was_named_for_is_left_out_and_said_once(task, key):
    graders = Graders(Protocol(), CPU)
    record = of_task(task, after={"passage": "a", "text": "a"}, base={"text": "b"})
    if task == "opinion":
        del record["probes"][0]["after"]["passage"]
    with pytest.warns(UserWarning, match=f"{key} is left out"):
        assert graders.complete(record) == record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graders.complete(record)


def test_a_function_may_judge_sentiment():
    graders = Graders(Protocol(sentiment=lambda texts: [t.count("good") / 4 for t in texts]), CPU)
    given = of_task("opinion", base={"text": "good good good"}, after={"text": "good"})
    record = graders.complete(given)
    # The readings that were given may be those of the cache.
    assert given["probes"][0]["base"] == {"text": "good good good"}
    # Towards the negative, as was wished.
    assert EditMetrics.from_records([record]).compute()["rewrite/gen_sentiment"] == 0.5


@pytest.mark.parametrize("named", [{0: "NEGATIVE", 1: "POSITIVE"}, {0: "pos", 1: "neutral"}])
def test_a_sequence_classifier_judges_sentiment(tmp_path, named):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(False)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1,
        pad_token_id=0, id2label=named, label2id={v: k for k, v in named.items()},
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = POSITIVE.classifier(str(tmp_path), CPU)
    (found,) = classify(["I love it."])
    assert classify(["I love it.", "It is too loud for me."])[0] == found
    ids = torch.tensor([tokenizer("I love it.")["input_ids"]])
    column = next(i for i, label in named.items() if label.lower().startswith("pos"))
    assert found == pytest.approx(model(ids).logits.softmax(-1)[0, column].item(), abs=1e-6)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedUseError, match="one class that is called positive"):
        POSITIVE.classifier(str(tmp_path), CPU)
    with pytest.raises(BaseModelNotFoundError, match="sequence classifier"):
        POSITIVE.classifier(str(tmp_path / "none"), CPU)
