"""Heads of the models, and pooling.

Shape suffixes: B batch, T length, D d_model, V vocabulary, C classes, P number of selected
positions.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import (
    GPTConfig,
    TransformerConfig,
    check_num_classes,
    check_sequence_length,
)
from transformer_jax.nn.attention import KVCache, init_cache
from transformer_jax.nn.layers import Bias, Embed, LayerNorm, LazyLogits, Linear, get_activation


def gather_positions(
    hidden_BTD: Float[Array, "B T D"], positions_BP: Int[Array, "B P"]
) -> Float[Array, "B P D"]:
    """Gathers the hidden states at P positions of each row.

    Example:
        >>> hidden = jnp.arange(4.0).reshape(1, 4, 1)
        >>> gather_positions(hidden, jnp.array([[3, 1]]))[0, :, 0].tolist()
        [3.0, 1.0]
    """
    return jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)


def last_token_positions(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None
) -> Int[Array, "B"]:
    """Returns, for each row, the position of its last token that is not padding.

    The padding may be on either side. `padding_mask` is True at tokens; None means no padding.

    Example:
        >>> mask = jnp.array([[True, True, False], [False, True, True]])
        >>> last_token_positions(jnp.zeros((2, 3), jnp.int32), mask).tolist()
        [1, 2]
    """
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


class ClassificationHeads(nn.Module):
    """The classifier of a model, for whole texts and for single tokens.

    A subclass defines the attributes `config` and `num_classes`, the submodules `classifier` and
    `classifier_dropout`, and the methods `hidden_states` (`[B, T, D]`) and `features` (`[B, D]`).
    """

    def classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B C"]:
        """Computes class logits of each row (Radford et al. 2018, 3.2; Devlin et al. 2018, 4.1).

        Args:
            tokens: token ids.
            deterministic: whether to disable dropout.
            **options: as for `features`.

        Raises:
            ValueError: the model has no classifier, or T is larger than `max_length`.
        """
        check_num_classes(self.num_classes)
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
        """Computes class logits of each token; arguments as for `hidden_states`.

        Raises:
            ValueError: the model has no classifier, or T is larger than `max_length`.
        """
        check_num_classes(self.num_classes)
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
        """Returns the unevaluated logits of the next token for hidden states.

        The output layer is the token embedding if `config.tie_embeddings`.
        """
        return (self.token_embed if self.config.tie_embeddings else self.lm_head).project(hidden)

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Computes the float32 logits of the next token for hidden states."""
        return self.lazy_lm_logits(hidden).logits()

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last_positions: Int[Array, "B"] | None = None,
        deterministic: bool = True,
        **options,
    ) -> Float[Array, "B D"]:
        """Computes the classifier's input: the decoder's hidden state of the last token.

        Radford et al. 2018, section 3.2. In an encoder-decoder, the same text is the input of
        encoder and decoder (Lewis et al. 2019, "BART", section 3.1).

        Args:
            tokens: token ids.
            padding_mask: True at tokens, False at padding.
            segment_ids: ignored, since decoders have no segments. The argument is accepted so that
                one batch serves all model families.
            last_positions: the position whose hidden state is used; the last token that is not
                padding if None.
            deterministic: whether to disable dropout.
            **options: as for `hidden_states`.

        Raises:
            ValueError: T is larger than `max_length`.
        """
        del segment_ids
        hidden_BTD = self.hidden_states(
            tokens, padding_mask=padding_mask, deterministic=deterministic, **options)
        if last_positions is None:
            last_positions = last_token_positions(tokens, padding_mask)
        return gather_positions(hidden_BTD, last_positions[:, None])[:, 0]

    @staticmethod
    def init_cache(
        config: GPTConfig | TransformerConfig, batch_size: int, length: int
    ) -> dict[str, KVCache]:
        """Creates an empty cache of the decoder for `length` tokens in each row.

        Raises:
            ValueError: `length` is larger than `max_length`.
        """
        check_sequence_length(length, config.max_length)
        s = config.decoder_stack
        return init_cache(
            s.num_layers, batch_size, length, s.num_heads, s.head_dim, config.compute_dtype)


class MLMHead(nn.Module):
    """BERT's masked language modeling head: dense, activation, LayerNorm, output layer, bias.

    Devlin et al. 2018, section 3.1, and `get_masked_lm_output` of the released code. The output
    layer is the embedding that is passed to `__call__`, usually the token embedding (tied).
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
