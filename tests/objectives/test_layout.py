"""Special tokens, segments, truncation and padding by hand."""

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


def test_truncate_shortens_the_longer_and_of_equals_the_second():
    a, b = input_format.truncate_pair([1, 2, 3, 4, 5], [6, 7, 8], 5)
    assert (a.tolist(), b.tolist()) == ([1, 2, 3], [6, 7])
    a, b = input_format.truncate_pair([1, 2], [3, 4], 4)
    assert (a.tolist(), b.tolist()) == ([1, 2], [3, 4])
    assert input_format.truncate_pair([1, 2], [], 1)[0].tolist() == [1]


def test_truncate_with_an_rng_takes_from_both_ends():
    fronts = []
    for seed in range(300):
        a, b = input_format.truncate_pair(np.arange(20), [50, 51], 12, np.random.default_rng(seed))
        assert len(a) == 10 and b.tolist() == [50, 51]
        assert (np.diff(a) == 1).all()  # what is left hangs together
        fronts.append(int(a[0]))
    # Each of the 10 tokens leaves at the front with probability one half.
    assert abs(np.mean(fronts) - 5) < 4 * (10 / 4 / 300) ** 0.5
    assert abs(np.var(fronts) - 2.5) < 1


def test_bert_row_of_one_text():
    row = input_format.pack_bert_input([1, 2, 3], length=7, cls_id=CLS, sep_id=SEP, pad_id=PAD)
    assert row["tokens"].tolist() == [CLS, 1, 2, 3, SEP, PAD, PAD]
    assert row["segment_ids"].tolist() == [0] * 7
    assert row["padding_mask"].tolist() == [True] * 5 + [False] * 2
    cut = input_format.pack_bert_input([1, 2, 3, 4], length=4, cls_id=CLS, sep_id=SEP)
    assert cut["tokens"].tolist() == [CLS, 1, 2, SEP]


def test_bert_row_of_a_pair():
    row = input_format.pack_bert_input([1, 2], [3], length=8, cls_id=CLS, sep_id=SEP)
    assert row["tokens"].tolist() == [CLS, 1, 2, SEP, 3, SEP, 0, 0]
    assert row["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert row["padding_mask"].tolist() == [True] * 6 + [False] * 2
    assert {k: v.dtype.name for k, v in row.items()} == {
        "tokens": "int32", "segment_ids": "int32", "padding_mask": "bool"}
    cut = input_format.pack_bert_input([1, 2, 3, 4], [5, 6, 7], length=8, cls_id=CLS, sep_id=SEP)
    assert cut["tokens"].tolist() == [CLS, 1, 2, 3, SEP, 5, 6, SEP]


BERT_ROW = functools.partial(input_format.pack_bert_input, cls_id=CLS, sep_id=SEP)
GPT_ROW = functools.partial(input_format.pack_gpt_input, extract_id=7, delimiter_id=8)


@pytest.mark.parametrize(
    ("row", "b", "length"),
    [(BERT_ROW, None, 2), (BERT_ROW, [1], 4), (GPT_ROW, None, 1), (GPT_ROW, [1], 3),
     (functools.partial(GPT_ROW, start_id=5), None, 2),
     (functools.partial(GPT_ROW, start_id=5), [1], 4), (BERT_ROW, [], 3)],
)
def test_no_room_for_text(row, b, length):
    least = f"length {length} leaves no room .* use at least {length + 1}$"
    with pytest.raises(ValueError, match=least):
        row([1], b, length=length)
    assert row([1], b, length=length + 1)["padding_mask"].all()


def test_gpt_row_ends_with_the_extract_token():
    row = input_format.pack_gpt_input([1, 2], length=5, extract_id=7, pad_id=PAD)
    assert row["tokens"].tolist() == [1, 2, 7, PAD, PAD]
    assert row["padding_mask"].tolist() == [True, True, True, False, False]
    assert row["segment_ids"].tolist() == [0] * 5
    cut = input_format.pack_gpt_input([1, 2, 3, 4], length=3, extract_id=7)
    assert cut["tokens"].tolist() == [1, 2, 7]


def test_gpt_row_of_a_pair():
    row = GPT_ROW([1, 2], [3], length=7, pad_id=PAD)
    assert row["tokens"].tolist() == [1, 2, 8, 3, 7, PAD, PAD]
    assert row["padding_mask"].tolist() == [True] * 5 + [False] * 2
    assert row["segment_ids"].tolist() == [0] * 7  # GPT has no segments
    cut = GPT_ROW([1, 2, 3, 4], [5, 6, 3], length=7)
    assert cut["tokens"].tolist() == [1, 2, 3, 8, 5, 6, 7]


def test_gpt_row_of_a_pair_needs_a_delimiter():
    with pytest.raises(ValueError, match="delimiter_id is None; pass the id"):
        input_format.pack_gpt_input([1], [2], length=7, extract_id=7)


def test_gpt_row_with_a_start_token():
    """GPT paper, figure 1."""
    row = functools.partial(GPT_ROW, start_id=5, length=8)
    assert row([1, 2])["tokens"].tolist() == [5, 1, 2, 7, 0, 0, 0, 0]
    assert row([1, 2], [3])["tokens"].tolist() == [5, 1, 2, 8, 3, 7, 0, 0]
    assert row(range(10, 30))["tokens"].tolist() == [5, 10, 11, 12, 13, 14, 15, 7]
    assert row([1, 2, 3, 4], [6, 6, 6, 6])["tokens"].tolist() == [5, 1, 2, 3, 8, 6, 6, 7]


@pytest.mark.parametrize(("a", "b", "lost"), [(3, None, 0), (9, None, 3), (3, 2, 0), (9, 1, 5)])
def test_num_cut(a, b, lost):
    specials = 2 if b is None else 3
    second = None if b is None else range(b)
    assert input_format.num_truncated(range(a), second, length=8, specials=specials) == lost
    kept = BERT_ROW(range(a), second, length=8)["padding_mask"].sum() - specials
    assert kept == a + (b or 0) - lost


def test_num_cut_of_a_side_with_no_room():
    with pytest.raises(ValueError, match="length 4 leaves no room for both texts beside 3 special"):
        input_format.num_truncated([1, 2], [3], length=4, specials=3)
