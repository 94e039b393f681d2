"""Layer-wise learning rates, gradual unfreezing, L2-SP and EMA, checked by hand calculations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax import sharding, tree
from transformer_jax.train import checkpointing, optimizers, step, transforms

W = {"kernel": jnp.ones((2, 2))}


def params() -> dict:
    """The structure of a BERT with three layers, with one matrix for each kind of module."""
    return jax.tree.map(lambda x: 1.0 * x, {
        "token_embed": {"embedding": jnp.ones((2, 2))},
        "encoder": {f"layer_{i}": {"mlp": {"wi": W}} for i in range(3)},
        "pooler": W,
        "classifier": W,
    })


def make_optimizer(schedule, *, weight_decay=0.01, eps=1e-6, clip_norm=1.0, **options):
    """An optimizer with these `FinetuningOptions`."""
    return optimizers.make_optimizer(
        schedule, weight_decay=weight_decay, eps=eps, clip_norm=clip_norm,
        finetuning=optimizers.FinetuningOptions(**options))


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
    depth, layers = transforms.layer_depths(params())
    assert layers == 3
    assert depth == {"token_embed/embedding": 0, layer(0): 1, layer(1): 2, layer(2): 3,
                     "pooler/kernel": 4, "classifier/kernel": 4}


def test_depths_of_an_encoder_decoder():
    depth, layers = transforms.layer_depths(seq2seq())
    assert layers == 4
    assert depth["encoder/layer_1/mlp/wi/kernel"] == depth["encoder/final_norm/scale"] == 2
    assert depth["decoder/layer_0/mlp/wi/kernel"] == 3
    assert depth["decoder/final_norm/scale"] == depth["classifier/kernel"] == 5


def test_peft_params_have_the_depth_of_their_layer():
    peft_params = {"prompt": 0, "encoder": {"layer_2": {
        "mlp_adapter": {"down": {"kernel": 0}}, "self_attention": {"query": {"lora_a": 0}}}}}
    depth, layers = transforms.layer_depths(peft_params)
    assert (depth.pop("prompt"), layers) == (0, 3)
    assert set(depth.values()) == {3}


def test_embeddings_of_added_tokens_are_trained_from_the_first_step_on():
    with_tokens = params() | {"token_embed": {"embedding": jnp.ones((2, 2)),
                                              "extra": jnp.ones((3, 2))}}
    depth, layers = transforms.layer_depths(with_tokens)
    assert depth["token_embed/extra"] == layers + 1 and depth["token_embed/embedding"] == 0
    steps = tree.flatten_paths(transforms.unfreeze_steps(with_tokens, 5))
    assert steps["token_embed/extra"] == 0 < steps["token_embed/embedding"]


def test_frozen_layers_are_counted():
    """Freezing a layer does not change the depth of the layers below it."""
    some = tree.partition(params(), tree.map_paths(
        lambda path, x: "layer_0" in path or "classifier" in path, params()))[0]
    assert transforms.layer_depths(some) == ({layer(0): 1, "classifier/kernel": 4}, 3)
    multipliers = tree.flatten_paths(transforms.layerwise_lr_multipliers(some, 0.5, 1.0))
    assert multipliers == {layer(0): 1 / 8, "classifier/kernel": 1.0}


def test_the_final_norm_of_an_encoder_only_model_is_above_its_layers():
    depth, _ = transforms.layer_depths({"encoder": {"layer_0": W, "final_norm": {"scale": 0}}})
    assert depth == {"encoder/layer_0/kernel": 1, "encoder/final_norm/scale": 2}


def test_stacked_layers_are_an_error():
    with pytest.raises(ValueError, match=r"encoder/layers/mlp/wi/kernel.*unstack_layers"):
        transforms.layer_depths(tree.stack_layers(params()))


def test_unfreeze_steps():
    assert tree.flatten_paths(transforms.unfreeze_steps(params(), 5)) == {
        "classifier/kernel": 0, "pooler/kernel": 0, layer(2): 5, layer(1): 10, layer(0): 15,
        "token_embed/embedding": 20}
    # Some parameters are trained from the first step on, and frozen layers are skipped.
    some = tree.partition(params(), tree.map_paths(
        lambda path, x: "layer_0" in path or "layer_2" in path, params()))[0]
    assert tree.flatten_paths(transforms.unfreeze_steps(some, 5)) == {layer(2): 0, layer(0): 5}


def test_multipliers_by_layer_and_of_the_head():
    multipliers = tree.flatten_paths(transforms.layerwise_lr_multipliers(params(), 0.5, 10.0))
    assert multipliers == {
        "token_embed/embedding": 1 / 16, layer(0): 1 / 8, layer(1): 1 / 4, layer(2): 1 / 2,
        "pooler/kernel": 1.0, "classifier/kernel": 10.0}
    other = tree.flatten_paths(transforms.layerwise_lr_multipliers(
        params(), None, 10.0, head_pattern="^pooler/"))
    assert {path for path, r in other.items() if r == 10.0} == {"pooler/kernel"}


def one_step(optimizer, start, grads, steps: int = 1) -> dict:
    state = optimizer.init(start)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, start)
        start = optax.apply_updates(start, updates)
    return tree.flatten_paths(start)


def test_layerwise_rates_scale_the_step():
    """Adam's first step has the size of the learning rate, for any gradient."""
    optimizer = make_optimizer(0.1, weight_decay=0.0, clip_norm=None, layer_decay=0.5,
                               head_lr_multiplier=3.0, eps=1e-12)
    moved = one_step(optimizer, params(), params())
    for path, rate in {layer(2): 0.05, layer(0): 0.0125, "classifier/kernel": 0.3}.items():
        np.testing.assert_allclose(1 - moved[path], rate, rtol=1e-5)


