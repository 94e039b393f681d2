"""Options of `generate`: defaults, validation, and what is compiled."""

import jax
import numpy as np
import pytest
import small_models
from generation_models import FAMILIES, GPT, PROMPTS, new_tokens, run, varied_model
from small_models import VOCAB

from transformer_jax.generation import api, generate, options
from transformer_jax.generation.options import GenerateOptions
from transformer_jax.generation.padding import bad_words_table, power_of_two_length

BART = FAMILIES["bart"]
COMPILED = (api._run_compiled, api._start_compiled)


def num_programs() -> int:
    return sum(function._cache_size() for function in COMPILED)


# ---- compilation


def test_power_of_two_length():
    assert [power_of_two_length(n, 100) for n in (1, 16, 17, 32, 33, 64, 65, 100)] == [
        16, 16, 32, 32, 64, 64, 100, 100]
    assert power_of_two_length(3, 8) == 8


def test_one_program_for_each_padded_length():
    run()
    run(do_sample=True, rng=jax.random.key(0))
    size = num_programs()
    # The same padded lengths (16 for the prompt and 32 in all), other token counts and options.
    run([[1], [2], [3, 4]], max_new_tokens=15)
    run([[1] * 16, [2], [3, 4]], max_new_tokens=1, eos_token_id=3, pad_token_id=9)
    run(eos_token_id=[1, 2], min_new_tokens=2, forced_eos_token_id=5, repetition_penalty=1.2)
    run(suppress_tokens=[1, 2], begin_suppress_tokens=[4])
    for seed, limits in enumerate(
            ({"temperature": 0.3}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {})):
        run(do_sample=True, rng=jax.random.key(seed), **limits)
    # An equal model object with other parameters.
    model, params = varied_model(GPT)
    again = type(model)(GPT.replace())
    generate(again, jax.tree.map(np.copy, params), PROMPTS, max_new_tokens=12)
    assert num_programs() == size
    # A longer prompt needs another program; the first is kept.
    run([[1] * 17, [2], [3]], max_new_tokens=15)
    run([[1] * 20, [2], [3]], max_new_tokens=12)
    run()
    assert num_programs() <= size + 1


def test_one_program_for_each_padded_source_length():
    search = {"config": BART, "num_beams": 3, "max_new_tokens": 12, "eos_token_id": [57, 58, 59]}
    run(**search)
    size = num_programs()
    run([[1], [2], [3] * 16], forced_bos_token_id=4, **search)
    run(**search | {"max_new_tokens": 3}, length_penalty=0.3, early_stopping="never",
        min_new_tokens=2, forced_eos_token_id=5)
    run(early_stopping=True, decoder_start_token_id=[1, 2, 3], num_return_sequences=2,
        **search | {"eos_token_id": [1, 2, 3]})
    assert num_programs() == size


# ---- defaults


def test_special_token_ids():
    names = ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
             "suppress_tokens", "begin_suppress_tokens", "decoder_start_token_id")

    def found(config, **given):
        out = options.special_token_ids(
            config, GenerateOptions(**given), is_encoder_decoder=config is not GPT)
        return [out[name].tolist() for name in names if name in out]

    assert found(GPT) == [[]] * 6
    assert found(GPT, eos_token_id=[7, 8]) == [[7, 8], [7], [], [], [], []]
    bart = BART.replace(eos_token_id=2, pad_token_id=1, forced_bos_token_id=3,
                        forced_eos_token_id=(2, 4), bos_token_id=9)
    assert found(bart) == [[2], [1], [3], [2, 4], [], [], [2]]
    assert found(bart, eos_token_id=(), forced_bos_token_id=(), pad_token_id=6) == [
        [], [6], [], [2, 4], [], [], [2]]
    # As in Hugging Face Transformers, the default decoder start token is "bos".
    assert found(bart.replace(decoder_start_token_id=None))[-1] == [9]
    assert found(bart, decoder_start_token_id=5)[-1] == [5]


@pytest.mark.parametrize(
    ("given", "longest", "expected"),
    [
        ({}, 8, (20, 0)),
        ({}, 30, (10, 0)),  # up to the last position
        ({"max_length": 13, "min_length": 10}, 6, (5, 2)),  # both include the width of the prompts
        ({"max_new_tokens": 9, "min_new_tokens": 4, "min_length": 10}, 8, (9, 4)),
        ({"max_new_tokens": 9, "min_length": 3}, 8, (9, 0)),
    ],
)
def test_new_token_limits(given, longest, expected):
    assert options.new_token_limits(
        GenerateOptions(**given), width=8, longest=longest, max_positions=40,
        name="prompt") == expected


def test_default_padding_token_is_the_end_token():
    end = int(new_tokens(run())[0, 3])
    assert run(eos_token_id=end)[0, 0] == end


