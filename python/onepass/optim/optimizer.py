"""The base of all optimizers: parameters, hyper-parameters, states, step counts. The arithmetic is in the kernels."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onepass import _cpu, devices
from onepass.integers import integer
from onepass.optim import hyper as hp
from onepass.optim.hyper import Hyper, LearningRate, ParamGroup
from onepass.optim.options import (
    Options,
    StepOptions,
    Unpack,
    compute_dtype,
    seed_number,
    split_options,
    step_options,
)
from onepass.optim.states import NewStates, fill, memory_order
from onepass.optim.structure import parse_groups
from onepass.state_dicts import (
    OWN_FUNCTION,
    Call,
    assignment,
    carry_out,
    count,
    entries,
    matching_array,
    same_scalar,
    scalar,
)


class SupportsDLPack(Protocol):
    """An array that can be used in place without a copy: a NumPy array, a torch CPU tensor, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


Array: TypeAlias = "npt.NDArray[Any] | SupportsDLPack"
Params: TypeAlias = "Array | Sequence[Array] | Mapping[str, Array] | Sequence[Mapping[str, Any]]"
Grads: TypeAlias = "Array | Sequence[Any] | Mapping[str, Any] | None"
Coefficients: TypeAlias = dict[str, float]
UnitNorm: TypeAlias = "tuple[float, tuple[int, ...]] | None"


# (coefficients, sign, l1, l2, decay, ema_decay, standard deviation of the noise, max_unit_norm), in float64. A plain
# tuple: a named one takes 0.2 us longer to make, a tenth of a small step.
Surrounded: TypeAlias = "tuple[Coefficients, float, float, float, float, float | None, float, UnitNorm]"

RULES: dict[str, Mapping[str, Any]] = {row["name"]: row for row in _cpu.registry() if not row["yardstick"]}

_NOT_GIVEN: Any = object()

_ENTRIES = (
    "optimizer",
    "param_groups",
    "state",
    "seed",
    "skipped",
    "accumulated",
    "ema_swapped",
    "rounding",
    "accumulate",
)


