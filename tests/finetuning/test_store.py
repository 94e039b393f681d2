"""Deltas in files, and many tasks on one base."""

import functools
import hashlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load, save

from transformer_jax import __version__
from transformer_jax.finetuning import adapter_io, multi_adapter, peft
from transformer_jax.finetuning.quantize import quantize_frozen
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.models import build_model
from transformer_jax.tree import flatten_paths, map_paths, unflatten_paths

BERT, GPT, BART = (config.replace(num_layers=1) for config in (
    small_models.BERT, small_models.GPT2, small_models.BART))
DORA = "lora:2:query,wi,out,dora"


@functools.cache
def trained(config, recipe, num_classes=3, seed=0):
    """(model, base, params, mask), every trained leaf far from where it began."""
    model, base = small_models.build(config, num_classes)
    base = jax.tree.map(jnp.asarray, base)
    params, mask = peft.add_and_mask(base, recipe, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    trains = flatten_paths(mask)
    params = map_paths(lambda path, leaf: leaf + jnp.asarray(
        0.2 * rng.normal(size=leaf.shape), leaf.dtype) if trains[path] else leaf, params)
    return model, base, params, mask


def saved(folder, config=BERT, recipe=DORA, **options):
    model, base, params, mask = trained(config, recipe)
    adapter_io.save_adapter(folder, params, mask, base, recipe=recipe, **options)
    return model, base, params


def assert_same(ours, theirs):
    ours, theirs = flatten_paths(ours), flatten_paths(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_a_fingerprint_is_of_the_base_alone():
    _, base, params, _ = trained(BERT, DORA)
    known = adapter_io.fingerprint(base)
    assert len(known) == 64
    leaves = flatten_paths(base)
    backwards = unflatten_paths(dict(reversed(leaves.items())))
    assert adapter_io.fingerprint(jax.tree.map(np.asarray, backwards)) == known
    assert adapter_io.fingerprint(jax.device_put(base, jax.devices()[3])) == known
    assert adapter_io.fingerprint(params) == known  # deltas and the classifier are left out
    assert adapter_io.fingerprint(base | {"classifier": {"kernel": np.ones((24, 9))}}) == known
    others = [base | {"pooler": base["pooler"] | {"bias": base["pooler"]["bias"].at[3].add(1e-7)}},
              {name: tree for name, tree in base.items() if name != "pooler"},
              unflatten_paths({path.replace("pooler", "puller"): x for path, x in leaves.items()}),
              base | {"pooler": base["pooler"] | {"bias": base["pooler"]["bias"][None]}}]
    part = {"pooler": base["pooler"]}
    frozen = jax.tree.map(lambda _: False, part)
    small = [quantize_frozen(part, frozen, dtype)[0] for dtype in ("float32", "bfloat16", "int8", "int8")]
    *found, again = [adapter_io.fingerprint(tree) for tree in [base, *others, *small]]
    assert len(set(found)) == len(found)
    assert again == found[-1]


def test_an_encoder_decoder_s_pooler_is_new():
    _, base = small_models.build(BART, 3)
    other = base | {"pooler": {"kernel": np.zeros((24, 24), np.float32)}}
    assert adapter_io.fingerprint(other) == adapter_io.fingerprint(base)


def test_a_fingerprint_is_quick():
    big = {"a": {"kernel": np.ones((5000, 5000), np.float32)}}
    start = time.process_time()
    adapter_io.fingerprint(big)
    assert time.process_time() - start < 2  # seconds for 100 MB


@pytest.mark.parametrize("recipe", [DORA, "lora:4:all,dropout=0.1", "adapter:3", "prefix:2",
                                    "prompt:2", "ia3", "bitfit", "last_k:1", "full", "head",
                                    "regex:mlp/wi/kernel"])
def test_what_was_trained_comes_back(recipe, tmp_path):
    _, base, params = saved(tmp_path, recipe=recipe, task="sst2", label_names=["a", "b", "c"],
                            seed=7)
    # Another fresh classifier, as whoever loads the base has.
    base = base | {"classifier": {"kernel": jnp.zeros((24, 3)), "bias": jnp.zeros(3)}}
    delta = adapter_io.load_adapter(tmp_path, base)
    assert_same(adapter_io.apply_adapter(base, delta), params)
    kept = {k: delta.manifest[k] for k in ("recipe", "task", "label_names", "frozen", "version",
                                           "metadata")}
    assert kept == {"recipe": recipe, "task": "sst2", "label_names": ["a", "b", "c"],
                    "frozen": "float32", "version": __version__, "metadata": {"seed": 7}}
    if recipe == "ia3":
        assert delta.params.keys() == {"encoder", "classifier"}
    if recipe == DORA:
        tokens = small_models.random_tokens(2, 6)
        plain = peft.merge(adapter_io.apply_adapter(base, delta))
        np.testing.assert_allclose(*(small_models.forward(
            BERT, tokens, method="classification_logits", params=tree, num_classes=3)
            for tree in (plain, params)), atol=1e-5)


def test_an_encoder_decoder_and_new_tokens(tmp_path):
    _, base = small_models.build(BART, 3)
    params = peft.add_tokens(base, 2, jax.random.key(1))
    params, mask = peft.add_and_mask(params, "lora:2", jax.random.key(0))
    adapter_io.save_adapter(tmp_path, params, mask, base, recipe="lora:2")
    delta = adapter_io.load_adapter(tmp_path, base)
    assert {"token_embed/extra", "pooler/kernel"} <= flatten_paths(delta.params).keys()
    assert_same(adapter_io.apply_adapter(base, delta), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_over_a_shrunk_base(dtype, tmp_path):
    _, base, params, mask = trained(BERT, "last_k:1")
    small, small_mask = quantize_frozen(params, mask, dtype)
    adapter_io.save_adapter(tmp_path / "a", small, small_mask, base, recipe="last_k:1")
    delta = adapter_io.load_adapter(tmp_path / "a", base)
    assert delta.manifest["frozen"] == dtype
    again = adapter_io.apply_adapter(base, delta)
    assert_same(again, params)
    assert_same(quantize_frozen(again, mask, dtype)[0], small)
    # On a base that is kept small; what trained stands in the place of what was rounded.
    resident = quantize_frozen(base, trainable_mask(base, "head"), dtype)[0]
    with pytest.raises(ValueError, match=f"as it was before `shrink`.*{dtype}"):
        adapter_io.load_adapter(tmp_path / "a", resident)
    assert_same(adapter_io.apply_adapter(resident, delta), small)
    edited, edited_mask = peft.add_and_mask(resident, "lora:2", jax.random.key(0))
    adapter_io.save_adapter(tmp_path / "b", edited, edited_mask, resident, recipe="lora:2")
    assert_same(adapter_io.apply_adapter(resident, adapter_io.load_adapter(tmp_path / "b", resident)), edited)


def test_doubles_are_refused_when_they_are_saved(tmp_path):
    _, _, params, mask = trained(BERT, "head")
    params = params | {"classifier": {name: np.asarray(leaf, np.float64)
                                      for name, leaf in params["classifier"].items()}}
    with pytest.raises(ValueError, match="classifier/bias is of float64; a delta holds float32"):
        adapter_io.save_adapter(tmp_path, params, mask, small_models.build(BERT, 3)[1], recipe="head")
    assert not list(tmp_path.iterdir())


def test_trained_halves_stay_halves(tmp_path):
    _, base, params, mask = trained(BERT, "bitfit")
    trains = flatten_paths(mask)
    halves = map_paths(
        lambda path, x: x.astype(jnp.bfloat16) if trains[path] else x, params)
    adapter_io.save_adapter(tmp_path, halves, mask, base, recipe="bitfit")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), halves)


def test_another_base_is_refused(tmp_path):
    _, base, _ = saved(tmp_path)
    other = base | {"pooler": jax.tree.map(lambda x: x + 1, base["pooler"])}
    with pytest.raises(ValueError, match="load the checkpoint") as error:
        adapter_io.load_adapter(tmp_path, other)
    for tree in (base, other):
        assert adapter_io.fingerprint(tree)[:16] in str(error.value)
    assert "\n" not in str(error.value)


def test_frozen_parameters_must_be_the_base_s(tmp_path):
    _, base, params, mask = trained(BERT, DORA)
    moved = params | {"pooler": jax.tree.map(lambda x: x + 1, params["pooler"])}
    with pytest.raises(ValueError, match=r"pooler/.* did not train, but differs"):
        adapter_io.save_adapter(tmp_path / "a", moved, mask, base, recipe=DORA)
    less = {name: tree for name, tree in base.items() if name != "pooler"}
    with pytest.raises(ValueError, match=r"pooler/.* did not train, and the base has no such"):
        adapter_io.save_adapter(tmp_path / "a", params, mask, less, recipe=DORA)
    with pytest.raises(ValueError, match="give the mask of these params"):
        adapter_io.save_adapter(tmp_path / "a", params, less, base, recipe=DORA)
    with pytest.raises(ValueError, match="metadata is not for JSON"):
        adapter_io.save_adapter(tmp_path / "a", params, mask, base, recipe=DORA, note={1, 2})
    small, small_mask = quantize_frozen(params, jax.tree.map(lambda _: False, params), "int8")
    with pytest.raises(ValueError, match="classifier/kernel_int8 is no part of the base, but was"):
        adapter_io.save_adapter(tmp_path / "a", small, small_mask, base, recipe=DORA)
    assert not (tmp_path / "a").exists()


def test_a_delta_is_replaced_in_one_step(tmp_path, monkeypatch):
    _, base, params = saved(tmp_path)
    monkeypatch.setattr(adapter_io, "_write", lambda path, content: (
        path.write_bytes(content) if path.name != adapter_io.MANIFEST else 1 / 0))
    _, _, other, mask = trained(BERT, "ia3")
    with pytest.raises(ZeroDivisionError):
        adapter_io.save_adapter(tmp_path, other, mask, base, recipe="ia3")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), params)
    monkeypatch.undo()
    adapter_io.save_adapter(tmp_path, other, mask, base, recipe="ia3")
    assert_same(adapter_io.apply_adapter(base, adapter_io.load_adapter(tmp_path, base)), other)
    assert len(list(tmp_path.iterdir())) == 2


