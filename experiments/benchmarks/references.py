"""Workers of `bench_references.py` that run its workloads in other libraries, with random weights.

    python experiments/benchmarks/references.py LIBRARY CASE

LIBRARY is a key of `LIBRARIES`, and CASE is JSON (`bench_references.reference_case`). A worker runs
in the Python environment of its library, on a CPU or, with PyTorch, on a GPU. A training step is a
forward and backward pass and AdamW on all parameters, in float32 unless the name of the library
ends in bfloat16.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import interleave
import numpy as np

Case = dict[str, Any]
"""Sizes and settings of a workload."""
Work = Callable[[], object]
"""Function that runs the workload once and blocks until it is done."""


def random_batch(case: Case) -> dict[str, np.ndarray]:
    """Returns "tokens" `[B, S]`, "targets" and "decoder_tokens" `[B, T]`, and for BERT "labels"
    `[B]` and "masked" `[B, S]`, True at the positions to predict.
    """
    rng = np.random.default_rng(0)
    batch_size, length = case["batch_size"], case["length"]
    batch = {"tokens": rng.integers(5, case["vocab_size"], (batch_size, length))}
    batch["targets"] = rng.integers(
        5, case["vocab_size"], (batch_size, case["target_length"] or length))
    batch["decoder_tokens"] = np.roll(batch["targets"], 1, 1)
    batch["labels"] = rng.integers(0, 2, batch_size)
    masked = np.zeros((batch_size, length), bool)
    masked[:, : case["num_masked"]] = True
    return {name: x.astype(np.int32) for name, x in batch.items()} | {
        "masked": rng.permuted(masked, axis=1)}


def _hf_config(case: Case, **options: Any):
    """Returns the config of the model of Transformers, for PyTorch or Flax."""
    import transformers as hf

    rate = case["dropout_rate"]
    if case["family"] == "gpt":
        return hf.GPT2Config(
            n_layer=case["num_layers"], n_head=case["num_heads"], n_embd=case["d_model"],
            n_inner=case["mlp_dim"], n_positions=case["max_length"], vocab_size=case["vocab_size"],
            resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate, bos_token_id=0, pad_token_id=0,
            eos_token_id=None, **options)
    if case["family"] == "bert":
        return hf.BertConfig(
            num_hidden_layers=case["num_layers"], num_attention_heads=case["num_heads"],
            hidden_size=case["d_model"], intermediate_size=case["mlp_dim"],
            vocab_size=case["vocab_size"], hidden_dropout_prob=rate,
            attention_probs_dropout_prob=rate)
    return hf.BartConfig(
        encoder_layers=case["num_layers"], decoder_layers=case["num_layers"],
        d_model=case["d_model"], encoder_attention_heads=case["num_heads"],
        decoder_attention_heads=case["num_heads"], encoder_ffn_dim=case["mlp_dim"],
        decoder_ffn_dim=case["mlp_dim"], vocab_size=case["vocab_size"],
        max_position_embeddings=case["max_length"], dropout=rate, attention_dropout=rate,
        activation_dropout=0.0, **options)


def _torch_batch(case: Case) -> dict:
    """Returns the batch on the device; also enables TF32, as nanoGPT's train.py does."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return {name: torch.from_numpy(value).long().to(case["device"])
            for name, value in random_batch(case).items()}


def _torch_training(case: Case, model, loss_fn: Callable, bfloat16: bool = False) -> Work:
    """Returns training steps on the loss `loss_fn()`, with autocast if `bfloat16`."""
    import torch

    model.to(case["device"]).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01, fused=True)

    def train():
        for _ in range(case["steps_per_call"]):
            with torch.autocast(case["device"], torch.bfloat16, enabled=bfloat16):
                loss = loss_fn()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return train


