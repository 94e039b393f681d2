"""The Transformer and BART: parameter names, masks, cached decoding and task heads."""

import functools

import jax
import numpy as np
import pytest
import small_models
from small_models import BART, LENGTH, TRANSFORMER, VOCAB, build, forward, random_tokens
from test_initial_parameters import block, flat, initialize, key

from transformer_jax.models import BERT, build_model, init_params, presets, shift_right
from transformer_jax.models.heads import last_token_positions

S, T = 7, 9
SOURCE, TARGET = random_tokens(2, S), random_tokens(2, T, seed=1)
MASK = np.arange(S) < np.array([[S], [4]])
PRE_NORM = BART.replace(norm_first=True, num_decoder_layers=1, num_decoder_heads=2,
                        decoder_mlp_dim=16)
CONFIGS = {"transformer": TRANSFORMER, "bart": BART, "pre_norm_unequal": PRE_NORM}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def run(config, source=SOURCE, target=TARGET, **options):
    return forward(config, source, decoder_tokens=np.asarray(target), **options)


def decoder_block(prefix):
    own = block(prefix)
    cross = {name.replace("self_attention", "cross_attention"): shape
             for name, shape in own.items() if "self_attention" in name}
    cross |= {f"{prefix}/cross_attention_norm/{leaf}": (24,) for leaf in ("scale", "bias")}
    return own | cross


LAYERS = {**block("encoder/layer_0"), **block("encoder/layer_1"),
          **decoder_block("decoder/layer_0"), **decoder_block("decoder/layer_1")}
NORMS = {f"{side}_embed_norm/{leaf}": (24,) for side in ("encoder", "decoder")
         for leaf in ("scale", "bias")}
TABLES = {f"{side}_position_embed/embedding": (LENGTH + 2, 24) for side in ("encoder", "decoder")}


def test_names_and_shapes():
    embedding = {"token_embed/embedding": (VOCAB, 24)}
    shapes = {name: leaf.shape for name, leaf in flat(build(TRANSFORMER)[1]).items()}
    assert shapes == embedding | LAYERS
    shapes = {name: leaf.shape for name, leaf in flat(build(BART)[1]).items()}
    assert shapes == embedding | LAYERS | NORMS | TABLES | {"output/bias": (VOCAB,)}
    untied = flat(build(BART.replace(tie_embeddings=False))[1])
    assert untied["lm_head/embedding"].shape == (VOCAB, 24)


def test_sizes_of_the_decoder_may_differ():
    params = build(PRE_NORM)[1]
    assert set(params["decoder"]) == {"layer_0", "final_norm"}
    assert params["decoder"]["layer_0"]["self_attention"]["query"]["kernel"].shape == (24, 2, 12)
    assert params["decoder"]["layer_0"]["mlp"]["wi"]["kernel"].shape == (24, 16)
    assert params["encoder"]["layer_1"]["mlp"]["wi"]["kernel"].shape == (24, 40)


def test_initial_distributions():
    config = TRANSFORMER.replace(num_layers=1, d_model=96, mlp_dim=384, vocab_size=400)
    for path, leaf in flat(initialize(config)(key(3))).items():
        leaf = np.asarray(leaf)
        if path == "token_embed/embedding":
            np.testing.assert_allclose(leaf.std(), 0.2, rtol=0.05)
        elif path.endswith("kernel"):
            # Uniform up to sqrt(6 / (fan_in + fan_out)) of the kernel as a matrix.
            fans = 96 + 384 if "mlp" in path else 2 * 96
            limit = (6 / fans) ** 0.5
            assert 0.98 * limit < np.abs(leaf).max() <= limit, path
            np.testing.assert_allclose(leaf.std(), limit / 3**0.5, rtol=0.05, err_msg=path)


def test_presets_of_the_papers():
    config = presets.transformer_base()
    assert config.init_std == 512**-0.5 and config.embedding_scale == 512**0.5
    assert presets.bart_base().embedding_scale == 1
    assert presets.bart_base().position_table_size == 1026