LORA = "encoder/layer_0/self_attention/query"


def _leaf(path, value):
    """Puts a leaf into the file and the manifest, or takes it out of both."""

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
        (_field("weights", "../delta-0.safetensors"), "must be a file delta-.* beside it"),
        (_field("weights", "/etc/passwd"), "must be a file"),
        (_field("sha256", "0" * 64), "is damaged: its hash"),
        (_field("format", 2), "format 2, and this library reads 1"),
        (_field("format", "1"), "format is '1', no int"),
        (_field("leaves", {"a": 3}), "leaf 'a' is 3"),
        (_field("leaves", {}), "in the file, not in the manifest"),
        (_field("recipe", None), "recipe is None, no str"),
        (_leaf("../../x", np.ones(2)), "the base no such parameter"),
        (_leaf("encoder/layer_9/mlp/wi/kernel", np.ones((2, 2))), "the base no such parameter"),
        (_leaf("pooler/bias", np.ones(9)), r"pooler/bias has shape \(9,\), but \(24,\)"),
        (_leaf(f"{LORA}/lora_a", np.ones((23, 2))), "does not fit the base's layer"),
        (_leaf(f"{LORA}/lora_a", np.ones((24, 3))), "does not fit"),
        (_leaf(f"{LORA}/lora_a", None), "parts of it are missing"),
        (_leaf(f"{LORA}/lora_scale", None), "parts of it are missing"),
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
def test_damaged_and_hostile_files(edit, message, tmp_path):
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
def test_an_adapter_that_lacks_a_part(part, tmp_path):
    _, _, params, mask = trained(BERT, "adapter:3")
    base = small_models.build(BERT, 3)[1]
    lame = {path: leaf for path, leaf in flatten_paths(params).items()
            if path != f"encoder/layer_0/mlp_adapter/{part}"}
    adapter_io.save_adapter(tmp_path, unflatten_paths(lame), unflatten_paths(
        {path: train for path, train in flatten_paths(mask).items() if path in lame}),
        base, recipe="adapter:3")
    with pytest.raises(ValueError, match="parts of it are missing"):
        adapter_io.load_adapter(tmp_path, base)


