"""Classification, regression, multiple choice, and the options of the GPT paper."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, TRANSFORMER, VOCAB, build, forward

from transformer_jax.finetuning import frozen, peft
from transformer_jax.models import build_model
from transformer_jax.objectives.classification import (
    TASK_TYPES,
    classification_loss,
    classification_predict,
    prepare_classification,
    prepare_multiple_choice,
    prepare_regression,
    regression_loss,
    regression_predict,
)
from transformer_jax.objectives.input_format import SpecialTokens, make_input_packer

LENGTH = 10
TOKENIZER = SimpleNamespace(cls_id=1, sep_id=2, pad_id=0, eos_id=3)
NEW = SpecialTokens.append_to_vocab(VOCAB)
EXISTING = SpecialTokens(4, 5, 3)  # ids of the vocabulary
GPT2, BERT, TRANSFORMER, BART = (
    config.replace(num_layers=1) for config in (GPT2, BERT, TRANSFORMER, BART))
FAMILIES = {"gpt": GPT2, "bert": BERT, "transformer": TRANSFORMER, "bart": BART}


def input_packer(config, special_tokens=EXISTING):
    return make_input_packer(build(config, 1)[0], TOKENIZER, LENGTH, special_tokens)


def stack(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def fixed_logits_apply(logits):
    """A model's `apply` that returns these logits for any input."""
    return lambda *args, **options: jnp.asarray(logits, jnp.float32)


def compiled(loss, model, params, batch, **options):
    return jax.jit(functools.partial(loss, model.apply, **options))(params, batch)


@functools.cache
def gpt_with_new_tokens():
    model, params = build(GPT2, 3)
    return model, peft.add_tokens(params, 3, jax.random.key(1))


PAIR = {"tokens": [7, 8], "tokens_b": [9], "label": 1}
CHOICES = {"tokens": [7, 8], "choices": [[9], [6, 6]], "label": 1}
prepare_pair_for_gpt = functools.partial(
    prepare_classification, pack_input=input_packer(GPT2, NEW), num_classes=3)
prepare_choices_for_bert = functools.partial(
    prepare_multiple_choice, pack_input=input_packer(BERT), num_choices=3)


# Classification -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "example", "tokens"),
    [
        (BERT, {"tokens": [7, 8]}, [1, 7, 8, 2, 0, 0, 0, 0, 0, 0]),
        (BERT, {"tokens": [7], "tokens_b": [8, 9]}, [1, 7, 2, 8, 9, 2, 0, 0, 0, 0]),
        (GPT2, {"tokens": [7, 8]}, [4, 7, 8, 3, 0, 0, 0, 0, 0, 0]),
        (GPT2, {"tokens": [7], "tokens_b": [8, 9]}, [4, 7, 5, 8, 9, 3, 0, 0, 0, 0]),
    ],
)
def test_prepare_classification(config, example, tokens):
    row = prepare_classification(
        {**example, "label": 2}, pack_input=input_packer(config), num_classes=3)
    assert row["tokens"].tolist() == tokens
    assert (row["labels"], row["weights"]) == (2, 1)
    assert (row["labels"].dtype, row["weights"].dtype) == ("int32", "float32")
    assert set(row) == {"tokens", "segment_ids", "padding_mask", "labels", "weights"}


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_raises(label):
    with pytest.raises(ValueError, match=f"label {label} is outside the 3 classes 0 to 2; fix"):
        prepare_classification(
            {"tokens": [1], "label": label}, pack_input=input_packer(BERT), num_classes=3)


def test_class_probabilities():
    batch = stack([prepare_classification(PAIR, pack_input=input_packer(BERT), num_classes=2)])
    found = classification_predict(fixed_logits_apply([[0, np.log(3)]]), {}, batch)
    np.testing.assert_allclose(found["probabilities"], [[0.25, 0.75]], rtol=1e-6)


# Regression ---------------------------------------------------------------------------------------


