"""A pytest plugin that writes a line of JSON as soon as a test starts and ends: `-p bench.recorder --results FILE`.

So a run that is killed keeps what it has. A line has the stage (`--stage`), the item (the test's id) and its status:
started, passed, failed or skipped; with `seconds`, what the test measured (`user_properties`), and the end of its error.
Items that `--done FILE` lists, one id a line, are left out.

A device that has failed once fails every later test of the process. After such an error the session ends, with an exit code
that asks for a new process to go on.
"""

import json
import time
from pathlib import Path

import pytest

GO_ON = 75
"""The exit code of a session that ends before its last test."""
OF_A_BROKEN_DEVICE = ("CUDA error", "illegal memory access", "misaligned address", "unspecified launch", "CaptureError")
"""Parts of such errors. `bench.clock.CaptureError`: PyTorch may go on capturing."""
ERROR_CHARACTERS = 1500


def pytest_addoption(parser):
    group = parser.getgroup("recorder")
    group.addoption("--results", type=Path, metavar="FILE", help="append a line of JSON for each test")
    group.addoption("--stage", default="", help="written into each line")
    group.addoption("--done", type=Path, metavar="FILE", help="ids of tests to leave out")


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist, whose main process hears of every test
    if config.getoption("results") and not is_worker:
        config.pluginmanager.register(Recorder(config.getoption("results"), config.getoption("stage")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    done = config.getoption("done")
    if done and done.exists():
        ids = set(done.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ids])
        items[:] = [item for item in items if item.nodeid not in ids]


class Recorder:
    def __init__(self, path, stage):
        self.path, self.stage, self.session, self.broken = path, stage, None, False
        self.reports = {}

    def write(self, **line):
        with self.path.open("a") as file:
            file.write(
                json.dumps({"stage": self.stage, "time": round(time.time(), 2), "date": time.strftime("%Y-%m-%d")} | line)
                + "\n"
            )

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logstart(self, nodeid):
        self.write(item=nodeid, status="started")

    def pytest_runtest_logreport(self, report):
        reports = self.reports.setdefault(report.nodeid, [])
        reports.append(report)
        if report.when == "teardown":
            self.finish(report.nodeid, self.reports.pop(report.nodeid))

    def finish(self, item, reports):
        failed = next((r for r in reports if r.failed), None)
        skipped = next((r for r in reports if r.skipped), None)
        line = {"status": "failed" if failed else "skipped" if skipped else "passed"}
        line["seconds"] = round(sum(r.duration for r in reports), 3)
        line |= dict(reports[-1].user_properties)
        if failed:
            line["error"] = str(failed.longrepr)[-ERROR_CHARACTERS:]
            if any(sign in str(failed.longrepr) for sign in OF_A_BROKEN_DEVICE):
                self.broken = True
                self.session.shouldstop = "the device, or what captures its work, may be broken"
        elif skipped:
            line["error"] = str(skipped.longrepr[-1] if isinstance(skipped.longrepr, tuple) else skipped.longrepr)
        self.write(item=item, **line)

    def pytest_sessionfinish(self, session):
        if self.broken:
            session.exitstatus = GO_ON


def read(path):
    """The lines of a results file; a line that a kill has cut is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def last_of_each(lines):
    """(stage, item) -> its last line."""
    return {(line["stage"], line["item"]): line for line in lines if "item" in line}
