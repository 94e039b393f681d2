"""Texts to write: how rows begin and end. What is trained and written, test_configs.py has."""

import pytest
import supervised
import writing
from small_models import BART, GPT2, TRANSFORMER

from transformer_jax.data import LabeledDataset, tokenizers
from transformer_jax.models import build_model

PAIRS = [{"source": "one two", "target": "two"}, {"source": "three", "target": "one"}]
DATA = LabeledDataset("seq2seq", PAIRS, PAIRS, (), "rouge", None, {})
HOW = supervised.Reading(16, target_length=8)
TEXTS = ["one two three"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train_bpe(TEXTS, vocab_size=300, specials=tokenizers.SEQ2SEQ_SPECIALS)


@pytest.mark.parametrize("config", [BART, TRANSFORMER], ids=["bart", "transformer"])
@pytest.mark.parametrize("ids", [(0, 5), (3, 5), (None, 5), (None, None)])
def test_a_decoder_begins_in_training_as_in_use(config, ids, tokenizer):
    """Also with id 0, which is no missing id."""
    start, bos = ids
    config = config.replace(vocab_size=tokenizer.vocab_size, decoder_start_token_id=start,
                            bos_token_id=bos)
    task = writing.read(DATA, build_model(config), tokenizer, HOW)
    row = task.make_row(task.train[0], 16)
    wanted = next(i for i in (start, bos, tokenizer.sep_id) if i is not None)
    assert row["decoder_tokens"][0] == wanted


def test_a_gpt_needs_a_token_between_source_and_target():
    wordpiece = tokenizers.train_wordpiece(TEXTS, vocab_size=120)
    model = build_model(GPT2.replace(vocab_size=wordpiece.vocab_size))
    with pytest.raises(ValueError, match="no end-of-text token to part source and target"):
        writing.read(DATA, model, wordpiece, HOW)
