"""Scores answers: by math-verify, by a task of reasoning-gym or by a reward function of the user's.

A model's answer can be any text, so scoring it can raise, run for hours or end the process. `Scorer` therefore scores
answers in processes of their own, several at a time and each answer under a time limit.
"""

import contextlib
import faulthandler
import functools
import logging
import math
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from entropy_rl.errors import UserError, one_line
from entropy_rl.functions import import_function, what_it_raised

if TYPE_CHECKING:
    from entropy_rl.tasks import Problem

# (data_source, solution_str, ground_truth, extra_info) -> reward: the signature of verl's reward functions.
RewardFunction = Callable[[str, str, Any, dict[str, Any]], float]


class RewardError(Exception):
    """A reward function is wrong, and not an answer: the run must stop."""


class Source(Protocol):
    """Where rewards come from. It is sent to the processes that score, which load it."""

    @property
    def name(self) -> str:
        """The key that sets it, as errors name it."""

    def load(self) -> RewardFunction: ...


class Score(NamedTuple):
    """The reward of an answer. It is 0 where `fault` says that scoring the answer failed or took too long."""

    reward: float
    fault: Literal["error", "timeout"] | None = None


# ---- math-verify

_SCIENTIFIC = re.compile(r"(?<![\w.])([+-]?(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3})(?![\w.]*\w)")
_MATH_WORDS = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|exp|sqrt|and|inf|infty|mod|max|min"
# A number with what surrounds it in plain text: a currency, a percent or degree sign, a unit in words.
_PLAIN_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*\\?[$€£¥]?\s*(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)\s*"
    rf"(?P<percent>%)?(?:°|(?:\s+(?!(?:{_MATH_WORDS})\b)[A-Za-z]{{3,}})*)"
)


@dataclass(frozen=True)
class MathVerify:
    """1.0 if math-verify finds in the answer what equals the ground truth, a number or an expression; otherwise 0.0."""

    @property
    def name(self) -> str:
        return "math-verify"

    def load(self) -> RewardFunction:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        # The processes that score have a time limit of their own.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        read = functools.partial(parse, parsing_timeout=None)
        expression, latex = ExprExtractionConfig(), LatexExtractionConfig()

        @functools.lru_cache(maxsize=4096)
        def read_truth(truth: str) -> tuple[list[Any], int]:
            """What may equal an answer, and the decimals to which numbers are compared."""
            text = truth_text(truth)
            readings = read(f"\\boxed{{{text}}}", [latex])
            plain = _PLAIN_NUMBER.fullmatch(text.replace("\\%", "%"))
            if plain is None:
                return readings, 6
            number = plain["sign"].replace("+", "") + plain["number"].rstrip(".")
            value = abs(float(number.replace(",", "")))
            decimals = 6 if value == 0 or value >= 1e-4 else 3 - math.floor(math.log10(value))
            # LaTeX would multiply the letters of a unit; what math-verify compares as text stays.
            texts = {text.replace("\\%", "%"), text.replace("\\%", "%").replace("%", "\\%")}
            texts |= {reading for reading in readings if isinstance(reading, str)}
            return read(number + ("%" if plain["percent"] else ""), [expression]) + sorted(texts), decimals

        def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
            truth, decimals = read_truth(str(ground_truth))
            answer = read(_decimal_notation(solution_str), [expression, latex])
            if not truth or not answer:
                return 0.0
            return float(verify(truth, answer, float_rounding=decimals, timeout_seconds=None))

        return score


def truth_text(truth: Any) -> str:
    """A ground truth as the text that is read, without the marks around it that have no meaning."""
    text = _decimal_notation(str(truth).strip())
    return text.removeprefix("=").rstrip(".,;: ").strip()


def refused_truth(truth: Any) -> str | None:
    """Why no answer could ever equal a ground truth, or None if one could."""
    if isinstance(truth, bool) or not isinstance(truth, str | int | float | Decimal):
        return f"it is a {type(truth).__name__}; a text or a number was expected"
    if not isinstance(truth, str) and not math.isfinite(truth):
        return f"it is {truth}; a finite number was expected"
    if truth_text(truth).strip("$ .,;:").lower() in ("", "nan"):
        return f"it is {str(truth)!r}; a number or an expression was expected"
    return None


def _decimal_notation(text: str) -> str:
    """1e-05 as 0.00001: to math-verify an e is Euler's number."""
    return _SCIENTIFIC.sub(lambda found: f"{Decimal(found[1]):f}", text)


