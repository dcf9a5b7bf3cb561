"""The benchmark suite runs, its results become tables, and the pages are what the committed results give."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import entropy_rl_ext

ROOT = Path(__file__).parent.parent
# tests/integrations/trl has those that need TRL.
NEED_TRL = {"trl_step", "llm_step"}
OPS = sorted({path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - NEED_TRL)
OPS_WITH_KERNELS = [op for op in OPS if op != "train_step"]
sys.path.insert(0, str(ROOT))

from benchmarks import gradient_error, harness, head_over_ranks, report, scale, selection_over_ranks  # noqa: E402
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.__main__ import with_kept_runs  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
def test_every_contender_has_samples_or_an_error(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A C++ compiler takes seconds for each function that torch.compile gives it; one op shows that it can.
    if op != "aggregate":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ["--quick", "--device=cpu", "--threads=1", f"--op={op}", f"--json={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    threads = torch.get_num_threads()
    try:
        benchmarks_main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / f"{op}.threads1.json").read_text())
    assert result["threads"] == 1 and result["copy_bytes_per_second"] > 0
    assert result["simd"] == entropy_rl_ext.build_info()["simd"]
    for run in result["runs"]:
        assert len(run["contenders"]["ours"]["seconds"]) == 2
        assert len(run["contenders"]) > 1
        assert all(r.get("error") or len(r["seconds"]) == 2 for r in run["contenders"].values())
    table = report.table(result)
    for run in result["runs"]:
        assert sum(line.startswith(f"| {run['case']} |") for line in table.splitlines()) >= len(run["contenders"])


def test_a_missed_goal_is_reported() -> None:
    run = {"bytes": 100, "contenders": {"ours": {"seconds": [1.0]}, "peer": {"seconds": [9.0]}, "gone": {"error": "x"}}}
    assert report._goal("peer", 10, run, 1.0) == ("at least 10× peer", "9×, **missed**")
    assert report._goal("peer", 9, run, 1.0)[1] == "9×, met"
    assert report._goal("gone", 2, run, 1.0)[1] == "the peer did not run"
    assert report._goal("copy", 0.9, run, 100.0)[1] == "100%, met"


class FakeStream:
    """Stands for torch.cuda's stream in _timed_on_gpu: a sleep of n cycles takes n us, a call costs the host a time.

    `log` has what was queued and what it saw; time is in us.
    """

    def __init__(self, host_time: int) -> None:
        self.log: list[str] = []
        self.host_time, self.now, self.device_free = host_time, 0, 0

    def queue(self, what: str, duration: int) -> int:
        self.log.append(what)
        self.device_free = max(self.device_free, self.now) + duration
        return self.device_free

    def call(self) -> None:
        self.now += self.host_time
        self.queue("call", 7)

    def event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.queue("event", 0)

    def query(self) -> bool:
        return self.stream.now >= self.at

    def synchronize(self) -> None:
        self.stream.now = max(self.stream.now, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.at - self.at) / 1e3


@pytest.mark.parametrize("host_time, attempts", [(0, 1), (99, 1), (106, 2), (500, 3), (10**6, 3)])
def test_the_gpu_sleeps_while_the_host_queues_a_call(
    host_time: int, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the call is between the events, and the host's time counts only where no sleep is long enough."""
    stream = FakeStream(host_time)
    monkeypatch.setattr(harness, "_SLEEP_CYCLES", 100)
    monkeypatch.setattr(harness, "_sweep", lambda device: stream.queue(f"sweep {device}", 5))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.queue(f"sleep {cycles}", cycles))
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    seconds = harness._timed(stream.call, "cuda")
    sleeps = [f"sleep {100 * 4**k}" for k in range(attempts)]
    assert stream.log == [what for sleep in sleeps for what in ("sweep cuda", sleep, "event", "call", "event")]
    hidden = 5 + 100 * 4 ** (attempts - 1) > host_time
    assert seconds == pytest.approx(7e-6) if hidden else seconds > 9e-4


def test_the_sweep_only_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.zeros(1000)
    monkeypatch.setattr(harness, "_sweep_buffer", lambda device: buffer)
    version = buffer._version
    harness._sweep("cpu")
    assert buffer._version == version


def test_a_copy_is_measured_by_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.1, *[2.0] * 5, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(harness, "_timed", lambda call, device: next(seconds))
    assert harness.measure_copy("cpu", size=512) == pytest.approx(2 * 512 / 2.0)


