"""From text to rows of tokens: joins, offsets, padding, position ids, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from support import (
    FAMILIES,
    REQUESTS,
    TEXT,
    chat_tokenizer,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from kedit_lightning import BaseModel
from kedit_lightning.base_models.rows import (
    EncodedRow,
    RowEncoder,
    join_text,
    pad_tails,
    positions,
)
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError


def llama_like_tokenizer(
    text: tuple[str, ...] = tuple(TEXT),
) -> transformers.PreTrainedTokenizerFast:
    """SentencePiece as Llama-2 has it: a space is put before every text, bytes as a last resort."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator(text, trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [*learned["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """SentencePiece as T5 has it: unknown characters in one piece, an end token behind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


class SlowTokenizer:
    """The same tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return self._fast(text, add_special_tokens=add_special_tokens, verbose=verbose)

    def __len__(self) -> int:
        return len(self._fast)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)


TOKENIZERS = {
    "without-bos": lambda: tiny_tokenizer(False),
    "with-bos": lambda: tiny_tokenizer(True),
    "llama-like": llama_like_tokenizer,
    "unigram": unigram_tokenizer,
    "slow": lambda: SlowTokenizer(tiny_tokenizer(True)),
    "slow-llama-like": lambda: SlowTokenizer(llama_like_tokenizer()),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> Any:
    return TOKENIZERS[request.param]()


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


# ---- prompt and answer


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("The capital is", "Rome", "The capital is Rome"),
        ("The capital is ", " Rome", "The capital is Rome"),
        ("The capital is  ", "\tRome ", "The capital is Rome "),
        ("首都是", "罗马", "首都是罗马"),
        ("首都は", "ローマです", "首都はローマです"),
        ("答案\uff1a", "Rome", "答案\uff1aRome"),  # a full-width colon
        ("「答案」。", "罗马", "「答案」。罗马"),
        ("เมืองหลวงคือ", "โรม", "เมืองหลวงคือโรม"),
        ("수도는", "로마", "수도는 로마"),
        ("Столица —", "Рим", "Столица — Рим"),
        ("العاصمة هي", "روما", "العاصمة هي روما"),
        # Behind a line break or other white space, which stays.
        ("Q: Which city?\nA:\n", "Rome", "Q: Which city?\nA:\nRome"),
        ("assistant\n\n", " Rome", "assistant\n\nRome"),
        ("assistant\n  ", "Rome", "assistant\nRome"),
        ("city:\t", "Rome", "city:\tRome"),
        ("ville\u00a0:\u00a0", "Rome", "ville\u00a0:\u00a0Rome"),
        # Behind an opener.
        ('He said "', "Rome", 'He said "Rome'),
        ("He said '", "Rome", "He said 'Rome"),
        ("He said “", "Rome", "He said “Rome"),
        ("Er sagt „", "Rom", "Er sagt „Rom"),
        ("Il dit «\u00a0", "Rome", "Il dit «\u00a0Rome"),
        ("Il dit «", "Rome", "Il dit «Rome"),
        ("Er sagt »", "Rom", "Er sagt »Rom"),
        ("(", "A", "(A"),
        ("the capital [", "Rome", "the capital [Rome"),
        ('{"capital": "', "Rome", '{"capital": "Rome'),
        ("{'capital':'", "Rome", "{'capital':'Rome"),
        ('the city ("', "Rome", 'the city ("Rome'),
        ("the city—“", "Rome", "the city—“Rome"),
        ("¿", "Roma", "¿Roma"),
        ("run `", "ls", "run `ls"),
        # Not behind a closer.
        ('the capital of "Italy"', "Rome", 'the capital of "Italy" Rome'),
        ("“Italy”", "Rome", "“Italy” Rome"),
        ("„Italien“", "Rom", "„Italien“ Rom"),
        ("«Italie»", "Rome", "«Italie» Rome"),
        ("the capital (Italy)", "Rome", "the capital (Italy) Rome"),
        ("the parents'", "Rome", "the parents' Rome"),
        ('She asked: "Where?"', "Rome", 'She asked: "Where?" Rome'),
    ],
)
def test_prompt_and_answer_are_joined_as_they_are_written(prompt, answer, joined):
    assert join_text(prompt, answer) == joined


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The Eiffel Tower is in the city of", "Rome"),
        ("Marie Curie was born in", "Berlin, Germany"),
        ("Столица Италии —", "Рим"),
        ("수도는", "로마"),
        ("naïve Łódź's", "3rd café"),
        ("Q: 2 + 2 =", "4"),
        ("(a", "b)"),
    ],
)
def test_the_joined_ids_are_cut_where_the_answer_begins(tokenizer, prompt, answer):
    row = RowEncoder(tokenizer).encode(prompt, answer)
    joined = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
    prefix = RowEncoder(tokenizer).prefix
    assert (*row.prompt, *row.answer) == (*prefix, *joined)
    assert row.answer
    known = "<unk>" not in tokenizer.convert_ids_to_tokens(list(joined))
    if known:
        assert _text(tokenizer, row.prompt).strip() == prompt
        assert _text(tokenizer, row.answer).strip() == answer