def test_number_of_beam_candidates():
    """Enough for every end token and `num_beams` others, up to the vocabulary size of 4."""
    def num_candidates(ends):
        found, _ = options.prepare(
            GPT.replace(vocab_size=4), GenerateOptions(num_beams=3, eos_token_id=ends),
            is_encoder_decoder=False, num_rows=1, width=3, longest=3, max_positions=40,
            round_up=True)
        return found.num_beam_candidates

    assert [num_candidates(ends) for ends in ([], [1], [1, 2], [0, 1, 2, 3])] == [6, 6, 9, 12]


def test_bad_words_table_has_power_of_two_sizes():
    table = bad_words_table([[4], [1, 2, 3], [7], [5, 6]], [7], VOCAB)
    np.testing.assert_array_equal(table, [
        [-1, -1, -1, 4], [-1, 1, 2, 3], [-1, -1, 5, 6], [-1, -1, -1, -1]])
    assert bad_words_table([[7]], [7], VOCAB).shape == (0, 1)
    assert bad_words_table(None, [], VOCAB).shape == (0, 1)


# ---- invalid input

SAMPLE = {"do_sample": True, "rng": jax.random.key(0)}
BEAMS = {"num_beams": 2}
EMPTY = np.zeros((0, 3), int)
BERT = small_models.BERT


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([[1], []], {}, r"prompts \[1\] of 2 are empty; give each at least one"),
        ([], {}, r"prompts \[\] of 0 are empty"),
        (EMPTY, {}, r"prompts \[\] of 0 are empty"),
        ([1, 2], {}, r"prompts have shapes \[\(\), \(\)\]; give a batch"),
        ([[1], [2, VOCAB]], {}, "row 1 has token id 61, outside the vocabulary of 61; use"),
        ([[-1]], {}, "row 0 has token id -1, outside"),
        ([[1.5]], {}, "row 0 has token ids of type float64; give integers"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
        ([[1] * 30], {"max_new_tokens": 11},
         "prompt of 30 tokens and 11 new tokens exceed the model's max_length of 40; ask for at "
         "most 10 new"),
        ([[1] * 40], {"max_new_tokens": None},
         "prompt of 40 tokens and 1 new tokens exceed the model's max_length of 40; ask for at "
         "most 0 new"),
        ([[1]], {"max_length": 9}, "max_new_tokens is 12 and max_length is 9; give only one"),
        ([[1, 2]], {"max_length": 2, "max_new_tokens": None},
         "max_length is 2, which includes the 2 tokens of the prompt; it must be at least 3"),
        ([[1]], {"min_new_tokens": -1}, "min_new_tokens is -1; it must be"),
        ([[1]], {"min_length": 1.5}, "min_length is 1.5; it must be"),
        ([[1]], {"min_new_tokens": 13},
         "the minimum is 13 new tokens but the maximum is 12; lower"),
        ([[1]], {"min_length": 14}, "the minimum is 13 new tokens"),
        ([[1]], {"eos_token_id": 61}, "eos_token_id has token id 61, outside the vocabulary"),
        ([[1]], {"eos_token_id": [3, -1]}, "eos_token_id has token id -1, outside"),
        ([[1]], {"pad_token_id": 61}, "pad_token_id has token id 61, outside the vocabulary"),
        ([[1]], {"pad_token_id": [1, 2]}, r"pad_token_id is \[1, 2\]; give one id"),
        ([[1]], {"suppress_tokens": [61]}, "suppress_tokens has token id 61, outside"),
        ([[1]], {"begin_suppress_tokens": 61}, "begin_suppress_tokens has token id 61, outside"),
        ([[1]], {"forced_eos_token_id": 61}, "forced_eos_token_id has token id 61, outside"),
        ([[1]], {"forced_bos_token_id": 3}, "forced_bos_token_id is 3 but the model is not"),
        ([[1]], {"decoder_start_token_id": 3}, "decoder_start_token_id is 3 but the model is not"),
        ([[1]], {"bad_words_ids": [[1, 61]]}, "bad_words_ids 0 has token id 61, outside"),
        ([[1]], {"bad_words_ids": [[1], []]}, r"bad_words_ids \[1\] have no tokens; omit"),
        ([[1, 2], [3, 4]], {"attention_mask": [[1, 1]]}, "attention_mask has rows of shapes"),
        ([[1, 2]], {"attention_mask": [[1]]}, "attention_mask has rows of shapes"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, r"prompts \[0\] of 1 are empty"),
        ([[1]], {**SAMPLE, "temperature": 0.0},
         r"temperature is 0.0; it must be above 0 \(do_sample=False"),
        ([[1]], {**SAMPLE, "temperature": float("nan")}, "temperature is nan"),
        ([[1]], {**SAMPLE, "top_k": 0}, "top_k is 0; it must be an integer of at least 1, or None"),
        ([[1]], {**SAMPLE, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ([[1]], {**SAMPLE, "top_p": 1.1}, "top_p is 1.1; it must be"),
        ([[1]], {**SAMPLE, "min_p": 1.1}, "min_p is 1.1; it must be from 0 to 1"),
        ([[1]], {**SAMPLE, "rng": None}, "do_sample is True but rng is None; pass rng="),
        ([[1]], {"top_k": 5}, "top_k is 5 but do_sample is False; pass do_sample=True or omit"),
        ([[1]], {"temperature": 0.5}, "temperature is 0.5 but do_sample is False"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0; 1 is"),
        ([[1]], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; it must be"),
        ([[1]], {"num_beams": 0}, "num_beams is 0; it must be an integer of at least 1"),
        ([[1]], {"num_beams": True}, "num_beams is True; it must be"),
        ([[1]], {"num_return_sequences": 0}, "num_return_sequences is 0; it must be"),
        ([[1]], {"num_return_sequences": 2},
         "num_return_sequences is 2 but greedy decoding returns one sequence for each prompt"),
        ([[1]], {**BEAMS, "num_return_sequences": 3},
         "num_return_sequences is 3, more than num_beams 2; ask for at most 2"),
        ([[1]], {"length_penalty": 2.0}, "length_penalty is 2.0 but num_beams is 1; pass"),
        ([[1]], {"early_stopping": True}, "early_stopping is True but num_beams is 1"),
        ([[1]], {**BEAMS, "early_stopping": "ever"},
         "early_stopping is 'ever'; it must be True, False or \"never\""),
        ([[1]], {**BEAMS, "length_penalty": float("inf")}, "length_penalty is inf; it must be"),
        ([[1]], {**BEAMS, "length_penalty": 99.0}, r"length_penalty is 99.0, and 12 \*\* 99.0 is"),
        ([[1]], {**BEAMS, "streamer": print}, "streamer is given but num_beams is 2; beam"),
        ([[1]], {**BEAMS, "assistant_model": varied_model(GPT)}, "assistant_model is given but"),
        ([[1]], {"streamer": 3}, "streamer is 3; give a function that takes an array"),
        ([[1]], {"logits_processors": len},
         r"logits_processors is <.*>; give a list of functions \(scores, sequences\) -> scores"),
        ([[1]], {"num_assistant_tokens": 0}, "num_assistant_tokens is 0; it must be"),
        ([[1]], {"num_assistant_tokens": 3},
         "num_assistant_tokens is 3 but assistant_model is None; pass assistant_model="),
        *(([[1]], {name: None}, f"{name} is None; ") for name in (
            "num_beams", "num_return_sequences", "temperature", "top_p", "do_sample",
            "repetition_penalty", "no_repeat_ngram_size", "length_penalty", "logits_processors")),
        ([[1]], {"tempreature": 0.5}, "unknown option tempreature; did you mean temperature"),
        ([[1]], {"assistant_model": varied_model(GPT)[0]}, "assistant_model is a GPT; give"),
        ([[1]], {"assistant_model": varied_model(BART)},
         "assistant_model is a BART and model a GPT; both must be GPT models, or both enc"),
        ([[1]], {"assistant_model": varied_model(GPT.replace(vocab_size=60))},
         "assistant_model has a vocabulary of 60 and model one of 61; they must share"),
        ([[1] * 8], {"assistant_model": varied_model(GPT.replace(max_length=16))},
         "prompt of 8 tokens and 12 new tokens exceed the model's max_length of 16"),
        ([[1]], {"config": BERT}, "BERT does not generate text; give a GPT or an encoder-decoder"),
        ([[1], []], {"config": BART}, r"sources \[1\] of 2 are empty"),
        ([[1] * 41], {"config": BART},
         "source of 41 tokens is longer than the model's max_length of 40; shorten it"),
        ([[1]], {"config": BART, "max_new_tokens": 40},
         "decoder prompt of 1 tokens and 40 new tokens exceed the model's max_length of 40; ask "
         "for at most 39"),
        ([[1]], {"config": BART.replace(decoder_start_token_id=None)},
         "decoder_start_token_id is None, as an argument and in the model's config; give"),
        ([[1]], {"config": BART, "decoder_start_token_id": 61},
         "decoder_start_token_id has token id 61, outside"),
        ([[1]], {"config": BART, "decoder_start_token_id": [1, 2]},
         "decoder_start_token_id has 2 ids for 1 sources; give one, or one for each"),
        ([[1]], {"config": BART, "forced_bos_token_id": [1, 2]},
         r"forced_bos_token_id is \[1, 2\]; give one id"),
    ],
)
def test_invalid_input_is_refused_before_compilation(prompts, change, message):
    size = num_programs()
    with pytest.raises(ValueError, match=message) as error:
        run(prompts, **change)
    assert "\n" not in str(error.value)
    assert num_programs() == size
