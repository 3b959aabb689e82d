"""Optimizer steps side by side with the yardstick `traffic`, torch and NumPy: one table, printed, JSON and Markdown.

``python bench/peers/optimizers.py`` takes some minutes on two quiet cores and 3 GB of memory. ``--quick`` only shows
that everything runs: its figures mean nothing, and no goal is judged by them.

Fair play
---------
* Everybody works on the very same parameters and gradients, cache-line aligned and with every page touched. Against
  `traffic` alone, rule and yardstick share all arrays. Against torch, ours has the states that its optimizer made, as
  its users do, and `traffic` shares them; torch has states of its own, aligned as its allocator would align them.
* All memory comes from NumPy, which asks for huge pages. torch's own allocator does not: torch may be faster here than
  at home.
* Steps of 1M elements run back to back, after one untimed step: their arrays stay in the last-level cache where it is
  large enough, for everybody alike. From 16M elements on they do not fit.
* Gradients are positive and not zero, so that the moments (to which `traffic` adds gradients) stay positive and finite.
* Before the timing each peer takes the same three steps as ours from parameters 0, and must arrive at the same
  parameters (1e-4 relative; NumPy: the same bits), none of them 0. After it, everything must be finite.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import method
import onepass
import suite
from method import Contender, Floats, Goal, Plan, Row
from onepass import _cpu
from suite import OURS, Bench, Case, CheckError, Step, load_torch

SIZES = {"1M": 1 << 20, "16M": 1 << 24, "64M": 1 << 26}
QUICK_DIVISOR = 1024
LR = 1e-4
SUBNORMAL = np.float32(1e-40)

TRAFFIC = "traffic"

Array: TypeAlias = "npt.NDArray[Any]"
Storage: TypeAlias = "tuple[npt.DTypeLike, npt.DTypeLike, npt.DTypeLike]"


def elements_of(bench: Bench, size: str) -> int:
    """Return the number of elements that a size stands for."""
    return SIZES[size] // (QUICK_DIVISOR if bench.quick else 1)


# --- Arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Parameters, their gradients, and for each parameter a tuple of slots."""

    params: list[Array]
    grads: list[Array]
    slots: list[tuple[Array, ...]]

    @property
    def elements(self) -> int:
        """Of all parameters together."""
        return sum(param.size for param in self.params)

    @property
    def bytes(self) -> int:
        """What a step must move: gradients in, parameters and slots in and out."""
        return sum(grad.nbytes for grad in self.grads) + 2 * sum(array.nbytes for array in self.written())

    def written(self) -> Iterator[Array]:
        """Everything that a step may write."""
        yield from self.params
        for own in self.slots:
            yield from own

    def clear(self) -> None:
        """Set parameters and slots to zero."""
        for array in self.written():
            array.fill(0.0)

    def require_finite(self) -> None:
        """Raise if a NaN or an infinity is among what steps wrote."""
        if not all(np.isfinite(part).all() for array in self.written() for part in _parts(array)):
            raise CheckError("a parameter or state is not finite after the timed steps")


def _parts(array: Array) -> Iterator[Array]:
    """Cut into pieces of a size that checks can afford to make temporaries of; NumPy compares bfloat16 as float32."""
    for start in range(0, array.size, SIZES["1M"]):
        part = array[start : start + SIZES["1M"]]
        yield part if part.itemsize >= 4 else part.astype(np.float32)


