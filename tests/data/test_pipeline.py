import json
import time
from itertools import islice

import numpy as np
import pytest

from transformer_jax.data import batching, packing, tokenizers

T = 8


def corpus_of(*lengths: int) -> packing.Corpus:
    """Documents of the given lengths over the stream 1, 2, 3, ..."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return packing.Corpus(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts, starts)


def numbers(n: int) -> list[dict]:
    return [{"x": np.int32(i + 1)} for i in range(n)]


def rows(loader, count=None) -> list[int]:
    return [int(x) for batch in islice(loader, count) for x in batch["x"]]


# Corpora


def test_sentences_and_documents_are_marked():
    source = [{"text": "One here.\nTwo here.\n\nThree."}, {"text": " \n\n"}, {"text": "Four."}]
    chars = tokenizers.train_chars(e["text"] for e in source)
    corpus = packing.tokenize_corpus(source, chars, eos_id=chars.eos_id)
    sentences = [chars.decode(corpus.tokens[a:b], skip_special=False) for a, b in
                 zip(corpus.sentence_starts[:-1], corpus.sentence_starts[1:])]
    assert sentences == ["One here.", " Two here.", "\nThree.<|endoftext|>", "Four.<|endoftext|>"]
    assert corpus.document_starts.tolist() == [0, corpus.sentence_starts[3], len(corpus)]
    assert set(corpus.document_starts) <= set(corpus.sentence_starts)
    assert corpus.tokens.dtype == np.uint16


def test_exact_text_stays_exact():
    text = "First:\n  line\n\n\nlast \n"
    chars = tokenizers.train_chars([text])
    corpus = packing.tokenize_corpus([{"text": text}], chars, sentences=False)
    assert chars.decode(corpus.tokens) == text
    assert corpus.document_starts.tolist() == corpus.sentence_starts.tolist() == [0, len(text)]


def test_chunks_make_no_difference():
    source = [{"text": f"a {'b ' * i}\nc."} for i in range(10)]
    tokenizer = tokenizers.train_wordpiece([e["text"] for e in source], 120)
    whole, parts = (packing.tokenize_corpus(source, tokenizer, chunk=n) for n in (100, 3))
    for name in ("tokens", "document_starts", "sentence_starts"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_corpora_need_text():
    chars = tokenizers.train_chars(["a"])
    with pytest.raises(ValueError, match="1 examples give 0 tokens"):
        packing.tokenize_corpus([{"text": "\n"}], chars)
    with pytest.raises(ValueError, match="example 0 has no 'text'; it has body"):
        packing.tokenize_corpus([{"body": "a"}], chars)


# Packing


def test_a_packed_row_by_hand():
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


def test_rows_that_end_where_the_stream_ends():
    for n, count in ((T, 1), (T + 1, 1), (T + 2, 2)):
        packed = packing.PackedTokens(corpus_of(n), T)
        assert len(packed) == count
        assert sum(packed[i]["weights"].sum() for i in range(count)) == n - 1


def test_take_is_many_rows_and_padding():
    packed = packing.PackedTokens(corpus_of(5, 9, 30), T)
    batch = packed.take([3, 0, len(packed)])
    for name, column in batch.items():
        np.testing.assert_array_equal(column[0], packed[3][name])
        np.testing.assert_array_equal(column[1], packed[0][name])
        assert not column[2].any()
    with pytest.raises(IndexError, match="row 6 is outside the 6 rows"):
        packed[6]


def test_packing_needs_something_to_predict():
    with pytest.raises(ValueError, match="nothing to predict"):
        packing.PackedTokens(corpus_of(1, 1, 1), T)
    with pytest.raises(ValueError, match="length 0"):
        packing.PackedTokens(corpus_of(9), 0)


# Loaders


def draw(example, rng):
    return {**example, "noise": rng.random(2)}


SOURCES = {
    "rows": (numbers(11), None),
    "drawn": (numbers(11), draw),
    "packed": (packing.PackedTokens(corpus_of(5, 9, 70), T), None),
}


def test_epochs_hold_every_example_once_in_another_order():
    found = rows(batching.make_loader(numbers(11), 4), 11)  # 44 rows, 4 epochs
    epochs = [found[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != sorted(epochs[0])


def test_the_same_seed_is_the_same_run():
    first, again, other = (rows(batching.make_loader(numbers(50), 5, seed=s), 10)
                           for s in (3, 3, 4))
    assert first == again != other


def test_without_shuffle_in_order():
    assert rows(batching.make_loader(numbers(6), 2, shuffle=False, num_epochs=2)) == [
        1, 2, 3, 4, 5, 6] * 2


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_state_gives_exactly_the_next_batch(kind, prefetch):
    source, transform = SOURCES[kind]

    def loader():
        return batching.make_loader(source, 4, transform=transform, seed=1, prefetch=prefetch)

    one = loader()
    for _ in range(5):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    expected = list(islice(one, 4))
    fresh = loader()
    fresh.set_state(state)
    moved = one
    moved.set_state(state)
    for again in (fresh, moved):
        for batch in expected:
            for name, value in next(again).items():
                np.testing.assert_array_equal(value, batch[name])


def test_transforms_draw_anew_by_example_and_epoch():
    loader = batching.make_loader(numbers(4), 4, transform=draw, shuffle=False)
    noise = np.concatenate([next(loader)["noise"] for _ in range(3)])
    assert noise.shape == (12, 2) and len(np.unique(noise)) == 24


@pytest.mark.parametrize("kind", SOURCES)
def test_evaluation_covers_every_example_once_at_fixed_shapes(kind):
    source, transform = SOURCES[kind]
    batches = list(batching.make_loader(source, 4, transform=transform, shuffle=False,
                                        num_epochs=1, drop_remainder=False))
    key = "x" if "x" in batches[0] else "tokens"
    assert len(batches) == 3 and all(len(batch[key]) == 4 for batch in batches)
    found = np.concatenate([batch[key] for batch in batches])
    expected = np.stack([source[i][key] for i in range(len(source))])
    np.testing.assert_array_equal(found[: len(source)], expected)
    assert all(not value[-1].any() for value in batches[-1].values())
    assert batches[0][key].dtype == batches[-1][key].dtype == np.int32


def test_a_source_smaller_than_a_batch_is_filled():
    (batch,) = batching.make_loader(numbers(3), 8, num_epochs=1, drop_remainder=False)
    assert sorted(batch["x"]) == [0] * 5 + [1, 2, 3]


def test_the_remainder_is_dropped_once():
    assert len(rows(batching.make_loader(numbers(11), 4, num_epochs=1))) == 8
    assert len(rows(batching.make_loader(numbers(11), 4, num_epochs=3))) == 32


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("num_epochs", [None, 1])
def test_hosts_share_the_batches_of_one(kind, num_epochs):
    source, transform = SOURCES[kind]

    def batches(**host):
        return islice(batching.make_loader(source, 4, transform=transform, seed=2,
                                           num_epochs=num_epochs, drop_remainder=False, **host), 6)

    hosts = zip(*(batches(process_index=i, process_count=2) for i in range(2)))
    for whole, parts in zip(batches(), hosts, strict=True):
        for name, value in whole.items():
            together = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(together, value)


def test_errors_of_a_transform_come_through():
    def fail(example, rng):
        raise ValueError("label 7 is out of range")

    with pytest.raises(ValueError, match="label 7 is out of range"):
        next(batching.make_loader(numbers(3), 2, transform=fail))


@pytest.mark.parametrize(("options", "message"), [
    ({"source": []}, "0 examples"),
    ({"batch_size": 12, "num_epochs": 1}, "batch_size 12 is larger than the 11 examples"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 5, "process_count": 2}, "batch_size 5 cannot be shared by 2 processes"),
    ({"process_index": 2, "process_count": 2}, "process_index 2 is outside the 2 processes"),
])
def test_loaders_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        batching.make_loader(**{"source": numbers(11), "batch_size": 4, **options})


def test_a_batch_larger_than_the_source_repeats_it():
    assert len(rows(batching.make_loader(numbers(3), 8), 2)) == 16


def test_packing_is_fast_enough():
    """Half of the target of 2 million tokens a second, for machines that do other things too."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.unique(rng.integers(1, 10**6, 2000)), [10**6]])
    corpus = packing.Corpus(rng.integers(0, 4000, 10**6).astype(np.uint16), starts, starts)
    loader = batching.make_loader(packing.PackedTokens(corpus, 128), 32, prefetch=0)
    next(loader)
    began = time.process_time()
    for _ in range(100):
        next(loader)
    assert 100 * 32 * 128 / (time.process_time() - began) > 1e6


# Checks


def test_ids_are_checked_on_the_host():
    packed = packing.PackedTokens(corpus_of(5, 9), T)[0]
    batching.check_batch_ids(packed, vocab_size=15, max_length=8)
    batching.check_batch_ids(packed["tokens"], vocab_size=15, max_length=8)
    with pytest.raises(ValueError, match="target id 9 is outside the vocabulary of 9"):
        batching.check_batch_ids(packed, vocab_size=9, max_length=8)
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 9"):
        batching.check_batch_ids(np.array([[3, -1]]), vocab_size=9, max_length=8)
    with pytest.raises(ValueError, match="8 tokens is longer than the 7 positions"):
        batching.check_batch_ids(packed["tokens"], vocab_size=15, max_length=7)
    with pytest.raises(ValueError, match="5 tokens is longer than the 4 positions"):
        batching.check_batch_ids(packed, vocab_size=15, max_length=4)
    masked = {"tokens": np.zeros((1, 4), int), "masked_targets": np.array([[5]])}
    with pytest.raises(ValueError, match="masked target id 5 is outside"):
        batching.check_batch_ids(masked, vocab_size=5, max_length=4)
