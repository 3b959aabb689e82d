"""The NumPy expression of every rule, in the order in which `formulas.md` of the design writes it.

One function a rule, under the rule's name in the registry: from the gradient `g`, the slots `s` (a dict of name ->
Flushed, changed in place) and the coefficients `c` to the step `u`. They know nothing of the C++ code.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from reference.flushed import Flushed, maximum, sign, sqrt, zero


def sgd(g, s, c):
    return c.step * g


def momentum(g, s, c):
    s["velocity"] = c.mu * s["velocity"] + c.weight * g
    return c.step_v * s["velocity"] + c.step_g * g


def second_moment(g, s, c):
    s["square_avg"] = c.rho * s["square_avg"] + c.weight * (g * g)
    return c.step * g / (sqrt(s["square_avg"] + c.eps_root) + c.eps)


def second_moment_centered(g, s, c):
    s["square_avg"] = c.rho * s["square_avg"] + c.weight * (g * g)
    s["grad_avg"] = c.rho * s["grad_avg"] + c.weight * g
    a = s["grad_avg"]
    return c.step * g / (sqrt(maximum(zero(g), s["square_avg"] - a * a) + c.eps_root) + c.eps)


def second_moment_momentum(g, s, c):
    s["square_avg"] = c.rho * s["square_avg"] + c.weight * (g * g)
    s["velocity"] = c.mu * s["velocity"] + c.step_b * g / (sqrt(s["square_avg"] + c.eps_root) + c.eps)
    return c.step * s["velocity"]


def second_moment_centered_momentum(g, s, c):
    s["square_avg"] = c.rho * s["square_avg"] + c.weight * (g * g)
    s["grad_avg"] = c.rho * s["grad_avg"] + c.weight * g
    a = s["grad_avg"]
    divisor = sqrt(maximum(zero(g), s["square_avg"] - a * a) + c.eps_root) + c.eps
    s["velocity"] = c.mu * s["velocity"] + c.step_b * g / divisor
    return c.step * s["velocity"]


def adam(g, s, c):
    s["exp_avg"] = c.beta1 * s["exp_avg"] + c.one_minus_beta1 * g
    s["exp_avg_sq"] = c.beta2 * s["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
    m, v = s["exp_avg"], s["exp_avg_sq"]
    return (c.step_m * m + c.step_g * g) / (sqrt(v * c.inv_bias2 + c.eps_root) + c.eps)


def amsgrad(g, s, c):
    s["exp_avg"] = c.beta1 * s["exp_avg"] + c.one_minus_beta1 * g
    s["exp_avg_sq"] = c.beta2 * s["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
    s["max_exp_avg_sq"] = maximum(s["max_exp_avg_sq"], s["exp_avg_sq"] * c.pre)
    m, w = s["exp_avg"], s["max_exp_avg_sq"]
    return (c.step_m * m + c.step_g * g) / (sqrt(w * c.inv_bias2 + c.eps_root) + c.eps)


def adasqrt(g, s, c):
    s["square_sum"] = s["square_sum"] + g * g
    return c.step * g / (s["square_sum"] + c.eps)


def _traffic(g, s, c):
    for name in s:
        s[name] = s[name] + g
    return c.step * g


traffic0 = traffic1 = traffic2 = traffic3 = _traffic


def update(rule, param, grad, slots, coefficients, scale=1.0, l1=0.0, l2=0.0, decay=1.0):
    """One step of `rule` with what surrounds every rule: the new parameter and the new slots (a dict), as arrays."""
    dtype = param.dtype
    p, g = Flushed(param, dtype), Flushed(grad, dtype)
    s = {name: Flushed(value, dtype) for name, value in slots.items()}
    c = SimpleNamespace(**{name: Flushed(value, dtype) for name, value in coefficients.items()})
    # Neutral is what is neutral in the compute type: 1 + 1e-9 is 1 in float32.
    neutral = {"scale": 1.0, "l1": 0.0, "l2": 0.0, "decay": 1.0}
    given = {"scale": scale, "l1": l1, "l2": l2, "decay": decay}
    around = {k: Flushed(v, dtype) for k, v in given.items() if Flushed(v, dtype).value != neutral[k]}
    if "scale" in around:
        g = around["scale"] * g
    if "l1" in around:
        g = g + around["l1"] * sign(p)
    if "l2" in around:
        g = g + around["l2"] * p
    u = globals()[rule](g, s, c)
    p = around["decay"] * p - u if "decay" in around else p - u
    return p.value, {name: value.value for name, value in s.items()}


def same_bits(actual, expected):
    """Where two arrays differ in a bit. All NaN count as one: their payload is no number."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = f"u{actual.dtype.itemsize}"
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    with np.errstate(invalid="ignore"):  # ml_dtypes' function looks at a signaling NaN by a cast
        return (actual.view(integer) == expected.view(integer)) | (np.isnan(actual) & np.isnan(expected))


def assert_same_bits(actual, expected, what=""):
    """Fail with the first element that differs, and both values."""
    if actual.tobytes() == expected.tobytes() and actual.dtype == expected.dtype and actual.shape == expected.shape:
        return
    equal = same_bits(actual, expected)
    if not equal.all():
        where = tuple(int(k) for k in np.argwhere(~equal)[0])
        raise AssertionError(
            f"{what}: {np.count_nonzero(~equal)} of {equal.size} elements differ, the first at {where} of shape "
            f"{actual.shape}: {actual[where]!r} instead of {expected[where]!r}"
        )
