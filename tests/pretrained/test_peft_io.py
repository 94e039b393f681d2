"""LoRA in the format of PEFT, without PEFT: saving, loading and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

from transformer_jax.finetuning import peft
from transformer_jax.models import build_model, init_params
from transformer_jax.pretrained.peft_io import CONFIG_FILE, WEIGHTS_FILE, load_peft, save_peft
from transformer_jax.tree import flatten_paths, map_paths, unflatten_paths

GPT = small_models.GPT2.replace(classifier_bias=False)
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def adapted(config, task, spec, num_classes=0):
    """(model, base, params, mask), with LoRA parameters far from zero."""
    model = build_model(config, num_classes, task)
    base = small_models.random_params(
        jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0)))
    params, mask = peft.add_and_mask(base, spec, jax.random.key(1))
    rng = np.random.default_rng(3)
    return model, base, map_paths(
        lambda path, leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(("lora_b", "lora_magnitude")) else leaf, params), mask


def bert(tmp_path, spec="lora:2:query,value", **options):
    model, base, params, mask = adapted(small_models.BERT, "classification", spec, 3)
    save_peft(tmp_path, model, params, "some/base", mask=mask, **options)
    return model, base, params, json.loads((tmp_path / CONFIG_FILE).read_text())


def assert_equal(actual, expected):
    actual, expected = flatten_paths(actual), flatten_paths(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("spec", ["lora:2:query,value", "lora:3:all,dora,dropout=0.1,alpha=5"])
def test_bert_round_trip(spec, use_rslora, tmp_path):
    model, base, params, config = bert(tmp_path, spec, use_rslora=use_rslora)
    assert_equal(load_peft(tmp_path, model, base), params)
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["modules_to_save"] == ["classifier"] and config["bias"] == "none"
    if spec == "lora:2:query,value":
        assert config["target_modules"] == ["query", "value"]
        rank, alpha = 2, 4 if not use_rslora else 2 * 2**0.5
    else:
        rank, alpha = 3, 5 if not use_rslora else 5 / 3 * 3**0.5
        assert config["use_dora"] and config["lora_dropout"] == pytest.approx(0.1)
    assert config["r"] == rank and config["lora_alpha"] == pytest.approx(alpha)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (rank, 24)
    assert tensors[f"{QUERY}.lora_B.weight"].shape == (24, rank)
    np.testing.assert_array_equal(
        tensors["base_model.model.classifier.weight"], params["classifier"]["kernel"].T)


@pytest.mark.parametrize(
    ("spec", "bias", "modules"),
    [
        ("lora:2+bitfit", "all", ["classifier"]),
        ("lora:2:query", "lora_only", ["classifier"]),
        ("lora:2+regex:pooler", "none", ["bert.pooler.dense", "classifier"]),
    ],
)
def test_other_trainable_parameters(spec, bias, modules, tmp_path):
    model, base, params, mask = adapted(small_models.BERT, "classification", spec, 3)
    if bias == "lora_only":
        mask = map_paths(lambda path, selected: selected or path.endswith("query/bias"), mask)
    is_trainable = flatten_paths(mask)
    params = map_paths(lambda path, leaf: leaf + 1 if is_trainable[path] else leaf, params)
    save_peft(tmp_path, model, params, mask=mask)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["bias"], config["modules_to_save"]) == (bias, modules)
    assert_equal(load_peft(tmp_path, model, base), params)


def test_query_key_and_value_of_gpt_are_one_module(tmp_path):
    model, base, params, _ = adapted(GPT, "causal_lm", "lora:2:query,value")
    save_peft(tmp_path / "a", model, params)
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["target_modules"] == ["c_attn"] and config["fan_in_fan_out"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 8)  # A is not shared: the rank is the sum
    loaded = load_peft(tmp_path / "a", model, base)
    assert_equal(peft.merge(loaded), peft.merge(params))
    # After loading, A is shared, and saving again gives the same files.
    save_peft(tmp_path / "b", model, loaded)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_different_ranks_become_patterns(tmp_path):
    model, base, params, _ = adapted(small_models.BART, "seq2seq_lm", "lora:2:all")
    leaves = flatten_paths(params)
    layer = "decoder/layer_1/cross_attention/out"
    leaves[f"{layer}/lora_a"] = leaves[f"{layer}/lora_a"][..., :1]
    leaves[f"{layer}/lora_b"] = leaves[f"{layer}/lora_b"][:1]
    leaves["encoder/layer_0/mlp/wi/lora_scale"] *= 3
    leaves = {path: leaf for path, leaf in leaves.items() if "encoder/layer_1/mlp/wo" not in path
              or "lora_" not in path}
    params = unflatten_paths(leaves)
    save_peft(tmp_path, model, params)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["rank_pattern"] == {"model.decoder.layers.1.encoder_attn.out_proj": 1}
    assert config["alpha_pattern"] == {"model.decoder.layers.1.encoder_attn.out_proj": 2,
                                       "model.encoder.layers.0.fc1": 12}
    assert "fc1" in config["target_modules"] and "fc2" not in config["target_modules"]
    assert_equal(load_peft(tmp_path, model, base), params)


def test_lora_of_a_classifier_is_merged(tmp_path):
    model, base, params, _ = adapted(small_models.BERT, "classification", "lora:2", 3)
    rng = np.random.default_rng(0)
    params = params | {"classifier": params["classifier"] | {
        "lora_a": rng.normal(size=(24, 2)), "lora_b": rng.normal(size=(2, 3)),
        "lora_scale": jnp.float32(2)}}
    save_peft(tmp_path, model, params)
    found = load_peft(tmp_path, model, base)["classifier"]
    np.testing.assert_allclose(found["kernel"], peft.merge(params)["classifier"]["kernel"],
                               rtol=1e-6)
    assert found.keys() == {"kernel", "bias"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "unsupported peft_type 'IA3' in .*; supported: 'LORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"init_lora_weights": "pissa"},
         "unsupported init_lora_weights 'pissa' in .*, which changes the"),
        ({"lora_bias": True}, "unsupported option lora_bias True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"some_new_option": 3}, "some_new_option 3"),
        ({"r": 0}, "the rank r is 0; it must be an integer"),
        ({"r": 3}, r"shapes .*lora_A.*\(2, 24\).*require .*\(3, 24\)"),
        ({"use_dora": True}, "require .*lora_magnitude_vector"),
        ({"lora_alpha": "x"}, "the alpha lora_alpha is 'x'; it must be a number"),
        ({"rank_pattern": {"(": 3}}, r"the pattern '\(', which is not a regular expression"),
    ],
)
def test_unsupported_adapters_are_rejected(change, message, tmp_path):
    model, base, _, config = bert(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as error:
        load_peft(tmp_path, model, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.bert.encoder.layer.9.output.dense.lora_A.weight", (2, 24),
         "layer.9.output.dense, which is not a linear layer"),
        ("base_model.model.bert.embeddings.word_embeddings.lora_A.weight", (2, 24),
         "word_embeddings, which is not a linear layer"),
        ("base_model.model.bert.embeddings.word_embeddings.lora_embedding_A", (2, 24),
         "lora_embedding_A is not a tensor of a BERT for classification"),
        ("base_model.model.classifier.weight", (4, 24), r"has shape \(4, 24\), but a BERT .* \(3"),
        (f"{QUERY}.lora_B.weight", (23, 2), r"lora_B': \(23, 2\)"),
        (f"{QUERY}.lora_B.bias", (24,), "lora_B.bias is not a tensor"),
    ],
)
def test_tensors_of_other_models_are_rejected(name, shape, message, tmp_path):
    model, base, _, _ = bert(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE) | {name: np.ones(shape, np.float32)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, model, base)


def test_missing_files_and_params_with_lora_are_rejected(tmp_path):
    model, base, params, _ = bert(tmp_path)
    with pytest.raises(ValueError, match=r"already contain LoRA .*lora_.*; merge them first"):
        load_peft(tmp_path, model, params)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS_FILE}"):
        load_peft(tmp_path, model, base)
    with pytest.raises(FileNotFoundError, match="give the folder of a PEFT adapter"):
        load_peft(tmp_path / "gone", model, base)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_peft(tmp_path, model, base)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adapter:2", "unsupported PEFT parameter .*_adapter/"),
        ("lora:2+prefix:2", "unsupported PEFT parameter .*prefix_key"),
        ("bitfit", "none of .* parameters is a LoRA parameter"),
        ("lora:2+embeddings", "unsupported trainable parameter token_embed/embedding"),
        ("lora:2+last_k:1", "unsupported trainable parameter .*layer_1/"),
    ],
)
def test_parameters_that_the_format_cannot_store_are_rejected(spec, message, tmp_path):
    model, _, params, mask = adapted(small_models.BERT, "classification", spec, 3)
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "out", model, params, mask=mask)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "task", "spec", "path"), [
    # PEFT would copy all of cls.predictions, but the file does not contain the tied decoder.
    (small_models.BERT, "masked_lm", "lora:2+regex:mlm_head", "mlm_head/output/bias"),
    (small_models.BART, "seq2seq_lm", "lora:2+regex:^output/", "output/bias"),
])
def test_modules_that_peft_cannot_load_are_rejected(config, task, spec, path, tmp_path):
    model, _, params, mask = adapted(config, task, spec, 0)
    with pytest.raises(ValueError, match=f"unsupported trainable parameter {path}"):
        save_peft(tmp_path / "out", model, params, mask=mask)
    assert not (tmp_path / "out").exists()


def test_a_classifier_bias_is_rejected_for_gpt(tmp_path):
    model, _, params, _ = adapted(small_models.GPT2, "classification", "lora:2", 2)
    with pytest.raises(ValueError, match="unsupported parameter classifier/bias: gpt2"):
        save_peft(tmp_path, model, params)
