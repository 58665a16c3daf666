"""What the pages say: programs in them run, and links lead somewhere."""

import json
import re
import shutil
import statistics
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from cmim.engine.study import difference
from cmim.method import objective
from cmim.models.build import ARCHITECTURES
from cmim.settings import PRESETS, ModelSettings, Preset

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            assert heading in {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}, target


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md"])
def test_programs_run(page):
    programs = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    programs = [program for program in programs if "onnxruntime" not in program]  # which tests/test_export.py runs
    assert programs
    for program in programs:
        exec(compile(program, page, "exec"), {})


def test_every_command_of_the_makefile_that_a_page_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.M)
    assert len(targets) == len(set(targets))
    assert {"train", "test", "memcheck", "racecheck", "check"} <= set(
        re.search(r"\.PHONY:((?:.|\\\n)*)", makefile)[1].split()
    )
    targets = set(targets)
    for page in PAGES:
        named = set(re.findall(r"\bmake ([a-z][a-z-]+)\b", "".join(re.findall(r"`[^`]+`", page.read_text()))))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_every_preset_and_every_architecture_is_described():
    for page, text in (
        ("docs/method.md", (ROOT / "docs/method.md").read_text()),
        ("cmim.method.objective", objective.__doc__),
    ):
        line = r"^\| `{}` \|" if page.endswith(".md") else r"^    ([\w, ]+, )?{}\b.* L = "
        missing = [preset for preset in PRESETS if not re.search(line.format(preset), text, flags=re.M)]
        assert not missing, f"{page} has no formula of these presets"
        terms = [name for name, kind in Preset.__annotations__.items() if kind is float]
        terms += [name for preset in PRESETS.values() for name in preset.masked]
        missing = [name for name in terms if not re.search(rf"^ +L_{name} += ", text, flags=re.M)]
        assert not missing, f"{page} has no formula of these terms"
    listed, setting = (ROOT / "docs/training.md").read_text(), ModelSettings.model_fields["arch"].description
    missing = [arch for arch in ARCHITECTURES if f"- `{arch}" not in listed or f"`{arch}" not in setting]
    assert not missing, "docs/training.md or ModelSettings.arch does not say that these architectures exist"


def test_the_version_stands_once():
    import cmim
    import cmim_kernels

    assert cmim.__version__ == cmim_kernels.__version__
    assert f"\nversion: {cmim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cmim.nothing  # noqa: B018


def test_make_reads_every_target():
    """It runs nothing: `make -n` only prints the commands."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = re.search(r"^\.PHONY: (.*)$", text, flags=re.M).group(1).split()
    assert set(re.findall(r"^([a-z][a-z-]*):", text, flags=re.M)) == set(targets)
    result = subprocess.run(["make", "-n", *targets], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_tables_of_a_study_are_those_of_its_results():
    """In docs/experiments.md each seed, mean, spread and interval; in the README mean, spread and interval."""
    results = [json.loads(file.read_text()) for file in sorted(ROOT.glob("docs/results/aerial26_continued/*.json"))]
    test, val = (
        {name: [100 * of(r) for r in results if r["variant"] == name] for name in {r["variant"] for r in results}}
        for of in (lambda r: r["miou"], lambda r: r["val"][-1][1])
    )
    pages = {name: (ROOT / name).read_text() for name in ("docs/experiments.md", "README.md")}
    rows = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)`.*\|$", pages["docs/experiments.md"], re.M) if row[1] in test}
    assert len(results) == 30 and set(rows) == set(test)
    short = [
        row[0] for row in re.finditer(r"^\| (supervised, the first|and 200 more|or with).*\|$", pages["README.md"], re.M)
    ]
    for name, in_readme in zip(("supervised", "longer", "fixmatch", "semantic", "class_blind", "cmim"), short, strict=True):
        wanted = [x for pair in zip(val[name], test[name], strict=True) for x in pair]
        last = [statistics.mean(test[name]), statistics.stdev(test[name])]
        gaps = [difference(of[name], of["fixmatch"]) for of in (test, val)] if name != "fixmatch" else []
        gaps = [[mean, mean - half, mean + half] for mean, half in gaps]
        assert numbers(rows[name].split("|", 2)[2]) == pytest.approx([*wanted, *last, *chain(*gaps)], abs=0.0501)
        assert numbers(in_readme.split("|", 2)[2]) == pytest.approx([*last, *chain(*gaps[:1])], abs=0.0501)


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]