def test_regression_of_known_scores():
    rows = [prepare_regression({"tokens": [7], "label": label}, pack_input=input_packer(BERT),
                               label_range=(1, 5)) for label in (1, 2, 5.0)]
    batch = stack(rows)
    np.testing.assert_allclose(batch["labels"], [0, 0.25, 1])
    assert batch["labels"].dtype == np.float32
    batch["weights"][1] = 0
    apply = fixed_logits_apply([[0.5], [9.0], [0.75]])
    total, weight, metrics = regression_loss(apply, {}, batch)
    assert float(total) == pytest.approx(0.25 + 0.0625) and weight == 2
    assert metrics["squared_error"] == (total, weight)
    predict = functools.partial(regression_predict, apply, {}, batch)
    np.testing.assert_allclose(predict()["scores"], [0.5, 9, 0.75])
    np.testing.assert_allclose(predict(label_range=(1, 5))["scores"], [3, 37, 4])


# Multiple choice ----------------------------------------------------------------------------------


def test_prepare_multiple_choice():
    row = prepare_multiple_choice(CHOICES, pack_input=input_packer(GPT2, NEW), num_choices=3)
    start, delimiter, extract = NEW
    assert row["tokens"].tolist() == [
        [start, 7, 8, delimiter, 9, extract, 0, 0, 0, 0],
        [start, 7, 8, delimiter, 6, 6, extract, 0, 0, 0], [0] * 10]
    assert row["choices"].tolist() == [True, True, False]
    assert not row["padding_mask"][2].any() and row["labels"] == 1
    without_text = prepare_choices_for_bert({"choices": [[9], [6]], "label": 0})
    assert without_text["tokens"][:2, :4].tolist() == [[1, 9, 2, 0], [1, 6, 2, 0]]


