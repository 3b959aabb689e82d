"""The peers of our optimizers, all of them in one place: how each is called there, and how it is at its best.

Everybody works on the same parameters and gradients, with the same number of threads, unless it is said here.

* **torch** takes NumPy's arrays as they are. ``fused`` is one kernel for all tensors where there is one, ``foreach`` a
  list of operations over all tensors, ``for-loop`` the same for one tensor after the other, ``compiled`` is
  ``torch.compile(optimizer.step)`` over ``foreach``, for exactly these shapes. It compiles before the timing, and it is
  an error if it compiles again. Rates are numbers that do not change, which is what it likes best.
* **DeepSpeed** compiles its kernels for this processor, on first use, which takes some minutes. It has Adam, AdamW,
  Adagrad and Lion for the CPU. Of Lion we have no counterpart.
* **Optax** runs under ``jax.jit`` with parameters and states donated, so that it may update in place, and reads the
  gradients where they are. Parameters are its own: XLA does not write into memory of others. XLA has as many threads as
  ``NPROC`` says when it starts, and keeps them. A call is over when its results are there (``block_until_ready``), and
  is made without a thread of its own (``jax_cpu_enable_async_dispatch``), because that is quicker then.
* **NumPy** has one thread. ``NumPy`` is the formula as one writes it, ``NumPy in place`` (Adam, AdamW) does without
  temporary arrays.

Who writes into the gradients is not measured, because the next step would be another one: torch's ``foreach`` with
Nesterov's momentum does, and DeepSpeed's Adagrad, to a tensor's last elements if their number is no multiple of 128.

Parameters, gradients and states come from NumPy, which asks for huge pages, begin at a cache line, and every page of
them has been touched. The peers of one comparison share one set of states, as far as they take states from outside.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy_formulas
from arrays import (
    CHECKED_STEPS,
    Array,
    Data,
    Shape,
    fill_gradients,
    make_data,
    require_close,
    require_moved,
    three_steps,
)
from numpy_formulas import LR, WEIGHT_DECAY, Formula, NumpyAdamInPlace, NumpyFormula

import method
import onepass
from method import Contender, Plan, Row
from suite import OURS, Bench, CheckError, Step, load_torch

TOLERANCE = 1e-4
MOST_COMPILED = 200  # tensors; torch.compile takes minutes for 1000, and hours for 10,000
MOST_COMPILED_SETS = 16  # each is compiled for itself
MOST_TRACED = 1000  # tensors; XLA compiles 10,000 for minutes, too


class MissingError(Exception):
    """A peer that cannot be measured here, and why."""


# --- The same optimizer everywhere ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptaxTwin:
    """What an optimizer is called in Optax. `ours`: what makes the same steps, if its formula differs from torch's."""

    make: Callable[[Any], Any]
    ours: Callable[..., onepass.Optimizer] | None = None


@dataclass(frozen=True)
class Pair:
    """The same optimizer here and elsewhere; `options`, `states` (in the order of ours) and `scalars` are torch's.

    `rewound`: what is written into states, by name, before each sample.
    """

    name: str
    ours: Callable[..., onepass.Optimizer]
    torch: str
    states: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=lambda: {"step": 0.0})
    fused: bool = True
    numpy: Formula | None = None
    weight_decay: float = 0.0
    optax: OptaxTwin | None = None
    deepspeed: tuple[str, Mapping[str, Any]] | None = None
    rewound: Mapping[str, float] = field(default_factory=dict)


def _momentum(name: str, ours: Callable[..., onepass.Optimizer], formula: Formula, nesterov: bool) -> Pair:
    return Pair(
        name,
        functools.partial(ours, momentum=0.9, lr_in_velocity=False),
        "SGD",
        ("momentum_buffer",),
        {"momentum": 0.9, "nesterov": nesterov},
        {},
        numpy=formula,
        optax=OptaxTwin(lambda optax: optax.sgd(LR, momentum=0.9, nesterov=nesterov)),
    )


