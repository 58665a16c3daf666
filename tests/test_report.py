"""report.html: what stands on it, that nothing in the data can run code in it, and that it never ends a training."""

import base64
import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cmim import report
from cmim.engine import trainer
from cmim.engine.charts import MOST_POINTS, _short, escape, number, range_chart, thinned, ticks
from cmim.engine.records import add_notes, read_about
from cmim.engine.report import MOST_PICTURES, make_report, write_report
from cmim.engine.run import Run
from cmim.engine.study import Result
from cmim.engine.study_report import study_page
from cmim.errors import UserError
from tests.browser import Browser
from tests.tiny_runs import FOLDER, TINY, read_metrics, run_tiny, write_folder

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
LIMIT = 5_000_000


def section(page, name):
    """The HTML of a part of a page."""
    return re.search(f'<section id="{name}">(.*?)</section>', page, re.S)[1]


def assert_safe(page):
    """The policy of the page lets nothing run but its own script, and no address leads away."""
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'" and parts["img-src"] == "data:"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert parts[f"{tag}-src"] == f"'sha256-{digest}'"
    assert page.count("<script") == 1 and not re.search(
        r"{{(title|lead|nav|main|foot|\w+_hash)}}", page.replace("d{{main}}", "")
    )
    assert all(url.startswith(("data:image/jpeg;base64,", "#")) for url in re.findall(r'(?:src|href)="([^"]*)"', page))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_tiny(
        tmp_path_factory.mktemp("report") / "run", train__steps=4, train__evaluate_every=2, train__picture_every=2,
        data__background=0,
    )  # fmt: skip


def test_the_page_of_a_run(run):
    page, lines = run.report.read_text(encoding="utf-8"), read_metrics(run)
    assert_safe(page)
    assert len(page) < LIMIT
    result, last = json.loads(run.result.read_text()), [line for line in lines if line.get("split") == "val"][-1]
    charts = re.findall(r'data-series="([^"]*)"', section(page, "curves"))
    drawn = [json.loads(chart.replace("&quot;", '"'))[0] for chart in charts]
    steps = [line for line in lines if "split" not in line]
    terms = [key for key in steps[-1] if key.startswith("loss_")]
    assert [chart["n"] for chart in drawn] == ["mIoU", "loss", *terms, "lr"] and len(terms) >= 4
    for chart in drawn[1:-1]:
        assert chart["x"] == [1, 2, 3, 4]
        np.testing.assert_allclose(chart["y"], [line[chart["n"]] for line in steps], rtol=1e-4)
    weakest = sorted(result["iou"], key=result["iou"].get)
    assert re.findall(r"</svg>(\w+)</td>", section(page, "classes")) == weakest
    coverage = last["pseudo_label_class_coverage"]
    assert set(re.findall(r"</svg>(\w+)</td>", section(page, "pseudo-labels"))) == set(coverage) == set(result["iou"])
    assert re.findall(r'data-step="(\d+)"( [^>]*hidden)?', section(page, "pictures")) != []
    assert section(page, "pictures").count("<img") == 2
    for text in ("deeplabv3plus on test_resnet", "images_per_second", "PyTorch", "decoder_width: 16", "train.steps: 4"):
        assert text in page


def test_the_numbers_at_the_top(run, tmp_path):
    copy = Run(tmp_path / "run")
    copy.folder.mkdir()
    copy.config.write_text(run.config.read_text())
    figures = [{"step": i, "images_per_second": 10.0 * i, "data_wait": 0.1 * i, "memory_gib": 4.0 - i} for i in (1, 2, 3)]
    val = [{"step": i, "split": "val", "miou": miou} for i, miou in ((1, 0.3), (2, 0.6), (3, 0.5))]
    copy.metrics.write_text("".join(json.dumps(line) + "\n" for line in (*figures, *val)))
    tiles = lambda: re.findall(r"<dt>([^<]*)</dt><dd>(.*?)</dd>", make_report(copy))  # noqa: E731
    common = [
        ("best mIoU on val, %", "60.0 <small>step 2</small>"), ("last mIoU on val, %", "50.0"), ("images/s, median", "20"),
        ("waiting for data, %", "20.0"), ("peak memory, GiB", "3"),
    ]  # fmt: skip
    assert tiles() == common and "step 3, not finished" in make_report(copy)
    for step, shown in ((3, [("mIoU on test, %", "70.0")]), (2, [])):  # the last is of fewer steps than the run has now
        copy.result.write_text(json.dumps({"step": step, "miou": 0.7, "split": "test"}))
        assert tiles() == [*shown, *common]


