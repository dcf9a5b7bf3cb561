"""Tables and charts of the JSON files under benchmarks/results.

`python -m benchmarks.report` fills the tables of docs/performance.md and the README, and writes
docs/performance_details.md and the charts; `python -m benchmarks.report --check` fails if a page is not what the
committed results give.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "performance.md"
DETAILS = ROOT / "docs" / "performance_details.md"
PICTURE = ROOT / "docs" / "images" / "lm-head.svg"
DEVICES = ("cpu", "cuda")
SIMD = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX-512"}  # from narrow to wide
WITHOUT_BACKWARD = {"global_top_mask"}
# Contenders that do less than ours and bound its time from below.
WITHOUT_HEAD = "the step without the LM head"
LOWER_BOUNDS = {"amax", "nothing", WITHOUT_HEAD}

# What each row of the headline table says, with the op and the case that it comes from.
HEADLINE = {
    "`token_entropy`, float32": ("token_entropy", "float32 [128, 151936]"),
    "`token_entropy`, bfloat16": ("token_entropy", "bfloat16 [128, 151936]"),
    "`logprob_entropy`, every row has a gradient": (
        "logprob_entropy",
        "forward and backward, 100% of the rows, float32 [128, 151936]",
    ),
    "`logprob_entropy`, 20 % of the rows have a gradient": (
        "logprob_entropy",
        "forward and backward, 20% of the rows, float32 [128, 151936]",
    ),
    "`linear_logprob_entropy`, every row has a gradient": (
        "linear_logprob_entropy",
        "100% of the rows train, float32 [2048, 1024] x [32768, 1024]",
    ),
    "`linear_logprob_entropy`, 20 % of the rows have a gradient": (
        "linear_logprob_entropy",
        "20% of the rows train, float32 [2048, 1024] x [32768, 1024]",
    ),
    "`linear_logprob_entropy`, 20 % selected before the forward": (
        "linear_logprob_entropy",
        "20% of the rows train, known before the forward, float32 [2048, 1024] x [32768, 1024]",
    ),
    "`global_top_mask`, [1024, 4096] tokens": ("global_top_mask", "scope batch [1024, 4096]"),
    "`policy_loss`, vanilla, [64, 4096] tokens": ("policy_loss", "vanilla [64, 4096]"),
    "`policy_loss`, gspo, [64, 4096] tokens": ("policy_loss", "gspo [64, 4096]"),
    "`policy_loss`, gpg, [64, 4096] tokens": ("policy_loss", "gpg [64, 4096]"),
    "an optimizer step of TRL's trainer, 20 % of the tokens": (
        "trl_step",
        "4 × (32 + 256) tokens, hidden 256, 2 layers, vocabulary 16384",
    ),
}
# Columns of that table: each shows the fastest of these contenders.
HEADLINE_PEERS = {
    "PyTorch": ("torch", "torch, logits held"),
    "`torch.compile`": ("torch.compile", "torch.compile, logits held", "authors, torch.compile"),
    "verl": ("verl",),
    "TRL": ("TRL", "torch.quantile (TRL's rule)", "TRL, top_entropy_quantile"),
    "Liger": ("Liger",),
    "TRL or Liger, rows compacted by hand": ("TRL, rows compacted by hand", "Liger, rows compacted by hand"),
    "the authors' code": ("authors",),
}
# The README's contenders of llm_step, and what it calls them.
TRAINERS = {
    "TRL, all tokens": "TRL 1.16, all tokens",
    "TRL, top_entropy_quantile": "TRL 1.16, `top_entropy_quantile=0.2`",
    "ours, in TRL's trainer": "this package in TRL",
    "verl, all tokens": "verl 0.9.1, all tokens",
    "ours, in verl": "this package in verl",
    "ours": "this package's trainer",
}

# What runs more than one op: (part, on a CPU, on the emulated CUDA device, on a GPU).
OTHER_PARTS = (
    (
        "the selection over several ranks",
        "tested with gloo",
        "the steps of one process",
        "**never executed**; NCCL has not been run",
    ),
    ("`entropy_rl.train`, one process, DDP and FSDP2", "tested, ranks with gloo", "not run", "**never executed**"),
    ("verl with FSDP2", "tested, including full runs of `main_ppo`", "not run", "**never executed**"),
    ("verl with Ulysses sequence parallelism", "optimizer steps tested with gloo", "not run", "**never executed**"),
    ("verl with FSDP1, vLLM or SGLang", "not run", "not run", "**never executed**"),
    ("verl with Megatron", "parts tested with gloo ([which](verl.md#larger-runs))", "not run", "**never executed**"),
    ("TRL's trainer, one and two processes", "tested with gloo", "not run", "**never executed**"),
    ("TRL's trainer with LoRA (PEFT)", "tested on tiny models, one process", "not run", "**never executed**"),
    ("TRL's trainer with FSDP, DeepSpeed, vLLM or images", "not run", "not run", "**never executed**"),
)

DETAILS_HEAD = """# Performance: every measurement