FUSED_PAIRS = (
    Pair("SGD", onepass.SGD, "SGD", (), {}, {}, numpy=numpy_formulas.sgd, optax=OptaxTwin(lambda optax: optax.sgd(LR))),
    _momentum("Momentum", onepass.Momentum, numpy_formulas.momentum, False),
    Pair(
        "Adam",
        onepass.Adam,
        "Adam",
        ("exp_avg", "exp_avg_sq"),
        numpy=numpy_formulas.adam,
        optax=OptaxTwin(lambda optax: optax.adam(LR)),
        deepspeed=("adam", {"adamw_mode": False}),
    ),
    Pair(
        "AMSGrad",
        functools.partial(onepass.Adam, amsgrad=True),
        "Adam",
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        {"amsgrad": True},
        numpy=numpy_formulas.amsgrad,
        optax=OptaxTwin(
            lambda optax: optax.amsgrad(LR), functools.partial(onepass.Adam, amsgrad=True, max_of_corrected=True)
        ),
    ),
    Pair(
        "AdaGrad",
        onepass.AdaGrad,
        "Adagrad",
        ("sum",),
        numpy=numpy_formulas.adagrad,
        optax=OptaxTwin(
            lambda optax: optax.adagrad(LR),
            functools.partial(onepass.AdaGrad, initial_accumulator=0.1, eps=0.0, eps_root=1e-7),
        ),
        deepspeed=("adagrad", {}),
    ),
)
ADAM = next(pair for pair in FUSED_PAIRS if pair.name == "Adam")
NAG = _momentum("NAG", onepass.NAG, numpy_formulas.nag, True)
ADAMW = Pair(
    "AdamW",
    functools.partial(onepass.AdamW, weight_decay=WEIGHT_DECAY),
    "AdamW",
    ("exp_avg", "exp_avg_sq"),
    {"weight_decay": WEIGHT_DECAY},
    numpy=numpy_formulas.adam,
    weight_decay=WEIGHT_DECAY,
    optax=OptaxTwin(lambda optax: optax.adamw(LR, weight_decay=WEIGHT_DECAY)),
    deepspeed=("adam", {"adamw_mode": True, "weight_decay": WEIGHT_DECAY}),
)


# A gradient that is always the same has no variance. What is left of it by rounding may be negative, and torch takes
# its root: all is NaN after some 1,200 steps. From here it takes 7,000, and no sample of torch's has as many. (Our
# rule takes no root of less than 0.)
FAR_FROM_0 = 1e20