def test_memory_that_the_op_keeps_does_not_count_in_later_calls() -> None:
    """The op keeps the pages of a dropped gradient; a call that does not use them does not count them."""
    logits = torch.randn(128, 151936)
    targets = torch.zeros(128, dtype=torch.int64)

    def step(rows: int) -> Any:
        leaf = logits.detach().requires_grad_()
        grad = torch.zeros(128).index_fill_(0, torch.arange(rows), 1.0)
        return torch.autograd.grad(entropy_rl_ext.logprob_entropy(leaf, targets)[0], leaf, grad)

    step(128)
    size = logits.nbytes
    for rows, expected in ((26, 26 / 128 * size), (128, size), (26, 26 / 128 * size)):
        assert harness._peak_bytes(partial(step, rows), "cpu") == pytest.approx(expected, rel=0.1)


def made_result(seconds: float, **head: object) -> dict[str, Any]:
    """One case, whose peer takes 12 s."""
    contenders = {"ours": {"seconds": [seconds]}, "peer": {"seconds": [12.0]}}
    run = {"case": "work", "backward": False, "bytes": 1, "goals": {"peer": 5}, "contenders": contenders}
    head = {"op": "token_entropy", "device_name": "a GPU", "commit": "c" * 40, "modified": False, "simd": None} | head
    return {"threads": None, "copy_bytes_per_second": 1.0, "runs": [run], **head}


def test_goals_have_a_column_for_each_instruction_set() -> None:
    results = [made_result(2.0, threads=2, simd="avx512"), made_result(3.0, threads=2, simd="avx2")]
    assert report.goal_table(results).splitlines() == [
        "| op | work | goal | 2 threads, AVX-512 | 2 threads, AVX2 |",
        "|---|---|---|---|---|",
        "| token_entropy | work | at least 5× peer | 6×, met | 4×, **missed** |",
    ]


def test_threads_are_compared_on_the_widest_instruction_set_that_ran_with_each_number() -> None:
    results = [made_result(3.0, threads=1, simd="avx2"), made_result(2.0, threads=2, simd="avx2")]
    header = "| op | work | instruction set | 1 thread | 2 threads | speed-up |"
    in_avx2 = "| token_entropy | work | AVX2 | 3 s | 2 s | 1.50 |"
    assert report.thread_table(results).splitlines()[::2] == [header, in_avx2]
    incomplete = made_result(1.0, threads=2, simd="avx512")
    assert report.thread_table([*results, incomplete]).splitlines()[2:] == [in_avx2]
    complete = [*results, incomplete, made_result(1.5, threads=1, simd="avx512")]
    assert report.thread_table(complete).splitlines()[2:] == ["| token_entropy | work | AVX-512 | 1.5 s | 1 s | 1.50 |"]
    assert report.thread_table(results[1:]) == ""


def test_headings_name_the_instruction_set() -> None:
    head = {"versions": {"torch": "2"}, "date": "today"}
    for simd, name in report.SIMD.items():
        table = report.table(made_result(1.0, threads=2, simd=simd, **head))
        assert table.startswith(f"### token_entropy, 2 threads, {name}\n")
    assert report.table(made_result(1.0, threads=1, **head)).startswith("### token_entropy, 1 thread\n")


def test_the_headline_has_the_widest_run_and_a_slower_op_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "HEADLINE", {"work of the op": ("token_entropy", "work")})
    monkeypatch.setattr(report, "HEADLINE_PEERS", {"fastest": ("peer", "other"), "slow": ("slow",), "none": ("gone",)})
    versions = {"versions": dict.fromkeys(("torch", "verl", "trl", "liger-kernel"), "1")}
    results = [made_result(seconds, threads=2, simd=simd, **versions) for simd, seconds in (("avx512", 2), ("avx2", 3))]
    contenders = results[0]["runs"][0]["contenders"]
    contenders |= {"other": {"seconds": [1.5]}, "slow": {"seconds": [40.0]}, "gone": {"error": "x"}}
    assert report.headline_table(results).splitlines() == [
        "| | ours | fastest | slow | none |",
        "|---|---|---|---|---|",
        "| work of the op | 2 s | **0.75×** | 20× |  |",
        "",
        "a GPU, 2 threads; torch 1, verl 1, trl 1, liger-kernel 1.",
    ]


