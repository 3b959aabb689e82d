"""The documents are true: code runs and prints what they say, links lead somewhere, tables are complete."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import builds
import onepass
from helpers import CLASSES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
HAVE_TORCH = importlib.util.find_spec("torch") is not None

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\((?P<target>[^)\s]+)\)|(?:src|href)=\"(?P<attribute>[^\"]+)\"")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks in one language, each with the number of the line before it."""
    text = text_of(page)
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in FENCE.finditer(text)
        if match["language"] == language
    ]


def failures(test):
    """What the examples of a doctest print otherwise than they say."""
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    return "".join(report)


def needs_cuda():
    """Skip the rest of the test where no CUDA kernel can run."""
    import cuda_arrays  # not above: it imports CuPy, for which other pages have no use

    reason = cuda_arrays.why_not()
    if reason is not None:
        pytest.skip(f"what follows needs CUDA: {reason}")


def have_torch_on_cuda():
    return HAVE_TORCH and importlib.import_module("torch").cuda.is_available()


# --- The pages --------------------------------------------------------------------------------------------------------


@pages
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    """Blocks with prompts print what they say; blocks without run. The blocks of a page share their names."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        if "import cupy" in code:
            needs_cuda()  # for all that follows, too
        if "import torch" in code and not (have_torch_on_cuda() if 'device="cuda"' in code else HAVE_TORCH):
            continue
        if ">>> " in code:
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            assert not failures(test)
            names = test.globs
        else:
            exec(compile("\n" * line + code, page, "exec"), names)


def test_no_code_is_overlooked():
    """Every prompt stands in a block that the test above finds, and the pages that teach by code have some."""
    for page in PAGES:
        prompts = re.findall(r"^\s*>>> ", text_of(page), re.MULTILINE)
        found = [prompt for _, code in blocks(page, "python") for prompt in re.findall(r"^>>> ", code, re.MULTILINE)]
        assert len(found) == len(prompts), page
    with_code = {page.stem for page in PAGES if blocks(page, "python")}
    assert {cls.__name__.lower() for cls in CLASSES} <= with_code
    assert {"README", "CONTRIBUTING", "arrays", "cuda", "dispatch", "numerics", "state", "threads"} <= with_code


def heading_anchors(page):
    """The anchors that GitHub makes of the headings."""
    prose = FENCE.sub("", text_of(page))
    plain = (re.sub(r"[^\w\- ]", "", match["text"].strip().lower()) for match in HEADING.finditer(prose))
    return {text.replace(" ", "-") for text in plain}


@pages
def test_links_lead_somewhere(page):
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))
    missing = []
    for match in LINK.finditer(prose):
        target = match["target"] or match["attribute"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            missing.append(target)
    assert not missing


def test_dispatch_page_has_its_four_headings():
    headings = re.findall(r"^## (.+)$", text_of(DOCS / "dispatch.md"), re.MULTILINE)
    assert headings == ["Inspect", "List", "Select", "Check"]


# --- The tables -------------------------------------------------------------------------------------------------------


def rows(text):
    """The cells of all table rows, without code marks."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


@classes
def test_page_lists_every_hyper_parameter_with_its_default(cls):
    text = text_of(DOCS / f"{cls.__name__.lower()}.md")
    section = text.split("\n## Hyper-parameters\n")[1].split("\n## ")[0]
    listed = {name: default for name, default, *_ in rows(section)[2:]}
    signature = inspect.signature(cls).parameters
    assert listed == {name: repr(p.default) for name, p in signature.items() if name not in ("params", "options")}


def test_readme_lists_states_and_traffic():
    found = set()
    for name, _, states, traffic in (row for row in rows(text_of(ROOT / "README.md")) if len(row) == 4):
        if not traffic.isdigit():
            continue
        link, call, options = re.fullmatch(r"\[(\w+)\]\(\S+\)|(\w+)\((.*)\)", name).groups()
        cls = getattr(onepass, link or call)
        slots = tuple(cls(np.zeros(2), **eval(f"dict({options or ''})")).state[0])
        assert states == (", ".join(slots) or "none")
        assert int(traffic) == 4 * (3 + 2 * len(slots))
        found.add(cls)
    assert found == set(CLASSES)


# --- The C++ example --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "language"), [("main.cpp", "cpp"), ("CMakeLists.txt", "cmake")])
def test_cpp_page_shows_the_example_as_it_is(name, language):
    assert [code for _, code in blocks(DOCS / "cpp.md", language)] == [text_of(ROOT / "examples" / "cpp" / name)]


def test_cpp_example_builds_and_prints_what_the_page_says(tmp_path_factory):
    printed = builds.tool(builds.consumer(tmp_path_factory) / "example").splitlines()
    shown = [line for _, code in blocks(DOCS / "cpp.md", "console") for line in code.splitlines() if line[0] != "$"]
    isas = [isa for isa in onepass.available_isas() if isa not in builds.left_out()]
    assert [line.split()[0] for line in printed] == isas
    assert printed == shown[: len(isas)]


# --- The docstrings ---------------------------------------------------------------------------------------------------

NOT_IMPORTED = ("onepass._cpu", "onepass.__main__", "onepass.libcuda_on_host")
MODULES = [
    "onepass",
    *(module.name for module in pkgutil.walk_packages(onepass.__path__, "onepass.") if module.name not in NOT_IMPORTED),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert not "".join(failures(test) for test in doctest.DocTestFinder().find(module))


@classes
def test_every_optimizer_has_an_example(cls):
    assert doctest.DocTestParser().get_examples(inspect.getdoc(cls))