def hf_torch(case: Case, bfloat16: bool = False) -> Work:
    """Transformers on PyTorch."""
    import torch
    import transformers as hf

    options = {} if case["family"] == "bert" else {"use_cache": case["work"] == "decode"}
    model = {"gpt": hf.GPT2LMHeadModel, "bert": hf.BertForPreTraining,
             "bart": hf.BartForConditionalGeneration}[case["family"]](_hf_config(case, **options))
    batch = _torch_batch(case)
    ones = torch.ones_like(batch["tokens"])
    if case["work"] == "decode":
        model.to(case["device"], torch.bfloat16 if bfloat16 else torch.float32).eval()
        new_tokens = case["target_length"]

        def decode():
            with torch.inference_mode():
                output = model.generate(
                    batch["tokens"], attention_mask=ones, do_sample=False,
                    max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)
            assert output.cpu().shape == (case["batch_size"], case["length"] + new_tokens)

        return decode
    inputs = {
        "gpt": lambda: {"input_ids": batch["tokens"], "labels": batch["tokens"]},
        "bert": lambda: {"input_ids": batch["tokens"], "attention_mask": ones,
                         "token_type_ids": torch.zeros_like(ones),
                         "labels": torch.where(batch["masked"].bool(), batch["targets"], -100),
                         "next_sentence_label": batch["labels"]},
        "bart": lambda: {"input_ids": batch["tokens"], "attention_mask": ones,
                         "decoder_input_ids": batch["decoder_tokens"],
                         "labels": batch["targets"]},
    }[case["family"]]()
    return _torch_training(case, model, lambda: model(**inputs).loss, bfloat16)


def hf_torch_bfloat16(case: Case) -> Work:
    """Transformers on PyTorch: training with autocast, decoding with bfloat16 weights."""
    return hf_torch(case, bfloat16=True)


def peft(case: Case) -> Work:
    """PEFT on PyTorch: a classifier, fine-tuned fully or with LoRA on query and value."""
    import torch
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    model = hf.BertForSequenceClassification(_hf_config(case))
    if case["work"] != "full":
        rank = int(case["work"].removeprefix("lora:"))
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS"))
    batch = _torch_batch(case)
    ones = torch.ones_like(batch["tokens"])
    return _torch_training(case, model, lambda: model(
        input_ids=batch["tokens"], attention_mask=ones, labels=batch["labels"]).loss)


def nanogpt(case: Case, compiled: bool = False, bfloat16: bool = False) -> Work:
    """nanoGPT (Karpathy); the environment variable NANOGPT has the path of its model.py."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("nanogpt", os.environ["NANOGPT"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(
        block_size=case["max_length"], vocab_size=case["vocab_size"], n_layer=case["num_layers"],
        n_head=case["num_heads"], n_embd=case["d_model"], dropout=case["dropout_rate"], bias=True))
    forward = torch.compile(model) if compiled else model
    batch = _torch_batch(case)
    return _torch_training(
        case, model, lambda: forward(batch["tokens"], batch["targets"])[1], bfloat16)


def nanogpt_compiled(case: Case) -> Work:
    """nanoGPT with torch.compile, the default of its train.py."""
    return nanogpt(case, compiled=True)


def nanogpt_compiled_bfloat16(case: Case) -> Work:
    """nanoGPT with torch.compile and autocast, the default of its train.py on a GPU."""
    return nanogpt(case, compiled=True, bfloat16=True)


def hf_flax(case: Case) -> Work:
    """Flax models of Transformers 4, jitted, with the parameters as arguments."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import functools

    import jax
    import jax.numpy as jnp
    import optax
    import transformers as hf

    rate = case["dropout_rate"]
    model_class = {"gpt": hf.FlaxGPT2LMHeadModel, "bert": hf.FlaxBertForPreTraining,
                   "bart": hf.FlaxBartForConditionalGeneration}[case["family"]]
    options = {"input_shape": (1, case["length"])} if case["family"] == "bert" else {}
    model = model_class(_hf_config(case), **options)
    params = model.params
    model._params = None  # the training state owns the parameters and donates their buffers
    batch = {name: jnp.asarray(value) for name, value in random_batch(case).items()}
    if case["work"] == "decode":
        generate = jax.jit(lambda params, tokens: model.generate(
            tokens, params=params, max_length=case["length"] + case["target_length"],
            do_sample=False, num_beams=1, pad_token_id=0,
            eos_token_id=case["vocab_size"] + 1).sequences)
        return lambda: generate(params, batch["tokens"]).block_until_ready()

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    tokens, targets = batch["tokens"], batch["targets"]
    ones = jnp.ones_like(tokens)

    def loss_fn(params, rng):
        options = {"params": params, "train": rate > 0,
                   "dropout_rng": rng if rate > 0 else None}
        if case["family"] == "gpt":
            return cross_entropy(model(tokens, **options).logits[:, :-1], tokens[:, 1:]).mean()
        if case["family"] == "bart":
            output = model(
                tokens, ones, decoder_input_ids=batch["decoder_tokens"], **options)
            return cross_entropy(output.logits, targets).mean()
        output = model(tokens, ones, jnp.zeros_like(ones), **options)
        masked_losses = cross_entropy(output.prediction_logits, targets) * batch["masked"]
        return (masked_losses.sum() / batch["masked"].sum()
                + cross_entropy(output.seq_relationship_logits, batch["labels"]).mean())

    optimizer = optax.adamw(1e-4, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, rng):
        rng, step_rng = jax.random.split(rng)
        loss, grads = jax.value_and_grad(loss_fn)(params, step_rng)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rng, loss

    state = [params, jax.jit(optimizer.init)(params), jax.random.PRNGKey(0)]

    def train():
        state[0], state[1], state[2], loss = train_step(*state)
        return jax.block_until_ready((state, loss))

    return train