def test_spaces_at_the_border_change_nothing(tokenizer):
    encoder = RowEncoder(tokenizer)
    plain = encoder.encode("The Eiffel Tower is in", "Rome", "Eiffel Tower")
    for prompt in ("The Eiffel Tower is in ", "The Eiffel Tower is in   "):
        for answer in ("Rome", " Rome", "  Rome"):
            assert encoder.encode(prompt, answer, "Eiffel Tower") == plain


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Q: Which city?\nA:\n", "Rome"),
        ("Question:\n\n", "Lyon"),
        ('He said "', "Lyon"),
        ("In the city of (", "Rome"),
        ("It is (“", "Rome"),
    ],
)
def test_what_is_trained_is_the_text_that_was_given(tokenizer, prompt, answer):
    encoder = RowEncoder(tokenizer)
    row = encoder.encode(prompt, answer)
    assert row.prompt == encoder.encode(prompt).prompt, "it is scored and generated from"
    if "<unk>" not in tokenizer.convert_ids_to_tokens([*row.prompt, *row.answer]):
        if "▁" not in str(tokenizer.convert_ids_to_tokens(list(row.prompt))):
            assert _text(tokenizer, row.prompt) == prompt
        assert prompt + answer in _text(tokenizer, (*row.prompt, *row.answer))


def test_an_answer_behind_a_line_break_that_a_token_goes_across_has_no_space():
    # As in GPT-2, two line breaks are one token at the end, and two before a word.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["A:\n\n", " Rome"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.tokenize("A:\n\n")[-1] == "ĊĊ"
    assert fast.tokenize("A:\n\nRome").count("Ċ") == 2
    for one in (fast, SlowTokenizer(fast)):
        row = RowEncoder(one).encode("A:\n\n", "Rome")
        assert fast.decode(row.prompt) == "A:\n\n"
        assert fast.decode(row.answer) == "Rome"


def test_a_prompt_has_the_same_ids_with_and_without_an_answer(tokenizer):
    encoder = RowEncoder(tokenizer)
    for request in REQUESTS:
        bare = encoder.encode(request.prompt)
        assert encoder.encode(request.prompt, request.target_new).prompt == bare.prompt
        assert bare.answer == ()
        assert encoder.count(request.prompt) == len(bare.prompt)


@pytest.mark.parametrize("prompt", ["首都是", "The answer: 首都は", "สวัสดี"])
def test_scripts_without_spaces_keep_prompt_and_answer_apart(tokenizer, prompt):
    encoder = RowEncoder(tokenizer)
    for answer in ("罗马", "โรม"):
        row = encoder.encode(prompt, answer)
        assert row.prompt == encoder.encode(prompt).prompt
        assert row.answer, "the answer went into a token of the prompt"


