"""The Transformer: an encoder-decoder for sequence-to-sequence tasks.

Vaswani et al. 2017, "Attention Is All You Need": post-norm, sinusoidal positions, and one embedding
table for source, target and output layer, scaled by sqrt(d_model) in the embeddings (section 3.4).

    tokens         -> token + position embedding -> encoder stack with a padding mask
    decoder_tokens -> token + position embedding -> decoder stack with a causal mask, and
                      cross-attention to the output of the encoder -> tied output layer
"""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import BARTConfig, TransformerConfig
from transformer_jax.models.heads import (
    ClassificationHeads,
    DecoderHeads,
    decoder_mask,
    encoder_mask,
    token_positions,
)
from transformer_jax.nn.attention import KVCache, Mask
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import (
    Bias,
    Embed,
    LayerNorm,
    LazyLogits,
    Linear,
    make_position_embed,
)
from transformer_jax.nn.peft import prepend_prompt, remove_prompt


class Seq2SeqOutput(NamedTuple):
    """Output of `Transformer.__call__`; the attention weights, for each layer, are empty without
    `output_attentions`."""

    # float32; logits[:, t] are those of the token after decoder_tokens[:, t]
    logits: Float[Array, "B T V"] | None
    hidden: Float[Array, "B T D"]
    encoder_hidden: Float[Array, "B S D"]
    encoder_attention: tuple[Float[Array, "B N S S"], ...]
    attention: tuple[Float[Array, "B N T T"], ...]
    cross_attention: tuple[Float[Array, "B N T S"], ...]
    lazy_logits: LazyLogits  # the unevaluated form of `logits`


def shift_right(tokens: Int[Array, "B T"], start_id: int) -> Int[Array, "B T"]:
    """Returns the decoder inputs for target tokens: `start_id`, then all targets except the last.

    Example:
        >>> shift_right(jnp.array([[5, 6, 7]]), start_id=2).tolist()
        [[2, 5, 6]]
    """
    return jnp.concatenate([jnp.full_like(tokens[:, :1], start_id), tokens[:, :-1]], axis=1)


