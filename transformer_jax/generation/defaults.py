"""What a checkpoint says about writing texts: the options its authors chose for `generate`."""

import json
from typing import Any

from transformer_jax.generation.options import BEAMS, LIMITS, SAMPLING
from transformer_jax.models import Config

# Token ids are fields of the config, which `generate` reads by itself.
NAMES = {*LIMITS, "do_sample", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"}


def generation_options(config: Config) -> dict[str, Any]:
    """Options of `generate` as generation_config.json has them, or, without it, config.json.

    Those that the checkpoint does not name are left out, and so are those that say nothing
    (a temperature where nothing is drawn); `{}` for a model that came from no checkpoint.

        generate(model, params, ids, **generation_options(model.config))
    """
    values = json.loads(config.source or "{}")
    values = values.get("generation_config", values)
    options = {name: values[name] for name in NAMES & values.keys() if values[name] is not None}
    if options.get("top_k") == 0:  # the reference's word for all
        del options["top_k"]
    return drop_unused_options(options)


def drop_unused_options(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that only sampling or several beams give a meaning, and a second length."""
    idle = set() if options.get("do_sample") else SAMPLING.keys()
    if options.get("num_beams", 1) == 1:
        idle |= BEAMS.keys()
    for exact, total in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if exact in options:
            idle |= {total}
    return {name: value for name, value in options.items() if name not in idle}
