"""BART: the Transformer, pre-trained to reconstruct corrupted text.

Lewis et al. 2019, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
Generation, Translation, and Comprehension", section 2.1: GELU instead of ReLU, and parameters
initialized from N(0, 0.02). As in the released code (fairseq), positions are learned, the position
table has two unused rows at its start, and the embeddings are normalized by LayerNorm instead of
scaled. `objectives.seq2seq` corrupts the text.
"""

from transformer_jax.models.config import BARTConfig
from transformer_jax.models.transformer import Transformer


class BART(Transformer):
    """The Transformer with a `BARTConfig`; methods and fields are those of `Transformer`."""

    config: BARTConfig
