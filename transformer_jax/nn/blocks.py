"""Transformer blocks: attention, MLP, and the stack of residual blocks that all models share.

`norm_first` selects the residual form: x + f(norm(x)) as in GPT-2 (pre-norm), or norm(x + f(x)) as
in the Transformer, GPT and BERT (post-norm).
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn import peft
from transformer_jax.nn.attention import UNMASKED, KVCache, Mask, dot_product_attention
from transformer_jax.nn.dropout import Dropout
from transformer_jax.nn.layers import (
    INITIALIZERS,
    LayerNorm,
    Linear,
    get_activation,
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
    activation: str | Callable[[Array], Array]
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
    block: Callable | None = None  # the class of blocks; None for `Block`

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
        self, x_BTD: Float[Array, "B T D"], mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None, cache: KVCache | None = None,
        encoder_output: Float[Array, "B S D"] | KVCache | None = None, deterministic: bool = True,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, "B N T S"] | None]:
        """Computes queries from `x_BTD`, and keys and values from `encoder_output` or `x_BTD`.

        `positions_BT` are the slots of `cache`, the keys and values of the previous tokens, for
        those of `x_BTD`. In cross-attention, `encoder_output` are the hidden states of the encoder,
        or the keys and values that an earlier call computed from them and returned.

        Returns:
            (output, keys and values, attention weights or None).
        """
        c = self.config

        def project(name, source_BSD):
            return Linear((c.num_heads, c.head_dim), kernel_init=c.kernel_init(), dtype=c.dtype,
                          name=name)(source_BSD, deterministic)

        query_BTNH = constrain(project("query", x_BTD), BATCH_AXES, "sequence", "tensor", None)
        if encoder_output is None:
            query_BTNH = self.encode_positions(query_BTNH, positions_BT)
        if isinstance(encoder_output, KVCache):
            new_cache = encoder_output
            key_BSNH, value_BSNH = encoder_output.as_bsnh()
        else:
            source_BSD = x_BTD if encoder_output is None else encoder_output
            # Queries stay sharded over the sequence axis; keys and values are gathered along it.
            key_BSNH, value_BSNH = (
                constrain(project(name, source_BSD), BATCH_AXES, None, "tensor", None)
                for name in KVCache._fields)
            if encoder_output is None:
                key_BSNH = self.encode_positions(key_BSNH, positions_BT)
            if cache is None:
                new_cache = KVCache(key_BSNH.swapaxes(1, 2), value_BSNH.swapaxes(1, 2))
            else:
                new_cache = cache.update(key_BSNH, value_BSNH, positions_BT)
                key_BSNH, value_BSNH = new_cache.as_bsnh()
        key_BSNH, value_BSNH, mask, prefix_length = peft.prepend_prefix(
            self, key_BSNH, value_BSNH, mask, x_BTD.shape[1])
        use_dropout = not deterministic and c.attention_dropout_rate > 0
        out_BTNH, weights_BNTS = dot_product_attention(
            query_BTNH, key_BSNH, value_BSNH, mask, attention_impl=c.attention_impl,
            dropout_rate=c.attention_dropout_rate,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
            return_weights=return_weights)
        out_BTD = Linear((c.d_model,), num_contracted_axes=2, dtype=c.dtype, name="out",
                         kernel_init=c.residual_kernel_init())(out_BTNH, deterministic)
        return out_BTD, new_cache, weights_BNTS[..., prefix_length:] if return_weights else None

    def encode_positions(
        self, x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"] | None
    ) -> Float[Array, "B T N H"]:
        """Encodes positions in the queries and keys of self-attention; here, the identity.

        Subclasses can override it, for instance by a rotation (Su et al. 2021, "RoFormer").
        """
        return x_BTNH


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
        return wo(get_activation(c.activation)(hidden_BTF), deterministic)


class BlockOutput(NamedTuple):
    """Output of a `Block`; attention weights are None if they are not requested."""

    hidden: Float[Array, "B T D"]
    cache: KVCache  # keys and values of self-attention
    attention: Float[Array, "B N T S"] | None  # S is T without a cache
    cross_attention_cache: KVCache | None  # None without cross-attention
    cross_attention: Float[Array, "B N T S"] | None


class Block(nn.Module):
    """Self-attention, optional cross-attention, and MLP.

    Each of these sublayers is inside a residual connection with dropout and LayerNorm. Subclasses
    can replace `attention` and `mlp`, the classes of the sublayers, or `__call__`.
    """

    config: StackConfig
    attention: type[nn.Module] = Attention
    mlp: type[nn.Module] = MLP

    @nn.compact
    def __call__(
        self, x_BTD, mask, positions_BT=None, cache=None, encoder_output=None,
        cross_attention_mask=UNMASKED, deterministic=True, output_attentions=False,
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
                out_BTD = peft.Adapter(
                    Linear, get_activation(c.activation), c.dtype, name=f"{name}_adapter")(out_BTD)
            x_BTD = constrain_hidden(x_BTD + out_BTD if c.residual else out_BTD)
            return x_BTD if c.norm_first else norm(x_BTD), *rest

        def self_attention(x_BTD):
            return self.attention(c, name="self_attention")(
                x_BTD, mask, positions_BT, cache, deterministic=deterministic,
                return_weights=output_attentions)

        def cross_attention(x_BTD):
            return self.attention(c, name="cross_attention")(
                x_BTD, cross_attention_mask, encoder_output=encoder_output,
                deterministic=deterministic, return_weights=output_attentions)

        def mlp(x_BTD):
            return (self.mlp(c, name="mlp")(x_BTD, deterministic),)

        x_BTD, *outputs = residual("attention", self_attention, x_BTD)
        cross_outputs = (None, None)
        if c.cross_attention:
            x_BTD, *cross_outputs = residual("cross_attention", cross_attention, x_BTD)
        (x_BTD,) = residual("mlp", mlp, x_BTD)
        return BlockOutput(x_BTD, *outputs, *cross_outputs)


class StackOutput(NamedTuple):
    """Output of a `Stack`; attention weights, for each layer, are empty if not requested."""

    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None  # the given cache with the tokens of this call added
    attention: tuple[Float[Array, "B N T S"], ...] = ()  # S is T without a cache
    # Keys and values of the encoder output, which later calls can take as `encoder_output`.
    cross_attention_cache: dict[str, KVCache] | None = None
    cross_attention: tuple[Float[Array, "B N T S"], ...] = ()


class Stack(nn.Module):
    """Blocks `layer_0` ... `layer_{num_layers - 1}`, and a `final_norm` if `norm_first`.

    If `tree.stack_layers` has stacked the parameters, `jax.lax.scan` runs the layers, and XLA
    compiles one layer instead of `num_layers`. Stacked layers return no attention weights and take
    no cache. `config.block` is the class of the blocks; a subclass of `Block` can replace parts.

    Example:
        >>> from transformer_jax.models import GPTConfig
        >>> config = GPTConfig(vocab_size=9, max_length=8, num_layers=2, d_model=6, num_heads=2,
        ...                    mlp_dim=10)
        >>> stack, x = Stack(config.stack), jnp.ones((1, 5, 6))
        >>> variables = jax.eval_shape(stack.init, jax.random.key(0), x, Mask(causal=True))
        >>> jax.eval_shape(stack.apply, variables, x, Mask(causal=True)).hidden.shape
        (1, 5, 6)
    """

    config: StackConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None, cache: dict[str, KVCache] | None = None,
        encoder_output: Float[Array, "B S D"] | dict[str, KVCache] | None = None,
        cross_attention_mask: Mask = UNMASKED, deterministic: bool = True,
        output_attentions: bool = False,
    ) -> StackOutput:
        """Applies all blocks.

        Args:
            x_BTD: embeddings.
            mask, cross_attention_mask: the keys that each query attends to.
            positions_BT: the slots of `cache` for the keys and values of this call.
            cache: keys and values of the previous tokens for each layer (`init_cache`).
            encoder_output: for cross-attention, the hidden states of the encoder, or the
                `cross_attention_cache` of an earlier output, their projections to keys and values.
            deterministic: whether to disable dropout.
            output_attentions: whether to return the attention weights.

        Raises:
            ValueError: the parameters are stacked, and a cache is given or attention weights are
                requested.
        """
        c = self.config
        block = c.block or Block
        if c.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[c.remat], static_argnums=(7, 8))
        outputs: dict[str, BlockOutput] = {}
        if is_stacked := self.has_variable("params", LAYERS):
            if cache is not None or isinstance(encoder_output, dict) or output_attentions:
                raise ValueError("a KV cache is given or output_attentions is True, but the "
                                 "parameters of the layers are stacked; pass "
                                 "tree.unstack_layers(params)")
            x_BTD = self._scan(block, x_BTD, deterministic, mask, positions_BT, None,
                               encoder_output, cross_attention_mask, deterministic, False)
        for i in range(0 if is_stacked else c.num_layers):
            name = f"layer_{i}"
            outputs[name] = block(c, name=name)(
                x_BTD, mask, positions_BT, cache and cache[name],
                encoder_output[name] if isinstance(encoder_output, dict) else encoder_output,
                cross_attention_mask, deterministic, output_attentions)
            x_BTD = outputs[name].hidden
        if c.norm_first:
            x_BTD = LayerNorm(c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)

        def by_layer(field):
            return {name: getattr(out, field) for name, out in outputs.items()}

        has_cross_attention = c.cross_attention and not is_stacked
        return StackOutput(
            x_BTD, by_layer("cache") if cache else None,
            tuple(by_layer("attention").values()) if output_attentions else (),
            by_layer("cross_attention_cache") if has_cross_attention else None,
            tuple(by_layer("cross_attention").values())
            if has_cross_attention and output_attentions else ())

    def _scan(self, block, x_BTD, deterministic, *args):
        """Applies stacked layers with `jax.lax.scan`; returns the hidden states."""
        rng = None if deterministic or not self.has_rng("dropout") else self.make_rng("dropout")

        def apply_layer(x_BTD, layer):
            i, params = layer
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, i)}
            out = block(self.config, parent=None).apply({"params": params}, x_BTD, *args, rngs=rngs)
            return out.hidden, None

        layers = self.get_variable("params", LAYERS)
        return jax.lax.scan(apply_layer, x_BTD, (jnp.arange(self.config.num_layers), layers))[0]
