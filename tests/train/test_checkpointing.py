"""Saving and restoring checkpoints, on any number of devices, and errors for unusable ones."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from transformer_jax import sharding
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.train import checkpoint_files, checkpointing, optimizers, step


@functools.cache
def make_state(spec: str | None = None, width: int = 16) -> step.TrainState:
    """A state after one update, so that its moments are not zero."""
    params = toy.parameters(width)
    mask = None if spec is None else trainable_mask(params, spec)
    optimizer = optimizers.make_optimizer(0.1)
    train_step = jax.jit(step.make_train_step(toy.loss, optimizer, mask))
    state = step.init_state(params, optimizer, mask)
    return train_step(state, toy.batch(width=width), None)[0]


def assert_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    checkpointing.save(
        directory,
        1,
        make_state(),
        rng=jax.random.key(7),
        data_state={"position": np.int64(3), "children": [None, {"seed": 1.5}]},
        metadata={"name": "Ünïcode", "empty": {}},
    )
    return directory


def test_restore_returns_everything_that_was_saved(saved):
    found = checkpointing.restore(saved, make_state())
    assert_equal(found.state, make_state())
    assert jnp.array_equal(found.rng, jax.random.key(7))  # a typed key with the same implementation
    assert found.data_state == {"position": 3, "children": [None, {"seed": 1.5}]}
    assert found.metadata == {"name": "Ünïcode", "empty": {}}
    assert checkpointing.load_metadata(saved) == found.metadata


def test_raw_keys_and_absent_items(tmp_path):
    state = step.init_state({"a": jnp.ones(3)}, optax.sgd(0.1))  # without optimizer state
    checkpointing.save(tmp_path, 4, state, rng=jax.random.PRNGKey(5), data_state={})
    found = checkpointing.restore(tmp_path, state)
    assert_equal(found.state, state)
    np.testing.assert_array_equal(found.rng, jax.random.PRNGKey(5))
    assert found.data_state == {}
    assert found.metadata is None
    checkpointing.save(tmp_path, 5, state)
    assert checkpointing.restore(tmp_path, state)[1:] == (None, None, None)


def test_a_state_with_frozen_parameters_is_restored(tmp_path):
    state = make_state("head")
    checkpointing.save(tmp_path, 1, state)
    assert_equal(checkpointing.restore(tmp_path, jax.eval_shape(lambda: state)).state, state)


@pytest.mark.parametrize(("saved_fsdp", "fsdp"), [(8, 1), (1, 8), (8, 2)])
def test_restoring_on_another_number_of_devices(tmp_path, saved_fsdp, fsdp):
    def place(state, fsdp):
        mesh = sharding.make_mesh(1, fsdp, devices=jax.devices()[:fsdp])
        return jax.device_put(state, sharding.param_shardings(state, mesh))

    checkpointing.save(tmp_path, 1, place(make_state(), saved_fsdp))
    like = place(make_state(), fsdp)
    found = checkpointing.restore(tmp_path, like).state
    assert_equal(found, make_state())
    for leaf, target in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    kernel = found.params["encoder"]["layer_0"]["mlp"]["wi"]["kernel"]
    assert len(kernel.sharding.device_set) == fsdp
    assert kernel.addressable_shards[0].data.shape == (16 // fsdp, 16)


def test_load_params_needs_no_optimizer(saved):
    params = checkpointing.load_params(saved)
    assert_equal(params, make_state().params)
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    half = checkpointing.load_params(saved, abstract)
    assert half["classifier"]["kernel"].dtype == jnp.bfloat16


def test_the_last_steps_are_kept_and_found(tmp_path):
    assert checkpointing.latest_step(tmp_path / "nowhere") is None
    assert checkpointing.latest_step(tmp_path) is None
    state = step.init_state({"a": jnp.zeros(3)}, optax.sgd(0.1))
    for number in (2, 9, 10):
        checkpointing.save(tmp_path, number, state._replace(step=jnp.int32(number)), keep=2)
    assert checkpointing.latest_step(tmp_path) == 10
    assert int(checkpointing.restore(tmp_path, state).state.step) == 10
    assert int(checkpointing.restore(tmp_path, state, step=9).state.step) == 9
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 2; choose one of 9, 10"):
        checkpointing.restore(tmp_path, state, step=2)


def test_average_params_of_the_last_checkpoints(tmp_path):
    for number, value in ((1, 100.0), (2, 1.0), (3, 2.0), (4, 6.0)):
        params = {"a": jnp.full(3, value), "b": {"c": jnp.full(2, -value)}}
        checkpointing.save(tmp_path, number, step.init_state(params, optax.sgd(0.1)), keep=None)
    found = checkpointing.average_params(tmp_path, 3)
    assert_equal(found, {"a": jnp.full(3, 3.0), "b": {"c": jnp.full(2, -3.0)}})
    assert_equal(checkpointing.average_params(tmp_path, 1)["a"], jnp.full(3, 6.0))
    with pytest.raises(FileNotFoundError, match="has 4 checkpoints, not 5; average fewer"):
        checkpointing.average_params(tmp_path, 5)
    with pytest.raises(ValueError, match="last is 0; it must be at least 1"):
        checkpointing.average_params(tmp_path, 0)


def message_of(error: type[Exception], action) -> str:
    with pytest.raises(error) as found:
        action()
    assert "\n" not in str(found.value)
    return str(found.value)


def test_missing_and_empty_directories(tmp_path):
    for load in (checkpointing.load_params, checkpointing.load_metadata):
        missing = message_of(FileNotFoundError, lambda load=load: load(tmp_path / "nowhere"))
        assert "nowhere does not exist" in missing
        assert "contains no checkpoint" in message_of(
            FileNotFoundError, lambda load=load: load(tmp_path)
        )


def test_the_error_for_another_shape_has_the_path_and_both_shapes(saved):
    found = message_of(ValueError, lambda: checkpointing.restore(saved, make_state(width=8)))
    assert "params/classifier/kernel has shape (16, 2), not (8, 2)" in found


def test_errors_for_another_optimizer_or_trainable_mask(saved, tmp_path):
    found = message_of(ValueError, lambda: checkpointing.restore(saved, make_state("head")))
    assert "opt_state has 6 additional arrays such as 1/0/mu/encoder/layer_0/mlp/wi/bias" in found
    checkpointing.save(tmp_path, 1, make_state("head"))
    found = message_of(ValueError, lambda: checkpointing.restore(tmp_path, make_state()))
    assert "opt_state is missing 6 arrays" in found


def test_the_error_for_another_model(saved):
    like = {"decoder": {"kernel": jnp.ones((2, 2))}}
    found = message_of(ValueError, lambda: checkpointing.load_params(saved, like))
    assert "params is missing 1 arrays such as decoder/kernel" in found
    like = {"classifier": {"kernal": jnp.ones((16, 2))}}
    found = message_of(ValueError, lambda: checkpointing.load_params(saved, like))
    assert "1 arrays such as classifier/kernal (nearest: classifier/kernel); use the model" in found


def test_errors_of_save(saved, tmp_path):
    state = make_state()
    assert "already has a checkpoint of step 1" in message_of(
        ValueError, lambda: checkpointing.save(saved, 1, state))
    assert "data_state contains a set" in message_of(
        ValueError, lambda: checkpointing.save(tmp_path, 1, state, data_state={"a": {1}})
    )
    assert "keep is 0" in message_of(
        ValueError, lambda: checkpointing.save(tmp_path, 1, state, keep=0)
    )
    assert checkpointing.latest_step(tmp_path) is None


def test_a_background_save_is_not_changed_by_donated_updates(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = step.TrainState(jnp.int32(0), {"a": jnp.zeros((500, 1000))}, ())
    for number in (1, 2):
        state = update(state)
        pending = checkpointing.save(tmp_path, number, state, wait=False)
        for _ in range(3):
            state = update(state)
        pending.result()
        pending.result()  # a second time does nothing
    first, second = (checkpointing.load_params(tmp_path, step=n)["a"] for n in (1, 2))
    np.testing.assert_array_equal(first, 1)
    np.testing.assert_array_equal(second, 5)


def test_the_error_of_a_background_save_is_raised(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    checkpointing.save(tmp_path, 1, make_state())
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)  # Orbax completes a checkpoint by renaming it
        pending = checkpointing.save(tmp_path, 2, make_state(), wait=False)
        with pytest.raises(OSError, match="disk full"):
            pending.result()
    assert checkpointing.latest_step(tmp_path) == 1


@pytest.mark.slow
def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    """The process is killed while Orbax writes step 2, which can then be saved again."""
    script = textwrap.dedent(
        f"""
        import os, signal
        import jax, jax.numpy as jnp
        jax.config.update("jax_platforms", "cpu")
        from transformer_jax.train import checkpointing, step

        state = step.TrainState(jnp.int32(1), {{"a": jnp.ones(1000)}}, ())
        checkpointing.save({str(tmp_path)!r}, 1, state)
        os.replace = os.rename = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        checkpointing.save({str(tmp_path)!r}, 2, state)
        """
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1  # the incomplete step 2
    assert checkpointing.latest_step(tmp_path) == 1
    state = step.TrainState(jnp.int32(2), {"a": jnp.full(1000, 2.0)}, ())
    checkpointing.save(tmp_path, 2, state)
    np.testing.assert_array_equal(checkpointing.load_params(tmp_path)["a"], 2)


# Corrupted files ---------------------------------------------------------------------------------


def three_steps(folder: Path) -> step.TrainState:
    for number in (1, 2, 3):
        params = {"a": jnp.full(1000, float(number))}
        checkpointing.save(folder, number, step.init_state(params, optax.sgd(0.1)))
    return step.init_state({"a": jnp.zeros(1000)}, optax.sgd(0.1))


def flip_a_bit(folder: Path) -> None:
    """Flips a bit in a file with arrays."""
    path = next(p for p in (folder / "params" / "d").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_detected_and_the_previous_step_is_restored(tmp_path, capfd):
    like = three_steps(tmp_path)
    flip_a_bit(tmp_path / "3")
    (tmp_path / "2" / "params" / "_METADATA").unlink()
    assert float(checkpointing.restore(tmp_path, like).state.params["a"][0]) == 1
    messages = capfd.readouterr().err
    assert "3 is corrupted: " in messages
    assert "its SHA-256 differs from digests.json; trying the previous step" in messages
    assert "2 is corrupted: params/_METADATA is missing" in messages
    assert float(checkpointing.load_params(tmp_path)["a"][0]) == 1
    message = message_of(ValueError, lambda: checkpointing.restore(tmp_path, like, step=3))
    assert "its SHA-256 differs from digests.json; choose another step" in message
    flip_a_bit(tmp_path / "1")
    assert "every checkpoint in" in message_of(ValueError,
                                               lambda: checkpointing.restore(tmp_path, like))


def test_a_step_without_a_manifest_counts_only_if_no_step_has_one(tmp_path):
    like = three_steps(tmp_path)
    (tmp_path / "3" / "digests.json").unlink()
    assert checkpointing.latest_step(tmp_path) == 2
    for number in (1, 2):
        (tmp_path / str(number) / "digests.json").unlink()
    assert checkpointing.latest_step(tmp_path) == 3
    assert float(checkpointing.restore(tmp_path, like).state.params["a"][0]) == 3


def test_quarantine_renames_corrupted_steps_and_deletes_aborted_saves(tmp_path):
    three_steps(tmp_path)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3.damaged").mkdir()
    checkpoint_files.quarantine_incomplete(tmp_path, after=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1", "2.damaged", "3.damaged", "3.damaged-1"]
