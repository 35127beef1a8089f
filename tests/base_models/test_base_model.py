"""Base models: loading, what they refuse, how they are told apart, and how they answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import edit_kinds
import pytest
import torch
import transformers
from edit_kinds import ANSWERS, PROMPTS, answers, raw_logits
from support import FAMILIES, LLAMA_LIKE, tiny_base, tiny_model, tiny_tokenizer
from torch import nn

from kedit_lightning import BaseModel, BaseModelSpec
from kedit_lightning.base_models.generation import sentence_ended
from kedit_lightning.base_models.spec import longest_row
from kedit_lightning.errors import (
    BaseModelNotFoundError,
    MissingExtraError,
    NonFiniteError,
    UnsupportedUseError,
)


def _save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> BaseModel:
    base = tiny_base(family, dtype)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return base


# ---- loading


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_loads_a_folder(family, tmp_path):
    saved = _save(tmp_path, family)
    for source in (str(tmp_path), tmp_path, BaseModelSpec(str(tmp_path))):
        base = BaseModel.load(source)
        assert base.name == str(tmp_path)
        assert torch.equal(raw_logits(base.model), raw_logits(saved.model))
        assert base.fingerprint == saved.fingerprint
        assert base.tokenizer_fingerprint == saved.tokenizer_fingerprint
    assert base.is_encoder_decoder == (family == "t5")


@pytest.mark.parametrize("dtype", ["auto", "float32", "float64", "bfloat16", "float16"])
def test_the_dtype_is_an_option(dtype, tmp_path):
    _save(tmp_path, dtype=torch.bfloat16)
    base = BaseModel.load(tmp_path, dtype=dtype)
    assert base.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    assert all(p.dtype == base.dtype for p in base.model.parameters())
    spec = BaseModelSpec(str(tmp_path), dtype="float16")
    assert BaseModel.load(spec, dtype=dtype).dtype == base.dtype


def test_other_options_reach_transformers(tmp_path):
    _save(tmp_path)
    base = BaseModel.load(tmp_path, attn_implementation="eager")
    assert base.model.config._attn_implementation == "eager"
    assert BaseModel.load(tmp_path, device_map="cpu").device == torch.device("cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU multiplies float16 fast")
def test_weights_that_a_processor_multiplies_slowly_are_named(tmp_path):
    _save(tmp_path, dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"float16.*--model\.base_model\.dtype float32"):
        assert BaseModel.load(tmp_path).dtype == torch.float16
    for dtype in ("float16", "float32", "bfloat16"):  # chosen, so that nothing is said
        assert BaseModel.load(tmp_path, dtype=dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("option", [{"dtype": "fp16"}, {"quantization": "2bit"}])
def test_an_unknown_way_to_load_is_refused_with_the_known_ones(option):
    (field, value) = next(iter(option.items()))
    known = "float32, float64" if field == "dtype" else "8bit, 4bit"
    with pytest.raises(UnsupportedUseError, match=f"'some-model' .*{field} '{value}'.*{known}"):
        BaseModel.load("some-model", **option)


def test_quantisation_says_which_package_it_needs(tmp_path, monkeypatch):
    _save(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match="4bit needs bitsandbytes: pip install"):
        BaseModel.load(tmp_path, quantization="4bit")


def test_an_unknown_name_is_one_sentence_with_the_ways_out():
    with pytest.raises(BaseModelNotFoundError) as caught:
        BaseModel.load("nobody/has-this-model")
    message = str(caught.value)
    for part in ("'nobody/has-this-model'", "folder", "hub", "cache", "packaged models: nano"):
        assert part in message
    assert "\n" not in message


def _break(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "weights":
        weights.unlink()
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "cut config":
        (folder / "config.json").write_text('{"model_type": ')
    elif how == "tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif how == "model type":
        (folder / "config.json").write_text(json.dumps({"model_type": "perpetuum"}))


@pytest.mark.parametrize(
    "how", ["weights", "config", "cut weights", "cut config", "tokenizer", "model type"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_that_is_not_whole_is_refused_by_name(family, how, tmp_path):
    _save(tmp_path, family)
    _break(tmp_path, how)
    with pytest.raises(BaseModelNotFoundError, match=f"folder '{tmp_path}' could not") as caught:
        BaseModel.load(tmp_path)
    assert "config, weights and tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_a_model_runs_only_when_allowed(tmp_path):
    _save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UnsupportedUseError, match=r"trust_remote_code.*trust its source"):
        BaseModel.load(tmp_path)
    assert not ran.exists()


# ---- the object


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_it_is_frozen_and_in_evaluation_mode(family):
    model = tiny_model(family).train().requires_grad_(True)
    base = BaseModel(model, tiny_tokenizer(True))
    assert base.model is model
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_its_name_is_given_or_that_of_the_model(tmp_path):
    assert BaseModel(tiny_model("llama"), tiny_tokenizer(True)).name == "llama"
    assert BaseModel(tiny_model("llama"), tiny_tokenizer(True), name="mine").name == "mine"
    assert repr(tiny_base("gpt2")) == "BaseModel('gpt2', gpt2, 0 edits)"


def test_it_is_no_part_of_a_module_that_holds_it():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = tiny_base("llama")

    assert not list(Holder().parameters())
    assert not Holder().state_dict()


def test_it_moves_unless_it_is_placed():
    base = tiny_base("llama")
    before = raw_logits(base.model)
    assert base.to("cpu") is base
    assert base.device == torch.device("cpu")
    placed = tiny_base("llama")
    placed.model.hf_device_map = {"": "cpu"}
    placed.to("meta")
    assert placed.device == torch.device("cpu")
    assert torch.equal(raw_logits(placed.model), before)


def test_the_longest_row_is_that_of_the_configuration():
    assert tiny_base("gpt2", n_positions=77).max_tokens == 77
    assert tiny_base("llama", max_position_embeddings=99).max_tokens == 99
    assert longest_row(transformers.XLNetConfig()) > 10**5  # it states -1, for no limit
    assert tiny_base("bloom", n_layer=2, n_head=4).max_tokens >= 128
    assert tiny_base("t5", n_positions=66).max_tokens == 66
    nested = tiny_base("llama")  # models that see images keep the settings of their text apart
    text = {**LLAMA_LIKE, "max_position_embeddings": 55}
    nested.model.config = transformers.AutoConfig.for_model("gemma3", text_config=text)
    assert nested.max_tokens == 55


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value):
    base = tiny_base("llama", torch.bfloat16)
    base.check_finite()
    name = "model.layers.2.mlp.up_proj.weight"
    model = tiny_model("llama", torch.bfloat16)
    model.get_parameter(name).data[3, 4] = value
    broken = BaseModel(model, base.tokenizer, name="broken")
    with pytest.raises(NonFiniteError, match=rf"'broken' hold NaN or infinite .*'{name}'.*load"):
        broken.check_finite()


# ---- fingerprints


def test_a_fingerprint_tells_weights_dtype_and_configuration_apart():
    base = tiny_base("llama")
    assert base.fingerprint == tiny_base("llama").fingerprint
    others = {
        "dtype": tiny_base("llama", torch.float32),
        "config": tiny_base("llama", rms_norm_eps=1e-3),
        "heads": tiny_base("llama", num_attention_heads=8),
        "family": tiny_base("gpt_neox"),
    }
    trained = tiny_model("llama")
    trained.model.layers[3].mlp.down_proj.weight.data.mul_(1 + 1e-6)
    others["weights"] = BaseModel(trained, base.tokenizer)
    prints = {name: other.fingerprint for name, other in others.items()}
    assert len({base.fingerprint, *prints.values()}) == 6, prints
    # Zeros of two 16-bit types are the same bytes.
    empty = [tiny_model("llama", dtype) for dtype in (torch.float16, torch.bfloat16)]
    for model in empty:
        for parameter in model.parameters():
            parameter.data.zero_()
    assert len({BaseModel(model, base.tokenizer).fingerprint for model in empty}) == 2


def test_a_fingerprint_ignores_where_a_model_comes_from_and_how_it_runs(tmp_path):
    base = tiny_base("gpt2", torch.float32)
    before = base.fingerprint  # taken before saving, which writes into the configuration
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert BaseModel.load(tmp_path).fingerprint == before
    assert BaseModel.load(tmp_path, attn_implementation="eager").fingerprint == before
    base.model.config.use_cache = False
    assert BaseModel(base.model, base.tokenizer, name="other").fingerprint == before


def test_edits_do_not_change_a_fingerprint():
    base = tiny_base("llama")
    with edit_kinds.composite(base):
        edited = base.fingerprint, base.full_fingerprint
    clean = tiny_base("llama")
    assert edited == (clean.fingerprint, clean.full_fingerprint)


def test_fingerprints_are_the_same_in_every_process(tmp_path):
    base = _save(tmp_path)
    code = (
        "import sys; from kedit_lightning import BaseModel; base = BaseModel.load(sys.argv[1]);"
        "print(base.fingerprint, base.tokenizer_fingerprint)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [base.fingerprint, base.tokenizer_fingerprint]


def test_tokenizers_are_told_apart_by_what_they_do():
    prints = {tiny_base("llama").tokenizer_fingerprint, tiny_base("gpt2").tokenizer_fingerprint}
    assert len(prints) == 2, "one puts a token before every text and the other does not"


# ---- answers


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_generates_what_transformers_generates(family):
    base = tiny_base(family)
    row = base.encode(PROMPTS[0])
    ids = torch.tensor([row.prompt])
    wanted = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    start = 1 if base.is_encoder_decoder else len(row.prompt)
    text = base.tokenizer.decode(wanted[0, start:], skip_special_tokens=True)
    assert base.generate(PROMPTS[:1], max_new_tokens=8) == [text]


def test_options_reach_transformers_and_ours_stay():
    base = tiny_base("llama")
    plain = base.generate(PROMPTS, max_new_tokens=5)
    sampled = base.generate(PROMPTS, max_new_tokens=5, do_sample=True, temperature=9.0)
    assert sampled != plain
    several = base.generate(PROMPTS[:1], max_new_tokens=5, num_beams=3, num_return_sequences=3)
    assert len(several) == 3

    def never(ids, scores):
        return scores.index_fill(1, torch.tensor([70]), -torch.inf)

    with edit_kinds.bonus(base):
        biased = base.generate(PROMPTS[:1], max_new_tokens=5)
        banned = base.generate(PROMPTS[:1], max_new_tokens=5, logits_processor=[never])
    assert biased == [base.tokenizer.decode([70] * 5)]
    assert banned != biased
    stopped = base.generate(
        PROMPTS[:1], max_new_tokens=9, stopping_criteria=[lambda ids, scores: ids.shape[1] > 15]
    )
    assert len(stopped[0]) < len(base.generate(PROMPTS[:1], max_new_tokens=9)[0])


def test_decoding_edits_act_on_scores_and_on_free_answers():
    base = tiny_base("llama")
    before = answers(base)
    edit = edit_kinds.bonus(base)
    rows = base.rows(PROMPTS, ANSWERS)
    with edit:
        changed = answers(base) - before
        assert torch.equal(changed[..., :70], torch.zeros_like(changed[..., :70]))
        assert set(changed[..., 70][rows.answer_mask].tolist()) == {60.0}
        assert set(base.generate(PROMPTS, max_new_tokens=3)) == {base.tokenizer.decode([70] * 3)}


def test_an_answer_never_grows_past_what_the_model_takes():
    base = tiny_base("gpt2", n_positions=20)
    prompt = "The Eiffel Tower is in"
    room = 20 - len(base.encode(prompt).prompt)
    script = _Script(base, ["a" * 64], 20 - room)
    base.generate([prompt], max_new_tokens=64, logits_processor=[script])
    assert script.steps == room
    full = "a" * 20  # not one token is left, and the model still says the next one
    assert len(base.encode(full).prompt) == 20
    assert base.generate([full], max_new_tokens=64)


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (" Rome. It", True),
        (" Rome.\n", True),
        ("\n Rome", False),  # nothing has been said yet
        (" Rome", False),
        (" Rome.", False),  # more may follow: "Rome.com"
        (" St. Louis", False),
        (" J. K. Rowling", False),
        (" St. Louis. It", True),
        (' "Rome!" he', True),
        (" 3.5 million", False),
        ("罗马。", True),
        ("", False),
    ],
)
def test_when_a_sentence_has_ended(text, ended):
    assert sentence_ended(text) == ended


class _Script:
    """Makes a model write given texts, one a row, and then go on and on."""

    def __init__(self, base: BaseModel, texts: list[str], prompt_tokens: int) -> None:
        self.rows = [base.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        self.start = prompt_tokens
        self.steps = 0

    def __call__(self, ids, scores):
        self.steps += 1
        at = ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        for i, row in enumerate(self.rows):
            forced[i, row[at] if at < len(row) else 70] = 0.0
        return forced


@pytest.mark.parametrize("eos", [True, False])
def test_free_answers_stop_at_the_sentence_alone_and_in_a_batch(eos):
    base = tiny_base("llama")
    if not eos:
        base.model.generation_config.eos_token_id = None
        base.model.config.eos_token_id = None
    texts = [" Rome. It is the capital.", " St. Louis, in France. It", " Italy\nQuestion: the city"]
    wanted = [" Rome. It", " St. Louis, in France. It", " Italy\n"]
    prompts = [PROMPTS[0]] * 3
    length = len(base.encode(PROMPTS[0]).prompt)
    script = _Script(base, texts, length)
    options = {"max_new_tokens": 60, "stop_at_sentence": True}
    together = base.generate(prompts, logits_processor=[script], **options)
    assert script.steps <= max(len(row) for row in script.rows), "it wrote on after the last end"
    alone = []
    for text in texts:
        script = _Script(base, [text], length)
        alone += base.generate(prompts[:1], logits_processor=[script], **options)
    assert together == alone
    for text, start in zip(together, wanted, strict=True):
        assert start.startswith(text.rstrip()) or text.startswith(start.rstrip())
        assert sentence_ended(text)


# ---- the packaged model


def test_the_packaged_model_knows_facts_and_can_be_edited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it comes with the package, wherever the user stands
    base = BaseModel.load("nano")
    assert (base.name, base.dtype) == ("nano", torch.float32)
    assert BaseModel.load("nano", dtype="bfloat16").dtype == torch.bfloat16
    folder = Path(base.model.config._name_or_path)
    model = [folder / "model.safetensors", *folder.glob("*.json")]
    assert sum(file.stat().st_size for file in model) <= 12_000_000
    base.check_finite()
    assert base.layout.is_gated
    assert all(base.layout.write_path(i).is_linear for i in range(len(base.layout)))
    prompts = ["The capital of France is", "The mother tongue of Marie Curie is"]
    before = base.generate(prompts, max_new_tokens=8, stop_at_sentence=True)
    assert [text.strip(" .") for text in before] == ["Paris", "Polish"]
    logits = answers(base)
    with edit_kinds.low_rank(base):
        assert not torch.equal(answers(base), logits)
    assert torch.equal(answers(base), logits)
    assert base.generate(prompts, max_new_tokens=8, stop_at_sentence=True) == before


# ---- real models


@pytest.mark.real_data
def test_a_real_model_loads_and_continues_a_story(shared_data):
    base = BaseModel.load(shared_data / "models" / "stories260K")
    assert base.dtype == torch.float32
    assert len(base.layout) == 5
    assert base.layout.block(4).down == "model.layers.4.mlp.down_proj"
    assert base.layout.write_path(2).gain == pytest.approx(1.0, abs=1e-4)
    base.check_finite()
    (story,) = base.generate(["Once upon a time, there was a little girl named"], max_new_tokens=20)
    assert len(story.split()) > 5
    (name,) = base.generate(
        ["Once upon a time, there was a little girl named"], stop_at_sentence=True
    )
    assert sentence_ended(name)
    rows = base.rows([PROMPTS[0]], [ANSWERS[0]], ["Eiffel Tower"])
    upto = base.tokenizer.decode(rows.inputs["input_ids"][0, : int(rows.subject_end[0]) + 1])
    assert upto.endswith("Eiffel Tower")
    with edit_kinds.low_rank(base), torch.no_grad():
        edited = base.answer_log_probs(rows)
    assert not torch.equal(base.answer_log_probs(rows), edited)


def test_its_import_takes_no_metric_along():
    code = "import sys, kedit_lightning.base_models; print('torchmetrics' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
