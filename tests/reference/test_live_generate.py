"""The tokens of PyTorch Transformers' own `generate`: greedy and beam search, family by family.

    pip install torch==2.13.0 "transformers==5.*"
    python -m pytest tests/reference -m reference
"""

import copy
import functools

import numpy as np
import pytest

from transformer_jax.generation import generate, generation_options, logits_processors
from transformer_jax.pretrained import load_pretrained

# Warnings of the reference's own imports are not ours.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

VOCAB, NEW, PROMPTS = 40, 12, 20
PAD, START, END = 1, 2, 2


@pytest.fixture(autouse=True)
def installed():
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"the live comparison needs {package} (see docstring)")


def _gpt(kind, **options):
    import transformers as t

    return getattr(t, f"{kind}LMHeadModel")(getattr(t, f"{kind}Config")(
        vocab_size=VOCAB, n_positions=40, n_embd=24, n_layer=2, n_head=3, bos_token_id=0,
        eos_token_id=2, attn_implementation="eager", **options))


def _seq2seq(kind, head="ForConditionalGeneration", **options):
    import transformers as t

    ids = {"pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": START,
           "forced_eos_token_id": None}
    return getattr(t, f"{kind}{head}")(getattr(t, f"{kind}Config")(
        vocab_size=VOCAB, d_model=24, max_position_embeddings=40, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=40,
        decoder_ffn_dim=40, attn_implementation="eager", **{**ids, **options}))


# The reference's model, and what every call of the family is given.
FAMILIES = {
    "gpt2": (lambda: _gpt("GPT2"), {}),
    "openai-gpt": (lambda: _gpt("OpenAIGPT"), {}),
    "bart": (lambda: _seq2seq("Bart", forced_bos_token_id=0, forced_eos_token_id=2), {}),
    "marian": (lambda: _seq2seq("Marian", "MTModel", decoder_start_token_id=PAD,
                                scale_embedding=False), {}),
    # The language to write in is the caller's to say.
    "mbart": (lambda: _seq2seq("MBart", forced_eos_token_id=2, scale_embedding=True),
              {"forced_bos_token_id": 33}),
}
OPTIONS = {
    "greedy": {},
    "greedy_with_rules": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3,
                          "min_new_tokens": 3},
    "beams": {"num_beams": 4, "no_repeat_ngram_size": 3, "num_return_sequences": 4},
    "short": {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
    "long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "beams_with_rules": {"num_beams": 4, "no_repeat_ngram_size": 2, "early_stopping": True,
                         "min_length": 9, "bad_words_ids": [[5], [9, 12], [3, 4, 8]],
                         "suppress_tokens": [21], "begin_suppress_tokens": [13, 14],
                         "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Their model and ours, from its files."""
    @functools.cache
    def pair(family):
        import torch

        torch.set_num_threads(1)  # tiny matrices
        torch.manual_seed(0)
        theirs = FAMILIES[family][0]().eval()
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                if family == "marian" and "embed_positions" in name:
                    continue  # computed, not learned
                is_norm = "norm" in name or "ln_" in name
                # Tried out, so that texts depend on their source and do not repeat one token.
                little = is_norm or any(part in name for part in ("bias", ".fc", "encoder_attn"))
                std = 0.2 if little else 0.4 if "shared" in name or "embed" in name else 0.6
                tensor.copy_(std * torch.randn(tensor.shape) + (is_norm and "weight" in name))
            if hasattr(theirs, "final_logits_bias"):
                theirs.final_logits_bias.copy_(0.3 * torch.randn(1, VOCAB))
        folder = tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
        return theirs, ours.model, ours.params, ends(ours, family)

    return pair


def ends(ours, family) -> list[int]:
    """Tokens that few greedy texts have: with them some end and others run on."""
    ids, mask = prompts(family)
    new = generate(ours.model, ours.params, ids, mask, max_new_tokens=NEW, eos_token_id=(),
                   pad_token_id=PAD, **FAMILIES[family][1])[:, -NEW:]
    written = [int(t) for t in np.unique(new) if t not in (PAD, END)]
    return [END, *sorted(written, key=lambda token: (new == token).any(1).sum())[:3]]


def prompts(family):
    """Texts of unequal length, padded where the family wants it; the reference's GPT keeps no
    count of positions, so its texts are as long as each other."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB, (PROMPTS, 7))
    lengths = np.full(PROMPTS, 7) if family == "openai-gpt" else rng.integers(1, 8, PROMPTS)
    mask = np.arange(7) < lengths[:, None]
    if family == "gpt2":
        mask = mask[:, ::-1]
    return np.where(mask, ids, PAD), mask.astype(np.int64)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_reference_s(pairs, family, name):
    import torch

    theirs, model, params, ends = pairs(family)
    ids, mask = prompts(family)
    options = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": PAD,
               **FAMILIES[family][1], **OPTIONS[name]}
    expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask),
                               do_sample=False, **options).numpy()
    out = generate(model, params, ids, mask, **options)
    np.testing.assert_array_equal(out, expected)
    new = out[:, 7 if "gpt" in family else 1 :]
    assert len({tuple(row) for row in new.tolist()}) > 3
    if name in ("greedy", "short"):  # the others favour or want long texts
        assert len(set((new != PAD).sum(1).tolist())) > 2


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_defaults_are_the_reference_s(pairs, family):
    """Twenty tokens; end, start and forced tokens by the checkpoint's files."""
    import torch

    theirs, model, params, _ = pairs(family)
    ids, mask = prompts(family)
    for options in ({}, {"num_beams": 2}):
        expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask),
                                   do_sample=False, **options).numpy()
        out = generate(model, params, ids, mask, **options)
        if family == "gpt2":  # what stands for padding in a prompt, they leave and we write
            out, expected = out[:, 7:], expected[:, 7:]
        np.testing.assert_array_equal(out, expected)


