"""Saved adapters: round trips, fingerprints of the base, and corrupted or hostile files."""

import hashlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load, save
from trained_models import BART, BERT, DORA, trained

from transformer_jax import __version__, storage
from transformer_jax.finetuning import adapter_io, peft
from transformer_jax.finetuning.frozen import quantize_frozen
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.tree import flatten_paths, map_paths, unflatten_paths


def saved(folder, config=BERT, spec=DORA, **options):
    model, base, params, mask = trained(config, spec)
    adapter_io.save_adapter(folder, params, mask, base, spec=spec, **options)
    return model, base, params


def assert_same(found, expected):
    found, expected = flatten_paths(found), flatten_paths(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_the_fingerprint_depends_on_the_base_only():
    _, base, params, _ = trained(BERT, DORA)
    expected = adapter_io.fingerprint(base)
    assert len(expected) == 64
    leaves = flatten_paths(base)
    reverse_order = unflatten_paths(dict(reversed(leaves.items())))
    assert adapter_io.fingerprint(jax.tree.map(np.asarray, reverse_order)) == expected
    assert adapter_io.fingerprint(jax.device_put(base, jax.devices()[3])) == expected
    assert adapter_io.fingerprint(params) == expected  # without PEFT parameters, classifier
    assert adapter_io.fingerprint(base | {"classifier": {"kernel": np.ones((24, 9))}}) == expected
    others = [base | {"pooler": base["pooler"] | {"bias": base["pooler"]["bias"].at[3].add(1e-7)}},
              {name: tree for name, tree in base.items() if name != "pooler"},
              unflatten_paths({path.replace("pooler", "renamed"): x for path, x in leaves.items()}),
              base | {"pooler": base["pooler"] | {"bias": base["pooler"]["bias"][None]}}]
    part = {"pooler": base["pooler"]}
    frozen = jax.tree.map(lambda _: False, part)
    quantized = [quantize_frozen(part, frozen, dtype)[0]
                 for dtype in ("float32", "bfloat16", "int8", "int8")]
    *found, again = [adapter_io.fingerprint(tree) for tree in [base, *others, *quantized]]
    assert len(set(found)) == len(found)
    assert again == found[-1]


def test_the_fingerprint_excludes_the_pooler_of_an_encoder_decoder():
    _, base = small_models.build(BART, 3)
    other = base | {"pooler": {"kernel": np.zeros((24, 24), np.float32)}}
    assert adapter_io.fingerprint(other) == adapter_io.fingerprint(base)


def test_the_fingerprint_is_fast():
    big = {"a": {"kernel": np.ones((5000, 5000), np.float32)}}
    start = time.process_time()
    adapter_io.fingerprint(big)
    assert time.process_time() - start < 2  # seconds for 100 MB


@pytest.mark.parametrize("spec", [DORA, "lora:4:all,dropout=0.1", "adapter:3", "prefix:2",
                                    "prompt:2", "ia3", "bitfit", "last_k:1", "full", "head",
                                    "regex:mlp/wi/kernel"])
def test_saved_parameters_are_restored(spec, tmp_path):
    _, base, params = saved(tmp_path, spec=spec, task="sst2", label_names=["a", "b", "c"],
                            seed=7)
    # The base that is loaded later has another newly initialized classifier.
    base = base | {"classifier": {"kernel": jnp.zeros((24, 3)), "bias": jnp.zeros(3)}}
    adapter = adapter_io.load_adapter(tmp_path, base)
    assert_same(adapter_io.apply_adapter(base, adapter), params)
    fields = {name: adapter.manifest[name] for name in (
        "recipe", "task", "label_names", "frozen", "version", "metadata")}
    assert fields == {
        "recipe": spec, "task": "sst2", "label_names": ["a", "b", "c"], "frozen": "float32",
        "version": __version__, "metadata": {"seed": 7}}
    if spec == "ia3":
        assert adapter.params.keys() == {"encoder", "classifier"}
    if spec == DORA:
        tokens = small_models.random_tokens(2, 6)
        merged = peft.merge(adapter_io.apply_adapter(base, adapter))
        np.testing.assert_allclose(*(small_models.forward(
            BERT, tokens, method="classification_logits", params=tree, num_classes=3)
            for tree in (merged, params)), atol=1e-5)


def test_an_encoder_decoder_with_added_tokens(tmp_path):
    _, base = small_models.build(BART, 3)
    params = peft.add_tokens(base, 2, jax.random.key(1))
    params, mask = peft.add_and_mask(params, "lora:2", jax.random.key(0))
    adapter_io.save_adapter(tmp_path, params, mask, base, spec="lora:2")
    adapter = adapter_io.load_adapter(tmp_path, base)
    assert {"token_embed/extra", "pooler/kernel"} <= flatten_paths(adapter.params).keys()
    assert_same(adapter_io.apply_adapter(base, adapter), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_quantized_frozen_weights(dtype, tmp_path):
    _, base, params, mask = trained(BERT, "last_k:1")
    quantized, quantized_mask = quantize_frozen(params, mask, dtype)
    adapter_io.save_adapter(tmp_path / "a", quantized, quantized_mask, base, spec="last_k:1")
    adapter = adapter_io.load_adapter(tmp_path / "a", base)
    assert adapter.manifest["frozen"] == dtype
    restored = adapter_io.apply_adapter(base, adapter)
    assert_same(restored, params)
    assert_same(quantize_frozen(restored, mask, dtype)[0], quantized)
    # On a quantized base, trained parameters replace quantized ones.
    quantized_base = quantize_frozen(base, trainable_mask(base, "head"), dtype)[0]
    with pytest.raises(ValueError, match=f"without `quantize_frozen`.*{dtype}"):
        adapter_io.load_adapter(tmp_path / "a", quantized_base)
    assert_same(adapter_io.apply_adapter(quantized_base, adapter), quantized)
    params, mask = peft.add_and_mask(quantized_base, "lora:2", jax.random.key(0))
    adapter_io.save_adapter(tmp_path / "b", params, mask, quantized_base, spec="lora:2")
    adapter = adapter_io.load_adapter(tmp_path / "b", quantized_base)
    assert_same(adapter_io.apply_adapter(quantized_base, adapter), params)


def test_float64_is_refused(tmp_path):
    _, _, params, mask = trained(BERT, "head")
    params = params | {"classifier": {name: np.asarray(leaf, np.float64)
                                      for name, leaf in params["classifier"].items()}}
    base = small_models.build(BERT, 3)[1]
    with pytest.raises(ValueError, match="dtype float64 of classifier/bias; supported: float32"):
        adapter_io.save_adapter(tmp_path, params, mask, base, spec="head")
    assert not list(tmp_path.iterdir())


def test_bfloat16_parameters_are_restored_as_bfloat16(tmp_path):
    _, base, params, mask = trained(BERT, "bitfit")
    is_trainable = flatten_paths(mask)
    params = map_paths(
        lambda path, x: x.astype(jnp.bfloat16) if is_trainable[path] else x, params)
    adapter_io.save_adapter(tmp_path, params, mask, base, spec="bitfit")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), params)


