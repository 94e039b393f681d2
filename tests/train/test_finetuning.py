"""Rates by depth, release from the top down, the pull to the start and the average: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax import tree
from transformer_jax.train import checkpoint, finetuning, optim, step

W = {"kernel": jnp.ones((2, 2))}


def params() -> dict:
    """A BERT of three layers, one number standing for each kind of place."""
    return jax.tree.map(lambda x: 1.0 * x, {
        "token_embed": {"embedding": jnp.ones((2, 2))},
        "encoder": {f"layer_{i}": {"mlp": {"wi": W}} for i in range(3)},
        "pooler": W,
        "classifier": W,
    })


def seq2seq() -> dict:
    return {
        "token_embed": {"embedding": jnp.ones((2, 2))},
        "encoder": {"layer_0": {"mlp": {"wi": W}}, "layer_1": {"mlp": {"wi": W}},
                    "final_norm": {"scale": jnp.ones(2)}},
        "decoder": {"layer_0": {"mlp": {"wi": W}}, "layer_1": {"mlp": {"wi": W}},
                    "final_norm": {"scale": jnp.ones(2)}},
        "classifier": W,
    }


def layer(i: int) -> str:
    return f"encoder/layer_{i}/mlp/wi/kernel"


def test_depths_of_an_encoder():
    depth, layers = finetuning.depths(params())
    assert layers == 3
    assert depth == {"token_embed/embedding": 0, layer(0): 1, layer(1): 2, layer(2): 3,
                     "pooler/kernel": 4, "classifier/kernel": 4}


def test_depths_of_an_encoder_decoder_count_on():
    depth, layers = finetuning.depths(seq2seq())
    assert layers == 4
    assert depth["encoder/layer_1/mlp/wi/kernel"] == depth["encoder/final_norm/scale"] == 2
    assert depth["decoder/layer_0/mlp/wi/kernel"] == 3
    assert depth["decoder/final_norm/scale"] == depth["classifier/kernel"] == 5


def test_deltas_have_the_depth_of_their_layer():
    deltas = {"prompt": 0, "encoder": {"layer_2": {
        "mlp_adapter": {"down": {"kernel": 0}}, "self_attention": {"query": {"lora_a": 0}}}}}
    depth, layers = finetuning.depths(deltas)
    assert (depth.pop("prompt"), layers) == (0, 3)
    assert set(depth.values()) == {3}


def test_rates_by_layer_and_of_the_head():
    rate = tree.flatten_paths(finetuning.rates(params(), 0.5, 10.0))
    assert rate == {"token_embed/embedding": 1 / 16, layer(0): 1 / 8, layer(1): 1 / 4,
                    layer(2): 1 / 2, "pooler/kernel": 1.0, "classifier/kernel": 10.0}


def one_step(optimizer, start, grads, steps: int = 1) -> dict:
    state = optimizer.init(start)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, start)
        start = optax.apply_updates(start, updates)
    return tree.flatten_paths(start)


def test_discriminative_rates_scale_the_step():
    """Adam's first step is the rate, whatever the gradient."""
    optimizer = optim.make_optimizer(0.1, weight_decay=0.0, clip_norm=None, layer_decay=0.5,
                                     head_rate=3.0, eps=1e-12)
    moved = one_step(optimizer, params(), params())
    for path, rate in {layer(2): 0.05, layer(0): 0.0125, "classifier/kernel": 0.3}.items():
        np.testing.assert_allclose(1 - moved[path], rate, rtol=1e-5)


def test_gradual_unfreezing_is_one_program_and_begins_each_group_afresh():
    optimizer = optim.make_optimizer(0.1, weight_decay=0.5, clip_norm=1.0, unfreeze_every=3,
                                     eps=1e-12)
    traces = []

    @jax.jit
    def update(p, state, grads):
        traces.append(1)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    start = params()
    p, state = start, optimizer.init(start)
    history = [tree.flatten_paths(p)]
    for _ in range(14):
        p, state = update(p, state, jax.tree.map(lambda x: 5.0 * jnp.ones_like(x), start))
        history.append(tree.flatten_paths(p))
    assert len(traces) == 1
    released = {"classifier/kernel": 0, "pooler/kernel": 0, layer(2): 3, layer(1): 6, layer(0): 9,
                "token_embed/embedding": 12}
    for path, at in released.items():
        for n in range(at + 1):  # bit for bit, weight decay too
            np.testing.assert_array_equal(history[n][path], history[0][path])
        # A first Adam step: the rate, and decay; not 3.2 times it, as with a count that ran on.
        np.testing.assert_allclose(history[at][path] - history[at + 1][path], 0.1 * 1.5, rtol=1e-4)


