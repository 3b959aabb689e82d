"""Parameters as one array, a sequence, a dict or a list of groups, and gradients that mirror them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


def is_sequence(value: Any) -> bool:
    """Lists and tuples. An array is one parameter, whatever its shape, and a generator is none."""
    return isinstance(value, (list, tuple))


@dataclass(frozen=True)
class Structure:
    """How parameters were given, so that gradients can be read, and new arrays returned, in the same form."""

    kind: Literal["array", "sequence", "dict", "groups"]
    size: int
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    def flatten(self, given: Any, name: str) -> Sequence[Any]:
        """The arrays of `given` in the order of the parameters; raises where it does not mirror them."""
        if self.kind == "sequence":
            if not is_sequence(given):
                raise TypeError(f"{name}: expected a list or tuple, as the parameters are, got {type(given).__name__}")
            if (count := len(given)) != self.size:  # asked once: another thread may change the list
                raise ValueError(f"{name}: {count} given for {self.size} parameters")
            return given  # type: ignore[no-any-return]
        if self.kind == "array":
            if is_sequence(given) or isinstance(given, Mapping):
                raise TypeError(f"{name}: expected one array, as the parameter is, got {type(given).__name__}")
            return (given,)
        if self.kind == "dict":
            if not isinstance(given, Mapping):
                raise TypeError(f"{name}: expected a dict, as the parameters are, got {type(given).__name__}")
            for key in self.keys:
                if key not in given:
                    raise ValueError(f"{name}: {key!r} is missing; pass None for a parameter without a gradient")
            if len(given) != self.size:
                known = set(self.keys)
                unknown = next(key for key in given if key not in known)
                raise ValueError(f"{name}: {unknown!r} is not the name of a parameter")
            return [given[key] for key in self.keys]
        if not is_sequence(given):
            raise TypeError(f"{name}: expected a list with one entry for each group, got {type(given).__name__}")
        if len(given) != len(self.children):
            raise ValueError(f"{name}: {len(given)} given for {len(self.children)} groups")
        flat: list[Any] = []
        for index, (child, part) in enumerate(zip(self.children, given, strict=True)):
            flat.extend(child.flatten(part, f"{name}[{index}]"))
        return flat

    def rebuild(self, flat: Sequence[Any]) -> Any:
        """The inverse of `flatten`."""
        if self.kind == "array":
            return flat[0]
        if self.kind == "sequence":
            return list(flat)
        if self.kind == "dict":
            return dict(zip(self.keys, flat, strict=True))
        parts, start = [], 0
        for child in self.children:
            parts.append(child.rebuild(flat[start : start + child.size]))
            start += child.size
        return parts

    def leaves(self, given: Any) -> list[Any]:
        """The arrays of `given`, which mirrors the parameters, in its own order."""
        if self.kind == "array":
            return [given]
        if self.kind == "groups":
            return [leaf for child, part in zip(self.children, given, strict=True) for leaf in child.leaves(part)]
        return list(given.values() if self.kind == "dict" else given)

    def paths(self) -> list[str]:
        """For each array its key or index, after that of its group."""
        if self.kind == "groups":
            return [f"{index}.{path}" for index, child in enumerate(self.children) for path in child.paths()]
        return [str(key) for key in (self.keys if self.kind == "dict" else range(self.size))]

    def names(self, prefix: str, member: str = "") -> list[str]:
        """What each array is called in messages: ``grads[3] ('fc1.weight')``.

        `member` is what leads from a group to its arrays.
        """
        if self.kind == "array":
            return [prefix]
        if self.kind == "sequence":
            return [f"{prefix}[{index}]" for index in range(self.size)]
        if self.kind == "dict":
            return [f"{prefix}[{index}] ({key!r})" for index, key in enumerate(self.keys)]
        return [name for index, child in enumerate(self.children) for name in child.names(f"{prefix}[{index}]{member}")]


def parse(params: Any, name: str) -> tuple[Structure, list[Any]]:
    """The structure and the arrays of parameters that are not a list of groups."""
    if isinstance(params, Mapping):
        return Structure("dict", len(params), tuple(params)), list(params.values())
    if is_sequence(params):
        return Structure("sequence", len(params)), list(params)
    if hasattr(params, "__next__"):
        raise TypeError(
            f"{name}: expected an array, a list, a dict or a list of groups, got a {type(params).__name__}; "
            f"wrap it in list()"
        )
    return Structure("array", 1), [params]


def parse_groups(params: Any) -> tuple[Structure, list[list[Any]], list[dict[str, Any]]]:
    """The structure, each group's arrays and each group's own hyper-parameters."""
    if not (is_sequence(params) and params and all(isinstance(entry, Mapping) for entry in params)):
        structure, arrays = parse(params, "params")
        if not arrays:
            raise ValueError("params: there are no parameters")
        return structure, [arrays], [{}]
    children, groups, overrides = [], [], []
    for index, entry in enumerate(params):
        if "params" not in entry:
            raise ValueError(f"params[{index}]: a group needs the key 'params'")
        child, arrays = parse(entry["params"], f"params[{index}]['params']")
        children.append(child)
        groups.append(arrays)
        overrides.append({key: value for key, value in entry.items() if key != "params"})
    if not any(groups):
        raise ValueError("params: there are no parameters")
    return Structure("groups", sum(map(len, groups)), children=tuple(children)), groups, overrides
