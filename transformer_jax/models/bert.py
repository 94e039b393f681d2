"""BERT: a bidirectional Transformer encoder.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding".

    tokens -> token + position + segment embedding -> LayerNorm -> stack with a padding mask
           -> masked language modeling head at the masked positions,
              next-sentence head on the pooled first token
"""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import BERTConfig
from transformer_jax.models.heads import (
    ClassificationHeads,
    MLMHead,
    encoder_mask,
    gather_positions,
    mean_pool,
    token_positions,
)
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import (
    Embed,
    LayerNorm,
    LazyLogits,
    Linear,
    get_activation,
    make_position_embed,
)
from transformer_jax.nn.peft import prepend_prompt, remove_prompt


class BERTEncoderOutput(NamedTuple):
    """Output of `BERT.encode_and_pool`; the fields are those of `BERTOutput`."""

    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]
    attention: tuple[Float[Array, "B N T T"], ...]


class BERTOutput(NamedTuple):
    """Output of `BERT.__call__`."""

    mlm_logits: Float[Array, "B P V"] | None  # float32, of the original tokens; P is T by default
    nsp_logits: Float[Array, "B 2"]  # float32; class 0: B follows A; class 1: B is random
    hidden: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]  # the hidden state of the first token after the pooler
    attention: tuple[Float[Array, "B N T T"], ...]  # per layer; empty without output_attentions
    lazy_mlm_logits: LazyLogits  # the unevaluated form of `mlm_logits`


