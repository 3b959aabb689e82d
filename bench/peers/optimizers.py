"""Optimizer steps side by side with the yardstick `traffic` and the peers: one table, printed, JSON and Markdown.

``python bench/peers/optimizers.py`` takes a quarter of an hour on two quiet cores and 3 GB of memory. ``--quick`` only
shows that everything runs: its figures mean nothing, and no goal is judged by them.

Fair play
---------
* Everybody works on the very same parameters and gradients, cache-line aligned and with every page touched. Against
  `traffic` alone, rule and yardstick share all arrays. Against torch, ours has the states that its optimizer made, as
  its users do, and `traffic` shares them; torch has states of its own, aligned as its allocator would align them.
* All memory of the arrays comes from NumPy, which asks for huge pages, and the C library is told to do so, too, and to
  keep what is freed: torch, which makes temporary arrays where it has no fused kernel, may be faster here than at home.
  NumPy, too, which has a row for each way (``memory-given-back``: as Python comes).
* Steps of 1M elements run back to back, after as many untimed ones: their arrays stay in the last-level cache where it
  is large enough, for everybody alike. The same step on several sets of arrays in turn, which do not, has a row of its
  own (``rotated``). From 16M elements on one set does not fit.
* Every optimizer also meets everybody who has it, one row each (``peers``): see `contenders.py`.
* Gradients are positive and not zero, so that the moments (to which `traffic` adds gradients) stay positive and finite.
* Before the timing each peer takes the same three steps as ours from parameters 0, and must arrive at the same
  parameters (1e-4 relative; NumPy: the same bits), none of them 0. After it, everything must be finite.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import contenders
from arrays import Data, kept_bytes, make_data, parts_of, require_same
from contenders import ADAM, FUSED, FUSED_PAIRS, PAIRS, UNFUSED, UNFUSED_PAIRS, Pair, torch_optimizer
from numpy_formulas import LR, NumpyAdamInPlace, NumpyFormula

import method
import onepass
import suite
from method import Contender, Floats, Goal, Plan, Row
from onepass import _cpu
from suite import OURS, Bench, Case, CheckError, Step, Steps, load_torch

__all__ = ["ADAM", "FUSED_PAIRS", "LR", "TRAFFIC", "UNFUSED_PAIRS", "Data", "Pair", "kernel_step", "main", "rules"]

SIZES = {"1M": 1 << 20, "16M": 1 << 24, "64M": 1 << 26}
QUICK_DIVISOR = 1024
SUBNORMAL = np.float32(1e-40)

TRAFFIC = "traffic"


def elements_of(bench: Bench, size: str) -> int:
    """Return the number of elements that a size stands for."""
    return SIZES[size] // (QUICK_DIVISOR if bench.quick else 1)


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


# --- Checks and rows --------------------------------------------------------------------------------------------------


def new_row(case: Case, data: Data, peer: str, goal: Goal | None, **fields: Any) -> Row:
    """Make a row of `case` without figures."""
    return Row(case.name, case.kind, case.threads, data.elements, OURS, peer, goal, bytes=data.bytes, **fields)


def measure(
    plan: Plan,
    row: Row,
    data_sets: Sequence[Data],
    ours: Steps,
    peers: Mapping[str, Steps],
    traffic: Steps | None = None,
) -> dict[str, method.Samples]:
    """Time ours, the peers and the yardstick; enter into `row` the comparison with the fastest peer."""
    samples = suite.compare(plan, row, ours, peers, others={} if traffic is None else {TRAFFIC: traffic})
    for data in data_sets:
        data.require_finite()
    if traffic is not None:
        row.traffic_share = method.ratio(samples[TRAFFIC], samples[OURS])
    return samples


def compare_with_torch(
    bench: Bench,
    case: Case,
    pair: Pair,
    counts: Sequence[int],
    goal: Goal | None,
    implementations: Mapping[str, Mapping[str, bool]],
    bound: bool = True,
    sets: int = 1,
) -> Row:
    """Ours against torch's fastest implementation. `bound`: gradients given once, not at each step."""
    slots = len(pair.states)
    data_sets = [make_data(counts, slots) for _ in range(sets)]
    row = new_row(case, data_sets[0], "torch", goal, tensors=len(counts))
    row.buffers = method.buffers(sets * kept_bytes(row.elements, slots))
    optimizers = [pair.ours(data.params, lr=LR, **({"grads": data.grads} if bound else {})) for data in data_sets]
    ours: list[Step] = [
        optimizer.step if bound else functools.partial(optimizer.step, data.grads)
        for optimizer, data in zip(optimizers, data_sets, strict=True)
    ]
    torch, row.note = load_torch(case.threads)
    peers: dict[str, list[Step]] = {}
    if torch is not None:
        for name, how in implementations.items():
            peers[name] = [torch_optimizer(pair, data, how).step for data in data_sets]
        for index, data in enumerate(data_sets):
            require_same(data, ours[index], {name: steps[index] for name, steps in peers.items()})
    own = [
        replace(data, slots=[tuple(state.values()) for state in optimizer.state])
        for data, optimizer in zip(data_sets, optimizers, strict=True)
    ]
    measure(bench.plan, row, [*own, *data_sets], ours, peers, [traffic_step(each) for each in own])
    if len(peers) > 1:
        row.note = suite.times(row, peers)
    return row


