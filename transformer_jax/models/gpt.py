"""GPT: a decoder stack that predicts the next token.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (norm after
the residual), and Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
(norm before it, final norm, scaled initialisation): one model, two configs, see `presets`.

    tokens -> token + position embedding -> stack under a causal mask -> tied LM head
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import GPTConfig, check_classes, check_length
from transformer_jax.models.heads import (
    gather_positions,
    last_token_positions,
    prepend_prompt,
    remove_prompt,
)
from transformer_jax.nn.attention import KVCache, Mask, causal_mask, init_cache
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import INITIALIZERS, Embed, LazyLogits, Linear
from transformer_jax.nn.positions import make_position_embed


class GPTOutput(NamedTuple):
    """`logits[:, t]` scores the token at t + 1; they are float32, and those of `projection`."""

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None
    attention: tuple[Float[Array, "B N T S"], ...]
    lazy_logits: LazyLogits


class GPT(nn.Module):
    """`num_classes` is the width of the classifier; 0 where there is none. `task` names the head
    that the parameters are for; every method can be called whatever it is."""

    config: GPTConfig
    num_classes: int = 0
    task: str = "causal_lm"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "decode", "causal_lm": "__call__", "classification": "classification_logits",
        "multiple_choice": "classification_logits", "token_classification": "token_classification_logits", "question_answering": "token_classification_logits",
    }

    def setup(self):
        c = self.config
        init = INITIALIZERS[c.initializer](c.init_std)
        shared = {"embedding_init": c.embedding_init(), "dtype": c.compute_dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **shared)
        self.position_embed = make_position_embed(c.positions, c.position_rows, c.d_model, **shared)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.decoder = Stack(c.stack)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **shared)
        if self.num_classes:
            has_bias = c.classifier_bias or self.task != "classification"
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear((self.num_classes,), kernel_init=init, use_bias=has_bias)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        document_ids: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        """Hidden states `[B, T, D]` before the head.

        Args:
            positions: place of each token in its sequence; 0 ... T-1 if None.
            padding_mask: True at tokens. Only padding in front of a text needs it: what follows a
                text is not seen by it. Not together with `cache`.
            document_ids: for packed rows; tokens of unequal ids do not see each other. Within a
                document the order of the row counts, so positions may restart.
            cache: keys and values of the tokens before these (`init_cache`); `positions` then
                say which slots these tokens fill. Not together with `document_ids`.
            deterministic: no dropout; otherwise pass `rngs={"dropout": key}` to `apply`.

        Raises:
            ValueError: more tokens than positions; documents or padding together with a cache.
        """
        c = self.config
        B, T = tokens.shape
        check_length(T, c.max_length)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are given with a cache: packed rows cannot be decoded; "
                             "put one document in a row")
        if cache is not None and padding_mask is not None:
            raise ValueError("padding_mask is given with a cache: padding takes no slots; give "
                             "the positions of the tokens alone")
        order_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        positions_BT = order_BT if positions is None else positions
        if cache is None:
            mask = Mask(causal=True, attention_window=c.attention_window, query_documents=document_ids,
                        key_documents=document_ids, real=padding_mask)
        else:
            slots_1S = jnp.arange(cache["layer_0"].length)[None]
            mask = Mask(allowed=causal_mask(positions_BT, slots_1S, c.attention_window))
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        if cache is not None and self.has_variable("params", "prompt"):
            raise ValueError("a cache has no slots for the prompt in these parameters; fold it "
                             "into prefixes first: finetune.deltas.fold_prompt(model, params)")
        x_BTD, mask, prompt = prepend_prompt(self, x_BTD, mask)
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)
        out = self.decoder(x_BTD, mask, positions_BT, cache, deterministic=deterministic)
        return remove_prompt(out, prompt)

    def prompt_cache(self, cache: dict[str, KVCache]) -> dict[str, KVCache]:
        """Keys and values of the prompt in each layer, written to a cache of its length: what the
        tokens see of it, since a causal prompt does not see them."""
        P = cache["layer_0"].length
        order_1P = jnp.arange(P)[None]
        x_1PD, _, _ = prepend_prompt(
            self, jnp.zeros((1, 0, self.config.d_model), self.config.compute_dtype), Mask())
        # As in `with_prompt`, a context does not reach into the prompt: it has no positions.
        mask = Mask(allowed=causal_mask(order_1P, order_1P))
        return self.decoder(x_1PD, mask, order_1P, cache).cache

    def lazy_lm_logits(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """The output layer for `hidden`: the token embedding where it is tied."""
        return (self.token_embed if self.config.tie_embeddings else self.lm_head).project(hidden)

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of the next token."""
        return self.lazy_lm_logits(hidden).logits()

    def __call__(self, tokens: Int[Array, "B T"], **options) -> GPTOutput:
        """Language model; `options` as for `decode`."""
        out = self.decode(tokens, **options)
        projection = self.lazy_lm_logits(out.hidden)
        return GPTOutput(projection.logits(), out.hidden, out.cache, out.attention, projection)

    def classification_logits(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        """Class scores of `features`; arguments as there.

        Raises:
            ValueError: the model was built without `num_classes`, or more tokens than positions.
        """
        check_classes(self.num_classes)
        features_BD = self.features(tokens, padding_mask=padding_mask, segment_ids=segment_ids,
                                    last=last, deterministic=deterministic)
        return self.logits_from_features(features_BD, deterministic)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B D"]:
        """The hidden state of each row's last token, which is classified (GPT paper, section 3.2).

        `padding_mask` is True at tokens; the last of them is classified, or that at `last`. GPT has
        no segments: `segment_ids` are taken so that one batch serves both families, and ignored.

        Raises:
            ValueError: more tokens than positions.
        """
        del segment_ids
        hidden_BTD = self.decode(
            tokens, padding_mask=padding_mask, deterministic=deterministic).hidden
        last = last_token_positions(tokens, padding_mask) if last is None else last
        return gather_positions(hidden_BTD, last[:, None])[:, 0]

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Class scores of `features`."""
        return self.class_logits(features, deterministic)

    def token_classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B T C"]:
        """Class scores of every token; `options` as for `decode`."""
        check_classes(self.num_classes)
        hidden_BTD = self.decode(tokens, deterministic=deterministic, **options).hidden
        return self.class_logits(hidden_BTD, deterministic)

    def class_logits(
        self, features: Float[Array, "... D"], deterministic: bool = True
    ) -> Float[Array, "... C"]:
        """Class scores of hidden states."""
        features = self.classifier_dropout(features, deterministic=deterministic)
        return self.classifier(features).astype(jnp.float32)

    @staticmethod
    def init_cache(config: GPTConfig, batch_size: int, length: int) -> dict[str, KVCache]:
        """An empty cache for `length` tokens a row."""
        check_length(length, config.max_length)
        s = config.stack
        return init_cache(
            s.num_layers, batch_size, length, s.num_heads, s.head_dim, config.compute_dtype
        )