def test_the_confusion_matrix_is_that_of_the_result(run):
    kept, result = json.loads(run.confusion.read_text()), json.loads(run.result.read_text())
    pixels = np.array(kept["pixels"])
    assert (kept["step"], kept["split"]) == (4, "test") and kept["classes"] == list(result["iou"])
    hit = pixels.diagonal()
    with np.errstate(invalid="ignore"):
        iou = hit / (pixels.sum(0) + pixels.sum(1) - hit)
    np.testing.assert_allclose(iou, [v if v is not None else np.nan for v in result["iou"].values()])
    shown = section(make_report(run), "confusions")
    wrong = pixels - np.diag(hit)
    truth, found = np.unravel_index(wrong.argmax(), wrong.shape)
    first = re.search(r"<tbody><tr><td>(\w+)</td><td>(\w+)</td>", shown)
    assert first.groups() == (kept["classes"][truth], kept["classes"][found])


def test_what_a_start_says_is_kept_once(run):
    about = read_about(run)
    (start,) = about.starts
    assert {"started", "cmim", "Python", "PyTorch", "device"} <= set(start) and start["processes"] == "1"
    assert about.colours == dict(zip(json.loads(run.result.read_text())["iou"], about.colours.values(), strict=True))
    add_notes(run, ["one", "two"])
    add_notes(run, ["two"])
    assert read_about(run).notes == [*about.notes, "one", "two"]
    before = run.about.read_text()
    run.about.write_text(before[:-5])
    assert read_about(run).notes == [] and "The run keeps no versions" in make_report(run)
    run.about.write_text(before)


def test_names_in_data_and_settings_are_text(run, tmp_path):
    """In class names, settings, notes, figures and the name of the folder."""
    copy = Run(tmp_path / "<b>run")
    copy.folder.mkdir()
    config = yaml.safe_load(run.config.read_text())
    config["data"]["classes"] = None
    config["model"]["encoder"] = EVIL
    copy.config.write_text(yaml.safe_dump(config))
    names = [EVIL, "a\x00\x1b[31mb", "\u202ec", "d{{main}}", "e'&\""]
    scores = {key: dict.fromkeys(names, 0.5) for key in ("iou", "dice", "precision", "recall")}
    quality = {f"pseudo_label_class_{kind}": dict.fromkeys(names, 0.5) for kind in ("coverage", "accuracy")}
    lines = [
        {"step": 1, "loss": 1.0, f"loss_{EVIL}": 0.5, EVIL: 0.1, "lr": 0.1},
        {"step": 1, "split": "val", "miou": 0.5, **scores, **quality},
    ]
    copy.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    pixels = [[1, 2, 3, 4, 5]] * 5
    copy.confusion.write_text(json.dumps({"step": 1, "split": EVIL, "classes": names, "pixels": pixels}))
    add_notes(copy, [EVIL])
    page = write_report(copy).read_text(encoding="utf-8")
    assert_safe(page)
    assert "<img" not in page and "<b>run" not in page and "\x1b" not in page and "\u202e" not in page
    assert page.count(escape(EVIL)) >= 6 and page.count("d{{main}}") >= 4
    with Browser(tmp_path / "browser") as browser:
        browser.open(copy.report)
        assert browser.value("document.title") == "<b>run" and browser.value("document.scripts.length") == 1
        assert browser.problems() == []


