"""A plain network is cut into the stages of a pipeline, in processes of their own, and computes the same."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_worker import network
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline

import rmfx
from rmfx.deploy.stages import _cuts, split
from rmfx.errors import RmfxError

WORKER = Path(__file__).parent / "pipeline_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["split", "cut"])
def test_two_processes_compute_what_one_does(how: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    model, plain, x = network()
    with torch.no_grad():
        expected, residual = plain(x), model(x)
    actual = torch.load(tmp_path / "y.pt")
    assert float((actual - expected).abs().max()) <= 1e-14 * float(expected.abs().max())
    assert float((actual - residual).abs().max()) < 1e-12 * float(residual.abs().max())


def test_every_cut_of_a_plain_network_sends_one_tensor() -> None:
    _, plain, x = network()
    chain = rmfx.to_sequential(plain)
    with torch.no_grad():
        expected = chain(x)
        for layer in range(1, len(chain)):
            marked = copy.deepcopy(chain)  # pipeline marks the layers before which it cuts
            pipe = pipeline(marked, mb_args=(x,), split_spec={str(layer): SplitPoint.BEGINNING})
            sent = pipe.get_stage_module(0)(x)
            assert isinstance(sent, Tensor) and torch.equal(pipe.get_stage_module(1)(sent), expected)


def test_a_cut_within_a_block_of_a_residual_network_sends_two() -> None:
    model, _, x = network()
    pipe = pipeline(model, mb_args=(x,), split_spec={"1.0.branch.1": SplitPoint.BEGINNING})
    assert len(pipe.get_stage_module(0)(x)) == 2


def test_stages_are_balanced_and_share_the_layers() -> None:
    _, plain, x = network()
    chain = rmfx.to_sequential(plain)
    parts = split(chain, x, 3)
    assert [layer for part in parts for layer in part] == list(chain)
    assert {name for part in parts for name in part.state_dict()} == set(chain.state_dict())
    assert not any(part.training for part in parts)
    with torch.no_grad():
        assert torch.equal(nn.Sequential(*parts)(x), chain(x))
    assert split(chain, x, 1)[0].state_dict().keys() == chain.state_dict().keys()
    assert [len(part) for part in split(chain, x, len(chain))] == [1] * len(chain)


def test_of_equal_cuts_the_one_that_sends_least() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 12, 3))
    first, second = split(chain.eval(), torch.zeros(1, 3, 8, 8), 2)
    assert len(first) == 3 and isinstance(first[-1], nn.MaxPool2d) and len(second) == 2


@given(st.data(), st.integers(1, 7))
def test_cuts_are_the_best_of_all(data: st.DataObject, layers: int) -> None:
    work = data.draw(st.lists(st.integers(0, 5), min_size=layers, max_size=layers))
    sent = data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))
    stages = data.draw(st.integers(1, layers))

    def price(cuts: tuple[int, ...]) -> tuple[int, int]:
        ends = (0, *cuts, layers)
        return max(sum(work[a:b]) for a, b in itertools.pairwise(ends)), sum(sent[cut - 1] for cut in cuts)

    every = itertools.combinations(range(1, layers), stages - 1)
    assert price(_cuts(work, sent, stages)) == min(map(price, every))


def test_errors() -> None:
    chain, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)
    with pytest.raises(RmfxError, match="only an nn.Sequential can be split, not a Linear: see to_sequential"):
        split(chain[0], x, 1)  # type: ignore[arg-type]
    for stages in (0, 3):
        with pytest.raises(RmfxError, match=f"2 layers cannot be split into {stages} stages"):
            split(chain, x, stages)
