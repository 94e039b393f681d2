"""Special tokens of sources and targets. Training and generation are in test_encoding.py."""

import pytest
from small_models import BART, GPT2, TRANSFORMER

from transformer_jax.data import LabeledDataset, tokenizers
from transformer_jax.models import build_model
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
