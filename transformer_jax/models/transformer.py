"""The Transformer: an encoder that reads, and a decoder that writes while it looks back at it.

Vaswani et al. 2017, "Attention Is All You Need": norm after each residual sum, sinusoidal
positions, and one embedding for both languages and the output layer, scaled by sqrt(d_model) where
it is looked up (section 3.4).

    tokens         -> token + position embedding -> encoder stack under a padding mask -> memory
    decoder_tokens -> token + position embedding -> decoder stack under a causal mask, which sees
                      the memory by cross-attention -> tied output layer
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import TransformerConfig, check_classes, check_length
from transformer_jax.models.heads import (
    gather_positions,
    last_token_positions,
    prepend_prompt,
    remove_prompt,
)
from transformer_jax.nn.attention import KVCache, Mask, causal_mask, init_cache
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import INITIALIZERS, Bias, Embed, LayerNorm, LazyLogits, Linear
from transformer_jax.nn.positions import make_position_embed


class Seq2SeqOutput(NamedTuple):
    """`logits[:, t]` scores the target's token that comes after `decoder_tokens[:, t]`; float32,
    and those of `projection`. Attention weights are given by layer; those of `cross_attention` are
    `[B, N, T, S]`."""

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    encoder_hidden: Float[Array, "B S D"]
    encoder_attention: tuple[Float[Array, "B N S S"], ...]
    attention: tuple[Float[Array, "B N T T"], ...]
    cross_attention: tuple[Float[Array, "B N T S"], ...]
    lazy_logits: LazyLogits


def shift_right(tokens: Int[Array, "B T"], start_id: int) -> Int[Array, "B T"]:
    """Decoder inputs for these targets: what stands at t is the target at t - 1, so that nothing
    sees what it has to predict; `start_id` stands first."""
    return jnp.concatenate([jnp.full_like(tokens[:, :1], start_id), tokens[:, :-1]], axis=1)


class Transformer(nn.Module):
    """`num_classes` is the width of the classifier; 0 where there is none. `task` names the head
    that the parameters are for; every method can be called whatever it is."""

    config: TransformerConfig
    num_classes: int = 0
    task: str = "seq2seq_lm"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "encode_decode", "seq2seq_lm": "__call__", "classification": "classification_logits",
        "multiple_choice": "classification_logits", "token_classification": "token_classification_logits", "question_answering": "token_classification_logits",
    }

    def setup(self):
        c = self.config
        dtype = c.compute_dtype
        shared = {"embedding_init": c.embedding_init(), "dtype": dtype}
        positions = (c.positions, c.position_rows, c.d_model)
        self.token_embed = Embed(c.vocab_size, c.d_model, **shared)
        self.encoder_position_embed = make_position_embed(*positions, **shared)
        self.decoder_position_embed = make_position_embed(*positions, **shared)
        if c.embed_norm:
            self.encoder_embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
            self.decoder_embed_norm = LayerNorm(c.norm_epsilon, dtype=dtype)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.encoder = Stack(c.stack)
        self.decoder = Stack(c.decoder_stack)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **shared)
        if c.output_bias:
            self.output = Bias(c.vocab_size)
        if self.num_classes:
            init = INITIALIZERS[c.initializer](c.init_std)
            self.pooler = Linear((c.d_model,), kernel_init=init, dtype=dtype)
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def _embed(self, side, tokens, positions):
        c = self.config
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        return x_BTD + getattr(self, f"{side}_position_embed")(positions + c.position_offset)

    def _normalize(self, side, x_BTD, deterministic):
        if self.config.embed_norm:
            x_BTD = getattr(self, f"{side}_embed_norm")(x_BTD)
        return self.embed_dropout(x_BTD, deterministic=deterministic)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        *,
        padding_mask: Bool[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        """Hidden states of the source: the memory that `decode` looks at.

        Args:
            padding_mask: True at tokens, False at padding; all True if None.
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to `apply`.

        Raises:
            ValueError: more tokens than positions.
        """
        check_length(tokens.shape[1], self.config.max_length)
        positions_BS = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x_BSD = self._embed("encoder", tokens, positions_BS)
        x_BSD, mask, prompt = prepend_prompt(self, x_BSD, Mask(real=padding_mask))
        x_BSD = self._normalize("encoder", x_BSD, deterministic)
        return remove_prompt(self.encoder(x_BSD, mask, deterministic=deterministic), prompt)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        memory: Float[Array, "B S D"] | dict[str, KVCache],
        *,
        memory_mask: Bool[Array, "B S"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        """Hidden states `[B, T, D]` before the output layer.

        Args:
            memory: the encoder's hidden states, or the `memory` of an earlier output, its keys and
                values, which are then not computed again.
            memory_mask: True at the source's tokens, False at its padding; all True if None.
            padding_mask: True at tokens. Only padding in front of a text needs it.
            positions: place of each token; 0 ... T-1 if None.
            cache: keys and values of the tokens before these (`init_cache`); `positions` then say
                which slots these tokens fill. Not together with `padding_mask`.

        Raises:
            ValueError: more tokens than positions; padding together with a cache.
        """
        B, T = tokens.shape
        check_length(T, self.config.max_length)
        if cache is not None and padding_mask is not None:
            raise ValueError("padding_mask is given with a cache: padding takes no slots; give "
                             "the positions of the tokens alone")
        order_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        positions_BT = order_BT if positions is None else positions
        if cache is None:
            mask = Mask(causal=True, real=padding_mask)
        else:
            slots_1S = jnp.arange(cache["layer_0"].length)[None]
            mask = Mask(allowed=causal_mask(positions_BT, slots_1S))
        x_BTD = self._embed("decoder", tokens, positions_BT)
        x_BTD = self._normalize("decoder", x_BTD, deterministic)
        return self.decoder(
            x_BTD, mask, positions_BT, cache, memory, Mask(real=memory_mask), deterministic
        )

    def lazy_lm_logits(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """The output layer for `hidden`: the token embedding where it is tied."""
        c = self.config
        projection = (self.token_embed if c.tie_embeddings else self.lm_head).project(hidden)
        return self.output(projection) if c.output_bias else projection

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token."""
        return self.lazy_lm_logits(hidden).logits()

    def encode_decode(
        self,
        tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"] | None = None,
        *,
        padding_mask: Bool[Array, "B S"] | None = None,
        decoder_padding_mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[StackOutput, StackOutput]:
        """Outputs of encoder and decoder.

        Args:
            decoder_tokens: the target moved one place to the right (`shift_right`); None takes the
                source itself as the target, as BART does for tasks without one.
        """
        if decoder_tokens is None:
            decoder_tokens = shift_right(tokens, self.config.decoder_start_token_id or 0)
        read = self.encode(tokens, padding_mask=padding_mask, deterministic=deterministic)
        written = self.decode(
            decoder_tokens, read.hidden, memory_mask=padding_mask,
            padding_mask=decoder_padding_mask, deterministic=deterministic,
        )
        return read, written

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"] | None = None,
        **options,
    ) -> Seq2SeqOutput:
        """The output layer; arguments as for `encode_decode`."""
        read, written = self.encode_decode(tokens, decoder_tokens, **options)
        projection = self.lazy_lm_logits(written.hidden)
        return Seq2SeqOutput(
            projection.logits(), written.hidden, read.hidden, read.attention, written.attention,
            written.cross_attention, projection,
        )

    def classification_logits(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
        deterministic: bool = True,
        **options,
    ) -> Float[Array, "B C"]:
        """Class scores of `features`; arguments as there.

        Raises:
            ValueError: the model was built without `num_classes`, or more tokens than positions.
        """
        check_classes(self.num_classes)
        features_BD = self.features(
            tokens, padding_mask=padding_mask, segment_ids=segment_ids, last=last,
            deterministic=deterministic, **options)
        return self.logits_from_features(features_BD, deterministic)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
        deterministic: bool = True,
        **options,
    ) -> Float[Array, "B D"]:
        """The decoder's state at each row's last token, when the same text goes into encoder and
        decoder (BART paper, section 3.1); at `last` if given. There are no segments: `segment_ids`
        are ignored.

        Raises:
            ValueError: more tokens than positions.
        """
        del segment_ids
        hidden_BTD = self.encode_decode(
            tokens, padding_mask=padding_mask, deterministic=deterministic, **options)[1].hidden
        last = last_token_positions(tokens, padding_mask) if last is None else last
        return gather_positions(hidden_BTD, last[:, None])[:, 0]

    def token_classification_logits(
        self,
        tokens: Int[Array, "B T"],
        decoder_tokens: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        **options,
    ) -> Float[Array, "B T C"]:
        """Class scores of every token of the decoder; arguments as for `encode_decode`."""
        check_classes(self.num_classes)
        hidden_BTD = self.encode_decode(
            tokens, decoder_tokens, deterministic=deterministic, **options)[1].hidden
        return self.class_logits(hidden_BTD, deterministic)

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Class scores of `features`, through the linear layer and tanh of `pooler`."""
        features = self.classifier_dropout(features, deterministic=deterministic)
        return self.class_logits(jnp.tanh(self.pooler(features)), deterministic)

    def class_logits(
        self, features: Float[Array, "... D"], deterministic: bool = True
    ) -> Float[Array, "... C"]:
        """Class scores of features, with no pooler in between."""
        features = self.classifier_dropout(features, deterministic=deterministic)
        return self.classifier(features).astype(jnp.float32)

    @staticmethod
    def init_cache(
        config: TransformerConfig, batch_size: int, length: int
    ) -> dict[str, KVCache]:
        """An empty cache of the decoder for `length` tokens a row."""
        check_length(length, config.max_length)
        s = config.decoder_stack
        return init_cache(
            s.num_layers, batch_size, length, s.num_heads, s.head_dim, config.compute_dtype
        )