def test_the_share_of_the_lm_head_is_that_of_the_whole_step() -> None:
    times = {"ours": 10.0, "TRL, all tokens": 16.0, report.WITHOUT_HEAD: 8.0}
    versions = {"versions": dict.fromkeys(("torch", "verl", "trl", "liger-kernel"), "1")}
    result = made_result(1.0, threads=2, **versions) | {"op": "llm_step"}
    result["runs"][0]["contenders"] = {name: {"seconds": [seconds]} for name, seconds in times.items()}
    lines = report.step_table([result]).splitlines()
    assert lines[2:5] == [f"| {name} | {seconds:g} s |  |  |" for name, seconds in times.items()]
    assert "The LM head's share of the step: 50 % of TRL on all tokens, 20 % of ours." in lines
    assert report.step_table([]) == report.trainer_table([]) == "Nothing has been measured.\n"
    assert report.trainer_table([result]).splitlines()[2:] == [
        "| TRL 1.16, all tokens | 16 s |  |",
        "| this package's trainer | 10 s |  |",
    ]


def test_every_run_that_a_peer_wins_or_that_misses_its_goal_is_listed() -> None:
    won, lost = made_result(2.0, threads=2, simd="avx2"), made_result(24.0, threads=1, simd="avx2")
    lost["runs"][0]["contenders"] |= {"amax": {"seconds": [1.0]}, "ours, otherwise": {"seconds": [1.0]}}
    assert report.shortfall_table([won, lost]).splitlines()[2:] == [
        "| `token_entropy` | work | 1 thread, AVX2 | peer takes 0.50× our time |",
        "| `token_entropy` | work | 1 thread, AVX2 | goal: at least 5× peer; measured: 0.5× |",
    ]


def test_what_ran_on_a_gpu_is_listed_and_no_more() -> None:
    result = made_result(1.0)
    assert report._executed("token_entropy", [result]) == "forward only: benchmark run on a GPU at commit cccccccccc"
    assert "never executed" in report._executed("logprob_entropy", [result])
    result["runs"][0]["backward"] = True
    assert report._executed("token_entropy", [result]).startswith("forward and backward: ")
    rows = report.device_table([result]).splitlines()[2:]
    assert [row for row in rows if "benchmark run on a GPU" in row] == [rows[OPS_WITH_KERNELS.index("token_entropy")]]
    assert all(f"| `{op}`" in row for op, row in zip(OPS_WITH_KERNELS, rows, strict=False))


def test_a_run_of_some_cases_keeps_the_others_of_the_same_commit(tmp_path: Path) -> None:
    path = tmp_path / "token_entropy.json"
    old, new = made_result(1.0), made_result(2.0)
    old["runs"] = [{"case": "first"}, {"case": "work"}]
    path.write_text(json.dumps(old))
    assert [run["case"] for run in with_kept_runs(new, path, ["first", "work"])] == ["first", "work"]
    assert with_kept_runs(new, path, ["first", "work"])[1] == new["runs"][0]
    path.write_text(json.dumps(old | {"commit": "d" * 40}))
    assert with_kept_runs(new, path, ["first", "work"]) == new["runs"]


def test_pages_are_what_the_results_give() -> None:
    for path in (report.PAGE, report.README):
        assert path.read_text() == report.page(path), "run make performance"
    assert report.DETAILS.read_text() == report.details(), "run make performance"
    for table in ("headline", "shortfalls", "devices"):
        assert f"<!-- python -m benchmarks.report: {table} -->\n| " in report.PAGE.read_text()


@pytest.mark.filterwarnings("error:constrained_layout not applied")  # panels without room
def test_charts_are_what_the_results_give(tmp_path: Path) -> None:
    """Byte by byte: the same results give the same file."""
    report.picture(report.load("cpu"), tmp_path / report.PICTURE.name)
    assert (tmp_path / report.PICTURE.name).read_bytes() == report.PICTURE.read_bytes(), "run make performance"
    for device in report.DEVICES:
        path = report.PAGE.with_name(f"performance-{device}.svg")
        assert path.exists() == bool(report.load(device))
        if path.exists():
            report.chart(device, report.load(device), tmp_path / path.name)
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run make performance"


# ---- Over ranks


