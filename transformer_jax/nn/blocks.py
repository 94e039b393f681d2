"""Transformer blocks: attention, MLP, and the stack of residual blocks that all models share.

`norm_first` selects the residual form: x + f(norm(x)) as in GPT-2 (pre-norm), or norm(x + f(x)) as
in the Transformer, GPT and BERT (post-norm).

Shape suffixes: B batch, T target length, S source length, D d_model, N heads, H head_dim,
F mlp_dim, P prefix length.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn.attention import UNMASKED, KVCache, Mask, dot_product_attention
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    LayerNorm,
    Linear,
    materialize_cotangent,
)
from transformer_jax.sharding import BATCH_AXES, constrain, constrain_hidden
from transformer_jax.tree import LAYERS

# Which intermediate values of a block are saved for the backward pass, for each value of `remat`;
# the others are rematerialized. None: all values are saved.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class StackConfig(NamedTuple):
    """Hyperparameters of a `Stack` (`models.Config.stack`); `models.Config` describes them."""

    num_layers: int
    d_model: int
    num_heads: int
    mlp_dim: int
    activation: str
    norm_first: bool
    residual: bool
    norm_epsilon: float
    dropout_rate: float
    attention_dropout_rate: float
    initializer: str
    init_std: float
    residual_init_std: float  # for kernels whose output is added to the residual stream
    dtype: jnp.dtype
    attention_impl: str
    remat: str
    cross_attention: bool = False  # whether blocks attend to the output of an encoder

    @property
    def head_dim(self) -> int:
        """The dimension of queries, keys and values of one head."""
        return self.d_model // self.num_heads

    def kernel_init(self) -> Callable:
        """Returns the initializer of kernels."""
        return INITIALIZERS[self.initializer](self.init_std)

    def residual_kernel_init(self) -> Callable:
        """Returns the initializer of kernels whose output is added to the residual stream."""
        return INITIALIZERS[self.initializer](self.residual_init_std)


class Attention(nn.Module):
    """Multi-head self-attention or cross-attention (Vaswani et al. 2017, section 3.2.2)."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        encoder_output: Float[Array, "B S D"] | KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, "B N T S"]]:
        """Computes queries from `x_BTD`, and keys and values from `encoder_output` or `x_BTD`.

        Args:
            x_BTD: hidden states.
            mask: the keys that each query attends to.
            positions_BT: the slots of `cache` for the keys and values of `x_BTD`.
            cache: for self-attention, keys and values of the previous tokens.
            encoder_output: for cross-attention, the hidden states of the encoder, or the keys and
                values that an earlier call computed from them. None for self-attention.
            deterministic: whether to disable dropout.

        Returns:
            (output, keys and values, attention weights). In self-attention, the keys and values
            are those of `cache`, if it is given, and of this call. In cross-attention, they are
            those of `encoder_output`; later calls can pass them as `encoder_output`.
        """
        c = self.config

        def project(name, source_BSD):
            return Linear(
                (c.num_heads, c.head_dim), kernel_init=c.kernel_init(), dtype=c.dtype, name=name
            )(source_BSD, deterministic)

        query_BTNH = constrain(project("query", x_BTD), BATCH_AXES, "sequence", "tensor", None)
        if isinstance(encoder_output, KVCache):
            new_cache = encoder_output
            key_BSNH, value_BSNH = encoder_output.as_bsnh()
        else:
            source_BSD = x_BTD if encoder_output is None else encoder_output
            # Queries stay sharded over the sequence axis; keys and values are gathered along it.
            key_BSNH, value_BSNH = (
                constrain(project(name, source_BSD), BATCH_AXES, None, "tensor", None)
                for name in KVCache._fields
            )
            if cache is None:
                new_cache = KVCache.from_bsnh(key_BSNH, value_BSNH)
            else:
                new_cache = cache.update(key_BSNH, value_BSNH, positions_BT)
                key_BSNH, value_BSNH = new_cache.as_bsnh()
        key_BSNH, value_BSNH, mask, prefix_length = prepend_prefix(
            self, key_BSNH, value_BSNH, mask, x_BTD.shape[1])
        use_dropout = not deterministic and c.attention_dropout_rate > 0
        out_BTNH, weights_BNTS = dot_product_attention(
            query_BTNH,
            key_BSNH,
            value_BSNH,
            mask,
            attention_impl=c.attention_impl,
            dropout_rate=c.attention_dropout_rate,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
        )
        out_BTD = Linear(
            (c.d_model,),
            num_contracted_axes=2,
            kernel_init=c.residual_kernel_init(),
            dtype=c.dtype,
            name="out",
        )(out_BTNH, deterministic)
        return out_BTD, new_cache, weights_BNTS[..., prefix_length:]


