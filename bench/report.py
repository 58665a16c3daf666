"""`python -m bench.report RESULTS ...`: measurements as tables in words, and as plots beside the files.

RESULTS are JSON files of `pytest bench/ --benchmark-json FILE`, or lines of `bench.recorder` (`bench.gpu`), complete or not,
of one run each. FILE.md gets every measurement and what failed; the file of `--readme`, between its markers, one row for
each op: how many times faster than the best baseline; and what class-wise work costs beside the same without classes.
"""

import argparse
import json
import math
from pathlib import Path

from bench.comparison import CUDA_CPP, FORMULAS, OURS
from bench.inputs import TINY
from bench.recorder import last_of_each, read
from bench.table import in_words

START, END = "<!-- bench -->", "<!-- /bench -->"


class UnreadableFile(Exception):
    """A file that is missing or holds something else; the message names it and says what is expected."""


class Run:
    """One run on one machine. `groups`: {group: {baseline: (seconds, extra info)}}."""

    def __init__(self, path):
        self.path, self.groups, self.failed, self.notes = Path(path), {}, [], []
        if not self.path.is_file():
            raise UnreadableFile(f"there is no file {path}; give one that pytest bench/ or bench.gpu wrote")
        try:
            if self.path.suffix == ".jsonl":
                self._read_lines()
            else:
                self._read_benchmarks()
        except (ValueError, KeyError, TypeError, AttributeError):
            self.groups, self.failed, self.notes = {}, [], []  # nothing of a file that is read in part
        if not (self.groups or self.failed or self.notes):
            wanted = "lines of bench.recorder" if self.path.suffix == ".jsonl" else "JSON of pytest --benchmark-json"
            raise UnreadableFile(f"{path} has no measurement; expected {wanted}")

    def _read_benchmarks(self):
        content = json.loads(self.path.read_text())
        self.machine, self.date = content["machine_info"], content["datetime"][:10]
        self.machine.setdefault("commit", content["commit_info"].get("id", "unknown"))
        self.machine.setdefault("cpu_name", self.machine.get("cpu", {}).get("brand_raw", "CPU"))
        for entry in content["benchmarks"]:
            self._add(entry["group"], entry["stats"]["min"], entry["extra_info"])

    def _read_lines(self):
        self.machine, self.date = {}, "unknown"
        for (stage, item), line in last_of_each(read(self.path)).items():
            self.machine |= line.get("machine", {})
            self.date = max(line.get("date", ""), self.date) if self.date != "unknown" else line.get("date", "unknown")
            if "stats" in line:
                self._add(line["group"], line["stats"]["min"], line["extra_info"])
            elif line["status"] == "passed":
                told = {
                    k: v
                    for k, v in line.items()
                    if k not in ("stage", "item", "status", "time", "date", "seconds", "machine")
                }
                if told:
                    self.notes.append(f"{stage}: {item.split('::')[-1]}: {json.dumps(told)}")
            if line["status"] not in ("passed", "skipped"):
                reason = (line.get("error", "").strip().splitlines() or [""])[-1]
                self.failed.append(f"{stage}: {item.split('::')[-1]}: {line['status']}: {reason[:300]}")

    def _add(self, group, seconds, info):
        name = info.get("baseline") or info.get("rival")  # the older name
        if name:
            self.groups.setdefault(group, {})[name] = (seconds, info)

    def describe(self):
        versions = f"torch {self.machine.get('torch', '?')}, triton {self.machine.get('triton', '?')}"
        threads = self.machine.get("threads", "?")
        device = self.machine.get("gpu") or f"{self.machine.get('cpu_name', 'CPU')}, {threads} thread{'s' * (threads != 1)}"
        device += f", {self.machine['dtype']}" if "dtype" in self.machine else ""
        commit = self.machine.get("commit", "unknown")[:7]
        return f"{device}; {versions}; commit {commit}, {self.date}: `{self.machine.get('command', '?')}`"

    def best_baseline(self, group):
        """(seconds, name) of the fastest formulation that is not ours and has the same result; None without one."""
        others = [
            (seconds, name)
            for name, (seconds, info) in self.groups[group].items()
            if name not in (OURS, FORMULAS, CUDA_CPP) and info.get("comparable", True)
        ]
        return min(others, default=None)

    def speed_ups(self):
        """group -> time of the best baseline over ours, the largest first."""
        found = {}
        for group, baselines in self.groups.items():
            best = self.best_baseline(group)
            if OURS in baselines and best:
                found[group] = best[0] / self.ours_beside(group, best[1])
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    def ours_beside(self, group, name):
        """Our time to be compared with that of the baseline `name`: measured in turn with it where it was."""
        return self.groups[group][name][1].get("ours_beside") or self.groups[group][OURS][0]

    def costs(self):
        """(group, baseline, how many times as long ours takes) of the baselines that do less than ours."""
        for group, baselines in self.groups.items():
            for name, (seconds, info) in baselines.items():
                if OURS in baselines and name != OURS and not info.get("comparable", True):
                    yield group, name, self.ours_beside(group, name) / seconds