# ---- reasoning-gym


@dataclass(frozen=True)
class ReasoningGym:
    """The score of a task. Without a system prompt nothing asks for <answer> tags, and the bare answer counts too."""

    task: str
    size: int
    seed: int
    config: dict[str, Any]
    asks_for_tags: bool

    @property
    def name(self) -> str:
        return f"data.reasoning_gym.name={self.task}"

    def dataset(self) -> Any:
        import reasoning_gym

        # reasoning-gym's tasks log through the root logger when they are imported.
        logging.getLogger("reasoning_gym").setLevel(logging.WARNING)
        return reasoning_gym.create_dataset(self.task, size=self.size, seed=self.seed, **self.config)

    def load(self) -> RewardFunction:
        dataset = self.dataset()

        def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
            answer = extract_answer(solution_str)
            if answer is None and not self.asks_for_tags:
                answer = solution_str.strip()
            reward = float(dataset.score_answer(answer, extra_info["entry"]))
            if not math.isfinite(reward):
                raise ValueError(f"the score is {reward}")
            return reward

        return score


def extract_answer(text: str) -> str | None:
    """The text in the last pair of <answer> tags, as reasoning-gym finds it, but in linear time."""
    answer, position = None, 0
    while True:
        begin = text.find("<answer>", position)
        end = text.find("</answer>", begin)
        if begin < 0 or end < 0:
            return answer
        answer, position = text[begin + len("<answer>") : end].strip(), end + len("</answer>")


# ---- The user's function


