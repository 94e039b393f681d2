"""LoRA in PEFT's files, without PEFT: what is written, what comes back, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

from transformer_jax.finetuning import peft
from transformer_jax.models import build_model, init_params
from transformer_jax.pretrained.peft_io import CONFIG, WEIGHTS, load_peft, save_peft
from transformer_jax.tree import flatten_paths, map_paths, unflatten_paths

GPT = small_models.GPT2.replace(classifier_bias=False)
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def adapted(config, task, recipe, num_classes=0):
    """(model, base, params, mask), LoRA far from zero."""
    model = build_model(config, num_classes, task)
    base = small_models.random_params(
        jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0)))
    params, mask = peft.add_and_mask(base, recipe, jax.random.key(1))
    rng = np.random.default_rng(3)
    return model, base, map_paths(
        lambda path, leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith(("lora_b", "lora_magnitude")) else leaf, params), mask


def bert(tmp_path, recipe="lora:2:query,value", **options):
    model, base, params, mask = adapted(small_models.BERT, "classification", recipe, 3)
    save_peft(tmp_path, model, params, "some/base", mask=mask, **options)
    return model, base, params, json.loads((tmp_path / CONFIG).read_text())


def assert_equal(ours, theirs):
    ours, theirs = flatten_paths(ours), flatten_paths(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("recipe", ["lora:2:query,value", "lora:3:all,dora,dropout=0.1,alpha=5"])
def test_bert_comes_back(recipe, rslora, tmp_path):
    model, base, params, config = bert(tmp_path, recipe, rslora=rslora)
    assert_equal(load_peft(tmp_path, model, base), params)
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["modules_to_save"] == ["classifier"] and config["bias"] == "none"
    if recipe == "lora:2:query,value":
        assert config["target_modules"] == ["query", "value"]
        rank, alpha = 2, 4 if not rslora else 2 * 2**0.5
    else:
        rank, alpha = 3, 5 if not rslora else 5 / 3 * 3**0.5
        assert config["use_dora"] and config["lora_dropout"] == pytest.approx(0.1)
    assert config["r"] == rank and config["lora_alpha"] == pytest.approx(alpha)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (rank, 24)
    assert tensors[f"{QUERY}.lora_B.weight"].shape == (24, rank)
    np.testing.assert_array_equal(
        tensors["base_model.model.classifier.weight"], params["classifier"]["kernel"].T)


@pytest.mark.parametrize(
    ("recipe", "bias", "modules"),
    [
        ("lora:2+bitfit", "all", ["classifier"]),
        ("lora:2:query", "lora_only", ["classifier"]),
        ("lora:2+regex:pooler", "none", ["bert.pooler.dense", "classifier"]),
    ],
)
def test_what_trains_beside_lora(recipe, bias, modules, tmp_path):
    model, base, params, mask = adapted(small_models.BERT, "classification", recipe, 3)
    if bias == "lora_only":
        mask = map_paths(lambda path, train: train or path.endswith("query/bias"), mask)
    trains = flatten_paths(mask)
    params = map_paths(lambda path, leaf: leaf + 1 if trains[path] else leaf, params)
    save_peft(tmp_path, model, params, mask=mask)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["bias"], config["modules_to_save"]) == (bias, modules)
    assert_equal(load_peft(tmp_path, model, base), params)


def test_query_key_and_value_of_gpt_are_one_module(tmp_path):
    model, base, params, _ = adapted(GPT, "causal_lm", "lora:2:query,value")
    save_peft(tmp_path / "a", model, params)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["target_modules"] == ["c_attn"] and config["fan_in_fan_out"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 8)  # two As of their own: the rank is the sum
    read = load_peft(tmp_path / "a", model, base)
    assert_equal(peft.merge(read), peft.merge(params))
    # What was read shares one A, and is written as it was.
    save_peft(tmp_path / "b", model, read)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unlike_ranks_become_patterns(tmp_path):
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
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["rank_pattern"] == {"model.decoder.layers.1.encoder_attn.out_proj": 1}
    assert config["alpha_pattern"] == {"model.decoder.layers.1.encoder_attn.out_proj": 2,
                                       "model.encoder.layers.0.fc1": 12}
    assert "fc1" in config["target_modules"] and "fc2" not in config["target_modules"]
    assert_equal(load_peft(tmp_path, model, base), params)


def test_lora_of_a_classifier_is_folded(tmp_path):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base's"),
        ({"lora_bias": True}, "lora_bias True, which is not here"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"some_new_option": 3}, "some_new_option 3"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 3}, r"shapes .*lora_A.*\(2, 24\).*ask for .*\(3, 24\)"),
        ({"use_dora": True}, "ask for .*lora_magnitude_vector"),
        ({"lora_alpha": "x"}, "lora_alpha a number"),
        ({"rank_pattern": {"(": 3}}, r"'\(' is no regular expression"),
    ],
)
def test_adapters_that_are_refused(change, message, tmp_path):
    model, base, _, config = bert(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as error:
        load_peft(tmp_path, model, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.bert.encoder.layer.9.output.dense.lora_A.weight", (2, 24),
         "layer.9.output.dense, which is no linear layer"),
        ("base_model.model.bert.embeddings.word_embeddings.lora_A.weight", (2, 24),
         "word_embeddings, which is no linear layer"),
        ("base_model.model.bert.embeddings.word_embeddings.lora_embedding_A", (2, 24),
         r"lora_embedding_A has shape \(2, 24\), the model's None"),
        ("base_model.model.classifier.weight", (4, 24), r"has shape \(4, 24\), the model's \(3"),
        (f"{QUERY}.lora_B.weight", (23, 2), r"lora_B': \(23, 2\)"),
        (f"{QUERY}.lora_B.bias", (24,), "lora_B.bias has shape"),
    ],
)
def test_tensors_that_are_refused(name, shape, message, tmp_path):
    model, base, _, _ = bert(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {name: np.ones(shape, np.float32)}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, model, base)


def test_files_that_are_missing(tmp_path):
    model, base, params, _ = bert(tmp_path)
    with pytest.raises(ValueError, match=r"lora_.* already; merge it first"):
        load_peft(tmp_path, model, params)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        load_peft(tmp_path, model, base)
    with pytest.raises(FileNotFoundError, match="give the folder of a PEFT adapter"):
        load_peft(tmp_path / "gone", model, base)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_peft(tmp_path, model, base)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("adapter:2", "_adapter/.* has no place in PEFT's LoRA"),
        ("lora:2+prefix:2", "prefix_key has no place"),
        ("bitfit", "none of .* parameters is of LoRA"),
        ("lora:2+embeddings", "token_embed/embedding trained beside LoRA"),
        ("lora:2+last_k:1", "layer_1/.* trained beside LoRA"),
    ],
)
def test_what_the_format_cannot_hold(recipe, message, tmp_path):
    model, _, params, mask = adapted(small_models.BERT, "classification", recipe, 3)
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "out", model, params, mask=mask)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "task", "recipe", "path"), [
    # PEFT would copy all of cls.predictions, and miss the tied decoder in the file.
    (small_models.BERT, "masked_lm", "lora:2+regex:mlm_head", "mlm_head/output/bias"),
    (small_models.BART, "seq2seq_lm", "lora:2+regex:^output/", "output/bias"),
])
def test_modules_that_peft_could_not_load(config, task, recipe, path, tmp_path):
    model, _, params, mask = adapted(config, task, recipe, 0)
    with pytest.raises(ValueError, match=f"{path} trained beside LoRA"):
        save_peft(tmp_path / "out", model, params, mask=mask)
    assert not (tmp_path / "out").exists()


def test_a_classifier_bias_has_no_place_in_gpt(tmp_path):
    model, _, params, _ = adapted(small_models.GPT2, "classification", "lora:2", 2)
    with pytest.raises(ValueError, match="classifier/bias has no place in a checkpoint of gpt2"):
        save_peft(tmp_path, model, params)
