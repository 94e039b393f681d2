"""Write `tests/goldens/*.npz` from PyTorch Transformers; run once, the files are kept in git.

    pip install torch==2.13.0 "transformers==5.*" numpy
    python tests/reference/make_goldens.py

Each file holds a tiny random model in our names and shapes, a padded batch, and what the reference
makes of them in float64: outputs, loss and the gradient of every parameter. The comparison itself
is in `test_goldens.py`, which needs no torch, and `test_live_reference.py`, which does.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens"
IGNORED = -100  # the label that torch passes over

# our path -> (reference path, how to reshape it); {i} is a layer. D, N, H: width, heads, head size.
# GPT's Conv1D kernels are [in, out] as ours are; BERT's Linear kernels are [out, in].
Table = dict[str, tuple[str, Callable[[np.ndarray, int], np.ndarray]]]


def same(x, N):
    return x


def transpose(x, N):
    return x.T


def third(k: int):
    """Query, key or value out of a joint projection; kernel [D, 3D] -> [D, N, H]."""
    return lambda x, N: np.split(x, 3, axis=-1)[k].reshape(*x.shape[:-1], N, -1)


def rows_to_heads(x, N):
    """[D, D] -> [N, H, D]."""
    return x.reshape(N, -1, x.shape[-1])


def columns_to_heads(x, N):
    """Linear [D, D] -> [D, N, H]; bias [D] -> [N, H]."""
    return x.T.reshape(*x.shape[1:], N, -1)


def norm(ours: str, theirs: str) -> Table:
    return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}


def linear(ours: str, theirs: str, kernel=transpose, bias=same) -> Table:
    return {f"{ours}/kernel": (f"{theirs}.weight", kernel),
            f"{ours}/bias": (f"{theirs}.bias", bias)}


def gpt_table(tokens: str, positions: str, final_norm: bool) -> Table:
    layer, block = "decoder/layer_{i}", "transformer.h.{i}"
    attention = f"{layer}/self_attention"
    table = {
        "token_embed/embedding": (f"transformer.{tokens}.weight", same),
        "position_embed/embedding": (f"transformer.{positions}.weight", same),
        **linear(f"{attention}/out", f"{block}.attn.c_proj", rows_to_heads),
        **linear(f"{layer}/mlp/wi", f"{block}.mlp.c_fc", same),
        **linear(f"{layer}/mlp/wo", f"{block}.mlp.c_proj", same),
        **norm(f"{layer}/attention_norm", f"{block}.ln_1"),
        **norm(f"{layer}/mlp_norm", f"{block}.ln_2"),
    }
    for k, name in enumerate(("query", "key", "value")):
        table |= linear(f"{attention}/{name}", f"{block}.attn.c_attn", third(k), third(k))
    return table | (norm("decoder/final_norm", "transformer.ln_f") if final_norm else {})


def bert_table() -> Table:
    layer, block = "encoder/layer_{i}", "bert.encoder.layer.{i}"
    heads = {"kernel": columns_to_heads, "bias": columns_to_heads}
    table = {
        f"{name}_embed/embedding": (f"bert.embeddings.{theirs}_embeddings.weight", same)
        for name, theirs in (("token", "word"), ("position", "position"), ("segment", "token_type"))
    }
    for name in ("query", "key", "value"):
        table |= linear(f"{layer}/self_attention/{name}", f"{block}.attention.self.{name}", **heads)
    return {
        **table,
        **linear(f"{layer}/self_attention/out", f"{block}.attention.output.dense",
                 lambda x, N: rows_to_heads(x.T, N)),
        **norm(f"{layer}/attention_norm", f"{block}.attention.output.LayerNorm"),
        **linear(f"{layer}/mlp/wi", f"{block}.intermediate.dense"),
        **linear(f"{layer}/mlp/wo", f"{block}.output.dense"),
        **norm(f"{layer}/mlp_norm", f"{block}.output.LayerNorm"),
        **norm("embed_norm", "bert.embeddings.LayerNorm"),
        **linear("pooler", "bert.pooler.dense"),
        **linear("mlm_head/dense", "cls.predictions.transform.dense"),
        **norm("mlm_head/norm", "cls.predictions.transform.LayerNorm"),
        "mlm_head/output/bias": ("cls.predictions.bias", same),
        **linear("nsp_head", "cls.seq_relationship"),
    }


def convert(table: Table, tensors: dict[str, np.ndarray], num_layers: int, num_heads: int) -> dict:
    """Reference tensors, or gradients of them, under our paths."""
    return {
        path.format(i=i): reshape(tensors[theirs.format(i=i)], num_heads)
        for path, (theirs, reshape) in table.items()
        for i in range(num_layers if "{i}" in path else 1)
    }


def gpt2(c: dict):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=c["vocab_size"], n_positions=c["max_length"], n_embd=c["d_model"],
        n_layer=c["num_layers"], n_head=c["num_heads"], n_inner=c["mlp_dim"], bos_token_id=0,
        eos_token_id=0, attn_implementation="eager",
    )), gpt_table("wte", "wpe", final_norm=True)


def gpt1(c: dict):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    assert c["mlp_dim"] == 4 * c["d_model"]  # the reference knows no other
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(
        vocab_size=c["vocab_size"], n_positions=c["max_length"], n_embd=c["d_model"],
        n_layer=c["num_layers"], n_head=c["num_heads"], attn_implementation="eager",
    )), gpt_table("tokens_embed", "positions_embed", final_norm=False)


def bert(c: dict):
    from transformers import BertConfig, BertForPreTraining

    return BertForPreTraining(BertConfig(
        vocab_size=c["vocab_size"], max_position_embeddings=c["max_length"],
        hidden_size=c["d_model"], num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"], intermediate_size=c["mlp_dim"],
        attn_implementation="eager",
    )), bert_table()


SIZES = {"vocab_size": 50, "max_length": 14, "num_layers": 2, "d_model": 24, "num_heads": 3,
         "mlp_dim": 40}
# Ours and theirs: fields of our config, and the reference model.
FAMILIES = {
    "gpt2": ({"family": "gpt", **SIZES, "norm_first": True}, gpt2),
    "gpt1": ({"family": "gpt", **SIZES, "mlp_dim": 96}, gpt1),
    "bert": ({"family": "bert", **SIZES}, bert),
}


def make_batch(c: dict, seed: int, batch_size: int = 3, length: int = 10) -> dict[str, np.ndarray]:
    """Rows of unequal length, padded on the right with a token that is not zero."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(3, length, batch_size).astype(int))
    real = np.arange(length) < lengths[:, None]
    tokens = np.where(real, rng.integers(1, c["vocab_size"], real.shape), 7).astype(np.int32)
    if c["family"] == "gpt":
        # As the reference counts: every successor that is not padding.
        weights = np.zeros(real.shape, np.float32)
        weights[:, :-1] = real[:, 1:]
        targets = np.zeros_like(tokens)
        targets[:, :-1] = tokens[:, 1:]
        return {"tokens": tokens, "targets": targets, "weights": weights, "padding_mask": real}
    positions = np.stack([rng.permutation(n)[:3] for n in lengths]).astype(np.int32)
    weights = np.ones(positions.shape, np.float32)
    weights[0, 2] = 0
    return {
        "tokens": tokens,
        "segment_ids": ((np.arange(length) >= lengths[:, None] // 2) & real).astype(np.int32),
        "padding_mask": real,
        "masked_positions": positions,
        "masked_targets": rng.integers(0, c["vocab_size"], positions.shape).astype(np.int32),
        "masked_weights": weights,
        "nsp_labels": rng.integers(0, 2, batch_size).astype(np.int32),
        "nsp_weights": np.ones(batch_size, np.float32),
    }


def reference(name: str, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """What a golden holds: "config" (JSON), and under "params/", "batch/", "out/", "gradient/" our
    names."""
    import torch

    torch.manual_seed(seed)
    c, build = FAMILIES[name]
    c = {**c, **changes}
    model, table = build(c)
    model = model.double().eval()
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            is_scale = "weight" in path and ("ln_" in path or "LayerNorm" in path)
            # Rounded, so that the parameters in float32 are the very same.
            drawn = (0.3 * torch.randn(tensor.shape) + is_scale).float()
            tensor.copy_(drawn.double())
    batch = make_batch(c, seed)

    def tensor(values):
        return torch.from_numpy(np.asarray(values, np.int64))

    inputs = {"input_ids": tensor(batch["tokens"]), "attention_mask": tensor(batch["padding_mask"])}
    if c["family"] == "gpt":
        labels = np.where(batch["padding_mask"], batch["tokens"], IGNORED)
        # The reference shifts; a row's first token is nobody's target.
        out = model(**inputs, labels=tensor(labels), output_hidden_states=True,
                    output_attentions=True)
        outputs = {"logits": out.logits, "hidden": out.hidden_states[-1]}
    else:
        labels = np.full(batch["tokens"].shape, IGNORED)
        used = batch["masked_weights"] > 0
        rows = np.broadcast_to(np.arange(len(used))[:, None], used.shape)
        labels[rows[used], batch["masked_positions"][used]] = batch["masked_targets"][used]
        inputs["token_type_ids"] = tensor(batch["segment_ids"])
        out = model(**inputs, labels=tensor(labels),
                    next_sentence_label=tensor(batch["nsp_labels"]), output_hidden_states=True,
                    output_attentions=True)
        outputs = {
            "mlm_logits": out.prediction_logits,
            "nsp_logits": out.seq_relationship_logits,
            "hidden": out.hidden_states[-1],
            "pooled": model.bert(**inputs).pooler_output,
        }
    out.loss.backward()
    outputs |= {f"attention_{i}": weights for i, weights in enumerate(out.attentions)}
    outputs["loss"] = out.loss
    sizes = c["num_layers"], c["num_heads"]
    tensors = {path: t.detach().numpy() for path, t in model.named_parameters()}
    gradient = {path: t.grad.numpy() for path, t in model.named_parameters()}
    groups = {
        "params": convert(table, tensors, *sizes),
        "batch": batch,
        "out": {key: value.detach().numpy() for key, value in outputs.items()},
        "gradient": convert(table, gradient, *sizes),
    }
    used = {theirs.format(i=i) for theirs, _ in table.values() for i in range(c["num_layers"])}
    assert used >= set(tensors), f"not converted: {sorted(set(tensors) - used)}"
    golden = {f"{group}/{key}": value for group, values in groups.items()
              for key, value in values.items()}
    golden = {key: value.astype(np.float32) if value.dtype == np.float64 else value
              for key, value in golden.items()}
    return {"config": np.array(json.dumps(c)), **golden}


def main() -> None:
    GOLDENS.mkdir(exist_ok=True)
    for name in FAMILIES:
        path = GOLDENS / f"{name}.npz"
        np.savez_compressed(path, **reference(name))
        print(f"{path.name}: {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
