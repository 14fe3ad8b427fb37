"""Scenes a second on one core, with one thread.

    python tools/bench_scenes.py [number of scenes]

Prints, for each profile and size, the best of three runs: scenes with image and target,
and targets alone, which evaluation needs. The clock counts the seconds that the process
had a core for itself, and starts with filled caches.
"""

import sys
import time
from collections.abc import Callable

import torch

from eql_repro.scenes import Scenes


def rate(work: Callable[[int], object], count: int) -> float:
    """Calls of `work(i)` a second for i from 0, the best of three runs."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for i in range(count):
            work(i)
        seconds.append(time.process_time() - start)
    return count / min(seconds)


def main(count: int) -> None:
    torch.set_num_threads(1)
    print("profile  size  scenes/s  targets/s")
    for profile, size in (("pocket", 128), ("lvis", 128), ("lvis", 256), ("lvis", 512)):
        scenes = Scenes(profile, size=size)
        rates = [rate(work, count) for work in (scenes.__getitem__, scenes.target)]
        print(f"{profile:<8} {size:>4}  {rates[0]:8.0f}  {rates[1]:9.0f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