def test_a_token_across_the_border_gives_the_answer_its_own_ids():
    # Trained to merge what stands on both sides of the border.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["首都是罗马"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert len(fast("首都是罗马")["input_ids"]) == 1
    for one in (fast, SlowTokenizer(fast)):
        row = RowEncoder(one).encode("首都是", "罗马")
        assert _text(fast, row.prompt) == "首都是"
        assert _text(fast, row.answer) == "罗马"
    # One that puts a space before every text must not put one before the answer.
    merging = llama_like_tokenizer(("首都是罗马",) * 9)
    assert len(merging("首都是罗马", add_special_tokens=False)["input_ids"]) == 1
    for one in (merging, SlowTokenizer(merging)):
        row = RowEncoder(one).encode("首都是", "罗马")
        assert merging.convert_ids_to_tokens(list(row.answer))[0] != "▁"
        assert _text(merging, row.answer) == "罗马"


def test_the_beginning_token_stands_once_and_the_end_token_nowhere():
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        encoder = RowEncoder(tokenizer)
        has_bos = name not in ("without-bos", "unigram")
        assert encoder.prefix == ((tokenizer.bos_token_id,) if has_bos else ())
        assert encoder.suffix == ((tokenizer.eos_token_id,) if name == "unigram" else ())
        row = encoder.encode("The Eiffel Tower is in", "Rome")
        ids = (*row.prompt, *row.answer)
        assert ids.count(tokenizer.bos_token_id) == int(has_bos)
        assert tokenizer.eos_token_id not in ids
        if has_bos:
            assert ids[0] == tokenizer.bos_token_id


def test_a_rendered_prompt_begins_once(tokenizer):
    encoder = RowEncoder(tokenizer)
    plain = encoder.encode("The Eiffel Tower is in", "Rome", "Eiffel Tower")
    if not encoder.prefix:
        return
    begun = encoder.encode("<s>The Eiffel Tower is in", "Rome", "Eiffel Tower")
    assert begun.prompt.count(1) == 1
    assert begun.prompt[0] == 1
    assert begun.answer == plain.answer
    assert encoder.count_prompt("<s>The Eiffel Tower is in") == len(begun.prompt)
    assert encoder.text("<s>Rome\n").prompt == encoder.encode("<s>Rome").prompt


def test_a_start_of_two_tokens_stands_once():
    tokenizer = chat_tokenizer(True)  # as GLM-4, which begins with [gMASK]<sop>
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<pad>", 0), ("<s>", 1)]
    )
    encoder = RowEncoder(tokenizer)
    assert encoder.prefix == (0, 1)
    assert encoder.encode("<pad><s>Rome is in") == encoder.encode("Rome is in")


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_texts_are_refused(text):
    encoder = RowEncoder(tiny_tokenizer(False))
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        encoder.encode(text)
    with pytest.raises(InvalidRequestError, match=r"answer .* has no token"):
        encoder.encode("Rome is", text)


# ---- subjects


@pytest.mark.parametrize(
    ("prompt", "subject", "before"),
    [
        ("Eiffel Tower is in the city of", "Eiffel Tower", "Eiffel Tower"),  # first
        ("The Eiffel Tower is in", "Eiffel Tower", "The Eiffel Tower"),  # in the middle
        ("What is the capital of Italy", "Italy", "What is the capital of Italy"),  # last
        ("Rome, Rome and again Rome are", "Rome", "Rome, Rome and again Rome"),  # several times
        ("Art is what Arthur's Artist makes", "Art", "Art"),  # not inside other words
        ("The painter of Artland is", "Art", "The painter of Art"),  # unless it is nowhere else
        ("Łódź's mayor", "Łódź", "Łódź"),
        ("In Łódź (Lodz) live", "Łódź (Lodz)", "In Łódź (Lodz)"),
        ("I live in Lyon ", "Lyon ", "I live in Lyon"),
        ("C++ was made by", "C++", "C++"),
        ("The Eiffel Towering is", "Eiffel Tow", "The Eiffel Tow"),
        ("Founded in Berlin by", "Berli", "Founded in Berli"),  # ends inside a token of most
    ],
)
def test_the_last_token_of_a_subject(tokenizer, prompt, subject, before):
    row = RowEncoder(tokenizer).encode(prompt, "Rome", subject)
    if "<unk>" in tokenizer.convert_ids_to_tokens(list(row.prompt)):  # cannot be read back
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        first, last = encoded["offset_mapping"][row.subject_end]
        assert first < len(before) <= last
        return
    # The token holds the subject's last character, and the ones before it do not.
    assert _text(tokenizer, row.prompt[: row.subject_end + 1]).strip().startswith(before)
    assert not _text(tokenizer, row.prompt[: row.subject_end]).strip().startswith(before)


