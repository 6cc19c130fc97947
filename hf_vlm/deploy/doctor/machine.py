"""Processor, memory, disks and caches."""

import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hf_vlm.deploy.doctor.finding import Finding

__all__ = ["check_machine"]

LOW_DISK, FULL_DISK = 10e9, 1e9  # bytes
LOW_MEMORY = 4e9
LOW_SHARED_MEMORY = 1e9
LOW_OPEN_FILES = 1024
CACHE_SECONDS = 0.5  # to measure a folder
CGROUP = Path("/sys/fs/cgroup")
# By name in /proc/cpuinfo: what speeds up products of matrices.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "sve": "SVE",
}


def check_machine() -> Iterator[Finding]:
    """The findings of this machine, where the working folder is that of the runs."""
    yield check_processor(available_cores(), cpu_quota(), cpu_flags(), os.environ.get("OMP_NUM_THREADS"))
    yield check_memory(*total_memory())
    if (shared := Path("/dev/shm")).is_dir():
        yield check_shared_memory(shutil.disk_usage(shared).total)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_disk("runs", Path.cwd())
    yield from check_cache(cache_folder())


def available_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(folder: Path = CGROUP) -> float | None:
    """Number of cores whose time a container may use; None where there is no such limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Names of the processor's features; empty where the system does not list them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, []))


def check_processor(num_cores: int, quota: float | None, flags: frozenset[str], num_threads: str | None) -> Finding:
    """Cores, the time that a container may use of them, and instruction sets."""
    known = ", ".join(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
    text = f"{num_cores} CPU {'core' if num_cores == 1 else 'cores'} ({known or platform.machine()})"
    if quota is not None and quota < num_cores - 0.5 and not num_threads:
        cores = max(1, round(quota))
        text += f", of which this container may use the time of {quota:g}: threads will wait for each other"
        return Finding("warning", text, f"export OMP_NUM_THREADS={cores}")
    if flags and platform.machine() == "x86_64" and "avx2" not in flags:
        return Finding("warning", f"{text} without AVX2: training takes several times as long", "use another machine")
    return Finding("ok", text)


def total_memory(folder: Path = CGROUP) -> tuple[int, int | None]:
    """Bytes of memory of the machine, and the limit of a container; None where there is none."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = (folder / "memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return total, int(limit) if limit.isdigit() and int(limit) < total else None


def check_memory(total: int, limit: int | None) -> Finding:
    """Main memory."""
    text = f"{format_size(total)} of memory"
    if limit is not None:
        text += f", of which this container may use {format_size(limit)}"
    if min(total, limit or total) < LOW_MEMORY:
        return Finding(
            "warning", text, "train with a small --per_device_train_batch_size and --dataloader_num_workers 0"
        )
    return Finding("ok", text)


def check_shared_memory(total: int) -> Finding:
    """The memory through which data workers hand over batches."""
    text = f"{format_size(total)} of shared memory (/dev/shm)"
    if total < LOW_SHARED_MEMORY:
        advice = "start the container with --shm-size 8g or --ipc host, or train with --dataloader_num_workers 0"
        return Finding("warning", f"{text}: data workers may die with a bus error", advice)
    return Finding("ok", text)


def check_open_files(limit: int) -> Finding:
    """The number of files that a process may have open."""
    if limit == resource.RLIM_INFINITY:
        return Finding("ok", "any number of open files")
    if limit < LOW_OPEN_FILES:
        return Finding("warning", f"{limit} open files at most, which many data workers exceed", "ulimit -n 4096")
    return Finding("ok", f"{limit:,} open files at most")


def check_disk(what: str, folder: Path) -> Finding:
    """Free space where something is written; the folder need not exist."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = free_space(there)
    text = f"{format_size(free)} free for {what} in {folder}"
    if not os.access(there, os.W_OK):
        return Finding("wrong", f"{there}, where {what} go, may not be written to", "work in another folder")
    if free < LOW_DISK:
        level: Literal["warning", "wrong"] = "wrong" if free < FULL_DISK else "warning"
        return Finding(level, text, "free space there, or work on another disk")
    return Finding("ok", text)


def free_space(path: Path) -> int:
    """Bytes that may be written to the disk of a path."""
    return shutil.disk_usage(path).free


def cache_folder() -> Path:
    """The folder of the Hub's caches, as huggingface_hub finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser().absolute()


def check_cache(folder: Path) -> Iterator[Finding]:
    """Free space for the caches, and the space that they take."""
    disk = check_disk("downloads", folder)
    yield disk if disk.level != "warning" else Finding("warning", disk.text, "hf cache prune, or set HF_HOME")
    if folder.is_dir():
        size, is_complete = folder_size(folder, time.monotonic() + CACHE_SECONDS)
        yield Finding("ok", f"{'' if is_complete else 'more than '}{format_size(size)} of downloads in {folder}")


def folder_size(folder: Path, deadline: float) -> tuple[int, bool]:
    """Bytes of the files below a folder, and whether all of them were counted before the deadline."""
    size, waiting = 0, [os.fspath(folder)]
    while waiting:
        if time.monotonic() > deadline:
            return size, False
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_size
        except OSError:  # deleted meanwhile, or not ours to read
            continue
    return size, True


def format_size(num_bytes: float) -> str:
    """A number of bytes in decimal units."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
