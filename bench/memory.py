"""What a bench measures of its own process, and of others."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def own_mib() -> float:
    """Memory of this process that is no file's."""
    return _mib(os.getpid(), "Anonymous:")


def mib_of(processes: Iterable[int]) -> tuple[float, float]:
    """Resident memory of processes: their sum, and the sum in which what several share is counted once."""
    found = list(processes)
    return sum(_mib(one, "Rss:") for one in found), sum(_mib(one, "Pss:") for one in found)


def cpu_seconds(processes: Iterable[int]) -> float:
    """What processes and those of their children that have ended and were waited for have used."""
    ticks = 0
    for one in processes:
        with suppress(OSError):  # it has ended
            ticks += sum(map(int, _stat(one)[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def below(ancestor: int) -> list[int]:
    """The processes that a process has started, and theirs, and so on."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    found, new = [], [ancestor]
    while new:
        new = [process for process, parent in parents.items() if parent in new]
        found += new
    return found


def command(process: int) -> str:
    """What a process calls itself; nothing where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _mib(process: int, name: str) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _stat(process: int) -> list[str]:
    """Fields of /proc/N/stat from the third on: the second, a name, may hold anything."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