class Optimizer:
    r"""What all optimizers have in common. Use one of its subclasses.

    Parameters
    ----------
    params : array, sequence of arrays, dict of name -> array, or list of groups
        The arrays that :meth:`step` changes in place: NumPy arrays, or anything that exports ``__dlpack__`` on the CPU
        (a torch tensor), of dtype float32, float64, bfloat16 or float16 and any shape. Each must be writable and dense
        in memory (C, Fortran or any permuted order). A group is a dict ``{"params": ..., name: value, ...}`` whose
        hyper-parameters replace the ones given to the constructor for its own ``params``.
    grads : optional
        Gradient buffers that never change, bound once; then ``step()`` needs no argument.
    weight_decay : float, default 0
        Coupled (added to the gradient, times the parameter), or with `decoupled_weight_decay` apart from it.
    l1 : float, default 0
        Added to the gradient, times the parameter's sign.
    maximize : bool, default False
        Go up the gradient.
    ema_decay : float in [0, 1) or callable, optional, per group
        Keep a moving average of the parameters in :attr:`ema`: :math:`e = d e + (1 - d) p` with the new `p`, and
        :math:`e = p` at a parameter's first step. A callable gets the 1-based step count.
    max_unit_norm : (limit, axis), optional, per group
        After each update scale the weights that lead into a unit back to this Euclidean norm where they exceed it.
        `axis` (an int or a tuple) names the axes along which one unit's weights lie, as in :func:`numpy.linalg.norm`:
        0 for a matrix of shape (inputs, units), 1 for (units, inputs), (1, 2, 3) for a kernel (units, inputs, h, w).
    gradient_noise : (eta, gamma), optional, per group
        Add normal noise of variance :math:`\eta / (1 + t)^\gamma` to each element of the gradient, after clipping.
    mirror : arrays of bfloat16 or float16, optional
        Receive the new parameters, rounded to nearest. They mirror `params`; None for a parameter without one.
    accumulate : int, default 1
        Update at every `accumulate`-th call of :meth:`step`, with the mean of the gradients of all of them.
    seed : int, default 0
        Of the random numbers for `gradient_noise` and `rounding`, which are a function of the seed, a parameter's step
        count and position, and an element's position in memory. Optimizers of the same seed draw the same numbers.
    state_dtype : dtype, optional
        Of the states, where it is not the dtype in which steps are computed (float32, or float64 for such parameters).
    rounding : "nearest" or "stochastic", default "nearest"
        How parameters, states and averages are rounded that are stored in fewer bits than they are computed in.
        "stochastic" rounds up or down with the probability that makes the mean exact.
    master : "split", optional
        Keep what rounding takes from parameters of bfloat16 as a state (`remainder`, 16 bits), so that they train as
        if they were float32; :attr:`master` puts both together.
    state_alloc : callable, optional
        ``(name, shape, dtype) -> array``: where each state array (and average, and sum of gradients) lives, for states
        in a file (:class:`numpy.memmap`) or in shared memory. `name` is the parameter's key or index and the state's
        name, ``"fc1.weight.exp_avg"`` or ``"0.exp_avg"``. What it returns is a writable NumPy array of this shape and
        dtype, dense in memory, and is filled with the state's initial value (zeros that are there already are not
        written, so a sparse file stays sparse).

    Notes
    -----
    Everything beyond the update itself happens in the same pass over memory and costs no more than the bytes it adds.
    Parameter, gradient and states may be stored as float32, float32, float32; float32, bfloat16, float32; float32,
    float16, float32; float32, float32, bfloat16; bfloat16, bfloat16, float32; bfloat16, bfloat16, bfloat16; bfloat16,
    float32, float32; float16, float16, float32; float64, float64, float64.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument, before anything is changed.

    References
    ----------
    .. [1] A. Neelakantan et al., "Adding gradient noise improves learning for very deep networks", arXiv:1511.06807
       (2015): `gradient_noise`.
    .. [2] N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15 (2014),
       section 5.1: `max_unit_norm`.
    .. [3] J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the random numbers.
    """

    #: Hyper-parameters that have done their work when the constructor returns.
    _construction_only: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Params, grads: Grads, hyper: Mapping[str, Any], options: Options | None = None) -> None:
        structure, arrays, overrides = parse_groups(params)
        of_group, storage = split_options(options or {}, type(self).__name__)
        defaults = hp.checked({**hyper, **of_group})
        names = structure.names("params", "['params']")
        several = structure.kind == "groups"
        self._storage = storage
        mirrors = structure.flatten(storage.mirror, "mirror") if storage.mirror is not None else [None] * structure.size

        flat: list[Any] = []
        group_of: list[int] = []
        states: list[dict[str, npt.NDArray[Any]]] = []
        fills: list[tuple[npt.NDArray[Any], Any]] = []
        keys = structure.paths()
        if storage.state_alloc is not None and len(set(keys)) < len(keys):
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise ValueError(f"state_alloc: two parameters have the name {twice!r}, and would share their states")
        self._hyper: list[Hyper] = []
        self._dtypes: list[set[np.dtype[Any]]] = []
        self._ndims: list[set[int]] = []
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
            dtypes = {compute_dtype(array.dtype) for array in like}
            hp.require_representable(values, dtypes, prefix)
            start = self._initial_state(values)
            for array in like:
                _require_axes(values["max_unit_norm"], {array.ndim}, f"max_unit_norm of {names[len(flat)]}")
                new = NewStates(array, names[len(flat)], keys[len(flat)], storage)
                new.add(RULES[rule]["slots"], start, ema=values["ema_decay"] is not None)
                states.append(new.arrays)
                fills.extend(new.fills)
                flat.append(group[len(flat) - len(group_of)])
            group_of.extend([index] * len(group))
            self._hyper.append(values)
            self._dtypes.append(dtypes)
            self._ndims.append({array.ndim for array in like})
            self._rules.append(rule)

        self._structure = structure
        self._prepared: list[dict[str, Any]] | None = None  # hyper-parameters, when they were given to devices
        self._recipes: list[Callable[[int], Surrounded]] = [
            functools.partial(self.surround, values) for values in self._hyper
        ]
        self._flat = flat
        self._updater = _cpu.Updater(
            groups=self._rules,
            group_of=group_of,
            params=flat,
            slots=[
                tuple(state[slot] for slot in RULES[self._rules[index]]["slots"])
                for state, index in zip(states, group_of, strict=True)
            ],
            extras=[
                (state.get("ema"), mirror, state.get("remainder"), state.get("accumulator"))
                for state, mirror in zip(states, mirrors, strict=True)
            ],
            param_names=names,
            grad_names=structure.names("grads"),
            mirror_names=structure.names("mirror"),
            seed=storage.seed,
            stochastic=storage.stochastic,
            accumulate=storage.accumulate,
        )
        self._bound = None if grads is None else tuple(structure.flatten(grads, "grads"))
        self._updater.check(self._bound)
        for array, initial in fills:  # not before the check has shown that they lie in nobody's way
            fill(array, initial)
        self._state = tuple(MappingProxyType(state) for state in states)
        self._param_groups = tuple(
            # The check holds the class and not this optimizer, which is freed when its last user lets go of it.
            ParamGroup(tuple(group), values, functools.partial(self._check_changes, rule, dtypes, ndims))
            for group, values, rule, dtypes, ndims in zip(
                arrays, self._hyper, self._rules, self._dtypes, self._ndims, strict=True
            )
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
        """The recipe's coefficients with those of what surrounds the rule: see `Surrounded`."""
        lr = hyper["lr"]
        if callable(lr):
            lr = hp.learning_rate(lr(t), f"lr({t})")
        weight_decay = hyper["weight_decay"]
        l2, decay = weight_decay, 1.0
        if hyper["decoupled_weight_decay"]:
            l2, decay = 0.0, 1.0 - lr * weight_decay
        ema_decay = hyper["ema_decay"]
        if callable(ema_decay):
            ema_decay = hp.average_decay(ema_decay(t), f"ema_decay({t})")
        noise = hyper["gradient_noise"]
        return (
            cls.recipe(hyper, lr, t),
            -1.0 if hyper["maximize"] else 1.0,
            hyper["l1"],
            l2,
            decay,
            ema_decay,
            0.0 if noise is None else _noise_deviation(noise[0], noise[1], t),
            hyper["max_unit_norm"],
        )

    @classmethod
    def _initial_state(cls, hyper: Mapping[str, Any]) -> float:
        """The value of every state element before the first step."""
        return 0.0

    # Stepping

    def step(self, grads: Grads = _NOT_GIVEN, **options: Unpack[StepOptions]) -> None:
        r"""Update all parameters in place, in one pass over memory.

        Parameters
        ----------
        grads : mirrors `params`
            One array for one array, a sequence for a sequence, a dict for a dict, a list with one entry for each group
            for groups. Each gradient has its parameter's shape, and a dtype that goes with the parameter's (see
            :class:`Optimizer`); any strides are allowed (other than the parameter's are slower). ``None`` in the place
            of a gradient leaves that parameter, its states and its step count alone. May be left out if gradients were
            bound at construction.
        grad_scale : float > 0, default 1
            Multiplies the gradients, which are not written.
        max_grad_norm : float > 0, optional
            Clip by the norm of all gradients together: where it exceeds the limit, all are multiplied by limit / norm.
            A norm of NaN makes all NaN. ``inf`` only measures, see :attr:`grad_norm`.
        clip_norm : float > 0, optional
            The same for each gradient by its own norm.
        clip_value : float > 0, optional
            Clip each element to plus or minus this; NaN stays NaN. One of the three clippings at most.
        nonfinite : "propagate", "skip" or "raise", default "propagate"
            What to do if a gradient holds inf or NaN: "skip" changes no parameter, state or count, and counts in
            :attr:`skipped`; "raise" names the gradient.
        zero_grads : bool, default False
            Write zeros into the gradients when they have been read (after a skipped step too).

        Raises
        ------
        TypeError, ValueError
            With the name of the argument: wrong structure, shape, dtype, layout, arrays that overlap, a schedule that
            returns no number. Parameters, states and step counts are as before.
        FloatingPointError
            A gradient is not finite, and ``nonfinite="raise"``. Nothing has changed.
        RuntimeError
            If this optimizer is in the middle of a step already (another thread, or a schedule that calls `step`), or
            if parameters and averages are exchanged (:meth:`swap_ema`).
        """
        if grads is _NOT_GIVEN:
            if self._bound is None:
                raise TypeError("grads: step() needs gradients, because none were bound at construction")
            flat: Sequence[Any] = self._bound
        else:
            flat = self._structure.flatten(grads, "grads")
        if self._prepared is not None and self._prepared != self._hyper:
            raise RuntimeError("param_groups: were changed after prepare_capture(); call that again")
        self._updater.step(flat, self._recipes, step_options(options, "step()"), flat is self._bound)

    def prepare_capture(self, steps: int) -> None:
        """Make the coming steps such that a CUDA graph can capture them.

        A captured step is launched without Python, so it cannot ask for its count, nor a schedule for the learning
        rate. This puts the coefficients of the next `steps` updates, as the hyper-parameters are now, into the devices'
        memory (128 bytes for each, and each group), and leaves the counts to the devices: each step, captured or not,
        takes the coefficients of the count that it finds, to the last bit those that the host would have computed,
        and advances it. A step beyond the last of them changes nothing, and the next call that looks at counts
        (:attr:`step_counts`, :meth:`state_dict`, this one) raises.

        Parameters
        ----------
        steps : int
            How many updates shall be possible from now on, 1 to 2**24. 0 takes the counts back to the host; graphs
            that were captured before must not be launched any more then, nor after another call of this,
            :meth:`load_state_dict` or :func:`onepass.load`, nor when the optimizer is gone.

        Raises
        ------
        TypeError, ValueError
            If the parameters are on the host, or with ``accumulate`` (a sum of gradients is made by the host's count).
        RuntimeError
            If steps were left out, see above (the counts are back at the host then, and those of the steps that were
            done), or in the middle of a step.

        Notes
        -----
        Waits for the devices. Hyper-parameters that are changed later count from the next call on; a step that is not
        captured raises until then.
        """
        steps = integer(steps, "steps", 0, 2**24)
        self._updater.prepare_capture(self._recipes, steps)
        self._prepared = [dict(values) for values in self._hyper] if steps else None

    @property
    def grad_norm(self) -> Any:
        """The norm of all gradients of the last step together, after scaling and before clipping.

        None if it was not measured: the step neither clipped by a norm nor looked for what is not finite, or it only
        added to a sum of gradients. A float; on a CUDA device a CuPy array without dimensions, which the next step that
        measures overwrites (``float(opt.grad_norm)`` waits for it).
        """
        return self._updater.grad_norm

    @property
    def skipped(self) -> int:
        """How many steps ``nonfinite="skip"`` has skipped. Waits for CUDA devices, which decide that."""
        return self._updater.skipped

    @property
    def accumulated(self) -> int:
        """How many gradients are in the sum that the next update will use; see `accumulate`."""
        return self._updater.accumulated

    # Averages and masters

    @property
    def ema(self) -> Any:
        """The moving averages, in the structure of the parameters: None for those of groups without `ema_decay`.

        They are the arrays in :attr:`state`, of the parameters' dtype (float32 with ``master="split"``). None if no
        group has averages.
        """
        arrays = [state.get("ema") for state in self._state]
        return None if all(array is None for array in arrays) else self._structure.rebuild(arrays)

    def swap_ema(self) -> None:
        """Exchange parameters and averages, in place; `mirror` follows. A second call exchanges them back, exactly.

        Parameters that have had no step yet have no average, and are left alone.

        Raises
        ------
        RuntimeError
            If there are no averages, or in the middle of a step.
        """
        if all("ema" not in state for state in self._state):
            raise RuntimeError("there are no averages; pass ema_decay= to the constructor")
        self._updater.swap_ema()

    @property
    def master(self) -> Any:
        """With ``master="split"`` the float32 values of the parameters, as new arrays in their structure; else None."""
        if not self._storage.split:
            return None
        with self._updater:
            return self._structure.rebuild([self._master_of(index) for index in range(len(self._flat))])

    def _master_of(self, index: int) -> npt.NDArray[Any]:
        name = self._structure.names("params", "['params']")[index]
        high = _cpu.as_ndarray(self._flat[index], name)
        joined = _joined(devices.to_host(high), devices.to_host(self._state[index]["remainder"]))
        master: npt.NDArray[Any] = devices.like(high, joined)
        return master

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
        carry_out([(values.update, ({"lr": rate},)) for values, rate in zip(self._hyper, rates, strict=True)])

    @classmethod
    def _check_changes(
        cls, rule: str, dtypes: set[np.dtype[Any]], ndims: set[int], current: Hyper, changes: Hyper
    ) -> Hyper:
        for name in changes:
            if name in cls._construction_only:
                raise ValueError(f"{name}: is only read when the optimizer is made, and cannot be changed later")
        values = hp.checked({**current, **changes})
        if cls.rule(values) != rule or (values["ema_decay"] is None) != (current["ema_decay"] is None):
            raise ValueError(f"{', '.join(changes)}: decides which states exist, and cannot be changed later")
        hp.require_representable(values, dtypes)
        _require_axes(values["max_unit_norm"], ndims, "max_unit_norm")
        return values

    # State

    @property
    def state(self) -> tuple[Mapping[str, npt.NDArray[Any]], ...]:
        """For each parameter, in order, its state arrays by name. Writing into an array counts at the next step."""
        return self._state

    @property
    def step_counts(self) -> tuple[int, ...]:
        """For each parameter, in order, how many gradients it has received.

        Waits for CUDA devices if these count: after a step with ``nonfinite="skip"``, or :meth:`prepare_capture`.
        """
        return tuple(self._updater.counts)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that :meth:`load_state_dict` restores exactly.

        Returns
        -------
        dict
            ``{"optimizer": name, "param_groups": [{"params": [indices], name: value, ...}], "state": {index: {"step":
            count, name: array, ...}}, "seed": int, "skipped": int, "accumulated": int, "ema_swapped": bool,
            "rounding": str, "accumulate": int}``. The last two belong to the optimizer and must match at load. With
            `accumulate` each state has "received" too: its gradients in the sum. Arrays are copies. Parameters are not
            part of it; :func:`onepass.save` writes both.
        """
        with self._updater:
            snapshot = self._snapshot()
            for entry in snapshot["state"].values():
                for name, value in entry.items():
                    if devices.is_array(value):
                        entry[name] = value.copy(order="K")
            return snapshot

    def _snapshot(self) -> dict[str, Any]:
        """What `state_dict` returns, with the arrays themselves; for as long as no step can begin."""
        groups: list[dict[str, Any]] = []
        start = 0
        for group, values in zip(self._param_groups, self._hyper, strict=True):
            stop = start + len(group["params"])
            groups.append({"params": list(range(start, stop)), **values})
            start = stop
        counts, received = self._updater.counts, self._updater.received
        return {
            "optimizer": type(self).__name__,
            "param_groups": groups,
            "state": {
                index: {
                    "step": counts[index],
                    **({"received": received[index]} if self._storage.accumulate > 1 else {}),
                    **arrays,
                }
                for index, arrays in enumerate(self._state)
            },
            "seed": self._updater.seed,
            "skipped": self._updater.skipped,
            "accumulated": self._updater.accumulated,
            "ema_swapped": self._updater.swapped,
            "rounding": "stochastic" if self._storage.stochastic else "nearest",
            "accumulate": self._storage.accumulate,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore hyper-parameters, step counts and state arrays (in place) from a :meth:`state_dict`.

        An interrupt finds all of it done or nothing.

        Raises
        ------
        TypeError, ValueError
            If it is of another optimizer, structure, shape or dtype, or holds values out of range. Nothing has changed
            then.
        """
        with self._updater:
            carry_out(self._restoring(state_dict))

    def _restoring(self, state_dict: Mapping[str, Any]) -> list[Call]:
        """What has to be done to restore a snapshot, which has been checked; none of it can fail."""
        groups = self._read_groups(entries(state_dict, "state_dict", _ENTRIES))
        counts, received, copies = self._read_state(state_dict["state"])
        seed = seed_number(scalar(state_dict["seed"]))
        skipped = count(state_dict["skipped"], "skipped")
        for name, own in (
            ("rounding", "stochastic" if self._storage.stochastic else "nearest"),
            ("accumulate", self._storage.accumulate),
        ):
            saved = scalar(state_dict[name])
            if not same_scalar(saved, own):
                raise ValueError(f"{name}: the state is of {saved!r}, and this optimizer has {own!r}")
        accumulated = integer(scalar(state_dict["accumulated"]), "accumulated", 0, self._storage.accumulate - 1)
        for index, number in enumerate(received):
            integer(number, f"state[{index}]['received']", 0, accumulated)
        swapped = hp.flag(scalar(state_dict["ema_swapped"]), "ema_swapped")
        if swapped and all("ema" not in state for state in self._state):
            raise ValueError("ema_swapped: is True, and this optimizer keeps no averages")
        calls: list[Call] = [(self._updater.writes, ())]
        calls += [assignment(array, value) for array, value in copies]
        calls += [(values.update, (loaded,)) for values, loaded in zip(self._hyper, groups, strict=True)]
        calls.append((self._updater.restore, (counts, received, accumulated, seed, skipped, swapped)))
        calls.append((self.__dict__.__setitem__, ("_prepared", None)))
        return calls

    # Checkpoints: see onepass.checkpoint

    @property
    def _turn(self) -> _cpu.Updater:
        return self._updater

    def _saved(self) -> dict[str, Any]:
        params = self._arrays()
        orders = {index: order for index, array in enumerate(params) if (order := memory_order(array))}
        return {"params": self._structure.rebuild(params), "memory_order": orders, **self._snapshot()}

    def _arrays(self) -> list[npt.NDArray[Any]]:
        names = self._structure.names("params", "['params']")
        return [_cpu.as_ndarray(array, name) for array, name in zip(self._flat, names, strict=True)]

    def _loading(self, saved: Mapping[str, Any]) -> list[Call]:
        given = dict(entries(saved, "the checkpoint", ("params", "memory_order", *_ENTRIES)))
        params, orders = given.pop("params"), given.pop("memory_order")
        flat = self._structure.flatten(params, "params")
        if not all(a is b for a, b in zip(flat, self._structure.leaves(params), strict=True)):
            raise ValueError("params: their names are in another order than this optimizer's")
        names = self._structure.names("params")
        arrays = self._arrays()
        calls = [
            assignment(array, matching_array(value, array, name))
            for array, value, name in zip(arrays, flat, names, strict=True)
        ]
        for index, (array, name) in enumerate(zip(arrays, names, strict=True)):
            order = orders.get(index, ()) if isinstance(orders, dict) else None
            if order != memory_order(array):
                raise ValueError(
                    f"{name}: lies in another memory order than when it was saved, and norms and random numbers follow "
                    f"that; its axes from the slowest to the fastest were {order or 'those of C order'!r}"
                )
        if self._storage.mirror is not None:
            self._updater.show(tries=True)
            calls.append((self._updater.show, (False,)))
        groups = given["param_groups"]
        groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        for index, (group, values) in enumerate(zip(groups, self._hyper, strict=False)):
            for name in [name for name, value in group.items() if value is OWN_FUNCTION]:
                if not callable(values.get(name)):
                    raise ValueError(
                        f"param_groups[{index}][{name!r}]: was a function of the step count, which is in no file; make "
                        f"the optimizer with one"
                    )
                group[name] = values[name]
        return self._restoring(given) + calls

    def _read_state(self, given: Any) -> tuple[list[int], list[int], list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
        saved = entries(given, "state", range(len(self._flat)))
        summed = ("received",) if self._storage.accumulate > 1 else ()
        own = sorted(
            _extent(array) for arrays in self._state for array in arrays.values() if isinstance(array, np.ndarray)
        )
        counts: list[int] = []
        received: list[int] = []
        copies: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for index, arrays in enumerate(self._state):
            entry = entries(saved[index], f"state[{index}]", ("step", *summed, *arrays))
            counts.append(count(entry["step"], f"state[{index}]['step']"))
            received.append(count(entry["received"], f"state[{index}]['received']") if summed else 0)
            for name, array in arrays.items():
                value = matching_array(entry[name], array, f"state[{index}][{name!r}]")
                # What lies in this optimizer's own arrays may be overwritten before it is read.
                copies.append((array, value.copy() if _meets(_extent(value), own) else value))
        return counts, received, copies

    def _read_groups(self, state_dict: Mapping[str, Any]) -> list[Hyper]:
        name = type(self).__name__
        if not same_scalar(scalar(state_dict["optimizer"]), name):
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
            if (
                not isinstance(given, (list, tuple))
                or len(given) != len(members)
                or not all(map(same_scalar, given, members))
            ):
                raise ValueError(f"{label}['params']: expected {members}")
            loaded = hp.checked(entry, label + "['{}']")
            if (loaded["ema_decay"] is None) != (values["ema_decay"] is None):
                raise ValueError(f"{label}['ema_decay']: decides which states exist, and cannot be changed later")
            if self.rule(loaded) != self._rules[index]:
                raise ValueError(f"{label}: needs the states of {self.rule(loaded)}, not of {self._rules[index]}")
            hp.require_representable(loaded, self._dtypes[index], label + "['{}']")
            _require_axes(loaded["max_unit_norm"], self._ndims[index], f"{label}['max_unit_norm']")
            groups.append(loaded)
        return groups

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, because it updates arrays of its caller; "
            f"make a new one and load the state_dict()"
        )

    def __repr__(self) -> str:
        groups = ", ".join(
            "{" + ", ".join(f"{name}={value!r}" for name, value in hp.shown(values)) + "}" for values in self._hyper
        )
        return f"{type(self).__name__}({len(self._flat)} parameters, {groups})"


def _require_axes(unit_norm: UnitNorm, ndims: set[int], label: str) -> None:
    axes = () if unit_norm is None else unit_norm[1]
    for ndim in ndims:
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(f"{label}: needs axis {axis} of a parameter of {ndim} dimensions")
        if len({axis % ndim for axis in axes}) < len(axes):
            raise ValueError(f"{label}: names an axis of a parameter of {ndim} dimensions twice")


def _noise_deviation(eta: float, gamma: float, t: int) -> float:
    """The root of eta / (1 + t)**gamma; 0 where the power is beyond the range of float64."""
    try:
        return math.sqrt(eta / (1.0 + t) ** gamma)
    except OverflowError:
        return 0.0


def _joined(high: npt.NDArray[Any], low: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The float32 numbers of split ones."""
    upper = high.view(np.uint16)
    magnitude, missing = upper & 0x7FFF, low.view(np.int16)
    alone = (magnitude == 0) | ((magnitude == 0x7F80) & (missing > 0))  # somebody wrote a zero or an infinity
    bits = (upper.astype(np.uint32) << 16) + np.where(alone, 0, missing).astype(np.int32).view(np.uint32)
    return bits.view(np.float32)


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
