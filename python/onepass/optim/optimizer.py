"""The base of all optimizers: parameters, hyper-parameters, states, step counts. The arithmetic is in the kernels."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onepass import _cpu
from onepass.optim import hyper as hp
from onepass.optim.hyper import Hyper, LearningRate, ParamGroup
from onepass.optim.structure import parse_groups
from onepass.state_dicts import count, entries, matching_array


class SupportsDLPack(Protocol):
    """An array that can be used in place without a copy: a NumPy array, a torch CPU tensor, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


Array: TypeAlias = "npt.NDArray[Any] | SupportsDLPack"
Params: TypeAlias = "Array | Sequence[Array] | Mapping[str, Array] | Sequence[Mapping[str, Any]]"
Grads: TypeAlias = "Array | Sequence[Any] | Mapping[str, Any] | None"
Coefficients: TypeAlias = dict[str, float]
Surrounded: TypeAlias = tuple[Coefficients, float, float, float, float]

RULES: dict[str, Mapping[str, Any]] = {row["name"]: row for row in _cpu.registry() if not row["yardstick"]}

_NOT_GIVEN: Any = object()


class Optimizer:
    """What all optimizers have in common. Use one of its subclasses.

    Parameters
    ----------
    params : array, sequence of arrays, dict of name -> array, or list of groups
        The arrays that :meth:`step` changes in place: NumPy arrays, or anything that exports ``__dlpack__`` on the CPU
        (a torch tensor), of dtype float32 or float64 and any shape. Each must be writable and dense in memory (C,
        Fortran or any permuted order). A group is a dict ``{"params": ..., name: value, ...}`` whose hyper-parameters
        replace the ones given to the constructor for its own ``params``.
    grads : optional
        Gradient buffers that never change, bound once; then ``step()`` needs no argument.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument, before anything is changed.
    """

    #: Hyper-parameters that have done their work when the constructor returns.
    _construction_only: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Params, grads: Grads, hyper: Mapping[str, Any]) -> None:
        structure, arrays, overrides = parse_groups(params)
        defaults = hp.checked(hyper)
        names = structure.names("params", "['params']")
        several = structure.kind == "groups"

        flat: list[Any] = []
        group_of: list[int] = []
        states: list[dict[str, npt.NDArray[Any]]] = []
        self._hyper: list[Hyper] = []
        self._dtypes: list[set[np.dtype[Any]]] = []
        self._rules: list[str] = []
        for index, (group, own) in enumerate(zip(arrays, overrides, strict=True)):
            prefix = f"params[{index}]['{{}}']" if several else "{}"
            for name in own:
                if name not in defaults:
                    raise ValueError(
                        f"params[{index}]: {name!r} is not a hyper-parameter of {type(self).__name__}; "
                        f"there are {', '.join(defaults)}"
                    )
            values = hp.checked({**defaults, **own}, prefix)
            rule = self.rule(values)
            if rule not in RULES:
                raise TypeError(f"{type(self).__name__}.rule() gave {rule!r}; the rules are {', '.join(RULES)}")
            like = [_cpu.as_ndarray(array, names[len(flat) + k]) for k, array in enumerate(group)]
            dtypes = {array.dtype for array in like}
            hp.require_representable(values, dtypes, prefix)
            slots, start = RULES[rule]["slots"], self._initial_state(values)
            states.extend({name: _cpu.state_like(array, start) for name in slots} for array in like)
            group_of.extend([index] * len(group))
            flat.extend(group)
            self._hyper.append(values)
            self._dtypes.append(dtypes)
            self._rules.append(rule)

        self._structure = structure
        self._recipes: list[Callable[[int], Surrounded]] = [
            functools.partial(self.surround, values) for values in self._hyper
        ]
        self._flat = flat
        self._updater = _cpu.Updater(
            groups=self._rules,
            group_of=group_of,
            params=flat,
            slots=[tuple(state.values()) for state in states],
            param_names=names,
            grad_names=structure.names("grads"),
        )
        self._bound = None if grads is None else tuple(structure.flatten(grads, "grads"))
        self._updater.check(self._bound)
        self._state = tuple(MappingProxyType(state) for state in states)
        self._param_groups = tuple(
            # The check holds the class and not this optimizer, which is freed when its last user lets go of it.
            ParamGroup(tuple(group), values, functools.partial(self._check_changes, rule, dtypes))
            for group, values, rule, dtypes in zip(arrays, self._hyper, self._rules, self._dtypes, strict=True)
        )

    # What a subclass says of itself

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        """The name of the kernel rule that these hyper-parameters need."""
        raise TypeError(f"{cls.__name__} is the base of the optimizers; use one of them")

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        """The rule's coefficients, in float64, for the `t`-th gradient of a parameter at learning rate `lr`."""
        raise TypeError(f"{cls.__name__} is the base of the optimizers; use one of them")

    @classmethod
    def surround(cls, hyper: Mapping[str, Any], t: int) -> Surrounded:
        """The recipe's coefficients with what surrounds every rule: gradient scale, L1, L2, decay."""
        lr = hyper["lr"]
        if callable(lr):
            lr = hp.learning_rate(lr(t), f"lr({t})")
        weight_decay = hyper["weight_decay"]
        l2, decay = weight_decay, 1.0
        if hyper["decoupled_weight_decay"]:
            l2, decay = 0.0, 1.0 - lr * weight_decay
        return cls.recipe(hyper, lr, t), -1.0 if hyper["maximize"] else 1.0, hyper["l1"], l2, decay

    @classmethod
    def _initial_state(cls, hyper: Mapping[str, Any]) -> float:
        """The value of every state element before the first step."""
        return 0.0

    # Stepping

    def step(self, grads: Grads = _NOT_GIVEN) -> None:
        """Update all parameters in place, in one pass over memory.

        Parameters
        ----------
        grads : mirrors `params`
            One array for one array, a sequence for a sequence, a dict for a dict, a list with one entry for each group
            for groups. Each gradient has its parameter's shape and dtype; any strides are allowed (other than the
            parameter's are slower). ``None`` in the place of a gradient leaves that parameter, its states and its step
            count alone. May be left out if gradients were bound at construction.

        Raises
        ------
        TypeError, ValueError
            With the name of the argument: wrong structure, shape, dtype, layout, arrays that overlap, a schedule that
            returns no number. Parameters, states and step counts are as before.
        RuntimeError
            If this optimizer is in the middle of a step already (another thread, or a schedule that calls `step`).
        """
        if grads is _NOT_GIVEN:
            if self._bound is None:
                raise TypeError("grads: step() needs gradients, because none were bound at construction")
            self._updater.step(self._bound, self._recipes)
        else:
            self._updater.step(self._structure.flatten(grads, "grads"), self._recipes)

    # Hyper-parameters

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """One mapping for each group (one in all, if no groups were given); see :class:`ParamGroup`."""
        return self._param_groups

    @property
    def lr(self) -> Any:
        """The learning rate (a number or a schedule) of all groups; a list where they differ.

        Assigning one sets it for all groups; assigning a list with one for each group sets each.
        """
        rates = [values["lr"] for values in self._hyper]
        first = rates[0]
        same = all(rate is first or (isinstance(rate, float) and rate == first) for rate in rates)
        return first if same else rates

    @lr.setter
    def lr(self, value: LearningRate | Sequence[LearningRate]) -> None:
        given = list(value) if isinstance(value, (list, tuple)) else [value] * len(self._hyper)
        if len(given) != len(self._hyper):
            raise ValueError(f"lr: {len(given)} given for {len(self._hyper)} groups")
        rates = [hp.checked({"lr": rate})["lr"] for rate in given]
        for values, rate in zip(self._hyper, rates, strict=True):
            values["lr"] = rate

    @classmethod
    def _check_changes(cls, rule: str, dtypes: set[np.dtype[Any]], current: Hyper, changes: Hyper) -> Hyper:
        for name in changes:
            if name in cls._construction_only:
                raise ValueError(f"{name}: is only read when the optimizer is made, and cannot be changed later")
        values = hp.checked({**current, **changes})
        if cls.rule(values) != rule:
            raise ValueError(f"{', '.join(changes)}: decides which states exist, and cannot be changed later")
        hp.require_representable(values, dtypes)
        return values

    # State

    @property
    def state(self) -> tuple[Mapping[str, npt.NDArray[Any]], ...]:
        """For each parameter, in order, its state arrays by name. Writing into an array counts at the next step."""
        return self._state

    @property
    def step_counts(self) -> tuple[int, ...]:
        """For each parameter, in order, how many gradients it has received."""
        return tuple(self._updater.counts)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that :meth:`load_state_dict` restores exactly.

        Returns
        -------
        dict
            ``{"optimizer": name, "param_groups": [{"params": [indices], name: value, ...}], "state": {index: {"step":
            count, name: array, ...}}}``. Arrays are copies. Parameters are not part of it.
        """
        with self._updater:
            groups: list[dict[str, Any]] = []
            start = 0
            for group, values in zip(self._param_groups, self._hyper, strict=True):
                stop = start + len(group["params"])
                groups.append({"params": list(range(start, stop)), **values})
                start = stop
            counts = self._updater.counts
            return {
                "optimizer": type(self).__name__,
                "param_groups": groups,
                "state": {
                    index: {"step": counts[index], **{name: array.copy(order="K") for name, array in arrays.items()}}
                    for index, arrays in enumerate(self._state)
                },
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore hyper-parameters, step counts and state arrays (in place) from a :meth:`state_dict`.

        Raises
        ------
        TypeError, ValueError
            If it is of another optimizer, structure, shape or dtype, or holds values out of range. Nothing has changed
            then.
        """
        with self._updater:
            groups = self._read_groups(entries(state_dict, "state_dict", ("optimizer", "param_groups", "state")))
            counts, copies = self._read_state(state_dict["state"])
            # From here on nothing can fail.
            self._updater.counts = counts
            for array, value in copies:
                np.copyto(array, value)
            for values, loaded in zip(self._hyper, groups, strict=True):
                values.update(loaded)

    def _read_state(self, given: Any) -> tuple[list[int], list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
        saved = entries(given, "state", range(len(self._flat)))
        own = sorted(_extent(array) for arrays in self._state for array in arrays.values())
        counts: list[int] = []
        copies: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for index, arrays in enumerate(self._state):
            entry = entries(saved[index], f"state[{index}]", ("step", *arrays))
            counts.append(count(entry["step"], f"state[{index}]['step']"))
            for name, array in arrays.items():
                value = matching_array(entry[name], array, f"state[{index}][{name!r}]")
                # What lies in this optimizer's own arrays may be overwritten before it is read.
                copies.append((array, value.copy() if _meets(_extent(value), own) else value))
        return counts, copies

    def _read_groups(self, state_dict: Mapping[str, Any]) -> list[Hyper]:
        name = type(self).__name__
        if state_dict["optimizer"] != name:
            raise ValueError(f"optimizer: the state is of {state_dict['optimizer']!r}, not of {name!r}")
        saved = state_dict["param_groups"]
        if not isinstance(saved, (list, tuple)) or len(saved) != len(self._hyper):
            raise ValueError(f"param_groups: expected a list of {len(self._hyper)} groups")
        groups: list[Hyper] = []
        start = 0
        for index, (group, values) in enumerate(zip(self._param_groups, self._hyper, strict=True)):
            label = f"param_groups[{index}]"
            entry = dict(entries(saved[index], label, ("params", *values)))
            members = list(range(start, start + len(group["params"])))
            start += len(members)
            given = entry.pop("params")
            if not isinstance(given, (list, tuple)) or list(given) != members:
                raise ValueError(f"{label}['params']: expected {members}")
            loaded = hp.checked(entry, label + "['{}']")
            if self.rule(loaded) != self._rules[index]:
                raise ValueError(f"{label}: needs the states of {self.rule(loaded)}, not of {self._rules[index]}")
            hp.require_representable(loaded, self._dtypes[index], label + "['{}']")
            groups.append(loaded)
        return groups

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, because it updates arrays of its caller; "
            f"make a new one and load the state_dict()"
        )

    def __repr__(self) -> str:
        groups = ", ".join(
            "{" + ", ".join(f"{name}={value!r}" for name, value in values.items()) + "}" for values in self._hyper
        )
        return f"{type(self).__name__}({len(self._flat)} parameters, {groups})"


def _extent(array: npt.NDArray[Any]) -> tuple[int, int]:
    """The addresses of an array's first byte and of the one behind its last."""
    low = high = array.__array_interface__["data"][0]
    if array.size == 0:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high + array.itemsize


def _meets(extent: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    """Whether an extent overlaps one of `others`, which are sorted and disjoint."""
    at = bisect.bisect_left(others, (extent[1],))
    return at > 0 and others[at - 1][1] > extent[0] and extent[0] < extent[1]
