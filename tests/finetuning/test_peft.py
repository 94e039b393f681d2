"""Every trainable spec on every model family: updates, frozen parameters and outputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from transformer_jax.finetuning import peft, select
from transformer_jax.finetuning.select import (
    NON_TRAINABLE,
    LoRA,
    describe,
    parse_lora,
    split_spec,
    trainable_mask,
)
from transformer_jax.generation import generate
from transformer_jax.nn.layers import Linear
from transformer_jax.objectives import classification
from transformer_jax.train.optimizers import make_optimizer
from transformer_jax.train.step import init_state, make_train_step
from transformer_jax.tree import combine, flatten_paths, map_paths, partition

FAMILIES = {name: config.replace(num_layers=1, dropout_rate=0.0, attention_dropout_rate=0.0)
            for name, config in (("gpt", small_models.GPT2), ("bert", small_models.BERT),
                                 ("bart", small_models.BART))}
# Spec -> number of trainable parameters of BERT besides the classifier's 75; None: not checked.
SPECS = {
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
PEFT_SPECS = re.compile("lora|adapter|prefix|prompt|ia3")
CASES = [("bert", spec) for spec in SPECS] + [
    (family, spec) for family in ("gpt", "bart")
    for spec in (f"{DORA}+ia3", "adapter:8+prefix:3+prompt:3")]


def batch(family):
    tokens = small_models.random_tokens(4, 6)
    padding_mask = np.arange(6) < np.array([6, 5, 4, 6])[:, None]
    return {"tokens": tokens, "padding_mask": padding_mask, "segment_ids": np.zeros_like(tokens),
            "labels": np.arange(4, dtype=np.int32) % 3, "weights": np.ones(4, np.float32)}


@functools.cache
def base(family):
    model, params = small_models.build(FAMILIES[family], 3)
    return model, jax.tree.map(jnp.asarray, params)


def logits(family, params, **inputs):
    data = batch(family) | inputs
    return small_models.forward(
        FAMILIES[family], data["tokens"], method="classification_logits", params=params,
        num_classes=3, padding_mask=data["padding_mask"])


@functools.cache
def three_steps(family, spec):
    """(base, before, mask, state, reports) of three updates with the default optimizer."""
    model, base_params = base(family)
    params, mask = peft.add_and_mask(base_params, spec, jax.random.key(1))
    optimizer = make_optimizer(0.01)
    loss = functools.partial(classification.classification_loss, model.apply)
    step = jax.jit(make_train_step(loss, optimizer, mask))
    state, reports = init_state(params, optimizer, mask), []
    for i in range(3):
        state, report = step(state, batch(family), jax.random.key(i))
        reports.append(report)
    return base_params, params, mask, state, reports


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_only_trainable_parameters_change(family, spec):
    _, before, mask, state, reports = three_steps(family, spec)
    before, after, is_trainable = map(flatten_paths, (before, state.params, mask))
    assert before.keys() == after.keys() == is_trainable.keys()
    for path, leaf in before.items():
        assert after[path].dtype == leaf.dtype
        same = np.asarray(after[path]).tobytes() == np.asarray(leaf).tobytes()
        # Key biases and BERT's pre-training heads have no gradient; weight decay changes matrices.
        has_no_update = re.search(r"key/bias$|^(mlm_head|nsp_head)/", path) and "kernel" not in path
        assert same != is_trainable[path] or (same and has_no_update), path
        assert not (is_trainable[path] and NON_TRAINABLE.search(path))
    count = sum(leaf.size for path, leaf in before.items() if is_trainable[path])
    moments = jax.tree.leaves((optax.tree.get(state.opt_state, "mu"),
                               optax.tree.get(state.opt_state, "nu")))
    assert sum(leaf.size for leaf in moments) == 2 * count
    if family == "bert" and SPECS[spec] is not None:
        assert count == SPECS[spec] + 75 * (spec != "regex:mlp/wo/kernel")
    total = sum(leaf.size for leaf in before.values())
    last = describe(state.params, mask).splitlines()[-1]
    assert f"{count:,}" in last and f"{100 * count / total:.2f} %" in last
    assert all(np.isfinite(report["loss"]) for report in reports)


def test_the_gradient_norm_is_of_the_trainable_parameters():
    """Clipping uses it too: to 1, so Adam's first moment is a tenth of the clipped gradient."""
    model, base_params = base("bert")
    params, mask = peft.add_and_mask(base_params, "lora:4", jax.random.key(1))
    loss = functools.partial(classification.classification_loss, model.apply)
    trainable, frozen = partition(params, mask)
    grads = flatten_paths(jax.jit(jax.grad(
        lambda trainable: 100 * loss(combine(trainable, frozen), batch("bert"))[0] / 4))(trainable))
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in grads.values()))
    optimizer = make_optimizer(0.01)
    step = jax.jit(make_train_step(lambda p, b, rng: (100 * loss(p, b)[0], 4.0, {}), optimizer,
                                   mask))
    state, report = step(init_state(params, optimizer, mask), batch("bert"), None)
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1
    first = flatten_paths(optax.tree.get(state.opt_state, "mu"))
    assert first.keys() == grads.keys()
    for path, leaf in first.items():
        np.testing.assert_allclose(leaf, 0.1 * grads[path] / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), [c for c in CASES if PEFT_SPECS.match(c[1])])
