"""Tiny random checkpoints of every family and head, made by PyTorch Transformers itself.

    pip install torch==2.13.0 "transformers==5.*" numpy
    python tests/reference/checkpoints.py

writes `tests/goldens/checkpoints/*.npz`: files and tensors as the reference saves them, a padded
batch and what the reference makes of it, for tests that need no torch.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens" / "checkpoints"

# Sizes by seed: odd ones, and encoder and decoder of unlike sizes.
SIZES = [
    {"layers": 2, "decoder_layers": 3, "width": 24, "heads": 3, "decoder_heads": 4, "mlp": 40,
     "decoder_mlp": 28, "length": 14, "vocab": 50},
    {"layers": 3, "decoder_layers": 1, "width": 40, "heads": 5, "decoder_heads": 2, "mlp": 36,
     "decoder_mlp": 52, "length": 20, "vocab": 83},
]
SMALL = {"layers": 1, "decoder_layers": 2, "width": 12, "heads": 2, "decoder_heads": 3, "mlp": 20,
         "decoder_mlp": 16, "length": 12, "vocab": 30}
GOLDEN = {  # the head of each family that has most of its own
    "GPT2": "ForSequenceClassification", "OpenAIGPT": "LMHeadModel", "Bert": "ForPreTraining",
    "Roberta": "ForSequenceClassification", "DistilBert": "ForMaskedLM",
    "Bart": "ForConditionalGeneration", "MBart": "ForSequenceClassification", "Marian": "MTModel",
    "Pegasus": "ForConditionalGeneration",
}
ENCODER_HEADS = ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
                 "ForQuestionAnswering", "ForMultipleChoice"]
BART_HEADS = ["Model", "ForConditionalGeneration", "ForSequenceClassification",
              "ForQuestionAnswering"]
HEADS = {
    "GPT2": ["Model", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification",
             "ForQuestionAnswering"],
    "OpenAIGPT": ["Model", "LMHeadModel", "ForSequenceClassification"],
    "Bert": ["Model", "ForPreTraining", "ForNextSentencePrediction", *ENCODER_HEADS],
    "Roberta": ["Model", *ENCODER_HEADS],
    "XLMRoberta": ["ForMaskedLM", "ForSequenceClassification"],
    "Camembert": ["ForMaskedLM"],
    "DistilBert": ["Model", *ENCODER_HEADS],
    "Bart": BART_HEADS,
    "MBart": BART_HEADS,
    "Marian": ["Model", "MTModel"],
    "Pegasus": ["Model", "ForConditionalGeneration"],
}
ALL = [(family, head) for family, heads in HEADS.items() for head in heads]


def config_fields(family: str, s: dict) -> dict:
    """The family's own words for the sizes."""
    gpt = {"n_positions": s["length"], "n_embd": s["width"], "n_layer": s["layers"],
           "n_head": s["heads"], "pad_token_id": 1}
    bert = {"max_position_embeddings": s["length"], "hidden_size": s["width"],
            "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
            "intermediate_size": s["mlp"], "num_labels": 4}
    # Positions of RoBERTa's begin behind the padding's id.
    roberta = bert | {"max_position_embeddings": s["length"] + 2, "type_vocab_size": 1,
                      "layer_norm_eps": 1e-5, "pad_token_id": 1}
    bart = {"max_position_embeddings": s["length"], "d_model": s["width"],
            "encoder_layers": s["layers"], "decoder_layers": s["decoder_layers"],
            "encoder_attention_heads": s["heads"], "decoder_attention_heads": s["decoder_heads"],
            "encoder_ffn_dim": s["mlp"], "decoder_ffn_dim": s["decoder_mlp"], "pad_token_id": 1,
            "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
            "forced_eos_token_id": 2}
    return {"vocab_size": s["vocab"], **{
        "GPT2": gpt | {"n_inner": s["mlp"], "bos_token_id": 0, "eos_token_id": 2,
                       "num_labels": 4},
        "OpenAIGPT": gpt,
        "Bert": bert,
        "Roberta": roberta, "XLMRoberta": roberta, "Camembert": roberta,
        "DistilBert": {"max_position_embeddings": s["length"], "dim": s["width"],
                       "n_layers": s["layers"], "n_heads": s["heads"], "hidden_dim": s["mlp"],
                       "sinusoidal_pos_embds": True},
        "Bart": bart | {"num_labels": 5},
        "MBart": bart | {"scale_embedding": True},
        "Marian": bart | {"activation_function": "swish", "scale_embedding": True},
        "Pegasus": bart | {"activation_function": "relu", "scale_embedding": True},
    }[family]}


