"""Every study at its smallest size runs, returns its metrics and saves its figure."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import studies
import study
from matplotlib.image import imread
from small_models import GPT2, build, random_tokens
from studies import embeddings, grokking, masks, residual_links, transfer

from transformer_jax import tree
from transformer_jax.nn.attention import Mask

METRICS = {  # study -> metrics that decide its claims
    "bidirectional": ("filling", "continuation", "finetuned"),
    "embeddings": ("neighbors", "same_group_nearest", "same_label_nearest", "segments"),
    "grokking": ("sweep", "critical_fraction", "finetuning"),
    "masks": ("gpt", "spelling"),
    "objectives": ("systems", "chance"),
    "positions": ("GPT, none", "BERT, learned"),
    "residual_links": ("models", "landscape"),
    "transfer": ("rows", "held_out", "chance"),
    "which_parameters": ("cells", "best", "held_out_before"),
}
ALL = studies.load()  # imports all modules of studies


def test_all_studies_are_listed():
    assert sorted(METRICS) == [name for name in ALL if "-" not in name]
    assert len(ALL) == 3 * len(METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_study_at_its_smallest_size(name, tmp_path, request):
    module = sys.modules[f"studies.{name}"]
    config = dataclasses.replace(module.SIZES["smallest"], out=tmp_path)
    if name == "transfer":
        config = dataclasses.replace(config, data=request.getfixturevalue("real_data"))
    study.main(config)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(METRICS[name]) <= saved["metrics"].keys()
    figure = imread(tmp_path / f"{name}.png")
    assert figure.std() > 0.05  # it is not empty


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("grokking", {"grokked_fraction": 0.9}, "grokked_fraction is 0.9"),
    ("grokking", {"finetune_fraction": 0.8}, "finetune_fraction is 0.8"),
    ("residual_links", {"landscape_depth": 3}, "landscape_depth is 3"),
    ("transfer", {"data": "absent"}, "does not exist"),
])
def test_invalid_settings_are_errors_before_training(name, changes, message, tmp_path):
    module = sys.modules[f"studies.{name}"]
    if "data" in changes:
        changes = {"data": tmp_path / changes["data"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module.run(dataclasses.replace(module.SIZES["smallest"], out=tmp_path, **changes))


@pytest.mark.slow
def test_replaced_mask_equals_the_models_own():
    model, params = build(GPT2)
    tokens = random_tokens(2, 6)
    expected = model.apply({"params": params}, tokens).logits
    causal, full = (
        masks.apply_with_mask(model, Mask(causal=causal))({"params": params}, tokens).logits
        for causal in (True, False))
    np.testing.assert_allclose(causal, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(full - expected)).max() > 1e-3  # the mask matters


def test_critical_fraction_and_first_step_of_grokking():
    fractions = (0.2, 0.3, 0.5)
    assert grokking.critical_fraction(
        fractions, np.array([0.1, 0.25, 0.75])) == pytest.approx(0.4)
    assert np.isnan(grokking.critical_fraction(fractions, np.array([0.6, 0.7, 0.8])))
    steps = grokking.first_step_above(
        np.array([10, 20, 30]), np.array([[0, 1, 1], [0, 0, 0.5]]), 0.9)
    assert steps[0] == 20 and np.isnan(steps[1])
    pairs = grokking.addition_table(5)
    assert pairs["targets"][3 * 5 + 4, 2] == 2  # 3 + 4 = 7 = 2 (mod 5)


@pytest.mark.slow
def test_filters_of_a_random_direction_have_the_norms_of_the_model():
    params = tree.stack_layers(build(GPT2)[1])
    leaves, direction = (tree.flatten_paths(t) for t in (
        params, residual_links.random_direction(params, jax.random.key(0))))
    for path, axes in {"token_embed/embedding": 1, "decoder/layers/mlp/wi/kernel": 1,
                       "decoder/layers/self_attention/out/kernel": (1, 2)}.items():
        norms = [np.sqrt(np.square(np.asarray(x[path])).sum(axes)) for x in (leaves, direction)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert not np.allclose(leaves[path], direction[path])
    assert not np.any(direction["decoder/layers/mlp/wi/bias"])


def test_nearest_neighbor_accuracy():
    rows = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05]])
    labels = np.array([0, 0, 1, 1, 1])
    assert embeddings.nearest_neighbor_accuracy(rows, labels) == pytest.approx(0.4)
    assert embeddings.nearest_neighbor_accuracy(rows, np.array([0, 0, 1, 1, 0])) == 1


def test_texts_of_a_source_are_removed_from_the_test_examples():
    beginning = "one line of which the source has the first sixty characters, and"
    examples = [{"text": text} for text in (
        beginning + " continues like this", "a text of twenty letters and more", "too short")]
    texts = ["other words", f"before\n{beginning.replace(' ', '  ')} another end, too short"]
    assert transfer.remove_seen(examples, texts) == examples[1:]
    assert transfer.remove_seen(examples, texts[:1]) == examples
