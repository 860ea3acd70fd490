"""How a job loads its model: over several GPUs, in few bits. Decided without a GPU and without loading."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llava.eval.jobs import session
from llava.eval.jobs.job import resolve_job
from llava.eval.jobs.session import ModelError

CONFIG = {"model_type": "llava", "torch_dtype": "float16"}


@pytest.fixture
def loads(monkeypatch):
    """Return the arguments of every load."""
    calls: list[dict] = []

    def load(*_args, **given):
        calls.append(given)
        return None, SimpleNamespace(), None, 0

    monkeypatch.setattr("llava.model.builder.load_pretrained_model", load)
    return calls


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (3 << 30, 8 << 30))


def test_auto_spreads_a_model_over_all_gpus(loads, two_gpus):
    job = resolve_job("x/llava-34b", CONFIG, device="auto", graphs=False)
    session.load_model(job)
    assert (job.device, job.spread, loads[0]["device"]) == ("cuda", True, None)
    assert job.free_memory == 6 << 30
    alone = resolve_job("x/llava-34b", CONFIG, device="cuda", graphs=False)
    session.load_model(alone)
    assert (alone.spread, loads[1]["device"]) == (False, "cuda")
    for given in ({"local_rank": 1}, {"num_processes": 2}):
        with pytest.raises(ValueError, match="--device auto: .*several processes"):
            resolve_job("x/llava-34b", CONFIG, device="auto", graphs=False, **given)


def test_auto_is_the_only_device_there_is(loads, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    job = resolve_job("x/llava-34b", CONFIG, device="auto")
    session.load_model(job)
    assert (job.device, job.spread, loads[0]["device"]) == ("cpu", False, "cpu")


def test_few_bits_are_loaded_and_recorded(loads, monkeypatch):
    for bits in (8, 4):
        job = resolve_job("x/llava-34b", CONFIG, device="cpu", load_bits=bits)
        session.load_model(job)
        assert loads[-1][f"load_{bits}bit"] is True and f"load_{12 - bits}bit" not in loads[-1]
    session.load_model(resolve_job("x/llava-34b", CONFIG, device="cpu"))
    assert "load_4bit" not in loads[-1] and loads[-1]["decoder"] is True
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    job = resolve_job("tests/data/model/ckpt_llava15s", CONFIG, device="cpu", load_bits=4)
    with pytest.raises(ModelError, match="load_4bit: the bitsandbytes package is missing"):
        session.load_model(job)


def test_few_bits_are_another_configuration(tmp_path):
    from llava.eval.jobs.job import Task
    from llava.pruning import get_pruner

    own, few = (
        resolve_job(tmp_path / "model", CONFIG, device="cpu", load_bits=bits).configuration(
            Task(()), get_pruner("vispruner", 64)
        )
        for bits in (None, 4)
    )
    assert "load_bits" not in own.flat() and few.flat()["load_bits"] == 4 and own.hash() != few.hash()
