"""The report: that page and pictures are what the records give, and say so where something is missing or missed.

Most of it runs on made-up records, which are small, plausible and not committed anywhere.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "bench"))


method = load("method")
records = load("records")
plots = load("plots")
report = load("report")

ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "cpu": "a processor",
    "cpus": {"physical": 2, "logical": 2, "usable": 2},
    "threads": 2,
    "isa": "avx512",
    "python": "3.11.7",
    "numpy": "2.4.6",
    "torch": "2.13.0+cpu",
    "deepspeed": "not installed",
    "command": "python bench/peers/made_up.py",
    "date": "2026-11-22T12:00:00+00:00",
    "quick": False,
}

# --- Made-up records --------------------------------------------------------------------------------------------------


def estimate(value: float, width: float = 0.04) -> Any:
    return method.Estimate(value, value * (1 - width / 2), value * (1 + width / 2))


def made_up(case: str, kind: str, peer: str, value: float | None = 2.0, width: float = 0.04, **fields: Any) -> Any:
    """A row in which ours takes 1 ms, unless told otherwise."""
    fields = {"threads": 2, "elements": 1 << 20, "ours_seconds": 1e-3, **fields}
    row = method.Row(case, kind, ours="onepass", peer=peer, **fields)
    if value is not None:
        row.value = estimate(value, width)
        if row.measure == "peer / ours":
            row.peer_seconds = row.ours_seconds * value
    return row


def write(folder: Path, name: str, rows: Any, **environment: Any) -> None:
    method.write_results(rows, {**ENVIRONMENT, **environment}, folder, name)


def adam_seconds(elements: int, tensors: int = 1) -> float:
    """What a step could take: a call, each tensor, and the memory."""
    speed = 3e11 if elements * 28 < 2e6 else 2.1e11 if elements * 28 < 32e6 else 5.5e10
    return 1.6e-6 + 2.5e-7 * tensors + 28 * elements / speed


PEERS = {
    "torch fused": (24e-6, 5e-6, 1.02),
    "torch compiled": (38e-6, 4e-6, 1.25),
    "torch foreach": (80e-6, 9e-6, 3.9),
    "torch for-loop": (70e-6, 7e-5, 4.2),
    "Optax": (60e-6, 6e-6, 2.1),
    "NumPy": (20e-6, 2e-5, 11.0),
}
NO_DEEPSPEED = "no peer: its extension does not build here"


def sweep(
    kind: str, word: str, elements: int, tensors: int = 1, buffers: str = "rotated", warm: float = 1.0, **fields: Any
) -> list[Any]:
    """Rows of a case, one for each peer; `warm` is by how much the caches speed everybody up."""
    ours = warm * adam_seconds(elements, tensors)
    rows = []
    for index, (peer, (call, each, passes)) in enumerate(PEERS.items()):
        theirs = call + each * (tensors - 1) + passes * (ours - 1.6e-6)
        width = 0.25 if (index + elements.bit_length()) % 6 == 0 else 0.05
        row = made_up(f"{kind}/{word}/{peer}", kind, peer, theirs / ours, width, elements=elements, **fields)
        row.ours_seconds, row.peer_seconds, row.tensors = ours, theirs, tensors
        row.ours_estimate, row.buffers = estimate(ours), buffers
        rows.append(row)
    rows.append(made_up(f"{kind}/{word}/DeepSpeed", kind, "DeepSpeed", None, note=NO_DEEPSPEED, elements=elements))
    rows[-1].tensors, rows[-1].buffers = tensors, buffers
    return rows


def both(kind: str, word: str, elements: int, tensors: int = 1) -> list[Any]:
    """Rotated rows and warm ones, or one of the two where arrays are too small or too large."""
    if elements < 1 << 13:
        return sweep(kind, word, elements, tensors, "warm")
    rows = sweep(kind, word, elements, tensors)
    return rows + (sweep(kind, f"{word}/warm", elements, tensors, "warm", 0.6) if elements < 1 << 23 else [])


SLOPES = {"torch fused": 9.0, "torch fused, flush_denormal": 0.01, "NumPy": 17.0}


def slowdowns(whose: str, value: float, width: float) -> dict[str, float]:
    name = f"{whose}_slowdown"
    return {name: value, f"{name}_low": value * (1 - width / 2), f"{name}_high": value * (1 + width / 2)}


def write_sweeps(folder: Path) -> None:
    rows = []
    for power in range(6, 29, 2):
        rows += both("size", f"Adam/{1 << power}", 1 << power)
    for tensors in (1, 10, 100, 1000, 10_000):
        rows += both("tensors", f"Adam/{tensors}x1000", 1000 * tensors, tensors)
    for threads in (1, 2):
        rows += sweep("threads", f"Adam/16M/{threads}", 1 << 24, threads=threads)
    for model, tensors, elements in (
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2", 148, 124_439_808),
    ):
        rows += sweep("model", model, elements, tensors)
    for fraction in (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0):
        for peer, slope in SLOPES.items():
            slow = 1 + slope * (1 - math.exp(-4 * fraction))
            row = made_up(f"subnormal/Adam/{fraction:g}/{peer}", "subnormal", peer, slow, elements=1 << 24)
            width = 0.3 if (peer, fraction) == ("NumPy", 0.5) else 0.02
            row.extra = {"fraction": fraction, **slowdowns("ours", 0.99, 0.02), **slowdowns("peer", slow, width)}
            rows.append(row)
    for peer, state in (("onepass", 8.0), ("torch fused", 8.0), ("Optax", 7.5)):
        row = made_up(f"memory/Adam/float32/{peer}", "memory", peer, None, ours_seconds=None)
        row.extra = {"state_bytes": state, "peak_bytes": state + 0.1}
        rows.append(row)
    write(folder, "sweeps", rows)


RULES = {"sgd": (0, 2), "momentum": (1, 4), "second_moment": (1, 8), "second_moment_centered": (2, 13), "adam": (2, 14)}
RULES |= {"second_moment_momentum": (2, 10), "amsgrad": (3, 15), "adasqrt": (1, 6)}


def write_roofline(folder: Path) -> None:
    rows = []
    levels = {"L1": (24 << 10, 210e9), "L2": (512 << 10, 120e9), "L3": (12 << 20, 70e9), "DRAM": (1 << 30, 45e9)}
    for level, (size, speed) in levels.items():
        for threads in (1, 2):
            row = made_up(f"bandwidth/{level}/{threads}", "bandwidth", "", None, threads=threads, ours_seconds=None)
            row.bytes, row.extra = size, {"bytes_per_second": speed * threads}
            rows.append(row)
    for name, speed in (("float32/avx512", 1.6e11), ("divide/avx512", 1.2e10)):
        for threads in (1, 2):
            row = made_up(f"peak/{name}/{threads}", "peak", "", None, threads=threads, ours_seconds=None)
            row.extra = {"flops_per_second": speed * threads}
            rows.append(row)
    for rule, (slots, flops) in RULES.items():
        for level, (size, speed) in levels.items():
            each = 4 * (3 + 2 * slots)
            reached = min(0.93 * 2 * speed, 8e10 / flops * each)
            row = made_up(f"rule/{rule}/{level}/2", "rule", "", None, elements=size // each)
            row.bytes, row.extra = (
                size // each * each,
                {"bytes_per_second": reached, "parameters_per_second": reached / each},
            )
            rows.append(row)
    write(folder, "roofline", rows)
    counts = {
        rule: {
            "reads": 2 + slots,
            "writes": 1 + slots,
            "adds": flops // 3,
            "multiplies": flops - flops // 3 - 2,
            "divides": 1,
        }
        | {"roots": 1, "slots": slots}
        for rule, (slots, flops) in RULES.items()
    }
    (folder.parent / "counts.json").write_text(json.dumps(counts))
    isas = {
        isa: {f"{rule}/{report.STORAGE}": 2.5 * flops for rule, (_, flops) in RULES.items()}
        for isa in ("scalar", "avx2")
    }
    (folder.parent / "instructions.json").write_text(json.dumps({"compilers": {"g++ 12": isas}}))


def write_micro(folder: Path) -> None:
    entries = []
    for isa in ("scalar", "avx2", "avx512"):
        for size in ("1K", "32K", "1M", "16M"):
            for rule in RULES:
                for storage in (report.STORAGE, "bfloat16-bfloat16-bfloat16"):
                    for threads in (1, 2):
                        name = f"update/{rule}/{storage}/{isa}/{size}/threads:{threads}"
                        entries.append(
                            {"name": name, "run_name": name, "run_type": "iteration", "share_of_traffic": 0.9}
                        )
            name = f"norm/float32/{isa}/{size}/threads:2"
            entries.append({"name": name, "run_type": "iteration", "bytes_per_second": 5e10})
        name = f"batchnorm/forward/NCHW/32x64x56x56/float32/{isa}/threads:2"
        entries.append({"name": name, "run_type": "iteration", "bytes_per_second": 4e10})
    context = {
        "date": "2026-11-22T12:00:00+00:00",
        "num_cpus": 2,
        "onepass_commit": ENVIRONMENT["commit"],
        "cpu": ENVIRONMENT["cpu"],
        "command": "make bench-micro",
        "compiler": "a compiler",
        "isa": "avx512",
        "threads": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "micro.json").write_text(json.dumps({"context": context, "benchmarks": entries}))


def peer_rows() -> list[Any]:
    """Every optimizer beside everybody, and one size both warm and rotated."""
    rows = [
        made_up(f"peers/{name}/16M/{peer}", "peers", peer, value, buffers="rotated", elements=1 << 24)
        for name in ("SGD", "Adam")
        for peer, value in (("torch fused", 1.1), ("NumPy", 9.0))
    ]
    rows.append(made_up("peers/Adam/16M/DeepSpeed", "peers", "DeepSpeed", None, note=NO_DEEPSPEED, elements=1 << 24))
    goal = method.Goal(">=", 1.3)
    rows.append(made_up("fused/Adam/1M", "fused", "torch fused", 2.0, buffers="warm", goal=goal))
    for name, value in (("SGD", 1.2), ("Momentum", 1.2), ("Adam", 1.15), ("AMSGrad", 1.1), ("AdaGrad", 1.1)):
        rows.append(made_up(f"fused/{name}/1M/rotated", "fused", "torch fused", value, buffers="rotated"))
    return rows


def batchnorm_rows() -> list[Any]:
    """Lines without a goal."""
    shape = "32x64x56x56"
    rows = [
        made_up(f"forward/{case}/rotated", "forward", "torch", value, buffers="rotated")
        for case, value in ((f"NCHW/{shape}", 3.0), (f"NHWC/{shape}", 1.2), ("NC/4096x1024", 1.1))
    ]
    rows += [
        made_up(f"compiled/{layout}/{what}/{shape}", "compiled", "torch compiled", value)
        for layout, what, value in (
            ("NCHW", "forward", 2.5),
            ("NCHW", "fused", 2.6),
            ("NHWC", "forward", 2.7),
            ("NHWC", "fused", 2.8),
        )
    ]
    for case, value in ((f"NHWC/{shape}", 0.51), ("NHWC/32x64x112x112", 0.52), ("NC/4096x1024", 0.53)):
        rows.append(made_up(f"copy/{case}", "copy", "copy by NumPy", value))
    rows.append(made_up("fused/32x64x112x112", "fused", "three passes, two by torch", 1.4))
    return rows


def whole_rows() -> list[Any]:
    """Further peers of the whole step."""
    peers = (("torch compiled", 1.7), ("torch foreach", 3.0), ("Optax", 2.5), ("NumPy", 20.0))
    rows = [made_up(f"whole/AdamW/{peer}", "whole", peer, value, elements=1 << 24) for peer, value in peers]
    rows.append(made_up("whole/AdamW/DeepSpeed", "whole", "DeepSpeed", None, note=NO_DEEPSPEED, ours_seconds=None))
    return rows


def write_everything(folder: Path) -> None:
    """Every file of made-up records but that of a CUDA device; much of the tables with goals is real."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, added in (("optimizers", peer_rows()), ("batchnorm", batchnorm_rows()), ("whole_step", whole_rows())):
        content = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
        made = {row.case: row.record() for row in added}
        rows = [row for row in content["rows"] if row["case"] not in made and row["kind"] != "peers"]
        written = {"environment": content["environment"] | ENVIRONMENT, "rows": [*rows, *made.values()]}
        (folder / f"{name}.json").write_text(json.dumps(written))
    write_sweeps(folder)
    write_roofline(folder)
    write_micro(folder)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The made-up records."""
    folder = tmp_path_factory.mktemp("made-up") / "results"
    write_everything(folder)
    return records.load(folder)


def pages(folder: Path, results: Path | None = None) -> Path:
    """A copy of the pages alone, with a cause for each goal that these records miss."""
    (folder / "docs").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "README.md", folder)
    text = (ROOT / "docs" / "performance.md").read_text()
    before, end, after = text.partition(report.Block.end_of("missed"))
    _, heading, after = after.partition("\n## ")
    names = [] if results is None else report.missed(records.load(results))
    causes = "".join(f"* `{name}`: found.\n" for name in names)
    (folder / "docs" / "performance.md").write_text(f"{before}{end}\n{causes}{heading}{after}")
    return folder


def run(results: Path, out: Path, *arguments: str) -> int:
    status: int = report.main(["--results", str(results), "--out", str(out), *arguments])
    return status


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up records in bench/results, and the report of them in out."""
    root = tmp_path_factory.mktemp("reported")
    write_everything(root / "bench" / "results")
    run(root / "bench" / "results", pages(root / "out", root / "bench" / "results"))
    return root