# --- Cases ------------------------------------------------------------------------------------------------------------


def run_rule(rule: str, size: str, bench: Bench, case: Case) -> list[Row]:
    """One rule's kernel against the yardstick, over the same arrays."""
    data = make_data([elements_of(bench, size)], len(rules()[rule]["slots"]))
    row = new_row(case, data, TRAFFIC, Goal(">=", 0.93))
    measure(bench.plan, row, [data], kernel_step(rule, data), {f"traffic{len(data.slots[0])}": traffic_step(data)})
    row.traffic_share = row.value
    return [row]


def run_fused(pair: Pair, size: str, rotated: bool, bench: Bench, case: Case) -> list[Row]:
    """One large array, or several in turn, against torch's fused kernel. Goals are those of arrays that stay."""
    count = elements_of(bench, size)
    goal = None if rotated else Goal(">=", 1.3 if size == "1M" else 1.0)
    sets = method.sets_for(kept_bytes(count, len(pair.states))) if rotated and not bench.quick else 1 + rotated
    if sets is None:
        return [Row(case.name, case.kind, case.threads, count, OURS, "torch", note="not measured: too small to rotate")]
    return [compare_with_torch(bench, case, pair, [count], goal, FUSED, sets=sets)]


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
    if any(np.any(part) for moment in moments for part in parts_of(moment)):
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
    """Adam against two ways to write it in NumPy; the first also where the C library gives memory back."""
    rows = [_numpy_row("formula", Goal(">=", 10.0), bench, case), _numpy_row("in-place", None, bench, case)]
    if suite.TUNABLES not in os.environ:
        return rows  # in which memory was given back already, for all that is known
    environment = suite.environment_variables({suite.TUNABLES: None})
    with environment, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        rows.append(process.submit(_numpy_as_it_comes, bench, case).result())
    return rows


def _numpy_as_it_comes(bench: Bench, case: Case) -> Row:
    """Compare with the formula as one writes it, in a process that has not been told to keep what it frees."""
    with suite.thread_count(case.threads):
        row = _numpy_row("formula", Goal(">=", 10.0), bench, case)
    return replace(row, case=f"{case.name}/memory-given-back", note=f"{row.note}; freed memory is not kept")


def _numpy_row(form: str, goal: Goal | None, bench: Bench, case: Case) -> Row:
    formula = ADAM.numpy
    assert formula is not None
    in_place = form == "in-place"
    data = make_data([elements_of(bench, "16M")], 2 * in_place)
    optimizer = onepass.Adam(data.params, lr=LR, grads=data.grads)
    peers: dict[str, Step] = {"numpy": (NumpyAdamInPlace(data) if in_place else NumpyFormula(data, formula)).step}
    # The in-place form keeps to the documented expression, so every bit is the same.
    require_same(data, optimizer.step, peers, tolerance=0.0 if in_place else 1e-4)
    row = new_row(case, data, "numpy", goal, note="NumPy uses one thread")
    row.case, row.bytes = f"{case.name}/{form}", 28 * data.elements
    measure(bench.plan, row, [data], optimizer.step, peers)
    return row


def run_peers(pair: Pair, bench: Bench, case: Case) -> list[Row]:
    """One large array against everybody who has this optimizer, one row each."""
    count = elements_of(bench, "16M")
    bytes_moved = 4 * count * (3 + 2 * len(pair.states))
    row = Row(case.name, case.kind, case.threads, count, OURS, "", bytes=bytes_moved)
    row.buffers = method.buffers(kept_bytes(count, len(pair.states)))
    slow = replace(bench.plan, min_rounds=min(bench.plan.min_rounds, 5))
    return contenders.compare_all(bench, lambda is_slow: slow if is_slow else bench.plan, row, pair, [count])


def run_lion(bench: Bench, case: Case) -> list[Row]:
    """Say that DeepSpeed has an optimizer that we have not."""
    row = Row(case.name, case.kind, case.threads, 0, OURS, contenders.DEEPSPEED)
    return [replace(row, note="not measured: onepass has no Lion to compare with")]


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
        Case(f"fused/{pair.name}/{size}{name}", "fused", functools.partial(run_fused, pair, size, bool(name)))
        for pair in FUSED_PAIRS
        for size, name in (("1M", ""), ("1M", "/rotated"), ("16M", ""), ("64M", ""))
    ]
    for pair in UNFUSED_PAIRS:
        cases.append(Case(f"unfused/{pair.name}/16M", "unfused", functools.partial(run_unfused, pair)))
    cases.append(Case("many/Adam/1000x1000", "many", run_many))
    cases.append(Case("small/Adam/64", "small", run_small))
    cases.append(Case("subnormal/Adam/16M", "subnormal", run_subnormal))
    cases += [Case(f"peers/{name}/16M", "peers", functools.partial(run_peers, pair)) for name, pair in PAIRS.items()]
    cases.append(Case("peers/Lion/16M/DeepSpeed", "peers", run_lion))
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    return suite.main("optimizers", __doc__, all_cases(), arguments)


if __name__ == "__main__":
    sys.exit(main())