def test_the_options_of_a_checkpoint_are_the_reference_s(pairs, tmp_path):
    """generation_config.json's search, which nobody has to repeat."""
    import torch

    theirs = copy.deepcopy(pairs("bart")[0])
    chosen = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "max_length": 12,
              "min_length": 5, "no_repeat_ngram_size": 2}
    theirs.generation_config.update(**chosen)
    theirs.save_pretrained(tmp_path)
    model, params, _ = load_pretrained(tmp_path)
    assert generation_options(model).items() >= chosen.items()
    ids, mask = prompts("bart")
    expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask)).numpy()
    out = generate(model, params, ids, mask, **generation_options(model))
    np.testing.assert_array_equal(out, expected)


def test_rules_are_the_reference_s_processors():
    """On random scores, forbidden tokens and all."""
    import torch
    from transformers.generation import logits_process as processors

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, VOCAB)).astype(np.float32) * 3
    scores[:, 5] = -np.inf
    tokens = rng.integers(0, 6, (30, 12))
    text = logits_processors.Sequences(tokens, np.full(30, 12), np.full(30, 4))
    words = [[4], [3, 2], [1, 0, 5]]
    table = np.array([[-1, -1, 4], [-1, 3, 2], [1, 0, 5]])

    def f(x):
        return np.float32(x)

    cases = [
        (logits_processors.penalize_repetition(scores, text, f(1.7)),
         processors.RepetitionPenaltyLogitsProcessor(1.7)),
        *((logits_processors.forbid_repeated_ngrams(scores, text, n),
           processors.NoRepeatNGramLogitsProcessor(n)) for n in (1, 2, 3, 4)),
        (logits_processors.forbid_bad_words(scores, text, table),
         processors.NoBadWordsLogitsProcessor(words)),
        *((logits_processors.keep_top_k(scores, np.int32(k), kept),
           processors.TopKLogitsWarper(k, min_tokens_to_keep=kept))
          for k, kept in ((1, 1), (5, 1), (2, 4), (99, 1))),
        *((logits_processors.keep_top_p(scores, f(p), kept),
           processors.TopPLogitsWarper(p, min_tokens_to_keep=kept))
          for p, kept in ((0.1, 1), (0.5, 1), (0.95, 1), (0.1, 3))),
        *((logits_processors.keep_min_p(scores, f(p), kept),
           processors.MinPLogitsWarper(p, min_tokens_to_keep=kept))
          for p, kept in ((0.02, 1), (0.3, 1), (0.9, 3))),
    ]
    for ours, theirs in cases:
        expected = theirs(torch.tensor(tokens), torch.tensor(scores.copy())).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=type(theirs).__name__)
