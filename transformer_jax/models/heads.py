"""What the models share: their fields, heads and pooling, and the masks of decoders."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import Config, GPTConfig, TransformerConfig
from transformer_jax.nn.attention import KVCache, Mask, causal_mask
from transformer_jax.nn.layers import Bias, Embed, LayerNorm, LazyLogits, Linear, get_activation


def gather_positions(
    hidden_BTD: Float[Array, "B T D"], positions_BP: Int[Array, "B P"]
) -> Float[Array, "B P D"]:
    """Gathers the hidden states at P positions of each row."""
    return jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)


def last_token_positions(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None
) -> Int[Array, "B"]:
    """Returns the position of the last token of each row that is not padding, on either side."""
    B, T = tokens.shape
    if padding_mask is None:
        return jnp.full((B,), T - 1)
    return jnp.where(padding_mask, jnp.arange(T), 0).max(-1)


def mean_pool(
    hidden_BTD: Float[Array, "B T D"], padding_mask: Bool[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """Averages the hidden states of the tokens of each row; padding is excluded."""
    if padding_mask is None:
        return hidden_BTD.mean(1)
    weights_BT1 = padding_mask[..., None].astype(hidden_BTD.dtype)
    return (hidden_BTD * weights_BT1).sum(1) / jnp.maximum(weights_BT1.sum(1), 1)


def check_sequence_length(length: int, max_length: int) -> None:
    """Raises a ValueError, during tracing, if a sequence is longer than `max_length`."""
    if length > max_length:
        raise ValueError(f"sequence of {length} tokens is longer than the model's {max_length} "
                         "positions; shorten it, or build the model with a larger max_length")


def token_positions(
    tokens: Int[Array, "B T"], max_length: int, positions: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Returns `positions`, or 0 ... T-1 for each row, after `check_sequence_length`."""
    check_sequence_length(tokens.shape[1], max_length)
    if positions is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return positions


def _check_attention_mask(attention_mask: Array | None, B: int, T: int, S: int) -> Array | None:
    """Returns a dense attention mask `[1 or B, 1 or N, T, S]`; raises a ValueError if invalid."""
    if attention_mask is None:
        return None
    shape = jnp.shape(attention_mask)
    if not jnp.issubdtype(jnp.result_type(attention_mask), jnp.bool_):
        raise ValueError(f"attention_mask has dtype {jnp.result_type(attention_mask)}; it must be "
                         "bool, True where a query attends to a key: attention_mask.astype(bool)")
    full = (1,) * (4 - len(shape)) + shape
    if len(full) > 4 or full[0] not in (1, B) or full[2] not in (1, T) or full[3] not in (1, S):
        raise ValueError(f"attention_mask has shape {shape}; it must broadcast to [batch, heads, "
                         f"queries, keys], here [{B}, heads, {T}, {S}]")
    return jnp.broadcast_to(attention_mask, (*full[:2], T, S))


def encoder_mask(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None,
    attention_mask: Bool[Array, "B 1 T T"] | None,
) -> Mask:
    """Returns the mask of an encoder, in which every token attends to every other by default."""
    B, T = tokens.shape
    return Mask(padding_mask=padding_mask,
                dense_mask=_check_attention_mask(attention_mask, B, T, T))


def decoder_mask(
    positions_BT: Int[Array, "B T"], cache: dict[str, KVCache] | None,
    padding_mask: Bool[Array, "B T"] | None, attention_mask: Bool[Array, "B 1 T S"] | None,
    attention_window: int | None = None,
) -> Mask:
    """Returns `attention_mask`, or a causal mask over the tokens or the slots of the cache."""
    if cache is not None and padding_mask is not None:
        raise ValueError("padding_mask and cache are both given; a cache has no slots for padding. "
                         "Pass only tokens, with their positions")
    B, T = positions_BT.shape
    S = T if cache is None else cache["layer_0"].length
    attention_mask = _check_attention_mask(attention_mask, B, T, S)
    if attention_mask is not None:
        return Mask(dense_mask=attention_mask, padding_mask=padding_mask)
    if cache is None:
        return Mask(causal=True, attention_window=attention_window, padding_mask=padding_mask)
    return Mask(dense_mask=causal_mask(positions_BT, jnp.arange(S)[None], attention_window))


