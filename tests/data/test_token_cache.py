"""The token cache: equal to a corpus in memory, resumable after an interruption, and verified."""

import json

import numpy as np
import pytest
from small_models import GPT2

from transformer_jax.data import PackedTokens, make_loader, token_cache, tokenize_corpus, tokenizers
from transformer_jax.pretrained import save_run_config

TEXTS = [{"text": f"Sentence {i} of some.\nAnother, {i * i}.\n\nA paragraph."} for i in range(57)]
CHARS = tokenizers.train_chars([example["text"] for example in TEXTS])
OPTIONS = {"documents_per_shard": 10, "quiet": True}


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
    monkeypatch.setattr(token_cache, "TOKENS_PER_RECORD", 64)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens[:], expected.tokens)
    assert found.tokens.dtype == expected.tokens.dtype and len(found) == len(expected)
    np.testing.assert_array_equal(found.document_starts, expected.document_starts)
    np.testing.assert_array_equal(found.sentence_starts, expected.sentence_starts)


@pytest.mark.parametrize("options", [{}, {"eos_id": 3}, {"one_sentence_per_line": False}])
def test_a_cached_corpus_equals_the_corpus_in_memory(tmp_path, options):
    found = token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS, **options)
    expected = tokenize_corpus(TEXTS, CHARS, **options)
    assert_same(found, expected)
    assert_same(token_cache.load_token_cache(tmp_path, CHARS), expected)
    np.testing.assert_array_equal(found.tokens[5:900:7], expected.tokens[5:900:7])
    at = np.random.default_rng(0).integers(0, len(expected), (5, 9))
    np.testing.assert_array_equal(found.tokens[at], expected.tokens[at])
    rows, same = (PackedTokens(corpus, 50) for corpus in (found, expected))
    batches, others = (make_loader(made, 4, seed=1) for made in (rows, same))
    for _ in range(5):
        batch, other = next(batches), next(others)
        assert all((batch[name] == other[name]).all() for name in other)


def test_tokenization_continues_after_an_interruption(tmp_path, monkeypatch):
    done, tokenize = [], token_cache.tokenize_corpus

    def count(texts, *args, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(texts[0]["text"])
        return tokenize(texts, *args, **options)

    monkeypatch.setattr(token_cache, "tokenize_corpus", count)
    with pytest.raises(KeyboardInterrupt):
        token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"has no prepared.json; run tokenize_to_cache"):
        token_cache.load_token_cache(tmp_path)
    (tmp_path / "part-00001.npz").write_bytes(b"half")
    done[:] = [None]  # two more shards are tokenized: the corrupted one and the fourth
    with pytest.raises(KeyboardInterrupt):
        token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS)
    assert [text and text.split()[1] for text in done] == [None, "10", "30"]
    monkeypatch.setattr(token_cache, "tokenize_corpus", tokenize)
    assert_same(token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS),
                tokenize_corpus(TEXTS, CHARS))


def test_changed_texts_are_tokenized_again(tmp_path):
    token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS)
    changed = [*TEXTS[:20], {"text": "Sentence 9 of some."}, *TEXTS[21:]]
    assert_same(token_cache.tokenize_to_cache(changed, CHARS, tmp_path, **OPTIONS),
                tokenize_corpus(changed, CHARS))


@pytest.mark.parametrize("suffix", [".array_record", ".npz"])
def test_corrupted_shards_are_detected_and_rewritten(tmp_path, suffix):
    token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS)
    file = tmp_path / f"part-00002{suffix}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"part-00002{suffix} is corrupted: its checksum"):
        token_cache.load_token_cache(tmp_path)
    assert_same(token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS),
                tokenize_corpus(TEXTS, CHARS))


def test_mismatched_tokenizers_and_options(tmp_path):
    token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, **OPTIONS)
    other = tokenizers.train_chars(["abc"])
    with pytest.raises(ValueError, match="was made with another tokenizer; give that"):
        token_cache.load_token_cache(tmp_path, other)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        token_cache.tokenize_to_cache(TEXTS, other, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"another eos_id \(None, not 3\); give another folder"):
        token_cache.tokenize_to_cache(TEXTS, CHARS, tmp_path, eos_id=3, **OPTIONS)
    (tmp_path / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match=r"prepared.json is corrupted .*; delete it"):
        token_cache.load_token_cache(tmp_path)
    with pytest.raises(ValueError, match="the 1 examples contain 0 tokens"):
        token_cache.tokenize_to_cache([{"text": ""}], CHARS, tmp_path / "empty", quiet=True)


def test_a_modified_tokenizer_of_a_run_is_detected(tmp_path):
    save_run_config(tmp_path, GPT2, CHARS)
    tmp_path /= "tokenizer"
    assert tokenizers.load(tmp_path).fingerprint() == CHARS.fingerprint()
    file = tmp_path / "tokenizer.json"
    table = json.loads(file.read_text())
    table["model"]["vocab"] = dict(reversed(table["model"]["vocab"].items()))
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"tokenizer.json is corrupted: .*; save it again"):
        tokenizers.load(tmp_path)
    (tmp_path / "digests.json").unlink()
    tokenizers.load(tmp_path)
