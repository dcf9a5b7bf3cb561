"""Tables of results, and docs/performance.md with its charts, from the JSON under benchmarks/results.

`python -m benchmarks.report` writes the page; `python -m benchmarks.report --check` fails where it is not what
the committed results give.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "lm-head.svg"
DEVICES = ("cpu", "cuda")
SIMD = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX-512"}
WITHOUT_BACKWARD = {"global_top_mask"}

HEAD = """# Performance

Made from the files under [benchmarks/results](../benchmarks/results) by `make performance`; a figure without such a
file is not quoted anywhere. `make bench` measures: ours and each installed peer on the same fresh random inputs, in one
process, in turns, with caches swept before every call. Times are medians with their quartiles. "GB/s" counts the
least bytes that the work must read and write, and is set against a copy on the same device, reads and writes counted;
what only reads can pass 100 %. Memory is the most that a call holds beside its inputs. The CPU kernels take the widest
instruction set of the processor; a narrower one is named in the heading, and behind torch's version the one that torch,
and so the peers, had: `ENTROPY_RL_SIMD=avx2 ATEN_CPU_CAPABILITY=avx2` makes both sides those of a processor without
AVX-512.
"""
RUN_HEAD = """
## Which kernels have run where

| op | CPU | CUDA |
|---|---|---|
"""
RUN_FOOT = """
"Compiled" means that `make cuda-build` builds, installs and imports the kernels, and that their unmodified source
passes its tests under the host's SIMT shim (`tests/cpp/simt.h`), which is not a GPU. `make test-gpu` runs everything on
a GPU: the op tests, the host-sync, CUDA-graph and determinism tests, and compute-sanitizer.
"""


def load(device: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / device).glob("*.json"))]


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def _median(record: dict[str, Any]) -> float:
    return statistics.median(record["seconds"])


def _spread(record: dict[str, Any]) -> str:
    if len(record["seconds"]) < 2:
        return ""
    low, _, high = statistics.quantiles(record["seconds"], n=4, method="inclusive")
    return f"{_time(low)} – {_time(high)}"


def _memory(record: dict[str, Any]) -> str:
    peak = record.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**20:.1f} MiB"


def _goal(name: str, least: float, run: dict[str, Any], copy: float) -> tuple[str, str]:
    """(goal, what was measured, with whether it is met)"""
    seconds = _median(run["contenders"]["ours"])
    if name == "seconds":
        return f"at most {_time(least)}", f"{_time(seconds)}, {'met' if seconds <= least else '**missed**'}"
    if name == "copy":
        share = run["bytes"] / seconds / copy
        return f"at least {least:.0%} of a copy", f"{share:.0%}, {'met' if share >= least else '**missed**'}"
    peer = run["contenders"].get(name, {})
    text = f"at least {least:g}× {name}" if least >= 1 else f"at most {1 / least:g}× the time of {name}"
    if not peer.get("seconds"):
        return text, "the peer did not run"
    ratio = _median(peer) / seconds
    measured = f"{ratio:.3g}×" if least >= 1 else f"{1 / ratio:.3g}×"
    return text, f"{measured}, {'met' if ratio >= least else '**missed**'}"


def _threads(result: dict[str, Any]) -> str:
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}" if result["threads"] else ""


def _width(result: dict[str, Any]) -> tuple[int, int]:
    """Orders runs by threads, then by instruction set, where none is told the last."""
    return result["threads"] or 0, list(SIMD).index(result["simd"]) if result.get("simd") else len(SIMD)


def _where(result: dict[str, Any]) -> str:
    """Threads and instruction set of a CPU run, the device of another."""
    return ", ".join(filter(None, (_threads(result), SIMD.get(result.get("simd"))))) or result["device_name"]


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    copy = result["copy_bytes_per_second"]
    torch = result["versions"]["torch"]
    if result["threads"] and "torch_simd" in result:
        torch += f" ({result['torch_simd']})"
    narrow = SIMD[result["simd"]] if result.get("simd") not in (None, "avx512") else ""
    lines = [
        "### " + ", ".join(filter(None, (result["op"], _threads(result), narrow))),
        "",
        f"{result['device_name']}, commit {(result['commit'] or 'unknown')[:10]}"
        f"{' with changes' if result['modified'] else ''}, {result['date']}, torch {torch}; "
        f"a copy moves {copy / 1e9:.1f} GB/s.",
        "",
        "| work | who | time | quartiles | against ours | GB/s | of a copy | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        ours = _median(run["contenders"]["ours"])
        for name, record in run["contenders"].items():
            who = f"**{name}**" if name == "ours" else name
            if "error" in record:
                lines.append(f"| {run['case']} | {who} | failed: {record['error'].replace('|', '/')} | | | | | |")
                continue
            seconds = _median(record)
            rate = run["bytes"] / seconds
            lines.append(
                f"| {run['case']} | {who} | {_time(seconds)} | {_spread(record)} | {seconds / ours:.2f} "
                f"| {rate / 1e9:.1f} | {rate / copy:.0%} | {_memory(record)} |"
            )
    return "\n".join(lines) + "\n"


def goal_table(results: list[dict[str, Any]]) -> str:
    """The goals of these runs as Markdown, with a column for each way in which they ran."""
    with_goals = [result for result in results if any(run["goals"] for run in result["runs"])]
    places = list(dict.fromkeys(map(_where, sorted(with_goals, key=_width, reverse=True))))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        for run in result["runs"]:
            for name, least in run["goals"].items():
                goal, measured = _goal(name, least, run, result["copy_bytes_per_second"])
                rows.setdefault((result["op"], run["case"], goal), {})[_where(result)] = measured
    if not rows:
        return ""
    lines = [f"| op | work | goal | {' | '.join(places)} |", "|---" * (3 + len(places)) + "|"]
    for (op, case, goal), measured in rows.items():
        lines.append(f"| {op} | {case} | {goal} | {' | '.join(measured.get(place, '') for place in places)} |")
    return "\n".join(lines) + "\n"


def thread_table(results: list[dict[str, Any]]) -> str:
    """Our time by the number of threads as Markdown, on the widest instruction set, beside the copy's."""
    threads = sorted({result["threads"] for result in results})
    times: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        if result.get("simd") == "avx512":
            for run in result["runs"]:
                work = times.setdefault((result["op"], run["case"]), {})
                work[result["threads"]] = _median(run["contenders"]["ours"])
    scaled = {work: by_threads for work, by_threads in times.items() if len(by_threads) == len(threads) > 1}
    if not scaled:
        return ""
    heads = " | ".join(f"{n} thread{'s' if n > 1 else ''}" for n in threads)
    lines = [f"| op | work | {heads} | speed-up |", "|---" * (3 + len(threads)) + "|"]
    for (op, case), by_threads in scaled.items():
        cells = " | ".join(_time(by_threads[n]) for n in threads)
        lines.append(f"| {op} | {case} | {cells} | {by_threads[threads[0]] / by_threads[threads[-1]]:.2f} |")
    return "\n".join(lines) + "\n"


