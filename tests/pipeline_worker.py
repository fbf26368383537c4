"""One of several processes of a pipeline: runs its stage, and the last one writes what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nets import build
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline

import rmfx
from rmfx.deploy.stages import split

MICROBATCHES = 4


def network() -> tuple[nn.Module, fx.GraphModule, Tensor]:
    """The residual network, its plain form and a batch, in float64; the same in every process."""
    torch.manual_seed(0)
    model, x = build("basic_chain")
    return model, rmfx.convert(model, x), torch.randn(8, *x.shape[1:], dtype=torch.float64)


def run(folder: Path, how: str) -> None:
    """``split``: a stage for each process made by rmfx; ``cut``: torch cuts before a layer within a block."""
    dist.init_process_group("gloo")
    rank, world, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    _, plain, x = network()
    chain = rmfx.to_sequential(plain)
    if how == "split":
        stage = PipelineStage(split(chain, x[:2], world)[rank], rank, world, device)
    else:
        point = {str(len(chain) // 2): SplitPoint.BEGINNING}
        stage = pipeline(chain, mb_args=(x.chunk(MICROBATCHES)[0],), split_spec=point).build_stage(rank, device)
    schedule = ScheduleGPipe(stage, MICROBATCHES)
    with torch.no_grad():
        y = schedule.step(x) if rank == 0 else schedule.step()
    if rank == world - 1:
        torch.save(y, folder / "y.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
