"""BART's noise: what each kind does, how often, and that the seed decides."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import small_models

from transformer_jax.data import batching
from transformer_jax.objectives import denoising, seq2seq
from transformer_jax.objectives.denoising import Noise

MASK = 4
TEXT = np.arange(100, 200)
NONE = Noise(permute=False, infill=0.0)
IDS = {"mask_id": MASK, "start_id": 2, "bos_id": 0, "eos_id": 2, "pad_id": 1}


def rng(seed=0):
    return np.random.default_rng(seed)


def spans(noised, text=TEXT):
    """The tokens that each mask stands for."""
    found, place = [], 0
    for i, token in enumerate(noised):
        if token != MASK:
            assert token == text[place], "what stays is in order"
            place += 1
            continue
        following = noised[i + 1] if i + 1 < len(noised) else None
        end = len(text) if following is None else int(np.flatnonzero(text == following)[0])
        found.append(end - place)
        place = end
    assert place == len(text)
    return found


def test_infilling_hides_the_share_in_spans_of_one_mask_each():
    lengths = []
    for seed in range(300):
        noised = denoising.infill(TEXT, rng(seed), share=0.3, mean_span=3.0, mask_id=MASK)
        found = spans(noised)
        assert sum(found) == 30
        assert not ((noised[1:] == MASK) & (noised[:-1] == MASK)).any()
        lengths += found
    # The law of lengths, but for the last span of each text, which is cut to fit.
    lengths = np.array(lengths)
    poisson = np.array([np.exp(-3) * 3**k / np.prod(range(1, k + 1), dtype=float)
                        for k in range(8)])
    shares = np.array([(lengths == k).mean() for k in range(8)])
    assert np.abs(shares - poisson).max() < 0.03
    assert shares[0] > 0.03  # empty spans are put in


def test_infilling_spans_lie_anywhere():
    hit = np.zeros(len(TEXT))
    for seed in range(2000):
        noised = denoising.infill(TEXT, rng(seed), share=0.3, mean_span=3.0, mask_id=MASK)
        hit[~np.isin(TEXT, noised)] += 1
    np.testing.assert_allclose(hit[5:-5] / 2000, 0.3, atol=0.06)
    # One of 71 gaps is in front of the first token, and 10.5 spans on average are not empty.
    np.testing.assert_allclose(hit[[0, -1]] / 2000, 0.15, atol=0.03)
    # Of two spans the second was cut to fit; it is not always the one behind.
    found = [spans(denoising.infill(TEXT, rng(seed), share=0.3, mean_span=20.0, mask_id=MASK))
             for seed in range(200)]
    assert 60 < sum(pair[0] < pair[-1] for pair in found) < 140


def test_infilling_whole_words():
    starts = np.zeros(300, bool)
    starts[100:300:3] = True  # words of three tokens
    for seed in range(50):
        noised = denoising.infill(TEXT, rng(seed), share=0.3, mean_span=3.0, mask_id=MASK,
                                  word_starts=starts)
        stays = noised[noised != MASK]
        words = {int(t - (t - 100) % 3) for t in stays}
        assert len(stays) == sum(min(3, 200 - w) for w in words)  # no word is cut
        assert len(words) == 34 - round(0.3 * 34)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_infilling_nothing_and_all(share):
    noised = denoising.infill(TEXT, rng(), share=share, mean_span=3.0, mask_id=MASK)
    assert noised.tolist() == (TEXT.tolist() if share == 0 else [MASK])


def test_infilling_of_a_token_or_two_never_fails():
    for seed in range(200):
        for n in (1, 2, 3):
            noised = denoising.infill(TEXT[:n], rng(seed), share=0.7, mean_span=0.3, mask_id=MASK)
            assert 1 <= len(noised) <= 2 * n + 1


def test_masking_and_deletion():
    masked = denoising.mask(TEXT, rng(), share=0.15, mask_id=MASK)
    assert (masked == MASK).sum() == 15 and (masked[masked != MASK] == TEXT[masked != MASK]).all()
    shorter = denoising.delete(TEXT, rng(), share=0.2)
    assert len(shorter) == 80 and (np.diff(shorter) > 0).all() and MASK not in shorter
    masked, gone = (
        np.mean([~np.isin(TEXT, change(TEXT, rng(seed), share=0.15)) for seed in range(1000)], 0)
        for change in (functools.partial(denoising.mask, mask_id=MASK), denoising.delete))
    np.testing.assert_allclose(masked, 0.15, atol=0.06)  # anywhere alike
    np.testing.assert_allclose(gone, 0.15, atol=0.06)


def test_rotation_begins_anywhere():
    firsts = set()
    for seed in range(2000):
        turned = denoising.rotate(TEXT, rng(seed))
        firsts.add(int(turned[0]))
        np.testing.assert_array_equal(np.roll(turned, turned[0] - 100), TEXT)
    assert firsts == set(TEXT.tolist())


SENTENCES = [np.array([10, 11]), np.array([20, 21, 22]), np.array([30])]


def test_permutation_keeps_sentences_whole():
    orders = set()
    for seed in range(200):
        out = denoising.corrupt(SENTENCES, rng(seed), NONE._replace(permute=True), mask_id=MASK)
        orders.add(tuple(out.tolist()))
    assert len(orders) == 6
    assert all("".join(map(chr, o)).count(chr(20) + chr(21) + chr(22)) == 1 for o in orders)


def test_mixtures_and_seeds():
    noise = Noise(permute=True, infill=0.2, mask=0.1, delete=0.1, rotate=1.0)
    first, again, other = (denoising.corrupt([TEXT, TEXT + 100], rng(s), noise, mask_id=MASK)
                           for s in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    plain = denoising.corrupt(SENTENCES, rng(), NONE, mask_id=MASK)
    assert plain.tolist() == [10, 11, 20, 21, 22, 30]
    share = np.mean([denoising.corrupt(SENTENCES, rng(s), NONE._replace(rotate=0.4),
                                       mask_id=MASK)[0] != 10 for s in range(600)])
    assert 0.4 * 5 / 6 - 0.06 < share < 0.4 * 5 / 6 + 0.06


CORPUS = SimpleNamespace(
    tokens=np.arange(5, 31), document_starts=np.array([0, 9, 9, 26]),
    sentence_starts=np.array([0, 4, 9, 12, 12, 24, 26]))


def test_passages_are_whole_sentences_of_one_document():
    found = denoising.Passages(CORPUS, 8)
    assert [[len(s) for s in found[i]] for i in range(len(found))] == [
        [4], [5], [3], [8], [4, 2]]
    whole = denoising.Passages(CORPUS, 9)
    assert [[len(s) for s in whole[i]] for i in range(len(whole))] == [[4, 5], [3], [9], [3, 2]]
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate(found[i]) for i in range(len(found))]), CORPUS.tokens)
    with pytest.raises(ValueError, match="max_tokens of a passage is 0"):
        denoising.Passages(CORPUS, 0)


def test_row_by_hand():
    row = denoising.prepare(SENTENCES, rng(), noise=NONE, length=9, **IDS)
    assert row["tokens"].tolist() == [0, 10, 11, 20, 21, 22, 30, 2, 1]
    assert row["targets"].tolist() == [0, 10, 11, 20, 21, 22, 30, 2, 1]
    assert row["decoder_tokens"].tolist() == [2, 0, 10, 11, 20, 21, 22, 30, 1]
    cut = denoising.prepare(SENTENCES, rng(), noise=NONE._replace(permute=True), length=6, **IDS)
    assert cut["targets"].tolist() == [0, 10, 11, 20, 21, 2]
    assert sorted(cut["tokens"][1:5]) == [10, 11, 20, 21]  # nothing that is not to be restored


def test_the_target_is_clean_and_the_source_is_not():
    noise = Noise(infill=0.4)
    for seed in range(20):
        row = denoising.prepare([TEXT[:40]], rng(seed), noise=noise, length=48, **IDS)
        target = row["targets"][row["weights"] > 0]
        assert target.tolist() == [0, *TEXT[:40], 2] and MASK not in row["decoder_tokens"]
        assert MASK in row["tokens"] and row["padding_mask"].sum() < 42
        np.testing.assert_array_equal(row["decoder_tokens"][1:42], row["targets"][:41])


@pytest.mark.parametrize(("change", "message"), [
    ({"infill": 1.2}, "noise infill is 1.2; it is a share"),
    ({"delete": -0.1}, "noise delete is -0.1"),
    ({"mean_span": 0.0}, "noise mean_span is 0.0; it has to be from 0.1 to 1000"),
    ({"mean_span": 1e9}, "noise mean_span is 1000000000.0"),
])
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        denoising.prepare(SENTENCES, rng(), noise=NONE._replace(**change), length=9, **IDS)
    with pytest.raises(ValueError, match="source_length 2 leaves no room"):
        denoising.prepare(SENTENCES, rng(), noise=NONE, length=2, **IDS)


def test_the_loss_is_that_of_pairs():
    assert denoising.loss is seq2seq.loss


def test_no_place_sees_what_it_predicts():
    """Two texts that differ from their k-th token on, with nothing left of either in the source:
    up to the place that predicts that token the logits are equal, bit for bit; behind it not."""
    ids = IDS | {"mask_id": 4}
    text = small_models.random_tokens(12, first=5)
    hide_all = NONE._replace(infill=1.0)
    for k in (0, 5, 11):
        other = np.concatenate([text[:k], 5 + (text[k:] + 1) % 50])
        row, changed = (denoising.prepare([t], rng(), noise=hide_all, length=16, **ids)
                        for t in (text, other))
        assert row["tokens"].tolist() == changed["tokens"].tolist() == [0, MASK, 2] + [1] * 13
        logits, others = (
            np.asarray(small_models.forward(
                small_models.BART, r["tokens"][None], decoder_tokens=r["decoder_tokens"][None],
                padding_mask=r["padding_mask"][None]).logits[0]) for r in (row, changed))
        place = k + 1  # that of its prediction: in front of the text is <s>
        assert row["targets"][place] == text[k] != changed["targets"][place]
        np.testing.assert_array_equal(logits[: place + 1], others[: place + 1])
        assert np.abs(logits[place + 1] - others[place + 1]).max() > 1e-3


def test_each_epoch_is_noised_anew():
    noised = []
    for _ in range(2):
        loader = batching.make_loader(
            denoising.Passages(CORPUS, 40), 2, num_epochs=2, seed=3, prefetch=0,
            transform=functools.partial(denoising.prepare, noise=Noise(infill=0.4), length=20,
                                        **IDS))
        noised.append([batch["tokens"] for batch in loader])
    for first, again in zip(*noised):
        np.testing.assert_array_equal(first, again)
    epochs = [{row.tobytes() for row in rows} for rows in noised[0]]
    assert len(epochs) == 2 and epochs[0] != epochs[1]