def test_outputs_are_unchanged_at_initialization_and_by_merging(family, spec):
    base_params, before, _, state, _ = three_steps(family, spec)
    initial_change = np.abs(logits(family, before) - logits(family, base_params)).max()
    if "prefix" in spec or "prompt" in spec:
        assert initial_change > 1e-4  # they take part in attention at once
    else:
        assert initial_change <= 1e-5
    after = logits(family, state.params)
    assert np.abs(after - logits(family, base_params)).max() > 1e-3
    if re.search("adapter|prefix|prompt", spec):
        with pytest.raises(ValueError, match=r"cannot be merged into the base model; save the"):
            peft.merge(state.params)
        return
    merged = peft.merge(state.params)
    assert flatten_paths(merged).keys() == flatten_paths(base_params).keys()
    np.testing.assert_allclose(logits(family, merged), after, atol=1e-5)


def test_merge_without_peft_parameters_changes_nothing():
    _, base_params = base("bert")
    merged = flatten_paths(peft.merge(base_params))
    assert all(merged[path] is leaf for path, leaf in flatten_paths(base_params).items())


@pytest.mark.slow
def test_lora_dropout_is_for_training_only():
    model, base_params = base("bert")
    params = peft.add_peft_params(base_params, "lora:2:wo,dropout=0.5", jax.random.key(0))
    params, tokens = randomized(params), small_models.random_tokens(2, 5)
    call = jax.jit(lambda params, rngs: model.apply(
        {"params": params}, tokens, method="classification_logits", deterministic=False, rngs=rngs))
    found = [call(params, {"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
    # A dropout key has no effect if deterministic.
    without_dropout = [
        model.apply({"params": params}, tokens, method="classification_logits", **rngs)
        for rngs in ({}, {"rngs": {"dropout": jax.random.key(1)}})]
    np.testing.assert_array_equal(*without_dropout)
    # The mean over many samples equals the output without dropout.
    layer = {"kernel": jnp.zeros((3, 2)), "lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2)),
             "lora_scale": jnp.float32(2), "lora_dropout": jnp.float32(0.25)}
    out = Linear((2,), use_bias=False).apply({"params": layer}, jnp.ones((20000, 3)), False,
                                             rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(out.mean(0), 6, rtol=0.02)
    np.testing.assert_allclose(np.unique(np.round(out, 4)), [0, 8 / 3, 16 / 3, 8], atol=1e-3)


def test_the_gradient_of_dora_treats_the_norm_as_a_constant():
    """Liu et al. 2024, section 4.3, by hand."""
    rng = np.random.default_rng(0)
    x, w, a, b, m, up = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (
        (5, 4), (4, 3), (4, 2), (2, 3), (3,), (5, 3)))
    scale = 1.5
    layer = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": jnp.float32(scale),
             "lora_magnitude": m}
    linear = Linear((3,), use_bias=False)
    found = jax.grad(lambda p: (linear.apply({"params": p}, x) * up).sum())(layer)
    merged = w + scale * a @ b
    factor = m / jnp.sqrt(jnp.square(merged).sum(0))
    grad_merged = x.T @ (up * factor)  # d loss / d merged, with a constant norm
    for name, expected in (("kernel", grad_merged), ("lora_a", scale * grad_merged @ b.T),
                           ("lora_b", scale * a.T @ grad_merged),
                           ("lora_magnitude", (up * (x @ merged)).sum(0) * factor / m)):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def randomized(params, seed=0):
    """PEFT parameters far from their initial values."""
    rng = np.random.default_rng(seed)

    def randomize(path, leaf):
        if not peft.PEFT_PARAM.search(path) or NON_TRAINABLE.search(path):
            return leaf
        return leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)

    return map_paths(randomize, params)


def greedy(config, params, prompt, count):
    """Greedy decoding, each token from a forward pass over the whole sequence."""
    tokens = np.asarray(prompt)
    width = tokens.shape[1] + count
    for i in range(tokens.shape[1], width):
        padded = np.pad(tokens, ((0, 0), (0, width - i)), constant_values=1)
        out = small_models.forward(config, padded, params=params)
        tokens = np.concatenate([tokens, np.argmax(out.logits[:, i - 1], -1)[:, None]], axis=1)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["prefix:3", "prompt:3", "adapter:2+lora:2:all,dora"])
