"""BERT: an encoder stack that sees both sides of every token.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding".

    tokens -> token + position + segment embedding -> LayerNorm -> stack under a padding mask
           -> masked-word head on chosen positions, next-sentence head on the pooled first token
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import BERTConfig, check_classes, check_length
from transformer_jax.models.heads import (
    MLMHead,
    gather_positions,
    mean_pool,
    prepend_prompt,
    remove_prompt,
)
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    Embed,
    LayerNorm,
    LazyLogits,
    Linear,
)
from transformer_jax.nn.positions import make_position_embed


class EncoderOutput(NamedTuple):
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]  # tanh of a linear layer of the first token
    attention: tuple[Float[Array, "B N T T"], ...]


class BERTOutput(NamedTuple):
    """Logits are float32. `mlm_logits`, those of `lazy_mlm_logits`, has P = T where no positions
    were chosen."""

    mlm_logits: Float[Array, "B P V"]
    nsp_logits: Float[Array, "B 2"]  # column 0: B follows A; column 1: B is a random sentence
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]
    attention: tuple[Float[Array, "B N T T"], ...]
    lazy_mlm_logits: LazyLogits


class BERT(nn.Module):
    """`num_classes` is the width of the classifier; 0 where there is none. `task` names the head
    that the parameters are for; every method can be called whatever it is."""

    config: BERTConfig
    num_classes: int = 0
    task: str = "pretraining"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "encode", "encoder": "hidden", "pretraining": "__call__",
        "masked_lm": "masked_lm_logits", "next_sentence": "next_sentence",
        "classification": "classification_logits", "multiple_choice": "classification_logits",
        "token_classification": "token_classification_logits", "question_answering": "token_classification_logits",
    }

    def setup(self):
        c = self.config
        init = INITIALIZERS[c.initializer](c.init_std)
        dtype = c.compute_dtype
        shared = {"embedding_init": c.embedding_init(), "dtype": dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **shared)
        self.position_embed = make_position_embed(c.positions, c.position_rows, c.d_model, **shared)
        if c.num_segments:
            self.segment_embed = Embed(c.num_segments, c.d_model, **shared)
        self.embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.encoder = Stack(c.stack)
        self.pooler = Linear((c.d_model,), kernel_init=init, dtype=dtype)
        self.mlm_head = MLMHead(c.activation, c.norm_epsilon, init, dtype)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **shared)
        self.nsp_head = Linear((2,), kernel_init=init)
        if self.num_classes:
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        """Hidden states of every token.

        Args:
            segment_ids: 0 for sentence A, 1 for sentence B; all 0 if None. Ignored by a model
                without segments.
            padding_mask: True at tokens, False at padding; all True if None.
            positions: place of each token; 0 ... T-1 if None, or, with a `position_offset`, its
                number among the real tokens.
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to `apply`.

        Raises:
            ValueError: more tokens than positions.
        """
        c = self.config
        B, T = tokens.shape
        check_length(T, c.max_length)
        if positions is None and c.position_offset and padding_mask is not None:
            # Padding gets the row before the first, RoBERTa's padding_idx.
            positions = jnp.where(padding_mask, jnp.cumsum(padding_mask, -1), 0) - 1
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions + c.position_offset)
        if c.num_segments:
            segment_ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
            x_BTD = x_BTD + self.segment_embed(segment_ids)
        x_BTD, mask, prompt = prepend_prompt(self, x_BTD, Mask(real=padding_mask))
        x_BTD = self.embed_dropout(self.embed_norm(x_BTD), deterministic=deterministic)
        out = self.encoder(x_BTD, mask, deterministic=deterministic)
        return remove_prompt(out, prompt)

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """The first token's hidden state through a linear layer and tanh."""
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden[:, 0]))

    def encode(self, tokens: Int[Array, "B T"], **options) -> EncoderOutput:
        """Hidden states of every token and the pooled first token; `options` as for `hidden`."""
        out = self.hidden(tokens, **options)
        return EncoderOutput(out.hidden, self.pool(out.hidden), out.attention)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        masked_positions: Int[Array, "B P"] | None = None,
        **options,
    ) -> BERTOutput:
        """Both pre-training heads; `options` as for `hidden`.

        Args:
            masked_positions: the positions to predict. Only these go through the vocabulary
                projection; all T of them if None.
        """
        hidden_BTD, pooled_BD, weights = self.encode(tokens, **options)
        projection = self.lazy_mlm_logits(hidden_BTD, masked_positions)
        return BERTOutput(
            projection.logits(), self.nsp_logits(pooled_BD), hidden_BTD, pooled_BD, weights,
            projection,
        )

    def masked_lm_logits(
        self,
        tokens: Int[Array, "B T"],
        *,
        masked_positions: Int[Array, "B P"] | None = None,
        **options,
    ) -> Float[Array, "B P V"]:
        """The masked-word head alone, as `mlm_logits` of a call."""
        return self.mlm_logits(self.hidden(tokens, **options).hidden, masked_positions)

    def next_sentence(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B 2"]:
        """The next-sentence head alone, as `nsp_logits` of a call."""
        return self.nsp_logits(self.encode(tokens, **options).pooled)

    def nsp_logits(self, pooled: Float[Array, "B D"]) -> Float[Array, "B 2"]:
        """Next-sentence scores of the pooled first token."""
        return self.nsp_head(pooled).astype(jnp.float32)

    def mlm_logits(
        self, hidden: Float[Array, "B T D"], positions: Int[Array, "B P"] | None = None
    ) -> Float[Array, "B P V"]:
        """Word scores of hidden states, at `positions` or everywhere."""
        return self.lazy_mlm_logits(hidden, positions).logits()

    def lazy_mlm_logits(
        self, hidden: Float[Array, "B T D"], positions: Int[Array, "B P"] | None = None
    ) -> LazyLogits:
        """The masked-word head up to its output layer."""
        chosen = hidden if positions is None else gather_positions(hidden, positions)
        return self.mlm_head(
            chosen, self.token_embed if self.config.tie_embeddings else self.lm_head)

    def classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B C"]:
        """Class scores from the pooled first token (BERT paper, section 4.1); `options` as for
        `hidden`.

        Raises:
            ValueError: the model was built without `num_classes`, or more tokens than positions.
        """
        check_classes(self.num_classes)
        features_BD = self.features(tokens, deterministic=deterministic, **options)
        return self.logits_from_features(features_BD, deterministic)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        **options,
    ) -> Float[Array, "B D"]:
        """What `classify` classifies: the pooled first token, or the mean of all tokens, by the
        config's `pooling`; `options` as for `hidden`."""
        out = self.hidden(tokens, padding_mask=padding_mask, **options)
        if self.config.pooling == "first":
            return self.pool(out.hidden)
        return mean_pool(out.hidden, padding_mask)

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Class scores of `features`."""
        return self.class_logits(features, deterministic)

    def token_classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B T C"]:
        """Class scores of every token; `options` as for `hidden`."""
        check_classes(self.num_classes)
        hidden_BTD = self.hidden(tokens, deterministic=deterministic, **options).hidden
        return self.class_logits(hidden_BTD, deterministic)

    def class_logits(
        self, features: Float[Array, "... D"], deterministic: bool = True
    ) -> Float[Array, "... C"]:
        """Class scores of hidden states, or of pooled ones."""
        features = self.classifier_dropout(features, deterministic=deterministic)
        return self.classifier(features).astype(jnp.float32)
