"""Scores, choices, GPT's own way of reading: by hand, and through every family."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, TRANSFORMER, VOCAB, build, forward

from transformer_jax.finetuning import feature_cache, peft
from transformer_jax.models import build_model
from transformer_jax.objectives import classification

LENGTH = 10
TOKENIZER = SimpleNamespace(cls_id=1, sep_id=2, pad_id=0, eos_id=3)
NEW = classification.SpecialTokens.new(VOCAB)
OLD = classification.SpecialTokens(4, 5, 3)  # ids of the vocabulary
GPT2, BERT, TRANSFORMER, BART = (
    config.replace(num_layers=1) for config in (GPT2, BERT, TRANSFORMER, BART))
FAMILIES = {"gpt": GPT2, "bert": BERT, "transformer": TRANSFORMER, "bart": BART}


def row_of(config, specials=OLD):
    return classification.make_input_packer(build(config, 1)[0], TOKENIZER, LENGTH, specials)


def stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def says(scores):
    """An `apply` that answers this whatever it is asked."""
    return lambda *args, **options: jnp.asarray(scores, jnp.float32)


def value(loss, model, params, batch, **options):
    return jax.jit(functools.partial(loss, model.apply, **options))(params, batch)


@functools.cache
def gpt_with_new_tokens():
    model, params = build(GPT2, 3)
    return model, peft.add_tokens(params, 3, jax.random.key(1))


PAIR = {"tokens": [7, 8], "tokens_b": [9], "label": 1}


# Scores -------------------------------------------------------------------------------------------


def test_regression_by_hand():
    rows = [classification.prepare_regression({"tokens": [7], "label": label}, row=row_of(BERT),
                                     label_range=(1, 5)) for label in (1, 2, 5.0)]
    batch = stack(rows)
    np.testing.assert_allclose(batch["labels"], [0, 0.25, 1])
    assert batch["labels"].dtype == np.float32
    batch["weights"][1] = 0
    apply = says([[0.5], [9.0], [0.75]])
    total, weight, metrics = classification.regression_loss(apply, {}, batch)
    assert float(total) == pytest.approx(0.25 + 0.0625) and weight == 2
    assert metrics["squared_error"] == (total, weight)
    found = functools.partial(classification.regression_predict, apply, {}, batch)
    np.testing.assert_allclose(found()["scores"], [0.5, 9, 0.75])
    np.testing.assert_allclose(found(label_range=(1, 5))["scores"], [3, 37, 4])


def test_probabilities_by_hand():
    batch = stack([classification.prepare_classification(PAIR, row=row_of(BERT), num_classes=2)])
    found = classification.classification_predict(says([[0, np.log(3)]]), {}, batch)
    np.testing.assert_allclose(found["probabilities"], [[0.25, 0.75]], rtol=1e-6)


# Choices ------------------------------------------------------------------------------------------


def test_choice_rows_by_hand():
    made = classification.prepare_multiple_choice({"tokens": [7, 8], "choices": [[9], [6, 6]], "label": 1},
                                row=row_of(GPT2, NEW), num_choices=3)
    start, between, extract = NEW
    assert made["tokens"].tolist() == [
        [start, 7, 8, between, 9, extract, 0, 0, 0, 0],
        [start, 7, 8, between, 6, 6, extract, 0, 0, 0], [0] * 10]
    assert made["choices"].tolist() == [True, True, False]
    assert not made["padding_mask"][2].any() and made["labels"] == 1
    alone = classification.prepare_multiple_choice({"choices": [[9], [6]], "label": 0}, row=row_of(BERT),
                                 num_choices=2)
    assert alone["tokens"][:, :4].tolist() == [[1, 9, 2, 0], [1, 6, 2, 0]]


def test_choice_loss_by_hand():
    """The third choice is none: its score, the highest, counts nothing."""
    batch = stack([classification.prepare_multiple_choice({"choices": [[9], [6]], "label": 1}, row=row_of(BERT),
                                        num_choices=3)])
    apply = says([[0.0], [np.log(3)], [50.0]])
    total, weight, metrics = classification.multiple_choice_loss(apply, {}, batch)
    assert float(total) == pytest.approx(np.log(4 / 3)) and weight == 1
    assert metrics["accuracy"] == (1, 1)
    np.testing.assert_allclose(classification.multiple_choice_predict(apply, {}, batch)["probabilities"],
                               [[0.25, 0.75, 0]], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_the_families_scores(family):
    config = FAMILIES[family]
    model, params = build(config, 1)
    row = row_of(config)
    made = stack([classification.prepare_multiple_choice({"tokens": [7, 8], "choices": [[9], [6, 6]], "label": 1},
                                       row=row, num_choices=3)])
    total, weight, _ = value(classification.multiple_choice_loss, model, params, made)
    each = stack([row([7, 8], [9]), row([7, 8], [6, 6])])
    scores = forward(config, each.pop("tokens"), method="classification_logits", num_classes=1, **each)[:, 0]
    assert float(total) == pytest.approx(float(-jax.nn.log_softmax(scores)[1]), rel=1e-4)
    assert weight == 1
    assert model.METHODS["multiple_choice"] == "classification_logits"


# GPT's own way ------------------------------------------------------------------------------------


def test_both_orders_by_hand():
    """Rows in both orders; the features of their extract tokens are added."""
    model, params = gpt_with_new_tokens()
    prepare = functools.partial(classification.prepare_classification, row=row_of(GPT2, NEW), num_classes=3,
                                both_orders=True)
    start, between, extract = NEW
    made = prepare(PAIR)
    assert made["tokens"].tolist() == [[start, 7, 8, between, 9, extract, 0, 0, 0, 0],
                                       [start, 9, between, 7, 8, extract, 0, 0, 0, 0]]
    turned = prepare({**PAIR, "tokens": [9], "tokens_b": [7, 8]})
    predict = jax.jit(functools.partial(classification.classification_predict, model.apply))
    found = predict(params, stack([made, turned]))["probabilities"]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert np.abs(found[0] - found[0].mean()).max() > 0.01

    apply = jax.jit(functools.partial(model.apply, method="features"))
    two = apply({"params": params}, made["tokens"], padding_mask=made["padding_mask"])
    logits = model.apply({"params": params}, two.sum(0, keepdims=True), method="logits_from_features")
    np.testing.assert_allclose(found[0], jax.nn.softmax(logits)[0], rtol=1e-4)
    # From features that were computed once it is the same.
    once = stack(feature_cache.compute_features(model, params, [stack([made])]))
    again = classification.classification_predict(feature_cache.apply_to_features(model.apply), params, once)
    np.testing.assert_allclose(again["probabilities"][0], found[0], rtol=1e-4)


def test_both_orders_want_two_texts():
    with pytest.raises(ValueError, match="both_orders needs two texts, and the example has one"):
        classification.prepare_classification({"tokens": [1], "label": 0}, row=row_of(GPT2), num_classes=2,
                                     both_orders=True)


@pytest.mark.parametrize("family", ["bert", "transformer"])
@pytest.mark.parametrize("options", [{"aux_lm_loss_weight": 0.5}, {}])
def test_gpts_way_is_for_gpt(family, options):
    config = FAMILIES[family]
    model, params = build(config, 1)
    batch = stack([classification.prepare_regression({**PAIR, "label": 0.5}, row=row_of(config),
                                            label_range=(0, 1), both_orders=not options)])
    with pytest.raises(ValueError, match=f"for GPT, and the model is a {type(model).__name__}"):
        classification.regression_loss(model.apply, params, batch, **options)


def test_language_model_loss_by_hand():
    model, params = gpt_with_new_tokens()
    row = row_of(GPT2, NEW)
    batch = stack([classification.prepare_classification(example, row=row, num_classes=3) for example in
                   (PAIR, {"tokens": [6, 7, 6], "label": 2}, {"tokens": [8], "label": 0})])
    batch["weights"][2] = 0
    sums, weights, metrics = value(classification.classification_loss, model, params, batch, aux_lm_loss_weight=0.5)
    alone, weight, _ = value(classification.classification_loss, model, params, batch)
    assert float(sums["task"]) == pytest.approx(float(alone), rel=1e-5)
    assert weights == {"task": weight, "lm": 6}  # 7 8 9 and 6 7 6, no special token
    logits = jax.jit(model.apply)({"params": params}, batch["tokens"]).logits
    nats = -jax.nn.log_softmax(logits)
    places = [(0, 0, 7), (0, 1, 8), (0, 3, 9), (1, 0, 6), (1, 1, 7), (1, 2, 6)]
    expected = sum(float(nats[place]) for place in places)
    assert float(metrics["lm_nats"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(sums["lm"]) == pytest.approx(0.5 * expected, rel=1e-4)


def test_fewer_targets_with_a_smaller_vocabulary():
    model, params = gpt_with_new_tokens()
    batch = stack([classification.prepare_classification(PAIR, row=row_of(GPT2, NEW), num_classes=3)])
    _, weights, _ = value(classification.classification_loss, model, params, batch, aux_lm_loss_weight=0.5,
                          vocab_size=9)
    assert weights["lm"] == 2


def test_language_model_loss_of_choices():
    model, params = build(GPT2, 1)
    batch = stack([classification.prepare_multiple_choice({"tokens": [7, 8], "choices": [[9], [6, 6]], "label": 1},
                                        row=row_of(GPT2), num_choices=3)])
    _, weights, _ = value(classification.multiple_choice_loss, model, params, batch, aux_lm_loss_weight=2.0)
    assert weights == {"task": 1, "lm": 5 + 6}


# Bad input, and the table -------------------------------------------------------------------------


def regression(**changes):
    example = {"tokens": [1], "label": changes.pop("label", 1.0)}
    classification.prepare_regression(example, row=row_of(BERT), **{"label_range": (0, 5), **changes})


def choice(choices, label):
    classification.prepare_multiple_choice({"choices": choices, "label": label}, row=row_of(BERT), num_choices=3)


@pytest.mark.parametrize(("act", "message"), [
    (lambda: regression(label=float("nan")), "label nan is no finite number"),
    (lambda: regression(label_range=(5, 5)), "label_range is 5 to 5"),
    (lambda: choice([[1]], 0), "an example has 1 choices; give 2 to num_choices = 3"),
    (lambda: choice([[1]] * 4, 0), "an example has 4 choices"),
    (lambda: choice([[1]] * 2, 2), "label 2 is outside the 2 choices 0 to 1"),
    (lambda: choice([[1]] * 2, -1), "label -1 is outside"),
])
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_has_a_method_in_every_family(family):
    assert set(classification.TASK_TYPES) == {"classification", "regression", "multiple_choice",
                                "token_classification", "question_answering"}
    for kind in classification.TASK_TYPES.values():
        model = build_model(FAMILIES[family], 2, kind.task)
        assert callable(getattr(model, model.METHODS[kind.task]))
