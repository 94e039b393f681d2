"""Checkpoints' tokenizers beside the reference's, on whole corpora.

    pip install torch==2.13.0 "transformers==5.*" sentencepiece
    TRANSFORMER_JAX_DATA=... python -m pytest tests/reference/test_live_tokenizers.py -m reference
"""

import gzip
import json
import shutil

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from transformer_jax.data import tokenizers
from transformer_jax.pretrained import tokenizer

# Warnings of the reference's own imports are not ours.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def shakespeare(real_data) -> str:
    (path,) = (real_data / "tinyshakespeare").rglob("*.txt")
    return path.read_text()


@pytest.fixture(scope="module")
def lines(real_data, shakespeare) -> list[str]:
    """Tiny Shakespeare and 10,000 lines of WikiText-2."""
    with gzip.open(next((real_data / "wikitext-2").rglob("train.txt.gz")), "rt") as file:
        wiki = [line.rstrip("\n") for _, line in zip(range(10_000), file)]
    assert len(wiki) == 10_000
    return [*shakespeare.splitlines(), shakespeare, *wiki]


def same_ids(folder, family: str, reference, texts, allowed: int = 0) -> tokenizer.Tokenizer:
    """Our tokenizer of the folder, after both have read all texts."""
    ours = tokenizer.load(folder, {"model_type": family})
    rows = ours.encode_batch(texts, add_special_tokens=True)
    expected = [reference(text)["input_ids"] for text in texts]
    different = [text for text, a, b in zip(texts, rows, expected) if a != b]
    assert len(different) <= allowed, different[:3]
    for row in rows[:500]:
        wanted = reference.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(row) == wanted
    return ours


def test_gpt2(transformers, real_data, lines, tmp_path):
    shutil.copy(real_data / "vocab_gpt2" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(real_data / "vocab_gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    ours = same_ids(tmp_path, "gpt2", transformers.GPT2Tokenizer.from_pretrained(tmp_path), lines)
    assert all(ours.decode(ours.encode(line)) == line for line in lines)


@pytest.mark.parametrize("family", ["Roberta", "Bart"])
def test_roberta_and_bart(family, transformers, real_data, lines, tmp_path):
    vocab = json.loads((real_data / "vocab_gpt2" / "encoder.json").read_text())
    del vocab["<|endoftext|>"]
    numbered = ["<s>", "<pad>", "</s>", "<unk>", *vocab, "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(numbered)}))
    shutil.copy(real_data / "vocab_gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    reference = getattr(transformers, f"{family}Tokenizer").from_pretrained(tmp_path)
    same_ids(tmp_path, family.lower(), reference, lines)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("lowers", [True, False])
def test_bert(file, lowers, transformers, real_data, lines, tmp_path):
    shutil.copy(real_data / "vocab_bert_uncased" / file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowers}))
    reference = transformers.BertTokenizer.from_pretrained(tmp_path)
    same_ids(tmp_path, "bert", reference, [*lines, "[MASK]s Häßlich 漢字 \u200b"])


def test_the_first_gpt(transformers, shakespeare, lines, tmp_path):
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(shakespeare.splitlines(), trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False))
    made.model.save(str(tmp_path))
    reference = transformers.OpenAIGPTTokenizer.from_pretrained(tmp_path)
    same_ids(tmp_path, "openai-gpt", reference, lines)


def train(texts, path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=path.open("wb"), vocab_size=4000,
        character_coverage=1.0, minloglevel=2)


def test_marian(transformers, real_data, lines, tmp_path):
    """All but a few lines in 100,000: where two ways to cut a word are equally likely, as "00" "0"
    and "0" "00", the rounding of SentencePiece's float32 sums decides."""
    german, english = (
        [line for path in sorted((real_data / "multi30k").rglob(f"*.{language}"))
         for line in path.read_text().splitlines()] for language in ("de", "en"))
    vocab = {"</s>": 0, "<unk>": 1}
    for name, texts in (("source.spm", german), ("target.spm", english)):
        train(texts[:20_000], tmp_path / name)
        pieces = tokenizer.load_sentencepiece(tmp_path / name).pieces
        for i, piece in enumerate(pieces[3:]):
            if i % 50:  # some pieces are not in the vocabulary
                vocab.setdefault(piece.piece.decode(), len(vocab))
    vocab |= {">>en<<": len(vocab), "<pad>": len(vocab) + 1}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer_config.json").write_text('{"source_lang": "de", "target_lang": "en"}')
    reference = transformers.MarianTokenizer.from_pretrained(tmp_path)
    hard = [">>en<< Hallo Welt", "a\tb  c \n d ", "漢字 ½ ﬁ ", "", " ", "x </s> y"]
    ours = same_ids(tmp_path, "marian", reference, hard)
    same_ids(tmp_path, "marian", reference, [*german, *english, *lines], allowed=20)
    assert ours.encode_batch(english[:500], True, target=True) == [
        reference(text_target=text)["input_ids"] for text in english[:500]]


@pytest.mark.parametrize("family", ["xlm-roberta", "camembert"])
def test_sentencepiece_of_xlm_roberta_and_camembert(
    family, transformers, shakespeare, lines, tmp_path
):
    train(shakespeare.splitlines(), tmp_path / "sentencepiece.bpe.model")
    name = {"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"}[family]
    same_ids(tmp_path, family, getattr(transformers, name).from_pretrained(tmp_path), lines)


def test_a_tokenizer_of_ours_is_read_by_the_reference(transformers, shakespeare, lines, tmp_path):
    made = tokenizers.train_bpe(shakespeare.splitlines(), 1000)
    made.save(tmp_path)
    same_ids(tmp_path, "gpt2", transformers.GPT2Tokenizer.from_pretrained(tmp_path), lines[:5000])
