"""LoRA between us and PEFT itself, both ways: the same numbers on the reference's models.

    pip install torch==2.13.0 "transformers==5.*" peft
    python -m pytest tests/reference/test_live_peft.py -m reference
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL, inputs, make
from compare import TOLERANCE

from transformer_jax import forward, load_pretrained
from transformer_jax.finetuning import peft as peft_params
from transformer_jax.pretrained.peft_io import load_peft, save_peft
from transformer_jax.tree import flatten_paths, map_paths, unflatten_paths

# Warnings of the reference's own imports are not ours.
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def installed():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"the live comparison needs {package} (see docstring)")


def sizes(family):
    return SMALL if family == "Bart" else None


@functools.cache
def run(model):
    return jax.jit(functools.partial(forward, model))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    @functools.cache
    def make_pair(family, head):
        folder = tmp_path_factory.mktemp("base")
        theirs = make(family, head, 0, folder, sizes=sizes(family))
        model, params, _ = load_pretrained(folder)
        return theirs, model, params

    return make_pair


def assert_same_logits(ours, theirs, model, family, head):
    import torch

    batch = inputs(family, head, 0, "right", sizes(family))
    with torch.no_grad():
        expected = theirs.double().eval()(**{k: torch.from_numpy(v) for k, v in batch.items()})
    found = run(model)(ours, **batch)
    for name in ("logits", "last_hidden_state", "start_logits"):
        if name in found:
            error = np.abs(np.asarray(found[name]) - expected[name].numpy())
            if error.ndim == 3:
                mask = batch.get("decoder_attention_mask", batch["attention_mask"])
                error = error * mask[..., None]
            assert error.max() <= TOLERANCE * np.abs(expected[name].numpy()).max()
            return
    raise AssertionError(f"no logits in {sorted(found)}")


def moved(params, mask=None, seed=0):
    """All of LoRA, and whatever else the mask says, away from where it began."""
    rng = np.random.default_rng(seed)
    trains = flatten_paths(jax.tree.map(lambda _: False, params) if mask is None else mask)
    return map_paths(lambda path, leaf: leaf + jnp.asarray(
        0.2 * rng.normal(size=leaf.shape), jnp.float32)
        if trains[path] or path.endswith(("lora_a", "lora_b", "lora_magnitude")) else leaf, params)


CASES = [
    ("Bert", "ForSequenceClassification", "lora:3:all", True),
    ("Bert", "ForSequenceClassification", "lora:2:query,wo,dora", False),
    ("Bert", "Model", "lora:2:out,wi,wo", False),
    ("Roberta", "ForSequenceClassification", "lora:2:out,wo", False),
    ("DistilBert", "ForTokenClassification", "lora:2", True),
    ("GPT2", "LMHeadModel", "lora:2", False),
    ("GPT2", "LMHeadModel", "lora:2:all,dora", True),
    ("GPT2", "ForSequenceClassification", "lora:3:all,rslora", False),
    ("Bart", "ForConditionalGeneration", "lora:3:all,dropout=0.1", False),
    ("Bart", "ForSequenceClassification", "lora:2:key,out,dora", False),
]


@pytest.mark.parametrize(("family", "head", "recipe", "rslora"), CASES)
def test_peft_loads_ours(family, head, recipe, rslora, pair, tmp_path):
    import peft

    theirs, model, params = pair(family, head)
    params, mask = peft_params.add_and_mask(params, recipe, jax.random.key(0))
    params = moved(params, mask)
    save_peft(tmp_path, model, params, "base", mask=mask, use_rslora=rslora)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    loaded = adapted.load_adapter(tmp_path, "again")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora" in key and "again" in key]
    assert_same_logits(params, adapted, model, family, head)
    assert_same_logits(peft_params.merge(params), adapted.merge_and_unload(), model, family, head)
    again = load_peft(tmp_path, model, pair(family, head)[2])
    assert_same_logits(again, adapted.get_base_model(), model, family, head)


@pytest.mark.parametrize("recipe", ["bitfit+lora:2", "lora:2:wi", "layernorm+lora:2"])
def test_peft_loads_biases_and_norms(recipe, pair, tmp_path):
    import peft

    theirs, model, params = pair("Bert", "ForSequenceClassification")
    params, mask = peft_params.add_and_mask(params, recipe, jax.random.key(0))
    if recipe == "lora:2:wi":
        mask = map_paths(lambda path, train: train or path.endswith("wi/bias"), mask)
    params = moved(params, mask)
    save_peft(tmp_path, model, params, mask=mask)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    assert_same_logits(params, adapted, model, "Bert", "ForSequenceClassification")
    again = load_peft(tmp_path, model, pair("Bert", "ForSequenceClassification")[2])
    assert_same_logits(again, adapted, model, "Bert", "ForSequenceClassification")


def test_peft_loads_unlike_ranks_and_scales(pair, tmp_path):
    import peft

    for family, head in (("Bert", "ForSequenceClassification"), ("GPT2", "LMHeadModel")):
        theirs, model, params = pair(family, head)
        added = peft_params.add_peft_params(params, "lora:2:all", jax.random.key(0))
        leaves = flatten_paths(moved(added))
        for i, path in enumerate(sorted(leaves)):
            if path.endswith("lora_scale") and i % 3:
                leaves[path] = leaves[path] * (i % 5 + 1)
            if path.endswith("lora_a") and "layer_1" in path:
                other = path.replace("lora_a", "lora_b")
                leaves[path], leaves[other] = leaves[path][..., :1], leaves[other][:1]
            if "query/lora" in path and "layer_1" in path:
                leaves.pop(path)
        params = unflatten_paths(leaves)
        save_peft(tmp_path / family, model, params)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / family)
        assert_same_logits(params, adapted, model, family, head)
        assert_same_logits(load_peft(tmp_path / family, model, pair(family, head)[2]), adapted,
                           model, family, head)


OPTIONS = [
    ("Bert", "ForSequenceClassification", {"target_modules": ["query", "dense"]}),
    ("Bert", "ForSequenceClassification", {"target_modules": "all-linear", "use_dora": True}),
    ("Bert", "ForSequenceClassification", {"target_modules": ["value"], "bias": "all"}),
    ("Bert", "ForSequenceClassification", {"target_modules": ["value"], "bias": "lora_only"}),
    ("Bert", "ForSequenceClassification", {
        "target_modules": ["key", "value"], "rank_pattern": {r"layer\.1.*key": 5},
        "alpha_pattern": {"value": 3, "attention.self.key": 7}}),
    ("GPT2", "LMHeadModel", {"target_modules": ["c_attn"], "use_rslora": True}),
    ("GPT2", "LMHeadModel", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    ("GPT2", "ForSequenceClassification", {"task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    ("Bart", "ForConditionalGeneration", {"task_type": "SEQ_2_SEQ_LM"}),
    ("Bart", "ForSequenceClassification", {
        "target_modules": ["fc1", "out_proj"], "modules_to_save": ["classification_head"],
        "exclude_modules": ["classification_head.out_proj"]}),
]


@pytest.mark.parametrize(("family", "head", "options"), OPTIONS)
def test_ours_loads_peft(family, head, options, pair, tmp_path):
    import peft
    import torch

    theirs, model, params = pair(family, head)
    options = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": family == "GPT2", **options}
    adapted = peft.get_peft_model(copy.deepcopy(theirs).float(), peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape))
    adapted.save_pretrained(tmp_path)
    loaded = load_peft(tmp_path, model, params)
    assert_same_logits(loaded, adapted, model, family, head)
    # And back: PEFT's A of c_attn stays one.
    if options.get("bias", "none") == "none":
        save_peft(tmp_path / "back", model, loaded)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "back")
        assert_same_logits(loaded, back, model, family, head)
        if family == "GPT2":
            counts = [sum(t.numel() for n, t in m.named_parameters() if ".lora_" in n)
                      for m in (adapted, back)]
            assert counts[0] == counts[1]
    assert_same_logits(peft_params.merge(loaded), adapted.merge_and_unload(), model, family, head)
