"""The demo, run as a user runs it: what it shows, what it writes, and its one line for whatever is wrong."""

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")

import onepass
from mlp import MLP
from numpy_rules import RULES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def demo(*options, cwd):
    command = [sys.executable, str(EXAMPLES / "digits.py"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)


@pytest.fixture
def digits(monkeypatch):
    """The demo as a module."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # as its import does, but only here
    return importlib.import_module("digits")


def says(result):
    """The numbers below the table: optimizers with a higher, equal, lower accuracy, the mean change, its error."""
    number = r"([-+.\d]+)"
    pattern = (
        rf"higher for {number} of \d+ optimizers, equal for {number}, lower for {number}; the mean change is {number} "
        rf"percentage points(?:, with a standard error of {number} over the \d+ runs)?\."
    )
    numbers = re.search(pattern, " ".join(result.stdout.split())).groups()
    return [None if number is None else float(number) for number in numbers]


def table(result):
    """For each optimizer its row: lr, training loss, test accuracy, the same with BatchNorm, onepass, NumPy, ratio."""
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    rows = {}
    for line in result.stdout.splitlines():
        name, *cells = (cell.strip() for cell in re.split(r"[│|]", line.strip().strip("│|")))
        if name in RULES and len(cells) == 7:
            rows[name] = [float(re.match(r"[-+.0-9e]+|nan", cell).group()) for cell in cells]
    return rows


def separable(rng, samples=120):
    """Three classes of user's data on scales that need standardizing, under labels that are no indices."""
    labels = np.array([-7, 3, 40], np.int16)
    y = rng.integers(3, size=samples)
    centres = np.array([[0, 0, 5], [9000, 0, 5], [0, 0.01, 5]])  # the last feature is constant
    noise = rng.normal(size=(samples, 3)) * [300, 0.0003, 0]
    return centres[y] + noise, labels[y]


def test_table_of_two_optimizers(tmp_path):
    result = demo("--epochs", 1, "--optimizer", "adam", "SGD", "--no-plots", "--out", tmp_path / "out", cwd=tmp_path)
    rows = table(result)
    assert list(rows) == ["Adam", "SGD"]
    for _, loss, accuracy, accuracy_with_norm, onepass_us, numpy_us, ratio in rows.values():
        assert 0 < loss < 1
        assert 80 < accuracy <= 100
        assert 80 < accuracy_with_norm <= 100
        assert onepass_us > 0
        assert numpy_us > 0
        assert ratio == pytest.approx(numpy_us / onepass_us, abs=0.06 * (1 + ratio))
    assert any(accuracy != accuracy_with_norm for _, _, accuracy, accuracy_with_norm, *_ in rows.values())
    assert re.search(r"^onepass \S+, isa \w+, threads \d+$", result.stdout, re.MULTILINE)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) < 30  # no terminal, no flood
    assert list(tmp_path.iterdir()) == []


def test_all_optimizers_agree_with_numpy_and_learn(tmp_path):
    # The demo itself stops if a single bit differs from NumPy's.
    result = demo("--epochs", 4, "--no-plots", cwd=tmp_path)
    rows = table(result)
    assert list(rows) == list(RULES)
    for name, (_, _, accuracy, accuracy_with_norm, *_) in rows.items():
        assert accuracy > 90, name
        assert accuracy_with_norm > 90, name
    higher, equal, lower, change, error = says(result)
    gains = [accuracy_with_norm - accuracy for _, _, accuracy, accuracy_with_norm, *_ in rows.values()]
    assert (higher, equal, lower) == tuple(sum(np.sign(gain) == sign for gain in gains) for sign in (1, 0, -1))
    assert change == pytest.approx(np.mean(gains), abs=0.11)
    assert error > 0


def test_sentence_about_batch_norm(digits):
    results = [
        digits.Result(accuracies=[0.9, 0.92], accuracies_with_norm=[0.93, 0.97]),
        digits.Result(accuracies=[0.9, 0.9], accuracies_with_norm=[0.89, 0.91]),
        digits.Result(accuracies=[0.95, 0.97], accuracies_with_norm=[0.9500, 0.9699]),  # both are shown as 96.0 %
        digits.Result(accuracies=[0.95, 0.97], accuracies_with_norm=[0.91, 1.00]),
    ]
    # The runs change by 0.03 - 0.01 + 0 - 0.04 and 0.05 + 0.01 - 0.0001 + 0.03, over 4.
    assert digits.verdict(results) == (
        "With batch normalization (BN) the test accuracy is higher for 1 of 4 optimizers, equal for 2, lower for 1; "
        "the mean change is +0.87 percentage points, with a standard error of 1.37 over the 2 runs."
    )
    assert digits.verdict([digits.Result(accuracies=[0.9], accuracies_with_norm=[0.8])]) == (
        "With batch normalization (BN) the test accuracy is higher for 0 of 1 optimizers, equal for 0, lower for 1; "
        "the mean change is -10.00 percentage points."
    )


