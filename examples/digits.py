"""Train a neural network on handwritten digits with every optimizer of onepass, and time their steps.

The network is plain NumPy (``mlp.py``); the data are the 1,797 real digits that ship inside scikit-learn, or your own.
Each optimizer starts from the same weights and sees the same batches. It trains the network twice, without and with
batch normalization (``onepass.BatchNorm``) before each ReLU, whose weights it steps as any others. All that is repeated
with other test samples, weights and batches, and the means are shown: a single run is luck as much as skill. A step on
the network's parameters is timed against the same formula in NumPy (``numpy_rules.py``), after a check that both give
the same parameters. The pictures come from ``race.py``.

With ``--device cuda`` all of it runs on a CUDA device, in CuPy: the same code on other arrays. The figures differ from
the CPU's in their last digits, because CuPy's matrix products add in another order than NumPy's; a step of onepass has
the same bits on both.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, TypeAlias

# Matrices this small gain nothing from a second BLAS thread, and lose a lot where the threads have to share a core.
# It must be set before NumPy loads its BLAS.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

import onepass
from mlp import MLP
from numpy_rules import RULES, new_state

Array: TypeAlias = npt.NDArray[Any]

# Under these each optimizer trains the network well without batch normalization, and no two of its curves lie on each
# other; the rest are the defaults.
SETTINGS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.05},
    "Momentum": {"lr": 0.01},
    "NAG": {"lr": 0.02},
    "AdaGrad": {"lr": 0.01},
    "AdaSqrt": {"lr": 1e-4},
    "RMSprop": {"lr": 3e-4},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.5},
    "AMSGrad": {"lr": 3e-4},
    "Nadam": {"lr": 2e-3},
}

HIDDEN = (256, 128)
BATCH = 32
CHECKED_STEPS = 20
TIMED_STEPS = 300
MIN_SAMPLES = 10


class DataError(ValueError):
    """What is wrong with the user's data, in one line."""


