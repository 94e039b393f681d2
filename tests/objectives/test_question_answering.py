"""Extractive question answering: windows, character offsets, and the best span over windows."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, GPT2, build

from transformer_jax.data import tokenizers
from transformer_jax.objectives import input_format
from transformer_jax.objectives import question_answering as qa

TEXTS = ["the cat sat on the mat in the café of the town while a dog ran by", "was für ein Tag",
         "who sat on the mat and where did it sit down"]


@functools.cache
def tokenizer(kind):
    return {"wordpiece": lambda: tokenizers.train_wordpiece(TEXTS, 240),
            "bpe": lambda: tokenizers.train_bpe(TEXTS, 300)}[kind]()


def input_packer(kind, length):
    if kind == "bpe":
        return functools.partial(input_format.pack_gpt_input, length=length, start_id=57,
                                 delimiter_id=58, extract_id=59)
    t = tokenizer(kind)
    return functools.partial(
        input_format.pack_bert_input, length=length, cls_id=t.cls_id, sep_id=t.sep_id)


def example(context, answer=None, question="who sat", **more):
    answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
    return {"question": question, "context": context, "answers": answers, **more}


def make_windows(examples, kind="wordpiece", **options):
    return qa.make_windows(examples, tokenizer(kind),
                           **{"length": 60, "max_question_length": 20, **options})


def make_batch(windows, kind="wordpiece", length=60, **options):
    rows = [qa.prepare(w, pack_input=input_packer(kind, length), **options) for w in windows]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def fixed_logits_apply(logits):
    """A model's `apply` that returns these logits `[B, T, 2]` for any input."""
    return lambda *args, **options: jnp.asarray(logits)


def logits_of_correct_answers(batch):
    """9 at the start and the end of the answer, and 0 elsewhere."""
    B, T = batch["tokens"].shape
    logits = np.zeros((B, T, 2), np.float32)
    for side, name in enumerate(("start_positions", "end_positions")):
        logits[np.arange(B), batch[name], side] = np.where(
            batch[name] == batch["no_answer_position"], 0, 9)
    return logits


def predict(batch, logits, **options):
    return jax.device_get(qa.predict(fixed_logits_apply(logits), {}, batch, **options))


def answer(examples, windows, batch, logits, top=20, max_answer_length=30, **options):
    predictions = predict(batch, logits, top=top, max_answer_length=max_answer_length)
    return qa.decode_answers(examples, windows, predictions, **options)


CAT = "the cat sat on the mat in the café of the town while a dog ran by"


# Windows ------------------------------------------------------------------------------------------


def test_make_windows():
    """15 words of one token each; windows of 10 tokens with a stride of 4."""
    t = tokenizer("wordpiece")
    context = " ".join(["the", "cat", "sat"] * 5)
    e = {"question": "the cat", "context": context, "answers": [{"text": "sat the", "start": 45}]}
    ids = t.encode(context)
    assert len(ids) == 15
    with pytest.raises(ValueError, match="not the answer 'sat the'"):
        make_windows([e], length=15, max_question_length=2)
    e["answers"][0]["start"] = 32
    make = functools.partial(make_windows, [e, example(context)], length=15,
                             max_question_length=2, stride=4)
    windows = make()
    assert [(w.example_index, len(w.context_ids)) for w in windows] == [
        (0, 10), (0, 10), (0, 7), (1, 10), (1, 10), (1, 7)]
    assert np.concatenate([windows[0].context_ids, windows[2].context_ids[2:]]).tolist() == ids
    assert [(w.start, w.end) for w in windows[:3]] == [(8, 9), (4, 5), (0, 1)]
    assert [w.start for w in windows[3:]] == [None] * 3
    for w in windows:
        assert [context[a:b] for a, b in w.offsets[:3]] == [
            t.decode([i]) for i in w.context_ids[:3]]
    e["answers"] = [{"text": "the cat", "start": 0}]
    assert [(w.example_index, w.start) for w in make(keep_windows_without_answer=False)] == [
        (0, 0), (1, None), (1, None), (1, None)]
    assert len(make(stride=2)) > len(windows)


