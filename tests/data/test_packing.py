"""Tokenized corpora, and their packing into rows of equal length."""

import numpy as np
import pytest

from transformer_jax.data import packing, tokenizers

T = 8


def corpus_of(*lengths: int) -> packing.Corpus:
    """A corpus of documents of the given lengths, whose tokens are 1, 2, 3, ..."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return packing.Corpus(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts, starts)


# Corpora


def test_offsets_of_documents_and_sentences():
    source = [{"text": "One here.\nTwo here.\n\nThree."}, {"text": " \n\n"}, {"text": "Four."}]
    chars = tokenizers.train_chars(e["text"] for e in source)
    corpus = packing.tokenize_corpus(source, chars, eos_id=chars.eos_id)
    sentences = [chars.decode(corpus.tokens[a:b], skip_special_tokens=False) for a, b in
                 zip(corpus.sentence_starts[:-1], corpus.sentence_starts[1:])]
    assert sentences == ["One here.", " Two here.", "\nThree.<|endoftext|>", "Four.<|endoftext|>"]
    assert corpus.document_starts.tolist() == [0, corpus.sentence_starts[3], len(corpus)]
    assert set(corpus.document_starts) <= set(corpus.sentence_starts)
    assert corpus.tokens.dtype == np.uint16


def test_text_is_unchanged_without_sentence_splitting():
    text = "First:\n  line\n\n\nlast \n"
    chars = tokenizers.train_chars([text])
    corpus = packing.tokenize_corpus([{"text": text}], chars, one_sentence_per_line=False)
    assert chars.decode(corpus.tokens) == text
    assert corpus.document_starts.tolist() == corpus.sentence_starts.tolist() == [0, len(text)]


def test_the_number_of_documents_per_call_does_not_matter(monkeypatch):
    source = [{"text": f"a {'b ' * i}\nc."} for i in range(10)]
    tokenizer = tokenizers.train_wordpiece([e["text"] for e in source], 120)
    one_call = packing.tokenize_corpus(source, tokenizer)
    monkeypatch.setattr(packing, "DOCUMENTS_PER_CALL", 3)
    many_calls = packing.tokenize_corpus(source, tokenizer)
    for name in ("tokens", "document_starts", "sentence_starts"):
        np.testing.assert_array_equal(getattr(one_call, name), getattr(many_calls, name))


def test_errors_of_tokenize_corpus():
    chars = tokenizers.train_chars(["a"])
    with pytest.raises(ValueError, match="1 examples contain 0 tokens"):
        packing.tokenize_corpus([{"text": "\n"}], chars)
    empty = packing.tokenize_corpus([{"text": "\n"}], chars, allow_empty=True)
    assert len(empty) == 0 and empty.tokens.dtype == np.uint16
    assert empty.document_starts.tolist() == empty.sentence_starts.tolist() == [0]
    with pytest.raises(ValueError, match="example 0 has no 'text'; it has body"):
        packing.tokenize_corpus([{"body": "a"}], chars)


# Packing


def test_packed_rows_by_hand():
    packed = packing.PackedTokens(corpus_of(3, 4, 4), T)
    first, last = packed[0], packed[1]
    assert len(packed) == 2
    expected = {
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8],
        "targets": [2, 3, 4, 5, 6, 7, 8, 9],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0],
        "document_ids": [1, 1, 1, 2, 2, 2, 2, 3],
        "weights": [1, 1, 0, 1, 1, 1, 0, 1],
    }
    assert {name: row.tolist() for name, row in first.items()} == expected
    expected = {
        "tokens": [9, 10, 11, 0, 0, 0, 0, 0],
        "targets": [10, 11, 0, 0, 0, 0, 0, 0],
        "positions": [0, 1, 2, 0, 0, 0, 0, 0],
        "document_ids": [1, 1, 1, 0, 0, 0, 0, 0],
        "weights": [1, 1, 0, 0, 0, 0, 0, 0],
    }
    assert {name: row.tolist() for name, row in last.items()} == expected
    assert {name: row.dtype.name for name, row in first.items()} == {
        **dict.fromkeys(expected, "int32"), "weights": "float32"}


@pytest.mark.parametrize("seed", range(20))
def test_every_token_with_a_predecessor_is_a_target_once(seed):
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 20, rng.integers(1, 12)), 2]
    corpus = corpus_of(*lengths)
    packed = packing.PackedTokens(corpus, T)
    seen, contexts = [], []
    for i in range(len(packed)):
        row = packed[i]
        seen += row["targets"][row["weights"] > 0].tolist()
        contexts += row["tokens"][row["weights"] > 0].tolist()
        real = row["document_ids"] > 0
        assert not row["tokens"][~real].any() and not row["weights"][~real].any()
        for document in set(row["document_ids"][real]):
            inside = row["document_ids"] == document
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
    first = corpus.tokens[corpus.document_starts[:-1]]
    assert seen == sorted(set(corpus.tokens.tolist()) - set(first.tolist()))
    assert contexts == [target - 1 for target in seen]


def test_last_rows_of_a_corpus():
    for n, count in ((T, 1), (T + 1, 1), (T + 2, 2)):
        packed = packing.PackedTokens(corpus_of(n), T)
        assert len(packed) == count
        assert sum(packed[i]["weights"].sum() for i in range(count)) == n - 1


def test_take_returns_a_batch_and_pads_past_the_end():
    packed = packing.PackedTokens(corpus_of(5, 9, 30), T)
    batch = packed.take([3, 0, len(packed)])
    for name, column in batch.items():
        np.testing.assert_array_equal(column[0], packed[3][name])
        np.testing.assert_array_equal(column[1], packed[0][name])
        assert not column[2].any()
    with pytest.raises(IndexError, match="row 6 is out of range; there are 6 rows"):
        packed[6]


def test_errors_of_packing():
    with pytest.raises(ValueError, match="has a token to predict"):
        packing.PackedTokens(corpus_of(1, 1, 1), T)
    with pytest.raises(ValueError, match="row length is 0"):
        packing.PackedTokens(corpus_of(9), 0)
