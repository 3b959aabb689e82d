"""Trajectories printed in a lecture, digit for digit, and one step of a network small enough to check by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

import onepass

EXAMPLES = json.loads((Path(__file__).parent / "data" / "worked-examples.json").read_text(encoding="utf-8"))
TABLES = {table["name"]: table for table in EXAMPLES["tables"]}
DTYPES = [np.float64, np.float32]

# The file's formulas are text; these are the same, as functions, and a test below compares them with the text.
GRADIENTS = {"2*x": lambda x: 2 * x, "4*x**3 + 3*x**2 - 4*x": lambda x: 4 * x**3 + 3 * x**2 - 4 * x}
VALUES = {"x**2": lambda x: x**2, "x**4 + x**3 - 2*x**2 - 2*x + 2": lambda x: x**4 + x**3 - 2 * x**2 - 2 * x + 2}


def test_the_file_has_the_four_tables():
    assert set(TABLES) == {"gd_x2", "gd_quartic", "momentum0.8_quartic", "nesterov0.9_quartic"}
    assert all(len(table["rows"]) == 20 for table in TABLES.values())
    assert all(len(row) == 2 for table in TABLES.values() for row in table["rows"])


@pytest.mark.parametrize("text", [*GRADIENTS, *VALUES])
def test_the_functions_are_the_ones_of_the_text(text):
    function = {**GRADIENTS, **VALUES}[text]
    for x in (-2.0, -0.3, 0.7, 1.9):
        assert function(x) == eval(text, {"__builtins__": {}}, {"x": x})


def rows_of(table, dtype):
    """The printed columns after each update by the optimizer that the table names."""
    gradient, value = GRADIENTS[table["gradient"]], VALUES[table["value"]]
    options = {"momentum": table["momentum"]} if "momentum" in table else {}
    x = np.array([table["start"]], dtype)
    opt = getattr(onepass, table["optimizer"])(x, lr=table["lr"], **options)
    rows = []
    for _ in table["rows"]:
        opt.step(gradient(x))
        printed = float((opt.weights() if table["optimizer"] == "NAG" else x)[0])
        rows.append([f"{printed:.3f}", f"{value(printed):.5f}"])
    return rows


@pytest.mark.parametrize("name", TABLES)
def test_printed_table(name):
    assert rows_of(TABLES[name], np.float64) == TABLES[name]["rows"]


@pytest.mark.parametrize("name", TABLES)
def test_printed_table_in_float32(name):
    """All digits of x; f has seven digits in places, so the rounding of x to float32 may turn its last one over."""
    for (x, f), (printed_x, printed_f) in zip(rows_of(TABLES[name], np.float32), TABLES[name]["rows"], strict=True):
        assert x == printed_x
        assert abs(round(float(f) * 1e5) - round(float(printed_f) * 1e5)) <= 1


@pytest.mark.parametrize("name", ["momentum0.8_quartic", "nesterov0.9_quartic"])
def test_printed_table_with_the_rate_outside_the_velocity(name):
    table = TABLES[name]
    gradient = GRADIENTS[table["gradient"]]
    x = np.array([table["start"]])
    cls = getattr(onepass, table["optimizer"])
    opt = cls(x, lr=table["lr"], momentum=table["momentum"], lr_in_velocity=False)
    rows = []
    for _ in table["rows"]:
        opt.step(gradient(x))
        rows.append(f"{float((opt.weights() if cls is onepass.NAG else x)[0]):.3f}")
    assert rows == [printed for printed, _ in table["rows"]]


def test_the_nesterov_table_is_not_the_lookahead_point():
    """Or NAG.weights() could return the parameters."""
    table = TABLES["nesterov0.9_quartic"]
    x = np.array([table["start"]])
    opt = onepass.NAG(x, lr=0.1, momentum=0.9)
    opt.step(GRADIENTS[table["gradient"]](x))
    assert f"{x[0]:.3f}" == "0.280"
    assert f"{opt.weights()[0]:.3f}" == table["rows"][0][0] == "-0.800"


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def forward(net, x):
    hidden = net["W1"] @ x + net["b1"]
    return hidden, sigmoid(net["W2"] @ np.maximum(hidden, 0.0) + net["b2"])


def gradients(net, x, target):
    """Backpropagation by hand: the derivative of the cross-entropy by the logit is output - target."""
    hidden, output = forward(net, x)
    by_logit = output - target
    by_hidden = (net["W2"].T @ by_logit) * (hidden > 0.0)
    active = np.maximum(hidden, 0.0)
    return {"W1": np.outer(by_hidden, x), "b1": by_hidden, "W2": np.outer(by_logit, active), "b2": by_logit}


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layer_network(dtype):
    printed = EXAMPLES["two_layer_network"]
    x, target = np.array([1.0, 2.0], dtype), np.zeros(1, dtype)
    shapes = {"W1": (2, 2), "b1": (2,), "W2": (1, 2), "b2": (1,)}
    net = {name: np.full(shape, 0.1, dtype) for name, shape in shapes.items()}
    _, output = forward(net, x)
    assert f"{output[0]:.4f}" == f"{printed['sigmoid']:.4f}"
    assert f"{-np.log1p(-output[0]):.4f}" == f"{printed['loss']:.4f}"

    opt = onepass.SGD(net, lr=0.1)
    opt.step(gradients(net, x, target))
    for name, shape in shapes.items():
        assert np.shape(printed[name]) == shape
        assert [f"{w:.4f}" for w in net[name].ravel()] == [f"{w:.4f}" for w in np.ravel(printed[name])], name

    _, after = forward(net, x)
    assert after[0] < output[0]
