"""Checkpoints that are damaged by chance, and what a file says, read without the library."""

from __future__ import annotations

import json
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import onepass
from fuzz import plans
from fuzz.choices import Choices
from fuzz.world import Machine, Story, require, sprinkle
from onepass import schedules
from reference import narrow
from reference.expressions import assert_same_bits
from training import Training

DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    **{f"{kind[0].upper()}{size}": np.dtype(f"{kind}{size}") for kind in ("int", "uint") for size in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
OWN = object()  # stands for a function that is in no file
DEEP = "[" * 30_000 + "]" * 30_000


class File:
    """A safetensors file in parts that can be changed and put together again."""

    def __init__(self, data: bytes) -> None:
        count = int.from_bytes(data[:8], "little")
        self.tensors = json.loads(data[8 : 8 + count])
        self.metadata = self.tensors.pop("__metadata__")
        self.contents = json.loads(self.metadata["contents"])
        self.data = bytearray(data[8 + count :])
        self.right = True  # whether the checksum of the contents shall be

    def bytes(self) -> bytes:
        text = json.dumps(self.contents).replace('"DEEP"', DEEP)
        self.metadata["contents"] = text
        if self.right:
            self.metadata["crc32"] = f"{zlib.crc32(text.encode()):08x}"
        header = json.dumps({"__metadata__": self.metadata, **self.tensors}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + bytes(self.data)

    def array(self, name: str) -> np.ndarray:
        entry = self.tensors[name]
        begin, end = entry["data_offsets"]
        return np.frombuffer(bytes(self.data[begin:end]), DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def replace(self, name: str, array: np.ndarray) -> None:
        """Other numbers in the place of a tensor's, with the checksum that they have."""
        begin, end = self.tensors[name]["data_offsets"]
        self.data[begin:end] = array.tobytes()
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(f"{array.dtype.name} {array.shape}".encode()))
        for node in nodes(self.contents):
            if isinstance(node, dict) and isinstance(node.get("array"), list) and node["array"][0] == name:
                node["array"][1] = f"{checksum:08x}"

    def value(self, tree: Any) -> Any:
        """What a tree says."""
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if "schedule" in tree:
            given = {key: self.value(item) for key, item in tree["fields"].items()}
            return getattr(schedules, tree["schedule"])(**given)
        ((tag, inner),) = tree.items()
        readers: dict[str, Callable[[Any], Any]] = {
            "dict": lambda inner: {key: self.value(item) for key, item in inner.items()},
            "items": lambda inner: {self.value(key): self.value(item) for key, item in inner},
            "tuple": lambda inner: tuple(map(self.value, inner)),
            "array": lambda inner: self.array(inner[0]),
            "float": float,
            "function": lambda inner: OWN,
        }
        return readers[tag](inner)


def nodes(tree: Any) -> list[Any]:
    """A tree's lists and dicts, itself first."""
    if not isinstance(tree, (list, dict)):
        return []
    children = list(tree.values()) if isinstance(tree, dict) else tree
    return [tree, *(node for child in children for node in nodes(child))]


# Damage

JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 7, -1, 0.5, 1e-3, 1e300, 10**25, 2**62, 2**64, "", "a", "params", "1", "onepass", [],
    {}, [0], [1, 2], {"float": "nan"}, {"float": "inf"}, {"float": "-inf"}, {"float": 1}, {"tuple": [0.5, 0.25]},
    {"tuple": 3},
    {"array": ["params.0", "00000000"]}, {"array": []}, {"array": [[], {}]}, {"function": None}, {"function": 1},
    {"schedule": "cosine", "fields": {"dict": {}}}, {"schedule": "cosine", "fields": {"lr": 0.5, "steps": 3}},
    {"schedule": "step", "fields": {"lr": {"float": "nan"}, "every": 1}}, {"schedule": "Schedule", "fields": {"lr": 1}},
    {"schedule": "__init__", "fields": {}}, {"schedule": ["cosine"], "fields": []}, {"schedule": "_Field", "fields": 1},
    {"dict": {}}, {"dict": []}, {"items": []}, {"items": [[0, {"dict": {}}]]}, {"items": [[{"dict": {}}, 1]]},
    {"items": [1]},
    {"items": [[{"tuple": []}, 1], [{"tuple": []}, 2]]}, {"items": [[{"array": ["params.0", ""]}, 2]]}, {"unknown": 1},
    "\ud800", "\u0000", "DEEP", {"dict": "DEEP"}, [["DEEP"]],
)  # fmt: skip


def damaged(c: Choices, story: Story, data: bytes) -> bytes:
    """Something else in the place of a file."""
    how = c.pick(("flip", "truncate", "splice", "tree", "tensor", "number", "header", "metadata", "noise", "tree"))
    story.meet(f"file: {how}")
    file = File(data)
    if how == "flip":
        changed = bytearray(data)
        for _ in range(c.integer(1, 4)):
            changed[c.integer(0, min(len(data) - 1, 64 if c.chance(4) else len(data) - 1))] ^= 1 << c.integer(0, 7)
        story.tell("bits are flipped")
        return bytes(changed)
    if how == "truncate":
        story.tell("it ends early, or late")
        return data[: c.integer(0, len(data))] if not c.chance(4) else data + c.bytes(c.integer(1, 64))
    if how == "splice":
        begin, length, to = c.integer(0, len(data)), c.integer(0, 300), c.integer(0, len(data))
        part = data[begin : begin + length]
        without = data[:begin] + data[begin + length :] if c.chance(2) else data
        story.tell(f"{length} bytes from {begin} stand at {to}")
        return without[:to] + part + without[to:]
    if how == "noise":
        story.tell("any bytes")
        noise = c.bytes(c.integer(0, 200))
        return noise if c.chance(2) else len(noise).to_bytes(8, "little") + noise
    if how in ("tree", "number"):
        where = nodes(file.contents)
        at = c.pick(where)
        if how == "number":  # values that can be right
            where = [n for n in where if any(type(v) in (int, float) for _, v in items(n))]
            at = c.pick(where) if where else at
            choices = [key for key, v in items(at) if type(v) in (int, float)]
        else:
            choices = [key for key, _ in items(at)]
        if not choices:
            return data
        key = c.pick(choices)
        was = at[key]
        if how == "number":
            at[key] = c.pick((was + 1, was * 0.5, -was, c.integer(0, 255), 0))
        elif c.chance(5):
            del at[key]
        elif c.chance(5) and isinstance(at, dict):
            at[c.pick(("a", "array", "dict", "params", ""))] = c.pick(JSON_VALUES)
        else:
            at[key] = c.pick(JSON_VALUES)
        story.tell(f"contents: {key!r} of {str(at)[:200]}, was {str(was)[:200]}")
    elif how == "tensor" and file.tensors:
        name = c.pick(list(file.tensors))
        array = file.array(name).copy()
        if array.size:
            sprinkle(array, np.random.default_rng(c.seed())) if array.dtype.kind != "u" else array.fill(c.seed())
        file.replace(name, array)
        story.tell(f"other numbers in {name}")
    elif how == "header" and file.tensors:
        name = c.pick(list(file.tensors))
        entry = file.tensors[name]
        key = c.pick(("dtype", "shape", "data_offsets", "name", "gone", "more"))
        if key == "dtype":
            entry[key] = c.pick((*DTYPES, "F8_E4M3", "C64", "F4", "", 3, None))
        elif key == "shape":
            shape = entry["shape"]
            entry[key] = c.pick(
                (shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], [2**63, 0], [-1], [2**62, 4], "3")
            )
        elif key == "data_offsets":
            begin, end = entry[key]
            entry[key] = c.pick(([begin, end + 4], [begin + 4, end], [end, begin], [0, 0], [0, 2**63], [0], None))
        elif key == "name":
            file.tensors[c.pick(("params.0", "params.1", "x", "__metadata__.", ""))] = file.tensors.pop(name)
        elif key == "gone":
            del file.tensors[name]
        else:
            file.tensors["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(file.data)] * 2}
        story.tell(f"header: {key} of {name}: {entry}")
    else:
        key = c.pick(("format", "format_version", "crc32", "contents", "more"))
        file.right = key != "crc32"
        value = c.pick(("", "0", "2", "1 ", "onepass", "é", "00000000"))
        if key == "contents":
            file.contents = c.pick(JSON_VALUES)
        else:
            file.metadata[key] = value
        story.tell(f"metadata: {key} is {value!r}")
    return file.bytes()


def items(at: Any) -> list[tuple[Any, Any]]:
    return list(at.items() if isinstance(at, dict) else enumerate(at))


# The scene


def load(c: Choices, story: Story, machine: Machine) -> str:
    """A checkpoint, damaged or not: refused, or loaded as it says and then stepped."""
    from fuzz import scenes

    plan = plans.draw(c, story, small=True)
    machine.choose(c, story)
    source, target = plan.begin(), plan.begin()
    scenes.train_a_little(c, plan, source)
    scenes.train_a_little(c, plan, target)
    layers = [onepass.BatchNorm(3, affine=not c.chance(3)) for _ in range(2)] if c.chance(3) else None
    if layers is not None:
        layers[1] = onepass.BatchNorm(3, affine=layers[0].weight is not None)
        layers[0].forward(np.random.default_rng(c.seed()).standard_normal((5, 3)).astype(np.float32))
        story.meet("optimizer and layer")

    def things(training: Training, k: int) -> Any:
        return training.opt if layers is None else {"opt": training.opt, "état": layers[k]}

    extra: dict[str, Any] = {}
    if c.chance(2):
        extra = {"epoch": c.integer(0, 300), "note": "é", "rest": [1.5, (None, True), {"x": np.arange(3)}]}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where flushing to the disk is quick
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "checkpoint"
        onepass.save(path, things(source, 0), **extra)
        whole = data = path.read_bytes()
        if c.integer(0, 5):
            data = damaged(c, story, data)
            path.write_bytes(data)
        came: list[Any] = []
        loaded = scenes.must_load_or_refuse(
            lambda: came.append(onepass.load(path, things(target, 1))),
            target.opt,
            target.params,
            target.mirrors,
            *([] if layers is None else [layers[1].state_dict()]),
            kinds=(TypeError, ValueError, OSError),
            label=f"{path}: ",
        )
    story.meet("loaded" if loaded else "refused")
    require(loaded or data != whole, "a whole file was refused")
    if not loaded:
        return "refused"
    check_loaded(File(data), plan, target, None if layers is None else layers[1], came[0])
    scenes.go_on(c, plan, target, story)
    return "compared"


def check_loaded(file: File, plan: plans.Plan, target: Training, layer: Any, extra: Any) -> None:
    """Everything is as the file says."""
    from fuzz import scenes

    saved = {key: file.value(entry["content"]) for key, entry in file.contents["targets"].items()}
    content = saved["" if layer is None else "opt"]
    params, opt = content.pop("params"), target.opt
    del content["memory_order"]  # of parameters, which load() compares, and which fit
    for k, (array, value) in enumerate(zip(target.params, opt._structure.flatten(params, "params"), strict=True)):
        assert_same_bits(array, value, f"params[{k}]")
    for group, own in zip(content["param_groups"], opt.param_groups, strict=True):
        for name, value in group.items():
            if value is OWN:
                require(callable(own[name]), f"{name}: a function came out of nowhere")
                group[name] = own[name]
    scenes.same_state(content, opt.state_dict())
    if layer is not None:
        scenes.same_state(saved["état"], layer.state_dict())
    scenes.same_state(file.value(file.contents["extra"]), extra)
    for k, (param, mirror) in enumerate(zip(target.params, target.mirrors, strict=True)):
        if mirror is not None:
            flat = param.reshape(-1)
            values = narrow.widen(flat, narrow.compute_dtype(param.dtype))
            if "remainder" in opt.state[k]:
                values = narrow.joined(flat, opt.state[k]["remainder"].reshape(-1))
            shown = narrow.nearest(values, mirror.dtype).reshape(param.shape)
            assert_same_bits(mirror.reshape(-1), shown.reshape(-1), f"mirror[{k}]")
