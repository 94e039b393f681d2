"""Attention, MLP, block and stack: all the depth that any of the models has.

`norm_first` chooses between the two residual forms: x + f(norm(x)), GPT-2's, and norm(x + f(x)),
that of the Transformer, GPT and BERT.
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

# What is kept for the way back under each `remat`; None: everything.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class StackConfig(NamedTuple):
    """What a stack of blocks needs to know; models derive it from their own config."""

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
    residual_init_std: float  # for the two kernels of a block that write to the residual stream
    dtype: jnp.dtype
    attention_impl: str
    remat: str
    cross_attention: bool = False  # blocks also look at a memory: the encoder's hidden states

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def kernel_init(self) -> Callable:
        return INITIALIZERS[self.initializer](self.init_std)

    def residual_init(self) -> Callable:
        return INITIALIZERS[self.initializer](self.residual_init_std)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), of a sequence to itself or to a
    memory."""

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        memory: Float[Array, "B S D"] | KVCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, "B N T S"]]:
        """Queries come from `x`; keys and values from `memory` if given, else from `x`.

        Returns:
            The attended values; the keys and values that were looked at: `cache` with this call's
            written at `positions`, or those of `memory`, which stand for it in later calls; the
            attention weights.
        """
        c = self.config

        def project(name, source_BSD):
            return Linear(
                (c.num_heads, c.head_dim), kernel_init=c.kernel_init(), dtype=c.dtype, name=name
            )(source_BSD, deterministic)

        query_BTNH = constrain(project("query", x_BTD), BATCH_AXES, "sequence", "tensor", None)
        if isinstance(memory, KVCache):
            seen, (key, value) = memory, memory.rows()
        else:
            source = x_BTD if memory is None else memory
            # Queries keep their cut of the tokens, and look at keys and values of all of them.
            key, value = (constrain(project(name, source), BATCH_AXES, None, "tensor", None)
                          for name in KVCache._fields)
            seen = KVCache.of(key, value) if cache is None else cache.write(
                key, value, positions_BT)
            if cache is not None:
                key, value = seen.rows()
        key, value, mask, prefix = with_prefix(self, key, value, mask, x_BTD.shape[1])
        use_dropout = not deterministic and c.attention_dropout_rate > 0
        out_BTNH, weights_BNTS = dot_product_attention(
            query_BTNH,
            key,
            value,
            mask,
            attention_impl=c.attention_impl,
            dropout_rate=c.attention_dropout_rate,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
        )
        out_BTD = Linear(
            (c.d_model,), contract=2, kernel_init=c.residual_init(), dtype=c.dtype, name="out"
        )(out_BTNH, deterministic)
        return out_BTD, seen, weights_BNTS[..., prefix:]


def with_prefix(module: nn.Module, key: Array, value: Array, mask: Mask, T: int):
    """(keys, values, mask, P) with the P keys and values of a `prefix_key` and `prefix_value` in
    front, which every query sees (Li & Liang 2021, "Prefix-Tuning", section 4.2), if there are."""
    if not module.has_variable("params", "prefix_key"):
        return key, value, mask, 0
    front = [module.get_variable("params", f"prefix_{name}") for name in KVCache._fields]
    key, value = (
        jnp.concatenate([jnp.broadcast_to(f.astype(x.dtype), (x.shape[0], *f.shape)), x], axis=1)
        for f, x in zip(front, (key, value))
    )
    P = front[0].shape[0]
    return key, value, mask.after(P, T, key.shape[1] - P), P


class Adapter(nn.Module):
    """A bottleneck that is nearly the identity at first: x + up(f(down(x))) (Houlsby et al. 2019,
    section 2.1). Its width is that of the parameters, which `finetuning.peft` makes."""

    config: StackConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        width = self.get_variable("params", "down")["bias"].shape[-1]
        h = ACTIVATIONS[c.activation](Linear((width,), dtype=c.dtype, name="down")(x_BTD))
        return x_BTD + Linear((c.d_model,), dtype=c.dtype, name="up")(h)