def test_one_run(tmp_path):
    options = ["--epochs", 1, "--optimizer", "adam", "--no-plots"]
    one, five = demo(*options, "--runs", 1, cwd=tmp_path), demo(*options, cwd=tmp_path)
    assert table(one)["Adam"][:4] != table(five)["Adam"][:4]
    assert "One run; one step on 51,210 parameters" in one.stdout
    assert "Mean of 5 runs; one step on 51,210 parameters" in five.stdout
    *_, error = says(one)
    assert error is None


def test_same_result_every_time(tmp_path):
    x, y = separable(np.random.default_rng(6))
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    options = ["--data", "mine.npz", "--epochs", 2, "--optimizer", "NAG", "--no-plots"]
    first, second = (table(demo(*options, cwd=tmp_path))["NAG"] for _ in range(2))
    assert first[:4] == second[:4]


def test_own_data_and_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    x, y = separable(np.random.default_rng(5))
    np.savez_compressed(tmp_path / "mine.npz", x=x, y=y)
    options = ["--data", "mine.npz", "--epochs", 30, "--optimizer", "RMSprop", "--optimizer", "Nadam", "NADAM"]
    rows = table(demo(*options, "--out", Path("new", "folder"), cwd=tmp_path))
    assert list(rows) == ["RMSprop", "Nadam"]
    assert all(min(accuracies) > 90 for _, _, *accuracies, _, _, _ in rows.values())

    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == ["losses.png", "race.gif", "race.png"]
    for name in ("losses.png", "race.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        with image.open(folder / name) as picture:
            assert picture.width == 1800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn
    assert (folder / "race.gif").read_bytes().startswith(b"GIF89a")
    assert (folder / "race.gif").stat().st_size < 2e6
    with image.open(folder / "race.gif") as film:
        assert film.width == 900
        assert film.n_frames > 30
        durations = []
        for frame in range(film.n_frames):
            film.seek(frame)
            durations.append(film.info["duration"])
        assert 3000 <= sum(durations) <= 7000


def test_race_follows_the_lecture(tmp_path):
    pytest.importorskip("matplotlib")
    # The first points that the lecture prints for its quartic: gradient descent, momentum 0.8, Nesterov 0.9.
    code = "import race; [print(*race.path(n, race.SURFACES[0])[:5, 0].round(3)) for n in ('SGD', 'Momentum', 'NAG')]"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines() == [
        "-2.0 -0.8 -1.107 -1.375 -1.452",
        "-2.0 -0.8 -0.147 0.311 0.761",
        "-2.0 -0.8 0.36 0.268 0.247",
    ]


def network(batch_norm, dtype=np.float64):
    """A network whose parameters are nowhere 0 or 1, and a batch."""
    rng = np.random.default_rng(0)
    net = MLP((5, 7, 6, 3), rng, dtype, batch_norm=batch_norm)
    for param in net.params.values():
        param += (0.1 * rng.normal(size=param.shape)).astype(dtype)
    return net, rng.normal(size=(11, 5)).astype(dtype), rng.integers(3, size=11)


def training_loss(net, x, y):
    """The mean cross-entropy, each batch being normalized by its own statistics."""
    logits = net.forward(x, training=True)[-1]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y])


BATCH_NORM = pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "BatchNorm"])


@BATCH_NORM
def test_gradients_of_the_network(batch_norm):
    net, x, y = network(batch_norm)
    grads = net.backward(x, y)
    assert grads.keys() == net.params.keys()
    step = 1e-6
    for name, param in net.params.items():
        assert np.abs(grads[name]).max() > 1e-3
        for index in np.ndindex(param.shape):
            kept = param[index]
            param[index] = kept + step
            above = training_loss(net, x, y)
            param[index] = kept - step
            below = training_loss(net, x, y)
            param[index] = kept
            assert grads[name][index] == pytest.approx((above - below) / (2 * step), abs=1e-8)


