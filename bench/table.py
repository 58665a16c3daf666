"""Measurements as lines of text."""

from bench.comparison import OURS


def ratio_table(rows):
    """Lines for (group, baseline, seconds, extra info): a group's formulations from the fastest to the slowest."""
    groups = {}
    for group, name, seconds, info in rows:
        groups.setdefault(group, []).append((seconds, name, info))
    for group, entries in groups.items():
        own = next((seconds for seconds, name, _ in entries if name == OURS), None)
        yield group
        for seconds, name, info in sorted(entries, key=lambda entry: entry[0]):
            yield f"  {name:28} {in_words(seconds):>10}" + _ratio(seconds, info.get("ours_beside") or own) + _details(info)


def in_words(seconds):
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _ratio(seconds, own):
    return f"  ({seconds / own:5.2f})" if own else ""


def _details(info):
    details = []
    if info.get("share_of_target"):
        details.append(f"{info['share_of_target']:.0%} of the target")
    if info.get("peak_bytes") is not None:
        details.append(f"{info['peak_bytes'] / 2**20:,.0f} MiB")
    if info.get("launches"):
        details.append(f"{info['launches']} launches")
    if info.get("clock") == "eager":
        details.append("called from Python")
    if "images_per_second" in info:
        details.append(f"{info['images_per_second']:.3g} images/s")
    if "host_waits" in info:
        details.append(f"the host waits {info['host_waits']} times")
    return "  " + ", ".join(details) if details else ""
