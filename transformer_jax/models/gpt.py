"""GPT: a decoder stack that predicts the next token.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (norm after
the residual), and Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
(norm before it, final norm, scaled initialisation): one model, two configs, see `presets`.

    tokens -> token + position embedding -> stack under a causal mask -> tied LM head
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import GPTConfig, check_classes, check_length
from transformer_jax.models.heads import take_positions
from transformer_jax.nn.attention import KVCache, causal_mask, document_mask, init_cache
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.layers import INITIALIZERS, Embed, Linear
from transformer_jax.nn.positions import make_position_embed


class GPTOutput(NamedTuple):
    """`logits[:, t]` scores the token at t + 1; they are float32."""

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None
    attention: tuple[Float[Array, "B N T S"], ...]


class GPT(nn.Module):
    """`num_classes` is the width of the classifier; 0 where `classify` is not used."""

    config: GPTConfig
    num_classes: int = 0

    def setup(self):
        c = self.config
        init = INITIALIZERS[c.initializer](c.init_std)
        shared = {"embedding_init": init, "dtype": c.compute_dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **shared)
        self.position_embed = make_position_embed(c.positions, c.max_length, c.d_model, **shared)
        self.embed_dropout = nn.Dropout(c.dropout_rate)
        self.decoder = Stack(c.stack)
        if self.num_classes:
            self.classifier_dropout = nn.Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        document_ids: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        """Hidden states `[B, T, D]` before the head.

        Args:
            positions: place of each token in its sequence; 0 ... T-1 if None.
            document_ids: for packed rows; tokens of unequal ids do not see each other. Within a
                document the order of the row counts, so positions may restart.
            cache: keys and values of the tokens before these (`init_cache`); `positions` then
                say which slots these tokens fill. Not together with `document_ids`.
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to `apply`.

        Raises:
            ValueError: more tokens than positions; documents together with a cache.
        """
        c = self.config
        B, T = tokens.shape
        check_length(T, c.max_length)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are given with a cache: packed rows cannot be decoded; "
                             "put one document in a row")
        order_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        positions_BT = order_BT if positions is None else positions
        if cache is None:
            mask_B1TS = causal_mask(order_BT, order_BT, c.context_size)
            if document_ids is not None:
                mask_B1TS &= document_mask(document_ids, document_ids)
        else:
            slots_1S = jnp.arange(cache["layer_0"].key.shape[1])[None]
            mask_B1TS = causal_mask(positions_BT, slots_1S, c.context_size)
        x_BTD = self.token_embed(tokens) * c.embedding_scale + self.position_embed(positions_BT)
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)
        return self.decoder(x_BTD, mask_B1TS, positions_BT, cache, deterministic)

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token, by the transposed token embedding."""
        return self.token_embed.attend(hidden)

    def __call__(self, tokens: Int[Array, "B T"], **options) -> GPTOutput:
        """Language model; `options` as for `decode`."""
        hidden, cache, attention = self.decode(tokens, **options)
        return GPTOutput(self.lm_logits(hidden), hidden, cache, attention)

    def classify(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        """Class scores from the hidden state of each row's last token (GPT paper, section 3.2).

        Rows are padded on the right; `padding_mask` is True at tokens. GPT has no segments:
        `segment_ids` are taken so that one batch serves both families, and ignored.

        Raises:
            ValueError: the model was built without `num_classes`, or more tokens than positions.
        """
        del segment_ids
        check_classes(self.num_classes)
        B, T = tokens.shape
        lengths = jnp.full((B,), T) if padding_mask is None else padding_mask.sum(-1)
        hidden_BTD = self.decode(tokens, deterministic=deterministic).hidden
        last_B1 = jnp.maximum(lengths - 1, 0)[:, None]
        last_BD = take_positions(hidden_BTD, last_B1)[:, 0]
        last_BD = self.classifier_dropout(last_BD, deterministic=deterministic)
        return self.classifier(last_BD).astype(jnp.float32)

    @staticmethod
    def init_cache(config: GPTConfig, batch_size: int, length: int) -> dict[str, KVCache]:
        """An empty cache for `length` tokens a row."""
        check_length(length, config.max_length)
        s = config.stack
        return init_cache(
            s.num_layers, batch_size, length, s.num_heads, s.head_dim, config.compute_dtype
        )
