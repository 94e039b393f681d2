"""A model under the names that Transformers gives to inputs and outputs."""

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transformer_jax.models import (
    BERT,
    GPT,
    Model,
    Transformer,
    TransformerConfig,
    shift_right,
)
from transformer_jax.models.heads import gather_positions, last_token_positions
from transformer_jax.nn.blocks import Block

_DECODED = ("causal_lm", "seq2seq_lm")


def forward(
    model: Model,
    params: dict,
    *,
    rng: jax.Array | None = None,
    output_hidden_states: bool = False,
    **inputs: Array,
) -> dict[str, Any]:
    """What a checkpoint's class of Transformers computes from the same inputs. Pure: compile it by
    `jax.jit(forward, static_argnums=0)`.

    Args:
        rng: a key for dropout; None for none.
        output_hidden_states: adds "hidden_states", of the embeddings and after each layer, the last
            of them normalised; of an encoder-decoder "encoder_hidden_states" and
            "decoder_hidden_states". Static under `jit`.
        inputs: "input_ids" `[B, T]` and, where the model takes them, "attention_mask" (1 at
            tokens), "token_type_ids", "position_ids" `[B, T]`, "decoder_input_ids" and
            "decoder_attention_mask" `[B, U]`. For multiple choice all are `[B, choices, T]`.

    Returns:
        "last_hidden_state" `[B, T, D]`, and by the model's task "logits" (float32), or
        "prediction_logits" and "seq_relationship_logits", or "start_logits" and "end_logits";
        "pooler_output" `[B, D]` of an encoder that pools; "encoder_last_hidden_state" of an
        encoder-decoder.

    Raises:
        ValueError: an input that the model does not take, or of another shape than it must have,
            or ids outside the vocabulary.
    """
    run, known = next(entry for kind, entry in _RUNS.items() if isinstance(model, kind))
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name in inputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{type(model).__name__} takes no {name!r}; it takes "
                             f"{', '.join(near or known)}")
    if "input_ids" not in inputs:
        raise ValueError(f"input_ids are missing; {type(model).__name__} needs them")
    inputs = {name: _checked(model, name, value, inputs) for name, value in inputs.items()}
    choices = None
    if model.task == "multiple_choice":
        choices = inputs["input_ids"].shape[1]
        inputs = {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}

    def call(module):
        return run(module, deterministic=rng is None, **inputs)

    captured: dict[str, Any] = {}
    if output_hidden_states:
        out, state = model.apply(
            {"params": params}, method=call, rngs=None if rng is None else {"dropout": rng},
            capture_intermediates=_is_state, mutable=["intermediates"])
        captured = _hidden_states(state["intermediates"], out)
    else:
        out = model.apply(
            {"params": params}, method=call, rngs=None if rng is None else {"dropout": rng})
    if choices:
        out["logits"] = out["logits"].reshape(-1, choices)
    return out | captured


def _checked(model: Model, name: str, value: Array, inputs: dict[str, Array]) -> Array:
    """An input as an array, refused where it cannot be right."""
    value = value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
    axes = 3 if model.task == "multiple_choice" else 2
    if value.ndim != axes:
        raise ValueError(f"{name} has shape {value.shape}; it must have {axes} axes, "
                         f"{'[batch, choices, length]' if axes == 3 else '[batch, length]'}")
    partner = {"decoder_attention_mask": "decoder_input_ids"}.get(name, "input_ids")
    if name != "decoder_input_ids" and partner in inputs:
        shape = np.shape(inputs[partner])
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, but {partner} have {shape}; they "
                             "must be equal")
    config = model.config
    sizes = {"input_ids": config.vocab_size, "decoder_input_ids": config.vocab_size,
             "token_type_ids": getattr(config, "num_segments", 0)}
    # XLA would read another row, or NaN, without a word.
    if name in sizes and not isinstance(value, jax.core.Tracer) and value.size:
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= sizes[name]:
            raise ValueError(f"{name} hold {low if low < 0 else high}; they must be from 0 to "
                             f"{sizes[name] - 1}")
    return value


def _mask(attention_mask: Array | None) -> Array | None:
    return None if attention_mask is None else attention_mask.astype(bool)


def _labels(m, hidden_BTD: Array, deterministic: bool) -> dict[str, Array]:
    """The head that looks at every token, by task."""
    if m.task == "token_classification":
        return {"logits": m.class_logits(hidden_BTD, deterministic)}
    if m.task == "question_answering":
        logits_BTC = m.class_logits(hidden_BTD, deterministic)
        return {"start_logits": logits_BTC[..., 0], "end_logits": logits_BTC[..., 1]}
    if m.task in _DECODED:
        return {"logits": m.lm_logits(hidden_BTD)}
    return {}


