"""Helpers of LLaVA's servers."""

import asyncio
import io
import json
import logging
import urllib.request

import pytest
import torch

from llava import utils


@pytest.fixture
def logger(tmp_path, request):
    name = f"test_utils.{request.node.name}"
    yield utils.build_logger(name, "logs/worker.log", logdir=tmp_path)
    for handler in logging.getLogger(name).handlers[:]:
        handler.close()
        logging.getLogger(name).removeHandler(handler)


def test_logger_writes_a_line_once(logger, tmp_path, capsys):
    assert utils.build_logger(logger.name, "logs/worker.log", logdir=tmp_path) is logger
    logger.info("hello")
    assert (tmp_path / "logs/worker.log").read_text(encoding="utf-8").count("hello") == 1


def test_stream_to_logger_sends_whole_lines(logger, tmp_path):
    stream = utils.StreamToLogger(logger, logging.WARNING)
    assert stream.write("one\ntw") == 6
    print("o", "three", sep="\n", end="", file=stream)
    file = tmp_path / "logs/worker.log"
    assert [line.rsplit("| ")[-1] for line in file.read_text().splitlines()] == ["one", "two"]
    stream.flush()
    stream.flush()
    assert [line.rsplit("| ")[-1] for line in file.read_text().splitlines()] == ["one", "two", "three"]
    assert isinstance(stream.isatty(), bool)


def test_disable_torch_init(monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)  # put back afterwards
    torch.manual_seed(0)
    before = torch.get_rng_state()
    utils.disable_torch_init()
    torch.nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_pretty_print_semaphore():
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(2)) == "Semaphore(value=2, locked=False)"


def test_moderation_asks_nobody_without_a_key(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert utils.violates_moderation("anything") is False


@pytest.mark.parametrize("flagged", [True, False])
def test_moderation_reads_the_answer(monkeypatch, flagged):
    asked = []

    def answer(request, timeout):
        asked.append(json.loads(request.data)["input"])
        return io.BytesIO(json.dumps({"results": [{"flagged": flagged}]}).encode())

    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert utils.violates_moderation('say "hi"\n') is flagged
    assert asked == ['say "hi"\n']


def test_moderation_that_cannot_be_reached_flags_nothing(monkeypatch, caplog):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert utils.violates_moderation("hi") is False
    assert "no network" in caplog.text