def all_rows(run):
    """Markdown of every measurement, the best speed-up first, then what was noted and what failed."""
    yield f"{run.describe()}\n"
    yield "| what | ours | speed-up over the best baseline | all others: times as long as ours | of the target | error |"
    yield "| --- | ---: | ---: | --- | ---: | ---: |"
    for group, ratio in run.speed_ups().items():
        seconds, info = run.groups[group][OURS]
        others = sorted(
            (other / run.ours_beside(group, name), name) for name, (other, _) in run.groups[group].items() if name != OURS
        )
        listed = "; ".join(f"{name}: {times:.2f}" for times, name in others)
        share = f"{info['share_of_target']:.0%}" if "share_of_target" in info else ""
        error = f"{info['error']:.1e}" if info.get("error") is not None else ""
        yield f"| {group} | {in_words(seconds)} | {ratio:.2f} | {listed} | {share} | {error} |"
    for title, lines in (("Noted", run.notes), ("Not passed", run.failed)):
        if lines:
            yield f"\n{title}:\n"
            yield from (f"- {line}" for line in lines)


def summary(run):
    """Markdown: for each op the geometric mean of its speed-ups over all shapes, the lowest, and the time of a tiny call;
    the best op first. Then what our own costs beside baselines that do less."""
    parts, own_time = {}, {}
    for group, ratio in run.speed_ups().items():
        name, _, rest = group.partition("; ")
        part = "both" if rest.endswith("forward and backward") else "forward"
        if rest.startswith(f"{TINY.name};"):
            own_time[name, part] = run.groups[group][OURS][0]
        else:
            parts.setdefault(name, {"forward": [], "both": []})[part].append(ratio)
    in_two_digits = lambda ratios: f"{_mean(ratios):.2f}" if ratios else ""  # noqa: E731
    yield f"{run.describe()}\n"
    yield "| | forward | forward and backward | lowest | a call that has nothing to do |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    everything = {"forward": [], "both": []}
    for name, found in sorted(parts.items(), key=lambda entry: -_mean(entry[1]["forward"] + entry[1]["both"])):
        lowest = min(found["forward"] + found["both"])
        times = ", ".join(in_words(own_time[name, part]) for part in ("forward", "both") if (name, part) in own_time)
        yield f"| {name} | {in_two_digits(found['forward'])} | {in_two_digits(found['both'])} | {lowest:.2f} | {times} |"
        if (name, "forward") in own_time:  # an op
            for part in everything:
                everything[part] += [_mean(found[part])] if found[part] else []
    if any(everything.values()):
        yield f"| all ops | {in_two_digits(everything['forward'])} | {in_two_digits(everything['both'])} | | |"
    costs = list(run.costs())
    if costs:
        yield "\n| what | beside | takes times as long |"
        yield "| --- | --- | ---: |"
        yield from (f"| {group} | {name} | {ratio:.2f} |" for group, name, ratio in costs)
    if run.failed:
        yield f"\n{len(run.failed)} measurements or tests did not pass: see {run.path.with_suffix('.md').name}."


def _mean(ratios):
    """Geometric."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def parts_around_summary(readme):
    """The text before and after the markers."""
    text = readme.read_text() if readme.is_file() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UnreadableFile(f"{readme} has no place for the summary; add a line {START} and a line {END}")
    return before, after


def write_summary(readme, runs):
    before, after = parts_around_summary(readme)
    body = "\n\n".join("\n".join(summary(run)) for run in runs)
    readme.write_text(f"{before}{START}\n{body}\n{END}{after}")


def plot(run):
    """Time of decoding and loss against classes and against tokens; of ops, the speed-up and the share of the target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 8), constrained_layout=True)
    decoders = [
        (info["decoder"], name, info["classes"], info["tokens"], seconds)
        for baselines in run.groups.values()
        for name, (seconds, info) in baselines.items()
        if "decoder" in info
    ]
    usual_tokens = decoders[0][3] if decoders else None
    for axis, by, fixed, title in ((axes[0], 2, (3, usual_tokens), "classes"), (axes[1], 3, (2, 21), "tokens")):
        for decoder, name in dict.fromkeys(d[:2] for d in decoders):
            points = sorted((d[by], 1e3 * d[4]) for d in decoders if d[:2] == (decoder, name) and d[fixed[0]] == fixed[1])
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{decoder}: {name}") if points else None
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="ms", title=f"decode and loss against {title}")
        axis.legend(fontsize=7)
    ratios = run.speed_ups()
    axes[2].barh(list(ratios), list(ratios.values()))
    axes[2].axvline(1, color="black")
    axes[2].invert_yaxis()
    axes[2].set(xscale="log", title="times faster than the best baseline; dots: share of the target")
    shares = {group: run.groups[group][OURS][1].get("share_of_target") for group in ratios}
    axes[2].plot([s for s in shares.values() if s], [g for g, s in shares.items() if s], "o", color="black")
    axes[2].tick_params(labelsize=6)
    figure.suptitle(run.describe().split(":")[0], fontsize=9)
    figure.savefig(run.path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest-benchmark, or lines of bench.recorder")
    parser.add_argument("--readme", type=Path, help="file with markers for a summary, such as bench/README.md")
    options = parser.parse_args(arguments)
    try:
        runs = [Run(path) for path in options.results]
        if options.readme:
            parts_around_summary(options.readme)
    except UnreadableFile as error:
        parser.exit(2, f"error: {error}\n")
    for run in runs:
        run.path.with_suffix(".md").write_text("\n".join(all_rows(run)) + "\n")
        plot(run)
    if options.readme:
        write_summary(options.readme, runs)


if __name__ == "__main__":
    main()