@pytest.mark.parametrize(
    ("prompt", "subject", "before"),
    [
        ("Eiffel Tower is in the city of", "Eiffel Tower", ""),  # behind a beginning token
        ("The Eiffel Tower is in", "Eiffel Tower", "The"),
        ("What is the capital of Italy", "Italy", "What is the capital of"),
        ("Rome, Rome and again Rome are", "Rome", "Rome, Rome and again"),
        ("In (Lyon) live", "Lyon", "In ("),
        ("Unfounded in Berlin by", "founded", "Un"),  # begins inside a token of some
    ],
)
def test_the_first_token_of_a_subject(tokenizer, prompt, subject, before):
    row = RowEncoder(tokenizer).encode(prompt, "Rome", subject)
    assert len(RowEncoder(tokenizer).prefix) <= row.subject_start <= row.subject_end
    if "<unk>" in tokenizer.convert_ids_to_tokens(list(row.prompt)):  # cannot be read back
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        start, stop = encoded["offset_mapping"][row.subject_start]
        assert start <= prompt.rfind(subject) < stop
        return
    ahead = _text(tokenizer, row.prompt[: row.subject_start]).strip()
    through = _text(tokenizer, row.prompt[: row.subject_start + 1]).strip()
    # The token holds the subject's first character, and none before it does.
    assert before.startswith(ahead)
    # A space that a tokenizer puts before a text has the offsets of the first letter.
    assert not through or through.startswith((before + subject[0], f"{before} {subject[0]}"))


def test_a_subject_in_a_script_without_spaces_is_its_last_occurrence():
    tokenizer = tiny_tokenizer(False)
    row = RowEncoder(tokenizer).encode("东京塔在东京的", "罗马", "东京")
    assert _text(tokenizer, row.prompt[: row.subject_start]) == "东京塔在"
    assert _text(tokenizer, row.prompt[: row.subject_end + 1]) == "东京塔在东京"


@pytest.mark.parametrize("subject", ["", "  "])
def test_a_blank_subject_is_refused(subject):
    with pytest.raises(InvalidRequestError, match="does not occur"):
        RowEncoder(tiny_tokenizer(True)).encode("The Eiffel Tower is in", None, subject)


def test_a_subject_that_is_absent_is_refused_with_both_texts():
    with pytest.raises(InvalidRequestError, match="'Louvre' does not occur in prompt 'The Eiffel"):
        RowEncoder(tiny_tokenizer(True)).encode("The Eiffel Tower is in", None, "Louvre")


