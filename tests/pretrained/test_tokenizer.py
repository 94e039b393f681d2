"""Tokenizers of checkpoints: every kind of vocabulary file, and how a family frames a text."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from transformer_jax.data import tokenizers
from transformer_jax.pretrained import sentencepiece, tokenizer

BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def written(folder, **files):
    """A folder with these files: text, bytes, or what JSON can hold; "_" stands for "."."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def load(folder, family):
    return tokenizer.load(folder, {"model_type": family})


def test_there_may_be_none(tmp_path):
    assert load(tmp_path, "gpt2") is None


def test_gpt2_frames_nothing(tmp_path):
    vocab = {**BYTES, "Ġa": 256, "<|endoftext|>": 257}
    written(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\nĠ a\n")
    made = load(tmp_path, "gpt2")
    assert made.encode("b a<|endoftext|>", True) == [BYTES["b"], 256, 257]
    assert made.decode(made.encode("  ünïcode\n a")) == "  ünïcode\n a"
    assert made.eos_id == 257


@pytest.mark.parametrize("family", ["roberta", "bart"])
def test_roberta_frames_and_its_mask_takes_the_space_before(family, tmp_path):
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3,
             **{c: i + 4 for c, i in BYTES.items()}, "<mask>": 260}
    written(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\n")
    made = load(tmp_path, family)
    assert made.encode("a <mask>", True) == [0, vocab["a"], 260, 2]
    assert (made.pad_id, made.cls_id, made.sep_id, made.mask_id) == (1, 0, 2, 260)
    written(tmp_path, tokenizer_config__json={"add_prefix_space": True})
    assert load(tmp_path, family).encode("a", True) == [0, vocab["Ġ"], vocab["a"], 2]


def test_the_first_gpt_has_its_own_words(tmp_path):
    vocab = {"<unk>": 0, "l": 1, "o": 2, "w</w>": 3, "lo": 4, "low</w>": 5, "!</w>": 6}
    written(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\nl o\nlo w</w>\n")
    made = load(tmp_path, "openai-gpt")
    assert made.encode("LOW low!", True) == [5, 5, 6]
    assert made.encode("z") == [0]
    assert made.decode([5, 5, 6]) == "low low !"


@pytest.mark.parametrize(
    ("config", "lowers"),
    [({}, True), ({"do_lower_case": False}, False), ({"do_lower_case": True}, True), (None, False)])
def test_wordpiece_lowers_as_its_config_says(config, lowers, tmp_path):
    """Without any config the vocabulary decides, which here has a capital letter."""
    written(tmp_path, vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nA\n##b\n")
    if config is not None:
        written(tmp_path, tokenizer_config__json=config)
    made = load(tmp_path, "bert")
    assert made.encode("Ab", True) == [2, 5 if lowers else 6, *([7]), 3]


def test_the_config_overrules_tokenizer_json(tmp_path):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "A": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    written(tmp_path, tokenizer__json=backend.to_str())
    assert load(tmp_path, "bert").encode("A A A A") == [1] * 4  # neither cut nor padded
    written(tmp_path, tokenizer_config__json={"do_lower_case": False})
    assert load(tmp_path, "bert").encode("A") == [2]


def test_added_tokens_have_the_ids_that_the_file_says(tmp_path):
    vocab = {**BYTES, "<|endoftext|>": 256}
    written(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\n",
            added_tokens__json={"<two>": 258, "<one>": 257})
    assert load(tmp_path, "gpt2").encode("a<two><one>") == [BYTES["a"], 258, 257]
    written(tmp_path, added_tokens__json={"<one>": 300})
    with pytest.raises(ValueError, match="gives '<one>' the id 300, but the vocabulary's next"):
        load(tmp_path, "gpt2")


# A SentencePiece model by hand -------------------------------------------------------------------


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + np.float32(value).tobytes()
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(pieces: dict[str, float], kind: int = 1) -> bytes:
    """The protocol buffer of a unigram model: <unk>, <s>, </s>, then these pieces."""
    first = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows = first + [(piece, score, 1) for piece, score in pieces.items()]
    made = b"".join(field(1, field(1, piece.encode()) + field(2, score) + field(3, kind))
                    for piece, score, kind in rows)
    return made + field(2, field(3, kind)) + field(3, field(3, 1))


SOURCE = {"▁": -3.0, "▁ha": -1.0, "llo": -1.5, "l": -4.0, "o": -4.0, "▁halo": -2.0}
TARGET = {"▁": -3.0, "▁hi": -1.0, "!": -2.0}


@pytest.fixture
def marian(tmp_path):
    vocab = {"</s>": 0, "<unk>": 1, "▁ha": 2, "llo": 3, "▁hi": 4, "!": 5, "▁": 6, ">>en<<": 7,
             "<pad>": 8}
    return written(tmp_path / "marian", source__spm=model(SOURCE), target__spm=model(TARGET),
                   vocab__json=vocab)


def test_marian_cuts_by_pieces_and_numbers_by_its_vocabulary(marian, tmp_path):
    made = load(marian, "marian")
    assert made.encode("  hallo   hallo ", True) == [2, 3, 2, 3, 0]
    assert made.encode(">>en<< hallo", True) == [7, 2, 3, 0]
    assert made.encode("!") == [6, 5]  # not in the source's pieces, but the vocabulary has it
    assert made.encode("?") == [6, 1]
    assert made.encode("halo") == [1]  # a piece that the vocabulary lacks
    assert made.encode_batch(["hi!"], True, target=True) == [[4, 5, 0]]
    assert made.decode([4, 5, 0, 8]) == "hi!"
    assert made.decode([4, 5, 0], skip_special=False) == "hi!</s>"
    assert (made.vocab_size, made.pad_id, made.eos_id) == (9, 8, 0)
    assert made.token_id("llo") == 3
    assert made.is_word_start.tolist() == [True, True, True, False, True, False, True, False, True]
    with pytest.raises(ValueError, match="token id 9 is outside"):
        made.decode([9])
    with pytest.raises(ValueError, match="text 1 is of type int"):
        made.encode_batch(["a", 3])
    made.save(tmp_path / "again")
    for path in marian.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert load(tmp_path / "again", "marian").encode("hallo", True) == [2, 3, 0]


def test_families_number_pieces_behind_their_own_specials(tmp_path):
    written(tmp_path, sentencepiece__bpe__model=model(SOURCE))
    xlm = load(tmp_path, "xlm-roberta")
    assert xlm.encode("hallo <mask>", True) == [0, 5, 6, 10, 2]
    mbart = load(tmp_path, "mbart")
    english = mbart.token_id("en_XX")
    assert mbart.encode("hallo", True) == [5, 6, 2, english]
    camembert = load(tmp_path, "camembert")
    assert [camembert.token_id(t) for t in ("<pad>", "<s>", "<mask>")] == [1, 5, 13]
    assert camembert.encode("hallo", True) == [5, 8, 9, 6]
    assert xlm.decode(xlm.encode("hallo hallo")) == "hallo hallo"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x0a\xff", "is no SentencePiece model"), (b"hello", "is no SentencePiece model"),
     (model(SOURCE, kind=2), "of type 2 with 9 pieces; only unigram"), (b"", "with 0 pieces")])
def test_other_models_are_refused(content, message, tmp_path):
    path = written(tmp_path, a__spm=content) / "a.spm"
    with pytest.raises(ValueError, match=message) as error:
        sentencepiece.read(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path, marian):
    written(tmp_path / "a", tokenizer__json="{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load(tmp_path / "a", "gpt2")
    written(tmp_path / "b", tokenizer__json="{}", tokenizer_config__json="[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        load(tmp_path / "b", "gpt2")
    written(marian, vocab__json={"a": 0})
    with pytest.raises(ValueError, match=r"vocab\.json lacks '</s>'"):
        load(marian, "marian")


def test_an_unread_kind_is_said(tmp_path, capsys):
    written(tmp_path, spiece__model=model(SOURCE))
    assert load(tmp_path, "pegasus") is None
    assert "spiece.model is not read here" in capsys.readouterr().err


def test_files_come_back_with_the_tokenizer(tmp_path):
    vocab = {**BYTES, "<|endoftext|>": 256}
    source = written(tmp_path / "in", vocab__json=vocab, merges__txt="#version: 0.2\n",
                     tokenizer_config__json='{"model_max_length":  9}')
    load(source, "gpt2").save(tmp_path / "out")
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert load(tmp_path / "out", "gpt2").encode("abc") == load(source, "gpt2").encode("abc")


def test_a_trained_one_is_a_pretrained_one_after_saving(tmp_path):
    made = tokenizers.train_wordpiece(["the cat and the dog"] * 20, 150)
    made.save(tmp_path)
    assert load(tmp_path, "bert").encode("the cat", True) == made.encode("the cat", True)


def test_real_vocabularies_give_back_real_text(real_data, tmp_path):
    gpt2 = tokenizer.load(real_data / "vocab_gpt2", {"model_type": "gpt2"})
    text = "Hello world, it's 2019! \n\n  naïve — 漢字"
    assert gpt2.encode("Hello world", True) == [15496, 995]
    assert gpt2.decode(gpt2.encode(text)) == text
    bert = tokenizer.load(real_data / "vocab_bert_uncased", {"model_type": "bert"})
    assert bert.encode("Hello World", True) == [101, 7592, 2088, 102]