def zeros(count: int, dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin at a cache line; every page of them has been touched."""
    dtype = np.dtype(dtype)
    return method.aligned(-(-count * dtype.itemsize // 4)).view(dtype)[:count]


def gradient_block(count: int) -> Floats:
    """Return numbers between 0.0005 and 0.0015, with which gradients of that size can be filled."""
    rng = np.random.default_rng(7)
    return (0.0005 + 0.001 * rng.random(min(count, SIZES["1M"]))).astype(np.float32)


def make_data(counts: Sequence[int], slots: int, storage: Storage = (np.float32,) * 3) -> Data:
    """Parameters 0, slots 0, gradients between 0.0005 and 0.0015; `storage`: the dtypes of the three."""
    param, grad, state = storage
    block = gradient_block(max(counts))
    data = Data([], [], [])
    for count in counts:
        data.params.append(zeros(count, param))
        data.grads.append(zeros(count, grad))
        data.slots.append(tuple(zeros(count, state) for _ in range(slots)))
        method.fill_with(data.grads[-1], block)
    return data


# --- Kernels without an optimizer -------------------------------------------------------------------------------------

# By name, so that a rule that is new in the registry is measured by itself. They only have to keep everything finite.
COEFFICIENTS = {
    "beta1": 0.9,
    "one_minus_beta1": 0.1,
    "beta2": 0.999,
    "one_minus_beta2": 0.001,
    "rho": 0.99,
    "weight": 0.01,
    "mu": 0.9,
    "pre": 1.0,
    "inv_bias2": 1.0,
    "step": LR,
    "step_m": LR,
    "step_g": LR,
    "step_v": LR,
    "step_b": 1.0,
    "eps_root": 0.0,
    "eps": 1e-8,
}


def rules(yardsticks: bool = False) -> dict[str, Any]:
    """Return the registry's rows by name."""
    return {row["name"]: row for row in _cpu.registry() if row["yardstick"] == yardsticks}


def surrounded(coefficients: Mapping[str, float], ema_decay: float | None = None) -> tuple[Any, ...]:
    """Return a recipe with nothing around the rule, but for an average of the parameters."""
    sign, l1, l2, decay, noise, max_unit_norm = 1.0, 0.0, 0.0, 1.0, 0.0, None
    return (dict(coefficients), sign, l1, l2, decay, ema_decay, noise, max_unit_norm)


def kernel_step(rule: str, data: Data) -> Step:
    """Make the step of a rule, or of a yardstick, without optimizer and recipe."""
    coefficients = (rules() | rules(yardsticks=True))[rule]["coefficients"]
    recipe = surrounded({name: COEFFICIENTS.get(name, 0.5) for name in coefficients})
    names = [f"[{index}]" for index in range(len(data.params))]
    updater = _cpu.Updater(
        groups=[rule],
        group_of=[0] * len(data.params),
        params=data.params,
        slots=data.slots,
        extras=[(None,) * 4] * len(data.params),
        param_names=names,
        grad_names=names,
        mirror_names=names,
        seed=0,
        stochastic=False,
        accumulate=1,
    )
    updater.check(None)
    return functools.partial(updater.step, data.grads, [lambda t: recipe])


def traffic_step(data: Data) -> Step:
    """Make a step of the yardstick that has as many streams as `data`."""
    return kernel_step(f"traffic{len(data.slots[0])}", data)


# --- torch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The same optimizer here and in torch. `states`: torch's names of the states, in the order of ours."""

    name: str
    ours: Callable[..., onepass.Optimizer]
    torch: str
    states: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=lambda: {"step": 0.0})


FUSED_PAIRS = (
    Pair("SGD", onepass.SGD, "SGD", (), scalars={}),
    Pair(
        "Momentum",
        functools.partial(onepass.Momentum, momentum=0.9, lr_in_velocity=False),
        "SGD",
        ("momentum_buffer",),
        {"momentum": 0.9},
        scalars={},
    ),
    Pair("Adam", onepass.Adam, "Adam", ("exp_avg", "exp_avg_sq")),
    Pair(
        "AMSGrad",
        functools.partial(onepass.Adam, amsgrad=True),
        "Adam",
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        {"amsgrad": True},
    ),
    Pair("AdaGrad", onepass.AdaGrad, "Adagrad", ("sum",)),
)
ADAM = next(pair for pair in FUSED_PAIRS if pair.name == "Adam")


def _rmsprop(name: str, centered: bool, momentum: float) -> Pair:
    options: dict[str, Any] = {"centered": centered, "momentum": momentum}
    states = ("square_avg", *["grad_avg"] * centered, *["momentum_buffer"] * (momentum > 0.0))
    ours = functools.partial(onepass.RMSprop, rho=0.99, lr_in_velocity=False, **options)
    return Pair(name, ours, "RMSprop", states, options)


UNFUSED_PAIRS = (
    _rmsprop("RMSprop", False, 0.0),
    _rmsprop("RMSprop-centered", True, 0.0),
    _rmsprop("RMSprop-momentum", False, 0.9),
    _rmsprop("RMSprop-centered-momentum", True, 0.9),
    Pair("Nadam", onepass.Nadam, "NAdam", ("exp_avg", "exp_avg_sq"), scalars={"step": 0.0, "mu_product": 1.0}),
)

# What torch calls its implementations of one optimizer.
FUSED: Mapping[str, Mapping[str, bool]] = {"torch fused": {"fused": True}}
UNFUSED: Mapping[str, Mapping[str, bool]] = {"torch for-loop": {"foreach": False}, "torch foreach": {"foreach": True}}


