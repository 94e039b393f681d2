"""One claim of the notes, put to the test.

    python experiments/study.py grokking
    python experiments/study.py grokking-large --out runs/grokking_large
    python experiments/study.py grokking --help

The gallery in `experiments/README.md` shows what came of each; the scripts are in
`experiments/studies`. NAME-large is for accelerators, NAME-smallest for a look at whether it runs.
"""

import sys
import time

import common
import studies
import tyro


def main(c) -> dict:
    """Run it: pictures and `results.json` in its folder."""
    began = time.perf_counter()
    metrics = sys.modules[type(c).__module__].run(c)
    results = common.write_results(c.out, c, metrics, time.perf_counter() - began)
    print(f"{results['seconds']:.0f} s; pictures and results.json are in {c.out}", flush=True)
    return results


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(studies.load(), description=__doc__)
    common.start()
    main(config)