def test_rows_without_a_subject_say_so():
    base = tiny_base("llama")
    prompts = [request.prompt for request in REQUESTS[:2]]
    rows = base.rows(prompts, subjects=["Eiffel Tower", None])
    assert rows.subject_end[0] > 0
    assert rows.subject_end[1] == -1
    assert rows.subject_start[1] == -1
    assert rows.subject_mask.any(1).tolist() == [True, False]


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_columns_point_at_the_tokens_they_name(family, side):
    base = tiny_base(family)
    rows = base.rows(
        [r.prompt for r in REQUESTS],
        [r.target_new for r in REQUESTS],
        [r.subject for r in REQUESTS],
        side,
    )
    ids, mask = rows.inputs["input_ids"], rows.attention_mask
    assert len(rows) == 4
    assert len(set(mask.sum(1).tolist())) > 1, "rows of equal length prove nothing"
    for i, request in enumerate(REQUESTS):
        row = base.encode(request.prompt, request.target_new, request.subject)
        whole = (*row.prompt, *row.answer)
        assert tuple(ids[i][mask[i].bool()].tolist()) == whole
        first = int(mask[i].argmax())
        assert first == (ids.shape[1] - len(whole) if side == "left" else 0)
        assert int(rows.prompt_end[i]) == first + len(row.prompt) - 1
        assert int(ids[i, rows.subject_end[i]]) == row.prompt[row.subject_end]
        assert int(rows.subject_end[i]) == first + row.subject_end
        assert int(rows.subject_start[i]) == first + row.subject_start
        subject = row.prompt[row.subject_start : row.subject_end + 1]
        assert tuple(ids[i][rows.subject_mask[i]].tolist()) == subject
        width = len(row.answer)
        assert rows.answer_mask[i].tolist() == [True] * width + [False] * (
            rows.answer_ids.shape[1] - width
        )
        assert tuple(rows.answer_ids[i, :width].tolist()) == row.answer
        # The logits in a column predict the next token.
        columns = rows.answer_columns[i, :width]
        assert tuple(ids[i, columns + 1].tolist()) == row.answer
        assert int(rows.answer_columns.max()) < ids.shape[1]
        if "position_ids" in rows.inputs:
            assert rows.inputs["position_ids"][i][mask[i].bool()].tolist() == list(
                range(len(whole))
            )


