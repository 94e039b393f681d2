"""BERT: an encoder stack that sees both sides of every token.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding".

    tokens -> token + position + segment embedding -> LayerNorm -> stack under a padding mask
           -> masked-word head on chosen positions, next-sentence head on the pooled first token
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import BERTConfig, check_classes, check_length
from transformer_jax.models.heads import MLMHead, take_positions
from transformer_jax.nn import attention
from transformer_jax.nn.blocks import Stack
from transformer_jax.nn.layers import INITIALIZERS, Embed, LayerNorm, Linear
from transformer_jax.nn.positions import make_position_embed


class EncoderOutput(NamedTuple):
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]  # tanh of a linear layer of the first token
    attention: tuple[Float[Array, "B N T T"], ...]


class BERTOutput(NamedTuple):
    """Logits are float32. `mlm_logits` has P = T where no positions were chosen."""

    mlm_logits: Float[Array, "B P V"]
    nsp_logits: Float[Array, "B 2"]  # column 0: B follows A; column 1: B is a random sentence
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]
    attention: tuple[Float[Array, "B N T T"], ...]


class BERT(nn.Module):
    """`num_classes` is the width of the classifier; 0 where `classify` is not used."""

    config: BERTConfig
    num_classes: int = 0

    def setup(self):
        c = self.config
        init = INITIALIZERS[c.initializer](c.init_std)
        dtype = c.compute_dtype
        shared = {"embedding_init": init, "dtype": dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **shared)
        self.position_embed = make_position_embed(c.positions, c.max_length, c.d_model, **shared)
        self.segment_embed = Embed(c.num_segments, c.d_model, **shared)
        self.embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
        self.embed_dropout = nn.Dropout(c.dropout_rate)
        self.encoder = Stack(c.stack)
        self.pooler = Linear((c.d_model,), kernel_init=init, dtype=dtype)
        self.mlm_head = MLMHead(c.activation, c.norm_epsilon, init, dtype)
        self.nsp_head = Linear((2,), kernel_init=init)
        if self.num_classes:
            self.classifier_dropout = nn.Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def encode(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """Hidden states of every token and the pooled first token.

        Args:
            segment_ids: 0 for sentence A, 1 for sentence B; all 0 if None.
            padding_mask: True at tokens, False at padding; all True if None.
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to `apply`.

        Raises:
            ValueError: more tokens than positions.
        """
        c = self.config
        B, T = tokens.shape
        check_length(T, c.max_length)
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        if segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        mask_B11T = None if padding_mask is None else attention.padding_mask(padding_mask)
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions_BT) + self.segment_embed(segment_ids)
        x_BTD = self.embed_dropout(self.embed_norm(x_BTD), deterministic=deterministic)
        hidden_BTD, _, weights = self.encoder(x_BTD, mask_B11T, deterministic=deterministic)
        return EncoderOutput(hidden_BTD, jnp.tanh(self.pooler(hidden_BTD[:, 0])), weights)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        masked_positions: Int[Array, "B P"] | None = None,
        **options,
    ) -> BERTOutput:
        """Both pre-training heads; `options` as for `encode`.

        Args:
            masked_positions: the positions to predict. Only these go through the vocabulary
                projection; all T of them if None.
        """
        hidden_BTD, pooled_BD, weights = self.encode(tokens, **options)
        chosen = (
            hidden_BTD if masked_positions is None else take_positions(hidden_BTD, masked_positions)
        )
        return BERTOutput(
            self.mlm_head(chosen, self.token_embed),
            self.nsp_head(pooled_BD).astype(jnp.float32),
            hidden_BTD,
            pooled_BD,
            weights,
        )

    def classify(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        """Class scores from the pooled first token (BERT paper, section 4.1).

        Raises:
            ValueError: the model was built without `num_classes`, or more tokens than positions.
        """
        check_classes(self.num_classes)
        pooled_BD = self.encode(
            tokens,
            segment_ids=segment_ids,
            padding_mask=padding_mask,
            deterministic=deterministic,
        ).pooled
        pooled_BD = self.classifier_dropout(pooled_BD, deterministic=deterministic)
        return self.classifier(pooled_BD).astype(jnp.float32)
