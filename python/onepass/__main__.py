"""``python -m onepass``: what this installation is and what it found on this machine."""

from __future__ import annotations

import onepass


def main() -> None:
    """Print version, instruction sets, threads and devices."""
    rows = {
        "onepass": onepass.__version__,
        "isa": onepass.isa(),
        "available isas": ", ".join(onepass.available_isas()),
        "threads": onepass.get_num_threads(),
        "cuda": "not built",
    }
    for name, value in rows.items():
        print(f"{name:<15} {value}")


if __name__ == "__main__":
    main()
