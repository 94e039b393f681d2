"""Forward pass whose inputs and outputs have the same names as in Transformers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transformer_jax.models import BERT, GPT, Model, Transformer, TransformerConfig, shift_right
from transformer_jax.models.heads import gather_positions, last_token_positions
from transformer_jax.nn.blocks import Block


def forward(
    model: Model,
    params: dict,
    *,
    rng: jax.Array | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    **inputs: Array,
) -> dict[str, Any]:
    """Applies a model and returns its outputs, named as in Transformers.

    The function is pure; compile it with `jax.jit(forward, static_argnums=0)`.

    Args:
        model: a model, for instance from `load_pretrained`.
        params: its parameters.
        rng: key for dropout; None for no dropout.
        output_hidden_states: whether to return the hidden states of all layers. Static under `jit`.
        output_attentions: whether to return the attention weights. Static under `jit`.
        inputs: "input_ids" `[B, S]`; optionally, if the model takes them, "attention_mask" (1 for
            tokens, 0 for padding), "token_type_ids" and "position_ids" `[B, S]`, and
            "decoder_input_ids" and "decoder_attention_mask" `[B, T]`. For multiple choice, all
            inputs have shape `[B, num_choices, S]`. Inputs that are None are ignored.

    Returns:
        A dict with these entries. The length of decoder outputs is T instead of S. For
        multiple choice, outputs other than "logits" have B * num_choices rows.

        - "last_hidden_state" `[B, S, D]`.
        - "logits", float32: `[B, S, V]` for language models, `[B, S, C]` for token
          classification, `[B, C]` for classification, `[B, 2]` for next-sentence prediction and
          `[B, num_choices]` for multiple choice. Question answering has "start_logits" and
          "end_logits" `[B, S]` instead, and pre-training of BERT has "prediction_logits"
          `[B, S, V]` and "seq_relationship_logits" `[B, 2]`.
        - "pooler_output" `[B, D]`, for encoders whose task uses the pooler.
        - "encoder_last_hidden_state" `[B, S, D]`, for encoder-decoders.
        - "hidden_states", on request: a tuple of the embeddings and the output of each layer,
          each `[B, S, D]`; the last one includes the final LayerNorm. Encoder-decoders have
          "encoder_hidden_states" and "decoder_hidden_states" instead.
        - "attentions", on request: a tuple of the weights of each layer, each `[B, N, S, S]`,
          before dropout. Encoder-decoders have "encoder_attentions", "decoder_attentions"
          `[B, N, T, T]` and "cross_attentions" `[B, N, T, S]` instead.

    Raises:
        ValueError: an input is missing, not supported by the model or of the wrong shape, or ids
            are out of range (not checked under `jit`).

    Example:
        >>> from transformer_jax import models
        >>> model = models.build_model(models.presets.bert_tiny(num_layers=1, vocab_size=30))
        >>> params = jax.jit(models.init_params, static_argnums=0)(model, jax.random.key(0))
        >>> run = jax.jit(forward, static_argnums=0)
        >>> run(model, params, input_ids=np.array([[3, 4, 5]]))["prediction_logits"].shape
        (1, 3, 30)
    """
    forward_fn, supported = next(
        entry for model_class, entry in _FORWARD_FNS.items() if isinstance(model, model_class))
    inputs = _checked_inputs(model, supported, inputs)
    num_choices = inputs["input_ids"].shape[1] if model.task == "multiple_choice" else None
    if num_choices:
        inputs = {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}
    out = model.apply(
        {"params": params}, rngs=None if rng is None else {"dropout": rng},
        method=lambda module: forward_fn(module, deterministic=rng is None,
                                         output_attentions=output_attentions, **inputs),
        capture_intermediates=output_hidden_states and _is_captured,
        mutable=["intermediates"] if output_hidden_states else False)
    if output_hidden_states:
        out, state = out
        out |= _hidden_states(state["intermediates"], out)
    if num_choices:
        out["logits"] = out["logits"].reshape(-1, num_choices)
    return out


def _checked_inputs(
    model: Model, supported: tuple[str, ...], inputs: dict[str, Array | None]
) -> dict[str, Array]:
    """The inputs that are not None, as arrays of the right shape."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name in inputs:
        if name not in supported:
            raise ValueError(f"unsupported input {name!r} of {type(model).__name__}; supported: "
                             f"{', '.join(supported)}")
    if "input_ids" not in inputs:
        raise ValueError(f"input_ids are missing; {type(model).__name__} requires them")
    if "token_type_ids" in inputs and not model.config.num_segments:
        raise ValueError("unsupported input 'token_type_ids': the model has no segment embeddings "
                         "(as DistilBERT); omit it")
    return {name: _checked_input(model, name, value, inputs) for name, value in inputs.items()}


