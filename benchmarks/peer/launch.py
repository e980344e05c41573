"""Starts open_clip's own training main in several processes on CPU; runs in the peer's environment.

    torchrun --standalone --nproc-per-node 2 -- benchmarks/peer/launch.py <open_clip_train arguments>

open_clip hands ``device_ids=[cpu]`` to DistributedDataParallel, which torch refuses: on CPU that argument has to be
left out. Nothing else is changed; a single process is started as ``python -m open_clip_train.main``.
"""

import runpy

import torch


class CpuDistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that leaves ``device_ids`` out where they name the CPU."""

    def __init__(self, module: torch.nn.Module, device_ids=None, **kwargs) -> None:
        on_cpu = all(torch.device(device).type == "cpu" for device in device_ids or [])
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = CpuDistributedDataParallel
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
