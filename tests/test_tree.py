"""Paths, partition and combine, partial restoration, and stacked layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import tree


def nested(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def layer() -> dict:
        return {"mlp": {"wi": {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}}}

    params = {
        "decoder": {"layer_0": layer(), "layer_1": layer(), "final_norm": {"scale": np.ones(2)}},
        "token_embed": {"embedding": rng.normal(size=(5, 2))},
    }
    return jax.tree.map(np.float32, params)


def assert_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_flatten_and_unflatten_paths():
    leaves = tree.flatten_paths(nested())
    assert list(leaves) == [
        "decoder/final_norm/scale",
        "decoder/layer_0/mlp/wi/bias",
        "decoder/layer_0/mlp/wi/kernel",
        "decoder/layer_1/mlp/wi/bias",
        "decoder/layer_1/mlp/wi/kernel",
        "token_embed/embedding",
    ]
    assert_equal(tree.unflatten_paths(leaves), nested())


def test_paths_of_tuples_and_named_tuples():
    class Moments(NamedTuple):
        mu: dict

    assert list(tree.flatten_paths((Moments({"a": 1}), None, [2, 3]))) == ["0/mu/a", "2/0", "2/1"]


def test_ambiguous_paths_are_errors():
    with pytest.raises(ValueError, match="'a/b' contains '/'"):
        tree.flatten_paths({"a/b": 1})
    for leaves in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(ValueError, match="rename one of them"):
            tree.unflatten_paths(leaves)


def test_first_match_searches_in_order():
    rules = ((r"wi/", "first"), (r"bias$", "second"))
    assert tree.first_match(rules, "decoder/wi/bias") == "first"
    assert tree.first_match(rules, "decoder/wo/bias") == "second"
    assert tree.first_match(rules, "decoder/wo/kernel", default=None) is None
    with pytest.raises(ValueError, match="none of 2 rules matches the path 'decoder/wo/kernel'"):
        tree.first_match(rules, "decoder/wo/kernel")


def test_partition_and_combine():
    mask = tree.map_paths(lambda path, leaf: "bias" in path, nested())
    selected, rest = tree.partition(nested(), mask)
    assert all("bias" in path for path in tree.flatten_paths(selected))
    assert not any("bias" in path for path in tree.flatten_paths(rest))
    assert selected["token_embed"] == {"embedding": None}
    assert_equal(tree.combine(selected, rest), nested())
    with pytest.raises(ValueError, match="'decoder/layer_0/mlp/wi/bias' is in both"):
        tree.combine(selected, nested())


def test_count_of_arrays_and_abstract_arrays():
    assert tree.count(nested()) == 2 * (6 + 3) + 2 + 10
    assert tree.count(jax.eval_shape(lambda: jnp.zeros((4, 5)))) == 20
    assert tree.count({"a": None, "b": 1.0}) == 1


def test_restore_partial_copies_common_paths_and_reports_the_others():
    target = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), nested())
    target["classifier"] = {"bias": jnp.full(2, 7.0)}
    source = {**nested(), "mlm_head": {"bias": np.ones(5)}}
    loaded, report = tree.restore_partial(target, source)
    assert report.new == ["classifier/bias"]
    assert report.unused == ["mlm_head/bias"]
    assert len(report.loaded) == 6
    assert str(report) == ("loaded 6 parameters, 1 new (classifier/bias), 1 unused (mlm_head/bias)")
    np.testing.assert_array_equal(loaded["classifier"]["bias"], 7)
    embedding = loaded["token_embed"]["embedding"]
    assert embedding.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(embedding, np.float32), source["token_embed"]["embedding"], rtol=1e-2
    )


def test_restore_partial_lists_all_shape_mismatches_in_one_line():
    source = nested()
    source["token_embed"]["embedding"] = np.ones((6, 2))
    source["decoder"]["final_norm"]["scale"] = np.ones(3)
    with pytest.raises(ValueError) as error:
        tree.restore_partial(nested(), source)
    message = str(error.value)
    assert "2 of 6 parameters do not fit" in message
    assert "decoder/final_norm/scale has shape (3,), not (2,)" in message
    assert "token_embed/embedding has shape (6, 2), not (5, 2)" in message
    assert "\n" not in message


def test_restore_partial_from_another_model_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 parameters of the source"):
        tree.restore_partial(nested(), {"wte": np.ones((5, 2))})


def test_stack_and_unstack_layers():
    stacked = tree.stack_layers(nested())
    assert {path: leaf.shape for path, leaf in tree.flatten_paths(stacked).items()} == {
        "decoder/final_norm/scale": (2,),
        "decoder/layers/mlp/wi/bias": (2, 3),
        "decoder/layers/mlp/wi/kernel": (2, 2, 3),
        "token_embed/embedding": (5, 2),
    }
    assert_equal(tree.unstack_layers(stacked), nested())


def test_layers_that_cannot_be_stacked():
    gap = nested()
    gap["decoder"]["layer_3"] = gap["decoder"].pop("layer_1")
    with pytest.raises(ValueError, match=r"numbered \[0, 3\]"):
        tree.stack_layers(gap)
    different = nested()
    different["decoder"]["layer_1"]["mlp"]["wi"]["bias"] = np.zeros(4)
    with pytest.raises(ValueError, match="layer_1 differs from layer_0 in mlp/wi/bias"):
        tree.stack_layers(different)