def as_tensor(torch: Any, array: Array) -> Any:
    """Return torch's view of an array; torch knows nothing of NumPy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_optimizer(pair: Pair, data: Data, implementation: Mapping[str, bool]) -> Any:
    """Make torch's optimizer over the memory of `data`, before its first step."""
    torch: Any = importlib.import_module("torch")
    params = [as_tensor(torch, param).requires_grad_() for param in data.params]
    for param, grad in zip(params, data.grads, strict=True):
        param.grad = as_tensor(torch, grad)
    optimizer = getattr(torch.optim, pair.torch)(params, lr=LR, **pair.options, **implementation)
    for param, own in zip(params, data.slots, strict=True):
        state = {name: as_tensor(torch, slot) for name, slot in zip(pair.states, own, strict=True)}
        state.update({name: torch.tensor(value) for name, value in pair.scalars.items()})
        if state:
            optimizer.state[param] = state
    return optimizer


# --- NumPy ------------------------------------------------------------------------------------------------------------


class NumpyAdam:
    """Adam as the documentation writes it, each operation a pass over memory."""

    def __init__(self, data: Data) -> None:
        self.param, self.grad = data.params[0], data.grads[0]
        self.m, self.v = np.zeros_like(self.param), np.zeros_like(self.param)
        self.t = 0

    def coefficients(self) -> tuple[np.float32, ...]:
        """beta1, 1 - beta1, beta2, 1 - beta2, step_m, inv_bias2, eps of the next step."""
        self.t += 1
        beta1, beta2 = 0.9, 0.999
        step_m, inv_bias2 = LR / (1.0 - beta1**self.t), 1.0 / (1.0 - beta2**self.t)
        return tuple(map(np.float32, (beta1, 1.0 - beta1, beta2, 1.0 - beta2, step_m, inv_bias2, 1e-8)))

    def step(self) -> None:
        """Update by the lines of the paper: Kingma and Ba, 2015, algorithm 1."""
        self.t += 1
        g, beta1, beta2 = self.grad, 0.9, 0.999
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        self.param -= LR * m_hat / (np.sqrt(v_hat) + 1e-8)


class NumpyAdamInPlace(NumpyAdam):
    """The same with two arrays for all intermediate results: what NumPy can do at best."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.a, self.b = np.zeros_like(self.param), np.zeros_like(self.param)

    def step(self) -> None:
        """Update without a temporary array."""
        beta1, one_minus_beta1, beta2, one_minus_beta2, step_m, inv_bias2, eps = self.coefficients()
        g, m, v, a, b = self.grad, self.m, self.v, self.a, self.b
        m *= beta1
        m += np.multiply(one_minus_beta1, g, out=a)
        v *= beta2
        np.multiply(g, g, out=a)
        v += np.multiply(one_minus_beta2, a, out=a)
        np.multiply(v, inv_bias2, out=a)
        np.sqrt(a, out=a)
        a += eps
        np.multiply(step_m, m, out=b)
        b /= a
        self.param -= b


# --- Checks and rows --------------------------------------------------------------------------------------------------


def require_same(data: Data, ours: Step, peers: Mapping[str, Step], tolerance: float = 1e-4) -> None:
    """Raise unless every peer's first three steps from parameters 0 arrive where ours do."""
    three_steps(data, ours)
    expected = [param.copy() for param in data.params]
    require_moved(expected)
    for name, step in peers.items():
        three_steps(data, step)
        require_close(f"{name} arrives at other parameters than ours", data.params, expected, tolerance)


def three_steps(data: Data, step: Step) -> None:
    """Step from parameters 0."""
    data.clear()
    for _ in range(3):
        step()


def require_moved(arrays: Sequence[Array]) -> None:
    """Raise unless every element is finite and not 0."""
    if not all(np.isfinite(part).all() and np.all(part != 0.0) for array in arrays for part in _parts(array)):
        raise CheckError("ours left a parameter where it was, or made it NaN or infinite")


