"""What every benchmark shares: cases, and timing ours and its peers in turns within one process.

A case builds callables by name for a device; `measure` times them. Nothing here knows an op, and of the device only
`clock_of`, `peak_bytes` and `bandwidth` do.
"""

import ctypes
import os
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Callable, Dict, List, Optional

CORES = os.sched_getaffinity(0)
os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread stays on its core; read when torch loads OpenMP

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Call = Callable[[], object]

OURS, EAGER, COMPILE = "ours", "eager", "torch.compile"
HUGE_EAGER = "eager, huge pages"  # in a process of its own, which Case.huge_pages asks for
COPY, READ = "copy", "read"  # of as many bytes as the input has
FRESH_COPY = "copy into fresh huge pages"

MIN_ROUNDS, MAX_ROUNDS = 7, 200


@dataclass
class Case:
    """Something to time. `build`, which can be pickled, makes the data and returns ours and each peer by name."""

    name: str
    build: Callable[[torch.device], Dict[str, Call]]
    group: str = "goals"
    x: float = 0  # where it stands in a plot of its group
    goals: Dict[str, float] = field(default_factory=dict)  # how many times faster than a peer ours is to be, at least
    input_bytes: int = 0
    moved: float = 0  # what must move at least, in input_bytes; 0 where it is too little for bandwidth to matter
    floor: str = COPY  # whose bandwidth that is compared with
    most_memory: Optional[float] = None  # beyond what was held before, in input_bytes
    huge_pages: bool = False  # whether HUGE_EAGER is a peer


@dataclass
class Result:
    case: Case
    seconds: Dict[str, List[float]]  # of each round, by name
    peak: Dict[str, Optional[float]]  # extra memory, in input_bytes

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """How many times faster ours is: the median of the rounds' ratios."""
        return statistics.median(t / o for t, o in zip(self.seconds[name], self.seconds[OURS], strict=True))

    def peers(self) -> List[str]:
        return [name for name in self.seconds if name not in (OURS, COPY, READ)]

    def bandwidth(self) -> Optional[float]:
        """The share of the bandwidth of a copy, or of a read, in the same run."""
        if self.case.floor not in self.seconds:
            return None
        return self.case.moved / (2 if self.case.floor == COPY else 1) * self.ratio(self.case.floor)


def clock_of(device: torch.device) -> Callable[[Call, int], float]:
    """Seconds for each of `repeat` calls."""

    def cpu(call: Call, repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat

    def cuda(call: Call, repeat: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat

    return cuda if device.type == "cuda" else cpu


def peak_bytes(call: Call, device: torch.device) -> Optional[int]:
    """The most memory that a call holds beyond what was held before; on the CPU pages, whoever allocated them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak becomes what there is
        before = _status("VmHWM")
        call()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def fresh_copy(source: Tensor) -> Tensor:
    """Copies into new memory on huge pages: the least that any new result of this size costs."""
    fresh = torch.empty_like(source)
    page, begin = 2 << 20, fresh.data_ptr()
    first, last = -(-begin // page) * page, (begin + fresh.nbytes) // page * page
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 14)  # MADV_HUGEPAGE
    return fresh.copy_(source)


def bandwidth(input_bytes: int, device: torch.device) -> Dict[str, Call]:
    """A copy and a read of as many bytes, in memory that is not new."""
    source = torch.randn(input_bytes // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    return {COPY: lambda: target.copy_(source), READ: source.sum}


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for exactly the shapes it is called with."""
    return torch.compile(function, dynamic=False)


class _Process:
    """A peer of a case in a process of its own, with other variables in its environment."""

    def __init__(self, case: Case, name: str, threads: int, **environment: str) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, name, threads), daemon=True)
        pinned = os.sched_getaffinity(0)
        os.sched_setaffinity(0, CORES)  # it inherits this thread's core otherwise
        os.environ.update(environment)  # which torch reads once
        self._process.start()
        for variable in environment:
            del os.environ[variable]
        os.sched_setaffinity(0, pinned)
        self.peak: Optional[int] = self._pipe.recv()

    def __call__(self, repeat: int) -> float:
        time.sleep(0.03)  # OpenMP's threads stay busy for a while after their work, here and there
        self._pipe.send(repeat)
        seconds = self._pipe.recv()
        time.sleep(0.03)
        return seconds

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, case: Case, name: str, threads: int) -> None:
    start(threads)
    device = torch.device("cpu")
    call, clock = case.build(device)[name], clock_of(device)
    # The first call: memory that an allocator keeps between calls counts too.
    pipe.send(peak_bytes(call, device))
    clock(call, 1)
    while True:
        pipe.send(clock(call, pipe.recv()))


def peak_of(case: Case, name: str, call: Call, device: torch.device, threads: int) -> Optional[float]:
    """The peak of the memory of a call, in the input's bytes."""
    if device.type == "cpu":
        process = _Process(case, name, threads)
        process.close()
        peak = process.peak
    else:
        peak = peak_bytes(call, device)
    return None if peak is None else peak / case.input_bytes


def start(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def measure(case: Case, device: torch.device, seconds: float, threads: int) -> Result:
    """Times everything of a case in turns, for about `seconds` in all; a short call is repeated within its turn."""
    calls = case.build(device)
    if case.moved:
        calls |= bandwidth(case.input_bytes, device)
    clock = clock_of(device)
    timers = {name: partial(clock, call) for name, call in calls.items()}
    for warm_up in timers.values():
        warm_up(2)
    peak: Dict[str, Optional[float]] = {}
    if case.most_memory is not None:
        names = [name for name in calls if name in (OURS, EAGER)]
        peak = {name: peak_of(case, name, calls[name], device, threads) for name in names}
    slowest = max(timer(1) for timer in timers.values())
    repeat = max(1, int(2e-3 / slowest))
    huge_pages = case.huge_pages and device.type == "cpu"
    child = _Process(case, EAGER, threads, THP_MEM_ALLOC_ENABLE="1") if huge_pages else None
    if child is not None:
        timers[HUGE_EAGER] = child
    names = list(timers)
    taken: Dict[str, List[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(taken[OURS]) < MIN_ROUNDS or (time.perf_counter() < end and len(taken[OURS]) < MAX_ROUNDS):
        for name in names:
            taken[name].append(timers[name](repeat))
        names.append(names.pop(0))  # nobody always comes after the same one
    if child is not None:
        child.close()
    return Result(case, taken, peak)