def test_prepare():
    t = tokenizer("wordpiece")
    window = qa.Window(0, np.array([7, 8]), np.array([4, 5, 6]), np.zeros((3, 2), int), 1, 2)
    without_answer = window._replace(start=None, end=None)
    row = qa.prepare(window, pack_input=input_packer("wordpiece", 10))
    assert row["tokens"].tolist() == [t.cls_id, 7, 8, t.sep_id, 4, 5, 6, t.sep_id, 0, 0]
    assert np.flatnonzero(row["context_mask"]).tolist() == [4, 5, 6]
    assert (row["start_positions"], row["end_positions"]) == (5, 6)
    assert (row["no_answer_position"], row["weights"]) == (0, 1)
    row = qa.prepare(without_answer, pack_input=input_packer("wordpiece", 10))
    assert (row["start_positions"], row["end_positions"]) == (0, 0)
    row = qa.prepare(without_answer, pack_input=input_packer("bpe", 10), causal=True)
    assert row["tokens"].tolist() == [57, 7, 8, 58, 4, 5, 6, 59, 0, 0]
    assert np.flatnonzero(row["context_mask"]).tolist() == [4, 5, 6]
    assert (row["start_positions"], row["end_positions"], row["no_answer_position"]) == (7, 7, 7)
    with pytest.raises(ValueError, match="of 2 and 3 tokens does not fit into a row of 7; make"):
        qa.prepare(window, pack_input=input_packer("wordpiece", 7))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize(("context", "text"), [
    (CAT, "café"), (CAT, "the town while"),
    ("le cafe\u0301 de  la\tville", "cafe\u0301"),  # the accent is a combining mark
    ("le cafe\u0301 de  la\tville", "la\tville"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "ÉTÉ"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "\N{GRINNING FACE}"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "日本語"),
    ("a\n\n  the cat  \u3000 sat ", "the cat"), ("a\n\n  the cat  \u3000 sat ", "sat"),
    ("a \u2764\ufe0f b", "\u2764\ufe0f"),  # a mark that does not combine with the previous letter
    ("a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 b", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"),
])
def test_answers_are_exact_characters(kind, context, text):
    examples = [example(context, text)]
    windows = make_windows(examples, kind)
    batch = make_batch(windows, kind)
    (found,) = answer(examples, windows, batch, logits_of_correct_answers(batch))
    assert found.text == text == context[found.start_char : found.end_char]
    assert found.score == 18


def test_answers_of_squad(real_data):
    """Every gold answer that begins and ends at token boundaries is reproduced exactly."""
    t = tokenizers.load(real_data / "vocab_bert_uncased")
    with gzip.open(real_data / "squad" / "dev-v1.1.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(1500))]
    examples = [{"id": e["id"], "question": e["question"], "context": e["context"], "answers": [
        {"text": text, "start": start} for text, start in
        zip(e["answers"]["text"], e["answers"]["answer_start"])]} for e in rows]
    windows = qa.make_windows(examples, t, length=200, stride=64)
    pack_input = functools.partial(
        input_format.pack_bert_input, length=200, cls_id=t.cls_id, sep_id=t.sep_id)
    rows = [qa.prepare(w, pack_input=pack_input) for w in windows]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    answers = answer(examples, windows, batch, logits_of_correct_answers(batch), top=1, n_best=1)
    at_token_boundaries = set()
    for w in windows:
        gold = examples[w.example_index]["answers"][0]
        if w.start is not None and w.end - w.start < 30 and (
                w.offsets[w.start, 0], w.offsets[w.end, 1]) == (
                gold["start"], gold["start"] + len(gold["text"])):
            at_token_boundaries.add(w.example_index)
    assert len(windows) > len(examples) and len(at_token_boundaries) > 0.98 * len(examples)
    for i in at_token_boundaries:
        gold = examples[i]["answers"][0]
        assert (answers[i].text, answers[i].start_char) == (gold["text"], gold["start"])


# Loss and prediction ------------------------------------------------------------------------------


def one_window(text="café"):
    examples = [example(CAT, text)]
    windows = make_windows(examples, length=40)
    return examples, windows, make_batch(windows, length=40)


def test_loss_of_known_logits():
    """Positions outside the context and the no-answer position have no effect."""
    batch = {"tokens": np.zeros((1, 6), np.int32), "context_mask": np.arange(6)[None] // 2 == 1,
             "no_answer_position": np.array([0]), "start_positions": np.array([2]),
             "end_positions": np.array([3]), "weights": np.ones(1, np.float32)}
    logits = np.full((1, 6, 2), 70.0, np.float32)
    logits[0, [0, 2, 3], 0] = np.log([1, 2, 5])
    logits[0, [0, 2, 3], 1] = np.log([1, 2, 1])
    total, weight, metrics = qa.loss(fixed_logits_apply(logits), {}, batch)
    assert float(total) == pytest.approx(-(np.log(2 / 8) + np.log(1 / 4)) / 2, rel=1e-5)
    assert weight == 1 and metrics["exact"] == (0, 1)


@pytest.mark.parametrize("max_answer_length", [1, 4, 30])
def test_predict_equals_an_exhaustive_search(max_answer_length):
    _, windows, batch = one_window()
    logits = np.random.default_rng(3).normal(size=(len(windows), 40, 2)).astype(np.float32)
    # The best ends are all before the best starts.
    logits[..., 0] += np.arange(40)
    logits[..., 1] -= np.arange(40)
    found = predict(batch, logits, top=9, max_answer_length=max_answer_length)
    context = np.flatnonzero(batch["context_mask"][0])
    spans = sorted(((logits[0, i, 0] + logits[0, j, 1], i - context[0], j - context[0])
                    for i in context for j in context if 0 <= j - i < max_answer_length),
                   reverse=True)
    actual = list(zip(found["scores"][0], found["start_tokens"][0], found["end_tokens"][0]))
    np.testing.assert_allclose(actual, spans[:9], rtol=1e-5, atol=1e-5)
    assert found["no_answer_score"][0] == pytest.approx(logits[0, 0].sum())


@pytest.mark.parametrize("config", [GPT2, BART], ids=lambda c: type(c).__name__)
def test_training_reduces_the_loss(config):
    model, params = build(config.replace(num_layers=1), 2)
    window = qa.Window(0, np.array([7, 8]), np.arange(10, 18), np.zeros((8, 2), int), 3, 5)
    batch = make_batch([window], "bpe" if config is GPT2 else "wordpiece", length=16,
                       causal=config is GPT2)

    @jax.jit
    def step(params):
        def total(params):
            return qa.loss(model.apply, params, batch)[0]

        value, grads = jax.value_and_grad(total)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    losses = []
    for _ in range(15):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    found = jax.jit(functools.partial(qa.predict, model.apply))(params, batch)
    assert np.isfinite(found["no_answer_score"]).all()
    assert found["scores"][0, 0] >= found["scores"][0, 1]


# Decoding -----------------------------------------------------------------------------------------


def test_ties_select_the_first_and_shortest_span():
    examples, windows, batch = one_window()
    logits = np.zeros((1, 40, 2), np.float32)
    (found,) = answer(examples, windows, batch, logits)
    assert (found.text, found.score) == ("the", 0) and len(found.candidates) == 20
    assert sum(c.probability for c in found.candidates) == pytest.approx(1)
    assert found.probability == pytest.approx(1 / 20)
    (found,) = answer(examples, windows, batch, logits, n_best=2)
    assert [c.text for c in found.candidates] == ["the", "the cat"]


def test_no_answer_and_its_threshold():
    examples, windows, batch = one_window()
    logits = logits_of_correct_answers(batch)
    logits[0, 0] = 10  # [CLS]: a score of 20, against 18 of the correct answer
    decode = functools.partial(answer, examples, windows, batch, logits)
    (span,), (empty,), (below_threshold,) = (
        decode(), decode(allow_no_answer=True),
        decode(allow_no_answer=True, no_answer_threshold=2.0))
    assert (span.text, span.no_answer_score) == ("café", 20)
    assert (empty.text, empty.start_char, empty.end_char, empty.score) == ("", 0, 0, 20)
    assert below_threshold.text == "café" and below_threshold.score == 18
    assert empty.candidates[0].text == ""
    assert empty.probability == pytest.approx(empty.candidates[0].probability)
    assert empty.probability + below_threshold.probability == pytest.approx(1, abs=1e-3)


def test_decoding_over_several_windows():
    """The answer has the highest score of all windows, and "no answer" the lowest."""
    examples = [example(CAT, "sat"), example(CAT)]
    windows = make_windows(examples, length=14, max_question_length=2, stride=3)
    batch = make_batch(windows, length=14)
    logits = np.zeros((len(windows), 14, 2), np.float32)
    first_example = [i for i, w in enumerate(windows) if w.example_index == 0]
    assert len(first_example) > 2
    with_answer = [i for i in first_example if windows[i].start is not None]
    for rank, i in enumerate(first_example):
        logits[i, 0] = rank + 1
        if i in with_answer:
            logits[i, batch["start_positions"][i]] = 5
        else:
            logits[i, np.flatnonzero(batch["context_mask"][i])[0]] = 3
    answers = answer(examples, windows, batch, logits)
    assert (answers[0].text, answers[0].score, answers[0].no_answer_score) == ("sat", 10, 2)
    assert (answers[1].score, answers[1].no_answer_score) == (0, 0)
    offsets = [(c.start_char, c.end_char) for c in answers[0].candidates]
    assert len(set(offsets)) == len(offsets)  # a span of two windows is one candidate


def test_maximum_answer_length():
    examples, windows, batch = one_window("cat sat on the mat")
    logits = logits_of_correct_answers(batch)
    assert answer(examples, windows, batch, logits)[0].text == "cat sat on the mat"
    (short,) = answer(examples, windows, batch, logits, max_answer_length=4)
    assert short.score == 9 and len(short.text.split()) <= 4


def test_examples_with_wrong_offsets_can_be_skipped():
    good, bad = example(CAT, "café"), {**example(CAT, "café"), "id": "q7"}
    bad["answers"] = [{"text": "cafe", "start": 30}]
    with pytest.raises(ValueError, match="'q7': the context has 'café' at character 30, not"):
        make_windows([good, bad], length=40)
    windows = make_windows([bad, good], length=40, strict=False)
    assert {w.example_index for w in windows} == {1}
    batch = make_batch(windows, length=40)
    with pytest.raises(ValueError, match="1 of 2 examples have no window"):
        answer([bad, good], windows, batch, logits_of_correct_answers(batch))


@pytest.mark.parametrize(("e", "options", "message"), [
    (example(CAT), {"length": 20}, "rows of 20 tokens leave -3 for the context"),
    (example(CAT), {"stride": 0}, "the stride is 0"),
    (example(CAT, question=" ", id="q1"), {}, "question 'q1' has no tokens"),
    (example("\n", id="q1"), {}, "question 'q1' has a context without tokens"),
    (example(CAT, ""), {}, "not the answer ''"),
    (example("a \u200b b", "\u200b", id="q1"), {}, "'q1': no token has a character of the answer"),
    ({**example(CAT), "answers": [{"text": "the", "start": -3}]}, {}, "at character -3"),
    ({"question": "who", "context": 7}, {}, "text 0 is of type int"),
])
def test_invalid_examples(e, options, message):
    with pytest.raises(ValueError, match=message):
        make_windows([e], **options)


def test_long_questions_are_truncated():
    e = example(CAT, question="who sat on the mat and where")
    (window,) = make_windows([e], max_question_length=3)
    assert len(window.question_ids) == 3


def test_windows_that_do_not_match_the_predictions():
    examples, windows, batch = one_window()
    predictions = predict(batch, logits_of_correct_answers(batch))
    with pytest.raises(ValueError, match="2 windows but predictions for 1; give"):
        qa.decode_answers(examples, windows * 2, predictions)