This page lists every benchmark result behind [performance.md](performance.md). `make performance`
writes it from the files under [benchmarks/results](../benchmarks/results), which also hold the raw
samples.

- **Time** is the median, with its quartiles. `make bench` runs this package and each installed peer
  in one process, in turns, on the same fresh random inputs, and sweeps the caches before every
  call.
- **Against ours** is the contender's time divided by ours: above 1 the contender is slower.
- **GB/s** counts the fewest bytes that the work must read and write. **Of a copy** compares it with
  a copy on the same device, whose reads and writes both count, so work that only reads can pass
  100 %.
- **Memory** is the most that a call holds in addition to its inputs.
- Headings name the threads and the instruction set of our CPU kernels. The brackets after torch's
  version name the instruction set of torch, and so of the peers.
  `ENTROPY_RL_SIMD=avx2 ATEN_CPU_CAPABILITY=avx2` restricts both to AVX2. Older results lack one or
  both.
- `amax` reads the logits once and does nothing else: it bounds the time of `token_entropy` from
  below.
- `nothing` is a `torch.autograd.Function` that computes neither loss nor gradient: what PyTorch
  itself takes for a call, with cold caches, forward and backward.
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


MISSED = ", **missed**"


def _goal(name: str, least: float, run: dict[str, Any], copy: float) -> tuple[str, str]:
    """Returns the goal, and the measured value with ", met" or MISSED behind it."""
    seconds = _median(run["contenders"]["ours"])
    if name == "seconds":
        return f"at most {_time(least)}", _time(seconds) + (", met" if seconds <= least else MISSED)
    if name == "copy":
        share = run["bytes"] / seconds / copy
        return f"at least {least:.0%} of a copy", f"{share:.0%}" + (", met" if share >= least else MISSED)
    peer = run["contenders"].get(name, {})
    text = f"at least {least:g}× {name}" if least >= 1 else f"at most {1 / least:g}× the time of {name}"
    if not peer.get("seconds"):
        return text, "the peer did not run"
    ratio = _median(peer) / seconds
    measured = f"{ratio:.3g}×" if least >= 1 else f"{1 / ratio:.3g}×"
    return text, measured + (", met" if ratio >= least else MISSED)


def _threads(result: dict[str, Any]) -> str:
    return f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}" if result["threads"] else ""


def _width(result: dict[str, Any]) -> tuple[int, int]:
    """Sorts runs by threads, then by instruction set; a run that names none comes last."""
    return result["threads"] or 0, list(SIMD).index(result["simd"]) if result.get("simd") else len(SIMD)


