"""Every recipe on every family: what trains, what stays, and what function it is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from transformer_jax.finetuning import peft, select
from transformer_jax.finetuning.select import SETTINGS, describe, split_spec, trainable_mask
from transformer_jax.generation import generate
from transformer_jax.nn.layers import Linear
from transformer_jax.objectives import classification
from transformer_jax.train.optimizers import make_optimizer
from transformer_jax.train.step import init_state, make_train_step
from transformer_jax.tree import combine as joined
from transformer_jax.tree import flatten_paths, map_paths, partition

FAMILIES = {name: config.replace(num_layers=1, dropout_rate=0.0, attention_dropout_rate=0.0)
            for name, config in (("gpt", small_models.GPT2), ("bert", small_models.BERT),
                                 ("bart", small_models.BART))}
# Recipe -> the numbers of BERT's parameters that train, besides the classifier's 75.
RECIPES = {
    "full": None,
    "head": 0,
    "last_k:1": None,
    "layers:0-0": None,
    "embeddings": (61 + 32 + 2) * 24,
    "bitfit": 24 * 9 + 40,
    "layernorm": 3 * 48,
    "lora:4": 2 * 4 * 48,
    "lora:2:all,rslora,dora,dropout=0.2,alpha=3": 4 * 2 * 48 + 2 * 2 * 64 + 5 * 24 + 40,
    "adapter:8": 2 * (2 * 24 * 8 + 8 + 24) + 3 * 48,
    "prefix:3": 2 * 3 * 24,
    "prompt:3": 3 * 24,
    "ia3": 2 * 24 + 40,
    "regex:mlp/wo/kernel": 40 * 24,
    "lora:2:query+layernorm+regex:position_embed": 2 * 48 + 3 * 48 + 32 * 24,
}
DORA = "lora:2:all,rslora,dora,dropout=0.2,alpha=3"
EDITS = re.compile("lora|adapter|prefix|prompt|ia3")
CASES = [("bert", recipe) for recipe in RECIPES] + [
    (family, recipe) for family in ("gpt", "bart")
    for recipe in (f"{DORA}+ia3", "adapter:8+prefix:3+prompt:3")]


def batch(family):
    tokens = small_models.random_tokens(4, 6)
    real = np.arange(6) < np.array([6, 5, 4, 6])[:, None]
    return {"tokens": tokens, "padding_mask": real, "segment_ids": np.zeros_like(tokens),
            "labels": np.arange(4, dtype=np.int32) % 3, "weights": np.ones(4, np.float32)}


@functools.cache
def base(family):
    model, params = small_models.build(FAMILIES[family], 3)
    return model, jax.tree.map(jnp.asarray, params)


def logits(family, params, **inputs):
    data = batch(family) | inputs
    return small_models.forward(
        FAMILIES[family], data["tokens"], method="classification_logits", params=params, num_classes=3,
        padding_mask=data["padding_mask"])


@functools.cache
def three_steps(family, recipe):
    """(base, before, mask, state, reports) of three updates with the default optimizer."""
    model, plain = base(family)
    params, mask = peft.add_and_mask(plain, recipe, jax.random.key(1))
    optimizer = make_optimizer(0.01)
    loss = functools.partial(classification.classification_loss, model.apply)
    step = jax.jit(make_train_step(loss, optimizer, mask))
    state, reports = init_state(params, optimizer, mask), []
    for i in range(3):
        state, report = step(state, batch(family), jax.random.key(i))
        reports.append(report)
    return plain, params, mask, state, reports


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_what_trains_and_what_stays(family, recipe):
    _, before, mask, state, reports = three_steps(family, recipe)
    before, after, trains = map(flatten_paths, (before, state.params, mask))
    assert before.keys() == after.keys() == trains.keys()
    for path, leaf in before.items():
        assert after[path].dtype == leaf.dtype
        same = np.asarray(after[path]).tobytes() == np.asarray(leaf).tobytes()
        # A key's bias and BERT's heads of pre-training have no gradient; decay moves matrices.
        unmoved = re.search(r"key/bias$|^(mlm_head|nsp_head)/", path) and "kernel" not in path
        assert same != trains[path] or (same and unmoved), path
        assert not (trains[path] and SETTINGS.search(path))
    count = sum(leaf.size for path, leaf in before.items() if trains[path])
    moments = jax.tree.leaves((optax.tree.get(state.opt_state, "mu"),
                               optax.tree.get(state.opt_state, "nu")))
    assert sum(leaf.size for leaf in moments) == 2 * count
    if family == "bert" and RECIPES[recipe] is not None:
        assert count == RECIPES[recipe] + 75 * (recipe != "regex:mlp/wo/kernel")
    total = sum(leaf.size for leaf in before.values())
    last = describe(state.params, mask).splitlines()[-1]
    assert f"{count:,}" in last and f"{100 * count / total:.2f} %" in last
    assert all(np.isfinite(report["loss"]) for report in reports)


def test_the_norm_is_of_what_trains():
    """And so is what is clipped, to 1 here: Adam's first moment is a tenth of the gradient."""
    model, plain = base("bert")
    params, mask = peft.add_and_mask(plain, "lora:4", jax.random.key(1))
    loss = functools.partial(classification.classification_loss, model.apply)
    ours, rest = partition(params, mask)
    ours = flatten_paths(jax.jit(jax.grad(
        lambda ours: 100 * loss(joined(ours, rest), batch("bert"))[0] / 4))(ours))
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in ours.values()))
    optimizer = make_optimizer(0.01)
    step = jax.jit(make_train_step(lambda p, b, rng: (100 * loss(p, b)[0], 4.0, {}), optimizer,
                                   mask))
    state, report = step(init_state(params, optimizer, mask), batch("bert"), None)
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1
    first = flatten_paths(optax.tree.get(state.opt_state, "mu"))
    assert first.keys() == ours.keys()
    for path, leaf in first.items():
        np.testing.assert_allclose(leaf, 0.1 * ours[path] / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("family", "recipe"), [c for c in CASES if EDITS.match(c[1])])