class MLP(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

    config: StackConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        c = self.config
        wi = Linear((c.mlp_dim,), kernel_init=c.kernel_init(), dtype=c.dtype, name="wi")
        wo = Linear((c.d_model,), kernel_init=c.residual_init(), dtype=c.dtype, name="wo")
        h_BTF = constrain(wi(x_BTD, deterministic), BATCH_AXES, "sequence", "tensor")
        h_BTF = materialize_cotangent(h_BTF)
        return wo(ACTIVATIONS[c.activation](h_BTF), deterministic)


class BlockOutput(NamedTuple):
    hidden: Float[Array, "B T D"]
    cache: KVCache
    attention: Float[Array, "B N T S"]
    memory: KVCache | None
    cross_attention: Float[Array, "B N T S"] | None


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, then MLP, each inside a residual
    link with dropout and LayerNorm."""

    config: StackConfig

    @nn.compact
    def __call__(
        self, x_BTD, mask, positions_BT=None, cache=None, memory=None, memory_mask=UNMASKED,
        deterministic=True,
    ) -> BlockOutput:
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

        def look(x_BTD):
            return Attention(c, name="self_attention")(
                x_BTD, mask, positions_BT, cache, deterministic=deterministic
            )

        def look_across(x_BTD):
            return Attention(c, name="cross_attention")(
                x_BTD, memory_mask, memory=memory, deterministic=deterministic
            )

        x_BTD, cache, weights_BNTS = residual("attention", look, x_BTD)
        cross_weights_BNTS = None
        if c.cross_attention:
            x_BTD, memory, cross_weights_BNTS = residual("cross_attention", look_across, x_BTD)
        (x_BTD,) = residual(
            "mlp", lambda x_BTD: (MLP(c, name="mlp")(x_BTD, deterministic),), x_BTD)
        return BlockOutput(x_BTD, cache, weights_BNTS, memory, cross_weights_BNTS)


class StackOutput(NamedTuple):
    """Hidden states, and what a stack gives to its next call and to those who look on."""

    hidden: Float[Array, "B T D"]
    cache: dict[str, KVCache] | None  # as given, with this call's keys and values written
    attention: tuple[Float[Array, "B N T S"], ...]  # weights by layer
    memory: dict[str, KVCache] | None = None  # the memory's keys and values, for later calls
    cross_attention: tuple[Float[Array, "B N T S"], ...] = ()


class Stack(nn.Module):
    """`layer_0` ... `layer_n`, and a `final_norm` where the blocks leave their sum unnormalised.

    Parameters that `tree.stack_layers` has stacked are run by `jax.lax.scan`, which compiles one
    layer in the place of n. They give no attention weights and take no cache.
    """

    config: StackConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Mask,
        positions_BT: Int[Array, "B T"] | None = None,
        cache: dict[str, KVCache] | None = None,
        memory: Float[Array, "B S D"] | dict[str, KVCache] | None = None,
        memory_mask: Mask = UNMASKED,
        deterministic: bool = True,
    ) -> StackOutput:
        """`memory` is what cross-attention looks at: hidden states of an encoder, or, so that they
        are projected only once, the `memory` of an earlier call's output."""
        c = self.config
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT[c.remat], static_argnums=(7,))
        blocks: dict[str, BlockOutput] = {}
        if stacked := self.has_variable("params", LAYERS):
            if cache is not None or isinstance(memory, dict):
                raise ValueError("a cache is for single layers, and these parameters are stacked; "
                                 "give tree.unstack_layers(params)")
            x_BTD = self._scan(block, x_BTD, mask, memory, memory_mask, deterministic)
        for i in range(0 if stacked else c.num_layers):
            name = f"layer_{i}"
            blocks[name] = out = block(c, name=name)(
                x_BTD,
                mask,
                positions_BT,
                cache and cache[name],
                memory[name] if isinstance(memory, dict) else memory,
                memory_mask,
                deterministic,
            )
            x_BTD = out.hidden
        if c.norm_first:
            x_BTD = LayerNorm(c.norm_epsilon, dtype=c.dtype, name="final_norm")(x_BTD)
        across = c.cross_attention and not stacked
        return StackOutput(
            x_BTD,
            {name: out.cache for name, out in blocks.items()} if cache else None,
            tuple(out.attention for out in blocks.values()),
            {name: out.memory for name, out in blocks.items()} if across else None,
            tuple(out.cross_attention for out in blocks.values()) if across else (),
        )

    def _scan(self, block, x_BTD, mask, memory, memory_mask, deterministic):
        c = self.config
        rng = None if deterministic or not self.has_rng("dropout") else self.make_rng("dropout")

        def run(x_BTD, layer):
            i, params = layer
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, i)}
            out = block(c, parent=None).apply(
                {"params": params}, x_BTD, mask, None, None, memory, memory_mask, deterministic,
                rngs=rngs)
            return out.hidden, None

        layers = self.get_variable("params", LAYERS)
        return jax.lax.scan(run, x_BTD, (jnp.arange(c.num_layers), layers))[0]