def test_what_is_not_released_is_out_of_the_norm():
    """Momentum would show a gradient that was scaled by a norm over all leaves."""
    optimizer = finetuning.by_release(optax.identity(), 1, clip_norm=1.0)
    start = params()
    huge = tree.map_paths(lambda path, x: x * (1.0 if "classifier" in path or "pooler" in path
                                               else 1e6), start)
    updates, _ = optimizer.update(huge, optimizer.init(start), start)
    found = tree.flatten_paths(updates)
    np.testing.assert_allclose(found["classifier/kernel"], 1 / np.sqrt(8), rtol=1e-6)
    assert not np.any(found[layer(2)])


def test_moments_are_kept_when_more_is_released():
    p, grads = params(), jax.tree.map(jnp.ones_like, params())
    optimizer = optim.make_optimizer(1e-3, clip_norm=None, unfreeze_every=2)
    state, moments = optimizer.init(p), []
    for _ in range(4):
        _, state = optimizer.update(grads, state, p)
        mu = {path: float(x.ravel()[0]) for path, x in tree.flatten_paths(state).items()
              if "/mu/" in path and path.endswith(("classifier/kernel", layer(2)))}
        moments.append([mu[path] for path in sorted(mu, key=lambda q: "classifier" not in q)])
    head = [1 - 0.9**n for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, list(zip(head, [0, 0, 0.1, 0.19])), rtol=1e-5)


def test_decay_to_the_start_pulls_back_and_new_parameters_to_zero():
    optimizer = finetuning.decay_to_start(0.5, 0.25)
    start = params()
    state = optimizer.init(start)
    moved = jax.tree.map(lambda x: x + 2.0, start)
    zero = jax.tree.map(jnp.zeros_like, start)
    found = tree.flatten_paths(optimizer.update(zero, state, moved)[0])
    np.testing.assert_allclose(found[layer(0)], 0.5 * 2)
    np.testing.assert_allclose(found["classifier/kernel"], 0.25 * 3)


def test_the_average_by_hand_and_with_gaps():
    optimizer = optim.make_optimizer(1.0, weight_decay=0.0, clip_norm=None, ema=0.75, eps=1e-12)
    start = {"a": {"kernel": jnp.zeros(())}, "b": None}
    state = optimizer.init(start)
    for expected in (-0.25, -0.6875):  # parameters go 0, -1, -2
        updates, state = optimizer.update({"a": {"kernel": jnp.ones(())}, "b": None}, state, start)
        start = optax.apply_updates(start, updates)
        average = finetuning.ema_params(state)
        np.testing.assert_allclose(average["a"]["kernel"], expected, rtol=1e-5)
        assert average["b"] is None
    assert finetuning.ema_params(optax.adam(1.0).init(start)) is None


ALL = {"layer_decay": 0.8, "head_rate": 2.0, "unfreeze_every": 2, "l2_sp": 0.1, "ema": 0.9}


def test_resumed_bit_for_bit(tmp_path):
    mask = tree.map_paths(lambda path, x: "token" not in path, params())
    optimizer = optim.make_optimizer(1e-2, **ALL)

    def loss(p, batch, rng):
        total = sum((x * batch["x"]).sum() ** 2 for x in jax.tree.leaves(p))
        return total, jnp.ones(()), {}

    train_step = jax.jit(step.make_train_step(loss, optimizer, mask))
    batch = {"x": jnp.full((2, 2), 0.1)}
    state = step.init_state(params(), optimizer, mask)
    for n in range(5):
        if n == 3:
            checkpoint.save(tmp_path, 3, state, rng=None, data_state={}, metadata=None)
        state, _ = train_step(state, batch, None)
    again = checkpoint.restore(tmp_path, step.init_state(params(), optimizer, mask)).state
    for _ in range(2):
        again, _ = train_step(again, batch, None)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "value"), [
    ("layer_decay", 0.0), ("layer_decay", 1.1), ("head_rate", -1.0), ("l2_sp", 0.0), ("ema", 1.5),
    ("unfreeze_every", 0),
])
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        optim.make_optimizer(1e-3, **{name: value})


def test_without_them_the_optimizer_is_what_it_was():
    plain, full = (optim.make_optimizer(1e-2), optim.make_optimizer(1e-2, head_rate=1.0))
    assert jax.tree.structure(plain.init(params())) == jax.tree.structure(full.init(params()))