# --- The committed pages ----------------------------------------------------------------------------------------------


def test_pages_and_pictures_are_what_the_records_of_the_last_runs_give(capsys: pytest.CaptureFixture[str]) -> None:
    status = report.main(["--check"])
    assert status == 0, capsys.readouterr().err


def test_readme_shows_two_pictures_where_they_were_measured(everything: Any) -> None:
    shown = re.findall(r"!\[[^]]*\]\(docs/images/performance-(\w+)\.png\)", report.readme_block(everything))
    assert shown == ["size", "batchnorm"]


# --- The whole report -------------------------------------------------------------------------------------------------


def test_everything_is_drawn_and_written_and_then_checked(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, out = reported / "bench" / "results", reported / "out"
    assert run(results, out, "--check") == 0, capsys.readouterr().err

    text = (out / "docs" / "performance.md").read_text()
    assert "| not measured |" not in text.replace("`gpu` | not measured |", "")
    assert "Not measured; `" not in text
    assert "No run on a device has been recorded" in text
    for picture in plots.PICTURES:
        assert text.count(f"(images/{picture.file})") == 1
        file = out / "docs" / "images" / picture.file
        assert file.stat().st_size > 40_000
        assert set(plots.text_in(file.read_bytes())) == {plots.DIGEST}  # neither date nor version

    first = plots.PICTURES[0]
    first.write(records.load(results), tmp_path)
    assert (tmp_path / first.file).read_bytes() == (out / "docs" / "images" / first.file).read_bytes()


@pytest.mark.parametrize("what", ["block", "no picture", "old picture", "damaged", "idle picture"])
def test_what_is_not_up_to_date_is_found(
    what: str, reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    results, out = tmp_path / "bench" / "results", tmp_path / "out"
    page, image = out / "docs" / "performance.md", out / "docs" / "images" / "performance-size.png"
    if what == "block":
        page.write_text(page.read_text().replace("torch fused", "torch fuzed", 1))
    elif what == "no picture":
        image.unlink()
    elif what == "damaged":
        image.write_bytes(image.read_bytes().replace(b"Records", b"Record!"))
    elif what == "old picture":
        content = json.loads((results / "sweeps.json").read_text())
        content["environment"]["load"] = [0.5]  # nothing that a table shows
        (results / "sweeps.json").write_text(json.dumps(content))
    else:
        shutil.rmtree(out / "docs" / "images")
        for name in ("sweeps", "roofline", "batchnorm"):
            (results / f"{name}.json").unlink()
        run(results, out)
        image.parent.mkdir()
        image.write_bytes(b"")
    capsys.readouterr()
    if what == "damaged":
        with pytest.raises(ValueError, match="sum of its tEXt is wrong"):
            run(results, out, "--check")
        return
    assert run(results, out, "--check") == 1
    said = capsys.readouterr().err
    assert ("docs/performance.md: not what bench/results holds" in said) is (what == "block")
    assert ("size.png: missing, or drawn from other records" in said) is (what in ("no picture", "old picture"))
    assert ("size.png: there are no records that it could show" in said) is (what == "idle picture")


def test_a_report_can_be_made_of_nothing(tmp_path: Path) -> None:
    out = pages(tmp_path / "out")
    image = out / "docs" / "images" / "performance-size.png"
    image.parent.mkdir()
    image.write_bytes(b"of other records")
    assert run(tmp_path / "results", out) == 0
    assert run(tmp_path / "results", out, "--check") == 0
    assert not image.exists()
    text = (out / "docs" / "performance.md").read_text()
    for command in report.COMMANDS.values():
        assert f"`{command}`" in text
    assert "No goal is missed." in text
    assert "Nothing has been measured." in (out / "README.md").read_text()


def test_marks_are_needed(everything: Any) -> None:
    with pytest.raises(ValueError, match="has not the marks of the block 'speed'"):
        report.rewritten(report.README, "no marks", everything)


# --- Goals, causes, peers ---------------------------------------------------------------------------------------------


def judged(tmp_path: Path, *rows: Any, name: str = "optimizers") -> Any:
    write(tmp_path, name, rows)
    return records.load(tmp_path)


def fused(size: str, value: float, bound: float, width: float = 0.04, peer: str = "torch fused") -> Any:
    return made_up(f"fused/Adam/{size}", "fused", peer, value, width, goal=method.Goal(">=", bound))


def page_with(cause: str) -> str:
    return (
        f"\n## {report.MISSED_SECTION}\n\n<!-- missed -->\n<!-- end of missed -->\n\n{cause}\n\n## Next\n\n* `x`: y\n"
    )


def test_goal_stands_beside_figure(tmp_path: Path) -> None:
    results = judged(tmp_path, fused("1M", 2.0, 1.3), fused("16M", 0.9, 1.0), fused("64M", 12.34, 12.0, 0.3))
    text = report.goals_block(results)
    figures = "1M 2.00x, 16M 0.90x, 64M 12.3x~"
    assert f"| Adam, against torch fused |  | {figures} | >= 1.3x, >= 1x, >= 12x | **NO** (1 of 3) |" in text
    assert "| SGD, against torch fused |  | not measured |  |  |" in text
    text = report.missed_block(results)
    assert "| `optimizers/fused/Adam/16M` |  | 0.90x | 0.88x .. 0.92x | >= 1x |" in text
    assert "| `optimizers/fused/Adam/64M` |  | 12.3x~ | 10.49x .. 14.19x | >= 12x |" in text.partition("| open |")[2]


def test_rows_without_goal_stand_beside_those_with_one(everything: Any) -> None:
    text = report.goals_block(everything)
    for line in (
        "| Adam, 1M elements, arrays rotated | rotated | 1.15x |  |  |",
        "| the same, arrays rotated | rotated | 32x64x56x56 1.20x |  |  |",
        "| the same, against torch compiled |  | 32x64x56x56 2.50x |  |  |",
        "| the same, against torch compiled |  | 32x64x56x56 2.70x |  |  |",
        "| forward with residual and ReLU, NCHW, against torch compiled |  | 32x64x56x56 2.60x |  |  |",
        "| forward with residual and ReLU, NHWC, against torch compiled |  | 32x64x56x56 2.80x |  |  |",
        "| forward, NHWC: share of a copy's speed |  | 32x64x56x56 0.51, 32x64x112x112 0.52 |  |  |",
        "| forward, N x C: share of a copy's speed |  | 4096x1024 0.53 |  |  |",
        "| the same, another shape |  | 32x64x112x112 1.40x |  |  |",
    ):
        assert line in text
    assert "its formula in NumPy, which uses one thread |" in text


def test_arrays_of_a_line_are_said(tmp_path: Path) -> None:
    rows = [fused("1M", 2.0, 1.3), fused("16M", 1.1, 1.0), fused("64M", 1.1, 1.0)]
    for row, buffers in zip(rows, ("warm", "rotated", "rotated"), strict=True):
        row.buffers = buffers
    text = report.goals_block(judged(tmp_path, *rows))
    assert "| Adam, against torch fused | warm: 1M; rotated: 16M, 64M | 1M 2.00x," in text


def test_old_records_are_judged_anew(tmp_path: Path) -> None:
    write(tmp_path, "optimizers", [fused("1M", 1.31, 1.3), fused("16M", 1.29, 1.3), fused("64M", 2.0, 1.3, 0.5)])
    file = tmp_path / "optimizers.json"
    content = json.loads(file.read_text())
    for row in content["rows"]:
        row["met"] = False
    file.write_text(json.dumps(content))
    assert [row["met"] for row in records.load(tmp_path).rows("optimizers")] == [None, None, True]


def test_a_row_with_a_goal_that_no_line_knows_has_its_own(tmp_path: Path) -> None:
    row = made_up("new/thing", "new", "torch", 3.0, goal=method.Goal(">=", 2.0))
    assert "| `new/thing` |  | 3.00x | >= 2x | yes |" in report.goals_block(judged(tmp_path, row))


def test_units_are_those_of_the_row(tmp_path: Path) -> None:
    seconds = made_up("import", "import", "numpy", 0.0304, measure="ours - peer", goal=method.Goal("<=", 0.05))
    share = made_up("traffic/sgd/16M/1", "traffic", "traffic0", 0.97, goal=method.Goal(">=", 0.93))
    text = report.goals_block(judged(tmp_path, seconds, share))
    assert "beyond NumPy's own |  | 30.4 ms | <= 50 ms | yes |" in text
    assert "share of the yardstick's speed |  | 0.97 | >= 0.93 | yes |" in text


@pytest.mark.parametrize(
    ("cause", "complaint"),
    [
        ("", "optimizers/fused/Adam/16M: missed, and the page gives no cause"),
        ("* `optimizers/fused/Adam/64M`: another case.", "fused/Adam/16M: missed, and the page gives no cause"),
        ("* `optimizers/fused/SGD`, `optimizers/fused/`: met.", "fused/SGD: the page gives a cause, but no goal"),
        ("* `optimizers/fused/Adam/16M`: not found yet.", "fused/Adam/16M: the page says that the cause was not found"),
        ("* `optimizers/fused/`:\n  Not found.", "optimizers/fused/: the page says that the cause was not found"),
        ("* `optimizers/fused/Adam/16M`: the memory.", ""),
        ("* `optimizers/fused/Adam/64M`,\n  `optimizers/fused/Adam/16M`: both.", ""),
        ("* `optimizers/fused/`: all.", ""),
    ],
)
def test_a_missed_goal_needs_a_cause(cause: str, complaint: str, tmp_path: Path) -> None:
    rows = [fused("1M", 2.0, 1.3), fused("16M", 0.9, 1.0), fused("64M", 1.0, 1.01)]
    found = report.complaints_about_causes(page_with(cause), judged(tmp_path, *rows))
    assert bool(found) is bool(complaint)
    assert complaint in "\n".join(found)


def test_check_fails_for_a_missed_goal_without_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, out = tmp_path / "results", pages(tmp_path / "out")
    write(results, "optimizers", [fused("16M", 0.9, 1.0)])
    assert run(results, out) == 0
    assert "optimizers/fused/Adam/16M: missed" in capsys.readouterr().err
    assert run(results, out, "--check") == 1
    assert "optimizers/fused/Adam/16M: missed, and the page gives no cause" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"commit": "f" * 40}, "must be of one: ffffffffffff: optimizers; 0123456789ab: batchnorm"),
        ({"commit": f"{ENVIRONMENT['commit']}-dirty"}, "optimizers: the records are of sources that no commit holds"),
        ({"commit": "unknown"}, "optimizers: the records are of sources that no commit holds"),
        ({"quick": True}, "optimizers: the records are of a quick run"),
        ({"complete": False}, "optimizers: the run was stopped before its end"),
        ({"command": "python x.py --filter=Adam"}, "optimizers: the records are of a part of the cases: python x.py"),
        ({"command": "python x.py --peers torch"}, "optimizers: the records are of a part of the cases"),
    ],
)
def test_records_of_the_cpu_are_of_one_whole_run(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    write(tmp_path, "batchnorm", [])
    write(tmp_path, "optimizers", [], **change)
    write(tmp_path, "gpu", [], commit="another")
    write(tmp_path, "soak", [], commit="another", quick=True)
    found = report.complaints_about_records(records.load(tmp_path))
    assert bool(found) is bool(complaint)
    assert complaint in "\n".join(found)
    write_micro(tmp_path)
    assert report.complaints_about_records(records.load(tmp_path))[: len(found) - 1] == found[: len(found) - 1]


def test_check_fails_for_records_of_a_part(reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    results, out = tmp_path / "bench" / "results", tmp_path / "out"
    write(results, "optimizers", [], command="python bench/peers/optimizers.py --filter x")
    run(results, out)
    capsys.readouterr()
    assert run(results, out, "--check") == 1
    assert "optimizers: the records are of a part of the cases" in capsys.readouterr().err


def test_where_a_peer_wins_is_said(tmp_path: Path) -> None:
    rows = [
        made_up("fused/SGD/16M", "fused", "torch fused", 0.8),
        made_up("fused/Adam/16M", "fused", "torch fused", 1.01),
        made_up("fused/Adam/1M", "fused", "torch fused", 2.0),
        made_up("traffic/sgd/16M/1", "traffic", "traffic0", 0.5),
        made_up("storage/Adam/x", "storage", "onepass float32", 0.5),
        made_up("subnormal/Adam/16M/torch", "subnormal", "torch normal", 0.5, measure="ours / peer"),
    ]
    text = report.peers_block(judged(tmp_path, *rows))
    assert "Of 3 comparisons with a peer, onepass is faster in 1, a peer in 1, and 1 cannot be told apart." in text
    wins, _, rest = text.partition("### Within the noise")
    assert re.findall(r"^\| `(.*?)`", wins, re.MULTILINE) == ["optimizers/fused/SGD/16M"]
    assert "|  | 1 ms | torch fused 800 us | 0.80x | 0.78x .. 0.82x |" in wins
    assert re.findall(r"^\| `(.*?)`", rest, re.MULTILINE) == ["optimizers/fused/Adam/16M"]
    assert "None: every peer of every case was measured." in rest


def test_peers_that_are_missing_are_listed_with_the_reason(everything: Any) -> None:
    text = report.peers_block(everything).partition("### Peers that were not measured\n\n")[2]
    assert text.count("\n") == 1
    assert text.startswith(f"* DeepSpeed: {NO_DEEPSPEED} (`optimizers/peers/Adam/16M/DeepSpeed`, ")
    assert "`, `sweeps/size/Adam/64/DeepSpeed` and " in text


def test_a_peer_that_needs_less_memory_is_listed(everything: Any) -> None:
    text = report.peers_block(everything)
    assert "| `sweeps/memory/Adam/float32/Optax` | state 8.00 bytes | Optax 7.50 bytes |" in text
    assert "float32/torch fused` | state" not in text


# --- The tables -------------------------------------------------------------------------------------------------------


def test_sweeps_become_tables(everything: Any) -> None:
    blocks = {block.name: block.make(everything) for block in report.PAGES[report.PAGE]}
    header = "onepass | torch fused | torch compiled | torch foreach | torch for-loop |"
    assert f"| elements | {header}" in blocks["sizes"]
    assert "| Optax | NumPy (1 thread) |" in blocks["sizes"]
    assert re.search(r"^\| 64, warm \| 1.86 us \| 24.3 us, 13.1x \|", blocks["sizes"], re.MULTILINE)
    seconds = adam_seconds(1 << 20)
    assert f"| 1M, rotated | {method.format_seconds(seconds)} |" in blocks["sizes"]
    assert f"| 1M, warm | {method.format_seconds(0.6 * seconds)} |" in blocks["sizes"]
    assert "| 256M, rotated | " in blocks["sizes"]
    assert "| 1,000 x 1,000, rotated | " in blocks["tensors"]
    assert "| 1,000 x 1,000, warm | " in blocks["tensors"]
    assert "AdamW, 2 threads; arrays rotated:" in blocks["models"]
    assert "| ViT-B/16: 152 tensors, 86.6 million | " in blocks["models"]
    assert "| 16M, 1 | " in blocks["threads"]
    assert "| 100 % | 0.99x | 9.84x | 1.01x | 17.69x |" in blocks["subnormal"]
    assert "| 50 % | 0.99x | 8.78x | 1.01x | 15.70x~ |" in blocks["subnormal"]
    slow = "torch fused (9.8x); NumPy (1 thread) (17.7x)"
    assert f"subnormal moments make steps more than 1.5x slower of {slow}." in blocks["subnormal"]
    assert "AdamW, 16M elements, 2 threads:" in blocks["whole step"]
    assert re.search(r"^\| torch compiled \|  \| 1 ms \| 1.7 ms \| 1.70x \|", blocks["whole step"], re.MULTILINE)
    assert f"| DeepSpeed |  |  |  | not measured: {NO_DEEPSPEED.removeprefix('no peer: ')} |  |" in blocks["whole step"]
    assert "16M elements, 2 threads; arrays rotated; `-`:" in blocks["optimizers"]
    assert "| optimizer | onepass | torch fused | DeepSpeed | NumPy (1 thread) |" in blocks["optimizers"]
    assert "| Adam | 1 ms | 1.1 ms, 1.10x | - | 9 ms, 9.00x |" in blocks["optimizers"]
    assert "| Adam, float32 | 8.00, 8.10 | 8.00, 8.10 | 7.50, 7.60 |" in blocks["memory"]
    assert "| L2 | 512 KiB | 120.0 | 240.0 |" in blocks["roofline"]
    assert "| divisions and roots | avx512 | 12.0 | 24.0 |" in blocks["roofline"]
    assert "| `sgd` | 390.6 (0.93) | 223.2 (0.93) | 130.2 (0.93) | 83.7 (0.93) |" in blocks["roofline"]
    assert "| rule | scalar, 32K | scalar, 1M | scalar, 16M | avx2, 32K |" in blocks["kernels"]
    assert "| `batchnorm/forward/NCHW/32x64x56x56/float32` |  | 40.0 | 40.0 | 40.0 |" in blocks["kernels"]
    assert "| `adam` | 4 | 3 | 4 | 8 | 1 | 1 | 0 | 35.00 | 35.00 |" in blocks["counts"]
    assert "| `micro` | 0123456789ab | a processor, 2 CPUs, avx512, 2 threads |" in blocks["records"]
    assert "DeepSpeed" not in blocks["records"]


def test_nobody_is_called_slow_who_is_not(tmp_path: Path) -> None:
    row = made_up("subnormal/Adam/1/torch fused", "subnormal", "torch fused")
    row.extra = {"fraction": 1.0, **slowdowns("ours", 1.0, 0.02), **slowdowns("peer", 1.4, 0.02)}
    text = report.subnormal_block(judged(tmp_path, row, name="sweeps"))
    assert "on this processor subnormal moments make nobody's step more than 1.5x slower." in text


def test_medians_of_repeated_kernels_are_taken() -> None:
    name = "update/sgd/float32-float32-float32/avx2/1M/threads:1/manual_time"
    benchmarks = [
        {"name": name, "run_name": name, "run_type": "iteration", "share_of_traffic": 0.1},
        {"name": f"{name}_mean", "run_name": name, "aggregate_name": "mean", "share_of_traffic": 0.2},
        {"name": f"{name}_median", "run_name": name, "aggregate_name": "median", "share_of_traffic": 0.3},
        {"name": name.replace("sgd", "adam"), "error_occurred": True},
    ]
    (only,) = report.micro(records.Results({"micro": {"benchmarks": benchmarks}}, {}))
    assert (only.what, only.isa, only.size, only.threads) == ("update/sgd/float32-float32-float32", "avx2", "1M", 1)
    assert only.counters["share_of_traffic"] == 0.3


def test_figures_of_a_device_come_from_its_file(tmp_path: Path) -> None:
    row = made_up("batchnorm/forward/NCHW", "batchnorm", "cuDNN", 0.5, goal=method.Goal(">=", 1.0))
    results = judged(tmp_path, row, name="gpu")
    text = report.goals_block(results)
    assert "No run on a device" not in text
    assert re.search(r"against cuDNN through torch \| 0.50x \| >= 1x \| NO \|", text)
    assert "`gpu/batchnorm/forward/NCHW`" in report.missed_block(results)
    assert "`gpu/batchnorm/forward/NCHW`" in report.peers_block(results)


@pytest.mark.parametrize(
    ("number", "text"), [(64, "64"), (1000, "1000"), (1 << 15, "32K"), (1 << 28, "256M"), (25_557_032, "25.6 million")]
)
def test_numbers_of_elements(number: int, text: str) -> None:
    assert records.count(number) == text


def test_contenders_have_an_order_and_a_look() -> None:
    names = [
        "numpy",
        "NumPy in place",
        "someone new",
        "onepass",
        "optax jit",
        "torch compiled",
        "torch fused",
        "torch, six",
        "torch fused, flush_denormal",
    ]
    assert sorted(names, key=records.rank) == [
        *(
            "onepass",
            "torch fused",
            "torch fused, flush_denormal",
            "torch compiled",
            "torch, six",
            "optax jit",
            "NumPy in place",
            "numpy",
            "someone new",
        )
    ]
    assert plots.look("torch fused") == plots.look("torch fused, 2 threads")
    known = [look for name, look in plots.LOOKS.items() if name != "torch"]
    assert len({colour for colour, _ in known}) == len({marker for _, marker in known}) == len(known)


# --- The pictures -----------------------------------------------------------------------------------------------------


def picture(name: str, results: Any) -> Any:
    found = next(one for one in plots.PICTURES if one.name == name)
    assert found.has(results)
    return found.draw(results)


def legends(figure: Any) -> list[str]:
    found = [figure.legends, *([axes.get_legend()] for axes in figure.axes)]
    return [text.get_text() for group in found for legend in group if legend is not None for text in legend.get_texts()]


@pytest.mark.parametrize("one", plots.PICTURES, ids=lambda one: one.name)
def test_axes_say_what_they_are_and_texts_stay_apart(one: Any, everything: Any) -> None:
    figure = one.draw(everything)
    assert any(axes.get_xlabel() for axes in figure.axes)
    assert any(axes.get_ylabel() for axes in figure.axes)
    assert one.alt
    assert legends(figure)
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    texts = [*figure.texts, figure._suptitle]
    for axes in figure.axes:
        texts += axes.texts
        for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            ends = []
            for tick in axis.get_major_ticks():
                label = tick.label1
                seen = min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
                if label.get_text() and label.get_visible() and seen:
                    texts.append(label)
                    ends.append([getattr(label.get_window_extent(renderer), end) for end in (low, high)])
            ends.sort()
            assert all(end <= start for (_, end), (start, _) in pairwise(ends)), axis
    for text in texts:
        if text.get_text().strip():
            box = text.get_window_extent(renderer)
            assert box.x0 >= page.x0 - 1, text
            assert box.x1 <= page.x1 + 1, text
            assert box.y0 >= page.y0 - 1, text
            assert box.y1 <= page.y1 + 1 or text is figure._suptitle, text


@pytest.mark.parametrize(("name", "label"), [("size", "number of elements"), ("tensors", "number of tensors")])
def test_time_against_size_and_number(name: str, label: str, everything: Any) -> None:
    figure = picture(name, everything)
    upper, lower = figure.axes
    assert upper.get_xscale() == upper.get_yscale() == lower.get_yscale() == "log"
    assert upper.get_ylabel() == "time of a step"
    assert lower.get_xlabel().startswith(label)
    assert "relative" in lower.get_ylabel()
    assert legends(figure) == ["onepass", *map(records.shown, PEERS), "the same, warm arrays"]
    assert {"warm", "arrays rotated"} <= {text.get_text() for text in upper.texts}
    drawn = {line.get_label(): line for line in upper.lines if len(line.get_xdata()) > 1}
    assert set(PEERS) | {"onepass"} <= set(drawn)
    xs, ys = drawn["onepass"].get_data()
    expected = [adam_seconds(int(x)) if name == "size" else adam_seconds(1000 * int(x), int(x)) for x in xs]
    assert list(ys) == pytest.approx(expected)  # rotated, where there is both
    assert len(set(xs)) == len(xs)
    rows = [row for row in everything.rows("sweeps", name) if row["buffers"] == "warm" and row["peer"] == "torch fused"]
    times, ratios = [row["peer_seconds"] for row in rows], [row["value"]["value"] for row in rows]
    for axes, wanted in ((upper, times), (lower, ratios)):
        colour = plots.LOOKS["torch fused"][0]
        dashed = [line for line in axes.lines if line.get_linestyle() == "--" and line.get_color() == colour]
        assert [list(line.get_ydata()) for line in dashed] == [wanted]
    assert drawn["onepass"].get_linewidth() > drawn["torch fused"].get_linewidth()


def test_noisy_points_are_hollow(everything: Any) -> None:
    upper, _ = picture("size", everything).axes
    rows = [row for row in everything.rows("sweeps", "size") if row["peer"] == "NumPy"]
    rows = records.cold_first(rows, plots.elements_of)
    noisy = [float(row["elements"]) for row in rows if row["noisy"]]
    assert 0 < len(noisy) < len(rows)
    black = plots.LOOKS["NumPy"][0]
    points = [line for line in upper.lines if line.get_linestyle() == "None" and line.get_color() == black]
    hollow = [x for line in points if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
    assert hollow == noisy


def test_a_line_has_a_gap_where_a_contender_was_not_measured(everything: Any) -> None:
    gone = 1 << 16
    content = json.loads(json.dumps(everything.contents["sweeps"]))
    for row in content["rows"]:
        if (row["kind"], row["peer"], row["elements"]) == ("size", "torch compiled", gone):
            row["value"] = None
    upper, _ = picture("size", records.Results({"sweeps": content}, {})).axes
    line = next(line for line in upper.lines if line.get_label() == "torch compiled" and len(line.get_xdata()))
    assert [x for x, y in zip(*line.get_data(), strict=True) if math.isnan(y)] == [gone]


def test_bars_of_batch_normalization(everything: Any) -> None:
    figure = picture("batchnorm", everything)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [name for *_, name in plots.BATCHNORM]
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["goal 3x", "goal 1.6x", "goal 1.8x", "goal 3x"]
    shapes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    rows = {row["case"]: row for row in everything.rows("batchnorm")}
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [rows[f"forward/NCHW/{shape}"]["value"]["value"] for shape in shapes]
    assert [len(axes.patches) for axes in figure.axes] == [5, 5, 10, 10]
    assert len(legends(figure)) == 2


def test_roofline_has_roofs_and_points(everything: Any) -> None:
    figure = picture("roofline", everything)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert "flop per byte" in axes.get_xlabel()
    assert "Gflop/s" in axes.get_ylabel()
    assert legends(figure) == [f"arrays in {level}" for level in ("L1", "L2", "L3", "DRAM")] + [
        "limit by divisions and roots"
    ]
    points = {point.rule: point for point in plots.roofline_points(everything, 2) if point.level == "DRAM"}
    assert set(points) == set(RULES)
    assert points["adam"].intensity == pytest.approx(14 / 28)
    assert points["adam"].flops_per_second == pytest.approx(0.93 * 90e9 * 14 / 28)
    written = [text.get_text() for text in axes.texts]
    assert {"L1: 420 GB/s", "DRAM: 90 GB/s", "multiplications and additions: 320 Gflop/s", "adam"} <= set(written)


def test_names_are_moved_apart_and_no_further() -> None:
    assert plots.spread([0.0, 1.0, 5.0], 1.0) == [0.0, 1.0, 5.0]
    assert plots.spread([1.0, 1.0, 1.0], 1.0) == pytest.approx([0.0, 1.0, 2.0])
    assert plots.spread([], 1.0) == []


def test_subnormal_moments_and_models(everything: Any) -> None:
    figure = picture("subnormal", everything)
    (axes,) = figure.axes
    assert "%" in axes.get_xlabel()
    assert legends(figure) == ["onepass", *map(records.shown, SLOPES)]
    assert figure._suptitle.get_text().strip() == "Steps with subnormal moments: Adam"
    numpy = next(line for line in axes.lines if line.get_label() == "NumPy" and len(line.get_xdata()))
    assert numpy.get_ydata()[-1] == pytest.approx(17.69, abs=0.01)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in hollow] == [[50.0]]  # of NumPy
    figure = picture("models", everything)
    assert "AdamW" in figure._suptitle.get_text()
    (axes,) = figure.axes
    assert [label.get_text().partition("\n")[0] for label in axes.get_yticklabels()] == [
        "ResNet-50",
        "ViT-B/16",
        "GPT-2",
    ]
    assert axes.get_xscale() == "log"
    assert len(axes.patches) == 3 * len(PEERS)
    assert legends(figure) == ["onepass", *map(records.shown, PEERS)]


if __name__ == "__main__":  # to look at the pictures of the made-up records
    write_everything(Path(sys.argv[1]))