def test_an_edit_is_the_same_function_at_first_and_merged(family, recipe):
    plain, before, _, state, _ = three_steps(family, recipe)
    at_first = np.abs(logits(family, before) - logits(family, plain)).max()
    if "prefix" in recipe or "prompt" in recipe:
        assert at_first > 1e-4  # others look at them at once
    else:
        assert at_first <= 1e-5
    after = logits(family, state.params)
    assert np.abs(after - logits(family, plain)).max() > 1e-3
    if re.search("adapter|prefix|prompt", recipe):
        with pytest.raises(ValueError, match=r"has no place in a plain model; keep the deltas"):
            peft.merge(state.params)
        return
    merged = peft.merge(state.params)
    assert flatten_paths(merged).keys() == flatten_paths(plain).keys()
    np.testing.assert_allclose(logits(family, merged), after, atol=1e-5)


def test_what_is_plain_merges_to_itself():
    _, plain = base("bert")
    merged = flatten_paths(peft.merge(plain))
    assert all(merged[path] is leaf for path, leaf in flatten_paths(plain).items())


def test_dropout_of_lora_is_in_training_only():
    model, plain = base("bert")
    params = peft.add_peft_params(plain, "lora:2:wo,dropout=0.5", jax.random.key(0))
    params, tokens = moved(params), small_models.random_tokens(2, 5)
    call = jax.jit(lambda params, rngs: model.apply({"params": params}, tokens, method="classification_logits",
                                                    deterministic=False, rngs=rngs))
    found = [call(params, {"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
    # A key that is there does not mean that there is dropout.
    quiet = [model.apply({"params": params}, tokens, method="classification_logits", **rngs)
             for rngs in ({}, {"rngs": {"dropout": jax.random.key(1)}})]
    np.testing.assert_array_equal(*quiet)
    # The mean over many draws of one linear layer is what it says without dropout.
    layer = {"kernel": jnp.zeros((3, 2)), "lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2)),
             "lora_scale": jnp.float32(2), "lora_dropout": jnp.float32(0.25)}
    out = Linear((2,), use_bias=False).apply({"params": layer}, jnp.ones((20000, 3)), False,
                                             rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(out.mean(0), 6, rtol=0.02)
    np.testing.assert_allclose(np.unique(np.round(out, 4)), [0, 8 / 3, 16 / 3, 8], atol=1e-3)


def test_the_gradient_of_dora_takes_the_norm_as_a_constant():
    """Liu et al. 2024, section 4.3, by hand."""
    rng = np.random.default_rng(0)
    x, w, a, b, m, up = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (
        (5, 4), (4, 3), (4, 2), (2, 3), (3,), (5, 3)))
    scale = 1.5
    layer = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": jnp.float32(scale),
             "lora_magnitude": m}
    linear = Linear((3,), use_bias=False)
    found = jax.grad(lambda p: (linear.apply({"params": p}, x) * up).sum())(layer)
    whole = w + scale * a @ b
    factor = m / jnp.sqrt(jnp.square(whole).sum(0))
    to_whole = x.T @ (up * factor)  # d loss / d whole, the norm a constant
    for name, expected in (("kernel", to_whole), ("lora_a", scale * to_whole @ b.T),
                           ("lora_b", scale * a.T @ to_whole),
                           ("lora_magnitude", (up * (x @ whole)).sum(0) * factor / m)):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def moved(params, seed=0):
    rng = np.random.default_rng(seed)
    return map_paths(lambda path, leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
                     if peft.PEFT_PARAM.search(path) and not SETTINGS.search(path) else leaf, params)


def greedy(config, params, prompt, count):
    """The likeliest tokens, each from a forward pass over the whole text."""
    tokens = np.asarray(prompt)
    width = tokens.shape[1] + count
    for i in range(tokens.shape[1], width):
        padded = np.pad(tokens, ((0, 0), (0, width - i)), constant_values=1)
        out = small_models.forward(config, padded, params=params)
        tokens = np.concatenate([tokens, np.argmax(out.logits[:, i - 1], -1)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize("recipe", ["prefix:3", "prompt:3", "adapter:2+lora:2:all,dora"])
def test_decoding_with_a_cache_is_the_whole_forward(recipe):
    config = FAMILIES["gpt"]
    model, plain = small_models.build(config)
    params = moved(peft.add_peft_params(plain, recipe, jax.random.key(0)))
    prompt = small_models.random_tokens(2, 4)
    expected = greedy(config, params, prompt, 5)
    assert not np.array_equal(expected, greedy(config, plain, prompt, 5))
    if recipe == "prompt:3":
        with pytest.raises(ValueError, match="fold it into prefixes first"):
            generate(model, params, prompt, max_new_tokens=5, eos_token_id=())
        folded = peft.fold_prompt(model, params)
        np.testing.assert_allclose(small_models.forward(config, prompt, params=folded).logits,
                                   small_models.forward(config, prompt, params=params).logits,
                                   atol=1e-5)
        params = folded
    found = generate(model, params, prompt, max_new_tokens=5, eos_token_id=())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("config", "part"), [
    (small_models.GPT2, "decode"), (small_models.BERT, "hidden"), (small_models.BART, "encode"),
    (small_models.BART.replace(scale_embedding=True), "encode")])
def test_a_prompt_of_token_rows_is_those_tokens(config, part):
    """Scale and normalization of the embedding are the tokens' own; but for the places."""
    _, plain = small_models.build(config)
    plain = map_paths(lambda path, leaf: leaf * (not re.search("(position|segment)_emb", path)),
                      plain)
    tokens = small_models.random_tokens(2, 5)
    tokens[:, :2] = tokens[0, :2]
    rows = np.asarray(plain["token_embed"]["embedding"])[tokens[0, :2]]
    whole = small_models.forward(config, tokens, params=plain, method=part).hidden[:, 2:]
    found = small_models.forward(config, tokens[:, 2:], params=plain | {"prompt": rows},
                                 method=part).hidden
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_a_folded_prompt_is_the_same_in_a_limited_context():
    config = FAMILIES["gpt"].replace(attention_window=2)
    model, plain = small_models.build(config)
    params = moved(peft.add_peft_params(plain, "prompt:5", jax.random.key(0)))
    tokens = small_models.random_tokens(2, 6)
    before, after = (small_models.forward(config, tokens, params=tree).logits
                     for tree in (params, peft.fold_prompt(model, params)))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_an_encoder_decoder_writes_with_prefixes():
    config = FAMILIES["bart"]
    model, plain = small_models.build(config)
    params = moved(peft.add_peft_params(plain, "prefix:2+prompt:2", jax.random.key(0)))
    source = small_models.random_tokens(2, 5)
    tokens = np.full((2, 1), config.decoder_start_token_id, np.int32)
    for i in range(1, 5):
        padded = np.pad(tokens, ((0, 0), (0, 5 - i)), constant_values=1)
        out = small_models.forward(config, source, params=params, decoder_tokens=padded)
        tokens = np.concatenate([tokens, np.argmax(out.logits[:, i - 1], -1)[:, None]], axis=1)
    found = generate(model, params, source, max_new_tokens=4, eos_token_id=())
    np.testing.assert_array_equal(found, tokens)


def test_what_cannot_be_folded():
    gpt, plain = small_models.build(FAMILIES["gpt"])
    bert, _ = base("bert")
    prompt = peft.add_peft_params(plain, "prompt:2", jax.random.key(0))
    for model, params, message in (
        (bert, prompt, "BERT, whose prompt sees the tokens; only GPT's"),
        (gpt, plain, "no prompt to fold"),
        (gpt, peft.add_peft_params(prompt, "prefix:2", jax.random.key(0)), "prefixes besides"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.fold_prompt(model, params)


@pytest.mark.parametrize(("family", "changes"), [
    ("gpt", {}), ("bert", {}), ("bart", {}), ("gpt", {"tie_embeddings": False}),
    ("bert", {"tie_embeddings": False})], ids=str)
def test_new_tokens(family, changes):
    config = FAMILIES[family].replace(**changes)
    model, plain = small_models.build(config)
    params = peft.add_tokens(plain, 3, jax.random.key(0))
    assert params["token_embed"]["extra"].shape == (3, 24)
    assert flatten_paths(trainable_mask(params, "bitfit"))["token_embed/extra"]
    old = small_models.random_tokens(2, 6)
    name = "mlm_logits" if family == "bert" else "logits"
    target = {"decoder_tokens": old} if family == "bart" else {}
    same, before = (getattr(small_models.forward(config, old, params=tree, **target), name)
                    for tree in (params, plain))
    np.testing.assert_array_equal(same, before)
    new = np.where(np.arange(6) % 3 == 2, 61 + np.arange(6) // 3, old).astype(np.int32)
    out = getattr(small_models.forward(config, new, params=params, **target), name)
    assert out.shape[-1] == 61 and np.isfinite(out).all()  # inputs only
    folded, whole = peft.fold_tokens(model, params)
    assert folded.config.vocab_size == 64 and "extra" not in whole["token_embed"]
    again = getattr(small_models.forward(folded.config, new, params=whole, **target), name)
    assert again.shape[-1] == 64
    np.testing.assert_allclose(again[..., :61], out, atol=1e-5)
    assert peft.fold_tokens(model, plain) == (model, plain)
    with pytest.raises(ValueError, match="count is 0; add at least 1"):
        peft.add_tokens(plain, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="have 3 new tokens already"):
        peft.add_tokens(params, 1, jax.random.key(0))


def test_deltas_are_pure():
    _, plain = base("bert")
    make = functools.partial(peft.add_peft_params, recipe="lora:2:all,dora+adapter:2+prefix:2")
    abstract = jax.eval_shape(lambda p, rng: make(p, rng=rng), plain, jax.random.key(0))
    made = make(plain, rng=jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(made).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}
    assert peft.add_peft_params(plain, "head+bitfit", jax.random.key(0)).keys() == plain.keys()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("8", peft.LoRA(8)),
        ("2:query,wo", peft.LoRA(2, ("query", "wo"))),
        ("2:wo,all,wo", peft.LoRA(2, ("wo", "query", "key", "value", "out", "wi"))),
        ("4:alpha=16,dropout=0.05,dora", peft.LoRA(4, alpha=16.0, dropout=0.05, dora=True)),
        ("4:dropout=0,rslora", peft.LoRA(4, rslora=True)),
    ],
)
def test_settings_of_lora(argument, expected):
    assert peft.parse_lora(argument) == expected


def test_scales_of_lora():
    assert peft.LoRA(8).scale == 2
    assert peft.LoRA(16, alpha=8.0).scale == 0.5
    assert peft.LoRA(16, alpha=8.0, rslora=True).scale == 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("lora:0", "lora:0: the size is '0'; it must be a whole number"),
        ("lora:-1", "the size is '-1'"),
        ("lora:two", "the size is 'two'"),
        ("lora", "needs an argument; write for example lora:8"),
        ("lora:8:qurey", "unknown target or option 'qurey'; targets are query, key"),
        ("lora:8:alpha=-1", "alpha of lora is '-1'; it must be a number above 0"),
        ("lora:8:alpha=x", "alpha of lora is 'x'"),
        ("lora:8:alpha=inf", "alpha of lora is 'inf'"),
        ("lora:8:dropout=1", "dropout of lora is '1'; it must be at least 0 and below 1"),
        ("lora:8:dropout=-0.1", "dropout of lora is '-0.1'"),
        ("lora:8:dora=1", "unknown target or option 'dora=1'"),
        ("adapter:x", "adapter:x: the size is 'x'.*for example adapter:8"),
        ("adapter:0", "the size is '0'"),
        ("prefix:1.5", "the size is '1.5'"),
        ("prompt:", "needs an argument; write for example prompt:16"),
        ("ia3:2", "takes no argument, got '2'"),
        ("layers:3-1", "layers:3-1: the layers have to be from 0 to 0"),
        ("layers:9", "layers:9: the layers have to be from 0 to 0"),
        ("layers:a-b", "layers:a-b: the layers have to be"),
        ("lora:2+lora:4", "have .*lora_a already; merge what was trained before"),
        ("prefix:2+prefix:2", "have .*prefix_key already"),
        ("adpter:2", "did you mean 'adapter'"),
    ],
)
def test_recipes_that_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message) as error:
        peft.add_and_mask(base("bert")[1], recipe, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_deltas_that_have_no_place():
    _, plain = base("bert")
    once = peft.add_peft_params(plain, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match="already; merge what was trained before"):
        peft.add_peft_params(once, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match="lora finds nothing to edit among 2 parameters"):
        peft.add_peft_params({"pooler": plain["pooler"]}, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match="have no lora; add it first: deltas"):
        trainable_mask(plain, "lora:2")


def test_every_recipe_is_tried():
    assert {name for recipe in RECIPES for name, _ in split_spec(recipe)} == select.SPECS.keys()
