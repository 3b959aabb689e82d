"""The demo, run as a user runs it: what it shows, what it writes, and its one line for whatever is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from mlp import MLP
from numpy_rules import RULES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def demo(*options, cwd):
    command = [sys.executable, str(EXAMPLES / "digits.py"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)


def table(result):
    """For each optimizer the numbers of its row: lr, training loss, test accuracy, onepass, NumPy, ratio."""
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    rows = {}
    for line in result.stdout.splitlines():
        name, *cells = (cell.strip() for cell in re.split(r"[│|]", line.strip().strip("│|")))
        if name in RULES and len(cells) == 6:
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
    for _, loss, accuracy, onepass_us, numpy_us, ratio in rows.values():
        assert 0 < loss < 1
        assert 80 < accuracy <= 100
        assert onepass_us > 0
        assert numpy_us > 0
        assert ratio == pytest.approx(numpy_us / onepass_us, abs=0.06 * (1 + ratio))
    assert re.search(r"^onepass \S+, isa \w+, threads \d+$", result.stdout, re.MULTILINE)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) < 30  # no terminal, no flood
    assert list(tmp_path.iterdir()) == []


def test_all_optimizers_agree_with_numpy_and_learn(tmp_path):
    # The demo itself stops if a single bit differs from NumPy's.
    rows = table(demo("--epochs", 4, "--no-plots", cwd=tmp_path))
    assert list(rows) == list(RULES)
    for name, (_, _, accuracy, *_) in rows.items():
        assert accuracy > 90, name


def test_same_result_every_time(tmp_path):
    x, y = separable(np.random.default_rng(6))
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    options = ["--data", "mine.npz", "--epochs", 2, "--optimizer", "NAG", "--no-plots"]
    first, second = (table(demo(*options, cwd=tmp_path))["NAG"] for _ in range(2))
    assert first[:3] == second[:3]


def test_own_data_and_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    x, y = separable(np.random.default_rng(5))
    np.savez_compressed(tmp_path / "mine.npz", x=x, y=y)
    options = ["--data", "mine.npz", "--epochs", 30, "--optimizer", "RMSprop", "--optimizer", "Nadam", "NADAM"]
    rows = table(demo(*options, "--out", Path("new", "folder"), cwd=tmp_path))
    assert list(rows) == ["RMSprop", "Nadam"]
    assert all(accuracy > 90 for _, _, accuracy, *_ in rows.values())

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


def test_gradients_of_the_network():
    rng = np.random.default_rng(0)
    net = MLP((5, 7, 6, 3), rng, np.float64)
    x, y = rng.normal(size=(11, 5)), rng.integers(3, size=11)
    grads = net.backward(x, y)
    step = 1e-6
    for name, param in net.params.items():
        for index in np.ndindex(param.shape):
            kept = param[index]
            param[index] = kept + step
            above, _ = net.evaluate(x, y)
            param[index] = kept - step
            below, _ = net.evaluate(x, y)
            param[index] = kept
            assert grads[name][index] == pytest.approx((above - below) / (2 * step), abs=1e-8)


X, Y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
HOLE = X.copy()
HOLE[3, 1] = np.nan

BAD_OPTIONS = {
    "optimizer": (["--optimizer", "Adagard"], "unknown optimizer 'Adagard'; there are SGD, Momentum, NAG, AdaGrad"),
    "no optimizer": (["--optimizer"], "--optimizer: expected at least one argument"),
    "no epochs": (["--epochs", "0"], "--epochs: expected an integer >= 1, got '0'"),
    "negative epochs": (["--epochs", "-3"], "--epochs: expected an integer >= 1, got '-3'"),
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
def test_bad_arrays(arrays, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # as the demo's import does, but only here
    import digits  # in this process: fifteen interpreters would take longer than all the rest

    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit) as stop:
        digits.main(["--no-plots", "--data", str(tmp_path / "bad.npz")])
    is_one_line(stop.value.code, *capsys.readouterr(), expected)


def test_missing_file(tmp_path):
    complains(["--no-plots", "--data", "nowhere.npz"], "nowhere.npz: No such file", tmp_path)


def test_single_array(tmp_path):
    np.save(tmp_path / "single.npy", X)
    complains(["--no-plots", "--data", "single.npy"], "single.npy: is not an .npz archive but a single array", tmp_path)
