"""Schedules compared with values computed by hand; weight decay; clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax import tree
from transformer_jax.train import optimizers, transforms

BY_HAND = [
    # name, num_steps, warmup_steps, end_lr, {step: learning rate}, all with peak_lr 0.8
    ("constant", 10, 0, 0.0, {0: 0.8, 9: 0.8, 50: 0.8}),
    ("constant", 10, 4, 0.0, {0: 0.2, 1: 0.4, 3: 0.8, 4: 0.8, 9: 0.8}),
    ("linear", 8, 0, 0.0, {0: 0.8, 2: 0.6, 4: 0.4, 7: 0.1, 8: 0.0, 20: 0.0}),
    ("linear", 10, 2, 0.4, {0: 0.4, 1: 0.8, 2: 0.8, 6: 0.6, 10: 0.4, 99: 0.4}),
    ("cosine", 8, 0, 0.0, {0: 0.8, 2: 0.4 + 0.4 * 0.5**0.5, 4: 0.4, 8: 0.0, 20: 0.0}),
    ("cosine", 10, 2, 0.2, {0: 0.4, 1: 0.8, 2: 0.8, 6: 0.5, 10: 0.2}),
    ("inverse_sqrt", 100, 0, 0.0, {0: 0.8, 3: 0.4, 15: 0.2}),
    ("inverse_sqrt", 100, 4, 0.0, {0: 0.2, 3: 0.8, 4: 0.8 * (4 / 5) ** 0.5, 15: 0.4, 63: 0.2}),
    ("inverse_sqrt", 100, 4, 0.2, {0: 0.2, 3: 0.8, 15: 0.5}),
]


@pytest.mark.parametrize(("name", "num_steps", "warmup", "end_lr", "rates"), BY_HAND)
def test_schedules_by_hand(name, num_steps, warmup, end_lr, rates):
    schedule = optimizers.make_schedule(name, 0.8, num_steps, warmup, end_lr)
    for step, rate in rates.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-6, atol=1e-7)


def test_inverse_sqrt_is_the_schedule_of_the_paper():
    d_model, warmup = 512, 4000
    schedule = optimizers.make_schedule("inverse_sqrt", (d_model * warmup) ** -0.5, 10**5, warmup)
    for n in (1, 100, 4000, 4001, 100_000):
        paper = d_model**-0.5 * min(n**-0.5, n * warmup**-1.5)
        np.testing.assert_allclose(schedule(n - 1), paper, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.DECAYS)
def test_without_warmup_the_first_step_has_exactly_the_peak_lr(name):
    assert float(optimizers.make_schedule(name, 0.1, 1)(0)) == np.float32(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosin", 1.0, 10), "unknown schedule 'cosin'; did you mean cosine?"),
        (("linear", 1.0, 0), "num_steps is 0"),
        (("linear", 1.0, 10, 10), "warmup_steps is 10; it must be from 0 to 9"),
        (("linear", 1.0, 10, -1), "warmup_steps is -1; it must be from 0 to 9"),
        (("linear", 1.0, 10, 0, 2.0), "end_lr is 2.0; it must be from 0 to peak_lr = 1.0"),
    ],
)
def test_errors_of_schedules(arguments, message):
    with pytest.raises(ValueError) as error:
        optimizers.make_schedule(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


DECAYS = {
    "token_embed/embedding": True,
    "position_embed/embedding": True,
    "segment_embed/embedding": True,
    "embed_norm/scale": False,
    "embed_norm/bias": False,
    "encoder/layer_0/self_attention/query/kernel": True,
    "encoder/layer_0/self_attention/query/bias": False,  # [N, H]: two dimensions, but no decay
    "encoder/layer_0/self_attention/out/kernel": True,
    "encoder/layer_0/self_attention/out/bias": False,
    "encoder/layer_0/attention_norm/scale": False,
    "encoder/layer_0/attention_norm/bias": False,
    "encoder/layer_0/mlp/wi/kernel": True,
    "encoder/layer_0/mlp/wi/bias": False,
    "pooler/kernel": True,
    "mlm_head/norm/scale": False,
    "mlm_head/bias": False,
    "nsp_head/kernel": True,
    "classifier/kernel": True,
    "classifier/bias": False,
}


def ones() -> dict:
    return tree.unflatten_paths({path: jnp.ones((2, 3)) for path in DECAYS})


def test_decay_mask_leaf_by_leaf():
    assert tree.flatten_paths(optimizers.decay_mask(ones())) == dict(sorted(DECAYS.items()))


def test_of_peft_params_only_the_kernels_of_adapters_decay():
    layer = "decoder/layer_0/"
    paths = ["prompt", "token_embed/extra", layer + "mlp_adapter/down/bias",
             layer + "mlp_adapter/down/kernel", layer + "mlp/wo/ia3_input",
             layer + "self_attention/prefix_key",
             *(layer + f"self_attention/query/lora_{x}" for x in ("a", "b", "magnitude"))]
    mask = tree.flatten_paths(optimizers.decay_mask(tree.unflatten_paths(dict.fromkeys(paths, 0))))
    assert [path for path, decays in mask.items() if decays] == [layer + "mlp_adapter/down/kernel"]


def test_decay_mask_of_stacked_layers():
    stacked = tree.flatten_paths(optimizers.decay_mask(tree.stack_layers(ones())))
    assert stacked["encoder/layers/mlp/wi/kernel"]
    assert not stacked["encoder/layers/mlp/wi/bias"]
    assert not stacked["encoder/layers/attention_norm/scale"]


def test_only_kernels_and_embeddings_decay_in_an_update():
    optimizer = optimizers.make_optimizer(0.1, weight_decay=0.5)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, ones()), optimizer.init(ones()), ones()
    )
    for path, update in tree.flatten_paths(updates).items():
        np.testing.assert_allclose(update, -0.1 * 0.5 if DECAYS[path] else 0.0)


def test_frozen_parameters_have_no_state_and_no_update():
    mask = tree.map_paths(lambda path, leaf: "classifier" in path, ones())
    trainable, _ = tree.partition(ones(), mask)
    optimizer = optimizers.make_optimizer(0.1)
    state = optimizer.init(trainable)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * tree.count(trainable)
    updates, _ = optimizer.update(trainable, state, trainable)
    assert set(tree.flatten_paths(updates)) == {"classifier/kernel", "classifier/bias"}


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 1e6, np.nan])
def test_clipping_equals_that_of_optax(scale):
    gradient = {"a": jnp.arange(6.0).reshape(2, 3) * scale, "b": jnp.asarray([-2.0]) * scale}
    clip, optax_clip = transforms.clip_by_global_norm(3.0), optax.clip_by_global_norm(3.0)
    assert clip.init(gradient) == optax_clip.init(gradient)  # the checkpoint format
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 *(fn.update(gradient, fn.init(gradient))[0] for fn in (clip, optax_clip)))


def test_clipping_by_the_global_norm():
    gradient = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"bias": jnp.array([4.0])}}  # norm 5

    def first_moment(clip_norm):
        optimizer = optimizers.make_optimizer(0.1, b1=0.0, clip_norm=clip_norm)
        state = optimizer.update(gradient, optimizer.init(gradient), gradient)[1]
        return optax.tree.norm(optax.tree.get(state, "mu"))

    np.testing.assert_allclose(first_moment(1.0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(first_moment(10.0), 5.0, rtol=1e-6)
    np.testing.assert_allclose(first_moment(None), 5.0, rtol=1e-6)