def test_another_base_is_refused(tmp_path):
    _, base, _ = saved(tmp_path)
    other = base | {"pooler": jax.tree.map(lambda x: x + 1, base["pooler"])}
    with pytest.raises(ValueError, match="load the checkpoint") as error:
        adapter_io.load_adapter(tmp_path, other)
    for tree in (base, other):
        assert adapter_io.fingerprint(tree)[:16] in str(error.value)
    assert "\n" not in str(error.value)


def test_frozen_parameters_must_equal_the_base(tmp_path):
    _, base, params, mask = trained(BERT, DORA)
    changed = params | {"pooler": jax.tree.map(lambda x: x + 1, params["pooler"])}
    with pytest.raises(ValueError, match=r"pooler/.* is frozen, but differs"):
        adapter_io.save_adapter(tmp_path / "a", changed, mask, base, spec=DORA)
    incomplete = {name: tree for name, tree in base.items() if name != "pooler"}
    with pytest.raises(ValueError, match=r"pooler/.* is frozen, but the base has no such"):
        adapter_io.save_adapter(tmp_path / "a", params, mask, incomplete, spec=DORA)
    with pytest.raises(ValueError, match="give the mask of these params"):
        adapter_io.save_adapter(tmp_path / "a", params, incomplete, base, spec=DORA)
    with pytest.raises(ValueError, match="metadata cannot be stored as JSON"):
        adapter_io.save_adapter(tmp_path / "a", params, mask, base, spec=DORA, note={1, 2})
    quantized, quantized_mask = quantize_frozen(
        params, jax.tree.map(lambda _: False, params), "int8")
    with pytest.raises(ValueError, match="classifier/kernel_int8 is not part of the base but was"):
        adapter_io.save_adapter(tmp_path / "a", quantized, quantized_mask, base, spec=DORA)
    assert not (tmp_path / "a").exists()


def test_an_adapter_is_replaced_atomically(tmp_path, monkeypatch):
    _, base, params = saved(tmp_path)
    write = storage.atomic_write
    monkeypatch.setattr(storage, "atomic_write", lambda path: (
        write(path) if path.name != adapter_io.MANIFEST else 1 / 0))
    _, _, other, mask = trained(BERT, "ia3")
    with pytest.raises(ZeroDivisionError):
        adapter_io.save_adapter(tmp_path, other, mask, base, spec="ia3")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), params)
    monkeypatch.undo()
    adapter_io.save_adapter(tmp_path, other, mask, base, spec="ia3")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), other)
    assert len(list(tmp_path.iterdir())) == 2


LORA = "encoder/layer_0/self_attention/query"


def _leaf(path, value):
    """Returns an edit that sets a leaf in the file and the manifest, or removes it from both."""

    def edit(weights, manifest):
        weights.pop(path, None)
        manifest["leaves"].pop(path, None)
        if value is not None:
            weights[path] = np.asarray(value, np.float32)
            manifest["leaves"][path] = {"shape": list(weights[path].shape), "dtype": "float32"}

    return edit


