"""`python -m bench.report bench/results/*.json`: results as the tables of bench/README.md, and as plots beside the JSON.

Each JSON is one run (`pytest bench/ --benchmark-json FILE`) on one machine. The table goes between the markers
`<!-- bench -->` and `<!-- /bench -->` of that file; nothing else of it changes.
"""

import argparse
import json
from pathlib import Path

from bench.comparison import OURS
from bench.table import in_words

START, END = "<!-- bench -->", "<!-- /bench -->"


class Run:
    """One JSON of pytest-benchmark: {group: {rival: (seconds, extra info)}}, machine and command."""

    def __init__(self, path):
        content = json.loads(Path(path).read_text())
        self.path, self.machine = Path(path), content["machine_info"]
        self.commit, self.date = content["commit_info"].get("id", "unknown")[:7], content["datetime"][:10]
        self.groups = {}
        for entry in content["benchmarks"]:
            info = entry["extra_info"]
            if "rival" in info:
                self.groups.setdefault(entry["group"], {})[info["rival"]] = (entry["stats"]["min"], info)

    def describe(self):
        cpu = f"{self.machine['cpu'].get('brand_raw', 'CPU')}, {self.machine['threads']} thread"
        device = self.machine.get("gpu", cpu)
        versions = f"torch {self.machine['torch']}, triton {self.machine['triton']}"
        return f"{device}; {versions}; commit {self.commit}, {self.date}: `{self.machine['command']}`"


def table(run):
    """Markdown: for each group our time and how many times as long others take; on CUDA the share of the target."""
    yield run.describe() + "\n"
    targets = any("share_of_target" in info for rivals in run.groups.values() for _, info in rivals.values())
    yield "| what | ours | others: times as long as ours |" + " share of the target |" * targets
    yield "| --- | --- | --- |" + " --- |" * targets
    for group, rivals in run.groups.items():
        if OURS not in rivals:
            continue
        seconds, info = rivals[OURS]
        others = sorted((other / seconds, name) for name, (other, _) in rivals.items() if name != OURS)
        listed = "; ".join(f"{name}: {ratio:.2f}" for ratio, name in others)
        share = f"{info['share_of_target']:.0%}" if "share_of_target" in info else ""
        yield f"| {group} | {in_words(seconds)} | {listed} |" + f" {share} |" * targets


def write_table(readme, runs):
    text = readme.read_text()
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    body = "\n\n".join("\n".join(table(run)) for run in runs)
    readme.write_text(f"{before}{START}\n{body}\n{END}{after}")


def plot(run):
    """Time of decoding and loss against classes and against tokens; of ops, the share of the target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 8), constrained_layout=True)
    decoders = [
        (info["decoder"], rival, info["classes"], info["tokens"], seconds)
        for rivals in run.groups.values()
        for rival, (seconds, info) in rivals.items()
        if "decoder" in info
    ]
    usual_tokens = decoders[0][3] if decoders else None
    for axis, by, fixed, title in ((axes[0], 2, (3, usual_tokens), "classes"), (axes[1], 3, (2, 21), "tokens")):
        for decoder, rival in dict.fromkeys(d[:2] for d in decoders):
            points = sorted((d[by], 1e3 * d[4]) for d in decoders if d[:2] == (decoder, rival) and d[fixed[0]] == fixed[1])
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{decoder}: {rival}") if points else None
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="ms", title=f"decode and loss against {title}")
        axis.legend(fontsize=7)
    own = [(group, rivals[OURS]) for group, rivals in run.groups.items() if OURS in rivals]
    shares = [(group, info["share_of_target"]) for group, (_, info) in own if "share_of_target" in info]
    if shares:
        axes[2].barh([group for group, _ in shares], [share for _, share in shares])
        axes[2].axvline(1, color="black")
        axes[2].set_title("share of the target, ops of cmim_kernels")
        axes[2].tick_params(labelsize=6)
    else:  # without a device there is no target: the best rival instead
        ratios = [
            (group, min(s for name, (s, _) in run.groups[group].items() if name != OURS) / seconds)
            for group, (seconds, _) in own
            if len(run.groups[group]) > 1
        ]
        axes[2].barh([group for group, _ in ratios], [ratio for _, ratio in ratios])
        axes[2].axvline(1, color="black")
        axes[2].set(xscale="log", title="the fastest rival's time over ours")
        axes[2].tick_params(labelsize=6)
    figure.suptitle(run.describe().split(":")[0], fontsize=9)
    figure.savefig(run.path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help="JSON files of pytest-benchmark")
    parser.add_argument("--readme", type=Path, default=Path("bench/README.md"))
    options = parser.parse_args()
    runs = [Run(path) for path in options.results]
    for run in runs:
        plot(run)
    write_table(options.readme, runs)


if __name__ == "__main__":
    main()
