"""The same work by other libraries, for `bench_references.py`: one worker a process, in the
environment of that library, with random weights, on a CPU or (PyTorch) a GPU.

A worker is called as `python references.py LIBRARY JSON`, of which JSON has the sizes and the
device (`bench_references.shape_of`). Training is forward, backward and AdamW of every parameter,
float32.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import interleave

Shape = dict[str, Any]
Work = Callable[[], object]


def batch(s: Shape) -> dict[str, np.ndarray]:
    """Random ids: tokens, targets, of BERT which positions count, of two sequences the second."""
    rng = np.random.default_rng(0)
    rows, length, target = s["rows"], s["length"], s["target"]
    ids = {"tokens": rng.integers(5, s["vocab_size"], (rows, length))}
    ids["targets"] = rng.integers(5, s["vocab_size"], (rows, target or length))
    ids["decoder_tokens"] = np.roll(ids["targets"], 1, 1)
    ids["labels"] = rng.integers(0, 2, rows)
    masked = np.zeros((rows, length), bool)
    masked[:, : s["masked"]] = True
    return {name: x.astype(np.int32) for name, x in ids.items()} | {
        "masked": rng.permuted(masked, axis=1)}


# PyTorch ------------------------------------------------------------------------------------------


def _torch_model(s: Shape, use_cache: bool):
    """Transformers' model of this shape."""
    import transformers as hf

    rate = s["dropout_rate"]
    if s["kind"] == "gpt":
        return hf.GPT2LMHeadModel(hf.GPT2Config(
            n_layer=s["layers"], n_head=s["heads"], n_embd=s["width"], n_inner=s["mlp"],
            n_positions=s["max_length"], vocab_size=s["vocab_size"], resid_pdrop=rate,
            embd_pdrop=rate, attn_pdrop=rate, bos_token_id=None, eos_token_id=None,
            use_cache=use_cache))
    if s["kind"] == "bert":
        return hf.BertForPreTraining(hf.BertConfig(
            num_hidden_layers=s["layers"], num_attention_heads=s["heads"], hidden_size=s["width"],
            intermediate_size=s["mlp"], vocab_size=s["vocab_size"], hidden_dropout_prob=rate,
            attention_probs_dropout_prob=rate))
    return hf.BartForConditionalGeneration(hf.BartConfig(
        encoder_layers=s["layers"], decoder_layers=s["layers"], d_model=s["width"],
        encoder_attention_heads=s["heads"], decoder_attention_heads=s["heads"],
        encoder_ffn_dim=s["mlp"], decoder_ffn_dim=s["mlp"], vocab_size=s["vocab_size"],
        max_position_embeddings=s["max_length"], dropout=rate, attention_dropout=rate,
        activation_dropout=0.0, use_cache=use_cache))


