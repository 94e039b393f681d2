"""GPT and GPT-2: decoder-only Transformer language models.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (post-norm), and
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (pre-norm, a final norm,
scaled initialization). Both are one model with two configs; see `presets`.

    tokens -> token + position embedding -> stack with a causal mask -> tied language model head

Shape suffixes: B batch, T length, S cache length, D d_model, N heads, V vocabulary, C classes.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import (
    GPTConfig,
    check_attention_mask,
    check_sequence_length,
)
from transformer_jax.models.heads import DecoderHeads
from transformer_jax.nn.attention import KVCache, Mask, causal_mask
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import INITIALIZERS, Embed, LazyLogits, Linear, make_position_embed
from transformer_jax.nn.peft import prepend_prompt, remove_prompt


class GPTOutput(NamedTuple):
    """Output of `GPT.__call__`.

    Attributes:
        logits: `logits[:, t]` are the float32 logits of the token at t + 1.
        hidden: hidden states before the language model head.
        cache: the given cache with the keys and values of this call added; None if none was given.
        attention: attention weights for each layer if `output_attentions`, else empty; S is T
            without a cache.
        lazy_logits: the unevaluated form of `logits`.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None
    attention: tuple[Float[Array, "B N T S"], ...]
    lazy_logits: LazyLogits


class GPT(DecoderHeads):
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
        attention_mask: Bool[Array, "B 1 T S"] | None = None,
        cache: dict[str, KVCache] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
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
            attention_mask: a mask that broadcasts to `[B, N, T, S]`, in the place of the causal
                mask and of `config.attention_window`: True where a query attends to a key. S is T,
                or the number of slots of `cache`. `padding_mask` and `document_ids` still apply.
            cache: keys and values of the previous tokens (`init_cache`). `positions` are then also
                the slots that these tokens fill.
            deterministic: whether to disable dropout. If False, pass `rngs={"dropout": key}` to
                `apply`.
            output_attentions: whether to return the attention weights of all layers.

        Raises:
            ValueError: T is larger than `max_length`, `attention_mask` is not boolean or does not
                broadcast to `[B, N, T, S]`, or the cache is combined with `document_ids`,
                `padding_mask` or a soft prompt.
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
        S = T if cache is None else cache["layer_0"].length
        attention_mask = check_attention_mask(attention_mask, B, T, S)
        if attention_mask is not None:
            mask = Mask(dense_mask=attention_mask)
        elif cache is None:
            mask = Mask(causal=True, attention_window=c.attention_window)
        else:
            slots_1S = jnp.arange(S)[None]
            mask = Mask(dense_mask=causal_mask(positions_BT, slots_1S, c.attention_window))
        mask = mask.replace(query_document_ids=document_ids, key_document_ids=document_ids,
                            padding_mask=padding_mask)
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        if cache is not None and self.has_variable("params", "prompt"):
            raise ValueError("the parameters have a soft prompt, and a cache has no slots for it; "
                             "fold it into prefixes first: "
                             "finetuning.peft.fold_prompt(model, params)")
        x_BTD, mask, prompt_length = prepend_prompt(self, x_BTD, mask, causal=True)
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)
        out = self.decoder(x_BTD, mask, positions_BT, cache, deterministic=deterministic,
                           output_attentions=output_attentions)
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
            self, jnp.zeros((1, 0, self.config.d_model), self.config.compute_dtype),
            Mask(causal=True), causal=True)
        # As in `prepend_prompt`, the attention window does not apply to the prompt.
        mask = Mask(dense_mask=causal_mask(slots_1P, slots_1P))
        return self.decoder(x_1PD, mask, slots_1P, cache).cache

    def hidden_states(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T D"]:
        """Computes the inputs of the heads; arguments as for `decode`."""
        return self.decode(tokens, **options).hidden

    def __call__(self, tokens: Int[Array, "B T"], **options) -> GPTOutput:
        """Applies the language model; `options` as for `decode`."""
        out = self.decode(tokens, **options)
        lazy_logits = self.lazy_lm_logits(out.hidden)
        return GPTOutput(lazy_logits.logits(), out.hidden, out.cache, out.attention, lazy_logits)
