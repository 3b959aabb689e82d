"""Checkpoints: everything that a training run needs to go on, in one file that is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import mmap
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onepass import _cpu, schedules
from onepass.batchnorm import BatchNorm
from onepass.devices import is_array, to_host
from onepass.integers import is_integer
from onepass.optim.hyper import flag
from onepass.optim.optimizer import Optimizer
from onepass.optim.options import bfloat16
from onepass.state_dicts import OWN_FUNCTION, Call, carry_out, entries

__all__ = ["load", "save"]

Path: TypeAlias = "str | os.PathLike[str]"
Target: TypeAlias = "Optimizer | BatchNorm | Mapping[str, Optimizer | BatchNorm]"
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]

_FORMAT, _VERSION = "onepass", "1"
_LARGEST_HEADER = 100_000_000  # of safetensors
_MOST_LEVELS = 100  # each takes three frames of Python's stack
_MOST_BITS = 8192  # Python reads no more than 4300 digits

_CODES = {
    "bool": "BOOL",
    **{f"{kind}{size}": f"{kind[0].upper()}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64)},
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
_SCHEDULES = {name: getattr(schedules, name) for name in schedules.__all__ if name != "Schedule"}


def save(path: Path, target: Target, /, **extra: Any) -> None:
    """Write a checkpoint: parameters, states, averages, step counts and hyper-parameters, and whatever is `extra`.

    The file is in the safetensors format, which any framework reads, and loading it never runs code. It is written
    beside `path`, flushed to the disk, read back, and renamed: whenever the process is killed, `path` is the old file
    or the new one. (A killed one leaves ``.NAME.*.tmp`` or ``.tmp*`` beside it.)

    Parameters
    ----------
    path : str or path-like
        The file, which is replaced, in its mode, if it exists. Only a regular file is.
    target : Optimizer, BatchNorm, or dict of name -> those
        What is saved. Steps of other threads are refused meanwhile, and nothing else may write into the arrays.
    **extra
        Anything else that :func:`load` shall return: NumPy arrays (CuPy's, which come back as NumPy's), numbers,
        strings, True, False, None, and lists, tuples and dicts of those, up to 100 deep. Numbers of NumPy come back as
        Python's.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument that cannot be stored. Long lists of numbers belong into arrays: all that is in
        none, and the names of the arrays, have 100 MB together.
    OSError
        If the file cannot be written. What was at `path` before is still there; only if nothing but its folder could
        not be flushed, the new file is.
    RuntimeError
        If `target` is in the middle of a step, or an array is not what it was when its checksum was taken.

    Notes
    -----
    Arrays are written from where they lie, without a copy, unless they are not in C order. Learning rates that are
    :mod:`onepass.schedules` are stored, other functions are not: see :func:`load`. The tensors are named
    ``params.KEY`` and ``state.INDEX.NAME`` (of a BatchNorm as in its ``state_dict``), with the name in `target` before
    that if it is a dict, and ``extra.NAME``.

    Examples
    --------
    >>> import numpy as np, onepass, os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> w = np.ones(3, np.float32)
    >>> opt = onepass.Adam({"w": w}, lr=0.5)
    >>> opt.step({"w": np.ones(3, np.float32)})
    >>> onepass.save(path, opt, epoch=7)
    >>> w[:] = 0.0
    >>> onepass.load(path, opt)
    {'epoch': 7}
    >>> w, opt.step_counts
    (array([0.5, 0.5, 0.5], dtype=float32), (1,))
    """
    name = _path(path)
    file = _regular(os.path.realpath(name), exists=False)  # a link stays one
    objects = _objects(target)
    with _cpu.Turns([thing._turn for thing in objects.values()]):
        tensors: Tensors = {}
        several = isinstance(target, Mapping)
        contents = {
            "targets": {
                name: {
                    "kind": _kind(thing),
                    "content": _Writer(tensors).tree(thing._saved(), (_text(name, "target"),) if several else ()),
                }
                for name, thing in objects.items()
            },
            "several": several,
            "extra": _Writer(tensors, extra=True).tree(extra, ("extra",)),
            "onepass": _cpu.__version__,
        }
        text = json.dumps(contents, separators=(",", ":"), allow_nan=False)
        metadata = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "contents": text,
            "crc32": f"{zlib.crc32(text.encode()):08x}",
        }
        size = len(json.dumps(metadata)) + sum(len(name) + 100 for name in tensors)
        if size > _LARGEST_HEADER:
            raise ValueError(
                f"extra: with the names of the arrays it makes a header of {size / 1e6:.0f} MB, and safetensors have "
                f"{_LARGEST_HEADER / 1e6:.0f}; put long lists of numbers into arrays"
            )
        _replace(file, tensors, metadata)


def load(path: Path, target: Target, /) -> dict[str, Any]:
    """Restore, in place and to the last bit, what :func:`save` wrote, on any instruction set and number of threads.

    Parameters
    ----------
    path : str or path-like
        The file.
    target : Optimizer, BatchNorm, or dict of name -> those
        Made like those that were saved: of the same classes, with parameters of the same names, shapes, dtypes and
        memory order (on which norms and random numbers depend), and the same options that decide which states there
        are. Their values are overwritten, hyper-parameters of optimizers included; mirrors follow the parameters. Only
        functions of the step count other than :mod:`onepass.schedules` stay those that `target` has. Of a BatchNorm
        what its ``state_dict`` has is restored.

    Returns
    -------
    dict
        What was saved beside it, by name: ``extra`` of :func:`save`. Arrays are new ones.

    Raises
    ------
    TypeError, ValueError
        With the name of the file and of what is wrong in it: damaged, of another version of the format, of other
        objects than `target`. Nothing has changed then.
    OSError
        If the file cannot be read.
    RuntimeError
        If `target` is in the middle of a step.

    Notes
    -----
    All is checked, checksums of every array included, before anything is written; an interrupt finds all of it done or
    nothing. The file is mapped into memory and not copied: it may be larger than what is free. A foreign program that
    shortens it at this moment ends the process (SIGBUS); a :func:`save` to the same `path` does no harm.
    """
    path = _path(path)
    objects = _objects(target)
    _regular(path, exists=True)
    try:
        contents = _read(path)
        saved = contents["targets"]
        if contents["several"] != isinstance(target, Mapping):
            names = f"a dict of {', '.join(map(repr, saved))}" if contents["several"] else "one object and no dict"
            raise ValueError(f"target: what was saved is {names}")
        entries(saved, "target", list(objects))
        with _cpu.Turns([thing._turn for thing in objects.values()]):
            calls: list[Call] = []
            for name, thing in objects.items():
                where = f"target[{name!r}]: " if isinstance(target, Mapping) else ""
                entry = saved[name]
                if entry["kind"] != _kind(thing):
                    raise ValueError(f"{where}it is of kind {entry['kind']!r}, not {_kind(thing)!r}")
                try:
                    calls += thing._loading(entry["content"])
                except (TypeError, ValueError) as error:
                    raise _named(error, where) from None
            carry_out(calls)
    except (TypeError, ValueError) as error:
        raise _named(error, f"{path}: ") from None
    extra: dict[str, Any] = contents["extra"]
    return extra


def _path(path: Path) -> str:
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"path: expected a str or a path-like object of one, got {path!r}")
    return name


def _regular(path: str, *, exists: bool) -> str:
    """`path`, unless there is something else than a file: renaming over a device would take its place."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if exists:
            raise
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return path