@dataclass(frozen=True)
class Dataset:
    """Standardized samples and their classes 0, 1, ..., split for training and test; on the host, or CuPy's."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: int
    xp: Any = np  # the module that does the work


@dataclass
class Result:
    """What the table and the pictures show of one optimizer."""

    losses: list[float] = field(default_factory=list)  # by epoch, in the mean of all runs, without batch normalization
    accuracies: list[float] = field(default_factory=list)  # of each run after the last epoch, without and
    accuracies_with_norm: list[float] = field(default_factory=list)  # with batch normalization
    onepass_us: float = 0.0
    numpy_us: float = 0.0

    @property
    def percent(self) -> float:
        """Mean test accuracy without batch normalization, as it is shown."""
        return round(100 * fmean(self.accuracies), 1)

    @property
    def percent_with_norm(self) -> float:
        """Mean test accuracy with batch normalization, as it is shown."""
        return round(100 * fmean(self.accuracies_with_norm), 1)


# Data


def load_digits() -> tuple[Array, Array]:
    """Return the digits of scikit-learn: 1,797 images of 8 x 8 pixels, and what they show."""
    from sklearn import datasets

    x, y = datasets.load_digits(return_X_y=True)
    return x, y


def load_file(file: Path) -> tuple[Array, Array]:
    """Return the arrays `x` and `y` of an .npz file.

    Raises
    ------
    DataError
        If there is no such file, or it is not an archive of such arrays.
    """
    try:
        # Pickles are refused: they could run anything.
        archive = np.load(file, allow_pickle=False)
    except OSError as error:
        raise DataError(error.strerror or "cannot be read") from None
    except Exception:  # NumPy and zipfile name a dozen, by what is wrong with the bytes
        raise DataError("is not an .npz archive") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError("is not an .npz archive but a single array")
    with archive:
        for name in ("x", "y"):
            if name not in archive.files:
                raise DataError(f"has no array {name!r}; there are: {', '.join(archive.files) or 'none'}")
        try:
            return archive["x"], archive["y"]
        except Exception:
            raise DataError("holds arrays that cannot be read (damaged, or Python objects)") from None


def prepare(x: Array, y: Array, rng: np.random.Generator) -> Dataset:
    """Check, shuffle, split 2 : 1 and standardize.

    Parameters
    ----------
    x : array of shape (samples, features)
        Any real numbers.
    y : array of shape (samples,)
        Any integers, one for each class.
    rng : numpy.random.Generator
        Chooses the test samples.

    Returns
    -------
    Dataset
        In float32, with mean 0 and standard deviation 1 of each feature over the training samples.

    Raises
    ------
    DataError
        If a classifier cannot be trained on this.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise DataError(f"x: shape {x.shape}, expected (samples, features)")
    if y.shape != x.shape[:1]:
        raise DataError(f"y: shape {y.shape} does not match the {x.shape[0]} samples of x")
    if x.dtype.kind not in "biuf":
        raise DataError(f"x: dtype {x.dtype}, expected real numbers")
    if y.dtype.kind not in "biu":
        raise DataError(f"y: dtype {y.dtype}, expected integer labels")
    if len(x) < MIN_SAMPLES:
        raise DataError(f"x: {len(x)} samples, expected at least {MIN_SAMPLES}")
    with np.errstate(over="ignore"):  # checked below
        x = x.astype(np.float64)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise DataError(f"x: {x[row, column]} at [{row}, {column}], expected finite numbers")
    labels, y = np.unique(y, return_inverse=True)
    if len(labels) < 2:
        raise DataError(f"y: only the label {labels[0]}, expected at least 2 different ones")
    if 2 * len(labels) > len(y):
        raise DataError(f"y: {len(labels)} different labels for {len(y)} samples, expected at least 2 samples for each")

    order = rng.permutation(len(x))
    # A third for the test: among 599 digits one more mistake is 0.17 %, among a fifth of them it would be 0.28 %.
    test, train = order[: len(x) // 3], order[len(x) // 3 :]
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        deviation = x[train].std(axis=0)
        deviation[deviation == 0] = 1  # a feature that is constant in the training samples
        x = ((x - x[train].mean(axis=0)) / deviation).astype(np.float32)
    if not np.isfinite(x).all():
        raise DataError("x: numbers too large to be standardized")
    return Dataset(x[train], y[train], x[test], y[test], len(labels))


# Devices


class DeviceError(RuntimeError):
    """Why a CUDA device cannot be used, in one line."""


def cuda() -> Any:
    """Return CuPy, once it is known that it and onepass work on a device.

    Raises
    ------
    DeviceError
        If something is missing.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise DeviceError(f"needs CuPy; pip install cupy-cuda12x or cupy-cuda13x ({error})") from None
    try:
        onepass.BatchNorm(1, device="cuda")
    except Exception as error:
        raise DeviceError(str(error)) from None
    return cupy


def device_name(data: Dataset) -> str:
    """Return the name of the device that has the data."""
    device: Any = data.x_train.device
    properties = getattr(data.xp.cuda.runtime, "getDeviceProperties", None)
    return f"device {device.id}" + (f", {properties(device.id)['name'].decode()}" if properties else "")


def to_device(data: Dataset, cupy: Any) -> Dataset:
    """Return the samples as CuPy arrays."""
    arrays = {name: cupy.asarray(getattr(data, name)) for name in ("x_train", "y_train", "x_test", "y_test")}
    return replace(data, xp=cupy, **arrays)


def wait(data: Dataset) -> None:
    """Wait until the device has done what it was given; the host does its work at once."""
    if data.xp is not np:
        data.xp.cuda.get_current_stream().synchronize()


def to_host(array: Array) -> Array:
    """Return a NumPy array."""
    host: Array = array if isinstance(array, np.ndarray) else array.get()
    return host


# Training and timing


def new_network(data: Dataset, run: int = 0, *, batch_norm: bool = True) -> MLP:
    """Return the network as it is before training; the weights of a run are the same for each optimizer."""
    sizes = (data.x_train.shape[1], *HIDDEN, data.classes)
    return MLP(sizes, np.random.default_rng((1, run)), xp=data.xp, batch_norm=batch_norm)


def batches(data: Dataset, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Return the training samples of one epoch, shuffled."""
    order = rng.permutation(len(data.x_train))
    # A single sample has no variance to be normalized by: if one is left over, it joins the batch before.
    cuts = [0, *range(BATCH, len(order) - 1, BATCH), len(order)]
    index = data.xp.asarray(order)
    x, y = data.x_train.take(index, axis=0), data.y_train.take(index, axis=0)
    return [(x[start:end], y[start:end]) for start, end in pairwise(cuts)]


def library(data: Dataset) -> str:
    """Return the name of what onepass is compared with."""
    return "NumPy" if data.xp is np else "CuPy"


def sample_gradients(data: Dataset) -> list[dict[str, Array]]:
    """Return gradients that the network really has, from its first batches."""
    net = new_network(data)
    rng = np.random.default_rng(2)
    gradients: list[dict[str, Array]] = []
    while len(gradients) < CHECKED_STEPS:
        gradients += [net.backward(x, y) for x, y in batches(data, rng)]
    return gradients[:CHECKED_STEPS]


def compare(name: str, data: Dataset, gradients: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
    """Check one optimizer against its formula in NumPy, then time a step of each on the network's parameters.

    On a device the formula is CuPy's, and a step has ended when the device has done it.

    Returns
    -------
    (float, float)
        Medians in microseconds: onepass, NumPy or CuPy.

    Raises
    ------
    AssertionError
        If the parameters differ after ``CHECKED_STEPS`` steps.
    """
    ours, theirs = new_network(data).params, new_network(data).params
    optimizer = getattr(onepass, name)(ours, **SETTINGS[name])
    rule, settings = RULES[name], SETTINGS[name]
    states = {key: new_state() for key in theirs}

    def numpy_step(t: int, grads: Mapping[str, Array]) -> None:
        for key, param in theirs.items():
            rule(param, grads[key], states[key], t, **settings)

    for t, grads in enumerate(gradients, start=1):
        optimizer.step(grads)
        numpy_step(t, grads)
    for key, param in theirs.items():
        # NumPy: the same bits; the tolerance is only for subnormal numbers, which onepass takes for 0. CuPy promises no
        # bits: its functions (powers, say) may round otherwise.
        rtol, atol = (0.0, float(np.finfo(param.dtype).tiny)) if data.xp is np else (1e-4, 1e-6)
        message = f"{name} and {library(data)} differ in {key}"
        np.testing.assert_allclose(to_host(ours[key]), to_host(param), rtol=rtol, atol=atol, err_msg=message)

    times = []
    grads = gradients[0]
    for t in range(len(gradients) + 1, len(gradients) + TIMED_STEPS + 1):  # in turn, so that both meet the same noise
        wait(data)
        start = time.perf_counter_ns()
        optimizer.step(grads)
        wait(data)
        middle = time.perf_counter_ns()
        numpy_step(t, grads)
        wait(data)
        times.append((middle - start, time.perf_counter_ns() - middle))
    ours_ns, theirs_ns = np.median(times, axis=0)
    return float(ours_ns) / 1e3, float(theirs_ns) / 1e3


class Training:
    """One network on its way, trained by one optimizer."""

    def __init__(self, name: str, data: Dataset, run: int, *, batch_norm: bool) -> None:
        self.data = data
        self.net = new_network(data, run, batch_norm=batch_norm)
        self.optimizer = getattr(onepass, name)(self.net.params, **SETTINGS[name])
        self.rng = np.random.default_rng((3, run))

    def epoch(self) -> None:
        """Go once over the training samples."""
        for x, y in batches(self.data, self.rng):
            self.optimizer.step(self.net.backward(x, y))

    def loss(self) -> float:
        """Return the mean loss over the training samples."""
        return self.net.evaluate(self.data.x_train, self.data.y_train)[0]

    def accuracy(self) -> float:
        """Return the fraction of the test samples that are classified correctly."""
        return self.net.evaluate(self.data.x_test, self.data.y_test)[1]


def run(names: Sequence[str], splits: Sequence[Dataset], epochs: int, console: Any) -> dict[str, Result]:
    """Train with every optimizer in turn, on all splits side by side, under progress bars; time its steps."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=12),
        TextColumn("epoch {task.completed:>3.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[now]}"),
    )
    results = {name: Result() for name in names}
    gradients = sample_gradients(splits[0])
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=epochs, now="") for name in names}
        for name, result in results.items():
            result.onepass_us, result.numpy_us = compare(name, splits[0], gradients)
            plain = [Training(name, data, number, batch_norm=False) for number, data in enumerate(splits)]
            with_norm = [Training(name, data, number, batch_norm=True) for number, data in enumerate(splits)]
            result.losses.append(fmean(training.loss() for training in plain))
            for _ in range(epochs):
                for training in (*plain, *with_norm):
                    training.epoch()
                result.losses.append(fmean(training.loss() for training in plain))
                result.accuracies = [training.accuracy() for training in plain]
                result.accuracies_with_norm = [training.accuracy() for training in with_norm]
                accuracies = f"test {result.percent:5.1f} %  with BN {result.percent_with_norm:5.1f} %"
                progress.update(tasks[name], advance=1, now=f"loss {result.losses[-1]:8.5f}  {accuracies}")
    return results


# What is shown


def show(results: Mapping[str, Result], runs: str, parameters: int, peer: str, console: Any) -> None:
    """Print the table, and what it says about batch normalization."""
    from rich.table import Table

    step = f"one step on {parameters:,} parameters, float32: median of {TIMED_STEPS}"
    table = Table(title=f"{runs.capitalize()}; {step}", title_style="")
    table.add_column("optimizer")
    for heading in ("lr", "train\nloss", "test\nacc.", "acc.\nwith BN", "onepass\nus", f"{peer}\nus", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            f"{SETTINGS[name]['lr']:g}",
            f"{result.losses[-1]:.5f}",
            f"{result.percent:.1f} %",
            f"{result.percent_with_norm:.1f} %",
            f"{result.onepass_us:.1f}",
            f"{result.numpy_us:.1f}",
            f"{result.numpy_us / result.onepass_us:.1f}x",
        )
    console.print(table)
    console.print(verdict(list(results.values())))


def verdict(results: Sequence[Result]) -> str:
    """Return what batch normalization does, in a sentence made from the figures."""
    gains = [result.percent_with_norm - result.percent for result in results]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    before = np.array([result.accuracies for result in results])
    after = np.array([result.accuracies_with_norm for result in results])
    change = 100 * (after - before).mean(axis=0)  # of each run
    text = (
        f"With batch normalization (BN) the test accuracy is higher for {better} of {len(gains)} optimizers, equal for "
        f"{len(gains) - better - worse}, lower for {worse}; the mean change is {change.mean():+.2f} percentage points"
    )
    if len(change) > 1:
        text += f", with a standard error of {change.std(ddof=1) / len(change) ** 0.5:.2f} over the {len(change)} runs"
    return text + "."


def draw(results: Mapping[str, Result], title: str, out: Path, console: Any) -> list[Path]:
    """Write the pictures, under a progress bar."""
    from rich.progress import Progress

    import race

    losses = {name: result.losses for name, result in results.items()}
    with Progress(console=console) as progress:
        task = progress.add_task("pictures", total=race.FRAMES)
        return [
            race.draw_losses(losses, title, out),
            *race.draw_race(list(results), out, advance=lambda: progress.advance(task)),
        ]


# The command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def optimizer_name(text: str) -> str:
    """Return the name of an optimizer, whatever case it is written in."""
    for name in SETTINGS:
        if text.lower() == name.lower():
            return name
    raise argparse.ArgumentTypeError(f"unknown optimizer {text!r}; there are {', '.join(SETTINGS)}")


def positive(text: str) -> int:
    """Return a number of epochs or runs."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return count


def writable_folder(out: Path) -> None:
    """Make the folder if needed; raise OSError if nothing can be written to it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """Read the options."""
    parser = Parser(prog="digits.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--optimizer",
        nargs="+",
        action="extend",
        type=optimizer_name,
        metavar="NAME",
        help=f"one or more of {', '.join(SETTINGS)} (default: all)",
    )
    parser.add_argument("--epochs", type=positive, default=30, help="passes over the data (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=5, help="repetitions to average (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="your own data: arrays x (samples, features), y")
    parser.add_argument(
        "--out", type=Path, default="demo", metavar="DIR", help="of the pictures (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to work (default: %(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="write no pictures")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    parser, options = parse(argv)
    names = list(dict.fromkeys(options.optimizer or SETTINGS))
    try:
        # Whatever is wrong or missing is found out before the work, not after it.
        if not options.no_plots:
            writable_folder(options.out)
        x, y = load_file(options.data) if options.data else load_digits()
        splits = [prepare(x, y, np.random.default_rng((0, number))) for number in range(options.runs)]
        if options.device == "cuda":
            cupy = cuda()
            splits = [to_device(data, cupy) for data in splits]
        from rich.console import Console

        if not options.no_plots:
            import race  # noqa: F401
    except ModuleNotFoundError as error:
        parser.error(f"needs the package {error.name}; get all with: pip install 'onepass[demo]'")
    except DeviceError as error:
        parser.error(f"argument --device: {error}")
    except DataError as error:
        parser.error(f"argument --data: {options.data}: {error}")
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(options.out)!r}: {error.strerror}")

    console = Console(highlight=False, markup=False)
    source = "your data" if options.data else "scikit-learn's digits"
    data = splits[0]
    sizes = "-".join(str(n) for n in (data.x_train.shape[1], *HIDDEN, data.classes))
    console.print(f"onepass {onepass.__version__}, isa {onepass.isa()}, threads {onepass.get_num_threads()}")
    if options.device == "cuda":
        console.print(
            f"CuPy {data.xp.__version__} on {device_name(data)}, whose sums are not NumPy's to the last digit"
        )
    console.print(f"{source}: {len(data.x_train)} training and {len(data.x_test)} test samples, network {sizes}\n")
    with np.errstate(over="ignore", invalid="ignore"):  # a training that diverges shows in its loss
        results = run(names, splits, options.epochs, console)
    parameters = sum(param.size for param in new_network(data).params.values())
    console.print()
    runs = "one run" if options.runs == 1 else f"mean of {options.runs} runs"
    show(results, runs, parameters, library(data), console)
    if not options.no_plots:
        title = f"Training a {sizes} network on {source}, {runs}, every step by onepass"
        for file in draw(results, title, options.out, console):
            console.print(f"{file}  {file.stat().st_size / 1e3:.0f} kB", soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("digits.py: interrupted")
