"""BART's noise: effect and frequency of each kind, reproducibility, and the rows."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import small_models

from transformer_jax.data import batching
from transformer_jax.objectives import seq2seq
from transformer_jax.objectives.seq2seq import Noise, prepare_denoising

MASK = 4
TEXT = np.arange(100, 200)
NO_NOISE = Noise(permute=False, infill=0.0)
IDS = {"mask_id": MASK, "start_id": 2, "bos_id": 0, "eos_id": 2, "pad_id": 1}


def rng(seed=0):
    return np.random.default_rng(seed)


def infilled(seed=0, text=TEXT, rate=0.3, mean_span=3.0, **options):
    return seq2seq.text_infilling(
        text, rng(seed), rate=rate, mean_span=mean_span, mask_id=MASK, **options)


def span_lengths(corrupted, text=TEXT):
    """The number of tokens that each mask token replaces."""
    lengths, position = [], 0
    for i, token in enumerate(corrupted):
        if token != MASK:
            assert token == text[position], "the remaining tokens must be in order"
            position += 1
            continue
        following = corrupted[i + 1] if i + 1 < len(corrupted) else None
        end = len(text) if following is None else int(np.flatnonzero(text == following)[0])
        lengths.append(end - position)
        position = end
    assert position == len(text)
    return lengths


def test_text_infilling_hides_the_rate_in_poisson_distributed_spans():
    lengths = []
    for seed in range(300):
        corrupted = infilled(seed)
        text_lengths = span_lengths(corrupted)
        assert sum(text_lengths) == 30
        assert not ((corrupted[1:] == MASK) & (corrupted[:-1] == MASK)).any()
        lengths += text_lengths
    # Poisson distribution, except for the last span of each text, which is reduced to fit.
    lengths = np.array(lengths)
    poisson = np.array([np.exp(-3) * 3**k / np.prod(range(1, k + 1), dtype=float)
                        for k in range(8)])
    fractions = np.array([(lengths == k).mean() for k in range(8)])
    assert np.abs(fractions - poisson).max() < 0.03
    assert fractions[0] > 0.03  # spans of length 0 insert mask tokens


def test_text_infilling_hides_all_positions():
    hidden_counts = np.zeros(len(TEXT))
    for seed in range(2000):
        hidden_counts[~np.isin(TEXT, infilled(seed))] += 1
    np.testing.assert_allclose(hidden_counts[5:-5] / 2000, 0.3, atol=0.06)
    # One of 71 gaps is before the first token, and 10.5 spans on average are not empty.
    np.testing.assert_allclose(hidden_counts[[0, -1]] / 2000, 0.15, atol=0.03)
    # The length that is reduced to fit belongs to a random span, not always to the last one.
    lengths = [span_lengths(infilled(seed, mean_span=20.0)) for seed in range(200)]
    assert 60 < sum(pair[0] < pair[-1] for pair in lengths) < 140


def test_text_infilling_of_whole_words():
    word_starts = np.zeros(300, bool)
    word_starts[100:300:3] = True  # words of three tokens
    for seed in range(50):
        corrupted = infilled(seed, word_starts=word_starts)
        remaining = corrupted[corrupted != MASK]
        words = {int(t - (t - 100) % 3) for t in remaining}
        assert len(remaining) == sum(min(3, 200 - w) for w in words)  # no word is split
        assert len(words) == 34 - round(0.3 * 34)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_text_infilling_of_nothing_and_everything(rate):
    assert infilled(rate=rate).tolist() == (TEXT.tolist() if rate == 0 else [MASK])


def test_text_infilling_of_very_short_texts():
    for seed in range(200):
        for n in (1, 2, 3):
            corrupted = infilled(seed, TEXT[:n], rate=0.7, mean_span=0.3)
            assert 1 <= len(corrupted) <= 2 * n + 1


def corrupted_by(seed=0, **noise):
    return seq2seq.corrupt([TEXT], rng(seed), NO_NOISE._replace(**noise), mask_id=MASK)


def test_token_masking_and_deletion():
    masked = corrupted_by(mask=0.15)
    assert (masked == MASK).sum() == 15 and (masked[masked != MASK] == TEXT[masked != MASK]).all()
    shorter = corrupted_by(delete=0.2)
    assert len(shorter) == 80 and (np.diff(shorter) > 0).all() and MASK not in shorter
    for kind in ("mask", "delete"):  # all positions are equally likely
        hidden = np.mean([~np.isin(TEXT, corrupted_by(seed, **{kind: 0.15}))
                          for seed in range(1000)], 0)
        np.testing.assert_allclose(hidden, 0.15, atol=0.06)


def test_document_rotation_starts_at_all_positions():
    firsts = set()
    for seed in range(2000):
        rotated = corrupted_by(seed, rotate=1.0)
        firsts.add(int(rotated[0]))
        np.testing.assert_array_equal(np.roll(rotated, rotated[0] - 100), TEXT)
    assert firsts == set(TEXT.tolist())


SENTENCES = [np.array([10, 11]), np.array([20, 21, 22]), np.array([30])]


def test_sentence_permutation_does_not_split_sentences():
    orders = set()
    for seed in range(200):
        corrupted = seq2seq.corrupt(
            SENTENCES, rng(seed), NO_NOISE._replace(permute=True), mask_id=MASK)
        orders.add(tuple(corrupted.tolist()))
    assert len(orders) == 6
    assert all("".join(map(chr, o)).count(chr(20) + chr(21) + chr(22)) == 1 for o in orders)


def test_corrupt_combines_noise_and_is_deterministic():
    noise = Noise(permute=True, infill=0.2, mask=0.1, delete=0.1, rotate=1.0)
    first, again, other = (seq2seq.corrupt([TEXT, TEXT + 100], rng(s), noise, mask_id=MASK)
                           for s in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    unchanged = seq2seq.corrupt(SENTENCES, rng(), NO_NOISE, mask_id=MASK)
    assert unchanged.tolist() == [10, 11, 20, 21, 22, 30]
    rotated_fraction = np.mean([seq2seq.corrupt(
        SENTENCES, rng(s), NO_NOISE._replace(rotate=0.4), mask_id=MASK)[0] != 10
        for s in range(600)])
    assert 0.4 * 5 / 6 - 0.06 < rotated_fraction < 0.4 * 5 / 6 + 0.06


CORPUS = SimpleNamespace(
    tokens=np.arange(5, 31), document_starts=np.array([0, 9, 9, 26]),
    sentence_starts=np.array([0, 4, 9, 12, 12, 24, 26]))


def test_passages_are_complete_sentences_of_one_document():
    passages = seq2seq.Passages(CORPUS, 8)
    assert [[len(s) for s in passages[i]] for i in range(len(passages))] == [
        [4], [5], [3], [8], [4, 2]]
    longer = seq2seq.Passages(CORPUS, 9)
    assert [[len(s) for s in longer[i]] for i in range(len(longer))] == [[4, 5], [3], [9], [3, 2]]
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate(passages[i]) for i in range(len(passages))]), CORPUS.tokens)
    with pytest.raises(ValueError, match="max_tokens of a passage is 0"):
        seq2seq.Passages(CORPUS, 0)


def test_prepare():
    row = prepare_denoising(SENTENCES, rng(), noise=NO_NOISE, length=9, **IDS)
    assert row["tokens"].tolist() == [0, 10, 11, 20, 21, 22, 30, 2, 1]
    assert row["targets"].tolist() == [0, 10, 11, 20, 21, 22, 30, 2, 1]
    assert row["decoder_tokens"].tolist() == [2, 0, 10, 11, 20, 21, 22, 30, 1]
    truncated = prepare_denoising(
        SENTENCES, rng(), noise=NO_NOISE._replace(permute=True), length=6, **IDS)
    assert truncated["targets"].tolist() == [0, 10, 11, 20, 21, 2]
    assert sorted(truncated["tokens"][1:5]) == [10, 11, 20, 21]  # the tokens of the target only


def test_only_the_source_is_corrupted():
    noise = Noise(infill=0.4)
    for seed in range(20):
        row = prepare_denoising([TEXT[:40]], rng(seed), noise=noise, length=48, **IDS)
        target = row["targets"][row["weights"] > 0]
        assert target.tolist() == [0, *TEXT[:40], 2] and MASK not in row["decoder_tokens"]
        assert MASK in row["tokens"] and row["padding_mask"].sum() < 42
        np.testing.assert_array_equal(row["decoder_tokens"][1:42], row["targets"][:41])


@pytest.mark.parametrize(("change", "message"), [
    ({"infill": 1.2}, "noise infill is 1.2; it must be a fraction from 0 to 1"),
    ({"delete": -0.1}, "noise delete is -0.1"),
    ({"mean_span": 0.0}, "noise mean_span is 0.0; it must be from 0.1 to 1000"),
    ({"mean_span": 1e9}, "noise mean_span is 1000000000.0"),
])
def test_invalid_noise_and_length(change, message):
    with pytest.raises(ValueError, match=message):
        prepare_denoising(SENTENCES, rng(), noise=NO_NOISE._replace(**change), length=9, **IDS)
    with pytest.raises(ValueError, match="source_length 2 leaves no room"):
        prepare_denoising(SENTENCES, rng(), noise=NO_NOISE, length=2, **IDS)


def test_logits_do_not_depend_on_their_own_target():
    """Of two texts that differ from token k on, with completely hidden sources, the logits are
    equal bit for bit up to the position that predicts token k, and differ after it."""
    ids = IDS | {"mask_id": 4}
    text = small_models.random_tokens(12, first=5)
    hide_all = NO_NOISE._replace(infill=1.0)
    for k in (0, 5, 11):
        other = np.concatenate([text[:k], 5 + (text[k:] + 1) % 50])
        row, changed = (prepare_denoising([t], rng(), noise=hide_all, length=16, **ids)
                        for t in (text, other))
        assert row["tokens"].tolist() == changed["tokens"].tolist() == [0, MASK, 2] + [1] * 13
        logits, others = (
            np.asarray(small_models.forward(
                small_models.BART, r["tokens"][None], decoder_tokens=r["decoder_tokens"][None],
                padding_mask=r["padding_mask"][None]).logits[0]) for r in (row, changed))
        position = k + 1  # the first target is <s>
        assert row["targets"][position] == text[k] != changed["targets"][position]
        np.testing.assert_array_equal(logits[: position + 1], others[: position + 1])
        assert np.abs(logits[position + 1] - others[position + 1]).max() > 1e-3


def test_every_epoch_has_new_noise():
    runs = []
    for _ in range(2):
        loader = batching.make_loader(
            seq2seq.Passages(CORPUS, 40), 2, num_epochs=2, seed=3, prefetch=0,
            transform=functools.partial(prepare_denoising, noise=Noise(infill=0.4), length=20,
                                        **IDS))
        runs.append([batch["tokens"] for batch in loader])
    for first, again in zip(*runs):
        np.testing.assert_array_equal(first, again)
    epochs = [{row.tobytes() for row in rows} for rows in runs[0]]
    assert len(epochs) == 2 and epochs[0] != epochs[1]
