"""Feed random structures, layouts, dtypes, options, state dicts and files to onepass, and compare with NumPy.

python tests/fuzz/fuzz.py --seconds 60               # atheris (libFuzzer) if it is installed, else random inputs
python tests/fuzz/fuzz.py --seconds 30 --seed 1      # the same inputs each time, with --engine random
python tests/fuzz/fuzz.py --replay build/fuzz/crash-0123456789ab
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the folder of the package in the place of the package's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fuzz import engines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long; without it and without --runs 60")
    parser.add_argument("--runs", type=int, help="how many inputs")
    parser.add_argument("--seed", type=int, help="of the inputs; without one a new one each time")
    parser.add_argument("--engine", choices=("auto", *engines.ENGINES), default="auto")
    parser.add_argument("--scene", help="only this one")
    parser.add_argument("--folder", type=Path, default=engines.FOLDER, help="of the corpus and of failing inputs")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input and tell what it is")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.replay is not None:
        record = engines.play(options.replay.read_bytes())
        print(engines.tell(record))
        print(record.outcome)
        return int(record.error is not None)
    engine = options.engine
    if engine == "auto":
        # libFuzzer's inputs depend on timing; who asks for a seed wants the same ones each time.
        engine = "atheris" if options.seed is None and engines.has_atheris() else "random"
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    seconds = 60.0 if options.seconds is None and options.runs is None else options.seconds
    print(f"fuzzing by {engine}, seed {seed}", flush=True)
    statistics, failure = engines.ENGINES[engine](
        seed=seed, seconds=seconds, runs=options.runs, scene=options.scene, folder=options.folder
    )
    print(statistics.report(engine), flush=True)
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())