def test_decoding_with_a_cache_equals_full_forward_passes(spec):
    config = FAMILIES["gpt"]
    model, base_params = small_models.build(config)
    params = randomized(peft.add_peft_params(base_params, spec, jax.random.key(0)))
    prompt = small_models.random_tokens(2, 4)
    expected = greedy(config, params, prompt, 5)
    assert not np.array_equal(expected, greedy(config, base_params, prompt, 5))
    if spec == "prompt:3":
        with pytest.raises(ValueError, match="fold it into prefixes first"):
            generate(model, params, prompt, max_new_tokens=5, eos_token_id=())
        folded = peft.fold_prompt(model, params)
        np.testing.assert_allclose(small_models.forward(config, prompt, params=folded).logits,
                                   small_models.forward(config, prompt, params=params).logits,
                                   atol=1e-5)
        params = folded
    found = generate(model, params, prompt, max_new_tokens=5, eos_token_id=())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "part"), [
    (small_models.GPT2, "decode"), (small_models.BERT, "encode"), (small_models.BART, "encode"),
    (small_models.BART.replace(scale_embedding=True), "encode")])
def test_a_prompt_of_token_embeddings_equals_those_tokens(config, part):
    """A prompt is scaled and normalized like tokens; only positions and segments are not added."""
    _, base_params = small_models.build(config)
    base_params = map_paths(
        lambda path, leaf: leaf * (not re.search("(position|segment)_emb", path)), base_params)
    tokens = small_models.random_tokens(2, 5)
    tokens[:, :2] = tokens[0, :2]
    rows = np.asarray(base_params["token_embed"]["embedding"])[tokens[0, :2]]
    expected = small_models.forward(config, tokens, params=base_params, method=part).hidden[:, 2:]
    found = small_models.forward(config, tokens[:, 2:], params=base_params | {"prompt": rows},
                                 method=part).hidden
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_a_folded_prompt_is_equivalent_with_an_attention_window():
    config = FAMILIES["gpt"].replace(attention_window=2)
    model, base_params = small_models.build(config)
    params = randomized(peft.add_peft_params(base_params, "prompt:5", jax.random.key(0)))
    tokens = small_models.random_tokens(2, 6)
    before, after = (small_models.forward(config, tokens, params=tree).logits
                     for tree in (params, peft.fold_prompt(model, params)))
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_decoder_generates_with_prefixes():
    config = FAMILIES["bart"]
    model, base_params = small_models.build(config)
    params = randomized(peft.add_peft_params(base_params, "prefix:2+prompt:2", jax.random.key(0)))
    source = small_models.random_tokens(2, 5)
    tokens = np.full((2, 1), config.decoder_start_token_id, np.int32)
    for i in range(1, 5):
        padded = np.pad(tokens, ((0, 0), (0, 5 - i)), constant_values=1)
        out = small_models.forward(config, source, params=params, decoder_tokens=padded)
        tokens = np.concatenate([tokens, np.argmax(out.logits[:, i - 1], -1)[:, None]], axis=1)
    found = generate(model, params, source, max_new_tokens=4, eos_token_id=())
    np.testing.assert_array_equal(found, tokens)


def test_prompts_that_cannot_be_folded():
    gpt, base_params = small_models.build(FAMILIES["gpt"])
    bert, _ = base("bert")
    prompt = peft.add_peft_params(base_params, "prompt:2", jax.random.key(0))
    for model, params, message in (
        (bert, prompt, "BERT, in which the prompt attends to the tokens; only"),
        (gpt, base_params, "no prompt to fold"),
        (gpt, peft.add_peft_params(prompt, "prefix:2", jax.random.key(0)), "both prefixes and a"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.fold_prompt(model, params)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), [
    ("gpt", {}), ("bert", {}), ("bart", {}), ("gpt", {"tie_embeddings": False}),
    ("bert", {"tie_embeddings": False})], ids=str)