def _executed(op: str, results: list[dict[str, Any]]) -> str:
    """What of an op its benchmark has run on a GPU, and where. It need not have met every kernel: the tests do."""
    backward: dict[tuple[str, str], bool] = {}
    for result in results:
        if result["op"] == op:
            commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["modified"] else "")
            place = (result["device_name"], commit)
            backward[place] = backward.get(place, False) or any(run["backward"] for run in result["runs"])
    if not backward:
        return "compiled for sm_80 and sm_90; **never executed on a GPU**"
    return "; ".join(
        f"{_parts(op, ran_backward)}benchmark run on {name} at commit {commit}"
        for (name, commit), ran_backward in sorted(backward.items())
    )


def _parts(op: str, backward: bool) -> str:
    if op in WITHOUT_BACKWARD:
        return ""
    return "forward and backward: " if backward else "forward alone: "


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "entropy_rl_ext"  # the same file from the same results
    from matplotlib import pyplot

    return pyplot


def _widest(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each op the run with most threads, of these the one on the widest instruction set."""
    return {result["op"]: result for result in sorted(results, key=_width)}


def chart(device: str, results: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times ours each peer takes, the widest run (most threads) of each op."""
    pyplot = _pyplot()
    bars = [
        (f"{op}: {run['case']}\n{name}", _median(record) / _median(run["contenders"]["ours"]))
        for op, result in sorted(_widest(results).items())
        for run in result["runs"]
        for name, record in run["contenders"].items()
        if name != "ours" and record.get("seconds")
    ]
    if not bars:
        return
    labels, ratios = zip(*reversed(bars), strict=True)
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.32 * len(bars)), layout="constrained")
    axes.barh(range(len(bars)), ratios, color=["#3b6ea5" if ratio >= 1 else "#b5533c" for ratio in ratios])
    axes.set_yticks(range(len(bars)), labels, fontsize=6)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer / time of ours")
    for y, ratio in enumerate(ratios):
        axes.text(ratio, y, f" {ratio:.1f}", va="center", fontsize=6)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def with_table(path: Path, module: str, lines: str) -> str:
    """The page with `lines` between its two marks, of which the first names the module that measures them."""
    marks = f"<!-- python -m {module} -->\n", "<!-- end -->\n"
    return re.sub(
        f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
        lambda _: f"{marks[0]}{lines}{marks[1]}",
        path.read_text(),
        flags=re.DOTALL,
    )


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """The README's: seconds of the LM head, forward and backward, of ours and of each peer as it is installed."""
    pyplot = _pyplot()
    result = _widest(results)["linear_logprob_entropy"]
    runs = [run for run in result["runs"] if ", float32 " in run["case"]]
    figure, panels = pyplot.subplots(1, len(runs), figsize=(10, 2.5), layout="constrained", sharex=True)
    for axes, run in zip(panels, runs, strict=True):
        records = {
            name: record
            for name, record in reversed(run["contenders"].items())
            if record.get("seconds") and "by hand" not in name
        }
        times = [_median(record) for record in records.values()]
        axes.barh(list(records), times, color=["#b1341a" if name == "ours" else "#b9b4ab" for name in records])
        for y, seconds in enumerate(times):
            axes.text(seconds, y, f" {_time(seconds)}", va="center", fontsize=8)
        work, size = run["case"].split(", float32 ")
        axes.set_title(work.replace(", ", ",\n"), fontsize=9, loc="left")
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.margins(x=0.25)  # room for the figures behind the bars
    where = f"{result['device_name']}, {result['threads']} threads" if result["threads"] else result["device_name"]
    figure.supxlabel(f"{size}, float32, {where}, {result['date']}", fontsize=7, color="#666666")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def page() -> str:
    results = {device: load(device) for device in DEVICES}
    # Not what is measured of the trainers, which have no kernels.
    ops = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    parts = [HEAD, RUN_HEAD]
    for op in ops:
        kernels = f"`{op}`" if op in WITHOUT_BACKWARD else f"`{op}`, forward and backward"
        parts.append(f"| {kernels} | tested | {_executed(op, results['cuda'])} |\n")
    parts += [RUN_FOOT]
    for device, files in results.items():
        if not files:
            parts.append(f"\n## {device.upper()}\n\nNothing has been measured.\n")
            continue
        parts.append(f"\n## {device.upper()}\n\n![Each peer's time against ours](performance-{device}.svg)\n")
        if goals := goal_table(files):
            parts.append(f"\n### Goals\n\n{goals}")
        if device == "cpu" and (scaling := thread_table(files)):
            parts.append(f"\n### Threads\n\nOurs, {SIMD['avx512']}.\n\n{scaling}")
        parts += ["\n" + table(result) for result in files]
    return "".join(parts)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            sys.exit("docs/performance.md is not what benchmarks/results gives: run make performance")
        return
    PAGE.write_text(page())
    for device in DEVICES:
        if results := load(device):
            chart(device, results, PAGE.parent / f"performance-{device}.svg")
    picture(load("cpu"), PICTURE)


if __name__ == "__main__":
    main()
