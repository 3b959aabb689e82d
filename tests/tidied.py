"""Leaves of a compile_commands.json one entry for each unit that is compiled for several instruction sets.

``python tests/tidied.py build/compile_commands.json kernels.cpp=scalar ...``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

path, *choices = sys.argv[1:]
chosen = dict(choice.split("=") for choice in choices)
entries = json.loads(Path(path).read_text())
left = [
    entry
    for entry in entries
    if (name := Path(entry["file"]).name) not in chosen or f"-DONEPASS_ISA={chosen[name]} " in entry["command"]
]
for name in chosen:
    count = sum(Path(entry["file"]).name == name for entry in left)
    if count != 1:
        sys.exit(f"{name}: {count} commands of {path} are for {chosen[name]}, not one")
Path(path).write_text(json.dumps(left, indent=1))
