"""Tokenizers of checkpoints: every kind of vocabulary file, and special tokens by family."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from transformer_jax.data import tokenizers
from transformer_jax.pretrained import tokenizer

BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def make_folder(folder, **files):
    """Writes files with text, bytes or JSON values to a folder; "__" stands for "." in names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def load(folder, family):
    return tokenizer.load(folder, {"model_type": family})


def test_a_folder_may_have_no_tokenizer(tmp_path):
    assert load(tmp_path, "gpt2") is None


def test_gpt2_adds_no_special_tokens(tmp_path):
    vocab = {**BYTES, "Ġa": 256, "<|endoftext|>": 257}
    make_folder(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\nĠ a\n")
    loaded = load(tmp_path, "gpt2")
    assert loaded.encode("b a<|endoftext|>", True) == [BYTES["b"], 256, 257]
    assert loaded.decode(loaded.encode("  ünïcode\n a")) == "  ünïcode\n a"
    assert loaded.eos_id == 257


@pytest.mark.parametrize("family", ["roberta", "bart"])
def test_roberta_adds_special_tokens_and_its_mask_includes_the_space_before(family, tmp_path):
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3,
             **{c: i + 4 for c, i in BYTES.items()}, "<mask>": 260}
    make_folder(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\n")
    loaded = load(tmp_path, family)
    assert loaded.encode("a <mask>", True) == [0, vocab["a"], 260, 2]
    assert (loaded.pad_id, loaded.cls_id, loaded.sep_id, loaded.mask_id) == (1, 0, 2, 260)
    make_folder(tmp_path, tokenizer_config__json={"add_prefix_space": True})
    assert load(tmp_path, family).encode("a", True) == [0, vocab["Ġ"], vocab["a"], 2]


def test_bpe_of_the_first_gpt(tmp_path):
    vocab = {"<unk>": 0, "l": 1, "o": 2, "w</w>": 3, "lo": 4, "low</w>": 5, "!</w>": 6}
    make_folder(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\nl o\nlo w</w>\n")
    loaded = load(tmp_path, "openai-gpt")
    assert loaded.encode("LOW low!", True) == [5, 5, 6]
    assert loaded.encode("z") == [0]
    assert loaded.decode([5, 5, 6]) == "low low !"


@pytest.mark.parametrize(
    ("config", "lowercases"),
    [({}, True), ({"do_lower_case": False}, False), ({"do_lower_case": True}, True), (None, False)])
def test_wordpiece_lowercases_if_its_config_says_so(config, lowercases, tmp_path):
    """Without a config the vocabulary decides, which has a capital letter here."""
    make_folder(tmp_path, vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nA\n##b\n")
    if config is not None:
        make_folder(tmp_path, tokenizer_config__json=config)
    loaded = load(tmp_path, "bert")
    assert loaded.encode("Ab", True) == [2, 5 if lowercases else 6, *([7]), 3]


def test_the_config_takes_precedence_over_tokenizer_json(tmp_path):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "A": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    make_folder(tmp_path, tokenizer__json=backend.to_str())
    assert load(tmp_path, "bert").encode("A A A A") == [1] * 4  # neither truncated nor padded
    make_folder(tmp_path, tokenizer_config__json={"do_lower_case": False})
    assert load(tmp_path, "bert").encode("A") == [2]


def test_added_tokens_have_the_ids_in_the_file(tmp_path):
    vocab = {**BYTES, "<|endoftext|>": 256}
    make_folder(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\n",
                added_tokens__json={"<two>": 258, "<one>": 257})
    assert load(tmp_path, "gpt2").encode("a<two><one>") == [BYTES["a"], 258, 257]
    make_folder(tmp_path, added_tokens__json={"<one>": 300})
    with pytest.raises(ValueError, match="gives '<one>' the id 300, but the next id"):
        load(tmp_path, "gpt2")


# A hand-made SentencePiece model -----------------------------------------------------------------


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
    message = b"".join(field(1, field(1, piece.encode()) + field(2, score) + field(3, kind))
                       for piece, score, kind in rows)
    return message + field(2, field(3, kind)) + field(3, field(3, 1))


SOURCE = {"▁": -3.0, "▁ha": -1.0, "llo": -1.5, "l": -4.0, "o": -4.0, "▁halo": -2.0}
TARGET = {"▁": -3.0, "▁hi": -1.0, "!": -2.0}


@pytest.fixture
def marian(tmp_path):
    vocab = {"</s>": 0, "<unk>": 1, "▁ha": 2, "llo": 3, "▁hi": 4, "!": 5, "▁": 6, ">>en<<": 7,
             "<pad>": 8}
    return make_folder(tmp_path / "marian", source__spm=model(SOURCE), target__spm=model(TARGET),
                       vocab__json=vocab)


def test_marian_maps_pieces_to_ids_by_its_vocabulary(marian, tmp_path):
    loaded = load(marian, "marian")
    assert loaded.encode("  hallo   hallo ", True) == [2, 3, 2, 3, 0]
    assert loaded.encode(">>en<< hallo", True) == [7, 2, 3, 0]
    assert loaded.encode("!") == [6, 5]  # no piece of the source language, but in the vocabulary
    assert loaded.encode("?") == [6, 1]
    assert loaded.encode("halo") == [1]  # a piece that is not in the vocabulary
    assert loaded.encode_batch(["hi!"], True, target=True) == [[4, 5, 0]]
    assert loaded.decode([4, 5, 0, 8]) == "hi!"
    assert loaded.decode([4, 5, 0], skip_special_tokens=False) == "hi!</s>"
    assert (loaded.vocab_size, loaded.pad_id, loaded.eos_id) == (9, 8, 0)
    assert loaded.token_id("llo") == 3
    assert loaded.is_word_start.tolist() == [
        True, True, True, False, True, False, True, False, True]
    with pytest.raises(ValueError, match="token id 9 is outside"):
        loaded.decode([9])
    with pytest.raises(ValueError, match="text 1 is of type int"):
        loaded.encode_batch(["a", 3])
    loaded.save(tmp_path / "saved")
    for path in marian.iterdir():
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    assert load(tmp_path / "saved", "marian").encode("hallo", True) == [2, 3, 0]


def test_ids_of_pieces_follow_the_special_tokens_of_the_family(tmp_path):
    make_folder(tmp_path, sentencepiece__bpe__model=model(SOURCE))
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
    [(b"\x0a\xff", "is not a SentencePiece model"), (b"hello", "is not a SentencePiece model"),
     (model(SOURCE, kind=2), "of type 2 with 9 pieces; supported: unigram"),
     (b"", "with 0 pieces")])
def test_unsupported_sentencepiece_models_are_rejected(content, message, tmp_path):
    path = make_folder(tmp_path, a__spm=content) / "a.spm"
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.load_sentencepiece(path)
    assert "\n" not in str(error.value)


def test_errors_name_invalid_files(tmp_path, marian):
    make_folder(tmp_path / "a", tokenizer__json="{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be loaded"):
        load(tmp_path / "a", "gpt2")
    make_folder(tmp_path / "b", tokenizer__json="{}", tokenizer_config__json="[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        load(tmp_path / "b", "gpt2")
    make_folder(marian, vocab__json={"a": 0})
    with pytest.raises(ValueError, match=r"vocab\.json has no token '</s>'"):
        load(marian, "marian")


def test_unsupported_tokenizers_are_reported(tmp_path, capsys):
    make_folder(tmp_path, spiece__model=model(SOURCE))
    assert load(tmp_path, "pegasus") is None
    assert "unsupported tokenizer file" in capsys.readouterr().err


def test_files_are_saved_with_the_tokenizer(tmp_path):
    vocab = {**BYTES, "<|endoftext|>": 256}
    source = make_folder(tmp_path / "in", vocab__json=vocab, merges__txt="#version: 0.2\n",
                         tokenizer_config__json='{"model_max_length":  9}')
    load(source, "gpt2").save(tmp_path / "out")
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert load(tmp_path / "out", "gpt2").encode("abc") == load(source, "gpt2").encode("abc")


def test_a_trained_tokenizer_can_be_loaded_after_saving(tmp_path):
    trained = tokenizers.train_wordpiece(["the cat and the dog"] * 20, 150)
    trained.save(tmp_path)
    assert load(tmp_path, "bert").encode("the cat", True) == trained.encode("the cat", True)


def test_real_vocabularies(real_data, tmp_path):
    gpt2 = tokenizer.load(real_data / "vocab_gpt2", {"model_type": "gpt2"})
    text = "Hello world, it's 2019! \n\n  naïve — 漢字"
    assert gpt2.encode("Hello world", True) == [15496, 995]
    assert gpt2.decode(gpt2.encode(text)) == text
    bert = tokenizer.load(real_data / "vocab_bert_uncased", {"model_type": "bert"})
    assert bert.encode("Hello World", True) == [101, 7592, 2088, 102]


