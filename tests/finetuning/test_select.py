"""Trainable specs: the masks they make, and the errors of invalid specs."""

import jax
import jax.numpy as jnp
import optax
import pytest

from transformer_jax import tree
from transformer_jax.finetuning import select


def layer() -> dict:
    return {
        "attention_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "self_attention": {
            "query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.zeros((2, 2))},
            "out": {"kernel": jnp.ones((2, 2, 4)), "bias": jnp.zeros(4)},
        },
        "mlp": {"wi": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}},
    }


def gpt(num_layers: int = 12) -> dict:
    return {
        "token_embed": {"embedding": jnp.ones((5, 4))},
        "decoder": {f"layer_{i}": layer() for i in range(num_layers)}
        | {"final_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
        "classifier": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
    }


def bert() -> dict:
    return {
        "embed_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "encoder": {f"layer_{i}": layer() for i in range(2)},
        "pooler": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)},
        "mlm_head": {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "bias": jnp.zeros(5)},
        "classifier": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
    }


def trained(params: dict, spec: str) -> set[str]:
    mask = select.trainable_mask(params, spec)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    return {path for path, is_trainable in tree.flatten_paths(mask).items() if is_trainable}


HEAD = {"classifier/kernel", "classifier/bias"}


def test_full_trains_everything():
    assert trained(gpt(), "full") == set(tree.flatten_paths(gpt()))


def test_head_trains_the_classifier():
    assert trained(gpt(), "head") == trained(bert(), "head") == HEAD


def test_last_k_counts_layers_as_numbers():
    expected = {
        path
        for path in tree.flatten_paths(gpt())
        if path.startswith(("decoder/layer_10/", "decoder/layer_11/", "decoder/final_norm/"))
    }
    assert trained(gpt(), "last_k:2") == expected | HEAD  # not layer_9, the last in string order


def test_last_k_of_bert_includes_the_pooler():
    found = trained(bert(), "last_k:1")
    assert {path.split("/")[0] for path in found} == {"encoder", "pooler", "classifier"}
    assert not any("layer_0" in path for path in found)


def test_bitfit_trains_biases_and_the_classifier():
    expected = {path for path in tree.flatten_paths(bert()) if path.endswith("/bias")}
    assert trained(bert(), "bitfit") == expected | HEAD


def test_layernorm_trains_norms_and_the_classifier():
    found = trained(bert(), "layernorm")
    assert found == HEAD | {
        f"{norm}/{name}"
        for norm in (
            "embed_norm",
            "encoder/layer_0/attention_norm",
            "encoder/layer_1/attention_norm",
            "mlm_head/norm",
        )
        for name in ("scale", "bias")
    }


def test_regex_and_unions():
    assert trained(gpt(), "regex:token_embed") == {"token_embed/embedding"}
    assert trained(gpt(2), "head+regex:layer_1/.+query/kernel$") == HEAD | {
        "decoder/layer_1/self_attention/query/kernel"
    }
    assert trained(gpt(), "head+layernorm") == trained(gpt(), "layernorm")


def test_abstract_parameters_are_accepted():
    assert trained(jax.eval_shape(gpt), "head") == HEAD


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("haed",
         "unknown trainable spec 'haed'; did you mean head? Choose one of full, head, last_k:2"),
        ("", "unknown trainable spec ''; choose one of full, head, last_k:2, layers"),
        ("head+bitfti", "unknown trainable spec 'bitfti'; did you mean bitfit?"),
        ("last_k", "'last_k' needs an argument, for example last_k:2"),
        ("last_k:", "'last_k' needs an argument"),
        ("last_k:0", "last_k:0: the number of layers must be from 1 to 12"),
        ("last_k:13", "last_k:13: the number of layers must be from 1 to 12"),
        ("last_k:two", "last_k:two: the number of layers must be from 1 to 12"),
        ("head:3", "'head' takes no argument, got '3'; write 'head'"),
        (
            "regex:qeury/kernel",
            "matches none of 101 parameters ('qeury/kernel'); the closest are decoder/layer_0/",
        ),
        ("regex:(", "'(' is not a valid regular expression"),
        ("regex:" + "(.*)" * 12 + r"\1\2\3\4\5\6[!?]", "takes more than 1.0 s"),
        ("regex:", "'regex' needs an argument"),
    ],
)
def test_the_error_of_an_invalid_spec_is_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        select.trainable_mask(gpt(), spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_of_a_regex_without_matches_names_the_closest_path():
    with pytest.raises(ValueError, match="self_attention/query/kernel"):
        select.trainable_mask(gpt(2), "regex:qeury/kernel")


def test_head_without_a_classifier_is_an_error():
    params = gpt()
    del params["classifier"]
    with pytest.raises(ValueError, match="spec 'head': head matches none of 99 parameters"):
        select.trainable_mask(params, "head")


def test_last_k_without_layers_is_an_error():
    with pytest.raises(ValueError, match="have no layer_0"):
        select.trainable_mask({"classifier": {"bias": jnp.zeros(2)}}, "last_k:1")


def test_the_mask_works_with_optax():
    mask = select.trainable_mask(gpt(2), "head")
    labels = jax.tree.map(lambda is_trainable: "train" if is_trainable else "freeze", mask)
    optimizer = optax.partition({"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}, labels)
    updates, _ = optimizer.update(gpt(2), optimizer.init(gpt(2)), gpt(2))
    moved = {path for path, update in tree.flatten_paths(updates).items() if update.any()}
    assert moved <= HEAD
    assert moved


def test_describe():
    params = {
        "encoder": {"kernel": jnp.ones((30, 30)), "bias": jnp.ones(90)},
        "classifier": {"kernel": jnp.ones((5, 2))},
    }
    mask = select.trainable_mask(params, "bitfit")
    assert select.describe(params, mask).splitlines() == [
        "group               leaves     trainable    parameters     share",
        "classifier             1/1            10            10  100.00 %",
        "encoder                1/2            90           990    9.09 %",
        "total                  2/3           100         1,000   10.00 %",
    ]


def test_int8_parameters_cannot_be_trained():
    params = {"mlp": {"wi": {"kernel_int8": 0, "kernel_scale": 0, "bias": 0}},
              "classifier": {"kernel": 0}}
    assert trained(params, "bitfit") == {"mlp/wi/bias", "classifier/kernel"}
    for spec in ("full", "regex:mlp/wi/kernel"):
        with pytest.raises(ValueError, match=r"mlp/wi/kernel_int8 is quantized to int8.*before"):
            trained(params, spec)


def test_layers_are_counted_from_0_and_ranges_include_both_ends():
    for spec, layers in (("layers:8-10", {8, 9, 10}), ("layers:1", {1}),
                           ("layers:0-11", range(12))):
        in_layers = {path for path in trained(gpt(), spec) if path.startswith("decoder/layer_")}
        assert in_layers == {path for path in tree.flatten_paths(gpt())
                         if any(path.startswith(f"decoder/layer_{i}/") for i in layers)}
        assert trained(gpt(), spec) - in_layers == HEAD