def _named(error: TypeError | ValueError, where: str) -> TypeError | ValueError:
    """The error with the name of what it is about. (Some kinds of ValueError take other arguments than a message.)"""
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}{error}")


def _objects(target: Target) -> dict[str, Optimizer | BatchNorm]:
    if not isinstance(target, Mapping):
        if not isinstance(target, (Optimizer, BatchNorm)):
            raise TypeError(
                f"target: expected an optimizer, a BatchNorm or a dict of name -> those, got {type(target).__name__}"
            )
        return {"": target}
    names: dict[int, str] = {}
    for name, thing in target.items():
        if not isinstance(name, str):
            raise TypeError(f"target: expected names that are str, got {name!r}")
        if not isinstance(thing, (Optimizer, BatchNorm)):
            raise TypeError(f"target[{name!r}]: expected an optimizer or a BatchNorm, got {type(thing).__name__}")
        if id(thing) in names:
            raise ValueError(f"target[{name!r}]: is target[{names[id(thing)]!r}] once more")
        names[id(thing)] = name
    if not names:
        raise ValueError("target: it is empty")
    return dict(target)


def _kind(thing: Optimizer | BatchNorm) -> str:
    return "optimizer" if isinstance(thing, Optimizer) else "batch_norm"


# What is saved as a tree of JSON: arrays, tuples, dicts, schedules and numbers that JSON lacks are objects with one key
# that says which of those it is.


