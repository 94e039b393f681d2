"""Texts for many rows, in batches of similar lengths."""

import jax
import pytest
from small_models import GPT2, build

from transformer_jax.data import tokenizers
from transformer_jax.generation import generate
from transformer_jax.generation.texts import generate_texts

TOKENIZER = tokenizers.train_chars(["abcdefgh"])
ROWS = [[4, 5, 6], [7], [5, 4], [6, 6, 6]]


@pytest.fixture(scope="module")
def model_and_params():
    return build(GPT2.replace(vocab_size=TOKENIZER.vocab_size))


def test_texts_are_in_the_order_of_the_rows(model_and_params):
    model, params = model_and_params
    texts = generate_texts(model, params, TOKENIZER, ROWS, batch_size=3, max_new_tokens=3)
    for row, text in zip(ROWS, texts):
        (ids,) = generate(model, params, [row], max_new_tokens=3)
        assert text == TOKENIZER.decode(ids[len(row):]).strip()


def test_batches_of_samples_have_keys_of_their_own(model_and_params):
    model, params = model_and_params
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    first, second = generate_texts(model, params, TOKENIZER, [[4, 5], [4, 5]], batch_size=1,
                                   rng=jax.random.key(0), **options)
    assert first != second


def test_one_text_for_each_row(model_and_params):
    model, params = model_and_params
    with pytest.raises(ValueError, match="num_return_sequences is 2; it must be 1"):
        generate_texts(model, params, TOKENIZER, ROWS, num_return_sequences=2, num_beams=2)
