"""Special tokens of sources and targets. Training and generation are in test_encoding.py."""

import pytest
from small_models import BART, GPT2, TRANSFORMER

from transformer_jax.data import LabeledDataset, tokenizers
from transformer_jax.models import build_model
from transformer_jax.recipes import encoding
from transformer_jax.recipes.encoding import encode_dataset
from transformer_jax.recipes.task_encoder import InputConfig

PAIRS = [{"source": "one two", "target": "two"}, {"source": "three", "target": "one"}]
DATASET = LabeledDataset("seq2seq", PAIRS, PAIRS, (), "rouge", None, {})
CONFIG = InputConfig(16, target_length=8)
TEXTS = ["one two three"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_bpe(
        TEXTS, vocab_size=300, special_tokens=tokenizers.SEQ2SEQ_SPECIAL_TOKENS)


@pytest.mark.parametrize("config", [BART, TRANSFORMER], ids=["bart", "transformer"])
@pytest.mark.parametrize("ids", [(0, 5), (3, 5), (None, 5), (None, None)])
def test_training_starts_the_decoder_as_generation_does(config, ids, tokenizer):
    """Also with the id 0, which is not a missing id."""
    start, bos = ids
    config = config.replace(vocab_size=tokenizer.vocab_size, decoder_start_token_id=start,
                            bos_token_id=bos)
    encoded = encode_dataset(DATASET, build_model(config), tokenizer, CONFIG)
    row = encoded.encoder.make_row(encoded.train[0], 16)
    expected = next(i for i in (start, bos, tokenizer.sep_id) if i is not None)
    assert row["decoder_tokens"][0] == expected


def test_gpt_needs_a_token_between_source_and_target():
    wordpiece = tokenizers.train_wordpiece(TEXTS, vocab_size=120)
    model = build_model(GPT2.replace(vocab_size=wordpiece.vocab_size))
    with pytest.raises(ValueError, match="no end-of-text token to separate source and target"):
        encode_dataset(DATASET, model, wordpiece, CONFIG)


@pytest.mark.parametrize("config, num_special", [(BART, 2), (TRANSFORMER, 1)],
                         ids=["bart", "transformer"])
@pytest.mark.parametrize("num_beams, penalty", [(2, {"length_penalty": 0.6}), (1, {})])
def test_rows_and_options_of_generation(config, num_special, num_beams, penalty, tokenizer,
                                        monkeypatch):
    """Sources fill `max_length`, as in training; the length penalty is that of the config."""
    calls = []

    def record(model, params, tokenizer, rows, **options):
        calls.append((rows, options))
        return ["one"] * len(rows)

    monkeypatch.setattr(encoding, "generate_texts", record)
    long = [{"source": "one two three " * 9, "target": "one"}]
    model = build_model(config.replace(vocab_size=tokenizer.vocab_size))
    encoded = encode_dataset(
        LabeledDataset("seq2seq", long, long, (), "rouge", None, {}), model, tokenizer,
        CONFIG._replace(num_beams=num_beams, length_penalty=0.6))
    encoded.encoder.predict({}, encoded.validation)
    ((row,), options), = calls
    assert len(row) == CONFIG.max_length and row[-1] == tokenizer.sep_id
    assert row[num_special - 1:-1] == encoded.validation[0]["source"][: 16 - num_special]
    assert {k: v for k, v in options.items() if k == "length_penalty"} == penalty