@BATCH_NORM
def test_loss_and_accuracy(batch_norm):
    net, x, y = network(batch_norm)
    training_loss(net, x, y)  # moves the running statistics, if there are any
    logits = net.forward(x)[-1]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, accuracy = net.evaluate(x, y)
    assert loss == pytest.approx(-np.log(probability[np.arange(11), y]).mean(), rel=1e-12)
    assert accuracy == np.mean(probability.argmax(axis=1) == y)


def test_parameters_of_the_network():
    plain, with_norm = (MLP((5, 7, 3), np.random.default_rng(0), batch_norm=choice) for choice in (False, True))
    assert list(plain.params) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert list(with_norm.params) == ["fc1.weight", "bn1.weight", "bn1.bias", "fc2.weight", "fc2.bias"]
    assert plain.norms == {}
    assert with_norm.norms.keys() == {1}
    for name in ("fc1.weight", "fc2.weight", "fc2.bias"):  # the same start
        np.testing.assert_array_equal(plain.params[name], with_norm.params[name])
    assert all(param.dtype == np.float32 for param in with_norm.params.values())


CUDA_BUILD = "there is no CUDA device, or no CUDA kernels in this build"


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("No module named 'cupy'", "argument --device: needs CuPy; pip install cupy-cuda12x or cupy-cuda13x"),
        (None, f"argument --device: device: 'cuda' cannot be used: {CUDA_BUILD}"),
    ],
)
def test_without_a_cuda_device_the_demo_says_what_is_missing(missing, expected, tmp_path, digits, capsys, monkeypatch):
    found = importlib.import_module

    def find(name, *package):
        if name != "cupy":
            return found(name, *package)
        if missing:
            raise ImportError(missing)
        return types.ModuleType(name)

    def no_device(*_, **__):
        raise RuntimeError(f"device: 'cuda' cannot be used: {CUDA_BUILD}")

    monkeypatch.setattr(digits.importlib, "import_module", find)
    monkeypatch.setattr(onepass, "BatchNorm", no_device)
    with pytest.raises(SystemExit) as stop:
        digits.main(["--device", "cuda", "--no-plots"])
    is_one_line(stop.value.code, *capsys.readouterr(), expected)


@pytest.mark.cuda
def test_the_demo_on_a_cuda_device_learns_what_it_learns_on_the_host(tmp_path):
    options = ["--epochs", 1, "--runs", 1, "--optimizer", "Adam", "Nadam", "--no-plots"]
    result = demo(*options, "--device", "cuda", cwd=tmp_path)
    on_device, on_host = table(result), table(demo(*options, cwd=tmp_path))
    assert re.search(r"^CuPy \S+ on device 0", result.stdout, re.MULTILINE)
    assert "CuPy" in result.stdout.split("┃ ratio")[0]
    for name, (_, loss, accuracy, accuracy_with_norm, *_) in on_host.items():
        assert on_device[name][1] == pytest.approx(loss, rel=0.05)  # sums round otherwise, and training amplifies that
        assert on_device[name][2] == pytest.approx(accuracy, abs=2.0)
        assert on_device[name][3] == pytest.approx(accuracy_with_norm, abs=2.0)


@pytest.mark.cuda
@BATCH_NORM
def test_the_network_has_the_same_gradients_on_a_device(batch_norm, digits):
    cupy = digits.cuda()
    host, x, y = network(batch_norm)
    device = MLP((5, 7, 6, 3), np.random.default_rng(0), np.float64, xp=cupy, batch_norm=batch_norm)
    for name, param in device.params.items():
        param[...] = cupy.asarray(host.params[name])
    got, expected = device.backward(cupy.asarray(x), cupy.asarray(y)), host.backward(x, y)
    for name, grad in expected.items():
        assert isinstance(got[name], cupy.ndarray)
        np.testing.assert_allclose(got[name].get(), grad, rtol=1e-9, atol=1e-12, err_msg=name)
    assert device.evaluate(cupy.asarray(x), cupy.asarray(y)) == pytest.approx(host.evaluate(x, y), rel=1e-9)


@pytest.mark.cuda
def test_a_formula_that_differs_is_found_on_a_device_too(digits, monkeypatch):
    x, y = separable(np.random.default_rng(7))
    data = digits.to_device(digits.prepare(x, y, np.random.default_rng(0)), digits.cuda())
    gradients = digits.sample_gradients(data)
    assert digits.compare("Momentum", data, gradients)[0] > 0
    monkeypatch.setattr(digits, "RULES", {"SGD": lambda *_, **__: None})
    with pytest.raises(AssertionError, match=r"SGD and CuPy differ in fc1\.weight"):
        digits.compare("SGD", data, gradients)