def test_selection_over_ranks_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.selection_over_ranks", "--quick"]
    path = tmp_path / "selection.json"
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True)
    result = json.loads(path.read_text())
    [run] = result["runs"]
    assert run["ranks"] == 2
    ours, alone = (run["contenders"][name] for name in ("ours, topk", "each rank alone"))
    assert len(ours["seconds"]) == len(ours["wire_bytes"]) == len(alone["wire_bytes"]) == 2
    # Each rank sends its two responses of 2,048 tokens or more to the other. Other programs may use the loopback
    # interface meanwhile.
    assert min(ours["wire_bytes"]) >= 2 * 4 * 4096
    assert "| 2 | 8,192 | ours, topk |" in selection_over_ranks.table(result)


def test_counted_bytes_are_those_of_the_simulation() -> None:
    """With 2 to 16 processes: the collectives and payloads of the plan, and on the wire the bytes of its rings."""
    result = json.loads(selection_over_ranks.COUNTS.read_text())
    assert selection_over_ranks.SCALE.read_text() == selection_over_ranks.page_of_counts(result)
    assert [run["ranks"] for run in result["runs"][::2]] == [2, 4, 8, 16]
    for few, many in zip(result["runs"][::2], result["runs"][1::2], strict=True):
        ranks = few["ranks"]
        count = ["all_gather_single", 8]  # of the tokens
        begun = {name: record["collectives"] for name, record in many["contenders"].items()}
        sizes = scale.payloads(ranks)
        assert begun["ours, topk"] == [count, *(["all_reduce", size] for size in sizes)]
        assert begun["ours, quantile"] == [count, *(["all_reduce", size] for size in [*sizes[:3], 4])]
        tokens = many["tokens"]
        assert begun["gather, then global_top_mask"] == [["all_gather_into_tensor", size * tokens] for size in (4, 1)]
        for name in ("ours, topk", "ours, quantile"):
            [(name, payload)] = few["contenders"][name]["collectives"]
            assert name == "all_gather_single" and payload == 8 + (4 + 1) * few["tokens"]
        for record in (record for run in (few, many) for record in run["contenders"].values()):
            rings = selection_over_ranks.sent_by_rings(record["collectives"], ranks)
            for sent in record["wire_bytes"]:
                messages, others = divmod(sent - rings, selection_over_ranks.HEADER)
                # Nothing else is sent. Each step of a ring is one message or more of every rank.
                assert others == 0 and messages >= ranks * (ranks - 1) * len(record["collectives"])


def test_the_plan_for_1024_ranks_is_simulated() -> None:
    page = " ".join(selection_over_ranks.SCALE.read_text().split())
    for name, figure in scale.figures().items():
        assert figure in page, f"{name}: {figure}"


def test_simulated_rings_and_trees() -> None:
    """By hand, for three ranks of which the last is on another machine, and for two machines of two ranks."""
    hops = torch.tensor([1.0, 10.0, 10.0], dtype=torch.float64)
    gather = scale.ring_all_gather(7, hops)
    assert gather.microseconds == 20 and gather.bytes.tolist() == [14, 14, 14]
    # Parts of 44, 44 and 40 bytes. The slowest goes from the second rank to the third, on to the first and around.
    reduce = scale.ring_all_reduce(128, hops)
    assert reduce.microseconds == 10 + 10 + 1 + 10
    assert reduce.bytes.tolist() == [44 + 40 + 44 + 44, 44 + 44 + 40 + 44, 40 + 44 + 44 + 40]
    tree = scale.tree_all_reduce(8, 2, 2, scale.Protocol(0, 1, 10, 1))
    assert tree.microseconds == 2 * (1 + 10) and tree.bytes.tolist() == [16, 8, 16, 8]


@pytest.mark.parametrize("module", [selection_over_ranks, head_over_ranks, gradient_error])
def test_docs_have_the_measured_table(module: ModuleType) -> None:
    result = json.loads(module.RESULT.read_text())
    page = module.PAGE.read_text()
    assert module.page(result) == page, f"run python -m {module.__name__}"
    assert module.table(result) in page


def test_a_compiled_peer_whose_result_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(4)
    for wrong in (torch.nan, 1.5):
        monkeypatch.setattr(torch, "compile", lambda function, wrong=wrong, **_: lambda x: function(x) * wrong)
        with pytest.raises(ValueError, match="another result than the function"):
            harness.compiled(lambda x: 2 * x)(ones)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert torch.equal(harness.compiled(lambda x: 2 * x)(ones), 2 * ones)
    assert torch.equal(harness.compiled(lambda x: 0 * x)(ones), 0 * ones)