def _field(name, value):
    return lambda weights, manifest: manifest.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_field("weights", "../delta-0.safetensors"), "must be a file delta-.* in the same folder"),
        (_field("weights", "/etc/passwd"), "must be a file"),
        (_field("sha256", "0" * 64), "is corrupted: its SHA-256"),
        (_field("format", 2), "format 2, but this version of the library reads format 1"),
        (_field("format", "1"), "format is '1', not of type int"),
        (_field("leaves", {"a": 3}), "leaf 'a' is 3"),
        (_field("leaves", {}), "in the file but not in the manifest"),
        (_field("recipe", None), "recipe is None, not of type str"),
        (_leaf("../../x", np.ones(2)), "the base has no such parameter"),
        (_leaf("encoder/layer_9/mlp/wi/kernel", np.ones((2, 2))), "the base has no such parameter"),
        (_leaf("pooler/bias", np.ones(9)), r"pooler/bias has shape \(9,\), but \(24,\)"),
        (_leaf(f"{LORA}/lora_a", np.ones((23, 2))), "does not fit the layer of"),
        (_leaf(f"{LORA}/lora_a", np.ones((24, 3))), "does not fit"),
        (_leaf(f"{LORA}/lora_a", None), "other PEFT parameters are missing"),
        (_leaf(f"{LORA}/lora_scale", None), "other PEFT parameters are missing"),
        (_leaf(f"{LORA}/lora_scale", np.ones(2)), "lora_scale .* does not fit"),
        (_leaf(f"{LORA}/lora_magnitude", np.ones(3)), "does not fit"),
        (_leaf(f"{LORA}/ia3_output", np.ones((3, 9))), "does not fit"),
        (_leaf("encoder/layer_0/self_attention/prefix_key", np.ones((2, 3, 8))), "does not fit"),
        (_leaf("encoder/layer_0/mlp_adapter/up/kernel", np.ones((2, 24))), "does not fit"),
        (_leaf("prompt", np.ones((2, 25))), "does not fit"),
        (_leaf("encoder/prompt", np.ones((2, 24))), "encoder/prompt .* does not fit"),
        (_leaf("classifier/kernel/kernel", np.ones((24, 3))), "does not fit"),
        (_leaf("junk/classifier/kernel", np.ones((24, 3))), "does not fit"),
        (_leaf(f"{LORA}/lora_foo", np.ones(())), "lora_foo .* does not fit"),
        (_leaf(f"{LORA}/ia3_foo", np.ones((3, 8))), "ia3_foo .* does not fit"),
        (_leaf(f"{LORA}/ia3_output", np.ones(8)), "ia3_output .* does not fit"),
        (_leaf("classifier/kernel", np.ones((25, 3))), "does not fit"),
        (_leaf("classifier/kernel", np.ones((24, 4))), "classifier/bias .* does not fit"),
    ],
)
def test_corrupted_and_hostile_files(edit, message, tmp_path):
    _, base, _ = saved(tmp_path)
    manifest = json.loads((tmp_path / adapter_io.MANIFEST).read_text())
    weights = load((tmp_path / manifest["weights"]).read_bytes())
    before = manifest["sha256"]
    edit(weights, manifest)
    content = save(weights)
    if manifest["sha256"] == before:
        manifest["sha256"] = hashlib.sha256(content).hexdigest()
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(content)
    (tmp_path / adapter_io.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message) as error:
        adapter_io.load_adapter(tmp_path, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["down/bias", "up/kernel"])
def test_an_incomplete_bottleneck_adapter_is_refused(part, tmp_path):
    _, _, params, mask = trained(BERT, "adapter:3")
    base = small_models.build(BERT, 3)[1]
    incomplete = {path: leaf for path, leaf in flatten_paths(params).items()
            if path != f"encoder/layer_0/mlp_adapter/{part}"}
    adapter_io.save_adapter(tmp_path, unflatten_paths(incomplete), unflatten_paths(
        {path: train for path, train in flatten_paths(mask).items() if path in incomplete}),
        base, spec="adapter:3")
    with pytest.raises(ValueError, match="other PEFT parameters are missing"):
        adapter_io.load_adapter(tmp_path, base)


def test_missing_or_truncated_files(tmp_path):
    _, base, _ = saved(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    manifest = json.loads((tmp_path / adapter_io.MANIFEST).read_text())
    for part in (content[:-1], content[:20], b"", b"\xff" * 100):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="is corrupted"):
            adapter_io.load_adapter(tmp_path, base)
        manifest["sha256"] = hashlib.sha256(part).hexdigest()
        (tmp_path / adapter_io.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="is not a valid safetensors file"):
            adapter_io.load_adapter(tmp_path, base)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole folder of the adapter"):
        adapter_io.load_adapter(tmp_path, base)
    for text, message in (("{", "is not valid JSON"), ("[1]", "holds a list")):
        (tmp_path / adapter_io.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=message):
            adapter_io.load_adapter(tmp_path, base)
    with pytest.raises(FileNotFoundError, match="give a folder that save_adapter wrote"):
        adapter_io.load_adapter(tmp_path / "gone", base)