@pytest.mark.slow
@ALL
def test_decoder_is_causal(config):
    """Bitwise: no target token changes the logits before it."""
    optimized_forward = functools.partial(small_models.forward, optimized=True)

    def logits(target):
        return np.asarray(optimized_forward(config, SOURCE, decoder_tokens=target).logits)

    before = logits(TARGET)
    for j in range(T):
        changed = TARGET.copy()
        changed[:, j] = (changed[:, j] + 1) % VOCAB
        is_changed = (logits(changed) != before).any(-1)
        assert (is_changed == (np.arange(T) >= j)).all(), f"token {j}"


@ALL
def test_every_source_token_changes_every_logit_and_padding_none(config):
    before = np.asarray(run(config, padding_mask=MASK).logits)
    for j in range(S):
        changed = SOURCE.copy()
        changed[:, j] = (changed[:, j] + 1) % VOCAB
        after = np.asarray(run(config, changed, padding_mask=MASK).logits)
        is_changed = np.abs(after - before).max((1, 2)) > 1e-4
        assert is_changed.tolist() == MASK[:, j].tolist(), f"source token {j}"


@pytest.mark.slow
@ALL
def test_cached_decoding_equals_the_full_pass(config):
    """Rows of unequal length: a first chunk of 3 and 5 tokens, then single tokens."""
    model, params = build(config)
    full = np.asarray(run(config, padding_mask=MASK).logits)
    apply = jax.jit(functools.partial(model.apply, {"params": params}), static_argnames="method")
    encoder_hidden = apply(SOURCE, padding_mask=MASK, method="encode").hidden
    lengths = np.array([3, 5])
    positions = np.broadcast_to(np.arange(5), (2, 5))
    out = apply(TARGET[:, :5], encoder_hidden, encoder_padding_mask=MASK, positions=positions,
                cache=model.init_cache(config, 2, T), method="decode")
    position = lengths
    steps = [(out.hidden[np.arange(2), lengths - 1], lengths - 1)]
    for _ in range(4):
        # Later steps use the cross-attention keys and values of the first call.
        out = apply(TARGET[np.arange(2), position][:, None], out.cross_attention_cache,
                    encoder_padding_mask=MASK, positions=position[:, None], cache=out.cache,
                    method="decode")
        steps.append((out.hidden[:, 0], position))
        position = position + 1
    for hidden, position in steps:
        logits = np.asarray(apply(hidden, method="lm_logits"))
        expected = full[np.arange(2), position]
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_left_padding_of_the_target_is_ignored():
    mask = np.arange(T) >= 2
    before = np.asarray(run(TRANSFORMER, decoder_padding_mask=np.stack([mask, mask])).logits)
    changed = TARGET.copy()
    changed[:, :2] = (changed[:, :2] + 1) % VOCAB
    after = np.asarray(run(TRANSFORMER, target=changed,
                           decoder_padding_mask=np.stack([mask, mask])).logits)
    np.testing.assert_array_equal(after[:, 2:], before[:, 2:])
    model, params = build(TRANSFORMER)
    with pytest.raises(ValueError, match="a cache has no slots for padding"):
        model.apply({"params": params}, TARGET, SOURCE, cache={}, padding_mask=mask[None],
                    method="decode")


def test_shift_right_and_the_default_target():
    assert shift_right(np.array([[5, 6, 7]]), 2).tolist() == [[2, 5, 6]]
    expected = run(BART, target=np.concatenate([np.full((2, 1), 2), SOURCE[:, :-1]], 1)).logits
    np.testing.assert_array_equal(forward(BART, SOURCE).logits, expected)


def test_classification_uses_the_last_token_of_the_decoder():
    def class_logits(tokens, mask):
        return np.asarray(forward(BART, tokens, num_classes=3, method="classification_logits",
                                  padding_mask=np.asarray(mask)))

    before = class_logits(SOURCE, MASK)
    assert before.shape == (2, 3)
    changed = SOURCE.copy()
    changed[1, 4:] = 1  # padding of the second row
    np.testing.assert_array_equal(class_logits(changed, MASK), before)
    short = class_logits(SOURCE[1:, :4], MASK[1:, :4])
    np.testing.assert_allclose(short, before[1:], rtol=1e-5, atol=1e-6)


def test_last_token_positions():
    mask = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], bool)
    assert last_token_positions(np.zeros((3, 3)), mask).tolist() == [1, 2, 2]
    assert last_token_positions(np.zeros((3, 3)), None).tolist() == [2, 2, 2]


