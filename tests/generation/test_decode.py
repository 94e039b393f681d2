"""`decode` under `jit`, `vmap` and `scan`, and the users' own logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_models import FAMILIES, GPT, NUM_NEW, PROMPTS, new_tokens, run, varied_model
from small_models import BERT, build

from transformer_jax.generation import decode, decode_step, generate, prefill

KEY = jax.random.key(3)
LENGTHS = np.array([len(prompt) for prompt in PROMPTS])
PADDED = np.array([prompt + [0] * (8 - len(prompt)) for prompt in PROMPTS])


def decoded(params, input_ids, lengths=None, config=GPT, **options):
    return decode(varied_model(config)[0], params, input_ids, lengths,
                  **{"max_new_tokens": NUM_NEW, "pad_token_id": 0, **options})


def forbid_13(scores, sequences):
    return scores.at[:, 13].set(-jnp.inf)


def count_up(scores, sequences):
    """Forces the token that equals the number of new tokens, after the first two."""
    step_B1 = sequences.num_new_tokens[:, None]
    is_other = jnp.arange(scores.shape[1]) != step_B1
    return jnp.where((step_B1 >= 2) & is_other, -jnp.inf, scores)


# ---- decode equals generate


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_under_jit_is_generate(family):
    config = FAMILIES[family]
    out = jax.jit(lambda *args: decoded(*args, config=config))(
        varied_model(config)[1], PADDED, LENGTHS)
    expected = new_tokens(run(config=config), config)
    starts = LENGTHS if family == "gpt" else np.ones(3, int)
    for row, start, new in zip(np.asarray(out.tokens), starts, expected):
        assert row[start : start + NUM_NEW].tolist() == new.tolist()
        assert not row[start + NUM_NEW :].any()
    np.testing.assert_array_equal(out.lengths, starts + NUM_NEW)
    assert out.scores is None and int(out.num_steps) == NUM_NEW


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [13, 36]},
    {"do_sample": True, "rng": KEY, "num_return_sequences": 3, "temperature": 2.0, "top_k": 9},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[13]]},
    {"assistant_model": varied_model(GPT), "num_assistant_tokens": 3, "eos_token_id": 36},
], ids=["beams", "samples", "constraints", "speculative"])
def test_options_are_those_of_generate(options):
    out = decoded(varied_model(GPT)[1], PADDED[1:2], **options)
    expected = run(PROMPTS[1:2], pad_token_id=0, **options)
    np.testing.assert_array_equal(out.tokens[:, : expected.shape[1]], expected)
    assert int(out.lengths.max()) == expected.shape[1]


# ---- vmap and scan


def test_vmap_over_keys_with_a_logits_processor():
    params = varied_model(GPT)[1]

    def sample(params, key):
        return decoded(params, PADDED, LENGTHS, rng=key, do_sample=True, temperature=3.0,
                       logits_processors=[forbid_13, count_up]).tokens

    keys = jax.random.split(KEY, 4)
    out = np.asarray(jax.jit(jax.vmap(sample, in_axes=(None, 0)))(params, keys))
    np.testing.assert_array_equal(out[2], jax.jit(sample)(params, keys[2]))
    for i, length in enumerate(LENGTHS):
        new = out[:, i, length : length + NUM_NEW]
        assert (new[:, 2:] == np.arange(2, NUM_NEW)).all() and not (new[:, :2] == 13).any()
        assert len({tuple(row) for row in new[:, :2].tolist()}) > 1


def test_vmap_over_prompts_and_a_traced_value_in_a_processor():
    """A logits processor may use traced values; each prompt has its own forbidden token."""
    params, ids = varied_model(GPT)[1], np.array([[5, 9, 3], [7, 7, 7], [1, 2, 3]])
    free = np.array([decoded(params, ids[i : i + 1]).tokens[0] for i in range(3)])

    def forbid(prompt, token):
        return decoded(params, prompt[None], logits_processors=[
            lambda scores, sequences: scores.at[:, token].set(-jnp.inf)]).tokens[0]

    out = np.asarray(jax.jit(jax.vmap(forbid))(ids, free[:, 3]))
    assert (out[:, 3] != free[:, 3]).all()
    assert not (out[:, 3:] == free[:, 3:4]).any()


@pytest.mark.slow
def test_beam_search_under_vmap_and_decode_in_scan():
    params, ids = varied_model(GPT)[1], np.array([[5, 9, 3], [7, 7, 7]])
    search = {"num_beams": 3, "eos_token_id": [13, 36]}
    out = jax.vmap(lambda prompt: decoded(params, prompt[None], **search).tokens[0])(ids)
    expected = decoded(params, ids, **search).tokens
    np.testing.assert_array_equal(out, expected)
    _, out = jax.lax.scan(
        lambda carry, prompt: (carry, decoded(params, prompt[None], **search).tokens[0]), 0, ids)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("family", ["gpt", "bart"])
def test_a_loop_of_decode_steps_is_greedy_decoding(family):
    config = FAMILIES[family]
    model, params = varied_model(config)
    if family == "gpt":
        prompts, lengths, source = PADDED, LENGTHS, ()
    else:
        prompts, lengths, source = np.full((3, 1), 2), np.ones(3, int), (PADDED, LENGTHS)

    @jax.jit
    def loop(params):
        logits, cache = prefill(model, params, prompts, jnp.asarray(lengths), *source,
                                cache_length=20)

        def next_token(carry, step):
            token_B, cache = carry
            logits, cache = decode_step(
                model, params, token_B[:, None], (lengths + step)[:, None], cache)
            return (logits[:, 0].argmax(-1), cache), token_B

        return jax.lax.scan(next_token, (logits.argmax(-1), cache), jnp.arange(NUM_NEW))[1].T

    np.testing.assert_array_equal(loop(params), new_tokens(run(config=config), config))


# ---- logits processors in generate


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "rng": KEY, "num_return_sequences": 2}, {"num_beams": 3},
    {"assistant_model": varied_model(GPT), "num_assistant_tokens": 3},
    {"streamer": lambda tokens: None},
], ids=["greedy", "samples", "beams", "speculative", "streamed"])
def test_processors_apply_to_every_algorithm(options):
    assert (run(**options)[:, 8:] == 13).any()
    out = run(logits_processors=[forbid_13, count_up], **options)[:, 8:]
    assert not (out[:, :2] == 13).any()
    np.testing.assert_array_equal(out[:, 2:], np.tile(np.arange(2, NUM_NEW), (len(out), 1)))


# ---- invalid input


def test_generate_refuses_traced_arrays():
    model, params = varied_model(GPT)
    for function in (jax.jit(lambda params: generate(model, params, [[1]])),
                     jax.grad(lambda params: generate(model, params, [[1]]).sum())):
        with pytest.raises(ValueError, match=r"^generate is host code.*generation\.decode there\b"):
            function(params)
    with pytest.raises(ValueError, match="generate is host code"):
        jax.vmap(lambda ids: generate(model, params, ids[None]))(PADDED)


@pytest.mark.parametrize(("ids", "options", "message"), [
    ([1, 2], {}, r"input_ids have shape \(2,\); they must have 2 axes"),
    ([[]], {}, r"input_ids have shape \(1, 0\)"),
    ([[1, 61]], {}, "row 0 has token id 61, outside the vocabulary of 61"),
    ([[1, 2]], {"lengths": [3]}, r"lengths are \[3\]; they must be integers from 1 to 2"),
    ([[1, 2]], {"lengths": [0]}, r"lengths are \[0\]; they must be"),
    ([[1, 2]], {"lengths": [1, 1]}, r"lengths have shape \(2,\); give one for each of 1 rows"),
    ([[1]], {"max_new_toknes": 3}, "unknown option max_new_toknes; did you mean max_new"),
    ([[1]], {"streamer": print}, "decode is pure and has no streamer; use generate"),
    ([[1]], {"max_new_tokens": 40}, "1 tokens and 40 new tokens exceed the model's max_length"),
    ([[1]], {"do_sample": True}, "do_sample is True but rng is None"),
    ([[1]], {"logits_processors": [lambda scores, sequences: scores[0]]}, "returned shape"),
])
def test_decode_refuses_invalid_input(ids, options, message):
    with pytest.raises(ValueError, match=message) as error:
        decoded(varied_model(GPT)[1], ids, **options)
    assert "\n" not in str(error.value)


def test_decode_refuses_traced_options_and_bert():
    model, params = varied_model(GPT)
    with pytest.raises(ValueError, match=r"^top_k is a traced array; options of decode are static"):
        jax.jit(lambda k: decode(model, params, [[1]], rng=KEY, do_sample=True, top_k=k))(3)
    with pytest.raises(ValueError, match="BERT does not generate text"):
        decode(*build(BERT), [[1]])


def test_prefill_refuses_invalid_input():
    model, params = varied_model(GPT)
    with pytest.raises(ValueError, match="cache_length is 7, below the 8 columns of the prompts"):
        prefill(model, params, PADDED, cache_length=7)
    with pytest.raises(ValueError, match="source is given for a GPT"):
        prefill(model, params, PADDED, source=PADDED, cache_length=9)
    with pytest.raises(ValueError, match="source is missing for a BART"):
        prefill(*varied_model(FAMILIES["bart"]), PADDED, cache_length=9)