def _torch_inputs(s: Shape) -> dict:
    """The batch on the device. TF32 is allowed there, as in nanoGPT's train.py."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return {name: torch.from_numpy(value).long().to(s["device"])
            for name, value in batch(s).items()}


def _torch_training(s: Shape, model, loss_of: Callable, bfloat16: bool = False) -> Work:
    import torch

    model.to(s["device"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def steps():
        for _ in range(s["times"]):
            with torch.autocast(s["device"], torch.bfloat16, enabled=bfloat16):
                loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return steps


def hf_torch(s: Shape, bfloat16: bool = False) -> Work:
    """Transformers on PyTorch."""
    import torch

    model = _torch_model(s, use_cache=s["work"] == "decode")
    x = _torch_inputs(s)
    ones = torch.ones_like(x["tokens"])
    if s["work"] == "decode":
        model.to(s["device"], torch.bfloat16 if bfloat16 else torch.float32).eval()

        def decode():
            with torch.inference_mode():
                out = model.generate(x["tokens"], attention_mask=ones, do_sample=False,
                                     max_new_tokens=s["target"], min_new_tokens=s["target"],
                                     pad_token_id=0)
            assert out.cpu().shape == (s["rows"], s["length"] + s["target"])

        return decode
    inputs = {
        "gpt": lambda: {"input_ids": x["tokens"], "labels": x["tokens"]},
        "bert": lambda: {"input_ids": x["tokens"], "attention_mask": ones,
                         "token_type_ids": torch.zeros_like(ones),
                         "labels": torch.where(x["masked"].bool(), x["targets"], -100),
                         "next_sentence_label": x["labels"]},
        "bart": lambda: {"input_ids": x["tokens"], "attention_mask": ones,
                         "decoder_input_ids": x["decoder_tokens"], "labels": x["targets"]},
    }[s["kind"]]()
    return _torch_training(s, model, lambda: model(**inputs).loss, bfloat16)


def hf_torch_bfloat16(s: Shape) -> Work:
    """The same under autocast; decoding, with weights of 16 bits."""
    return hf_torch(s, bfloat16=True)


def nanogpt(s: Shape, compiled: bool = False, bfloat16: bool = False) -> Work:
    """Karpathy's nanoGPT: the file model.py of its repository, at $NANOGPT."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("nanogpt", os.environ["NANOGPT"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(
        block_size=s["max_length"], vocab_size=s["vocab_size"], n_layer=s["layers"],
        n_head=s["heads"], n_embd=s["width"], dropout=s["dropout_rate"], bias=True))
    net = torch.compile(model) if compiled else model
    x = _torch_inputs(s)
    return _torch_training(s, model, lambda: net(x["tokens"], x["targets"])[1], bfloat16)


def nanogpt_compiled(s: Shape) -> Work:
    """The same under torch.compile, as its train.py does by default."""
    return nanogpt(s, compiled=True)


def nanogpt_compiled_bfloat16(s: Shape) -> Work:
    """The same under autocast, as its train.py does on a GPU."""
    return nanogpt(s, compiled=True, bfloat16=True)


# Flax and Keras -----------------------------------------------------------------------------------