class BERT(ClassificationHeads):
    """BERT with its pre-training heads and an optional classifier.

    `ClassificationHeads` describes the fields. `masked_lm_logits` and `next_sentence_logits` take
    tokens; `mlm_logits`, `lazy_mlm_logits` and `nsp_logits` take hidden states.

    Example:
        >>> import jax
        >>> from transformer_jax.models import init_params
        >>> config = BERTConfig(vocab_size=50, max_length=16, num_layers=2, d_model=32,
        ...                     num_heads=4, mlp_dim=64)
        >>> model = BERT(config)
        >>> params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
        >>> out = jax.eval_shape(model.apply, {"params": params}, jnp.ones((2, 8), jnp.int32))
        >>> out.mlm_logits.shape, out.nsp_logits.shape
        ((2, 8, 50), (2, 2))
    """

    config: BERTConfig
    task: str = "pretraining"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "encode_and_pool", "encoder": "encode", "pretraining": "__call__",
        "masked_lm": "masked_lm_logits", "next_sentence": "next_sentence_logits",
        **ClassificationHeads.METHODS}

    def setup(self):
        c = self.config
        init, dtype = c.stack.kernel_init(), c.compute_dtype
        embed_options = {"embedding_init": c.embedding_init(), "dtype": dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **embed_options)
        self.position_embed = make_position_embed(
            c.positions, c.position_table_size, c.d_model, **embed_options)
        if c.num_segments:
            self.segment_embed = Embed(c.num_segments, c.d_model, **embed_options)
        self.embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.encoder = Stack(c.stack)
        self.pooler = Linear((c.d_model,), kernel_init=init, dtype=dtype)
        self.mlm_head = MLMHead(c.activation, c.norm_epsilon, init, dtype)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **embed_options)
        self.nsp_head = Linear((2,), kernel_init=init)
        if self.num_classes:
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def encode(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None, positions: Int[Array, "B T"] | None = None,
        attention_mask: Bool[Array, "B 1 T T"] | None = None, deterministic: bool = True,
        output_attentions: bool = False,
    ) -> StackOutput:
        """Computes the hidden states of all tokens.

        Args:
            tokens: token ids.
            segment_ids: 0 for sentence A, 1 for sentence B; all 0 if None. Ignored if the config
                has no segments.
            positions: the position of each token. If None, it is 0 ... T-1; with a
                `position_offset` and a `padding_mask`, padding is not counted.
            padding_mask, attention_mask, deterministic, output_attentions: as for all models
                (`ClassificationHeads`).

        Raises:
            ValueError: T is larger than `max_length`.
        """
        c = self.config
        if positions is None and c.position_offset and padding_mask is not None:
            # Padding gets position -1, which the offset of 2 in RoBERTa maps to row 1 of the table,
            # its padding_idx.
            positions = jnp.where(padding_mask, jnp.cumsum(padding_mask, -1), 0) - 1
        positions = token_positions(tokens, c.max_length, positions)
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions + c.position_offset)
        if c.num_segments:
            segment_ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
            x_BTD = x_BTD + self.segment_embed(segment_ids)
        mask = encoder_mask(tokens, padding_mask, attention_mask)
        x_BTD, mask, prompt_length = prepend_prompt(self, x_BTD, mask)
        x_BTD = self.embed_dropout(self.embed_norm(x_BTD), deterministic=deterministic)
        out = self.encoder(x_BTD, mask, positions, deterministic=deterministic,
                           output_attentions=output_attentions)
        return remove_prompt(out, prompt_length)

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Applies the pooler, a linear layer and `config.pooler_activation`, to the first token."""
        return get_activation(self.config.pooler_activation)(self.pooler(hidden[:, 0]))

    def encode_and_pool(self, tokens: Int[Array, "B T"], **options) -> BERTEncoderOutput:
        """Computes hidden states and the pooled first token; `options` as for `encode`."""
        out = self.encode(tokens, **options)
        return BERTEncoderOutput(out.hidden, self.pool(out.hidden), out.attention)

    def __call__(
        self, tokens: Int[Array, "B T"], *, masked_positions: Int[Array, "B P"] | None = None,
        return_logits: bool = True,
        **options,
    ) -> BERTOutput:
        """Applies both pre-training heads; `options` as for `encode`.

        The output layer is applied only at `masked_positions`, or at all T positions if None.
        With `return_logits=False`, `mlm_logits` is None: losses use `lazy_mlm_logits`.
        """
        hidden_BTD, pooled_BD, attention = self.encode_and_pool(tokens, **options)
        lazy_mlm_logits = self.lazy_mlm_logits(hidden_BTD, masked_positions)
        return BERTOutput(
            lazy_mlm_logits.logits() if return_logits else None, self.nsp_logits(pooled_BD),
            hidden_BTD, pooled_BD, attention, lazy_mlm_logits,
        )

    def masked_lm_logits(
        self, tokens: Int[Array, "B T"], *, masked_positions: Int[Array, "B P"] | None = None,
        **options,
    ) -> Float[Array, "B P V"]:
        """Computes `mlm_logits` of `__call__`, without the next-sentence head."""
        return self.mlm_logits(self.encode(tokens, **options).hidden, masked_positions)

    def next_sentence_logits(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B 2"]:
        """Computes `nsp_logits` of `__call__`, without the masked language modeling head."""
        return self.nsp_logits(self.encode_and_pool(tokens, **options).pooled)

    def nsp_logits(self, pooled: Float[Array, "B D"]) -> Float[Array, "B 2"]:
        """Applies the next-sentence head to the pooled first token."""
        return self.nsp_head(pooled).astype(jnp.float32)

    def mlm_logits(
        self, hidden: Float[Array, "B T D"], masked_positions: Int[Array, "B P"] | None = None
    ) -> Float[Array, "B P V"]:
        """Applies the masked language modeling head at the given positions, or at all if None."""
        return self.lazy_mlm_logits(hidden, masked_positions).logits()

    def lazy_mlm_logits(
        self, hidden: Float[Array, "B T D"], masked_positions: Int[Array, "B P"] | None = None
    ) -> LazyLogits:
        """Returns the unevaluated form of `mlm_logits`."""
        if masked_positions is not None:
            hidden = gather_positions(hidden, masked_positions)
        return self.mlm_head(
            hidden, self.token_embed if self.config.tie_embeddings else self.lm_head)

    def hidden_states(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T D"]:
        """Computes the inputs of the heads; arguments as for `encode`."""
        return self.encode(tokens, **options).hidden

    def features(
        self, tokens: Int[Array, "B T"], *, padding_mask: Bool[Array, "B T"] | None = None,
        **options,
    ) -> Float[Array, "B D"]:
        """Computes the classifier's input: the pooled first token, or the mean of all tokens,
        according to `config.pooling`; `options` as for `encode`."""
        out = self.encode(tokens, padding_mask=padding_mask, **options)
        if self.config.pooling == "first":
            return self.pool(out.hidden)
        return mean_pool(out.hidden, padding_mask)