def long_run(run, copy, classes=150, steps=40_000):
    """A folder as a long run leaves it, with noise that no picture format makes small."""
    copy.folder.mkdir()
    copy.config.write_text(run.config.read_text())
    rng, names = np.random.default_rng(0), [f"class number {k}" for k in range(classes)]
    with open(copy.metrics, "w") as file:
        for step in range(20, steps + 1, 20):
            figures = {f"loss_term{i}": float(v) for i, v in enumerate(rng.random(10))}
            figures |= {f"figure{i}": float(v) for i, v in enumerate(rng.random(12))}
            speed = {"lr": 1e-3, "images_per_second": 50.5, "data_wait": 0.01, "memory_gib": 8.0}
            file.write(json.dumps({"step": step, "loss": 1.0, **figures, **speed}) + "\n")
            if step % 1000 == 0:
                values = {key: dict(zip(names, rng.random(classes).tolist(), strict=True)) for key in ("iou", "dice")}
                file.write(json.dumps({"step": step, "split": "val", "miou": step / steps, **values}) + "\n")
    copy.pictures.mkdir()
    noise = Image.fromarray(rng.integers(0, 255, (1200, 1372, 3), np.uint8))
    for step in range(1000, steps + 1, 2000):
        noise.save(copy.pictures / f"step_{step:06d}.png", compress_level=0)
    pixels = rng.integers(0, 1000, (classes, classes)).tolist()
    copy.confusion.write_text(json.dumps({"step": steps, "split": "val", "classes": names, "pixels": pixels}))


def test_the_page_of_a_long_run_stays_small(run, tmp_path):
    copy = Run(tmp_path / "long")
    long_run(run, copy)
    started = time.perf_counter()
    page = write_report(copy).read_text()
    assert time.perf_counter() - started < 30 and len(page) < LIMIT
    shown = [int(step) for step in re.findall(r'data-step="(\d+)"', page)]
    assert len(shown) == MOST_PICTURES and (shown[0], shown[-1]) == (1000, 39_000) and shown == sorted(shown)
    assert "40k" in section(page, "curves") and len(section(page, "curves")) < 500_000
    started = time.perf_counter()  # as at the next evaluation, when pictures are not encoded again
    write_report(copy)
    assert time.perf_counter() - started < 10


def test_thin_curves_keep_their_extremes():
    rng = np.random.default_rng(0)
    points = [(i, float(v)) for i, v in enumerate(rng.standard_normal(5000))]
    points[1234], points[4321] = (1234, 99.0), (4321, -99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(kept) and set(kept) <= set(points)
    assert {points[0], points[-1], (1234, 99.0), (4321, -99.0)} <= set(kept)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.34), (-5, 1e6), (3, 3), (0, 0), (1e-9, 3e-9), (-2, -1), (0, 0.3)])
def test_ticks_enclose_the_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low and high <= marks[-1] and 2 <= len(marks) <= 7 and marks == sorted(set(marks))


@pytest.mark.parametrize("high", [1e-3, 3e-4, 1e-5, 0.01, 1, 60, 7000])
def test_labels_of_ticks_say_their_values(high):
    for mark in ticks(0, high):
        assert float(_short(mark).replace("k", "e3")) == pytest.approx(mark)