def prepend_prefix(
    module: nn.Module,
    key_BSNH: Float[Array, "B S N H"],
    value_BSNH: Float[Array, "B S N H"],
    mask: Mask,
    T: int,
) -> tuple[Float[Array, "B P+S N H"], Float[Array, "B P+S N H"], Mask, int]:
    """Prefix tuning (Li & Liang 2021, "Prefix-Tuning", section 4.2).

    Prepends the parameters `prefix_key` and `prefix_value` `[P, N, H]` of an attention module to
    its keys and values. All queries attend to the prefix. Without these parameters, the arguments
    are returned unchanged. T is the number of queries.

    Returns:
        (keys, values, the mask that includes the prefix, P); P is 0 without a prefix.
    """
    if not module.has_variable("params", "prefix_key"):
        return key_BSNH, value_BSNH, mask, 0
    prefixes = [module.get_variable("params", f"prefix_{name}") for name in KVCache._fields]
    key_BSNH, value_BSNH = (
        jnp.concatenate(
            [jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape)), x], axis=1)
        for prefix, x in zip(prefixes, (key_BSNH, value_BSNH))
    )
    P = prefixes[0].shape[0]
    return key_BSNH, value_BSNH, mask.with_prefix(P, T, key_BSNH.shape[1] - P), P


class Adapter(nn.Module):
    """Bottleneck adapter: x + up(f(down(x))) (Houlsby et al. 2019, section 2.1).

    The bottleneck width follows from the shape of the parameters. `finetuning.peft` initializes
    them so that the adapter starts as the identity.
    """

    config: StackConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        width = self.get_variable("params", "down")["bias"].shape[-1]
        hidden = ACTIVATIONS[c.activation](Linear((width,), dtype=c.dtype, name="down")(x_BTD))
        return x_BTD + Linear((c.d_model,), dtype=c.dtype, name="up")(hidden)


class MLP(nn.Module):
    """Position-wise feed-forward network: wo(f(wi(x))) (Vaswani et al. 2017, section 3.3).

    `wi` `[D, F]` and `wo` `[F, D]` are the input and output projections, named as in T5.
    """

    config: StackConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        c = self.config
        wi = Linear((c.mlp_dim,), kernel_init=c.kernel_init(), dtype=c.dtype, name="wi")
        wo = Linear((c.d_model,), kernel_init=c.residual_kernel_init(), dtype=c.dtype, name="wo")
        hidden_BTF = constrain(wi(x_BTD, deterministic), BATCH_AXES, "sequence", "tensor")
        hidden_BTF = materialize_cotangent(hidden_BTF)
        return wo(ACTIVATIONS[c.activation](hidden_BTF), deterministic)


class BlockOutput(NamedTuple):
    """Output of a `Block`.

    Attributes:
        hidden: hidden states.
        cache: keys and values of self-attention.
        attention: attention weights of self-attention; S is T without a cache.
        cross_attention_cache: keys and values of the encoder output; None without cross-attention.
        cross_attention: attention weights of cross-attention; None without cross-attention.
    """

    hidden: Float[Array, "B T D"]
    cache: KVCache
    attention: Float[Array, "B N T S"]
    cross_attention_cache: KVCache | None
    cross_attention: Float[Array, "B N T S"] | None


class Block(nn.Module):
    """Self-attention, optional cross-attention, and MLP.

    Each of these sublayers is inside a residual connection with dropout and LayerNorm.
    """

    config: StackConfig

    @nn.compact
    def __call__(
        self, x_BTD, mask, positions_BT=None, cache=None, encoder_output=None,
        cross_attention_mask=UNMASKED, deterministic=True,
    ) -> BlockOutput:
        """Applies the block; arguments as for `Stack.__call__`, with the cache of one layer."""
        c = self.config

        def residual(name, sublayer, x_BTD):
            norm = LayerNorm(c.norm_epsilon, dtype=c.dtype, name=f"{name}_norm")
            x_BTD = materialize_cotangent(x_BTD)
            in_BTD = norm(x_BTD) if c.norm_first else x_BTD
            out_BTD, *rest = sublayer(constrain(in_BTD, BATCH_AXES, "sequence", None))
            out_BTD = Dropout(c.dropout_rate)(out_BTD, deterministic=deterministic)
            if self.has_variable("params", f"{name}_adapter"):
                out_BTD = Adapter(c, name=f"{name}_adapter")(out_BTD)
            x_BTD = constrain_hidden(x_BTD + out_BTD if c.residual else out_BTD)
            return x_BTD if c.norm_first else norm(x_BTD), *rest

        def self_attention(x_BTD):
            return Attention(c, name="self_attention")(
                x_BTD, mask, positions_BT, cache, deterministic=deterministic
            )

        def cross_attention(x_BTD):
            return Attention(c, name="cross_attention")(
                x_BTD, cross_attention_mask, encoder_output=encoder_output,
                deterministic=deterministic,
            )

        def mlp(x_BTD):
            return (MLP(c, name="mlp")(x_BTD, deterministic),)

        x_BTD, new_cache, weights_BNTS = residual("attention", self_attention, x_BTD)
        cross_attention_cache = cross_weights_BNTS = None
        if c.cross_attention:
            x_BTD, cross_attention_cache, cross_weights_BNTS = residual(
                "cross_attention", cross_attention, x_BTD)
        (x_BTD,) = residual("mlp", mlp, x_BTD)
        return BlockOutput(
            x_BTD, new_cache, weights_BNTS, cross_attention_cache, cross_weights_BNTS)


