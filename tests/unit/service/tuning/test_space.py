"""The configurations that can be tried on a machine."""

import pytest

from handler.selection import Hardware
from service.tuning.search import Configuration
from service.tuning.space import make_axes, possible_engines
from tests.unit.service.tuning.trials import ENGINES, START


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 16, 96])
def test_workers_and_threads_stay_within_the_cores(cores: int) -> None:
    tried = [(c.workers, c.threads) for c in make_axes(ENGINES, cores, 0, {})[1](START)]
    assert all(workers * threads <= cores for workers, threads in tried)
    assert {(1, cores), (cores, 1)} <= set(tried)
    assert len(set(tried)) == len(tried) <= 16


def test_a_delay_without_batches_is_not_tried() -> None:
    alone = Configuration(**vars(START) | {"batch_size": 1, "max_forward": 1})
    *_, forward, delay = make_axes(ENGINES, 4, 0, {})
    assert forward(alone) == [alone]
    assert delay(alone) == []


def test_engines_are_those_of_the_machine() -> None:
    plain, bf16 = Hardware(), Hardware(cpu_bf16=True)
    gpu = Hardware(gpu=0, capability=(7, 5), cpu_bf16=True)
    assert possible_engines("cpu", False, plain) == [("openvino", "fp32"), ("torch", "fp32")]
    assert ("openvino", "int8") in possible_engines("cpu", True, plain)
    assert possible_engines("cpu", False, bf16)[0] == ("openvino", "bf16")
    on_gpu = [("cuda", "fp16"), ("cuda", "fp32"), ("torch", "fp32")]
    assert possible_engines("cuda", True, gpu) == on_gpu
    ampere = Hardware(gpu=0, capability=(8, 0))
    assert possible_engines("cuda", False, ampere) == [
        ("cuda", "fp16"),
        ("cuda", "bf16"),
        ("cuda", "fp32"),
        ("torch", "fp32"),
    ]


def test_what_is_tried_on_gpus() -> None:
    """Workers for each of them, batches that fill a forward pass, and no delay that halves them."""
    _, workers, batch, forward, delay = make_axes(ENGINES, 32, 2, {})
    tried = [(c.workers, c.threads) for c in workers(START)]
    assert {count for count, _ in tried} == {2, 4, 8, 16}
    assert {(2, 16), (16, 2), (16, 1)} <= set(tried)
    large = batch(START)[-1]
    assert (large.batch_size, large.max_forward) == (64, START.max_forward)
    assert [c.max_forward for c in forward(large)] == [8, 16, 32, 64]
    assert all(c.max_batch_delay_ms > 0 for c in delay(START))
    (kept,) = {c.workers for c in make_axes(ENGINES, 32, 2, {"workers": 6})[1](START)}
    assert kept == 6
