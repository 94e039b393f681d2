"""GPT of 2 layers, pre-trained on the documentation of Python: the quickstart's model.

    python experiments/pretrain.py gpt_python_docs

2 AMD EPYC cores: 80 to 95 s, held-out loss from 7.77 to 4.38 nats per BPE token.
"""

from transformer_jax.recipes.quickstart import gpt_python_docs

CONFIG = gpt_python_docs()