class StackOutput(NamedTuple):
    """Output of a `Stack`.

    Attributes:
        hidden: hidden states.
        cache: the given cache with the keys and values of this call added; None if none was given.
        attention: attention weights of self-attention for each layer; S is T without a cache.
        cross_attention_cache: keys and values of the encoder output for each layer, which later
            calls can take as `encoder_output`; None without cross-attention.
        cross_attention: attention weights of cross-attention for each layer.
    """

    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None
    attention: tuple[Float[Array, "B N T S"], ...]
    cross_attention_cache: dict[str, KVCache] | None = None
    cross_attention: tuple[Float[Array, "B N T S"], ...] = ()


class Stack(nn.Module):
    """Blocks `layer_0` ... `layer_{num_layers - 1}`, and a `final_norm` if `norm_first`.

    If `tree.stack_layers` has stacked the parameters, `jax.lax.scan` runs the layers, and XLA
    compiles one layer instead of `num_layers`. Stacked layers return no attention weights and take
    no cache.

    Example:
        >>> from transformer_jax.models import GPTConfig
        >>> config = GPTConfig(vocab_size=9, max_length=8, num_layers=2, d_model=6, num_heads=2,
        ...                    mlp_dim=10)
        >>> stack, x = Stack(config.stack), jnp.ones((1, 5, 6))
        >>> variables = jax.eval_shape(stack.init, jax.random.key(0), x, Mask(causal=True))
        >>> out = jax.eval_shape(stack.apply, variables, x, Mask(causal=True))
        >>> out.hidden.shape, out.attention[0].shape
        ((1, 5, 6), (1, 2, 5, 5))
    """

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        encoder_output: Float[Array, "B S D"] | dict[str, KVCache] | None = None,
        cross_attention_mask: Mask = UNMASKED,
        deterministic: bool = True,
    ) -> StackOutput:
        """Applies all blocks.

        Args:
            x_BTD: embeddings.
            mask: the keys that each query attends to in self-attention.
            positions_BT: the slots of `cache` for the keys and values of this call.
            cache: keys and values of the previous tokens for each layer (`init_cache`).
            encoder_output: for cross-attention, the hidden states of the encoder, or the
                `cross_attention_cache` of an earlier output, which contains their projections to
                keys and values.
            cross_attention_mask: the keys that each query attends to in cross-attention.
            deterministic: whether to disable dropout.

        Raises:
            ValueError: the parameters are stacked and a cache is given.
        """
        c = self.config
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], static_argnums=(7,))
        outputs: dict[str, BlockOutput] = {}
        if is_stacked := self.has_variable("params", LAYERS):
            if cache is not None or isinstance(encoder_output, dict):
                raise ValueError("a KV cache is given, but the parameters of the layers are "
                                 "stacked; pass tree.unstack_layers(params)")
            x_BTD = self._scan(
                block, x_BTD, mask, encoder_output, cross_attention_mask, deterministic)
        for i in range(0 if is_stacked else c.num_layers):
            name = f"layer_{i}"
            outputs[name] = out = block(c, name=name)(
                x_BTD,
                mask,
                positions_BT,
                cache and cache[name],
                encoder_output[name] if isinstance(encoder_output, dict) else encoder_output,
                cross_attention_mask,
                deterministic,
            )
            x_BTD = out.hidden
        if c.norm_first:
            x_BTD = LayerNorm(c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)
        has_cross_attention = c.cross_attention and not is_stacked
        return StackOutput(
            x_BTD,
            {name: out.cache for name, out in outputs.items()} if cache else None,
            tuple(out.attention for out in outputs.values()),
            {name: out.cross_attention_cache for name, out in outputs.items()}
            if has_cross_attention else None,
            tuple(out.cross_attention for out in outputs.values()) if has_cross_attention else (),
        )

    def _scan(self, block, x_BTD, mask, encoder_output, cross_attention_mask, deterministic):
        """Applies stacked layers with `jax.lax.scan`; returns the hidden states."""
        c = self.config
        rng = None if deterministic or not self.has_rng("dropout") else self.make_rng("dropout")

        def apply_layer(x_BTD, layer):
            i, params = layer
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, i)}
            out = block(c, parent=None).apply(
                {"params": params}, x_BTD, mask, None, None, encoder_output, cross_attention_mask,
                deterministic, rngs=rngs)
            return out.hidden, None

        layers = self.get_variable("params", LAYERS)
        return jax.lax.scan(apply_layer, x_BTD, (jnp.arange(c.num_layers), layers))[0]
