"""Every study at its smallest: it runs, says what it found, and draws it."""

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

FOUND = {  # of the metrics of each, what its claim is judged by
    "bidirectional": ("filling", "continuation", "finetuned"),
    "embeddings": ("neighbours", "same_group_nearest", "same_label_nearest", "segments"),
    "grokking": ("sweep", "critical_share", "finetuning"),
    "masks": ("gpt", "spelling"),
    "objectives": ("systems", "chance"),
    "positions": ("GPT, none", "BERT, learned"),
    "residual_links": ("models", "landscape"),
    "transfer": ("rows", "held_out", "chance"),
    "which_parameters": ("cells", "best", "held_out_before"),
}


ALL = studies.load()  # their modules are there from here on


def test_all_are_here():
    assert sorted(FOUND) == studies.names()
    assert len(ALL) == 3 * len(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_the_smallest_of_each(name, tmp_path, request):
    module = sys.modules[f"studies.{name}"]
    c = dataclasses.replace(module.smallest(), out=tmp_path)
    if name == "transfer":
        c = dataclasses.replace(c, data=request.getfixturevalue("real_data"))
    study.main(c)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(FOUND[name]) <= saved["metrics"].keys()
    picture = imread(tmp_path / f"{name}.png")
    assert picture.std() > 0.05  # something is drawn


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path):
    for name, changes, message in (
        ("grokking", {"grokked": 0.9}, "grokked is 0.9"),
        ("residual_links", {"landscape_depth": 3}, "landscape_depth is 3"),
        ("transfer", {"data": tmp_path}, "does not exist"),
    ):
        module = sys.modules[f"studies.{name}"]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module.run(dataclasses.replace(module.smallest(), out=tmp_path, **changes))


def test_a_mask_by_hand_is_the_model_under_its_own():
    model, params = build(GPT2)
    tokens = random_tokens(2, 6)
    own = model.apply({"params": params}, tokens).logits
    by_hand = [masks.apply_under(model, Mask(causal=causal))({"params": params}, tokens).logits
               for causal in (True, False)]
    np.testing.assert_allclose(by_hand[0], own, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(by_hand[1] - own)).max() > 1e-3  # and the mask is what counts


def test_where_it_groks():
    shares = (0.2, 0.3, 0.5)
    assert grokking.critical_share(shares, np.array([0.1, 0.25, 0.75])) == pytest.approx(0.4)
    assert np.isnan(grokking.critical_share(shares, np.array([0.6, 0.7, 0.8])))
    found = grokking.first_above(np.array([10, 20, 30]), np.array([[0, 1, 1], [0, 0, 0.5]]), 0.9)
    assert found[0] == 20 and np.isnan(found[1])
    pairs = grokking.table(5)
    assert pairs["targets"][3 * 5 + 4, 2] == 2  # 3 + 4 = 7 = 2 (mod 5)


def test_filters_of_a_direction_have_the_norms_of_the_model():
    params = tree.stack_layers(build(GPT2)[1])
    leaves, drawn = (tree.flatten_paths(t) for t in (
        params, residual_links.direction(params, jax.random.key(0))))
    for path, axes in {"token_embed/embedding": 1, "decoder/layers/mlp/wi/kernel": 1,
                       "decoder/layers/self_attention/out/kernel": (1, 2)}.items():
        norms = [np.sqrt(np.square(np.asarray(x[path])).sum(axes)) for x in (leaves, drawn)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert not np.allclose(leaves[path], drawn[path])
    assert not np.any(drawn["decoder/layers/mlp/wi/bias"])


def test_the_share_beside_its_own_label():
    rows = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05]])
    assert embeddings.purity(rows, np.array([0, 0, 1, 1, 1])) == pytest.approx(0.4)
    assert embeddings.purity(rows, np.array([0, 0, 1, 1, 0])) == 1


def test_what_a_source_has_is_no_test():
    begin = "one line of which the source has the first sixty characters, and"
    examples = [{"text": text} for text in (
        begin + " goes on like this", "a text of twenty letters and more", "too short")]
    texts = ["other words", f"before\n{begin.replace(' ', '  ')} another end, too short"]
    assert transfer.unseen(examples, texts) == examples[1:]
    assert transfer.unseen(examples, texts[:1]) == examples
