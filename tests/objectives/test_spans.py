"""Answers as spans: windows, exact characters, the best span over windows."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, GPT2, build

from transformer_jax.data import tokenizers
from transformer_jax.objectives import input_format, question_answering

TEXTS = ["the cat sat on the mat in the café of the town while a dog ran by", "was für ein Tag",
         "who sat on the mat and where did it sit down"]


@functools.cache
def tokenizer(kind):
    return {"wordpiece": lambda: tokenizers.train_wordpiece(TEXTS, 240),
            "bpe": lambda: tokenizers.train_bpe(TEXTS, 300)}[kind]()


def rows(kind, length):
    if kind == "bpe":
        return functools.partial(input_format.pack_gpt_input, length=length, start_id=57, delimiter_id=58,
                                 extract_id=59)
    t = tokenizer(kind)
    return functools.partial(input_format.pack_bert_input, length=length, cls_id=t.cls_id, sep_id=t.sep_id)


def example(context, answer=None, question="who sat", **more):
    answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
    return {"question": question, "context": context, "answers": answers, **more}


def stack(made):
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def says(scores):
    """An `apply` that answers `[B, T, 2]` whatever it is asked."""
    return lambda *args, **options: jnp.asarray(scores)


def gold_scores(batch):
    """What a model says that knows the answers, and nothing of windows without one."""
    B, T = batch["tokens"].shape
    scores = np.zeros((B, T, 2), np.float32)
    for side, name in enumerate(("starts", "ends")):
        scores[np.arange(B), batch[name], side] = np.where(batch[name] == batch["none"], 0, 9)
    return scores


def answers_of(examples, windows, batch, scores, top=20, max_answer=30, **options):
    found = jax.device_get(question_answering.predict(says(scores), {}, batch, top=top, max_answer=max_answer))
    return question_answering.decode(examples, windows, found, **options)


CAT = "the cat sat on the mat in the café of the town while a dog ran by"


# Windows ------------------------------------------------------------------------------------------


def test_windows_by_hand():
    """15 words of one piece and rows for 10 of them, 4 further each time."""
    t = tokenizer("wordpiece")
    words = " ".join(["the", "cat", "sat"] * 5)
    e = {"question": "the cat", "context": words, "answers": [{"text": "sat the", "start": 45}]}
    ids = t.encode(words)
    assert len(ids) == 15
    with pytest.raises(ValueError, match="not the answer 'sat the'"):
        question_answering.make_windows([e], t, length=15, max_question=2)
    e["answers"][0]["start"] = 32
    make = functools.partial(question_answering.make_windows, [e, example(words)], t, length=15, max_question=2,
                             stride=4)
    windows = make()
    assert [(w.example, len(w.context)) for w in windows] == [
        (0, 10), (0, 10), (0, 7), (1, 10), (1, 10), (1, 7)]
    assert np.concatenate([windows[0].context, windows[2].context[2:]]).tolist() == ids
    assert [(w.start, w.end) for w in windows[:3]] == [(8, 9), (4, 5), (0, 1)]
    assert [w.start for w in windows[3:]] == [None] * 3
    for w in windows:
        assert [words[a:b] for a, b in w.offsets[:3]] == [
            t.decode([i]) for i in w.context[:3]]
    e["answers"] = [{"text": "the cat", "start": 0}]
    assert [(w.example, w.start) for w in make(without_answer=False)] == [
        (0, 0), (1, None), (1, None), (1, None)]
    assert len(make(stride=2)) > len(windows)


def test_rows_by_hand():
    t = tokenizer("wordpiece")
    made = question_answering.Window(0, np.array([7, 8]), np.array([4, 5, 6]), np.zeros((3, 2), int), 1, 2)
    none = made._replace(start=None, end=None)
    row = question_answering.prepare(made, row=rows("wordpiece", 10))
    assert row["tokens"].tolist() == [t.cls_id, 7, 8, t.sep_id, 4, 5, 6, t.sep_id, 0, 0]
    assert np.flatnonzero(row["context_mask"]).tolist() == [4, 5, 6]
    assert (row["starts"], row["ends"], row["none"], row["weights"]) == (5, 6, 0, 1)
    row = question_answering.prepare(none, row=rows("wordpiece", 10))
    assert (row["starts"], row["ends"]) == (0, 0)
    row = question_answering.prepare(none, row=rows("bpe", 10), last=True)
    assert row["tokens"].tolist() == [57, 7, 8, 58, 4, 5, 6, 59, 0, 0]
    assert np.flatnonzero(row["context_mask"]).tolist() == [4, 5, 6]
    assert (row["starts"], row["ends"], row["none"]) == (7, 7, 7)
    with pytest.raises(ValueError, match="of 2 and 3 tokens does not fit into a row of 7; make"):
        question_answering.prepare(made, row=rows("wordpiece", 7))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize(("context", "answer"), [
    (CAT, "café"), (CAT, "the town while"),
    ("le cafe\u0301 de  la\tville", "cafe\u0301"),  # the accent is a character of its own
    ("le cafe\u0301 de  la\tville", "la\tville"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "ÉTÉ"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "\N{GRINNING FACE}"),
    ("naïve ÉTÉ 日本語 \N{GRINNING FACE} end", "日本語"),
    ("a\n\n  the cat  \u3000 sat ", "the cat"), ("a\n\n  the cat  \u3000 sat ", "sat"),
    ("a \u2764\ufe0f b", "\u2764\ufe0f"),  # marks that do not combine with what is before them
    ("a \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 b", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"),
])
def test_characters_are_exact(kind, context, answer):
    examples = [example(context, answer)]
    windows = question_answering.make_windows(examples, tokenizer(kind), length=60, max_question=20)
    batch = stack([question_answering.prepare(w, row=rows(kind, 60)) for w in windows])
    (found,) = answers_of(examples, windows, batch, gold_scores(batch))
    assert found.text == answer == context[found.start : found.stop]
    assert found.score == 18


def test_real_questions(real_data):
    """Every gold answer that begins and ends with a token comes back, character for character."""
    t = tokenizers.load(real_data / "vocab_bert_uncased")
    with gzip.open(real_data / "squad" / "dev-v1.1.jsonl.gz", "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for line, _ in zip(lines, range(1500))]
    examples = [{"id": e["id"], "question": e["question"], "context": e["context"], "answers": [
        {"text": text, "start": start} for text, start in
        zip(e["answers"]["text"], e["answers"]["answer_start"])]} for e in read]
    windows = question_answering.make_windows(examples, t, length=200, stride=64)
    row = functools.partial(input_format.pack_bert_input, length=200, cls_id=t.cls_id, sep_id=t.sep_id)
    batch = stack([question_answering.prepare(w, row=row) for w in windows])
    found = answers_of(examples, windows, batch, gold_scores(batch), top=1, n_best=1)
    whole = set()
    for w in windows:
        gold = examples[w.example]["answers"][0]
        if w.start is not None and w.end - w.start < 30 and (
                w.offsets[w.start, 0], w.offsets[w.end, 1]) == (
                gold["start"], gold["start"] + len(gold["text"])):
            whole.add(w.example)
    assert len(windows) > len(examples) and len(whole) > 0.98 * len(examples)
    for i in whole:
        gold = examples[i]["answers"][0]
        assert (found[i].text, found[i].start) == (gold["text"], gold["start"])


# Loss and prediction ------------------------------------------------------------------------------


def one_window(kind="wordpiece", answer="café", length=40):
    examples = [example(CAT, answer)]
    windows = question_answering.make_windows(examples, tokenizer(kind), length=length, max_question=20)
    batch = stack([question_answering.prepare(w, row=rows(kind, length)) for w in windows])
    return examples, windows, batch


def test_loss_by_hand():
    """Places that are neither context nor [CLS] count nothing, whatever their score."""
    batch = {"tokens": np.zeros((1, 6), np.int32), "context_mask": np.arange(6)[None] // 2 == 1,
             "none": np.array([0]), "starts": np.array([2]), "ends": np.array([3]),
             "weights": np.ones(1, np.float32)}
    scores = np.full((1, 6, 2), 70.0, np.float32)
    scores[0, [0, 2, 3], 0] = np.log([1, 2, 5])
    scores[0, [0, 2, 3], 1] = np.log([1, 2, 1])
    total, weight, metrics = question_answering.loss(says(scores), {}, batch)
    assert float(total) == pytest.approx(-(np.log(2 / 8) + np.log(1 / 4)) / 2, rel=1e-5)
    assert weight == 1 and metrics["exact"] == (0, 1)


@pytest.mark.parametrize("max_answer", [1, 4, 30])
def test_the_best_spans_are_those_of_all_spans(max_answer):
    """Against every pair of start and end, one by one."""
    _, windows, batch = one_window()
    scores = np.random.default_rng(3).normal(size=(len(windows), 40, 2)).astype(np.float32)
    # The best ends are all before the best starts.
    scores[..., 0] += np.arange(40)
    scores[..., 1] -= np.arange(40)
    found = jax.device_get(question_answering.predict(says(scores), {}, batch, top=9, max_answer=max_answer))
    inside = np.flatnonzero(batch["context_mask"][0])
    every = sorted(((scores[0, i, 0] + scores[0, j, 1], i - inside[0], j - inside[0])
                    for i in inside for j in inside if 0 <= j - i < max_answer), reverse=True)[:9]
    got = list(zip(found["scores"][0], found["firsts"][0], found["lasts"][0]))
    np.testing.assert_allclose(got, every, rtol=1e-5, atol=1e-5)
    assert found["none"][0] == pytest.approx(scores[0, 0].sum())


@pytest.mark.parametrize("config", [GPT2, BART], ids=lambda c: type(c).__name__)
def test_answers_are_learnt(config):
    model, params = build(config.replace(num_layers=1), 2)
    made = question_answering.Window(0, np.array([7, 8]), np.arange(10, 18), np.zeros((8, 2), int), 3, 5)
    kind = "bpe" if config is GPT2 else "wordpiece"
    batch = stack([question_answering.prepare(made, row=rows(kind, 16), last=config is GPT2)])

    @jax.jit
    def step(params):
        def total(params):
            return question_answering.loss(model.apply, params, batch)[0]

        value, gradient = jax.value_and_grad(total)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    values = []
    for _ in range(15):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    found = jax.jit(functools.partial(question_answering.predict, model.apply))(params, batch)
    assert np.isfinite(found["none"]).all() and found["scores"][0, 0] >= found["scores"][0, 1]


# Decoding -----------------------------------------------------------------------------------------


def test_of_equal_spans_the_first_and_shortest():
    examples, windows, batch = one_window()
    (found,) = answers_of(examples, windows, batch, np.zeros((1, 40, 2), np.float32))
    assert (found.text, found.score) == ("the", 0) and len(found.best) == 20
    assert sum(share for *_, share in found.best) == pytest.approx(1)
    assert found.probability == pytest.approx(1 / 20)
    (few,) = answers_of(examples, windows, batch, np.zeros((1, 40, 2), np.float32), n_best=2)
    assert [text for text, *_ in few.best] == ["the", "the cat"]


def test_no_answer_and_its_threshold():
    examples, windows, batch = one_window()
    scores = gold_scores(batch)
    scores[0, 0] = 10  # [CLS]: 20 against 18 of the answer
    decode = functools.partial(answers_of, examples, windows, batch, scores)
    (real,), (none,), (over,) = (
        decode(), decode(no_answer=True), decode(no_answer=True, threshold=2.0))
    assert (real.text, real.none) == ("café", 20)
    assert (none.text, none.start, none.stop, none.score) == ("", 0, 0, 20)
    assert over.text == "café" and over.score == 18
    assert none.probability == pytest.approx(none.best[0][-1]) and none.best[0][0] == ""
    assert none.probability + over.probability == pytest.approx(1, abs=1e-3)


def test_the_best_over_windows():
    """The answer is where a window is surest; no answer where it is least likely."""
    examples = [example(CAT, "sat"), example(CAT)]
    t = tokenizer("wordpiece")
    windows = question_answering.make_windows(examples, t, length=14, max_question=2, stride=3)
    batch = stack([question_answering.prepare(w, row=rows("wordpiece", 14)) for w in windows])
    scores = np.zeros((len(windows), 14, 2), np.float32)
    own = [i for i, w in enumerate(windows) if w.example == 0]
    assert len(own) > 2
    held = [i for i in own if windows[i].start is not None]
    for rank, i in enumerate(own):
        scores[i, 0] = rank + 1
        place = batch["starts"][i] if i in held else np.flatnonzero(batch["context_mask"][i])[0]
        scores[i, place] = 5 if i in held else 3
    found = answers_of(examples, windows, batch, scores)
    assert (found[0].text, found[0].score, found[0].none) == ("sat", 10, 2)
    assert (found[1].score, found[1].none) == (0, 0)
    texts = [entry[1:3] for entry in found[0].best]
    assert len(set(texts)) == len(texts)  # a span that two windows hold is there once


def test_long_answers_are_not_given():
    examples, windows, batch = one_window(answer="cat sat on the mat")
    scores = gold_scores(batch)
    assert answers_of(examples, windows, batch, scores)[0].text == "cat sat on the mat"
    (short,) = answers_of(examples, windows, batch, scores, max_answer=4)
    assert short.score == 9 and len(short.text.split()) <= 4


def test_wrong_examples_can_be_left_out():
    good, bad = example(CAT, "café"), {**example(CAT, "café"), "id": "q7"}
    bad["answers"] = [{"text": "cafe", "start": 30}]
    t = tokenizer("wordpiece")
    with pytest.raises(ValueError, match="'q7': the context has 'café' at character 30, not"):
        question_answering.make_windows([good, bad], t, length=40, max_question=20)
    windows = question_answering.make_windows([bad, good], t, length=40, max_question=20, check=False)
    assert {w.example for w in windows} == {1}
    with pytest.raises(ValueError, match="1 of 2 examples have no window"):
        batch = stack([question_answering.prepare(w, row=rows("wordpiece", 40)) for w in windows])
        answers_of([bad, good], windows, batch, gold_scores(batch))


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
def test_bad_input(e, options, message):
    with pytest.raises(ValueError, match=message):
        question_answering.make_windows([e], tokenizer("wordpiece"), **{"length": 60, "max_question": 20,
                                                           **options})


def test_long_questions_are_cut():
    e = example(CAT, question="who sat on the mat and where")
    (window,) = question_answering.make_windows([e], tokenizer("wordpiece"), length=60, max_question=3)
    assert len(window.question) == 3


def test_predictions_of_other_windows():
    examples, windows, batch = one_window()
    found = jax.device_get(question_answering.predict(says(gold_scores(batch)), {}, batch))
    with pytest.raises(ValueError, match="1 windows were predicted of 2; give"):
        question_answering.decode(examples, windows * 2, found)
