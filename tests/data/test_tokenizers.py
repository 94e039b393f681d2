"""Tokenizers: training, round trips, special tokens, saving and loading."""

import random
import subprocess
import sys

import numpy as np
import pytest

from transformer_jax.data import tokenizers

TEXTS = [
    "The cat sat on the mat. The cat ate the rat that sat there.",
    "Unbelievable! Unbelievers believe the unbelievable; believing is seeing.",
    "Zeilen\nund  Leerzeichen, Übung, naïve café, 10 + 20 = 30.",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def wordpiece():
    return tokenizers.train_wordpiece(TEXTS, 200)


@pytest.fixture(scope="module")
def chars():
    return tokenizers.train_chars(TEXTS)


@pytest.fixture(scope="module")
def joint():
    return tokenizers.train_bpe(TEXTS, 320, tokenizers.SEQ2SEQ_SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def unigram():
    return tokenizers.train_unigram(TEXTS * 20, 120)


def arbitrary_text(rng: random.Random) -> str:
    """Random Unicode text without surrogates, rich in white space."""
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    some = [chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(40))]
    return "".join(rng.choice([c, c, " ", "\n", "\t ", "é", "'s", "12"]) for c in some)


@pytest.mark.parametrize("seed", range(200))
def test_bpe_is_lossless_for_any_unicode(bpe, seed):
    text = arbitrary_text(random.Random(seed))
    assert bpe.decode(bpe.encode(text)) == text


def test_the_character_tokenizer_is_lossless_for_known_characters(chars):
    text = "  The mat\n\n\n sat,\n"
    assert chars.decode(chars.encode(text)) == text
    assert len(chars.encode(text)) == len(text)
    assert chars.encode("T漢T") == [chars.token_id("T"), chars.unk_id, chars.token_id("T")]


def test_ids_of_special_tokens(bpe, wordpiece, chars):
    assert bpe.eos_id == chars.eos_id == 0
    assert [wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id, wordpiece.sep_id,
            wordpiece.mask_id] == [0, 1, 2, 3, 4]
    assert bpe.pad_id is None and bpe.unk_id is None and wordpiece.eos_id is None
    assert wordpiece.encode("the [MASK] sat")[1:-1] == [wordpiece.mask_id]
    cat = wordpiece.encode("cat")
    assert wordpiece.encode("cat", add_special_tokens=True) == [2, *cat, 3]


def test_special_tokens_of_an_encoder_decoder(joint, unigram):
    for found in (joint, unigram):
        assert (found.cls_id, found.pad_id, found.sep_id, found.unk_id, found.mask_id) == (
            0, 1, 2, 3, 4)
    for found in (joint, unigram):
        assert found.encode("the", add_special_tokens=True) == [*found.encode("the"), 2]
    assert joint.encode("a <mask> b").count(4) == 1
    assert joint.decode(joint.encode("naïve 漢")) == "naïve 漢"


def test_unigram(unigram):
    assert unigram.decode(unigram.encode("the  cat\nsat")) == "the cat sat"
    assert unigram.encode("漢")[-1] == unigram.unk_id
    assert len(unigram.encode("the cat sat on the mat.")) < 14  # subwords, not letters
    assert unigram.is_word_start[unigram.encode("the cat")[0]]
    with pytest.raises(ValueError, match=r"vocab_size 20 is too small.*use at least 69"):
        tokenizers.train_unigram(TEXTS, 20)


def test_wordpiece_normalizes_as_bert_does(wordpiece):
    assert wordpiece.decode(wordpiece.encode("The CAT, café!")) == "the cat, cafe!"
    assert wordpiece.encode("漢") == [wordpiece.unk_id]
    assert wordpiece.backend.token_to_id("##a") is not None
    cased = tokenizers.train_wordpiece(TEXTS, 200, lowercase=False)
    assert cased.decode(cased.encode("The cat")) == "The cat"


def test_wordpiece_keeps_the_frequent_characters():
    texts = ["aaaa bbbb cccc zz y"]
    kept = tokenizers.train_wordpiece(texts, 200, max_alphabet=3)
    assert kept.encode("y") == [kept.unk_id]
    assert kept.unk_id not in kept.encode("a b c")


TRAIN_BOTH = """
import hashlib
from transformer_jax.data import tokenizers
texts = ["".join(chr(97 + (i * j) % 26) for j in range(i % 9 + 1)) + " ÄÖ!" for i in range(500)]
for train, size in ((tokenizers.train_bpe, 400), (tokenizers.train_wordpiece, 300)):
    print(hashlib.sha1(train(texts, size).backend.to_str().encode()).hexdigest())
vocab = tokenizers.train_unigram(texts, 200).backend.get_vocab()  # scores differ in the last digits
print(hashlib.sha1(str(sorted(vocab.items())).encode()).hexdigest())
"""


def test_training_is_the_same_in_every_process():
    runs = [subprocess.run([sys.executable, "-c", TRAIN_BOTH], capture_output=True, text=True,
                           check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0].split()) == 3


def test_is_word_start(bpe, wordpiece, chars):
    assert wordpiece.is_word_start[wordpiece.token_id("[MASK]")]
    for tokenizer, yes, no in ((wordpiece, "a", "##a"), (bpe, "Ġ", "a"), (chars, " ", "a")):
        starts = tokenizer.is_word_start
        assert starts.shape == (tokenizer.vocab_size,) and starts.dtype == bool
        assert starts[tokenizer.token_id(yes)] and not starts[tokenizer.token_id(no)]
    ids = np.array(bpe.encode(" the unbelievable cat"))
    assert bpe.is_word_start[ids].sum() == 3


@pytest.mark.parametrize(("kind", "files"), [
    ("bpe", {"vocab.json", "merges.txt"}),
    ("wordpiece", {"vocab.txt"}),
    ("chars", {"vocab.json"}),
])
def test_save_and_load(kind, files, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "t")
    written = {path.name for path in (tmp_path / "t").iterdir()}
    assert written == files | {"tokenizer.json"}
    sources = [tmp_path / "t", tmp_path / "t" / "tokenizer.json"]
    if kind != "chars":  # the standard files are sufficient
        sources.append(tmp_path / "t" / sorted(files)[-1])
    text = "The unbelievable cat.\n<|endoftext|>"
    for source in sources:
        loaded = tokenizers.load(source)
        assert loaded.encode_batch([text, "mat"]) == tokenizer.encode_batch([text, "mat"])
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert (loaded.is_word_start == tokenizer.is_word_start).all()


def test_the_published_vocabularies(real_data):
    gpt2 = tokenizers.load(real_data / "vocab_gpt2")
    assert gpt2.vocab_size == 50257 and gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    bert = tokenizers.load(real_data / "vocab_bert_uncased" / "vocab.txt")
    folder = tokenizers.load(real_data / "vocab_bert_uncased")
    assert bert.encode("Hello, world!", add_special_tokens=True) == [
        101, 7592, 1010, 2088, 999, 102]
    assert folder.encode("Naïve hypotheses") == bert.encode("Naïve hypotheses")


def test_errors(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"text 1 has the lone surrogate '\\ud800' at character 2"):
        bpe.encode_batch(["fine", "ab\ud800"])
    with pytest.raises(ValueError, match="text 0 is of type bytes"):
        bpe.encode(b"bytes")
    with pytest.raises(ValueError, match="'<none>' is not among the 300 tokens"):
        bpe.token_id("<none>")
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary of 300"):
        bpe.decode([1, 300])
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.*at least 257"):
        tokenizers.train_bpe(TEXTS, 100)
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.*at least 109"):
        tokenizers.train_wordpiece(TEXTS, 100)
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="nothing to train on"):
            tokenizers.train_chars(texts)
    with pytest.raises(ValueError, match="texts is one str"):
        tokenizers.train_bpe("text", 300)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*tokenizer.json"):
        tokenizers.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        tokenizers.load(tmp_path)
