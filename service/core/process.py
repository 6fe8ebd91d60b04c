"""What a process can know and arrange about its parent, its host and other processes. Also a launcher, see `launch`."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

COMPUTE_ENVIRONMENT = {
    # glibc gives large blocks back to the kernel at once and asks for them again at the next step; a batch of images
    # then spends a third of its time on page faults. These keep them.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
    # How long threads that wait for each other spin before they sleep: some 0.2 ms. Sleeping at once makes training
    # with small batches 1.4 times as slow; the default, some 3 ms, takes the cores of a busy machine away from those
    # that are waited for, and makes it twice as slow there.
    "GOMP_SPINCOUNT": "20000",
}
"""For processes that compute; read when a process starts, never later."""


def usable_cores() -> int:
    """Processors that this process may use: of the machine's, those it is bound to, and no more than its quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = _CPU_QUOTA.read_text().split()
        found = min(found, math.ceil(int(quota) / int(period)))
    return max(1, found)


def compute_environment(threads: int) -> dict[str, str]:
    """For processes that compute on the CPU, with so many threads; 0: one a usable core."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**COMPUTE_ENVIRONMENT, **dict.fromkeys(names, str(threads or usable_cores()))}


def die_with_parent(parent_pid: int) -> None:
    """Arranges that the kernel kills this process when the parent's thread that started it ends, however it ends.

    Without this a killed parent leaves its child running, and a second copy of the work starts beside it. Linux only;
    elsewhere it does nothing. Children do not inherit it: pools call it again.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def launch(command: Sequence[str]) -> list[str]:
    """`command`, wrapped so that it dies with this process; the pid stays that of the command."""
    # This file by its path, isolated: it needs neither our packages nor the folder it lies in on the import path.
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def restart_with(module: str, wanted: dict[str, str]) -> None:
    """Starts `python -m module` anew in this process's place if variables of `wanted` are not set; else returns."""
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **missing})


def settle() -> None:
    """For a process that has started and now answers requests: what is there is there for good.

    The cycle collector no longer looks at it. Looking through all objects of all libraries took 0.2 to 0.35 s, again
    and again, in which nothing was answered. It also looks less often at what is new, nearly all of which is alive
    when it looks and soon gone without its help.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@cache
def host_id() -> str:
    """This machine since its last boot and this process namespace: within one, a pid names a process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()}/?"
    return f"{socket.gethostname()}/{boot}/{namespace}"


@cache
def memory_bytes() -> int | None:
    """Memory that processes here may use: the machine's, or less where their control group has less; None: unknown."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def is_dead(host: str, pid: int) -> bool:
    """Whether process `pid` of `host` has certainly ended; False when this cannot be told from here."""
    if host.endswith("/?") or host != host_id():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:  # a zombie still has its pid
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state in "ZX"


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
