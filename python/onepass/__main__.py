"""``python -m onepass``: what this installation is and what it found on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import onepass
from onepass.devices import cuda_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Print version, instruction sets, threads and devices."""
    argparse.ArgumentParser(prog="python -m onepass", description=main.__doc__).parse_args(arguments)
    rows = {
        "onepass": onepass.__version__,
        "isa": onepass.isa(),
        "available isas": ", ".join(onepass.available_isas()),
        "threads": onepass.get_num_threads(),
        "cuda": cuda_report(),
    }
    for name, value in rows.items():
        print(f"{name:<15} {value}")


if __name__ == "__main__":
    main()