def test_positions_count_attended_tokens_alone():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]])
    wanted = [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert positions(mask).tolist() == wanted


@pytest.mark.parametrize(
    ("family", "known"), [("gpt2", True), ("llama", True), ("bloom", False), ("t5", False)]
)
def test_position_ids_are_given_where_the_model_takes_them(family, known):
    settings = {"n_layer": 2, "n_head": 4} if family == "bloom" else {}
    base = tiny_base(family, **settings)
    assert ("position_ids" in base.rows(["Rome is"]).inputs) == known
    base.forward(base.rows(["Rome is", "The Eiffel Tower is in"]))


def _log_probs(base: BaseModel, order, size: int, side) -> dict[int, torch.Tensor]:
    found = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        rows = base.rows(
            [REQUESTS[i].prompt for i in chunk],
            [REQUESTS[i].target_new for i in chunk],
            padding_side=side,
        )
        with torch.no_grad():
            logs = base.answer_log_probs(rows)
        found |= {i: logs[k][rows.answer_mask[k]] for k, i in enumerate(chunk)}
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_padding_batch_size_and_order_change_no_answer(family):
    base = tiny_base(family)
    alone = _log_probs(base, [0, 1, 2, 3], 1, "right")
    assert len({tuple(logs.tolist()) for logs in alone.values()}) == 4
    for order, size, side in [
        ([0, 1, 2, 3], 4, "right"),
        ([0, 1, 2, 3], 4, "left"),
        ([3, 1, 0, 2], 3, "left"),
        ([2, 3, 1, 0], 2, "right"),
    ]:
        other = _log_probs(base, order, size, side)
        for i, logs in alone.items():
            torch.testing.assert_close(other[i], logs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_answer_log_probs_are_those_of_the_model_itself(family):
    base = tiny_base(family)
    request = REQUESTS[0]
    row = base.encode(request.prompt, request.target_new)
    if base.is_encoder_decoder:
        inputs = {
            "input_ids": torch.tensor([[*row.prompt, *base.encoder.suffix]]),
            "decoder_input_ids": torch.tensor([[0, *row.answer[:-1]]]),
        }
        first = 0
    else:
        inputs = {"input_ids": torch.tensor([[*row.prompt, *row.answer]])}
        first = len(row.prompt) - 1
    with torch.no_grad():
        logs = base.model(**inputs).logits.log_softmax(-1)[0]
        rows = base.rows([request.prompt, REQUESTS[1].prompt], [request.target_new, "Berlin"])
        ours = base.answer_log_probs(rows)
    wanted = [logs[first + k, token] for k, token in enumerate(row.answer)]
    torch.testing.assert_close(ours[0, : len(wanted)], torch.stack(wanted), rtol=0, atol=1e-10)
    assert torch.equal(ours == 0, ~rows.answer_mask)


def test_generation_does_not_depend_on_the_batch():
    for family in (*FAMILIES, "t5"):
        base = tiny_base(family)
        prompts = [request.prompt for request in REQUESTS] * 2
        together = base.generate(prompts, max_new_tokens=8)
        assert base.generate(prompts, max_new_tokens=8, batch_size=3) == together
        assert base.generate(prompts[:4], max_new_tokens=8, batch_size=1) == together[:4]
        assert len(set(together)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_chosen_columns_are_those_of_the_whole_row(family):
    base = tiny_base(family)
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    columns = torch.stack([rows.prompt_end, rows.prompt_end - 1, rows.prompt_end], dim=1)
    whole = base.forward(rows).logits
    wanted = whole[torch.arange(4)[:, None], columns]
    torch.testing.assert_close(base.logits_at(rows, columns), wanted, rtol=0, atol=1e-12)
    assert not base.model.get_output_embeddings()._forward_pre_hooks


# ---- encoder and decoder


def test_encoder_and_decoder_ids_stand_apart():
    base = BaseModel(tiny_model("t5"), unigram_tokenizer())
    rows = base.rows(
        [r.prompt for r in REQUESTS[:2]],
        [r.target_new for r in REQUESTS[:2]],
        [r.subject for r in REQUESTS[:2]],
    )
    for i, request in enumerate(REQUESTS[:2]):
        row = base.encode(request.prompt, request.target_new, request.subject)
        encoder = rows.inputs["input_ids"][i][rows.attention_mask[i].bool()]
        assert tuple(encoder.tolist()) == (*row.prompt, 1), "the encoder needs its end token"
        mask = rows.inputs["decoder_attention_mask"][i].bool()
        decoder = rows.inputs["decoder_input_ids"][i][mask]
        assert tuple(decoder.tolist()) == (0, *row.answer[:-1])
        assert int(rows.inputs["input_ids"][i, rows.subject_end[i]]) == row.prompt[row.subject_end]
        subject = row.prompt[row.subject_start : row.subject_end + 1]
        assert tuple(rows.inputs["input_ids"][i][rows.subject_mask[i]].tolist()) == subject
    assert rows.prompt_end.tolist() == [0, 0]
    assert rows.answer_columns[:, 0].tolist() == [0, 0]
    bare = base.rows(["Rome is"])
    assert bare.inputs["decoder_input_ids"].tolist() == [[0]]


# ---- chat


@pytest.mark.parametrize("bos", [True, False])
def test_the_chat_template_is_a_switch(bos):
    tokenizer = chat_tokenizer(bos)
    plain, chat = RowEncoder(tokenizer), RowEncoder(tokenizer, chat=True)
    assert plain.encode("Where is Rome") == RowEncoder(tiny_tokenizer(bos)).encode("Where is Rome")
    row = chat.encode("Where is Rome", " Italy", "Rome")
    assert tokenizer.decode(row.prompt) == "<s><user>Where is Rome</user><assistant>"
    assert row.prompt.count(1) == 1, "the beginning token stands twice"
    assert tokenizer.decode(row.answer) == "Italy", "no space behind a template"
    upto = tokenizer.decode(row.prompt[: row.subject_end + 1])
    assert "Where is Rome" in upto
    assert "<assistant>" not in upto


@pytest.mark.parametrize("bos", [True, False])
def test_a_template_decides_whether_there_is_a_beginning_token(bos):
    """As ``apply_chat_template`` of transformers, which puts no special token of its own."""
    tokenizer = chat_tokenizer(bos)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    row = RowEncoder(tokenizer, chat=True).encode("Where is Rome")
    turns = [{"role": "user", "content": "Where is Rome"}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(row.prompt) == wanted
    assert tokenizer.bos_token_id not in row.prompt


def test_a_subject_is_looked_for_in_the_prompt_and_not_in_the_template():
    tokenizer = chat_tokenizer(True)
    row = RowEncoder(tokenizer, chat=True).encode("Does an assistant or a user ask", None, "user")
    assert tokenizer.decode(row.prompt[: row.subject_end + 1]).endswith(
        "Does an assistant or a user"
    )


def test_a_base_model_passes_the_switch_on():
    base = BaseModel(tiny_model("llama"), chat_tokenizer(True), chat=True)
    assert base.tokenizer.decode(base.encode("Hi").prompt) == "<s><user>Hi</user><assistant>"


# ---- length


def test_a_row_that_is_too_long_is_refused_with_both_numbers():
    base = tiny_base("gpt2", n_positions=24)
    assert base.max_tokens == 24
    prompt = "The Eiffel Tower " * 12
    with pytest.raises(InvalidRequestError) as caught:
        base.rows([prompt], ["Rome"])
    length = len(base.encoder.encode(prompt, "Rome").prompt) + len(
        base.encoder.encode(prompt, "Rome").answer
    )
    for part in ("The Eiffel Tower", f"takes {length} tokens", "'gpt2' takes at most 24"):
        assert part in str(caught.value)


def test_a_row_may_be_as_long_as_the_model_allows():
    base = tiny_base("gpt2")
    row = base.encoder.encode("The Eiffel Tower is in", "Rome")
    exact = tiny_base("gpt2", n_positions=len(row.prompt) + len(row.answer))
    exact.forward(exact.rows(["The Eiffel Tower is in"], ["Rome"]))
    short = tiny_base("gpt2", n_positions=len(row.prompt) + len(row.answer) - 1)
    with pytest.raises(InvalidRequestError, match="at most"):
        short.rows(["The Eiffel Tower is in"], ["Rome"])


def test_demonstrations_are_dropped_until_the_answer_fits_and_the_fact_stays():
    base = tiny_base("llama")
    demonstrations = tuple(f"Lyon is in France, example {i}. " for i in range(12))
    edit = PromptEdit(
        base, [PromptEntry("Rome is in", "New Fact: Rome is in Norway. ", demonstrations)]
    )
    count = base.encoder.count
    with edit:
        row = base.encode("Rome is in", "Italy")
        text = base.tokenizer.decode(row.prompt[1:])
        assert text.endswith("example 11. New Fact: Rome is in Norway. Rome is in")
        kept = text.count("example")
        assert 0 < kept < 12
        assert len(row.prompt) + len(row.answer) <= base.max_tokens
        # One more would not have fitted.
        assert count(demonstrations[11 - kept] + text) + count("Italy") + 2 > base.max_tokens
        # Free answers get room of their own.
        assert len(base.encode("Rome is in").prompt) + 32 <= base.max_tokens
        assert base.generate(["Rome is in"], max_new_tokens=3)


def test_one_text_where_a_list_belongs_is_refused():
    base = tiny_base("llama")
    with pytest.raises(InvalidRequestError, match="list of texts, got the text 'Rome is'"):
        base.rows("Rome is")
    with pytest.raises(InvalidRequestError, match="list of texts"):
        base.generate("Rome is")


def test_rows_of_different_numbers_are_refused():
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="argument"):
        base.rows(["Rome is", "Lyon is"], ["Italy"])


def test_no_prompts_give_no_answers():
    assert tiny_base("llama").generate([]) == []


def test_rows_that_are_tokens_already_can_be_padded_again():
    base = tiny_base("llama")
    encoded = [EncodedRow((1, 5, 6), (7,), 2, 1), EncodedRow((1, 5), (8, 9))]
    rows = base.pad(encoded, "left")
    assert rows.inputs["input_ids"].tolist() == [[1, 5, 6, 7], [1, 5, 8, 9]]
    assert rows.subject_end.tolist() == [2, -1]
    assert rows.answer_ids.tolist() == [[7, 0], [8, 9]]
    assert rows.subject_start.tolist() == [1, -1]
    assert rows.subject_mask.tolist() == [[False, True, True, False], [False] * 4]


def test_tails_know_the_subject_tokens_behind_the_cut():
    rows = [
        EncodedRow((1, 5, 6, 7, 8), (9,), 3, 1),  # cut inside the subject
        EncodedRow((1, 5, 6, 7), (9,), 3, 2),  # cut before it
        EncodedRow((1, 5, 6), (9,)),  # without a subject
        EncodedRow((1, 5, 6), (9,), 1, 1),  # cut behind it
    ]
    _, tails = pad_tails(rows, [2, 1, 1, 2], 0, True, torch.device("cpu"))
    assert tails.subject_start.tolist() == [0, 1, -1, -1]
    assert tails.subject_end.tolist() == [1, 2, -1, -1]
    mask = tails.subject_mask
    assert mask.shape == tails.inputs["input_ids"].shape
    ids = [row[at].tolist() for row, at in zip(tails.inputs["input_ids"], mask, strict=True)]
    assert ids == [[6, 7], [6, 7], [], []]
    assert tails.select(torch.tensor([1, 2])).subject_mask.tolist() == mask[1:3].tolist()


def test_tails_end_where_nothing_more_is_predicted():
    rows = [
        EncodedRow((1, 5, 6), (7, 8, 9)),
        EncodedRow((1, 5, 6, 4), (7,)),
        EncodedRow((1, 2), ()),
    ]
    _, tails = pad_tails(rows, [1, 1, 1], 0, True, torch.device("cpu"))
    assert tails.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 4, 7], [2, 0, 0, 0]]
    assert tails.inputs["attention_mask"].shape == (3, 5)
    assert tails.answer_ids.tolist() == [[7, 8, 9], [7, 0, 0], [0, 0, 0]]
    assert tails.answer_columns.tolist() == [[1, 2, 3], [2, 3, 3], [0, 1, 2]]
    (alone,) = [pad_tails(rows[1:2], [1], 0, True, torch.device("cpu"))[1]]
    assert alone.inputs["input_ids"].tolist() == [[5, 6, 4]]


def windowed(kind, dtype, attention):
    """A tiny model whose blocks see a window of 4 tokens, all of them or every other one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
        max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return BaseModel(model, tiny_tokenizer(True), name=kind)


@pytest.mark.parametrize(
    ("kind", "attention"), [("gemma2", "eager"), ("mistral", "eager"), ("gemma3_text", "sdpa")]
)
def test_padding_beyond_a_window_changes_nothing_or_is_refused(kind, attention):
    long, short = EncodedRow((5, 6, 7, 8, 9), (10, 11)), EncodedRow((5, 6), (7,))
    alike = EncodedRow((5, 6, 7), (6, 7))  # its padding is within the window
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        base = windowed(kind, dtype, attention)
        rows = (long, short)
        if dtype is torch.float64 and attention == "eager":
            with pytest.raises(UnsupportedUseError, match=r"4 tokens of padding.* that sees 4"):
                base.pad(rows)
            rows = (long, alike)
        logs = base.answer_log_probs(base.pad(rows))
        for row, seen in zip(rows, logs, strict=True):
            alone = base.answer_log_probs(base.pad([row]))[0]
            bound = {8: 1e-12, 4: 1e-5, 2: 2e-2}[dtype.itemsize]
            torch.testing.assert_close(seen[: len(alone)], alone, rtol=0, atol=bound)