def _checked_input(model: Model, name: str, value: Array, inputs: dict[str, Array]) -> Array:
    """An input as an array, masks as bool; outside of `jit`, ids are checked as well as shapes."""
    value = value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
    num_axes = 3 if model.task == "multiple_choice" else 2
    if value.ndim != num_axes:
        axes = "[batch, choices, length]" if num_axes == 3 else "[batch, length]"
        raise ValueError(f"{name} has shape {value.shape}; it must have {num_axes} axes, {axes}")
    ids_name = {"decoder_attention_mask": "decoder_input_ids"}.get(name, "input_ids")
    if name != "decoder_input_ids" and ids_name in inputs:
        shape = np.shape(inputs[ids_name])
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; it must have the shape of "
                             f"{ids_name}, {shape}")
    config = model.config
    # Position ids of BERT are row indices of the position table. In that of RoBERTa, position 0 has
    # the row `position_offset`.
    offset = config.position_offset if isinstance(model, BERT) else 0
    num_ids = {"input_ids": config.vocab_size, "decoder_input_ids": config.vocab_size,
               "token_type_ids": getattr(config, "num_segments", 0),
               "position_ids": config.max_length + offset}
    # XLA does not report an index out of range: the lookup returns another row, or NaN.
    if name in num_ids and not isinstance(value, jax.core.Tracer) and value.size:
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= num_ids[name]:
            raise ValueError(f"{name} contain {low if low < 0 else high}; ids must be from 0 to "
                             f"{num_ids[name] - 1}")
    return value.astype(bool) if name.endswith("attention_mask") else value


def _token_outputs(
    m: Model, hidden_BTD: Array, deterministic: bool, **attentions: tuple[Array, ...]
) -> dict[str, Any]:
    """Outputs of all models: hidden states, token-level heads, and attention weights if present."""
    out = {"last_hidden_state": hidden_BTD} | {k: layers for k, layers in attentions.items()
                                               if layers}
    if m.task == "token_classification":
        out["logits"] = m.class_logits(hidden_BTD, deterministic)
    if m.task == "question_answering":
        logits_BTC = m.class_logits(hidden_BTD, deterministic)
        out |= {"start_logits": logits_BTC[..., 0], "end_logits": logits_BTC[..., 1]}
    if m.task in ("causal_lm", "seq2seq_lm"):
        out["logits"] = m.lm_logits(hidden_BTD)
    return out


def _gpt(
    m: GPT, input_ids, attention_mask=None, position_ids=None, *, deterministic, output_attentions
) -> dict[str, Array]:
    decoded = m.decode(input_ids, positions=position_ids, padding_mask=attention_mask,
                       deterministic=deterministic, output_attentions=output_attentions)
    out = _token_outputs(m, decoded.hidden, deterministic, attentions=decoded.attention)
    if m.task == "classification":
        # As in Transformers, padding is identified by the padding id. The attention mask is used
        # only if the config has no padding id.
        pad = m.config.pad_token_id
        is_token = attention_mask if pad is None else input_ids != pad
        last_B = last_token_positions(input_ids, is_token)
        last_BD = gather_positions(decoded.hidden, last_B[:, None])[:, 0]
        out["logits"] = m.class_logits(last_BD, deterministic)
    return out


def _bert(
    m: BERT, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, *,
    deterministic, output_attentions,
) -> dict[str, Array]:
    offset = m.config.position_offset
    if position_ids is not None:
        position_ids = position_ids - offset
    elif offset:
        # RoBERTa numbers only the tokens that are not padding. As in Transformers, padding is
        # identified by the padding id and not by the attention mask.
        is_token = input_ids != offset - 1
        position_ids = jnp.where(is_token, jnp.cumsum(is_token, -1), 0) - 1
    encoded = m.encode(input_ids, segment_ids=token_type_ids,
                       padding_mask=attention_mask, positions=position_ids,
                       deterministic=deterministic, output_attentions=output_attentions)
    hidden_BTD = encoded.hidden
    out = _token_outputs(m, hidden_BTD, deterministic, attentions=encoded.attention)
    if m.task in ("base", "pretraining", "next_sentence", "classification", "multiple_choice"):
        out["pooler_output"] = pooled_BD = m.pool(hidden_BTD)
    if m.task in ("classification", "multiple_choice"):
        out["logits"] = m.class_logits(pooled_BD, deterministic)
    if m.task == "next_sentence":
        out["logits"] = m.nsp_logits(pooled_BD)
    if m.task == "masked_lm":
        out["logits"] = m.mlm_logits(hidden_BTD)
    if m.task == "pretraining":
        out["prediction_logits"] = m.mlm_logits(hidden_BTD)
        out["seq_relationship_logits"] = m.nsp_logits(pooled_BD)
    return out