class Transformer(DecoderHeads):
    """The encoder-decoder Transformer, with an optional classifier.

    `ClassificationHeads` describes the fields.

    Example:
        >>> import jax
        >>> from transformer_jax.models import init_params
        >>> config = TransformerConfig(vocab_size=50, max_length=16, num_layers=1, d_model=32,
        ...                            num_heads=4, mlp_dim=64)
        >>> model = Transformer(config)
        >>> params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
        >>> source, target = jnp.ones((2, 8), jnp.int32), jnp.ones((2, 6), jnp.int32)
        >>> decoder_tokens = shift_right(target, start_id=0)
        >>> jax.eval_shape(model.apply, {"params": params}, source, decoder_tokens).logits.shape
        (2, 6, 50)
    """

    config: TransformerConfig
    task: str = "seq2seq_lm"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "encode_decode", "seq2seq_lm": "__call__", **ClassificationHeads.METHODS}

    def setup(self):
        c = self.config
        dtype = c.compute_dtype
        embed_options = {"embedding_init": c.embedding_init(), "dtype": dtype}
        positions = (c.positions, c.position_table_size, c.d_model)
        self.token_embed = Embed(c.vocab_size, c.d_model, **embed_options)
        self.encoder_position_embed = make_position_embed(*positions, **embed_options)
        self.decoder_position_embed = make_position_embed(*positions, **embed_options)
        if c.embed_norm:
            self.encoder_embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
            self.decoder_embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.encoder = Stack(c.stack)
        self.decoder = Stack(c.decoder_stack)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **embed_options)
        if c.output_bias:
            self.output = Bias(c.vocab_size)
        if self.num_classes:
            init = c.stack.kernel_init()
            self.pooler = Linear((c.d_model,), kernel_init=init, dtype=dtype)
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def _embed(self, stack, tokens, positions):
        """Sums token and position embeddings of the stack "encoder" or "decoder"."""
        c = self.config
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        return x_BTD + getattr(self, f"{stack}_position_embed")(positions + c.position_offset)

    def _normalize_embeddings(self, stack, x_BTD, deterministic):
        """Applies dropout to embeddings, after LayerNorm if the config has `embed_norm`."""
        if self.config.embed_norm:
            x_BTD = getattr(self, f"{stack}_embed_norm")(x_BTD)
        return self.embed_dropout(x_BTD, deterministic=deterministic)

    def encode(
        self, tokens: Int[Array, "B S"], *, padding_mask: Bool[Array, "B S"] | None = None,
        attention_mask: Bool[Array, "B 1 S S"] | None = None, deterministic: bool = True,
        output_attentions: bool = False,
    ) -> StackOutput:
        """Computes the hidden states `[B, S, D]` of the encoder, to which the decoder attends.

        The options are those of all models (`ClassificationHeads`).

        Raises:
            ValueError: S is larger than `max_length`.
        """
        positions_BS = token_positions(tokens, self.config.max_length)
        x_BSD = self._embed("encoder", tokens, positions_BS)
        mask = encoder_mask(tokens, padding_mask, attention_mask)
        x_BSD, mask, prompt_length = prepend_prompt(self, x_BSD, mask)
        x_BSD = self._normalize_embeddings("encoder", x_BSD, deterministic)
        out = self.encoder(x_BSD, mask, positions_BS, deterministic=deterministic,
                           output_attentions=output_attentions)
        return remove_prompt(out, prompt_length)

    def decode(
        self, tokens: Int[Array, "B T"], encoder_output: Float[Array, "B S D"] | dict[str, KVCache],
        *, encoder_padding_mask: Bool[Array, "B S"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        attention_mask: Bool[Array, "B 1 T K"] | None = None,
        positions: Int[Array, "B T"] | None = None, cache: dict[str, KVCache] | None = None,
        deterministic: bool = True, output_attentions: bool = False,
    ) -> StackOutput:
        """Computes the hidden states `[B, T, D]` of the decoder, before the output layer.

        Args:
            tokens: token ids of the decoder, the start token first (`shift_right`).
            encoder_output: the hidden states of the encoder, or the `cross_attention_cache` of an
                earlier output of this method, which contains their projections to keys and values.
            encoder_padding_mask: True at tokens of the source, False at its padding.
            padding_mask: required only for padding of the target on the left. Not supported with
                `cache`.
            attention_mask: replaces the causal mask of self-attention; `padding_mask` still
                applies. K is T or the number of slots of `cache`.
            positions: the position of each token; 0 ... T-1 if None.
            cache: keys and values of the previous tokens (`init_cache`). `positions` are then also
                the slots that these tokens fill.
            deterministic, output_attentions: as for all models (`ClassificationHeads`).

        Raises:
            ValueError: T is larger than `max_length`, or `padding_mask` and `cache` are both given.
        """
        positions_BT = token_positions(tokens, self.config.max_length, positions)
        mask = decoder_mask(positions_BT, cache, padding_mask, attention_mask)
        x_BTD = self._embed("decoder", tokens, positions_BT)
        x_BTD = self._normalize_embeddings("decoder", x_BTD, deterministic)
        return self.decoder(
            x_BTD, mask, positions_BT, cache, encoder_output,
            Mask(padding_mask=encoder_padding_mask), deterministic, output_attentions)

    def encode_decode(
        self, tokens: Int[Array, "B S"], decoder_tokens: Int[Array, "B T"] | None = None, *,
        padding_mask: Bool[Array, "B S"] | None = None,
        decoder_padding_mask: Bool[Array, "B T"] | None = None,
        attention_mask: Bool[Array, "B 1 S S"] | None = None,
        decoder_attention_mask: Bool[Array, "B 1 T T"] | None = None, **options
    ) -> tuple[StackOutput, StackOutput]:
        """Computes the outputs of the encoder and of the decoder.

        `decoder_tokens` are the target tokens shifted right (`shift_right`). None uses the source
        as target, as BART does for tasks without a target text. `padding_mask` and `attention_mask`
        are passed to `encode`, those of the decoder to `decode`, and `options` to both.
        """
        if decoder_tokens is None:
            decoder_tokens = shift_right(tokens, self.config.decoder_start_token_id or 0)
        encoder_out = self.encode(
            tokens, padding_mask=padding_mask, attention_mask=attention_mask, **options)
        decoder_out = self.decode(
            decoder_tokens, encoder_out.hidden, encoder_padding_mask=padding_mask,
            padding_mask=decoder_padding_mask, attention_mask=decoder_attention_mask, **options)
        return encoder_out, decoder_out

    def __call__(
        self, tokens: Int[Array, "B S"], decoder_tokens: Int[Array, "B T"] | None = None, *,
        return_logits: bool = True, **options,
    ) -> Seq2SeqOutput:
        """Applies encoder, decoder and output layer; arguments as for `encode_decode`.

        Losses set `return_logits=False` and compute the logits from `lazy_logits`.
        """
        encoder_out, decoder_out = self.encode_decode(tokens, decoder_tokens, **options)
        lazy_logits = self.lazy_lm_logits(decoder_out.hidden)
        return Seq2SeqOutput(
            lazy_logits.logits() if return_logits else None, decoder_out.hidden,
            encoder_out.hidden, encoder_out.attention, decoder_out.attention,
            decoder_out.cross_attention, lazy_logits)

    def hidden_states(
        self, tokens: Int[Array, "B S"], decoder_tokens: Int[Array, "B T"] | None = None, **options
    ) -> Float[Array, "B T D"]:
        """Computes the inputs of the heads; arguments as for `encode_decode`."""
        return self.encode_decode(tokens, decoder_tokens, **options)[1].hidden

    def lazy_lm_logits(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """Returns the unevaluated logits of the next token for hidden states of the decoder."""
        lazy_logits = super().lazy_lm_logits(hidden)
        return self.output(lazy_logits) if self.config.output_bias else lazy_logits

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Computes class logits from the output of `features`: dropout, pooler, `class_logits`."""
        features = self.classifier_dropout(features, deterministic=deterministic)
        return self.class_logits(jnp.tanh(self.pooler(features)), deterministic)


class BART(Transformer):
    """BART: the Transformer, pre-trained to reconstruct corrupted text (`objectives.seq2seq`).

    Lewis et al. 2019, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
    Generation, Translation, and Comprehension", section 2.1: GELU instead of ReLU, and parameters
    initialized from N(0, 0.02). As in the released code (fairseq), positions are learned, the
    position table has two unused rows at its start, and the embeddings are normalized by LayerNorm
    instead of scaled.
    """

    config: BARTConfig
