"""With bfloat16 compute, parameters, gradients, logits and losses are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BERT, GPT2, build, forward, random_tokens

from transformer_jax.objectives import causal_lm, cross_entropy, mlm_nsp

TOKENS = random_tokens(4, 10)
GPT_BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:],
             "weights": np.ones((4, 9), np.float32)}
BERT_BATCH = {
    "tokens": TOKENS,
    "masked_positions": np.tile(np.array([2, 5], np.int32), (4, 1)),
    "masked_targets": TOKENS[:, [2, 5]],
    "masked_weights": np.ones((4, 2), np.float32),
    "nsp_labels": np.array([0, 1, 0, 1], np.int32),
    "nsp_weights": np.ones(4, np.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "objective", "batch"),
    [(GPT2, causal_lm, GPT_BATCH), (BERT, mlm_nsp, BERT_BATCH)], ids=["gpt", "bert"],
)
def test_parameters_gradients_and_losses_are_float32(config, objective, batch):
    config = config.replace(num_layers=1)
    values = {}
    for dtype in ("float32", "bfloat16"):
        model, params = build(config.replace(dtype=dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

        def loss(params, model=model):
            total, weight, _ = objective.loss(model.apply, params, batch)
            return cross_entropy.mean_loss(total, weight)

        if dtype == "bfloat16":
            values[dtype], grads = jax.jit(jax.value_and_grad(loss))(params)
        else:
            values[dtype] = jax.jit(loss)(params)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    assert values["bfloat16"].dtype == jnp.float32
    assert values["bfloat16"] != values["float32"]
    np.testing.assert_allclose(values["bfloat16"], values["float32"], rtol=0.01)


def test_activations_are_bfloat16_and_logits_float32():
    gpt = forward(GPT2.replace(num_layers=1, dtype="bfloat16"), TOKENS)
    bert = forward(BERT.replace(num_layers=1, dtype="bfloat16"), TOKENS)
    assert gpt.hidden.dtype == bert.hidden.dtype == bert.pooled.dtype == jnp.bfloat16
    for output in (gpt.logits, bert.mlm_logits, bert.nsp_logits):
        assert output.dtype == jnp.float32
    # Logits are not rounded to bfloat16 and cast back.
    assert (gpt.logits != gpt.logits.astype(jnp.bfloat16)).mean() > 0.5
    model, _ = build(GPT2.replace(dtype="bfloat16"))
    assert model.init_cache(model.config, 1, 4)["layer_0"].key.dtype == jnp.bfloat16