def hf_flax(s: Shape) -> Work:
    """Flax models of Transformers 4, under jit with the parameters as arguments."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import functools

    import jax
    import jax.numpy as jnp
    import optax
    import transformers as hf

    rate, shape = s["dropout_rate"], (1, s["length"])
    if s["kind"] == "gpt":
        model = hf.FlaxGPT2LMHeadModel(hf.GPT2Config(
            n_layer=s["layers"], n_head=s["heads"], n_embd=s["width"], n_inner=s["mlp"],
            n_positions=s["max_length"], vocab_size=s["vocab_size"], resid_pdrop=rate,
            embd_pdrop=rate, attn_pdrop=rate, bos_token_id=0, pad_token_id=0,
            eos_token_id=None))
    elif s["kind"] == "bert":
        model = hf.FlaxBertForPreTraining(hf.BertConfig(
            num_hidden_layers=s["layers"], num_attention_heads=s["heads"], hidden_size=s["width"],
            intermediate_size=s["mlp"], vocab_size=s["vocab_size"], hidden_dropout_prob=rate,
            attention_probs_dropout_prob=rate), input_shape=shape)
    else:
        model = hf.FlaxBartForConditionalGeneration(hf.BartConfig(
            encoder_layers=s["layers"], decoder_layers=s["layers"], d_model=s["width"],
            encoder_attention_heads=s["heads"], decoder_attention_heads=s["heads"],
            encoder_ffn_dim=s["mlp"], decoder_ffn_dim=s["mlp"], vocab_size=s["vocab_size"],
            max_position_embeddings=s["max_length"], dropout=rate, attention_dropout=rate,
            activation_dropout=0.0))
    params = model.params
    model._params = None  # the state owns them
    x = {name: jnp.asarray(value) for name, value in batch(s).items()}
    if s["work"] == "decode":
        generate = jax.jit(lambda params, ids: model.generate(
            ids, params=params, max_length=s["length"] + s["target"], do_sample=False,
            num_beams=1, pad_token_id=0, eos_token_id=s["vocab_size"] + 1).sequences)
        return lambda: generate(params, x["tokens"]).block_until_ready()

    xent = optax.softmax_cross_entropy_with_integer_labels
    ones = jnp.ones_like(x["tokens"])

    def loss_fn(params, rng):
        options = {"params": params, "train": rate > 0,
                   "dropout_rng": rng if rate > 0 else None}
        if s["kind"] == "gpt":
            return xent(model(x["tokens"], **options).logits[:, :-1], x["tokens"][:, 1:]).mean()
        if s["kind"] == "bart":
            out = model(x["tokens"], ones, decoder_input_ids=x["decoder_tokens"], **options)
            return xent(out.logits, x["targets"]).mean()
        out = model(x["tokens"], ones, jnp.zeros_like(ones), **options)
        words = xent(out.prediction_logits, x["targets"]) * x["masked"]
        return (words.sum() / x["masked"].sum()
                + xent(out.seq_relationship_logits, x["labels"]).mean())

    optimizer = optax.adamw(1e-4, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, rng):
        rng, now = jax.random.split(rng)
        loss, gradient = jax.value_and_grad(loss_fn)(params, now)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rng, loss

    state = [params, jax.jit(optimizer.init)(params), jax.random.PRNGKey(0)]

    def step():
        state[0], state[1], state[2], loss = train_step(*state)
        return jax.block_until_ready((state, loss))

    return step


def kerashub(s: Shape) -> Work:
    """KerasHub on JAX. BERT there has no next sentence; it gathers the masked positions."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub

    models, x = keras_hub.models, batch(s)
    ones = np.ones_like(x["tokens"])
    common = {"vocabulary_size": s["vocab_size"], "num_layers": s["layers"],
              "num_heads": s["heads"], "hidden_dim": s["width"], "intermediate_dim": s["mlp"],
              "max_sequence_length": s["max_length"], "dropout": s["dropout_rate"]}
    inputs = {"token_ids": x["tokens"], "padding_mask": ones}
    if s["kind"] == "gpt":
        model, targets = models.GPT2CausalLM(models.GPT2Backbone(**common), preprocessor=None), (
            x["targets"])
        if s["work"] == "decode":
            model.compile(sampler="greedy")
            room = np.zeros((s["rows"], s["target"]), np.int32)
            prompt = {"token_ids": np.concatenate([x["tokens"], room], 1),
                      "padding_mask": np.concatenate([ones, room], 1)}
            return lambda: np.asarray(
                model.generate(prompt, stop_token_ids=None)["token_ids"])
    elif s["kind"] == "bert":
        model = models.BertMaskedLM(models.BertBackbone(**common), preprocessor=None)
        positions = np.stack([np.flatnonzero(row) for row in x["masked"]]).astype(np.int32)
        inputs |= {"segment_ids": np.zeros_like(ones), "mask_positions": positions}
        targets = np.take_along_axis(x["targets"], positions, 1)
    else:
        raise SystemExit("KerasHub's BART has no head to train")
    model.compile(optimizer=keras.optimizers.AdamW(1e-4, weight_decay=0.01),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                  weighted_metrics=[], jit_compile=True)
    return lambda: float(np.asarray(model.train_on_batch(inputs, targets)))


def peak_memory(s: Shape) -> int:
    """Bytes at the most: of the GPU where PyTorch uses one, else of this process."""
    if s["device"] == "cpu":
        return interleave.peak_memory()
    import torch

    return torch.cuda.max_memory_allocated()


LIBRARIES = {f.__name__: f for f in (
    hf_torch, hf_torch_bfloat16, nanogpt, nanogpt_compiled, nanogpt_compiled_bfloat16, hf_flax,
    kerashub)}

if __name__ == "__main__":
    shape = json.loads(sys.argv[2])
    interleave.serve(LIBRARIES[sys.argv[1]](shape), seconds=shape["round_seconds"], pieces=shape["times"],
                peak_lr=lambda: peak_memory(shape))