@dataclass(frozen=True)
class CustomFunction:
    """A function in a Python file, called as verl calls it. It returns a number, or a dictionary with `score`."""

    path: str
    function: str

    @property
    def name(self) -> str:
        return f"reward.custom_reward_function.name={self.function}"

    def load(self) -> RewardFunction:
        """Raises UserError if there is no such function."""
        key = "reward.custom_reward_function"
        names = {"path_key": f"{key}.path={self.path}", "name_key": self.name}
        function = import_function(self.path, self.function, "entropy_rl_custom_reward", **names)

        def score(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
            try:
                result = function(
                    data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info
                )
            except Exception as error:
                raise RewardError(what_it_raised(error)) from None
            return _number_of(result)

        return score


def _number_of(result: Any) -> float:
    """The reward in what a user's function returned. Raises RewardError if there is none."""
    expected = "a finite number, or a dictionary with one as `score`, was expected"
    if isinstance(result, dict) and "score" not in result:
        raise RewardError(f"it returned a dictionary without `score`; {expected}")
    value = result["score"] if isinstance(result, dict) else result
    try:
        number = float(value) if hasattr(value, "__float__") else None
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        raise RewardError(f"it returned {'None' if value is None else 'a ' + type(value).__name__}; {expected}")
    if not math.isfinite(number):
        raise RewardError(f"it returned {number}; {expected}")
    return number


# ---- Scoring in other processes

Request = tuple[str, str, Any, dict[str, Any]]  # the arguments of a RewardFunction
Reply = tuple[Literal["score", "error", "timeout", "stop"], Any]  # with the reward or what went wrong

_CHUNK = 16  # answers that a process gets at a time


class Scorer:
    """Scores the answers to problems.

    Args:
        source: where the rewards come from.
        processes: how many processes score; 0: this one does, without a time limit.
        time_limit: seconds for an answer; None: no limit.
    """

    def __init__(self, source: Source, processes: int = 0, time_limit: float | None = None) -> None:
        self.source = source
        self._time_limit = time_limit
        self._function = source.load() if processes == 0 else None
        self._has_warned = False
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        workers = [_Worker(source, time_limit) for _ in range(processes)]
        for worker in workers:
            self._workers.put(worker)
        self._threads = ThreadPoolExecutor(max(1, processes), thread_name_prefix="scorer")
        self._finalizer = weakref.finalize(self, _close_all, workers, self._threads)

    def __call__(self, problems: "Sequence[Problem]", answers: Sequence[str]) -> list[Score]:
        """The score of each answer to the problem in its place.

        Raises:
            UserError: the user's reward function raises, or returns something other than a finite number.
        """
        requests = [
            (problem.data_source, answer, problem.ground_truth, problem.extra_info)
            for problem, answer in zip(problems, answers, strict=True)
        ]
        if self._function is not None:
            replies = [_reply(self._function, request) for request in requests]
        else:
            chunks = [requests[begin : begin + _CHUNK] for begin in range(0, len(requests), _CHUNK)]
            try:
                replies = [reply for chunk in self._threads.map(self._score_chunk, chunks) for reply in chunk]
            except BaseException:  # after Ctrl-C no thread may wait for an answer that takes long
                self.close()
                raise
        scores = []
        for problem, (kind, value) in zip(problems, replies, strict=True):
            where = f"{problem.where or 'a problem'}, data source {problem.data_source}"
            if kind == "stop":
                raise UserError(f"{self.source.name}: {value}; this was for {where}")
            if kind == "timeout" and not self._has_warned:
                self._has_warned = True
                print(
                    f"reward.timeout={self._time_limit:g}: an answer took longer to score and gets 0 ({where}); "
                    "reward/timeout_ratio counts such answers",
                    file=sys.stderr,
                )
            scores.append(Score(value) if kind == "score" else Score(0.0, kind))
        return scores

    def close(self) -> None:
        """Ends the processes."""
        self._finalizer()

    def _score_chunk(self, requests: list[Request]) -> list[Reply]:
        worker = self._workers.get()
        try:
            return worker.score(requests)
        finally:
            self._workers.put(worker)


class _Worker:
    """A process that scores. It starts when it is needed, and again after an answer has ended it."""

    def __init__(self, source: Source, time_limit: float | None) -> None:
        self._source, self._time_limit = source, time_limit
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[bytes]
        self._replies: IO[bytes]
        self._timeouts: IO[bytes]  # has content after the time limit has ended the process

    def score(self, requests: list[Request]) -> list[Reply]:
        replies: list[Reply] = []
        while len(replies) < len(requests):
            if self._process is None:
                self._start()
            try:
                _send(self._requests, requests[len(replies) :])
                while len(replies) < len(requests):
                    replies.append(pickle.load(self._replies))
            except (EOFError, OSError, pickle.UnpicklingError):
                status = self._stop()
                if os.fstat(self._timeouts.fileno()).st_size:
                    replies.append(("timeout", None))
                else:
                    kind: Literal["stop", "error"] = "stop" if isinstance(self._source, CustomFunction) else "error"
                    replies.append((kind, f"the process that scores an answer ended with status {status}"))
        return replies

    def _start(self) -> None:
        if self._is_closed:
            raise RuntimeError("the scorer is closed")
        self._timeouts = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from entropy_rl.rewards import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._timeouts.fileno()],
            # The process can import what this one can.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        self._requests, self._replies = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        if self._is_closed:  # by another thread, which could not see the process yet
            self.close()
            raise RuntimeError("the scorer is closed")
        try:
            _send(self._requests, (self._source, self._time_limit, self._timeouts.fileno()))
            failure = pickle.load(self._replies)
        except (EOFError, OSError, pickle.UnpicklingError):
            failure = f"a process that scores answers ended with status {self._stop()} when it started"
        if failure is not None:
            self._stop()
            raise UserError(f"{self._source.name}: {failure}")

    def _stop(self) -> int:
        """Ends the process, unless it has ended, and returns its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._replies.close()
        with contextlib.suppress(OSError):  # closing writes what is left in the buffer
            self._requests.close()
        try:
            # Its output has ended, so the process is ending too.
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def close(self) -> None:
        """Ends the process, also while a thread waits for its reply."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
            process.wait()


def _close_all(workers: list[_Worker], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.close()


def serve() -> None:
    """The program of a process that scores: reads requests from stdin and writes replies to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which closes stdin
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # A reward function may read and print.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    source, time_limit, timeouts = pickle.load(requests)
    try:
        function = source.load()
    except Exception as error:
        _send(replies, one_line(error))
        return
    _send(replies, None)
    while True:
        try:
            chunk = pickle.load(requests)
        except EOFError:
            return
        for request in chunk:
            # A thread of faulthandler's ends the process: neither Python code nor the interpreter lock can delay it.
            if time_limit is not None:
                faulthandler.dump_traceback_later(time_limit, exit=True, file=timeouts)
            reply = _reply(function, request)
            faulthandler.cancel_dump_traceback_later()
            _send(replies, reply)


def _reply(function: RewardFunction, request: Request) -> Reply:
    try:
        return "score", function(*request)
    except RewardError as error:
        return "stop", one_line(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        return "error", f"{type(error).__name__}: {one_line(error)}"


def _send(file: Any, message: Any) -> None:
    file.write(pickle.dumps(message))
    file.flush()