def kerashub(case: Case) -> Work:
    """KerasHub on JAX; its BERT gathers the masked positions, without next-sentence prediction."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub

    models, batch = keras_hub.models, random_batch(case)
    tokens, targets = batch["tokens"], batch["targets"]
    ones = np.ones_like(tokens)
    backbone_options = {
        "vocabulary_size": case["vocab_size"], "num_layers": case["num_layers"],
        "num_heads": case["num_heads"], "hidden_dim": case["d_model"],
        "intermediate_dim": case["mlp_dim"], "max_sequence_length": case["max_length"],
        "dropout": case["dropout_rate"]}
    inputs = {"token_ids": tokens, "padding_mask": ones}
    if case["family"] == "gpt":
        model = models.GPT2CausalLM(models.GPT2Backbone(**backbone_options), preprocessor=None)
        if case["work"] == "decode":
            model.compile(sampler="greedy")
            new = np.zeros((case["batch_size"], case["target_length"]), np.int32)
            prompt = {"token_ids": np.concatenate([tokens, new], 1),
                      "padding_mask": np.concatenate([ones, new], 1)}
            return lambda: np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"])
    elif case["family"] == "bert":
        model = models.BertMaskedLM(models.BertBackbone(**backbone_options), preprocessor=None)
        positions = np.stack([np.flatnonzero(row) for row in batch["masked"]]).astype(np.int32)
        inputs |= {"segment_ids": np.zeros_like(ones), "mask_positions": positions}
        targets = np.take_along_axis(targets, positions, 1)
    else:
        raise SystemExit("unsupported model family 'bart' for KerasHub; supported: gpt, bert")
    model.compile(optimizer=keras.optimizers.AdamW(1e-4, weight_decay=0.01),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                  weighted_metrics=[], jit_compile=True)
    return lambda: float(np.asarray(model.train_on_batch(inputs, targets)))


def peak_memory(case: Case) -> int:
    """Returns the peak memory in bytes, of the GPU if PyTorch uses one, else of this process."""
    if case["device"] == "cpu":
        return interleave.peak_memory()
    import torch

    return torch.cuda.max_memory_allocated()


LIBRARIES = {f.__name__: f for f in (
    hf_torch, hf_torch_bfloat16, peft, nanogpt, nanogpt_compiled, nanogpt_compiled_bfloat16,
    hf_flax, kerashub)}

if __name__ == "__main__":
    library, case = sys.argv[1], json.loads(sys.argv[2])
    interleave.serve(
        LIBRARIES[library](case), min_seconds=case["round_seconds"],
        units_per_call=case["steps_per_call"], peak_bytes=lambda: peak_memory(case))
