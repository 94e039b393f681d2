"""The words that BERT puts in the place of a mask, against plain forward passes."""

import numpy as np
import pytest
import small_models
from small_models import VOCAB, build, forward

from transformer_jax.generation import fill_mask

ENCODER = small_models.BERT.replace(num_layers=1)
MASK = 4
TEXT = [2, 30, MASK, 12, 9, MASK, 3]


def test_fill_mask_is_the_softmax_of_the_model():
    """And the bucket changes nothing: the model itself is called without padding."""
    model, params = build(ENCODER)
    fills = fill_mask(model, params, TEXT, mask_id=MASK, top_k=VOCAB)
    assert [fill.position for fill in fills] == [2, 5]
    logits = np.asarray(forward(ENCODER, [TEXT]).mlm_logits[0], np.float64)
    for fill in fills:
        p = np.exp(logits[fill.position])
        p /= p.sum()
        assert sorted(fill.token_ids.tolist()) == list(range(VOCAB))
        np.testing.assert_allclose(fill.probabilities, p[fill.token_ids], rtol=1e-4)
        assert (np.diff(fill.probabilities) <= 0).all()
        assert fill.token_ids[0] == p.argmax()


@pytest.mark.parametrize(
    ("tokens", "change", "message"),
    [
        ([1, 2, 3], {}, r"no token of 3 is the mask 4; put \[MASK\] into the text"),
        ([], {}, "no token of 0 is the mask"),
        ([1, MASK, 61], {}, "row 0 has token id 61, outside the vocabulary of 61"),
        ([1.5, MASK], {}, "row 0 has token ids of type float64; give integers"),
        ([MASK] * 33, {}, "text of 33 tokens is longer than the model's 32 positions; shorten it"),
        ([MASK], {"top_k": 0}, "top_k is 0; ask for at least 1 candidate"),
    ],
)
def test_fill_mask_refuses(tokens, change, message):
    with pytest.raises(ValueError, match=message):
        fill_mask(*build(ENCODER), tokens, mask_id=MASK, **change)
