"""A train step in microbatches, sharded and mapped; frozen parameters; evaluation; compilation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import PartitionSpec as P
from test_loop import train

from transformer_jax import sharding, tree
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.train import optimizers, step

STEPS = 5


def optimizer() -> optax.GradientTransformation:
    schedule = optimizers.make_schedule("cosine", 0.01, 20, 2)
    return optimizers.make_optimizer(schedule, weight_decay=0.1)


def run(step_fn, state, batch, rng=None, steps: int = STEPS):
    for _ in range(steps):
        state, metrics = step_fn(state, batch, rng)
    return state, metrics


def assert_close(found, expected) -> None:
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)

    jax.tree.map(close, found, expected)


@pytest.fixture(scope="module")
def single():
    """State and metrics after a few steps on one device, in one batch."""
    train_step = step.make_train_step(toy.loss, optimizer())
    return run(jax.jit(train_step), step.init_state(toy.parameters(), optimizer()), toy.batch())


def test_the_loss_is_the_sum_of_the_means_of_its_terms():
    state = step.init_state(toy.parameters(), optimizer())
    _, metrics = jax.jit(step.make_train_step(toy.loss, optimizer()))(state, toy.batch(), None)
    errors = np.asarray(toy.predict(toy.parameters(), toy.batch()["x"]) - toy.batch()["y"]) ** 2
    first = np.average(errors[:, 0], weights=toy.batch()["first_weights"])
    second = np.average(errors[:, 1], weights=toy.batch()["second_weights"])
    expected = {
        "loss": first + second,
        "first_loss": first,
        "second_loss": second,
        "error": errors.mean(),
    }
    assert set(metrics) == {*expected, "grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_a_single_term_is_reported_once():
    state = step.init_state(toy.parameters(), optimizer())
    for accumulate in (1, 2):
        train_step = step.make_train_step(toy.one_term, optimizer(), accumulate=accumulate)
        _, metrics = jax.eval_shape(train_step, state, toy.batch(), None)
        assert set(metrics) == {"loss", "error", "grad_norm"}


@pytest.mark.parametrize("accumulate", [4, 32])
def test_microbatches_equal_one_batch(single, accumulate):
    train_step = step.make_train_step(toy.loss, optimizer(), accumulate=accumulate)
    state = step.init_state(toy.parameters(), optimizer())
    assert_close(run(jax.jit(train_step), state, toy.batch()), single)


@pytest.mark.parametrize(
    ("data", "fsdp", "accumulate"), [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 4, 4)]
)
def test_a_sharded_step_equals_one_device(single, data, fsdp, accumulate):
    mesh = sharding.make_mesh(data, fsdp)
    train_step = step.make_train_step(toy.loss, optimizer(), accumulate=accumulate)
    state = step.init_state(toy.parameters(), optimizer())
    state = jax.device_put(state, sharding.param_shardings(state, mesh))
    with jax.set_mesh(mesh):
        found = run(jax.jit(train_step), state, sharding.shard_batch(toy.batch(), mesh))
    assert_close(found, single)
    kernel = found[0].params["encoder"]["layer_0"]["mlp"]["wi"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // fsdp, 16)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_equals_one_device(single, accumulate):
    train_step = step.make_train_step(
        toy.loss, optimizer(), accumulate=accumulate, axis_name="devices"
    )
    mapped = jax.pmap(train_step, axis_name="devices", in_axes=(0, 0, None))
    state = step.init_state(toy.parameters(), optimizer())
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    rows = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), toy.batch())
    found = run(mapped, copies, rows)
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, device=device: x[device], found), single)


@pytest.mark.parametrize(("accumulate", "check_vma"), [(1, True), (2, True), (1, False)])
def test_shard_map_equals_one_device(single, accumulate, check_vma):
    train_step = step.make_train_step(
        toy.loss, optimizer(), accumulate=accumulate, axis_name="data"
    )
    mapped = jax.shard_map(
        train_step,
        mesh=sharding.make_mesh(8),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    state = step.init_state(toy.parameters(), optimizer())
    assert_close(run(jax.jit(mapped), state, toy.batch()), single)


def test_a_term_of_weight_zero_has_loss_zero():
    batch = toy.batch() | {"second_weights": np.zeros(toy.ROWS, np.float32)}
    state = step.init_state(toy.parameters(), optimizer())
    for accumulate in (1, 4):
        train_step = step.make_train_step(toy.loss, optimizer(), accumulate=accumulate)
        found, metrics = jax.jit(train_step)(state, batch, None)
        assert metrics["second_loss"] == 0
        np.testing.assert_allclose(metrics["loss"], metrics["first_loss"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_padding_rows_do_not_change_the_result(single):
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), toy.batch())
    train_step = step.make_train_step(toy.loss, optimizer(), accumulate=2)
    state = step.init_state(toy.parameters(), optimizer())
    found, metrics = run(jax.jit(train_step), state, padded)
    assert_close(found, single[0])
    np.testing.assert_allclose(metrics["loss"], single[1]["loss"], rtol=1e-5)


def test_randomness_depends_on_the_step_and_the_microbatch():
    def noise(params, batch, rng):
        draw = jax.random.uniform(rng)
        return params["a"] * draw, batch["x"].sum(), {"draw": (draw, 1.0)}

    def draws(rng, accumulate):
        train_step = jax.jit(step.make_train_step(noise, optax.sgd(0.0), accumulate=accumulate))
        state = step.init_state({"a": jnp.ones(())}, optax.sgd(0.0))
        found = []
        for _ in range(2):
            state, metrics = train_step(state, {"x": np.ones(4, np.float32)}, rng)
            found.append(float(metrics["draw"]))
        return found

    rng = jax.random.key(0)
    first, second = draws(rng, 1)
    assert first == float(jax.random.uniform(jax.random.fold_in(rng, 0)))
    assert second == float(jax.random.uniform(jax.random.fold_in(rng, 1)))
    keys = [jax.random.fold_in(jax.random.fold_in(rng, 0), i) for i in range(2)]
    expected = np.mean([float(jax.random.uniform(key)) for key in keys])
    np.testing.assert_allclose(draws(rng, 2)[0], expected, rtol=1e-6)


def test_randomness_depends_on_the_device():
    def noise(params, batch, rng):
        draw = jax.random.uniform(rng)
        return params["a"] * draw, batch["x"].sum(), {"first": (draw * batch["x"].sum(), 1.0)}

    train_step = step.make_train_step(noise, optax.sgd(0.0), axis_name="d")
    mapped = jax.pmap(train_step, axis_name="d", in_axes=(None, 0, None), out_axes=None)
    state = step.init_state({"a": jnp.ones(())}, optax.sgd(0.0))
    rows = [np.eye(8, dtype=np.float32)[:, i : i + 1] for i in range(2)]
    draws = [float(mapped(state, {"x": x}, jax.random.key(0))[1]["first"]) for x in rows]
    assert draws[0] != draws[1]


def test_dropout_rng_changes_the_loss():
    state = step.init_state(toy.parameters(), optimizer())
    train_step = jax.jit(step.make_train_step(toy.loss, optimizer()))
    losses = {
        float(train_step(state, toy.batch(), rng)[1]["loss"])
        for rng in (None, jax.random.key(0), jax.random.key(1))
    }
    assert len(losses) == 3


def test_rows_that_do_not_divide_are_an_error():
    train_step = step.make_train_step(toy.loss, optimizer(), accumulate=5)
    with pytest.raises(ValueError, match="has 32 rows, not a multiple of accumulate = 5"):
        train_step(step.init_state(toy.parameters(), optimizer()), toy.batch(), None)
    with pytest.raises(ValueError, match="accumulate is 0; it must be at least 1"):
        step.make_train_step(toy.loss, optimizer(), accumulate=0)


def test_a_mask_that_selects_nothing_is_an_error():
    nothing = jax.tree.map(lambda _: False, toy.parameters())
    with pytest.raises(ValueError, match="selects no parameter"):
        step.make_train_step(toy.loss, optimizer(), trainable=nothing)


def test_the_callers_parameters_survive_donation():
    params = toy.parameters()
    state = step.init_state(params, optimizer())
    jax.jit(step.make_train_step(toy.loss, optimizer()), donate_argnums=0)(state, toy.batch(), None)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


# Frozen parameters: values, memory, compute ------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "accumulate"), [("head", 1), ("head", 4), ("last_k:1", 1), ("bitfit", 1)]
)
def test_frozen_parameters_are_unchanged_bit_for_bit(spec, accumulate):
    params = toy.parameters(layers=2)
    mask = trainable_mask(params, spec)
    train_step = step.make_train_step(toy.loss, optimizer(), mask, accumulate=accumulate)
    state, _ = run(
        jax.jit(train_step, donate_argnums=0),
        step.init_state(params, optimizer(), mask),
        toy.batch(),
    )
    before, after = tree.flatten_paths(params), tree.flatten_paths(state.params)
    for path, is_trainable in tree.flatten_paths(mask).items():
        is_equal = np.array_equal(before[path], after[path])
        assert is_equal != is_trainable, path


def test_only_trainable_parameters_have_optimizer_state():
    params = toy.parameters()
    mask = trainable_mask(params, "head")
    state = step.init_state(params, optimizer(), mask)
    arrays = {p: x for p, x in tree.flatten_paths(state.opt_state).items() if x.ndim}
    assert all("classifier" in path for path in arrays)
    assert tree.count(arrays) == 2 * tree.count(params["classifier"])
    scalars = [x for x in jax.tree.leaves(state.opt_state) if not x.ndim]
    assert len(scalars) == 2  # Adam's and the schedule's counts


def flops(loss_fn, params, batch, mask=None, accumulate: int = 1) -> float:
    train_step = step.make_train_step(loss_fn, optimizer(), mask, accumulate)
    state = jax.eval_shape(lambda p: step.init_state(p, optimizer(), mask), params)
    return jax.jit(train_step).lower(state, batch, None).compile().cost_analysis()["flops"]


def test_frozen_parameters_cost_no_weight_gradient():
    params, batch = toy.parameters(128, 3), toy.batch(rows=64, width=128)
    full = flops(toy.loss, params, batch)
    # The gradient norm, for clipping and for the metrics, is included.
    head = flops(toy.loss, params, batch, trainable_mask(params, "head"))
    forward = 2 * 64 * 128 * 128 * 3
    assert head < 1.1 * forward
    assert head < 0.4 * full


def test_computing_the_total_weights_costs_no_forward_pass():
    params, batch = toy.parameters(128, 3), toy.batch(rows=64, width=128)
    full = flops(toy.loss, params, batch)
    halves = flops(toy.loss, params, batch, accumulate=2)  # XLA counts the body of a scan once
    assert halves < 0.6 * full


def test_the_gradient_buffer_has_the_size_of_the_trainable_parameters():
    params = toy.parameters()
    mask = trainable_mask(params, "head")
    train_step = step.make_train_step(toy.loss, optimizer(), mask, accumulate=4)
    state = step.init_state(params, optimizer(), mask)
    jaxpr = jax.make_jaxpr(train_step)(state, toy.batch(), None)
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    carried = sum(np.prod(var.aval.shape, dtype=int) for var in scan.outvars)
    totals = 6  # sum and weight of two terms and of a metric
    assert carried <= tree.count(params["classifier"]) + totals + 1  # + the counter of the scan


def test_the_gradient_norm_is_that_of_the_trainable_parameters():
    params = toy.parameters()
    mask = trainable_mask(params, "head")

    def total(params):
        sums, weights, _ = toy.loss(params, toy.batch())
        return sum(sums[name] / weights[name] for name in sums)

    gradient = jax.jit(jax.grad(total))(params)
    for trainable, expected in ((None, gradient), (mask, gradient["classifier"])):
        train_step = jax.jit(step.make_train_step(toy.loss, optimizer(), trainable))
        state = step.init_state(params, optimizer(), trainable)
        _, metrics = train_step(state, toy.batch(), None)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


# Evaluation --------------------------------------------------------------------------------------


def test_evaluation_does_not_depend_on_the_batch_size():
    params, eval_step = toy.parameters(), step.make_eval_step(toy.loss)
    all_rows = toy.batch(rows=30)
    expected = step.evaluate(eval_step, params, [all_rows])

    def pieces(size):
        """Batches of `size` rows, the last one padded with rows of zeros."""
        padded = jax.tree.map(
            lambda x: np.concatenate([x, np.zeros_like(x)])[: -(-30 // size) * size], all_rows
        )
        for start in range(0, 30, size):
            yield jax.tree.map(lambda x, start=start: x[start : start + size], padded)

    found = step.evaluate(eval_step, params, pieces(8))  # the last batch has 6 rows and 2 empty
    for name in ("loss", "first_loss", "second_loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    assert isinstance(found["loss"], float)
    sharded = step.evaluate(eval_step, params, pieces(16), sharding.make_mesh(2, 4))
    np.testing.assert_allclose(sharded["loss"], expected["loss"], rtol=1e-6)


def test_evaluation_sums_in_float64():
    """In float32 the sum would not grow beyond 2**24."""
    big, small = {"x": np.full(1, 2.0**24)}, {"x": np.ones(1)}

    def loss(params, batch, rng):
        return batch["x"].sum(), 1.0, {}

    found = step.evaluate(step.make_eval_step(loss), {}, [big, small, small, small])
    assert found["loss"] == (2**24 + 3) / 4


def test_evaluation_without_batches_or_weights():
    with pytest.raises(ValueError, match="no batches to evaluate"):
        step.evaluate(step.make_eval_step(toy.loss), toy.parameters(), [])

    def nothing(params, batch, rng):
        return 0.0, 0.0, {"accuracy": (0.0, 0.0)}

    found = step.evaluate(step.make_eval_step(nothing), {}, [{"x": np.ones(1)}])
    assert found == {"loss": 0.0, "accuracy": 0.0}


# Compiled steps and memory ---------------------------------------------------------------------


def test_a_step_that_needs_more_memory_than_is_free_is_an_error(monkeypatch):
    monkeypatch.setattr(step, "free_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"a step needs 0.00 GiB in addition to the 0.00 GiB of "
                                         r"parameters, optimizer state and batch, and 0.00 GiB are "
                                         r"free; use"):
        train(3)
    analysis = SimpleNamespace(temp_size_in_bytes=60, output_size_in_bytes=50,
                               alias_size_in_bytes=10, argument_size_in_bytes=0)
    step.check_memory(analysis, 100)
    with pytest.raises(ValueError):
        step.check_memory(analysis, 99)
    step.check_memory(None, 1)
    step.check_memory(analysis, None)


def test_each_shape_is_compiled_once():
    def count(state, batch, rng):
        return state + batch["x"].sum(), {"loss": jnp.float32(0)}

    compiled = step.CompiledStep(count, jnp.float32(0), None)
    state = jnp.float32(0)
    with step.CompilationCounter() as compilations:
        for length in (3, 5, 3, 5, 3):
            state, _ = compiled(state, {"x": np.ones(length, np.float32)}, None)
        assert float(state) == 19
        assert compilations.count <= 3  # two shapes, and one for `float`


def test_compilations_are_counted_and_repeated_calls_are_not():
    with step.CompilationCounter() as compilations:
        f = jax.jit(lambda x: x * 3 + 1)
        f(jnp.ones(3)).block_until_ready()
        first = compilations.count
        f(jnp.ones(3)).block_until_ready()
        assert compilations.count == first >= 1 and compilations.seconds > 0
        f(jnp.ones(4)).block_until_ready()
        assert compilations.count > first
        last = compilations.count
    jax.jit(lambda x: x * 5)(jnp.ones(7)).block_until_ready()
    assert compilations.count == last


def test_peak_memory_is_at_least_the_size_of_the_arrays():
    before = step.peak_memory()
    x = jax.device_put(jnp.ones((64, 2**20), jnp.float32))
    x.block_until_ready()
    assert step.peak_memory() >= max(before, x.nbytes)
