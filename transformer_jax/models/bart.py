"""BART: the Transformer, pre-trained to restore a text from a noised one.

Lewis et al. 2019, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
Generation, Translation, and Comprehension", section 2.1: GELU instead of ReLU, parameters from
N(0, 0.02), and, by the released code (fairseq), learned positions whose table begins two rows late
and a LayerNorm on the embeddings, which are not scaled. The noise is in `objectives.denoising`.
"""

from transformer_jax.models.config import BARTConfig
from transformer_jax.models.transformer import Transformer


class BART(Transformer):
    """The Transformer under a `BARTConfig`; see there for methods and fields."""

    config: BARTConfig
