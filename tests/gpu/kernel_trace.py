"""Which kernels a library launches, and how long they take: torch's profiler sees all of a process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.gpu.bench import Bench

_MOST = 24
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def tell_kernels(bench: Bench, name: str, run: Callable[[], None], rounds: int) -> None:
    """A fact with the kernels of a run: how many, their time, launches from the host, and the kernels by their time."""
    if bench.where != "cuda":
        bench.book.skip(name, "only a GPU has kernels to trace", expected=True)
        return
    bench.against(name, lambda: bench.book.fact(name, summary(_events(bench.torch, run, rounds), rounds)))


def _events(torch: Any, run: Callable[[], None], rounds: int) -> list[tuple[str, float, bool]]:
    """Name, microseconds, and whether it ran on the device."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [
        (event.name, float(event.time_range.elapsed_us()), event.device_type == on_device) for event in profile.events()
    ]


def summary(events: list[tuple[str, float, bool]], rounds: int) -> str:
    """For one of `rounds` equal runs."""
    count, launches, time = Counter[str](), Counter[str](), dict[str, float]()
    for name, microseconds, on_device in events:
        if on_device:
            count[name] += 1
            time[name] = time.get(name, 0.0) + microseconds
        elif name in _LAUNCHES:
            launches[name] += 1
    slowest = sorted(time, key=lambda name: -time[name])[:_MOST]
    kernels = "; ".join(f"{count[name] / rounds:g} × {name[:90]} {time[name] / rounds:.1f} µs" for name in slowest)
    called = ", ".join(f"{number / rounds:g} {name}" for name, number in launches.most_common()) or "none"
    whole = sum(time.values()) / rounds
    return f"{sum(count.values()) / rounds:g} on the device in {whole:.0f} µs; launches: {called}; {kernels}"
