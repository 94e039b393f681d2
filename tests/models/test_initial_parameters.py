"""Names, shapes and initial distributions of all parameters."""

import functools

import jax
import numpy as np
import pytest
from small_models import BERT, GPT1, GPT2, VOCAB, build

from transformer_jax.models import build_model, init_params


def flat(tree) -> dict:
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def block(prefix: str) -> dict:
    """D = 24, N = 3, H = 8, F = 40."""
    shapes = {f"self_attention/{name}/{leaf}": shape for name in ("query", "key", "value")
              for leaf, shape in (("kernel", (24, 3, 8)), ("bias", (3, 8)))}
    shapes |= {"self_attention/out/kernel": (3, 8, 24), "self_attention/out/bias": (24,)}
    shapes |= {"mlp/wi/kernel": (24, 40), "mlp/wi/bias": (40,)}
    shapes |= {"mlp/wo/kernel": (40, 24), "mlp/wo/bias": (24,)}
    for norm in ("attention_norm", "mlp_norm"):
        shapes |= {f"{norm}/scale": (24,), f"{norm}/bias": (24,)}
    return {f"{prefix}/{name}": shape for name, shape in shapes.items()}


GPT_NAMES = {
    "token_embed/embedding": (VOCAB, 24), "position_embed/embedding": (32, 24),
    **block("decoder/layer_0"), **block("decoder/layer_1"),
}
FINAL_NORM = {"decoder/final_norm/scale": (24,), "decoder/final_norm/bias": (24,)}
BERT_NAMES = {
    "token_embed/embedding": (VOCAB, 24), "position_embed/embedding": (32, 24),
    "segment_embed/embedding": (2, 24), "embed_norm/scale": (24,), "embed_norm/bias": (24,),
    **block("encoder/layer_0"), **block("encoder/layer_1"),
    "pooler/kernel": (24, 24), "pooler/bias": (24,),
    "mlm_head/dense/kernel": (24, 24), "mlm_head/dense/bias": (24,),
    "mlm_head/norm/scale": (24,), "mlm_head/norm/bias": (24,), "mlm_head/output/bias": (VOCAB,),
    "nsp_head/kernel": (24, 2), "nsp_head/bias": (2,),
}


@pytest.mark.parametrize(
    ("config", "names"),
    [(GPT1, GPT_NAMES), (GPT2, GPT_NAMES | FINAL_NORM), (BERT, BERT_NAMES)],
    ids=["gpt1", "gpt2", "bert"],
)
def test_names_and_shapes(config, names):
    assert {name: leaf.shape for name, leaf in flat(build(config)[1]).items()} == names


WIDE = {"vocab_size": 400, "max_length": 200, "d_model": 96, "mlp_dim": 200, "num_layers": 2}
# Standard deviation of a normal distribution that is truncated at two standard deviations.
TRUNCATED_STD = 0.8796


@functools.cache
def initialize(config):
    model = build_model(config)
    return jax.jit(lambda rng: init_params(model, rng))


def key(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # the fastest to compile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "std", "residual_std", "largest"),
    [
        (GPT2, 0.02, 0.02 / 4**0.5, 1),  # two residual sums in each of two layers
        (BERT, 0.02 * TRUNCATED_STD, 0.02 * TRUNCATED_STD, 0.04),
    ],
    ids=["gpt2", "bert"],
)
def test_initial_distributions(config, std, residual_std, largest):
    for path, leaf in flat(initialize(config.replace(**WIDE))(key(7))).items():
        leaf = np.asarray(leaf)
        if path.endswith("/bias"):
            assert not leaf.any(), path
        elif path.endswith("/scale"):
            assert (leaf == 1).all(), path
        else:
            expected = residual_std if path.endswith(("out/kernel", "wo/kernel")) else std
            # Five standard deviations of the estimate.
            tolerance = 5 / (2 * leaf.size) ** 0.5
            np.testing.assert_allclose(leaf.std(), expected, rtol=tolerance, err_msg=path)
            assert abs(leaf.mean()) < 5 * expected / leaf.size**0.5, path
            assert np.abs(leaf).max() <= largest, path


def test_scale_residual_init():
    assert GPT1.stack.residual_init_std == GPT1.stack.init_std == 0.02
    assert GPT2.stack.residual_init_std == 0.02 / 4**0.5
    assert GPT2.replace(num_layers=8, init_std=0.1).stack.residual_init_std == 0.1 / 4


def test_layers_and_seeds_have_different_parameters():
    init = initialize(GPT2.replace(**WIDE))
    params, same, other = init(key(7)), init(key(7)), init(key(8))
    a, b = (params["decoder"][f"layer_{i}"]["mlp"]["wi"]["kernel"] for i in (0, 1))
    assert (a != b).mean() > 0.99
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), params, same)))
    a, b = (tree["token_embed"]["embedding"] for tree in (params, other))
    assert (a != b).mean() > 0.99