def test_batch_norm_comes_before_the_activation():
    net, x, _ = network(batch_norm=True)
    z = x @ net.params["fc1.weight"]
    normalized = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5)
    expected = np.maximum(net.params["bn1.weight"] * normalized + net.params["bn1.bias"], 0)
    hidden = net.forward(x, training=True)[1]
    assert (hidden > 0).any()
    assert (hidden == 0).any()
    np.testing.assert_allclose(hidden, expected, rtol=1e-12, atol=1e-12)


def test_one_optimizer_steps_the_batch_norm():
    net, x, y = network(batch_norm=True, dtype=np.float32)
    before = {name: param.copy() for name, param in net.params.items()}
    outputs = net.forward(x)[-1]
    onepass.SGD(net.params, lr=0.5).step(net.backward(x, y))
    for name, param in net.params.items():
        assert (param != before[name]).any(), name
    for layer, norm in net.norms.items():
        assert norm.weight is net.params[f"bn{layer}.weight"]
        assert norm.bias is net.params[f"bn{layer}.bias"]
    assert (net.forward(x)[-1] != outputs).any()


def test_gradients_are_not_overwritten_by_the_next():
    net, x, y = network(batch_norm=True)
    first = net.backward(x, y)
    kept = {name: grad.copy() for name, grad in first.items()}
    second = net.backward(x[::-1].copy(), y)
    for name, grad in first.items():
        np.testing.assert_array_equal(grad, kept[name])
        assert (second[name] != grad).any()


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    net, x, y = network(batch_norm=True)
    for _ in range(3):
        net.backward(x, y)
    before = {layer: norm.state_dict() for layer, norm in net.norms.items()}
    assert all(state["num_batches_tracked"] == 3 for state in before.values())
    assert all((state["running_mean"] != 0).all() for state in before.values())
    net.evaluate(x, y)
    for layer, norm in net.norms.items():
        for name, value in norm.state_dict().items():
            np.testing.assert_array_equal(value, before[layer][name])
    alone = np.concatenate([net.forward(x[i : i + 1])[-1] for i in range(len(x))])  # a batch of one has no variance
    np.testing.assert_allclose(net.forward(x)[-1], alone, rtol=1e-12, atol=1e-12)
    assert not np.allclose(net.forward(x, training=True)[-1], alone)


@pytest.mark.parametrize("samples", [2, 31, 32, 33, 34, 64, 65, 1198])
def test_batches(samples, digits):
    x, y = np.arange(samples, dtype=np.float32)[:, None], np.arange(samples)
    data = digits.Dataset(x, y, x, y, samples)
    batches = digits.batches(data, np.random.default_rng(0))
    assert sorted(np.concatenate([labels for _, labels in batches])) == list(range(samples))
    for inputs, labels in batches:
        np.testing.assert_array_equal(inputs[:, 0], labels)
        assert 2 <= len(labels) <= digits.BATCH + 1  # BatchNorm refuses a single sample
    assert all(len(labels) == digits.BATCH for _, labels in batches[:-1])