class _Writer:
    """Turns values into trees, and collects their arrays in `tensors`, each under its path.

    What is `extra` must come back as it is, and has no functions.
    """

    def __init__(self, tensors: Tensors, *, extra: bool = False) -> None:
        self._tensors = tensors
        self._extra = extra
        self._open: set[int] = set()

    def tree(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, (np.bool_, np.floating, np.str_)) or (isinstance(value, np.integer) and is_integer(value)):
            value = value.item()
        if type(value) is str:
            return _text(value, self._label(path))
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise ValueError(f"{self._label(path)}: an integer of more than {_MOST_BITS} bits cannot be stored")
        if value is None or type(value) in (bool, int):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if is_array(value):
            return {"array": self._array(to_host(value), path)}
        if callable(value) and not self._extra:
            return _function(value, self, path)
        if id(value) in self._open:
            raise ValueError(f"{self._label(path)}: contains itself")
        if len(path) > _MOST_LEVELS:
            raise ValueError(f"{self._label(path[:2])}: is nested more than {_MOST_LEVELS} levels deep")
        self._open.add(id(value))
        try:
            if type(value) is list:
                return [self.tree(item, (*path, k)) for k, item in enumerate(value)]
            if type(value) is tuple:
                return {"tuple": [self.tree(item, (*path, k)) for k, item in enumerate(value)]}
            if type(value) is dict:
                return self._dict(value, path)
        finally:
            self._open.remove(id(value))
        raise TypeError(f"{self._label(path)}: {type(value).__name__} cannot be stored in a checkpoint")

    def _dict(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        for key in value:
            _text(key if type(key) is str else "", self._label(path))
        if all(type(key) is str for key in value):
            return {"dict": {key: self.tree(item, (*path, key)) for key, item in value.items()}}
        for key in value:
            if not _is_key(key):
                raise TypeError(f"{self._label(path)}: the key {key!r} cannot be stored in a checkpoint")
        return {"items": [[self.tree(key, path), self.tree(item, (*path, key))] for key, item in value.items()]}

    def _array(self, value: npt.NDArray[Any], path: tuple[Any, ...]) -> list[Any]:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{self._label(path)}: a masked array cannot be stored in a checkpoint")
        if _name(value.dtype) not in _CODES:
            raise TypeError(f"{self._label(path)}: dtype {value.dtype} cannot be stored in a checkpoint")
        array = np.asarray(value, value.dtype.newbyteorder("="), order="C")
        name = ".".join(map(str, path))
        while name in self._tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
            name += "'"
        self._tensors[name] = array
        return [name, _checksum(array)]

    def _label(self, path: tuple[Any, ...]) -> str:
        """``a['b'][0]`` for what the caller named `a`."""
        if self._extra and len(path) > 1:
            return str(path[1]) + "".join(f"[{key!r}]" for key in path[2:])
        return ".".join(map(str, path))


def _text(value: str, label: str) -> str:
    """`value`, unless a part of it is half a character, which no file keeps."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{label}: the text {value!r} has surrogates, and cannot be stored in a checkpoint") from None
    return value


def _function(value: Any, writer: _Writer, path: tuple[Any, ...]) -> Any:
    if not _is_plain_schedule(value):
        return {"function": None}
    return {
        "schedule": type(value).__name__,
        "fields": {field.name: writer.tree(getattr(value, field.name), path) for field in fields(value)},
    }


@functools.cache
def _name(dtype: np.dtype[Any]) -> str:
    """NumPy spells it anew each time, in 3 us."""
    return str(dtype.name)


def _is_key(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_key, key))
    return key is None or type(key) in (bool, int, str) or (type(key) is float and math.isfinite(key))


def _is_plain_schedule(value: Any) -> bool:
    """Whether it is one of onepass.schedules, and so is what it multiplies."""
    while type(value) in _SCHEDULES.values():
        value = value.lr
        if isinstance(value, float):
            return True
    return False


def _checksum(array: npt.NDArray[Any]) -> str:
    """Of a C-contiguous array: its dtype, shape and bytes."""
    head = zlib.crc32(f"{_name(array.dtype)} {array.shape}".encode())
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data, head):08x}"


class _Reader:
    """Turns trees into values. Arrays are those of the file, and are taken from `left`."""

    def __init__(self, left: Tensors, *, extra: bool = False, copies: bool = False) -> None:
        self.left = left
        self._extra = extra
        self._copies = copies

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), None)
        content = tree.get(tag)
        if tag == "schedule" and len(tree) == 2:
            return self._schedule(content, tree.get("fields"))
        if len(tree) == 1:
            if tag == "dict" and isinstance(content, dict):
                return {key: self.value(item) for key, item in content.items()}
            if tag == "items" and isinstance(content, list):
                return self._items(content)
            if tag == "tuple" and isinstance(content, list):
                return tuple(self.value(item) for item in content)
            if tag == "array" and isinstance(content, list) and len(content) == 2:
                return self._array(*content)
            if tag == "float" and content in ("inf", "-inf", "nan"):
                return float(content)
            if tag == "function" and content is None and not self._extra:
                return OWN_FUNCTION
        raise ValueError(f"damaged: its contents hold {_short(tree)}")

    def _items(self, content: list[Any]) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for item in content:
            if not isinstance(item, list) or len(item) != 2:
                raise ValueError(f"damaged: its contents hold the item {_short(item)}")
            key = self.value(item[0])
            if not _is_key(key) or key in values:
                raise ValueError(f"damaged: its contents hold the key {_short(item[0])}")
            values[key] = self.value(item[1])
        return values

    def _schedule(self, name: Any, values: Any) -> Any:
        if not isinstance(name, str) or name not in _SCHEDULES or not isinstance(values, dict):
            raise ValueError(f"the schedule {_short(name)} is unknown; there are {', '.join(_SCHEDULES)}")
        kind = _SCHEDULES[name]
        given = entries(values, f"schedule {name}", [field.name for field in fields(kind)])
        return kind(**{key: self.value(item) for key, item in given.items()})

    def _array(self, name: Any, checksum: Any) -> npt.NDArray[Any]:
        array = self.left.pop(name, None) if isinstance(name, str) else None
        if array is None:
            raise ValueError(f"damaged: the tensor {_short(name)} is missing")
        if _checksum(array) != checksum:
            raise ValueError(f"damaged: the tensor {name!r} does not have its checksum")
        return array.copy() if self._copies else array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# The file


def _replace(path: str, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a file beside `path` and rename it when it is whole and on the disk."""
    from safetensors import SafetensorError, TensorSpec, serialize_file

    specs = {
        name: TensorSpec(dtype=_name(array.dtype), shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in tensors.items()
    }
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            # As the file has it, or any new one: the library's own are for the user alone.
            mode = os.stat(path if os.path.exists(path) else file.fileno()).st_mode
        try:
            serialize_file(specs, beside, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None
        with open(beside, "rb+") as file:
            os.chmod(beside, stat.S_IMODE(mode))
            _flush(file.fileno())
        try:
            _read(beside, copies=False)
        except ValueError as error:
            raise RuntimeError(f"{path}: an array changed while it was saved: {error}") from None
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name on the disk, too, where that can be asked for
        with contextlib.suppress(PermissionError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _flush(descriptor)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            finally:
                os.close(descriptor)


def _flush(descriptor: int) -> None:
    """To the disk itself: on macOS fsync leaves it to the disk when that is."""
    os.fsync(descriptor)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def _read(path: str, *, copies: bool = True) -> dict[str, Any]:
    """What a file holds, checked against all its checksums. Its arrays lie in it; `copies`: except for extra ones."""
    tensors, metadata = _mapped(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError("it is no checkpoint of onepass")
    version = metadata.get("format_version")
    if version != _VERSION:
        raise ValueError(f"format version {_short(version)} is unknown; this onepass reads version {_VERSION}")
    text = metadata.get("contents", "")
    if set(metadata) != {"format", "format_version", "contents", "crc32"}:
        raise ValueError("damaged: its metadata have other entries than a checkpoint's")
    if f"{zlib.crc32(text.encode()):08x}" != metadata["crc32"]:
        raise ValueError("damaged: its contents do not have their checksum")
    reader = _Reader(tensors)
    extra_reader = _Reader(tensors, extra=True, copies=copies)
    try:
        contents = entries(_json(text), "its contents", ("targets", "several", "extra", "onepass"))
        targets = contents["targets"]
        if not isinstance(targets, dict):
            raise ValueError(f"damaged: its contents hold the targets {_short(targets)}")
        read = {}
        for name, target in targets.items():
            entry = entries(target, "its contents", ("kind", "content"))
            read[name] = {"kind": entry["kind"], "content": reader.value(entry["content"])}
        extra = extra_reader.value(contents["extra"])
    except RecursionError:
        raise ValueError("damaged: its contents are nested too deeply") from None
    if tensors:
        raise ValueError(f"damaged: the tensor {_short(next(iter(tensors)))} belongs to nothing")
    if not isinstance(extra, dict):
        raise ValueError(f"damaged: its contents hold the extra {_short(extra)}")
    return {"targets": read, "several": flag(contents["several"], "damaged: several"), "extra": extra}


def _json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"damaged: its contents are no JSON ({error})") from None


def _mapped(path: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, in its mapped memory, and its metadata."""
    from safetensors import SafetensorError, safe_open

    while True:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise ValueError("damaged: it is empty")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            # The library judges the header, and tells of each tensor what it is but not where. There are no gaps.
            with safe_open(path, "numpy") as header:
                kinds = {name: header.get_slice(name) for name in header.offset_keys()}
                kinds = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in kinds.items()}
                metadata = header.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"damaged, or no checkpoint: {error}") from None
        if os.path.samestat(status, os.stat(path)):  # else it was replaced in between
            return _tensors_in(mapping, kinds), metadata


def _tensors_in(mapping: mmap.mmap, kinds: Mapping[str, tuple[str, list[int]]]) -> Tensors:
    dtypes = {code: bfloat16() if name == "bfloat16" else np.dtype(name) for name, code in _CODES.items()}
    for name, (code, _) in kinds.items():
        if code not in dtypes:
            raise ValueError(f"the tensor {_short(name)} is of type {code}, which no checkpoint holds")
    sizes = {name: dtypes[code].itemsize * math.prod(shape) for name, (code, shape) in kinds.items()}
    start = len(mapping) - sum(sizes.values())
    tensors = {}
    for name, (code, shape) in kinds.items():
        tensors[name] = np.ndarray(shape, dtypes[code], buffer=mapping, offset=start)
        start += sizes[name]
    return tensors
