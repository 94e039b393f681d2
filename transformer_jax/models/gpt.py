"""GPT and GPT-2: decoder-only Transformer language models.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training" (post-norm), and
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (pre-norm, a final norm,
scaled initialization). Both are one model with two configs; see `presets`.

    tokens -> token + position embedding -> stack with a causal mask -> tied language model head
"""

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.config import GPTConfig
from transformer_jax.models.heads import (
    ClassificationHeads,
    DecoderHeads,
    decoder_mask,
    token_positions,
)
from transformer_jax.nn.attention import KVCache, Mask, causal_mask
from transformer_jax.nn.blocks import Stack, StackOutput
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import Embed, LazyLogits, Linear, make_position_embed
from transformer_jax.nn.peft import prepend_prompt, remove_prompt


class GPTOutput(NamedTuple):
    """Output of `GPT.__call__`."""

    logits: Float[Array, "B T V"] | None  # float32; logits[:, t] are of the token at t + 1
    hidden: Float[Array, "B T D"]  # before the language model head
    cache: dict[str, KVCache] | None  # the given cache with the tokens of this call added
    attention: tuple[Float[Array, "B N T S"], ...]  # per layer; empty without output_attentions
    lazy_logits: LazyLogits  # the unevaluated form of `logits`


class GPT(DecoderHeads):
    """GPT or GPT-2, with an optional classifier; `ClassificationHeads` describes the fields.

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
    task: str = "causal_lm"

    METHODS: ClassVar[dict[str, str]] = {
        "base": "decode", "causal_lm": "__call__", **ClassificationHeads.METHODS}

    def setup(self):
        c = self.config
        embed_options = {"embedding_init": c.embedding_init(), "dtype": c.compute_dtype}
        self.token_embed = Embed(c.vocab_size, c.d_model, **embed_options)
        self.position_embed = make_position_embed(
            c.positions, c.position_table_size, c.d_model, **embed_options)
        self.embed_dropout = Dropout(c.dropout_rate)
        self.decoder = Stack(c.stack)
        if not c.tie_embeddings:
            self.lm_head = Embed(c.vocab_size, c.d_model, **embed_options)
        if self.num_classes:
            self.classifier_dropout = Dropout(c.dropout_rate)
            self.classifier = Linear(
                (self.num_classes,), kernel_init=c.stack.kernel_init(),
                use_bias=c.classifier_bias or self.task != "classification")

    def decode(
        self, tokens: Int[Array, "B T"], *, positions: Int[Array, "B T"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
        document_ids: Int[Array, "B T"] | None = None,
        attention_mask: Bool[Array, "B 1 T S"] | None = None,
        cache: dict[str, KVCache] | None = None, deterministic: bool = True,
        output_attentions: bool = False,
    ) -> StackOutput:
        """Computes the hidden states `[B, T, D]` before the head.

        Args:
            tokens: token ids.
            positions: the position of each token in its sequence; 0 ... T-1 if None.
            padding_mask: required only for padding on the left: tokens never attend to padding on
                their right. Not supported with `cache`.
            document_ids: the document of each token in packed rows; tokens attend only to their own
                document. The causal mask follows the order in the row, so positions may restart in
                each document. Not supported with `cache`.
            attention_mask: replaces the causal mask and `config.attention_window`; `padding_mask`
                and `document_ids` still apply. S is T or the number of slots of `cache`.
            cache: keys and values of the previous tokens (`init_cache`), unless there is a soft
                prompt. `positions` are then also the slots that these tokens fill.
            deterministic, output_attentions: as for all models (`ClassificationHeads`).

        Raises:
            ValueError: T is larger than `max_length`, or arguments cannot be combined.
        """
        c = self.config
        positions_BT = token_positions(tokens, c.max_length, positions)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids and cache are both given; packed rows cannot be decoded "
                             "with a cache. Put one document in each row")
        if cache is not None and self.has_variable("params", "prompt"):
            raise ValueError("the parameters have a soft prompt, and a cache has no slots for it; "
                             "fold it into prefixes first: "
                             "finetuning.peft.fold_prompt(model, params)")
        mask = decoder_mask(positions_BT, cache, padding_mask, attention_mask, c.attention_window)
        mask = mask.replace(query_document_ids=document_ids, key_document_ids=document_ids)
        x_BTD = self.token_embed(tokens) * c.embedding_scale
        x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        x_BTD, mask, prompt_length = prepend_prompt(self, x_BTD, mask, causal=True)
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)
        out = self.decoder(x_BTD, mask, positions_BT, cache, deterministic=deterministic,
                           output_attentions=output_attentions)
        return remove_prompt(out, prompt_length)

    def prompt_cache(self, cache: dict[str, KVCache]) -> dict[str, KVCache]:
        """Fills an empty cache of the prompt's length, for batch size 1, with the soft prompt.

        Its keys and values do not depend on the tokens, because it does not attend to them.
        """
        slots_1P = jnp.arange(cache["layer_0"].length)[None]
        x_1PD, _, _ = prepend_prompt(
            self, jnp.zeros((1, 0, self.config.d_model), self.config.compute_dtype),
            Mask(causal=True), causal=True)
        # As in `prepend_prompt`, the attention window does not apply to the prompt.
        mask = Mask(dense_mask=causal_mask(slots_1P, slots_1P))
        return self.decoder(x_1PD, mask, slots_1P, cache).cache

    def hidden_states(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T D"]:
        """Computes the inputs of the heads; arguments as for `decode`."""
        return self.decode(tokens, **options).hidden

    def __call__(
        self, tokens: Int[Array, "B T"], *, return_logits: bool = True, **options
    ) -> GPTOutput:
        """Applies the language model; `options` as for `decode`.

        Losses set `return_logits=False` and compute the logits from `lazy_logits`.
        """
        out = self.decode(tokens, **options)
        lazy_logits = self.lazy_lm_logits(out.hidden)
        logits = lazy_logits.logits() if return_logits else None
        return GPTOutput(logits, out.hidden, out.cache, out.attention, lazy_logits)