def test_numpy_is_compared_on_the_batch_norm_too(digits, monkeypatch):
    x, y = separable(np.random.default_rng(7))
    data = digits.prepare(x, y, np.random.default_rng(0))
    gradients = digits.sample_gradients(data)
    assert len(gradients) == digits.CHECKED_STEPS
    assert all(grads.keys() == digits.new_network(data).params.keys() for grads in gradients)
    assert {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"} < gradients[0].keys()
    assert all((grads["bn1.weight"] != gradients[-1]["bn1.weight"]).any() for grads in gradients[:-1])

    def forgetful(param, grad, state, t, *, lr):
        if not (param.ndim == 1 and param.all()):  # the weights of a BatchNorm start at 1, the biases at 0
            RULES["SGD"](param, grad, state, t, lr=lr)

    digits.compare("SGD", data, gradients)
    monkeypatch.setattr(digits, "RULES", {"SGD": forgetful})
    with pytest.raises(AssertionError, match=r"SGD and NumPy differ in bn1\.weight"):
        digits.compare("SGD", data, gradients)


X, Y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
HOLE = X.copy()
HOLE[3, 1] = np.nan

BAD_OPTIONS = {
    "optimizer": (["--optimizer", "Adagard"], "unknown optimizer 'Adagard'; there are SGD, Momentum, NAG, AdaGrad"),
    "no optimizer": (["--optimizer"], "--optimizer: expected at least one argument"),
    "no epochs": (["--epochs", "0"], "--epochs: expected an integer >= 1, got '0'"),
    "negative epochs": (["--epochs", "-3"], "--epochs: expected an integer >= 1, got '-3'"),
    "no runs": (["--runs", "0"], "--runs: expected an integer >= 1, got '0'"),
    "device": (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    "half an epoch": (["--epochs", "0.5"], "--epochs: expected an integer >= 1, got '0.5'"),
    "option": (["--epoch", "3"], "unrecognized arguments: --epoch"),
    "out is a file": (["--out", "taken"], "--out: cannot write to 'taken': not a folder"),
    "out below a file": (["--out", "taken/demo"], "--out: cannot write to"),
}
BAD_BYTES = {
    "empty": (b"", "is not an .npz archive"),
    "text": (b"x,y\n1,2\n", "is not an .npz archive"),
    "half an archive": (b"PK\x03\x04 and no more", "is not an .npz archive"),
}
BAD_ARRAYS = {
    "no y": ({"x": X}, "has no array 'y'; there are: x"),
    "no x": ({"y": Y, "images": X}, "has no array 'x'; there are: y, images"),
    "one axis": ({"x": X[:, 0], "y": Y}, "x: shape (20,), expected (samples, features)"),
    "no features": ({"x": X[:, :0], "y": Y}, "x: shape (20, 0), expected (samples, features)"),
    "lengths": ({"x": X, "y": Y[:-1]}, "y: shape (19,) does not match the 20 samples of x"),
    "column": ({"x": X, "y": Y[:, None]}, "y: shape (20, 1) does not match the 20 samples of x"),
    "text": ({"x": X.astype(str), "y": Y}, "x: dtype <U32, expected real numbers"),
    "complex": ({"x": X + 1j, "y": Y}, "x: dtype complex128, expected real numbers"),
    "objects": ({"x": X.astype(object), "y": Y}, "Python objects"),
    "nan": ({"x": HOLE, "y": Y}, "x: nan at [3, 1], expected finite numbers"),
    "too large": ({"x": X * 4e306, "y": Y}, "x: numbers too large"),
    "float labels": ({"x": X, "y": Y + 0.5}, "y: dtype float64, expected integer labels"),
    "few": ({"x": X[:9], "y": Y[:9]}, "x: 9 samples, expected at least 10"),
    "one class": ({"x": X, "y": Y * 0 + 6}, "y: only the label 6, expected at least 2 different ones"),
    "no classes": ({"x": X, "y": np.arange(20)}, "y: 20 different labels for 20 samples"),
}


def complains(options, expected, cwd):
    result = demo(*options, cwd=cwd)
    is_one_line(result.returncode, result.stdout, result.stderr, expected)


def is_one_line(code, stdout, stderr, expected):
    assert code == 2
    assert stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith("digits.py: error: ")
    assert expected in line


@pytest.mark.parametrize(("options", "expected"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(options, expected, tmp_path):
    (tmp_path / "taken").write_text("a file")
    complains(options, expected, tmp_path)
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize(("content", "expected"), BAD_BYTES.values(), ids=BAD_BYTES)
def test_bad_file(content, expected, tmp_path):
    (tmp_path / "bad.npz").write_bytes(content)
    complains(["--no-plots", "--data", "bad.npz"], f"--data: bad.npz: {expected}", tmp_path)


@pytest.mark.parametrize(("arrays", "expected"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(arrays, expected, tmp_path, capsys, digits):
    # In this process: fifteen interpreters would take longer than all the rest.
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit) as stop:
        digits.main(["--no-plots", "--data", str(tmp_path / "bad.npz")])
    is_one_line(stop.value.code, *capsys.readouterr(), expected)


def test_missing_file(tmp_path):
    complains(["--no-plots", "--data", "nowhere.npz"], "nowhere.npz: No such file", tmp_path)


def test_single_array(tmp_path):
    np.save(tmp_path / "single.npy", X)
    complains(["--no-plots", "--data", "single.npy"], "single.npy: is not an .npz archive but a single array", tmp_path)