def _transformer(
    m: Transformer, input_ids, attention_mask=None, decoder_input_ids=None,
    decoder_attention_mask=None, *, deterministic, output_attentions,
) -> dict[str, Array]:
    c = m.config
    if decoder_input_ids is None:
        decoder_input_ids = default_decoder_input_ids(c, input_ids)
    encoded, decoded = m.encode_decode(
        input_ids, decoder_input_ids, padding_mask=attention_mask,
        decoder_padding_mask=decoder_attention_mask, deterministic=deterministic,
        output_attentions=output_attentions)
    out = _token_outputs(
        m, decoded.hidden, deterministic, encoder_attentions=encoded.attention,
        decoder_attentions=decoded.attention, cross_attentions=decoded.cross_attention)
    out["encoder_last_hidden_state"] = encoded.hidden
    if m.task == "classification":
        # The hidden state of the last end-of-sequence token is classified.
        is_end = attention_mask if c.eos_token_id is None else jnp.isin(
            input_ids, jnp.asarray(c.eos_token_id))
        last_B = last_token_positions(input_ids, is_end)
        out["logits"] = m.logits_from_features(
            gather_positions(decoded.hidden, last_B[:, None])[:, 0], deterministic)
    return out


def default_decoder_input_ids(c: TransformerConfig, input_ids: Array) -> Array:
    """Decoder input ids [B, S] for a decoder that reconstructs the source, as in denoising.

    They are a start token, then the source ids without the last one. The start token is
    `decoder_start_token_id`, or for mBART the language token at the end of the source.
    """
    is_mbart = c.norm_first and c.embed_norm
    required_field = "pad_token_id" if is_mbart else "decoder_start_token_id"
    if getattr(c, required_field) is None:
        raise ValueError("decoder_input_ids are missing, and they cannot be derived from input_ids "
                         f"because the config has no {required_field}; give decoder_input_ids")
    if not is_mbart:
        return shift_right(input_ids, c.decoder_start_token_id)
    last_B = (input_ids != c.pad_token_id).sum(-1) - 1
    start_B1 = jnp.take_along_axis(input_ids, last_B[:, None], axis=1)
    return jnp.concatenate([start_B1, input_ids[:, :-1]], axis=1)


def _is_captured(module, method: str) -> bool:
    """Filter of `capture_intermediates`: selects the outputs of the embeddings and the blocks."""
    return method == "__call__" and (isinstance(module, Block) or module.name == "embed_dropout")


def _hidden_states(intermediates: dict[str, Any], out: dict[str, Array]) -> dict[str, Any]:
    """The tuples of hidden states that Transformers returns, from captured outputs."""
    states = {}
    stacks = [stack for stack in ("encoder", "decoder") if stack in intermediates]
    for stack, embeddings in zip(stacks, intermediates["embed_dropout"]["__call__"]):
        layers = intermediates[stack]
        outputs = [layers[f"layer_{i}"]["__call__"][0].hidden for i in range(len(layers) - 1)]
        is_source = stack == "encoder" and len(stacks) == 2
        last = out["encoder_last_hidden_state" if is_source else "last_hidden_state"]
        name = f"{stack}_hidden_states" if len(stacks) == 2 else "hidden_states"
        states[name] = (embeddings, *outputs, last)
    return states


# Model class -> (forward pass, names of supported inputs).
_FORWARD_FNS: dict[type, tuple[Callable, tuple[str, ...]]] = {
    GPT: (_gpt, ("input_ids", "attention_mask", "position_ids")),
    BERT: (_bert, ("input_ids", "attention_mask", "token_type_ids", "position_ids")),
    Transformer: (_transformer, ("input_ids", "attention_mask", "decoder_input_ids",
                                 "decoder_attention_mask")),
}
