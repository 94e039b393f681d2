"""Input formats: special tokens, segments, truncation and padding."""

import functools

import numpy as np
import pytest

from transformer_jax.objectives import input_format

CLS, SEP, PAD = 101, 102, 9


def test_pad():
    row = input_format.pad([1, 2], 4, fill=9)
    assert row.tolist() == [1, 2, 9, 9]
    assert row.dtype == np.int32
    assert input_format.pad([], 2).tolist() == [0, 0]


def test_truncate_pair_truncates_the_longer_or_else_the_second_text():
    a, b = input_format.truncate_pair([1, 2, 3, 4, 5], [6, 7, 8], 5)
    assert (a.tolist(), b.tolist()) == ([1, 2, 3], [6, 7])
    a, b = input_format.truncate_pair([1, 2], [3, 4], 4)
    assert (a.tolist(), b.tolist()) == ([1, 2], [3, 4])
    assert input_format.truncate_pair([1, 2], [], 1)[0].tolist() == [1]


def test_truncate_pair_with_an_rng_removes_tokens_at_both_ends():
    firsts = []
    for seed in range(300):
        a, b = input_format.truncate_pair(np.arange(20), [50, 51], 12, np.random.default_rng(seed))
        assert len(a) == 10 and b.tolist() == [50, 51]
        assert (np.diff(a) == 1).all()  # the remaining tokens are contiguous
        firsts.append(int(a[0]))
    # Each of the 10 tokens is removed at the front with probability one half.
    assert abs(np.mean(firsts) - 5) < 4 * (10 / 4 / 300) ** 0.5
    assert abs(np.var(firsts) - 2.5) < 1


def test_bert_input_of_one_text():
    row = input_format.pack_bert_input([1, 2, 3], length=7, cls_id=CLS, sep_id=SEP, pad_id=PAD)
    assert row["tokens"].tolist() == [CLS, 1, 2, 3, SEP, PAD, PAD]
    assert row["segment_ids"].tolist() == [0] * 7
    assert row["padding_mask"].tolist() == [True] * 5 + [False] * 2
    cut = input_format.pack_bert_input([1, 2, 3, 4], length=4, cls_id=CLS, sep_id=SEP)
    assert cut["tokens"].tolist() == [CLS, 1, 2, SEP]


def test_bert_input_of_a_pair():
    row = input_format.pack_bert_input([1, 2], [3], length=8, cls_id=CLS, sep_id=SEP)
    assert row["tokens"].tolist() == [CLS, 1, 2, SEP, 3, SEP, 0, 0]
    assert row["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert row["padding_mask"].tolist() == [True] * 6 + [False] * 2
    assert {k: v.dtype.name for k, v in row.items()} == {
        "tokens": "int32", "segment_ids": "int32", "padding_mask": "bool"}
    cut = input_format.pack_bert_input([1, 2, 3, 4], [5, 6, 7], length=8, cls_id=CLS, sep_id=SEP)
    assert cut["tokens"].tolist() == [CLS, 1, 2, 3, SEP, 5, 6, SEP]


PACK_BERT = functools.partial(input_format.pack_bert_input, cls_id=CLS, sep_id=SEP)
PACK_GPT = functools.partial(input_format.pack_gpt_input, extract_id=7, delimiter_id=8)


@pytest.mark.parametrize(
    ("pack_input", "b", "length"),
    [(PACK_BERT, None, 2), (PACK_BERT, [1], 4), (PACK_GPT, None, 1), (PACK_GPT, [1], 3),
     (functools.partial(PACK_GPT, start_id=5), None, 2),
     (functools.partial(PACK_GPT, start_id=5), [1], 4), (PACK_BERT, [], 3)],
)
def test_rows_without_room_for_text(pack_input, b, length):
    message = f"length {length} leaves no room .* use at least {length + 1}$"
    with pytest.raises(ValueError, match=message):
        pack_input([1], b, length=length)
    assert pack_input([1], b, length=length + 1)["padding_mask"].all()


def test_gpt_input_ends_with_the_extract_token():
    row = input_format.pack_gpt_input([1, 2], length=5, extract_id=7, pad_id=PAD)
    assert row["tokens"].tolist() == [1, 2, 7, PAD, PAD]
    assert row["padding_mask"].tolist() == [True, True, True, False, False]
    assert row["segment_ids"].tolist() == [0] * 5
    cut = input_format.pack_gpt_input([1, 2, 3, 4], length=3, extract_id=7)
    assert cut["tokens"].tolist() == [1, 2, 7]


def test_gpt_input_of_a_pair():
    row = PACK_GPT([1, 2], [3], length=7, pad_id=PAD)
    assert row["tokens"].tolist() == [1, 2, 8, 3, 7, PAD, PAD]
    assert row["padding_mask"].tolist() == [True] * 5 + [False] * 2
    assert row["segment_ids"].tolist() == [0] * 7  # GPT has no segments
    cut = PACK_GPT([1, 2, 3, 4], [5, 6, 3], length=7)
    assert cut["tokens"].tolist() == [1, 2, 3, 8, 5, 6, 7]


def test_gpt_input_of_a_pair_needs_a_delimiter():
    with pytest.raises(ValueError, match="delimiter_id is None; pass the id"):
        input_format.pack_gpt_input([1], [2], length=7, extract_id=7)


def test_gpt_input_with_a_start_token():
    """GPT paper, figure 1."""
    row = functools.partial(PACK_GPT, start_id=5, length=8)
    assert row([1, 2])["tokens"].tolist() == [5, 1, 2, 7, 0, 0, 0, 0]
    assert row([1, 2], [3])["tokens"].tolist() == [5, 1, 2, 8, 3, 7, 0, 0]
    assert row(range(10, 30))["tokens"].tolist() == [5, 10, 11, 12, 13, 14, 15, 7]
    assert row([1, 2, 3, 4], [6, 6, 6, 6])["tokens"].tolist() == [5, 1, 2, 3, 8, 6, 6, 7]