def require_close(message: str, got: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """Raise unless every element is right but for a share of itself."""
    for array, right in zip(got, expected, strict=True):
        if not all(np.allclose(*pair, tolerance, 0.0) for pair in zip(_parts(array), _parts(right), strict=True)):
            raise CheckError(message)


def new_row(case: Case, data: Data, peer: str, goal: Goal | None, **fields: Any) -> Row:
    """Make a row of `case` without figures."""
    return Row(case.name, case.kind, case.threads, data.elements, OURS, peer, goal, bytes=data.bytes, **fields)


def measure(
    plan: Plan, row: Row, data: Data, ours: Step, peers: Mapping[str, Step], traffic: Step | None = None
) -> dict[str, method.Samples]:
    """Time ours, the peers and the yardstick; enter into `row` the comparison with the fastest peer."""
    samples = suite.compare(plan, row, ours, peers, others={} if traffic is None else {TRAFFIC: traffic})
    data.require_finite()
    if traffic is not None:
        row.traffic_share = method.ratio(samples[TRAFFIC], samples[OURS])
    return samples


def compare_with_torch(
    bench: Bench,
    case: Case,
    pair: Pair,
    counts: Sequence[int],
    goal: Goal,
    implementations: Mapping[str, Mapping[str, bool]],
    bound: bool = True,
) -> Row:
    """Ours against torch's fastest implementation. `bound`: gradients given once, not at each step."""
    data = make_data(counts, len(pair.states))
    row = new_row(case, data, "torch", goal)
    optimizer = pair.ours(data.params, lr=LR, **({"grads": data.grads} if bound else {}))
    ours: Step = optimizer.step if bound else functools.partial(optimizer.step, data.grads)
    torch, row.note = load_torch(case.threads)
    peers: dict[str, Step] = {}
    if torch is not None:
        peers = {name: torch_optimizer(pair, data, how).step for name, how in implementations.items()}
        require_same(data, ours, peers)
    own = replace(data, slots=[tuple(state.values()) for state in optimizer.state])
    measure(bench.plan, row, own, ours, peers, traffic_step(own))
    data.require_finite()
    if len(peers) > 1:
        row.note = suite.times(row, peers)
    return row


# --- Cases ------------------------------------------------------------------------------------------------------------


def run_rule(rule: str, size: str, bench: Bench, case: Case) -> list[Row]:
    """One rule's kernel against the yardstick, over the same arrays."""
    data = make_data([elements_of(bench, size)], len(rules()[rule]["slots"]))
    row = new_row(case, data, TRAFFIC, Goal(">=", 0.93))
    measure(bench.plan, row, data, kernel_step(rule, data), {f"traffic{len(data.slots[0])}": traffic_step(data)})
    row.traffic_share = row.value
    return [row]


def run_fused(pair: Pair, size: str, bench: Bench, case: Case) -> list[Row]:
    """One large array against torch's fused kernel."""
    goal = Goal(">=", 1.3 if size == "1M" else 1.0)
    return [compare_with_torch(bench, case, pair, [elements_of(bench, size)], goal, FUSED)]


def run_unfused(pair: Pair, bench: Bench, case: Case) -> list[Row]:
    """One large array against the fastest of torch's implementations, where there is no fused one."""
    return [compare_with_torch(bench, case, pair, [elements_of(bench, "16M")], Goal(">=", 2.5), UNFUSED)]


def run_many(bench: Bench, case: Case) -> list[Row]:
    """Many small arrays."""
    return [compare_with_torch(bench, case, ADAM, [1000] * (3 if bench.quick else 1000), Goal(">=", 12.0), FUSED)]


def run_small(bench: Bench, case: Case) -> list[Row]:
    """Time one call, the whole of it, from Python, with the gradient as its argument."""
    row = compare_with_torch(bench, case, ADAM, [64], Goal(">=", 10.0), FUSED, bound=False)
    row.traffic_share = None  # the yardstick has no optimizer around it
    seconds = replace(row, case=f"{case.name}/seconds", goal=Goal("<=", 3e-6), measure="ours", peer="", note="")
    seconds.peer_seconds, seconds.value = None, row.ours_estimate
    return [row, seconds]


def _subnormal_contenders(name: str, step_with: Callable[[Floats], Step], data: Data, moments: Any) -> list[Contender]:
    """Pair a normal step with one of subnormal moments and zero gradients; both are refilled before each sample."""

    def refill(m: float | np.float32, v: float | np.float32) -> None:
        data.params[0].fill(1.0)
        moments[0].fill(m)
        moments[1].fill(v)

    zero = method.aligned(data.elements)
    return [
        Contender(f"{name} normal", step_with(data.grads[0]), functools.partial(refill, 1e-3, 1e-6)),
        Contender(f"{name} subnormal", step_with(zero), functools.partial(refill, SUBNORMAL, SUBNORMAL)),
    ]


def run_subnormal(bench: Bench, case: Case) -> list[Row]:
    """Show what a step costs once all moments are subnormal: ours against ours, torch against torch."""
    data = make_data([elements_of(bench, "16M")], 2)
    optimizer = onepass.Adam(data.params, lr=LR)
    moments = tuple(optimizer.state[0].values())
    contenders = _subnormal_contenders(OURS, lambda grad: functools.partial(optimizer.step, [grad]), data, moments)
    torch, why = load_torch(case.threads)
    if torch is not None:

        def torch_step(grad: Floats) -> Step:
            step: Step = torch_optimizer(ADAM, replace(data, grads=[grad]), {"fused": True}).step
            return step

        contenders += _subnormal_contenders("torch", torch_step, data, data.slots[0])
    samples = method.interleave(contenders, bench.plan)  # of which the last step of ours was a subnormal one
    data.require_finite()
    if any(np.any(part) for moment in moments for part in _parts(moment)):
        raise CheckError("subnormal moments are not zero after a step")

    rows = []
    for name, goal in ((OURS, Goal("<=", 1.1)), ("torch", None)):
        row = new_row(case, data, f"{name} normal", goal, measure="ours / peer")
        row.case, row.ours = f"{case.name}/{name}", f"{name} subnormal"
        if row.ours in samples:
            row.take({k: v for k, v in samples.items() if k.startswith(name)}, row.ours, row.peer)
            row.value = method.ratio(samples[row.ours], samples[row.peer])
            row.note = f"{name}'s subnormal step over its normal step"
        else:
            row.note = why
        rows.append(row)
    return rows


def run_numpy(bench: Bench, case: Case) -> list[Row]:
    """Adam against two ways to write it in NumPy."""
    data = make_data([elements_of(bench, "16M")], 0)
    rows = []
    for name, peer, goal in (("formula", NumpyAdam, Goal(">=", 10.0)), ("in-place", NumpyAdamInPlace, None)):
        optimizer = onepass.Adam(data.params, lr=LR, grads=data.grads)
        peers: dict[str, Step] = {"numpy": peer(data).step}
        # The in-place form keeps to the documented expression, so every bit is the same.
        require_same(data, optimizer.step, peers, tolerance=0.0 if peer is NumpyAdamInPlace else 1e-4)
        row = new_row(case, data, "numpy", goal, note="NumPy uses one thread")
        row.case, row.bytes = f"{case.name}/{name}", 28 * data.elements
        measure(bench.plan, row, data, optimizer.step, peers)
        rows.append(row)
    return rows


def run_import(bench: Bench, case: Case) -> list[Row]:
    """Time what ``import onepass`` adds to ``import numpy``: whole processes, one against the other."""

    def contender(modules: str) -> Contender:
        command = [sys.executable, "-c", f"import {modules}"]
        return Contender(modules, functools.partial(subprocess.run, command, check=True))

    both, alone = "numpy, onepass", "numpy"
    plan = bench.plan if bench.quick else replace(bench.plan, min_rounds=15, max_rounds=31)
    samples = method.interleave([contender(both), contender(alone)], plan)
    row = Row(case.name, case.kind, case.threads, 0, both, alone, Goal("<=", 0.050), "ours - peer")
    row.take(samples, both, alone)
    row.value = method.difference(samples[both], samples[alone])
    return [row]


def all_cases() -> list[Case]:
    """In an order that imports torch as late as possible."""
    cases = [
        Case(f"traffic/{rule}/{size}/{threads}", "traffic", functools.partial(run_rule, rule, size), threads)
        for rule in rules()
        for size in ("16M", "64M")
        for threads in (1, 2)
    ]
    cases.append(Case("import", "import", run_import, 1))
    cases.append(Case("numpy/Adam/16M", "numpy", run_numpy))
    cases += [
        Case(f"fused/{pair.name}/{size}", "fused", functools.partial(run_fused, pair, size))
        for pair in FUSED_PAIRS
        for size in ("1M", "16M", "64M")
    ]
    for pair in UNFUSED_PAIRS:
        cases.append(Case(f"unfused/{pair.name}/16M", "unfused", functools.partial(run_unfused, pair)))
    cases.append(Case("many/Adam/1000x1000", "many", run_many))
    cases.append(Case("small/Adam/64", "small", run_small))
    cases.append(Case("subnormal/Adam/16M", "subnormal", run_subnormal))
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    return suite.main("optimizers", __doc__, all_cases(), arguments)


if __name__ == "__main__":
    sys.exit(main())
