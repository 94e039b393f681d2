"""Default options of `generate` stored in a checkpoint by its authors."""

import json
from typing import Any

from transformer_jax.generation.options import (
    BEAM_SEARCH_DEFAULTS,
    OPTION_RULES,
    SAMPLING_DEFAULTS,
)
from transformer_jax.models import Model

# Special token ids are not included: `generate` takes them from the model's config.
OPTION_NAMES = {*OPTION_RULES, "do_sample", "bad_words_ids", "suppress_tokens",
                "begin_suppress_tokens"}


def generation_options(model: Model) -> dict[str, Any]:
    """Returns the options of `generate` in a checkpoint's generation_config.json.

    If there is no such file, the options in config.json are used. Options that have no effect, such
    as a temperature without sampling, are omitted.

    Args:
        model: a model from `load_pretrained`.

    Returns:
        Keyword arguments for `generate`; `{}` for a model that was not loaded from a checkpoint.

    Example:
        >>> from transformer_jax.models import BART, presets
        >>> model = BART(presets.get("bart_base"),
        ...              hf_config='{"num_beams": 4, "max_length": 60, "temperature": 0.7}')
        >>> sorted(generation_options(model).items())
        [('max_length', 60), ('num_beams', 4)]
    """
    values = json.loads(model.hf_config or "{}")
    values = values.get("generation_config", values)
    options = {name: values[name] for name in OPTION_NAMES & values.keys()
               if values[name] is not None}
    if options.get("top_k") == 0:  # in Hugging Face Transformers, no limit
        del options["top_k"]
    return drop_unused_options(options)


def drop_unused_options(options: dict[str, Any]) -> dict[str, Any]:
    """Removes options that have no effect with the others.

    These are sampling options without `do_sample`, beam search options without `num_beams` above 1,
    and `max_length` or `min_length` beside `max_new_tokens` or `min_new_tokens`.

    Example:
        >>> drop_unused_options({"num_beams": 1, "length_penalty": 2.0, "max_new_tokens": 5})
        {'num_beams': 1, 'max_new_tokens': 5}
    """
    unused = set() if options.get("do_sample") else SAMPLING_DEFAULTS.keys()
    if options.get("num_beams", 1) == 1:
        unused |= BEAM_SEARCH_DEFAULTS.keys()
    for preferred, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if preferred in options:
            unused |= {other}
    return {name: value for name, value in options.items() if name not in unused}