def _where(result: dict[str, Any]) -> str:
    """The threads and instruction set of a CPU run; the device name of any other run."""
    return ", ".join(filter(None, (_threads(result), SIMD.get(result.get("simd"))))) or result["device_name"]


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    copy = result["copy_bytes_per_second"]
    torch = result["versions"]["torch"]
    if result["threads"] and "torch_simd" in result:
        torch += f" ({result['torch_simd']})"
    lines = [
        f"### {result['op']}, {_where(result)}",
        "",
        f"{result['device_name']}, {commit_of(result)}, {result['date']}, torch {torch}; "
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
    """The goals of these runs as Markdown, with one column for each combination of threads and instruction set."""
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
    """Our times by the number of threads as Markdown, on the widest instruction set that ran with each number."""
    threads = sorted({result["threads"] for result in results})
    times: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for result in sorted(results, key=_width):
        if result.get("simd"):
            for run in result["runs"]:
                of_simd = times.setdefault((result["op"], run["case"]), {}).setdefault(result["simd"], {})
                of_simd[result["threads"]] = _median(run["contenders"]["ours"])
    heads = " | ".join(f"{n} thread{'s' if n > 1 else ''}" for n in threads)
    lines = [f"| op | work | instruction set | {heads} | speed-up |", "|---" * (4 + len(threads)) + "|"]
    for (op, case), by_simd in times.items():
        complete = [simd for simd in SIMD if len(by_simd.get(simd, ())) == len(threads) > 1]
        if complete:
            of_threads = by_simd[complete[-1]]
            cells = " | ".join(_time(of_threads[n]) for n in threads)
            speedup = of_threads[threads[0]] / of_threads[threads[-1]]
            lines.append(f"| {op} | {case} | {SIMD[complete[-1]]} | {cells} | {speedup:.2f} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _peers(run: dict[str, Any]) -> dict[str, float]:
    """The time of each peer that ran, in multiples of ours."""
    ours = _median(run["contenders"]["ours"])
    return {
        name: _median(record) / ours
        for name, record in run["contenders"].items()
        if record.get("seconds") and name not in LOWER_BOUNDS and not name.startswith("ours")
    }


def headline_table(results: list[dict[str, Any]]) -> str:
    """Our time for each work of HEADLINE, and how many times as long the peers take, as Markdown."""
    runs = {(op, run["case"]): run for op, result in _widest(results).items() for run in result["runs"]}
    lines = [f"| | ours | {' | '.join(HEADLINE_PEERS)} |", "|---" * (2 + len(HEADLINE_PEERS)) + "|"]
    for label, work in HEADLINE.items():
        ratios = _peers(runs[work])
        cells = [
            min((ratios[name] for name in names if name in ratios), default=None) for names in HEADLINE_PEERS.values()
        ]
        ours = _time(_median(runs[work]["contenders"]["ours"]))
        lines.append(f"| {label} | {ours} | {' | '.join(map(_multiple, cells))} |")
    return "\n".join([*lines, "", _circumstances([_widest(results)[op] for op, _ in HEADLINE.values()])]) + "\n"


def _circumstances(results: list[dict[str, Any]]) -> str:
    """Where the headline's runs were made, and with which versions; both may differ between ops."""
    places = dict.fromkeys(f"{result['device_name']}, {_threads(result)}" for result in results)
    versions = [
        f"{name} {' and '.join(dict.fromkeys(str(result['versions'][name]) for result in results))}"
        for name in ("torch", "verl", "trl", "liger-kernel")
    ]
    return f"{'; '.join(places)}; {', '.join(versions)}."


def _multiple(ratio: float | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"
    return text if ratio >= 1 else f"**{text}**"


def step_table(results: list[dict[str, Any]]) -> str:
    """The optimizer step of a language model, and the share of it that is the LM head, as Markdown."""
    result = _widest(results).get("llm_step")
    if result is None:
        return "Nothing has been measured.\n"
    (run,) = result["runs"]
    records = {name: record for name, record in run["contenders"].items() if record.get("seconds")}
    lines = ["| step | time | quartiles | memory |", "|---|---|---|---|"]
    lines += [f"| {name} | {_time(_median(r))} | {_spread(r)} | {_memory(r)} |" for name, r in records.items()]
    rest = _median(records[WITHOUT_HEAD])
    shares = [
        f"{1 - rest / _median(records[name]):.0%}".replace("%", " %")
        for name in ("TRL, all tokens", "ours")
        if name in records
    ]
    lines += ["", f"The LM head's share of the step: {' of TRL on all tokens, '.join(shares)} of ours.", ""]
    lines += [f"{run['case']}. {_circumstances([result])}"]
    return "\n".join(lines) + "\n"


def trainer_table(results: list[dict[str, Any]]) -> str:
    """The README's part of `step_table`: each trainer on all tokens, and with this package, as Markdown."""
    result = _widest(results).get("llm_step")
    if result is None:
        return "Nothing has been measured.\n"
    (run,) = result["runs"]
    lines = ["| an optimizer step | time | memory |", "|---|---|---|"]
    for name, what in TRAINERS.items():
        record = run["contenders"].get(name, {})
        if record.get("seconds"):
            lines.append(f"| {what} | {_time(_median(record))} | {_memory(record)} |")
    return "\n".join(lines) + "\n"


def shortfall_table(results: list[dict[str, Any]]) -> str:
    """The runs in which a peer is faster than ours, and those that miss their goal, as Markdown."""
    lines = ["| op | work | run | result |", "|---|---|---|---|"]
    for result in results:
        for run in result["runs"]:
            found = [f"{name} takes {ratio:.2f}× our time" for name, ratio in _peers(run).items() if ratio < 1]
            for name, least in run["goals"].items():
                goal, measured = _goal(name, least, run, result["copy_bytes_per_second"])
                if measured.endswith(MISSED):
                    found.append(f"goal: {goal}; measured: {measured.removesuffix(MISSED)}")
            lines += [f"| `{result['op']}` | {run['case']} | {_where(result)} | {text} |" for text in found]
    return "\n".join(lines) + "\n"


def device_table(results: list[dict[str, Any]]) -> str:
    """What has run on a CPU, on the emulated device and on a GPU, as Markdown; `results` are the GPU's."""
    # A benchmark of a training step belongs to no op.
    ops = [path.stem for path in sorted((ROOT / "entropy_rl_ext" / "ops").glob("*.py"))]
    ops = [op for op in ops if (ROOT / "benchmarks" / f"bench_{op}.py").exists()]
    lines = ["| part | CPU | emulated CUDA | GPU |", "|---|---|---|---|"]
    for op in ops:
        kernels = f"`{op}`" if op in WITHOUT_BACKWARD else f"`{op}`, forward and backward"
        lines.append(f"| {kernels} | tested | every kernel, in every CI run | {_executed(op, results)} |")
    lines += [f"| {' | '.join(part)} |" for part in OTHER_PARTS]
    return "\n".join(lines) + "\n"


def _executed(op: str, results: list[dict[str, Any]]) -> str:
    """What the benchmark of an op has run on a GPU, and where. Only the tests reach every kernel of an op."""
    backward: dict[tuple[str, str], bool] = {}
    for result in results:
        if result["op"] == op:
            commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["modified"] else "")
            place = (result["device_name"], commit)
            backward[place] = backward.get(place, False) or any(run["backward"] for run in result["runs"])
    if not backward:
        return "compiled, **never executed**"
    return "; ".join(
        f"{_parts(op, ran_backward)}benchmark run on {name} at commit {commit}"
        for (name, commit), ran_backward in sorted(backward.items())
    )


def _parts(op: str, backward: bool) -> str:
    if op in WITHOUT_BACKWARD:
        return ""
    return "forward and backward: " if backward else "forward only: "


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "entropy_rl_ext"  # the same file from the same results
    from matplotlib import pyplot

    return pyplot


def _widest(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The run of each op with the most threads and, among those, the widest instruction set."""
    return {result["op"]: result for result in sorted(results, key=_width)}


def chart(device: str, results: list[dict[str, Any]], path: Path) -> None:
    """Draws one bar for each peer: its time as a multiple of ours, in the widest run of each op."""
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


def filled(text: str, source: str, lines: str) -> str:
    """`text` with `lines` between its two marks; the first mark names the command that produces them."""
    marks = f"<!-- python -m {source} -->\n", "<!-- end -->\n"
    return re.sub(
        f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
        lambda _: f"{marks[0]}{lines}{marks[1]}",
        text,
        flags=re.DOTALL,
    )


def commit_of(result: dict[str, Any]) -> str:
    """Which version of this package a result is of."""
    return f"commit {(result['commit'] or 'unknown')[:10]}{' with changes' if result['modified'] else ''}"


def with_table(path: Path, module: str, lines: str) -> str:
    """The page at `path` with `lines` between the marks that name `module`."""
    return filled(path.read_text(), module, lines)


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the README's chart: seconds of the LM head, forward and backward, of ours and of each unmodified peer."""
    pyplot = _pyplot()
    result = _widest(results)["linear_logprob_entropy"]
    drawn = [case for op, case in HEADLINE.values() if op == "linear_logprob_entropy"]
    runs = [run for run in result["runs"] if run["case"] in drawn]
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


def page(path: Path) -> str:
    """docs/performance.md or the README with the tables of the committed results."""
    cpu, cuda = (load(device) for device in ("cpu", "cuda"))
    tables = {"headline": headline_table(cpu), "shortfalls": shortfall_table(cpu), "devices": device_table(cuda)}
    tables |= {"llm_step": step_table(cpu), "trainers": trainer_table(cpu)}
    text = path.read_text()
    for name, lines in tables.items():
        text = filled(text, f"benchmarks.report: {name}", lines)
    return text


def details() -> str:
    """docs/performance_details.md."""
    parts = [DETAILS_HEAD]
    for device in DEVICES:
        files = load(device)
        if not files:
            parts.append(f"\n## {device.upper()}\n\nNothing has been measured.\n")
            continue
        parts.append(f"\n## {device.upper()}\n\n![Each peer's time against ours](performance-{device}.svg)\n")
        if goals := goal_table(files):
            parts.append(f"\n### Goals\n\n{goals}")
        if device == "cpu" and (scaling := thread_table(files)):
            parts.append(f"\n### Our time by number of threads\n\n{scaling}")
        parts += ["\n" + table(result) for result in files]
    return "".join(parts)


def main() -> None:
    pages = {PAGE: page(PAGE), README: page(README), DETAILS: details()}
    if "--check" in sys.argv[1:]:
        for path, text in pages.items():
            if path.read_text() != text:
                sys.exit(f"{path.relative_to(ROOT)} is not what benchmarks/results gives: run make performance")
        return
    for path, text in pages.items():
        path.write_text(text)
    for device in DEVICES:
        if results := load(device):
            chart(device, results, PAGE.parent / f"performance-{device}.svg")
    picture(load("cpu"), PICTURE)


if __name__ == "__main__":
    main()