def test_attention_weights_on_request():
    assert run(TRANSFORMER, padding_mask=MASK).cross_attention == ()
    model, params = build(TRANSFORMER)
    apply = jax.jit(functools.partial(model.apply, output_attentions=True))
    out = apply({"params": params}, SOURCE, TARGET, padding_mask=MASK)
    assert [w.shape for w in out.cross_attention] == [(2, 3, T, S)] * 2
    np.testing.assert_allclose(np.asarray(out.cross_attention[0]).sum(-1), 1, rtol=1e-5)
    assert not np.asarray(out.cross_attention[1])[1, :, :, 4:].any()
    assert [w.shape for w in out.encoder_attention] == [(2, 3, S, S)] * 2


@pytest.mark.slow
def test_position_offset_skips_rows_of_the_table():
    params = build(BART)[1]
    encoder = {"encoder_position_embed": {"embedding": np.roll(
        params["encoder_position_embed"]["embedding"], -2, axis=0)}}
    no_offset = BART.replace(position_offset=0)
    decoder = {"decoder_position_embed": {"embedding": np.roll(
        params["decoder_position_embed"]["embedding"], -2, axis=0)}}
    shifted = jax.tree_util.tree_map_with_path(
        lambda path, x: x[:LENGTH] if "position" in path[0].key else x,
        {**params, **encoder, **decoder})
    np.testing.assert_array_equal(run(no_offset, params=shifted).logits, run(BART).logits)


@pytest.mark.parametrize("changes", [
    {"num_decoder_layers": 0}, {"num_decoder_heads": 5}, {"position_offset": -1},
    {"decoder_mlp_dim": 0}, {"pooler_activation": "sine"}, {"num_segments": -1},
])
def test_invalid_values(changes):
    base = small_models.BERT if set(changes) & {"pooler_activation", "num_segments"} else BART
    with pytest.raises(ValueError, match="it must be"):
        base.replace(**changes)
    with pytest.raises(ValueError, match=r"unsupported task 'chess' of \w+; supported: base"):
        build_model(base, task="chess")


def test_bert_without_segments_and_with_an_offset():
    distil = small_models.BERT.replace(num_segments=0)
    assert "segment_embed" not in build(distil)[1]
    roberta = small_models.BERT.replace(position_offset=2)
    # Padding has no positions, so left padding does not change the tokens.
    tokens = random_tokens(1, 5)
    left = np.concatenate([np.full((1, 3), 7), tokens], 1)
    mask = np.arange(8)[None] >= 3
    expected = forward(roberta, tokens, method="encode").hidden
    actual = forward(roberta, left, method="encode", padding_mask=mask).hidden[:, 3:]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [small_models.GPT2, small_models.BERT, BART],
                         ids=["gpt", "bert", "bart"])
def test_every_task_initializes_its_own_head_only(config):
    names = {}
    for task in build_model(config).METHODS:
        model = build_model(config, 2, task)
        params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        names[task] = set(params)
    assert "classifier" in names["classification"] & names["question_answering"]
    assert "classifier" not in names["base"]
    if build_model(config).__class__ is BERT:
        assert "pooler" not in names["masked_lm"] | names["question_answering"]
        assert {"pooler", "nsp_head"} < names["next_sentence"]


@pytest.mark.slow
def test_token_classification_and_left_padding_of_gpt():
    assert forward(small_models.GPT2, SOURCE, num_classes=4, method="token_classification_logits",
                   params=build(small_models.GPT2, 4)[1]).shape == (2, S, 4)
    left = np.concatenate([np.full((2, 2), 7), SOURCE], 1)
    mask = np.arange(S + 2)[None] >= np.array([[2], [2]])
    # Left padding is ignored, but has positions unless they are given.
    positions = np.arange(S + 2)[None] - 2
    model, params = build(small_models.GPT2)
    out = model.apply({"params": params}, left, padding_mask=mask,
                      positions=np.maximum(np.broadcast_to(positions, left.shape), 0))
    np.testing.assert_allclose(out.logits[:, 2:], forward(small_models.GPT2, SOURCE).logits,
                               rtol=1e-4, atol=1e-5)