class ClassificationHeads(nn.Module):
    """Base class of the models: their fields, and the classifier of whole texts and of tokens.

    Methods named after a task, such as `classification_logits`, take tokens and run the entire
    model. Methods named after a head, such as `lm_logits` and `class_logits`, take hidden states
    and apply the head only. All methods that take tokens have these options:

    - `padding_mask`: True at tokens, False at padding; all True if None.
    - `attention_mask`: True where a query attends to a key; broadcasts to `[B, N, T, S]`.
    - `deterministic`: whether to disable dropout; if False, pass `rngs={"dropout": key}`.
    - `output_attentions`: whether to return the attention weights of all layers.

    They raise a ValueError if T is larger than `max_length`, or if `attention_mask` is not boolean
    or does not broadcast. A subclass defines the submodules `classifier` and `classifier_dropout`,
    and the methods `hidden_states` (`[B, T, D]`) and `features` (`[B, D]`).

    Attributes:
        config: sizes and options.
        num_classes: the number of outputs of the classifier; 0 for no classifier.
        task: a key of `METHODS`: the task whose head `init_params` initializes. It does not
            restrict which methods can be called.
        hf_config: the text of the config.json of a Hugging Face checkpoint, which `save_pretrained`
            keeps. Models that differ only in it are equal.
        METHODS: the method of each task.
    """

    config: Config
    num_classes: int = 0
    task: str = ""
    hf_config: str = dataclasses.field(default="", compare=False, repr=False)

    METHODS: ClassVar[dict[str, str]] = {
        "classification": "classification_logits",
        "multiple_choice": "classification_logits",
        "token_classification": "token_classification_logits",
        "question_answering": "token_classification_logits",
    }

    def _check_num_classes(self):
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 1 to compute "
                             "class logits; build the model with a classifier: "
                             "build_model(config, 2)")

    def classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B C"]:
        """Computes class logits of each row (Radford et al. 2018, 3.2; Devlin et al. 2018, 4.1).

        `options` are those of `features`. Raises a ValueError if the model has no classifier.
        """
        self._check_num_classes()
        features_BD = self.features(tokens, deterministic=deterministic, **options)
        return self.logits_from_features(features_BD, deterministic)

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Computes class logits from the output of `features`."""
        return self.class_logits(features, deterministic)

    def token_classification_logits(
        self, tokens: Int[Array, "B T"], *args, deterministic: bool = True, **options
    ) -> Float[Array, "B T C"]:
        """Computes class logits of each token; arguments as for `hidden_states`."""
        self._check_num_classes()
        hidden_BTD = self.hidden_states(tokens, *args, deterministic=deterministic, **options)
        return self.class_logits(hidden_BTD, deterministic)

    def class_logits(
        self, hidden: Float[Array, "... D"], deterministic: bool = True
    ) -> Float[Array, "... C"]:
        """Applies dropout and the classifier to hidden states or features."""
        hidden = self.classifier_dropout(hidden, deterministic=deterministic)
        return self.classifier(hidden).astype(jnp.float32)


class DecoderHeads(ClassificationHeads):
    """The heads of a decoder: the output layer, and a classifier of the last token.

    A subclass also defines the submodules `token_embed` and, without tied embeddings, `lm_head`.
    """

    def lazy_lm_logits(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """Returns the unevaluated logits of the next token for hidden states."""
        return (self.token_embed if self.config.tie_embeddings else self.lm_head).project(hidden)

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Computes the float32 logits of the next token for hidden states."""
        return self.lazy_lm_logits(hidden).logits()

    def features(
        self, tokens: Int[Array, "B T"], *, padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, last_positions: Int[Array, "B"] | None = None,
        **options
    ) -> Float[Array, "B D"]:
        """Computes the classifier's input: the decoder's hidden state of the last token.

        Radford et al. 2018, section 3.2. In an encoder-decoder, the same text is the input of
        encoder and decoder (Lewis et al. 2019, "BART", section 3.1). `last_positions` replaces the
        positions of the last tokens. `segment_ids` are ignored; they are accepted so that one batch
        serves all model families. `options` are those of `hidden_states`.
        """
        del segment_ids
        hidden_BTD = self.hidden_states(tokens, padding_mask=padding_mask, **options)
        if last_positions is None:
            last_positions = last_token_positions(tokens, padding_mask)
        return gather_positions(hidden_BTD, last_positions[:, None])[:, 0]

    @staticmethod
    def init_cache(
        config: GPTConfig | TransformerConfig, batch_size: int, length: int
    ) -> dict[str, KVCache]:
        """Creates an empty cache of the decoder for up to `max_length` tokens in each row."""
        check_sequence_length(length, config.max_length)
        s = config.decoder_stack
        shape = (batch_size, s.num_heads, length, s.head_dim)
        return {f"layer_{i}": KVCache(jnp.zeros(shape, s.dtype), jnp.zeros(shape, s.dtype))
                for i in range(s.num_layers)}


class MLMHead(nn.Module):
    """BERT's masked language modeling head: dense, activation, LayerNorm, output layer, bias.

    Devlin et al. 2018, section 3.1, and `get_masked_lm_output` of the released code.
    """

    activation: str | Callable
    epsilon: float
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"], output_embed: Embed) -> LazyLogits:
        features = (hidden.shape[-1],)
        x = Linear(features, kernel_init=self.kernel_init, dtype=self.dtype, name="dense")(hidden)
        x = get_activation(self.activation)(x)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        return Bias(output_embed.num_embeddings, name="output")(output_embed.project(x))