def _gpt(
    m: GPT, input_ids, attention_mask=None, position_ids=None, *, deterministic
) -> dict[str, Array]:
    mask = _mask(attention_mask)
    hidden_BTD = m.decode(input_ids, positions=position_ids, padding_mask=mask,
                          deterministic=deterministic).hidden
    out = {"last_hidden_state": hidden_BTD, **_labels(m, hidden_BTD, deterministic)}
    if m.task == "classification":
        # The last token that is no padding by its id, whatever the mask says.
        pad = m.config.pad_token_id
        last_B = last_token_positions(input_ids, mask if pad is None else input_ids != pad)
        last_BD = gather_positions(hidden_BTD, last_B[:, None])[:, 0]
        out["logits"] = m.class_logits(last_BD, deterministic)
    return out


def _bert(
    m: BERT, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, *,
    deterministic,
) -> dict[str, Array]:
    offset = m.config.position_offset
    if position_ids is not None:
        position_ids = position_ids - offset
    elif offset:
        # RoBERTa numbers what is no padding by its id, whatever the mask says.
        real = input_ids != offset - 1
        position_ids = jnp.where(real, jnp.cumsum(real, -1), 0) - 1
    hidden_BTD = m.hidden(input_ids, segment_ids=token_type_ids, padding_mask=_mask(attention_mask),
                          positions=position_ids, deterministic=deterministic).hidden
    out = {"last_hidden_state": hidden_BTD, **_labels(m, hidden_BTD, deterministic)}
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
    decoder_attention_mask=None, *, deterministic,
) -> dict[str, Array]:
    c = m.config
    if decoder_input_ids is None:
        decoder_input_ids = default_decoder_ids(c, input_ids)
    mask = _mask(attention_mask)
    read, written = m.encode_decode(
        input_ids, decoder_input_ids, padding_mask=mask,
        decoder_padding_mask=_mask(decoder_attention_mask), deterministic=deterministic)
    hidden_BTD = written.hidden
    out = {"last_hidden_state": hidden_BTD, "encoder_last_hidden_state": read.hidden,
           **_labels(m, hidden_BTD, deterministic)}
    if m.task == "classification":
        # The last end of a text, wherever the padding is.
        ends = mask if c.eos_token_id is None else jnp.isin(
            input_ids, jnp.asarray(c.eos_token_id))
        last_B = last_token_positions(input_ids, ends)
        out["logits"] = m.logits_from_features(
            gather_positions(hidden_BTD, last_B[:, None])[:, 0], deterministic)
    return out


def default_decoder_ids(c: TransformerConfig, input_ids: Array) -> Array:
    """The decoder's inputs where none are given, as in denoising: the source behind its start."""
    is_mbart = c.norm_first and c.embed_norm
    needed = "pad_token_id" if is_mbart else "decoder_start_token_id"
    if getattr(c, needed) is None:
        raise ValueError(f"decoder_input_ids are missing, and the config has no {needed} to make "
                         "them of input_ids; give them")
    if not is_mbart:
        return shift_right(input_ids, c.decoder_start_token_id)
    # mBART's start is the language, which stands at the end of the text.
    last_B = (input_ids != c.pad_token_id).sum(-1) - 1
    start_B1 = jnp.take_along_axis(input_ids, last_B[:, None], axis=1)
    return jnp.concatenate([start_B1, input_ids[:, :-1]], axis=1)


def _is_state(module, method: str) -> bool:
    return method == "__call__" and (isinstance(module, Block) or module.name == "embed_dropout")


def _hidden_states(seen: dict[str, Any], out: dict[str, Array]) -> dict[str, Any]:
    """The reference's tuples, of what flowed through embeddings and blocks."""
    embedded = list(seen["embed_dropout"]["__call__"])
    states = {}
    for stack in ("encoder", "decoder"):
        if stack not in seen:
            continue
        layers = seen[stack]
        after = [layers[f"layer_{i}"]["__call__"][0].hidden for i in range(len(layers))]
        states[stack] = (embedded.pop(0), *after)
    if len(states) == 1:
        (only,) = states.values()
        return {"hidden_states": (*only[:-1], out["last_hidden_state"])}
    return {
        "encoder_hidden_states": (*states["encoder"][:-1], out["encoder_last_hidden_state"]),
        "decoder_hidden_states": (*states["decoder"][:-1], out["last_hidden_state"]),
    }


_RUNS: dict[type, tuple[Callable, tuple[str, ...]]] = {
    GPT: (_gpt, ("input_ids", "attention_mask", "position_ids")),
    BERT: (_bert, ("input_ids", "attention_mask", "token_type_ids", "position_ids")),
    Transformer: (_transformer, ("input_ids", "attention_mask", "decoder_input_ids",
                                 "decoder_attention_mask")),
}
