"""GPT and GPT-2: decoder-only Transformer language models.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (post-norm), and
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (pre-norm, a final norm,
scaled initialization). Both are one model with two configs; see `presets`.

    tokens -> token + position embedding -> stack with a causal mask -> tied language model head

Shape suffixes: B batch, T length, S cache length, D d_model, N heads, V vocabulary, C classes.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import GPTConfig, check_num_classes, check_sequence_length
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
    """Output of `GPT.__call__`.

    Attributes:
        logits: `logits[:, t]` are the float32 logits of the token at t + 1.
        hidden: hidden states before the language model head.
        cache: the given cache with the keys and values of this call added; None if none was given.
        attention: attention weights for each layer; S is T without a cache.
        lazy_logits: the unevaluated form of `logits`.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None
    attention: tuple[Float[Array, "B N T S"], ...]
    lazy_logits: LazyLogits


class GPT(nn.Module):
    """GPT or GPT-2, with an optional classifier.

    Methods named after a task, such as `classification_logits`, take tokens and run the entire
    model. Methods named after a head, such as `lm_logits` and `class_logits`, take hidden states
    and apply the head only.

    Attributes:
        config: sizes and options.
        num_classes: the number of outputs of the classifier; 0 for no classifier.
        task: the task whose head `init_params` initializes, a key of `METHODS`. It does not
            restrict which methods can be called.
        hf_config: for a model that was loaded from a Hugging Face checkpoint, the text of its
            config.json, which `save_pretrained` keeps. Not part of the architecture: models that
            differ only in it are equal.
        METHODS: the method of each task.

    Example:
        >>> import jax
        >>> from transformer_jax.models import init_params
        >>> config = GPTConfig(vocab_size=50, max_length=16, num_layers=2, d_model=32, num_heads=4,
        ...                    mlp_dim=64)
        >>> model = GPT(config)
        >>> params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
        >>> tokens = jnp.ones((2, 8), jnp.int32)
        >>> jax.eval_shape(model.apply, {"params": params}, tokens).logits.shape
        (2, 8, 50)
    """

    config: GPTConfig
    num_classes: int = 0
    task: str = "causal_lm"
    hf_config: str = dataclasses.field(default="", compare=False, repr=False)

    METHODS: ClassVar[dict[str, str]] = {
        "base": "decode",
        "causal_lm": "__call__",
        "classification": "classification_logits",
        "multiple_choice": "classification_logits",
        "token_classification": "token_classification_logits",
        "question_answering": "token_classification_logits",
    }

    def setup(self):
        c = self.config
        init = INITIALIZERS[c.initializer](c.init_std)
        embed_options = {"embedding_init": c.embedding_init(), "dtype": c.compute_dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **embed_options)
        self.position_embed = make_position_embed(
            c.positions, c.position_table_size, c.d_model, **embed_options)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.decoder = Stack(c.stack)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **embed_options)
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
        """Computes the hidden states `[B, T, D]` before the head.

        Args:
            tokens: token ids.
            positions: the position of each token in its sequence; 0 ... T-1 if None.
            padding_mask: True at tokens, False at padding. It is required only for padding on the
                left; tokens never attend to padding on their right. Not supported with `cache`.
            document_ids: the document of each token in packed rows; tokens attend only to tokens
                of the same document. The causal mask follows the order in the row, so positions
                may restart in each document. Not supported with `cache`.
            cache: keys and values of the previous tokens (`init_cache`). `positions` are then also
                the slots that these tokens fill.
            deterministic: whether to disable dropout. If False, pass `rngs={"dropout": key}` to
                `apply`.

        Raises:
            ValueError: T is larger than `max_length`, or the cache is combined with
                `document_ids`, `padding_mask` or a soft prompt.
        """
        c = self.config
        B, T = tokens.shape
        check_sequence_length(T, c.max_length)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids and cache are both given; packed rows cannot be decoded "
                             "with a cache. Put one document in each row")
        if cache is not None and padding_mask is not None:
            raise ValueError("padding_mask and cache are both given; a cache has no slots for "
                             "padding. Pass only tokens, with their positions")
        row_indices_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        positions_BT = row_indices_BT if positions is None else positions
        if cache is None:
            mask = Mask(causal=True, attention_window=c.attention_window,
                        query_document_ids=document_ids, key_document_ids=document_ids,
                        padding_mask=padding_mask)
        else:
            slots_1S = jnp.arange(cache["layer_0"].length)[None]
            mask = Mask(dense_mask=causal_mask(positions_BT, slots_1S, c.attention_window))
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        if cache is not None and self.has_variable("params", "prompt"):
            raise ValueError("the parameters have a soft prompt, and a cache has no slots for it; "
                             "fold it into prefixes first: "
                             "finetuning.peft.fold_prompt(model, params)")
        x_BTD, mask, prompt_length = prepend_prompt(self, x_BTD, mask)
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)
        out = self.decoder(x_BTD, mask, positions_BT, cache, deterministic=deterministic)
        return remove_prompt(out, prompt_length)

    def prompt_cache(self, cache: dict[str, KVCache]) -> dict[str, KVCache]:
        """Computes the keys and values of the soft prompt in each layer.

        They do not depend on the tokens, because the prompt does not attend to them.

        Args:
            cache: an empty cache of the length of the prompt, for batch size 1.

        Returns:
            The filled cache.
        """
        P = cache["layer_0"].length
        slots_1P = jnp.arange(P)[None]
        x_1PD, _, _ = prepend_prompt(
            self, jnp.zeros((1, 0, self.config.d_model), self.config.compute_dtype), Mask())
        # As in `prepend_prompt`, the attention window does not apply to the prompt.
        mask = Mask(dense_mask=causal_mask(slots_1P, slots_1P))
        return self.decoder(x_1PD, mask, slots_1P, cache).cache

    def lazy_lm_logits(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """Returns the unevaluated logits of the next token for hidden states.

        The output layer is the token embedding if `config.tie_embeddings`.
        """
        return (self.token_embed if self.config.tie_embeddings else self.lm_head).project(hidden)

    def lm_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Computes the float32 logits of the next token for hidden states."""
        return self.lazy_lm_logits(hidden).logits()

    def __call__(self, tokens: Int[Array, "B T"], **options) -> GPTOutput:
        """Applies the language model; `options` as for `decode`."""
        out = self.decode(tokens, **options)
        lazy_logits = self.lazy_lm_logits(out.hidden)
        return GPTOutput(lazy_logits.logits(), out.hidden, out.cache, out.attention, lazy_logits)

    def classification_logits(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last_positions: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        """Computes class logits of each row; arguments as for `features`.

        Raises:
            ValueError: the model has no classifier, or T is larger than `max_length`.
        """
        check_num_classes(self.num_classes)
        features_BD = self.features(
            tokens, padding_mask=padding_mask, segment_ids=segment_ids,
            last_positions=last_positions, deterministic=deterministic)
        return self.logits_from_features(features_BD, deterministic)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        last_positions: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B D"]:
        """Computes the classifier's input: the hidden state of the last token of each row.

        Radford et al. 2018, section 3.2.

        Args:
            tokens: token ids.
            padding_mask: True at tokens, False at padding.
            segment_ids: ignored, since GPT has no segments. The argument is accepted so that one
                batch serves all model families.
            last_positions: the position whose hidden state is used; the last token that is not
                padding if None.
            deterministic: whether to disable dropout.

        Raises:
            ValueError: T is larger than `max_length`.
        """
        del segment_ids
        hidden_BTD = self.decode(
            tokens, padding_mask=padding_mask, deterministic=deterministic).hidden
        if last_positions is None:
            last_positions = last_token_positions(tokens, padding_mask)
        return gather_positions(hidden_BTD, last_positions[:, None])[:, 0]

    def logits_from_features(
        self, features: Float[Array, "B D"], deterministic: bool = True
    ) -> Float[Array, "B C"]:
        """Computes class logits from the output of `features`."""
        return self.class_logits(features, deterministic)

    def token_classification_logits(
        self, tokens: Int[Array, "B T"], *, deterministic: bool = True, **options
    ) -> Float[Array, "B T C"]:
        """Computes class logits of each token; `options` as for `decode`.

        Raises:
            ValueError: the model has no classifier, or T is larger than `max_length`.
        """
        check_num_classes(self.num_classes)
        hidden_BTD = self.decode(tokens, deterministic=deterministic, **options).hidden
        return self.class_logits(hidden_BTD, deterministic)

    def class_logits(
        self, hidden: Float[Array, "... D"], deterministic: bool = True
    ) -> Float[Array, "... C"]:
        """Applies dropout and the classifier to hidden states."""
        hidden = self.classifier_dropout(hidden, deterministic=deterministic)
        return self.classifier(hidden).astype(jnp.float32)

    @staticmethod
    def init_cache(config: GPTConfig, batch_size: int, length: int) -> dict[str, KVCache]:
        """Creates an empty cache for `length` tokens in each row.

        Raises:
            ValueError: `length` is larger than `max_length`.
        """
        check_sequence_length(length, config.max_length)
        s = config.stack
        return init_cache(
            s.num_layers, batch_size, length, s.num_heads, s.head_dim, config.compute_dtype
        )
