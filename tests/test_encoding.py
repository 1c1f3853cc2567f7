"""Prompts and completions as token ids and labels, and batches of them."""

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from gisp_hf.data import CandidateCollator, encode_completion
from gisp_hf.data.encoding import EmptyCompletionError, Encoded, LongCompletionError, encode_question, pack_blocks
from gisp_hf.losses import decode_weights
from tests.tiny import tiny_tokenizer


def marking_tokenizer():
    """Begins with <bos>, ends with <eos>, and merges "a" with "b" across the border of prompt and completion."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4, "c": 5, "ab": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_prompt_is_masked_and_special_tokens_are_kept():
    encoded = encode_completion("cca", "cb", tokenizer=marking_tokenizer(), max_length=20)
    assert encoded == {"input_ids": [1, 5, 5, 3, 5, 4, 2], "labels": [-100, -100, -100, -100, 5, 4, 2]}


def test_a_token_across_the_border_belongs_to_the_completion():
    encoded = encode_completion("ca", "bc", tokenizer=marking_tokenizer(), max_length=20)
    assert encoded == {"input_ids": [1, 5, 6, 5, 2], "labels": [-100, -100, 6, 5, 2]}


@pytest.mark.parametrize(
    "max_length, expected",
    [(9, [1, 3, 5, 4, 5, 3, 5, 5, 2]), (8, [1, 5, 4, 5, 3, 5, 5, 2]), (6, [1, 5, 3, 5, 5, 2]), (5, [5, 3, 5, 5, 2])],
)
def test_truncation_cuts_the_prompt_from_the_left(max_length, expected):
    """<bos> a c b c | a c c <eos>: the answer stays whole, and so does the mark at the beginning."""
    encoded = encode_completion("acbc", "acc", tokenizer=marking_tokenizer(), max_length=max_length)
    assert encoded == {"input_ids": expected, "labels": [-100] * (max_length - 4) + [3, 5, 5, 2]}


def test_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(LongCompletionError, match="completion of 4 tokens .* max_length=4: use at least 5"):
        encode_completion("acbc", "acc", tokenizer=marking_tokenizer(), max_length=4)


CHAT = (
    "{% for message in messages %}{{ message['role'] }} w9 {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant w9 {% endif %}"
)


def test_messages_go_through_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    unknown = 3  # both role names
    encoded = encode_completion([{"role": "user", "content": "w20 w21"}], "w40 w41", tokenizer=tokenizer, max_length=32)
    assert encoded == {
        "input_ids": [unknown, 9, 20, 21, 2, unknown, 9, 40, 41, 2],
        "labels": [-100] * 7 + [40, 41, 2],
    }


def test_messages_need_a_chat_template():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode_completion([{"role": "user", "content": "w20"}], "w40", tokenizer=tiny_tokenizer(), max_length=32)


def test_collator_pads_on_the_right():
    batch = CandidateCollator(tiny_tokenizer())(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_collator_lays_candidates_out_as_rows():
    batch = CandidateCollator(tiny_tokenizer())([{"input_ids": [[5, 6, 7], [8]], "labels": [[-100, 6, 7], [8]]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_collator_takes_tensors():
    features = [{"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([[1, 6], [1, 8]])}]
    assert CandidateCollator(tiny_tokenizer())(features)["labels"].tolist() == [[1, 6], [1, 8]]


@pytest.mark.parametrize("completion", ["", "  ", "\n"])
def test_an_empty_answer_is_refused(completion):
    with pytest.raises(EmptyCompletionError, match="is empty: give the answer's text"):
        encode_completion("a", completion, tokenizer=marking_tokenizer(), max_length=9)


def test_blocks_are_consecutive_and_whole():
    blocks = pack_blocks([5, 6, 7, 8, 9, 10, 11], 3)
    assert [block.input_ids for block in blocks] == [[5, 6, 7], [8, 9, 10]]  # 11 fills no block
    assert [block.labels for block in blocks] == [[5, 6, 7], [8, 9, 10]]


def test_the_margin_item_carries_a_weight_for_each_candidate():
    piece = [Encoded([5, 6], [-100, 6]), Encoded([5, 7], [-100, 7], correct=False)]
    item = encode_question(piece, correct=4, incorrect=10)
    assert item["input_ids"] == [[5, 6], [5, 7]]
    assert [row[1] for row in item["labels"]] == [6, 7]
    assert decode_weights(torch.tensor(item["labels"])).tolist() == torch.tensor([1 / 4, -1 / 10]).tolist()