@pytest.mark.slow
def test_multiple_choice_of_known_logits():
    """The third choice is padding: its logit, the highest, has no effect."""
    batch = stack([prepare_choices_for_bert({"choices": [[9], [6]], "label": 1})])
    apply = fixed_logits_apply([[0.0], [np.log(3)], [50.0]])
    total, weight, metrics = classification_loss(apply, {}, batch)
    assert float(total) == pytest.approx(np.log(4 / 3)) and weight == 1
    assert metrics["accuracy"] == (1, 1)
    probabilities = classification_predict(apply, {}, batch)["probabilities"]
    np.testing.assert_allclose(probabilities, [[0.25, 0.75, 0]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_scored_by_the_classifier_of_every_family(family):
    config = FAMILIES[family]
    model, params = build(config, 1)
    pack_input = input_packer(config)
    batch = stack([prepare_multiple_choice(CHOICES, pack_input=pack_input, num_choices=3)])
    total, weight, _ = compiled(classification_loss, model, params, batch)
    rows = stack([pack_input([7, 8], [9]), pack_input([7, 8], [6, 6])])
    logits = forward(config, rows.pop("tokens"), method="classification_logits", num_classes=1,
                     **rows)[:, 0]
    assert float(total) == pytest.approx(float(-jax.nn.log_softmax(logits)[1]), rel=1e-4)
    assert weight == 1
    assert model.METHODS["multiple_choice"] == "classification_logits"


# Options of the GPT paper -------------------------------------------------------------------------


def test_both_orders_adds_the_features_of_both_rows():
    model, params = gpt_with_new_tokens()
    prepare = functools.partial(prepare_pair_for_gpt, both_orders=True)
    start, delimiter, extract = NEW
    row = prepare(PAIR)
    assert row["tokens"].tolist() == [[start, 7, 8, delimiter, 9, extract, 0, 0, 0, 0],
                                      [start, 9, delimiter, 7, 8, extract, 0, 0, 0, 0]]
    swapped = prepare({**PAIR, "tokens": [9], "tokens_b": [7, 8]})
    predict = jax.jit(functools.partial(classification_predict, model.apply))
    probabilities = predict(params, stack([row, swapped]))["probabilities"]
    np.testing.assert_allclose(probabilities[0], probabilities[1], rtol=1e-5)
    assert np.abs(probabilities[0] - probabilities[0].mean()).max() > 0.01

    apply = jax.jit(functools.partial(model.apply, method="features"))
    features = apply({"params": params}, row["tokens"], padding_mask=row["padding_mask"])
    logits = model.apply({"params": params}, features.sum(0, keepdims=True),
                         method="logits_from_features")
    np.testing.assert_allclose(probabilities[0], jax.nn.softmax(logits)[0], rtol=1e-4)
    # The same from cached features.
    cached = stack(frozen.compute_features(model, params, [stack([row])]))
    from_cache = classification_predict(
        frozen.make_features_apply(model.apply), params, cached)
    np.testing.assert_allclose(from_cache["probabilities"][0], probabilities[0], rtol=1e-4)


def test_both_orders_of_a_single_text_raises():
    with pytest.raises(ValueError, match="both_orders is True, but the example has only one text"):
        prepare_pair_for_gpt({"tokens": [1], "label": 0}, both_orders=True)


@pytest.mark.parametrize("family", ["bert", "transformer"])
@pytest.mark.parametrize("options", [{"aux_lm_loss_weight": 0.5}, {}])
def test_options_for_gpt_raise_with_other_models(family, options):
    config = FAMILIES[family]
    model, params = build(config, 1)
    batch = stack([prepare_regression({**PAIR, "label": 0.5}, pack_input=input_packer(config),
                                      label_range=(0, 1), both_orders=not options)])
    with pytest.raises(ValueError, match=f"require GPT, but the model is a {type(model).__name__}"):
        regression_loss(model.apply, params, batch, **options)


def test_auxiliary_language_modeling_loss():
    model, params = gpt_with_new_tokens()
    batch = stack([prepare_pair_for_gpt(example) for example in
                   (PAIR, {"tokens": [6, 7, 6], "label": 2}, {"tokens": [8], "label": 0})])
    batch["weights"][2] = 0
    sums, weights, metrics = compiled(
        classification_loss, model, params, batch, aux_lm_loss_weight=0.5)
    task_sum, task_weight, _ = compiled(classification_loss, model, params, batch)
    assert float(sums["task"]) == pytest.approx(float(task_sum), rel=1e-5)
    assert weights == {"task": task_weight, "lm": 6}  # 7 8 9 and 6 7 6, without special tokens
    logits = jax.jit(model.apply)({"params": params}, batch["tokens"]).logits
    nll = -jax.nn.log_softmax(logits)
    targets = [(0, 0, 7), (0, 1, 8), (0, 3, 9), (1, 0, 6), (1, 1, 7), (1, 2, 6)]
    expected = sum(float(nll[target]) for target in targets)
    assert float(metrics["lm_nats"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(sums["lm"]) == pytest.approx(0.5 * expected, rel=1e-4)


def test_vocab_size_excludes_tokens_from_the_language_modeling_loss():
    model, params = gpt_with_new_tokens()
    batch = stack([prepare_pair_for_gpt(PAIR)])
    _, weights, _ = compiled(
        classification_loss, model, params, batch, aux_lm_loss_weight=0.5, vocab_size=9)
    assert weights["lm"] == 2


def test_auxiliary_language_modeling_loss_of_multiple_choice():
    model, params = build(GPT2, 1)
    batch = stack([prepare_multiple_choice(CHOICES, pack_input=input_packer(GPT2),
                                           num_choices=3)])
    _, weights, _ = compiled(classification_loss, model, params, batch, aux_lm_loss_weight=2.0)
    assert weights == {"task": 1, "lm": 5 + 6}


# Invalid examples, and the table of task types ----------------------------------------------------


def invalid_regression(label=1.0, label_range=(0, 5)):
    prepare_regression({"tokens": [1], "label": label}, pack_input=input_packer(BERT),
                       label_range=label_range)


def invalid_choices(choices, label):
    prepare_choices_for_bert({"choices": choices, "label": label})


@pytest.mark.parametrize(("call", "message"), [
    (lambda: invalid_regression(label=float("nan")), "label nan is not a finite number"),
    (lambda: invalid_regression(label_range=(5, 5)), "label_range is 5 to 5"),
    (lambda: invalid_choices([[1]], 0), "an example has 1 choices; it must have 2 to"),
    (lambda: invalid_choices([[1]] * 4, 0), "an example has 4 choices"),
    (lambda: invalid_choices([[1]] * 2, 2), "label 2 is outside the 2 choices 0 to 1"),
    (lambda: invalid_choices([[1]] * 2, -1), "label -1 is outside"),
])
def test_invalid_examples(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_method_for_every_task_type(family):
    assert set(TASK_TYPES) == {"classification", "regression", "multiple_choice",
                               "token_classification", "question_answering"}
    for task_type in TASK_TYPES.values():
        model = build_model(FAMILIES[family], 2, task_type.task)
        assert callable(getattr(model, model.METHODS[task_type.task]))