def test_added_tokens(family, changes):
    config = FAMILIES[family].replace(**changes)
    model, base_params = small_models.build(config)
    params = peft.add_tokens(base_params, 3, jax.random.key(0))
    assert params["token_embed"]["extra"].shape == (3, 24)
    assert flatten_paths(trainable_mask(params, "bitfit"))["token_embed/extra"]
    old = small_models.random_tokens(2, 6)
    name = "mlm_logits" if family == "bert" else "logits"
    target = {"decoder_tokens": old} if family == "bart" else {}
    same, before = (getattr(small_models.forward(config, old, params=tree, **target), name)
                    for tree in (params, base_params))
    np.testing.assert_array_equal(same, before)
    new = np.where(np.arange(6) % 3 == 2, 61 + np.arange(6) // 3, old).astype(np.int32)
    out = getattr(small_models.forward(config, new, params=params, **target), name)
    assert out.shape[-1] == 61 and np.isfinite(out).all()  # inputs only
    folded, folded_params = peft.fold_tokens(model, params)
    assert folded.config.vocab_size == 64 and "extra" not in folded_params["token_embed"]
    again = getattr(small_models.forward(folded.config, new, params=folded_params, **target), name)
    assert again.shape[-1] == 64
    np.testing.assert_allclose(again[..., :61], out, atol=1e-5)
    assert peft.fold_tokens(model, base_params) == (model, base_params)
    with pytest.raises(ValueError, match="num_tokens is 0; it must be at least 1"):
        peft.add_tokens(base_params, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="3 tokens were already added"):
        peft.add_tokens(params, 1, jax.random.key(0))


def test_adding_peft_parameters_is_traceable():
    _, base_params = base("bert")
    make = functools.partial(peft.add_peft_params, spec="lora:2:all,dora+adapter:2+prefix:2")
    abstract = jax.eval_shape(lambda p, rng: make(p, rng=rng), base_params, jax.random.key(0))
    made = make(base_params, rng=jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(made).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}
    unchanged = peft.add_peft_params(base_params, "head+bitfit", jax.random.key(0))
    assert unchanged.keys() == base_params.keys()


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("8", LoRA(8)),
        ("2:query,wo", LoRA(2, ("query", "wo"))),
        ("2:wo,all,wo", LoRA(2, ("wo", "query", "key", "value", "out", "wi"))),
        ("4:alpha=16,dropout=0.05,dora", LoRA(4, alpha=16.0, dropout=0.05, dora=True)),
        ("4:dropout=0,rslora", LoRA(4, rslora=True)),
    ],
)
def test_parse_lora(argument, expected):
    assert parse_lora(argument) == expected


def test_lora_scale():
    assert LoRA(8).scale == 2
    assert LoRA(16, alpha=8.0).scale == 0.5
    assert LoRA(16, alpha=8.0, rslora=True).scale == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lora:0", "lora:0: the size is '0'; it must be an integer"),
        ("lora:-1", "the size is '-1'"),
        ("lora:two", "the size is 'two'"),
        ("lora", "needs an argument, for example lora:8"),
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
        ("prompt:", "needs an argument, for example prompt:16"),
        ("ia3:2", "takes no argument, got '2'"),
        ("layers:3-1", "layers:3-1: the layers must be from 0 to 0"),
        ("layers:9", "layers:9: the layers must be from 0 to 0"),
        ("layers:a-b", "layers:a-b: the layers must be"),
        ("lora:2+lora:4", "already have .*lora_a; merge them first"),
        ("prefix:2+prefix:2", "already have .*prefix_key"),
        ("adpter:2", "did you mean adapter:64"),
    ],
)
def test_invalid_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        peft.add_and_mask(base("bert")[1], spec, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_peft_parameters_that_cannot_be_added_or_trained():
    _, base_params = base("bert")
    once = peft.add_peft_params(base_params, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match=r"already have .*; merge them first"):
        peft.add_peft_params(once, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match="none of 2 parameters belongs to a layer that lora"):
        peft.add_peft_params({"pooler": base_params["pooler"]}, "lora:2", jax.random.key(0))
    with pytest.raises(ValueError, match="have no lora parameters; add them first with"):
        trainable_mask(base_params, "lora:2")


def test_every_term_is_tested():
    assert {name for spec in SPECS for name, _ in split_spec(spec)} == select.SPEC_TERMS.keys()