def make(
    family: str, head: str, seed: int, folder: Path, dtype: str = "float32",
    sizes: dict | None = None,
):
    """A random model of the reference in float64 and evaluation mode, saved to `folder`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = config_fields(family, sizes or SIZES[seed])
    if head == "ForQuestionAnswering":
        fields.pop("num_labels", None)  # a start and an end
    model = getattr(transformers, family + head)(
        getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager"))
    fixed = family in ("Marian", "Pegasus")
    with torch.no_grad():
        buffers = [(path, b) for path, b in model.named_buffers() if "logits_bias" in path]
        for path, tensor in [*model.named_parameters(), *buffers]:
            if fixed and "embed_positions" in path:
                continue
            scale = path.endswith("weight") and ("norm" in path.lower() or "ln_" in path)
            tensor.copy_(0.2 * torch.randn(tensor.shape) + float(scale))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    return model.double()


def inputs(
    family: str, head: str, seed: int, padding: str, sizes: dict | None = None
) -> dict[str, np.ndarray]:
    """A batch under the reference's names, padded on the "right", on the "left", or not ("none").
    """
    s = sizes or SIZES[seed]
    rng = np.random.default_rng(seed)
    batch, length = 3, s["length"] - 3
    is_choice = head == "ForMultipleChoice"
    shape = (batch, 2, length) if is_choice else (batch, length)
    pad = 0 if family in ("Bert", "DistilBert") else 1

    def row_mask(shape):
        lengths = rng.integers(3, shape[-1] + 1, shape[:-1])
        at = np.arange(shape[-1])
        if padding == "left":
            return at >= shape[-1] - lengths[..., None]
        return (at < lengths[..., None]) | (padding == "none")

    def tokens(real):
        return np.where(real, rng.integers(3, s["vocab"], real.shape), pad)

    real = row_mask(shape)
    ids = tokens(real)
    if family in ("Bart", "MBart"):  # one end of text in every row
        last = np.where(real, np.arange(length), 0).max(-1)
        np.put_along_axis(ids, last[..., None], 2, axis=-1)
    made = {"input_ids": ids, "attention_mask": real.astype(int)}
    if family == "Bert":
        made["token_type_ids"] = rng.integers(0, 2, shape)
    given = family in ("Marian", "Pegasus") or head == "ForConditionalGeneration"
    if given:
        decoder = row_mask((batch, length - 2))
        made["decoder_input_ids"] = tokens(decoder)
        made["decoder_attention_mask"] = decoder.astype(int)
    return made


def reference(model, batch: dict) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The reference's outputs by name, each as a list of arrays."""
    import torch

    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in batch.items()},
                    output_hidden_states=True)
    for name, value in out.items():
        values = value if isinstance(value, tuple) else [value]
        if all(isinstance(v, torch.Tensor) for v in values):  # caches go by other names and types
            yield name, [v.numpy() for v in values]


def visible(name: str, value: np.ndarray, batch: dict) -> np.ndarray | bool:
    """Where an output is of a token and not of padding, which may see anything."""
    masks = {"decoder": "decoder_attention_mask", "encoder": "attention_mask"}
    side = name.partition("_")[0]
    if side not in masks:
        side = "decoder" if "decoder_input_ids" in batch else "encoder"
    mask = batch[masks[side]] if masks[side] in batch else batch["attention_mask"]
    mask = mask.reshape(-1, mask.shape[-1]).astype(bool)
    if value.shape[:2] != mask.shape:
        return True
    return mask.reshape(mask.shape + (1,) * (value.ndim - 2))


def golden(family: str) -> dict[str, np.ndarray]:
    """The files of a checkpoint as text, its tensors, inputs and outputs, each under its group."""
    from safetensors.numpy import load_file

    head = GOLDEN[family]
    with tempfile.TemporaryDirectory() as folder:
        model = make(family, head, 0, Path(folder), sizes=SMALL)
        files = {path.name: np.array(path.read_text()) for path in Path(folder).glob("*.json")}
        tensors = load_file(Path(folder) / "model.safetensors")
    batch = inputs(family, head, 0, "left", SMALL)
    outputs = {f"{name}/{i}": value.astype(np.float32)
               for name, values in reference(model, batch) for i, value in enumerate(values)}
    groups = {"files": files, "tensors": tensors, "inputs": batch, "outputs": outputs}
    return {f"{group}/{name}": value for group, values in groups.items()
            for name, value in values.items()}


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for family in GOLDEN:
        path = GOLDENS / f"{family.lower()}.npz"
        np.savez_compressed(path, **golden(family))
        print(f"{path.name}: {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