def _rmsprop(name: str, centered: bool, momentum: float) -> Pair:
    options: dict[str, Any] = {"centered": centered, "momentum": momentum}
    states = ("square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * (momentum > 0.0))
    ours = functools.partial(onepass.RMSprop, rho=0.99, lr_in_velocity=False, **options)
    return Pair(
        name,
        ours,
        "RMSprop",
        states,
        options,
        fused=False,
        numpy=functools.partial(numpy_formulas.rmsprop, **options),
        optax=OptaxTwin(
            lambda optax: optax.rmsprop(LR, centered=centered, momentum=momentum or None),
            functools.partial(onepass.RMSprop, rho=0.9, eps=0.0, eps_root=1e-8, **options),
        ),
        rewound={"square_avg": FAR_FROM_0} if centered else {},
    )


UNFUSED_PAIRS = (
    _rmsprop("RMSprop", False, 0.0),
    _rmsprop("RMSprop-centered", True, 0.0),
    _rmsprop("RMSprop-momentum", False, 0.9),
    _rmsprop("RMSprop-centered-momentum", True, 0.9),
    Pair(
        "Nadam",
        onepass.Nadam,
        "NAdam",
        ("exp_avg", "exp_avg_sq"),
        scalars={"step": 0.0, "mu_product": 1.0},
        fused=False,
        numpy=numpy_formulas.nadam,
        optax=OptaxTwin(lambda optax: optax.nadam(LR), functools.partial(onepass.Nadam, momentum_decay=math.inf)),
    ),
)
PAIRS = {pair.name: pair for pair in (*FUSED_PAIRS, NAG, ADAMW, *UNFUSED_PAIRS)}


# --- A peer at work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A peer's optimizer over arrays: a step, the way back to before the first one, and where its parameters are."""

    step: Step
    restart: Callable[[], object]
    params: Callable[[], Sequence[Array]]
    state_bytes: Callable[[], int]
    settled: Callable[[], bool] = lambda: True


def _nothing() -> None:
    pass


# --- torch ------------------------------------------------------------------------------------------------------------

# What torch calls its implementations of one optimizer.
FUSED: Mapping[str, Mapping[str, bool]] = {"torch fused": {"fused": True}}
UNFUSED: Mapping[str, Mapping[str, bool]] = {"torch for-loop": {"foreach": False}, "torch foreach": {"foreach": True}}
COMPILED = "torch compiled"
FLUSHING = "torch fused, flush_denormal"


def as_tensor(torch: Any, array: Array) -> Any:
    """Return torch's view of an array; torch knows nothing of NumPy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_params(torch: Any, data: Data) -> list[Any]:
    """Return torch's parameters over the memory of `data`, with their gradients."""
    params = [as_tensor(torch, param).requires_grad_() for param in data.params]
    for param, grad in zip(params, data.grads, strict=True):
        param.grad = as_tensor(torch, grad)
    return params


def torch_optimizer(pair: Pair, data: Data, implementation: Mapping[str, bool]) -> Any:
    """Make torch's optimizer over the memory of `data`, before its first step; without slots, states are its own."""
    torch: Any = importlib.import_module("torch")
    params = _as_params(torch, data)
    optimizer = getattr(torch.optim, pair.torch)(params, lr=LR, **pair.options, **implementation)
    for param, own in zip(params, data.slots, strict=True):
        if not own:
            continue
        state = {name: as_tensor(torch, slot) for name, slot in zip(pair.states, own, strict=True)}
        state.update({name: torch.tensor(value) for name, value in pair.scalars.items()})
        optimizer.state[param] = state
    return optimizer


def _state_bytes(optimizer: Any) -> int:
    """Count what torch's optimizers, and those derived from them, keep."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if hasattr(value, "element_size"))


def _torch_peer(implementation: Mapping[str, bool], pair: Pair, data: Data, threads: int) -> Peer:
    torch, why = load_torch(threads)
    if torch is None:
        raise MissingError(why)
    optimizer = torch_optimizer(pair, data, implementation)

    def restart() -> None:
        for state in optimizer.state.values():
            for name, value in pair.scalars.items():
                state[name].fill_(value)

    return Peer(optimizer.step, restart, lambda: data.params, functools.partial(_state_bytes, optimizer))


def _flushing_peer(pair: Pair, data: Data, threads: int) -> Peer:
    """Take torch's fused step where subnormal numbers are flushed, as a program has to ask for.

    That holds for this thread and for those that begin later, so torch's own must not have begun: it takes a process
    that nothing else has been in. Nothing else should be after it either.
    """
    peer = _torch_peer(FUSED["torch fused"], pair, data, threads)
    if not importlib.import_module("torch").set_flush_denormal(True):
        raise MissingError("no peer: torch cannot flush subnormal numbers on this processor")
    return peer


def _compiled_peer(pair: Pair, data: Data, threads: int) -> Peer:
    if len(data.params) > MOST_COMPILED:
        raise MissingError(f"not measured: torch.compile takes minutes for more than {MOST_COMPILED} tensors")
    # In this process: its workers would stay, beside everybody's threads.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    peer = _torch_peer({"foreach": True}, pair, data, threads)
    torch: Any = importlib.import_module("torch")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on without being compiled
    step = torch.compile(peer.step, dynamic=False, isolate_recompiles=True)
    graphs = importlib.import_module("torch._dynamo.utils").counters["stats"]
    seen: list[int] = []

    def settled() -> bool:
        seen.append(graphs["unique_graphs"])
        return seen[0] == seen[-1]

    with _reasons("torch.compile fails"):
        step()
    return replace(peer, step=step, settled=settled)


@contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Make the reason of a row of whatever goes wrong in a peer's own machinery."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip() or "?").splitlines()[0]
        raise MissingError(f"no peer: {what}: {type(error).__name__}: {first[:200]}") from error


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def _load_deepspeed(op: str, threads: int) -> Any:
    """Return the module of an optimizer of DeepSpeed, with its kernels compiled."""
    if load_torch(threads)[0] is None:
        raise MissingError("no peer: DeepSpeed needs torch")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    scripts = str(Path(sys.executable).parent)  # where ninja is, whether or not the environment is activated
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ["PATH"]))
    with _reasons("DeepSpeed"):
        builders = importlib.import_module("deepspeed.ops.op_builder")
        # Each optimizer asks anew what the processor is, which takes seconds.
        cpuinfo: Any = importlib.import_module("cpuinfo")
        if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
            cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
        builder = {"adam": "CPUAdamBuilder", "adagrad": "CPUAdagradBuilder", "lion": "CPULionBuilder"}[op]
        getattr(builders, builder)().load(verbose=False)
        module = importlib.import_module(f"deepspeed.ops.{op}")
    _set_openmp_threads(threads)
    return module


def _set_openmp_threads(threads: int) -> None:
    """Let every OpenMP runtime in this process use so many: DeepSpeed's kernels may have another one than torch."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    files = {line.split()[-1] for line in lines if "omp" in Path(line.split()[-1]).name}
    for file in files:
        library = ctypes.CDLL(file)
        if hasattr(library, "omp_set_num_threads"):
            library.omp_set_num_threads(threads)


def _deepspeed_peer(pair: Pair, data: Data, threads: int) -> Peer:
    assert pair.deepspeed is not None
    op, options = pair.deepspeed
    module = _load_deepspeed(op, threads)
    torch: Any = importlib.import_module("torch")
    params = _as_params(torch, data)
    make = module.DeepSpeedCPUAdam if op == "adam" else module.DeepSpeedCPUAdagrad
    optimizer = make(params, lr=LR, **options)
    names = ("exp_avg", "exp_avg_sq") if op == "adam" else ("exp_avg_sq",)
    for param, own in zip(params, data.slots, strict=True):
        if own:
            slots = {name: as_tensor(torch, slot) for name, slot in zip(names, own, strict=True)}
            optimizer.state[param] = {"step": 0, **slots}

    def restart() -> None:
        for state in optimizer.state.values():
            state["step"] = 0

    return Peer(optimizer.step, restart, lambda: data.params, functools.partial(_state_bytes, optimizer))


# --- Optax ------------------------------------------------------------------------------------------------------------


def _load_jax(threads: int) -> tuple[Any, Any]:
    """Return jax and optax, with XLA's threads as wanted."""
    if "jax" not in sys.modules:
        os.environ["NPROC"] = str(threads)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    elif os.environ.get("NPROC") != str(threads):
        raise MissingError(f"not measured: XLA began with {os.environ.get('NPROC')} threads in this process")
    try:
        jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    except ImportError as error:
        raise MissingError(f"no peer: {type(error).__name__}: {error}") from error
    # Who waits for each call is quicker without another thread between: 16 us instead of 28, for 16K elements of Adam.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax, optax


@functools.cache
def _optax_update(name: str) -> tuple[Any, Any]:
    """Return an optimizer of Optax and its update: one function, compiled once for all sets of arrays."""
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    twin = PAIRS[name].optax
    assert twin is not None
    optimizer = twin.make(optax)

    def update(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, jax.jit(update, donate_argnums=(0, 2))


def _in_place(jax: Any, array: Array) -> Any:
    """Return jax's view of an array. (One by DLPack would do, but then the interpreter hangs or aborts at its end.)"""
    view = jax.device_put(array, may_alias=True)
    if view.unsafe_buffer_pointer() != array.ctypes.data:
        raise CheckError("Optax: jax has copied a gradient")
    return view


class Optax:
    """Steps of Optax. Parameters, states and the count of steps go in and come out again, in the same memory."""

    def __init__(self, pair: Pair, data: Data, threads: int) -> None:
        if len(data.params) > MOST_TRACED:
            raise MissingError(f"not measured: XLA takes minutes to compile more than {MOST_TRACED} tensors")
        self.jax, _ = _load_jax(threads)
        self.shapes = [param.shape for param in data.params]
        self.optimizer, self.update = _optax_update(pair.name)
        self.grads = [_in_place(self.jax, grad) for grad in data.grads]
        self.restart()
        before = self._addresses()
        self.step()
        if self._addresses() != before:
            raise CheckError("Optax: what was donated was not used again")
        self.restart()

    def _addresses(self) -> set[int]:
        """Where parameters and states are. (XLA gives an output to any input of its size.)"""
        leaves = self.jax.tree.leaves(self.now)
        return {leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.ndim > 0}

    def restart(self) -> None:
        """Begin with parameters 0."""
        self.now: Any = None  # gone before there are new ones
        params = [self.jax.numpy.zeros(shape, "float32") for shape in self.shapes]
        self.now = self.jax.block_until_ready((params, self.optimizer.init(params)))

    def step(self) -> None:
        """Update, and wait for it."""
        params, state = self.now
        self.now = self.jax.block_until_ready(self.update(params, self.grads, state))

    def params(self) -> Sequence[Array]:
        """Return the parameters."""
        return [np.asarray(param) for param in self.now[0]]

    def state_bytes(self) -> int:
        """Count what the states have."""
        return sum(int(leaf.nbytes) for leaf in self.jax.tree.leaves(self.now[1]))


def _optax_peer(pair: Pair, data: Data, threads: int) -> Peer:
    optax = Optax(pair, data, threads)
    return Peer(optax.step, optax.restart, optax.params, optax.state_bytes)


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _numpy_peer(pair: Pair, data: Data, threads: int) -> Peer:
    assert pair.numpy is not None
    made = NumpyFormula(data, pair.numpy, pair.weight_decay)

    def state_bytes() -> int:
        arrays = (value for state in made.states for value in state.values())
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    return Peer(made.step, made.restart, lambda: data.params, state_bytes)


def _numpy_in_place_peer(pair: Pair, data: Data, threads: int) -> Peer:
    made = NumpyAdamInPlace(data, pair.weight_decay)
    return Peer(made.step, made.restart, lambda: data.params, lambda: sum(a.nbytes for own in data.slots for a in own))


# --- All of them ------------------------------------------------------------------------------------------------------

Maker: TypeAlias = Callable[[Pair, Data, int], Peer]

DEEPSPEED, OPTAX, NUMPY, NUMPY_IN_PLACE = "DeepSpeed", "Optax", "NumPy", "NumPy in place"
MAKERS: Mapping[str, Maker] = {
    **{name: functools.partial(_torch_peer, how) for name, how in {**FUSED, **UNFUSED}.items()},
    FLUSHING: _flushing_peer,
    COMPILED: _compiled_peer,
    DEEPSPEED: _deepspeed_peer,
    OPTAX: _optax_peer,
    NUMPY: _numpy_peer,
    NUMPY_IN_PLACE: _numpy_in_place_peer,
}
SLOW = (NUMPY, NUMPY_IN_PLACE)  # measured apart, so that nobody has to wait for them
STATES_OF_THEIR_OWN = frozenset({OPTAX, NUMPY})


def names_for(pair: Pair) -> list[str]:
    """Return the names of all peers that have this optimizer."""
    lacks = {
        "torch fused": not pair.fused,
        FLUSHING: True,  # only where it is asked for, and in a process of its own
        DEEPSPEED: pair.deepspeed is None,
        OPTAX: pair.optax is None,
        NUMPY: pair.numpy is None,
        NUMPY_IN_PLACE: pair.name not in ("Adam", "AdamW"),
    }
    return [name for name in MAKERS if not lacks.get(name, False)]


@dataclass
class Contest:
    """Ours and its peers over one or more sets of arrays, all checked; `missing`: peers that are not, and why."""

    pair: Pair
    data_sets: list[Data]
    ours: list[onepass.Optimizer]
    peers: dict[str, list[Peer]]
    missing: dict[str, str]

    @property
    def contenders(self) -> list[Contender]:
        """Ours and all peers."""
        steps: dict[str, list[Step]] = {OURS: [optimizer.step for optimizer in self.ours]}
        steps |= {name: [peer.step for peer in peers] for name, peers in self.peers.items()}
        return [Contender.over_sets(name, own, self.rewind_of(name)) for name, own in steps.items()]

    def rewind_of(self, name: str) -> Callable[[], None] | None:
        """Return what writes into a contender's states what the pair asks for, if they can be reached."""
        if not self.pair.rewound or name in STATES_OF_THEIR_OWN:
            return None
        if name == OURS:
            states = [state for optimizer in self.ours for state in optimizer.state]
        else:
            states = [dict(zip(self.pair.states, own, strict=True)) for data in self.data_sets for own in data.slots]

        def rewind() -> None:
            for state in states:
                for slot, value in self.pair.rewound.items():
                    state[slot].fill(value)

        return rewind

    def check(self) -> None:
        """Raise unless all are right after the timed steps."""
        for data, optimizer in zip(self.data_sets, self.ours, strict=True):
            replace(data, slots=[tuple(state.values()) for state in optimizer.state]).require_finite()
            data.require_finite()
        for name, peers in self.peers.items():
            if not all(peer.settled() for peer in peers):
                raise CheckError(f"{name} has compiled anew while it was timed")
            Data([param for peer in peers for param in peer.params()], [], []).require_finite()


def contest(
    pair: Pair, shapes: Sequence[Shape], names: Iterable[str], threads: int, sets: int = 1, like_optax: bool = False
) -> Contest:
    """Set ours and the peers of these names up, and check that they make the same steps.

    `like_optax`: ours is the optimizer that makes the steps of Optax, if that is another one.
    """
    make_ours = (pair.optax and pair.optax.ours) if like_optax else None
    names = list(names)
    slots = 0 if STATES_OF_THEIR_OWN.issuperset(names) else len(pair.states)
    data_sets = [make_data(shapes, slots) for _ in range(sets)]
    ours = [(make_ours or pair.ours)(data.params, lr=LR, grads=data.grads) for data in data_sets]
    expected = [_three_steps(data, optimizer.step) for data, optimizer in zip(data_sets, ours, strict=True)]
    for params in expected:
        require_moved(params)
    made = Contest(pair, data_sets, ours, {}, {})
    for name in names:
        try:
            if name == COMPILED and sets > MOST_COMPILED_SETS:
                raise MissingError(f"not measured: {sets} sets of arrays, each with a compilation of its own")
            peers = [MAKERS[name](pair, data, threads) for data in data_sets]
        except MissingError as error:
            made.missing[name] = str(error)
            continue
        for data, optimizer, peer, params in zip(data_sets, ours, peers, expected, strict=True):
            tolerance = 0.0 if name == NUMPY_IN_PLACE and pair.name == "Adam" else TOLERANCE
            data.clear()
            peer.restart()
            overwritten = False
            for check in CHECKED_STEPS:
                fill_gradients(data, check)
                peer.step()
                overwritten = overwritten or fill_gradients(data, check)
            fill_gradients(data)
            if overwritten:
                made.missing[name] = "not measured: it overwrites the gradients"
                break
            require_close(f"{name} arrives at other parameters than ours", peer.params(), params, tolerance)
            if name not in STATES_OF_THEIR_OWN:
                for own, state in zip(data.slots, optimizer.state, strict=True):
                    require_close(f"{name} arrives at other states than ours", own, [*state.values()], tolerance)
            peer.settled()
        else:
            made.peers[name] = peers
    return made


def _three_steps(data: Data, step: Step) -> list[Array]:
    three_steps(data, step)
    return [param.copy() for param in data.params]


def measure(plan: Plan, row: Row, made: Contest) -> list[Row]:
    """Time all of a contest in turns: a row like `row` for each peer, and for those that are missing."""
    rows = []
    samples = method.interleave(made.contenders, plan) if made.peers else {}
    made.check()
    for name in (*made.peers, *made.missing):
        own = replace(row, case=f"{row.case}/{name}", peer=name, note=made.missing.get(name, row.note))
        if name in made.peers:
            own.take(samples, OURS, name)
            own.value = method.ratio(samples[name], samples[OURS])
        rows.append(own)
    return rows


def compare_all(
    bench: Bench,
    plan_of: Callable[[bool], Plan],
    row: Row,
    pair: Pair,
    shapes: Sequence[Shape],
    names: Sequence[str] | None = None,
    sets: int = 1,
) -> list[Row]:
    """Compare with all peers of an optimizer, in groups: NumPy, which is slow, apart; Optax, where its formula differs.

    `plan_of` is told whether a group is a slow one.
    """
    names = [name for name in names_for(pair) if (names is None or name in names) and bench.peers.search(name)]
    alone = [OPTAX] if pair.optax is not None and pair.optax.ours is not None else []
    groups: list[tuple[list[str], bool]] = [
        ([name for name in names if name not in (*SLOW, *alone)], False),
        ([name for name in names if name in alone], False),
        *(([name], True) for name in names if name in SLOW),
    ]
    rows = []
    for group, slow in groups:
        if group:
            made = contest(pair, shapes, group, row.threads, sets, like_optax=group == alone)
            own = replace(row, note="NumPy uses one thread") if slow else row
            rows += measure(plan_of(slow), own, made)
            del made
            forget()
    return rows


def forget() -> None:
    """Free what compilers keep of functions that are gone."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()