def test_gradual_unfreezing_is_one_program_and_starts_each_group_with_new_moments():
    optimizer = make_optimizer(0.1, weight_decay=0.5, clip_norm=1.0, unfreeze_every=3,
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
    unfrozen = {"classifier/kernel": 0, "pooler/kernel": 0, layer(2): 3, layer(1): 6, layer(0): 9,
                "token_embed/embedding": 12}
    for path, at in unfrozen.items():
        for n in range(at + 1):  # no update at all, and no weight decay
            np.testing.assert_array_equal(history[n][path], history[0][path])
        # Adam's first step (the learning rate) and weight decay. With a count that includes the
        # frozen steps it would be 3.2 times as large.
        np.testing.assert_allclose(history[at][path] - history[at + 1][path], 0.1 * 1.5, rtol=1e-4)


def test_frozen_gradients_are_not_in_the_clipped_norm():
    """A norm over all leaves would scale the gradients down further."""
    optimizer = transforms.gradual_unfreezing(optax.identity(), 1, clip_norm=1.0)
    start = params()
    huge = tree.map_paths(lambda path, x: x * (1.0 if "classifier" in path or "pooler" in path
                                               else 1e6), start)
    updates, _ = optimizer.update(huge, optimizer.init(start), start)
    found = tree.flatten_paths(updates)
    np.testing.assert_allclose(found["classifier/kernel"], 1 / np.sqrt(8), rtol=1e-6)
    assert not np.any(found[layer(2)])


def test_moments_are_kept_when_more_layers_are_unfrozen():
    p, grads = params(), jax.tree.map(jnp.ones_like, params())
    optimizer = make_optimizer(1e-3, clip_norm=None, unfreeze_every=2)
    state, moments = optimizer.init(p), []
    for _ in range(4):
        _, state = optimizer.update(grads, state, p)
        mu = {path: float(x.ravel()[0]) for path, x in tree.flatten_paths(state).items()
              if "/mu/" in path and path.endswith(("classifier/kernel", layer(2)))}
        moments.append([mu[path] for path in sorted(mu, key=lambda q: "classifier" not in q)])
    head = [1 - 0.9**n for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, list(zip(head, [0, 0, 0.1, 0.19])), rtol=1e-5)


def counts(state) -> dict:
    """Adam's count of each group: how many gradients its moments contain."""
    return {path.split("frozen_until_")[1].split("/")[0]: int(x)
            for path, x in tree.flatten_paths(state).items() if path.endswith("/inner/0/count")}


def test_bias_correction_starts_when_a_layer_is_unfrozen_and_the_schedule_does_not():
    p, grads = params(), jax.tree.map(jnp.ones_like, params())
    optimizer = make_optimizer(lambda n: 0.1 * (n + 1), weight_decay=0.0, clip_norm=None,
                               unfreeze_every=2, eps=1e-12)
    state = optimizer.init(p)
    for _ in range(3):
        updates, state = optimizer.update(grads, state, p)
    assert counts(state) == {"0": 3, "2": 1, "4": 0, "6": 0, "8": 0}
    found = tree.flatten_paths(updates)  # the third update has the learning rate 0.3 for all
    np.testing.assert_allclose(found["classifier/kernel"], -0.3, rtol=1e-5)
    np.testing.assert_allclose(found[layer(2)], -0.3, rtol=1e-5)
    assert not np.any(found[layer(1)])


def test_l2_sp_decays_toward_the_start_and_new_parameters_toward_zero():
    optimizer = make_optimizer(1.0, weight_decay=0.25, l2_sp=0.5, clip_norm=None)
    start = {
        "encoder": {"layer_0": {"mlp": {"wi": {"kernel": 3.0, "bias": 3.0, "lora_a": 3.0},
                                        "wo": {"ia3_input": 3.0}},
                                "mlp_adapter": {"up": {"kernel": 3.0, "bias": 3.0}}}},
        "pooler": {"kernel": 3.0},
        "classifier": {"kernel": 3.0, "bias": 3.0},
        "prompt": None,
    }
    start = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(start)
    moved = jax.tree.map(lambda x: x + 2.0, start)
    zero = jax.tree.map(jnp.zeros_like, start)
    found = {path.rpartition("layer_0/")[2]: -float(u) for path, u in
             tree.flatten_paths(optimizer.update(zero, state, moved)[0]).items()}
    assert found == {
        "mlp/wi/kernel": 1.0, "mlp/wi/bias": 1.0, "pooler/kernel": 1.0,  # 0.5 (5 - 3)
        "mlp_adapter/up/kernel": 1.25, "classifier/kernel": 1.25,  # 0.25 * 5
        "mlp/wi/lora_a": 0.0, "mlp/wo/ia3_input": 0.0,  # parameters that never decay
        "mlp_adapter/up/bias": 0.0, "classifier/bias": 0.0}


def test_new_parameters_of_l2_sp():
    def decay_update(start, **options):
        optimizer = make_optimizer(1.0, weight_decay=0.25, l2_sp=0.5, clip_norm=None, **options)
        zero = jax.tree.map(jnp.zeros_like, start)
        return tree.flatten_paths(optimizer.update(zero, optimizer.init(start), start)[0])

    both = {**seq2seq(), "pooler": W}  # encoder-decoder checkpoints have no pooler
    np.testing.assert_array_equal(decay_update(both)["pooler/kernel"], -0.25)
    np.testing.assert_array_equal(decay_update(params())["pooler/kernel"], 0.0)
    named = decay_update(params(), new_pattern="layer_1/")
    np.testing.assert_array_equal(named[layer(1)], -0.25)
    np.testing.assert_array_equal(named["classifier/kernel"], 0.0)


def test_the_average_by_hand_and_with_frozen_parameters():
    optimizer = make_optimizer(1.0, weight_decay=0.0, clip_norm=None, ema=0.75, eps=1e-12)
    start = {"a": {"kernel": jnp.zeros(())}, "b": None}
    state = optimizer.init(start)
    for expected in (-0.25, -0.6875):  # the parameters are 0, -1, -2
        updates, state = optimizer.update({"a": {"kernel": jnp.ones(())}, "b": None}, state, start)
        start = optax.apply_updates(start, updates)
        average = transforms.get_ema_params(state)
        np.testing.assert_allclose(average["a"]["kernel"], expected, rtol=1e-5)
        assert average["b"] is None
    assert transforms.get_ema_params(optax.adam(1.0).init(start)) is None


ALL = {"layer_decay": 0.8, "head_lr_multiplier": 2.0, "unfreeze_every": 2, "l2_sp": 0.1, "ema": 0.9}


def product_loss(p, batch, rng):
    total = sum((x * batch["x"].mean(0)).sum() ** 2 for x in jax.tree.leaves(p))
    return total * batch["x"].shape[0], jnp.asarray(batch["x"].shape[0]), {}


MASK = tree.map_paths(lambda path, x: "token" not in path and layer(0) != path, params())
BATCH = {"x": np.full((8, 2, 2), 0.1, np.float32)}


def test_the_optimizer_state_resumes_bit_for_bit(tmp_path):
    optimizer = make_optimizer(1e-2, **ALL)
    train_step = jax.jit(step.make_train_step(product_loss, optimizer, MASK))
    state = step.init_state(params(), optimizer, MASK)
    for n in range(5):
        if n == 3:
            checkpointing.save(tmp_path, 3, state, rng=None, data_state={}, metadata=None)
        state, _ = train_step(state, BATCH, None)
    resumed = checkpointing.restore(tmp_path, step.init_state(params(), optimizer, MASK)).state
    for _ in range(2):
        resumed, _ = train_step(resumed, BATCH, None)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert counts(state) == {"0": 5, "2": 3, "4": 1}
    average = tree.flatten_paths(transforms.get_ema_params(state.opt_state))
    assert set(average) == {path for path, x in tree.flatten_paths(MASK).items() if x}


def test_the_average_of_frozen_parameters_is_unchanged_bit_for_bit():
    start = jax.tree.map(lambda x: x / 3, params())
    optimizer = make_optimizer(1e-2, ema=0.9, unfreeze_every=50)
    state = optimizer.init(start)
    for _ in range(3):
        _, state = optimizer.update(start, state, start)
    average = tree.flatten_paths(transforms.get_ema_params(state))
    np.testing.assert_array_equal(average[layer(1)], start["encoder"]["layer_1"]["mlp"]["wi"][
        "kernel"])
    assert not np.array_equal(average["classifier/kernel"], start["classifier"]["kernel"])


def test_many_devices_equal_one():
    """Sharded over a mesh, and under `pmap` with a copy of the state on each device."""
    optimizer = make_optimizer(1e-2, **ALL)
    state = step.init_state(params(), optimizer, MASK)
    single = jax.jit(step.make_train_step(product_loss, optimizer, MASK))
    mesh = sharding.make_mesh(data=2, fsdp=4)
    sharded = jax.device_put(state, sharding.param_shardings(state, mesh))
    mapped = jax.pmap(step.make_train_step(product_loss, optimizer, MASK, axis_name="devices"),
                      axis_name="devices", in_axes=(None, 0, None), out_axes=None)
    rows = {"x": BATCH["x"].reshape(8, 1, 2, 2)}
    copies = state
    with jax.set_mesh(mesh):
        for _ in range(4):
            sharded, _ = single(sharded, sharding.shard_batch(BATCH, mesh), None)
    for _ in range(4):
        state, _ = single(state, BATCH, None)
        copies, _ = mapped(copies, rows, None)
    for a, b, c in zip(*map(jax.tree.leaves, (state, sharded, copies)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "value"), [
    ("layer_decay", 0.0), ("layer_decay", 1.1), ("head_lr_multiplier", -1.0), ("l2_sp", 0.0),
    ("ema", 1.0), ("unfreeze_every", 0),
])
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_optimizer(1e-3, **{name: value})


def test_without_these_options_the_optimizer_is_that_of_optax():
    """Bit for bit, and with the same state structure, which is part of the checkpoint format."""
    optimizer = make_optimizer(1e-2, weight_decay=0.1)
    expected = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
        1e-2, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=optimizers.decay_mask))
    p = params()
    states = [optimizer.init(p), expected.init(p)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(3):
        found = [o.update(p, s, p) for o, s in zip((optimizer, expected), states)]
        states = [s for _, s in found]
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_array_equal(a, b)
