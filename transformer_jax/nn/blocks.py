"""Attention, MLP, block and stack: all the depth that any of the models has.

`norm_first` chooses between the two residual forms: x + f(norm(x)), GPT-2's, and norm(x + f(x)),
that of the Transformer, GPT and BERT.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.nn.attention import KVCache, attend
from transformer_jax.nn.layers import ACTIVATIONS, INITIALIZERS, LayerNorm, Linear
from transformer_jax.sharding import constrain_batch


class StackConfig(NamedTuple):
    """What a stack of blocks needs to know; models derive it from their own config."""

    num_layers: int
    d_model: int
    num_heads: int
    mlp_dim: int
    activation: str
    norm_first: bool
    norm_epsilon: float
    dropout_rate: float
    attention_dropout_rate: float
    initializer: str
    init_std: float
    residual_init_std: float  # for the two kernels of a block that write to the residual stream
    dtype: jnp.dtype

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def kernel_init(self) -> Callable:
        return INITIALIZERS[self.initializer](self.init_std)

    def residual_init(self) -> Callable:
        return INITIALIZERS[self.initializer](self.residual_init_std)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of a sequence to itself."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BNTS: Bool[Array, "..."] | None,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Float[Array, "B N T S"]]:
        c = self.config

        def project(name):
            return Linear(
                (c.num_heads, c.head_dim), kernel_init=c.kernel_init(), dtype=c.dtype, name=name
            )(x_BTD)

        query_BTNH, key_BSNH, value_BSNH = project("query"), project("key"), project("value")
        if cache is not None:
            cache = cache.write(key_BSNH, value_BSNH, positions_BT)
            key_BSNH, value_BSNH = cache
        use_dropout = not deterministic and c.attention_dropout_rate > 0
        out_BTNH, weights_BNTS = attend(
            query_BTNH,
            key_BSNH,
            value_BSNH,
            mask_BNTS,
            dropout_rate=c.attention_dropout_rate,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
        )
        out_BTD = Linear(
            (c.d_model,), contract=2, kernel_init=c.residual_init(), dtype=c.dtype, name="out"
        )(out_BTNH)
        return out_BTD, cache, weights_BNTS


class MLP(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        h_BTF = Linear((c.mlp_dim,), kernel_init=c.kernel_init(), dtype=c.dtype, name="wi")(x_BTD)
        h_BTF = ACTIVATIONS[c.activation](h_BTF)
        return Linear((c.d_model,), kernel_init=c.residual_init(), dtype=c.dtype, name="wo")(h_BTF)


class Block(nn.Module):
    """Self-attention, then MLP, each inside a residual link with dropout and LayerNorm."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BTD, mask_BNTS, positions_BT=None, cache=None, deterministic=True):
        c = self.config

        def norm(name, x_BTD):
            return LayerNorm(c.norm_epsilon, dtype=c.dtype, name=name)(x_BTD)

        def drop(x_BTD):
            return nn.Dropout(c.dropout_rate)(x_BTD, deterministic=deterministic)

        inner_BTD = norm("attention_norm", x_BTD) if c.norm_first else x_BTD
        attended_BTD, cache, weights_BNTS = Attention(c, name="self_attention")(
            inner_BTD, mask_BNTS, positions_BT, cache, deterministic
        )
        x_BTD = x_BTD + drop(attended_BTD)
        if not c.norm_first:
            x_BTD = norm("attention_norm", x_BTD)

        inner_BTD = norm("mlp_norm", x_BTD) if c.norm_first else x_BTD
        x_BTD = x_BTD + drop(MLP(c, name="mlp")(inner_BTD))
        if not c.norm_first:
            x_BTD = norm("mlp_norm", x_BTD)
        return x_BTD, cache, weights_BNTS


class StackOutput(NamedTuple):
    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None  # as given, with this call's keys and values written
    attention: tuple[Float[Array, "B N T S"], ...]  # weights by layer


class Stack(nn.Module):
    """`layer_0` ... `layer_n`, and a `final_norm` where the blocks leave their sum unnormalised."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BNTS: Bool[Array, "..."] | None,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        deterministic: bool = True,
    ) -> StackOutput:
        c = self.config
        new_cache, attention = {}, []
        for i in range(c.num_layers):
            name = f"layer_{i}"
            x_BTD, new_cache[name], weights_BNTS = Block(c, name=name)(
                x_BTD, mask_BNTS, positions_BT, cache and cache[name], deterministic
            )
            x_BTD = constrain_batch(x_BTD)
            attention.append(weights_BNTS)
        if c.norm_first:
            x_BTD = LayerNorm(c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)
        return StackOutput(x_BTD, new_cache if cache else None, tuple(attention))