def test_files_that_are_missing_or_cut_off(tmp_path):
    _, base, _ = saved(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    manifest = json.loads((tmp_path / adapter_io.MANIFEST).read_text())
    for part in (content[:-1], content[:20], b"", b"\xff" * 100):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="is damaged"):
            adapter_io.load_adapter(tmp_path, base)
        manifest["sha256"] = hashlib.sha256(part).hexdigest()
        (tmp_path / adapter_io.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="is no safetensors file"):
            adapter_io.load_adapter(tmp_path, base)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="copy the delta's whole folder"):
        adapter_io.load_adapter(tmp_path, base)
    for text, message in (("{", "is no JSON"), ("[1]", "holds a list")):
        (tmp_path / adapter_io.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=message):
            adapter_io.load_adapter(tmp_path, base)
    with pytest.raises(FileNotFoundError, match="give a folder that save_delta wrote"):
        adapter_io.load_adapter(tmp_path / "gone", base)


MIXES = {
    "unlike": (BERT, [(DORA, 3), ("lora:4:all,dropout=0.1", 3), ("lora:1+layernorm", 5),
                      ("adapter:3", 2), ("ia3", 4), ("last_k:1", 4)]),
    "prefixes": (BERT, [("prefix:2+prompt:2", 3), ("prefix:2+prompt:2+bitfit", 4)]),
    "gpt": (GPT.replace(classifier_bias=False), [(DORA, 2), ("adapter:2", 3)]),
    "bart": (BART, [("lora:2", 2), ("head", 3)]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_each_row_by_its_own_task(mix):
    config, tasks = MIXES[mix]
    widest = max(classes for _, classes in tasks)
    base = small_models.build(config, widest)[1]
    made = [trained(config, recipe, classes, seed)[2]
            for seed, (recipe, classes) in enumerate(tasks)]
    # The base of all is one; only classifiers are as wide as their tasks'.
    stacked = multi_adapter.stack_adapters(made, base)
    ids = np.array([*range(len(tasks)), 0, 1])
    tokens = small_models.random_tokens(len(ids), 7)
    mask = np.arange(7) < np.arange(len(ids))[:, None] % 4 + 4
    run = jax.jit(functools.partial(multi_adapter.apply_per_row, build_model(config, widest).apply,
                                    method="classification_logits"))
    logits = run(base, stacked, ids, tokens, padding_mask=mask)
    assert logits.shape == (len(ids), widest)
    for row, task in enumerate(ids):
        alone = small_models.forward(config, tokens[row:row + 1], method="classification_logits",
                                     params=made[task], num_classes=tasks[task][1],
                                     padding_mask=mask[row:row + 1])
        classes = tasks[task][1]
        np.testing.assert_allclose(logits[row, :classes], alone[0], atol=1e-6, rtol=1e-6)
        assert (logits[row, classes:] == -np.inf).all()


def test_no_task_answers_for_another_under_jit():
    base = small_models.build(BERT, 3)[1]
    stacked = multi_adapter.stack_adapters([trained(BERT, "ia3", 3)[2], trained(BERT, "head", 2)[2]], base)
    run = jax.jit(functools.partial(multi_adapter.apply_per_row, build_model(BERT, 3).apply,
                                    method="classification_logits"))
    logits = run(base, stacked, np.array([0, 1, 2, -1]), small_models.random_tokens(4, 5))
    assert np.isnan(logits[2:]).all() and not np.isnan(logits[:2]).any()


def test_the_method_is_known_however_it_is_named():
    base = small_models.build(BERT, 3)[1]
    model, tokens = build_model(BERT, 3), small_models.random_tokens(2, 5)
    stacked = multi_adapter.stack_adapters([trained(BERT, "ia3", 3)[2], trained(BERT, "head", 2)[2]], base)
    for apply, named in (
        (functools.partial(model.apply, method="classification_logits"), {}),
        (model.apply, {"method": type(model).classify}),
    ):
        logits = multi_adapter.apply_per_row(apply, base, stacked, [0, 1], tokens, **named)
        assert logits[1, 2] == -np.inf and np.isfinite(logits[0]).all()
    with pytest.raises(ValueError, match="name its method, such as method='classify'"):
        multi_adapter.apply_per_row(lambda *args: model.apply(*args, method="classification_logits"), base, stacked,
                         [0, 1], tokens)


def test_a_kernel_of_one_task_on_a_base_in_int8():
    base = small_models.build(BERT, 3)[1]
    resident = quantize_frozen(base, trainable_mask(base, "head"), "int8")[0]
    parts = []
    for recipe in ("last_k:1", "lora:2"):
        _, _, params, mask = trained(BERT, recipe)
        trains = flatten_paths(mask)
        parts.append(unflatten_paths({path: leaf for path, leaf in flatten_paths(params).items()
                                      if trains[path] or path.endswith("lora_scale")}))
    tokens = small_models.random_tokens(2, 5)
    run = jax.jit(functools.partial(multi_adapter.apply_per_row, build_model(BERT, 3).apply,
                                    method="classification_logits"))
    logits = run(resident, multi_adapter.stack_adapters(parts, resident), np.arange(2), tokens)
    for i, part in enumerate(parts):
        alone = small_models.forward(BERT, tokens[i:i + 1], method="classification_logits", num_classes=3,
                                     params=adapter_io.apply_adapter(resident, part))
        np.testing.assert_allclose(logits[i], alone[0], atol=2e-6)


def test_the_base_is_not_copied_by_row():
    """As many operations as a plain batch, and no array of a kernel's size for each row."""
    model, base = small_models.build(BERT, 3)
    tasks = [trained(BERT, recipe)[2] for recipe in (DORA, "adapter:3", "ia3")]
    stacked = multi_adapter.stack_adapters(tasks, base)
    tokens, ids = small_models.random_tokens(8, 16), np.arange(8) % 3

    def compiled(call, *args):
        return jax.jit(call).lower(*args).compile()

    each = compiled(functools.partial(multi_adapter.apply_per_row, model.apply, method="classification_logits"),
                    base, stacked, ids, tokens)
    plain = compiled(lambda base, tokens: model.apply({"params": base}, tokens, method="classification_logits"),
                     base, tokens)
    ratio = each.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
    assert 1 < ratio < 1.4, ratio
    text = each.as_text()
    for kernel in ("24,40", "40,24", "24,3,8", "3,8,24"):
        assert f"f32[{kernel}]" in text
        assert f"f32[8,{kernel}]" not in text and f"f32[8,1,{kernel}]" not in text


def test_a_language_model_by_row():
    tasks = [trained(GPT, recipe, 0, seed)[2] for seed, recipe in enumerate((
        "regex:layer_0/mlp/wo", "lora:2"))]
    model, base = small_models.build(GPT)
    tokens = small_models.random_tokens(3, 6)
    run = jax.jit(functools.partial(multi_adapter.apply_per_row, model.apply))
    out = run(base, multi_adapter.stack_adapters(tasks, base), np.array([1, 0, 1]), tokens)
    for row, task in enumerate([1, 0, 1]):
        alone = small_models.forward(GPT, tokens[row:row + 1], params=tasks[task])
        np.testing.assert_allclose(out.logits[row], alone.logits[0], atol=2e-6)


def test_tasks_that_cannot_be_served_together():
    base = small_models.build(BERT, 3)[1]

    def stack(*recipes):
        return multi_adapter.stack_adapters([trained(BERT, recipe)[2] for recipe in recipes], base)

    with pytest.raises(ValueError, match="there are 0 deltas"):
        stack()
    with pytest.raises(ValueError, match=r"prefix_key has the shapes .* one shape"):
        stack("prefix:2", "prefix:3")
    with pytest.raises(ValueError, match=r"task 1 has no .*prefix_key.*batches of their own"):
        stack("prefix:2", "head")
    with pytest.raises(ValueError, match="task 0 has no prompt"):
        stack("head", "prompt:2")
    model, tokens = build_model(BERT, 3), small_models.random_tokens(2, 4)
    stacked = stack("head", "bitfit")
    with pytest.raises(ValueError, match="task 2 is outside the 2 tasks 0 to 1"):
        multi_adapter.apply_per_row(model.apply, base, stacked, [0, 2], tokens, method="classification_logits")
    with pytest.raises(ValueError, match="has 2 rows, and there are 3 task numbers"):
        multi_adapter.apply_per_row(model.apply, base, stacked, [0, 1, 1], tokens, method="classification_logits")
    with pytest.raises(ValueError, match="none of the 2 deltas differs from the base"):
        multi_adapter.stack_adapters([small_models.build(GPT)[1]] * 2, small_models.build(GPT)[1])
