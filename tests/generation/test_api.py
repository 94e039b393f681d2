"""Texts for many rows in batches of similar lengths, and masked-token prediction."""

import jax
import numpy as np
import pytest
import small_models
from small_models import GPT2, VOCAB, build, forward

from transformer_jax.data import tokenizers
from transformer_jax.generation import fill_mask, generate, generate_texts

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


# ---- masks

ENCODER = small_models.BERT.replace(num_layers=1)
MASK = 4
TEXT = [2, 30, MASK, 12, 9, MASK, 3]


def test_fill_mask_is_the_softmax_of_the_logits():
    """Padding to a power of two changes nothing: the reference pass has no padding."""
    model, params = build(ENCODER)
    predictions = fill_mask(model, params, TEXT, mask_id=MASK, top_k=VOCAB)
    assert [prediction.position for prediction in predictions] == [2, 5]
    logits = np.asarray(forward(ENCODER, [TEXT]).mlm_logits[0], np.float64)
    for prediction in predictions:
        p = np.exp(logits[prediction.position])
        p /= p.sum()
        assert sorted(prediction.token_ids.tolist()) == list(range(VOCAB))
        np.testing.assert_allclose(prediction.probabilities, p[prediction.token_ids], rtol=1e-4)
        assert (np.diff(prediction.probabilities) <= 0).all()
        assert prediction.token_ids[0] == p.argmax()


@pytest.mark.parametrize(
    ("tokens", "change", "message"),
    [
        ([1, 2, 3], {}, r"none of 3 tokens is the mask token 4; put \[MASK\] into the text"),
        ([], {}, "none of 0 tokens is the mask token"),
        ([1, MASK, 61], {}, "row 0 has token id 61, outside the vocabulary of 61"),
        ([1.5, MASK], {}, "row 0 has token ids of type float64; give integers"),
        ([MASK] * 33, {}, "text of 33 tokens is longer than the model's max_length of 32; shorten"),
        ([MASK], {"top_k": 0}, "top_k is 0; it must be at least 1"),
    ],
)
def test_invalid_input_is_refused(tokens, change, message):
    with pytest.raises(ValueError, match=message):
        fill_mask(*build(ENCODER), tokens, mask_id=MASK, **change)