def test_numbers():
    values = (None, float("nan"), 0, 0.123456, 12345.6, 123456.7, 0.0001234, -3.0)
    assert [number(v) for v in values] == ["-", "-", "0", "0.1235", "1.235e+04", "1.23e+05", "1.23e-04", "-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("x" * 500), KeyError("lost")])
def test_a_training_goes_on_without_its_page(tmp_path, monkeypatch, capsys, error):
    plain = run_tiny(tmp_path / "plain", train__evaluate_every=1, train__picture_every=9)

    def fail(run):
        raise error

    monkeypatch.setattr(trainer, "write_report", fail)
    run = run_tiny(tmp_path / "run", train__evaluate_every=1, train__picture_every=9)
    said = [line for line in capsys.readouterr().out.splitlines() if "report.html is not written" in line]
    assert len(said) == 1 and said[0].startswith(f"warning: report.html is not written ({type(error).__name__}")
    assert len(said[0]) < 400 and "the training goes on without it" in read_about(run).notes[-1]
    assert run.result.read_text() == plain.result.read_text() and not run.report.exists()


def test_pages_of_a_run_that_stopped_early_and_went_on(tmp_path, capsys):
    """Each evaluation writes a page with the picture of its step."""
    settings = dict(train__evaluate_every=1, train__picture_every=1, optimizer__lr=1e-9, train__steps=5)
    run = run_tiny(tmp_path / "run", train__patience=2, **settings)
    page = run.report.read_text()
    step = json.loads(run.result.read_text())["step"]
    assert step < 5 and f"step {step}, stopped early" in page and f'data-step="{step}"' in page
    run_tiny(tmp_path / "run", "--resume", train__patience=None, **settings)
    page = run.report.read_text()
    assert "step 5, finished" in page and 'data-step="5"' in page and "Started 2 times." in page
    run.result.unlink()
    report.main([str(run.folder)])
    assert "step 5, not finished" in run.report.read_text() and capsys.readouterr().out.endswith(f"{run.report}\n")


def test_a_page_during_the_training(tmp_path, monkeypatch):
    pages, real = [], trainer.write_report
    monkeypatch.setattr(trainer, "write_report", lambda run: pages.append(real(run).read_text()))
    run_tiny(tmp_path / "run", train__steps=4, train__evaluate_every=2, train__picture_every=2, method__preset="supervised")
    assert [re.search(r"step (\d+), ([\w ]+)<", page).groups() for page in pages] == [
        ("2", "not finished"), ("4", "not finished"), ("4", "finished"),
    ]  # fmt: skip
    assert [page.count("<img") for page in pages] == [1, 2, 2]
    assert "On val after step 2" in pages[0] and "On test after step 4" in pages[2]


def test_runs_of_earlier_versions_have_pages_too(run, tmp_path):
    old = Run(tmp_path / "old")
    old.folder.mkdir()
    old.config.write_text(run.config.read_text())
    added = ("pseudo_label_class_coverage", "pseudo_label_class_accuracy")
    lines = [{k: v for k, v in line.items() if k not in added} for line in read_metrics(run)]
    old.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(old).read_text()
    assert "confusions" not in page and "The run keeps no versions" in page and 'id="classes"' in page
    old.metrics.unlink()
    assert "step 0, not finished" in write_report(old).read_text()


def test_what_the_command_refuses(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"--train\.steps has no effect on a report; leave it out"):
        report.main([str(tmp_path), "--train.steps", "4"])


def test_notes_of_the_check_come_onto_the_page(tmp_path, monkeypatch):
    """Those of `python -m cmim.train FOLDER`, and classes without a pixel."""
    root = write_folder(tmp_path / "data", train=6)
    (root / "classes.txt").write_text("sky\nroad\ntree\nnowhere\n")
    settings = {key: value for key, value in TINY.items() if not key.startswith("data.shapes")}
    settings = {key.replace(".", "__"): value for key, value in settings.items()} | FOLDER
    run = run_tiny(tmp_path / "run", **settings | {"data__root": str(root), "method__preset": "supervised"})
    notes = section(run.report.read_text(), "notes")
    assert "nowhere" in notes and any("nowhere" in note for note in read_about(run).notes)


def results():
    """Two variants on three seeds."""
    make = lambda name, seed, miou: Result(  # noqa: E731
        name, seed, miou, miou + 0.01, "test", [(5, miou - 0.1), (10, miou)], {"sky": miou, EVIL: 1 - miou, "none": None},
        0.5, "a machine", {"method": {"preset": EVIL}},
    )  # fmt: skip
    base, other = (0.50, 0.60, 0.55), (0.53, 0.64, 0.57)
    return {
        "plain": [make("plain", i, v) for i, v in enumerate(base)],
        "better": [make("better", i, v) for i, v in enumerate(other)],
    }


def test_the_page_of_a_comparison(tmp_path):
    (tmp_path / "better-1").mkdir()
    (tmp_path / "better-1/report.html").touch()
    page = study_page(results(), "plain", tmp_path)
    links = re.findall(r'href="([^"#][^"]*)"', page)
    assert links == ["better-1/report.html"]
    assert_safe(page.replace('href="better-1/report.html"', ""))
    # Differences 3, 4 and 2: mean 3, standard deviation 1, t of 2 degrees of freedom 4.303.
    assert "+3.00 [+0.52, +5.48]" in section(page, "results") and "55.00 ± 5.00" in section(page, "results")
    ranges = section(page, "spread-and-differences")
    assert "+3.00 [+0.52, +5.48]" in ranges
    rows = [row.partition("</svg>")[0] for row in ranges.split('<text class="name"') if "<circle" in row]
    assert len(rows) == 3  # both variants, and the difference of one
    for row in rows:  # the mean of the seeds is the upright line, in the middle of the bar
        seeds = [float(x) for x in re.findall(r'cx="([\d.]+)"', row)]
        bar, upright = [[float(x) for x in pair] for pair in re.findall(r'x1="([\d.]+)" x2="([\d.]+)"', row)]
        assert len(seeds) == 3 and sum(seeds) / 3 == pytest.approx(upright[0], abs=0.2)
        assert sum(bar) / 2 == pytest.approx(upright[0], abs=0.2) and bar[0] < upright[0]
    classes = section(page, "classes")
    assert "<td>sky</td><td>55.0</td><td>58.0 <small class='up'>+3.0</small></td>" in classes
    assert "<td>none</td><td>-</td><td>-</td>" in classes and escape(EVIL) in classes and EVIL not in page


def test_rows_without_an_interval():
    page = study_page({name: runs[:1] for name, runs in results().items()}, "plain", Path("x"))
    assert "+3.00" in page and "inf" not in section(page, "spread-and-differences") and "nan" not in page
    assert range_chart("t", [], zero=True).startswith("<figure")


def test_a_page_in_a_browser(run, tmp_path):
    """Narrow and wide, light and dark: nothing is asked for, nothing sticks out, and keys do what the pointer does."""
    study = tmp_path / "study.html"
    study.write_text(study_page(results(), "plain", tmp_path))
    with Browser(tmp_path / "browser") as browser:
        colours = set()
        for page in (run.report, study):
            for width in (390, 1440):
                for dark in (False, True):
                    browser.open(page, width, dark=dark)
                    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), (page.name, width)
                    assert browser.problems() == []
                    colours.add(browser.value("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        browser.open(run.report)
        browser.value("document.querySelector('figure.chart').focus()")
        browser.press("Home")
        first = browser.value("document.querySelector('figure.chart output').textContent")
        browser.press("ArrowRight")
        second = browser.value("document.querySelector('figure.chart output').textContent")
        val = [line for line in read_metrics(run) if line.get("split") == "val"]
        assert [text.split(":")[0] for text in (first, second)] == ["step 2", "step 4"]
        assert float(first.split(": ")[1]) == pytest.approx(100 * val[0]["miou"], rel=1e-3)
        shown = "[...document.querySelectorAll('.pictures img')].map(image => image.hidden)"
        assert browser.value(shown) == [True, False]
        browser.value("document.querySelector('.pictures input').focus()")
        browser.press("Home")
        assert browser.value(shown) == [False, True]
        assert browser.value("document.querySelector('.pictures output').textContent") == "step 2"
        unnamed = "[...document.querySelectorAll('input, button, figure, img')].filter(e => !(e.ariaLabel || e.alt)).length"
        assert browser.value(unnamed) == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(run, tmp_path, dark):
    """At least 4.5 to 1, the AA level of WCAG 2.2, for text on what is behind it."""
    program = """
        (() => {
          const light = c => { const v = c.match(/\\d+/g).slice(0, 3).map(n => n / 255).map(
            n => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4); return 0.2126*v[0] + 0.7152*v[1] + 0.0722*v[2]; };
          const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (c !== "rgba(0, 0, 0, 0)") return c; } };
          let worst = 99;
          const texts = "h1,h2,p,a,dt,dd,b,td,th,output,li,pre,summary,figcaption,svg text:not(.high,.low)";
          for (const e of document.querySelectorAll(texts)) {
            const style = getComputedStyle(e), ink = light(e.namespaceURI.includes("svg") ? style.fill : style.color);
            const [a, b] = [ink, light(behind(e))].sort((x, y) => y - x);
            worst = Math.min(worst, (a + 0.05) / (b + 0.05));
          }
          return worst;
        })()
    """
    with Browser(tmp_path / "browser") as browser:
        browser.open(run.report, dark=dark)
        assert browser.value(program) >= 4.5
