"""The plugin of lmms-eval against a minimal stand-in of its base classes (see also test_lmms_eval.py)."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.golden_model import CHECKPOINT, DATA, golden_image
from llava.integrations.tiny_hosts import HOSTS
from llava.model.settings import ENVIRONMENT

PATH = str(DATA / CHECKPOINT["15s"])


class StandInLmms:
    """`lmms_eval.api.model.lmms`, as far as it is used."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)

    def clean(self) -> None:
        self.cleaned = True


@dataclass
class StandInResult:
    text: str
    token_counts: Any = None


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


def parse(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, value = part.split("=", 1)
        found[name] = int(value) if value.isnumeric() else value
    return found


class StandInHost(StandInLmms):
    """A host as lmms-eval writes them: swallows errors, and generates with the whole model."""

    def __init__(self, pretrained: str = "", device: str = "cuda", batch_size: int = 1, **kwargs) -> None:
        super().__init__()
        assert kwargs == {}
        self.model, self.device = HOSTS["llava"].build(), device
        self.given = {"pretrained": pretrained, "device": device, "batch_size": batch_size}

    def generate_until(self, requests):
        answers = []
        for one in requests:
            try:
                answers.append(self.model.generate(**one.args[0], max_new_tokens=2)[0].tolist())
            except Exception:
                answers.append([])
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, imported with stand-ins for the modules of lmms-eval."""
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    logged: list[Any] = []
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": StandInResult},
        "lmms_eval.api.model": {"lmms": StandInLmms},
        "lmms_eval.utils": {"simple_parse_args_string": parse},
        "lmms_eval.models": {"get_model": lambda name, force_simple: StandInHost},
        "lmms_eval.models.registry_v2": {"ModelManifest": StandInManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *args: logged.append(args)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llava.integrations.lmms", raising=False)
    module = importlib.import_module("llava.integrations.lmms")
    module.logged = logged
    yield module
    sys.modules.pop("llava.integrations.lmms", None)


@dataclass
class Task:
    """A task of lmms-eval: its methods are in the arguments of requests, its `args` go into the results."""

    documents: list[Any]
    args: Any = field(default_factory=lambda: SimpleNamespace(model="vispruner"))

    def doc_to_visual(self, document: Any) -> list[Any]:
        return [golden_image(document["image"])] if document["image"] else []

    def doc_to_target(self, document: Any) -> str:
        return document["answer"]


DOCUMENTS = [{"image": "land640x480", "answer": "Yes"}, {"image": None, "answer": "No"}]
SHORT = {"max_new_tokens": 2, "until": ["\n\n"], "temperature": 0}


def instances(task: Task, *middle: Any) -> list[Any]:
    return [
        SimpleNamespace(args=("Why?", middle[0], task.doc_to_visual, i, "pope", "test"))
        for i in range(len(task.documents))
    ]


def test_manifests_name_classes_that_exist(plugin):
    found = {one.model_id: one for one in plugin.manifests()}
    assert set(found) == {"vispruner", "vispruner_hf"}
    for one in found.values():
        for path, simple in ((one.simple_class_path, True), (one.chat_class_path, False)):
            if path:
                module, name = path.rsplit(".", 1)
                cls = getattr(importlib.import_module(module), name)
                assert issubclass(cls, StandInLmms) and cls.is_simple is simple


def test_the_engine_as_a_model_of_lmms_eval(plugin):
    text = f"pretrained={PATH},method=vispruner,tokens=16,important_ratio=0.25"
    lm = plugin.EngineLmms.create_from_arg_string(
        text, {"batch_size": 1, "device": "cpu", "max_batch_size": None}
    )
    assert lm.device == torch.device("cpu") and (lm.rank, lm.batch_size) == (0, 1)
    task = Task(DOCUMENTS)
    lm.task_dict["pope"] = {"test": task.documents}
    answers = lm.generate_until(instances(task, SHORT))
    assert len(answers) == 2 and all(isinstance(one, str) for one in answers) and SHORT["until"]
    recorded = task.args.vispruner
    named = {"method": "vispruner", "tokens": 16, "important_ratio": 0.25, "checkpoint": PATH, "failed": 0}
    assert named.items() <= recorded.items()
    ((seconds, new, speed, numbers),) = plugin.logged
    assert seconds > 0 and speed > 0 and new >= 0 and numbers == {"num_requests": 2, "visual_tokens": 8}
    losses = lm.loglikelihood(instances(task, task.doc_to_target))
    assert losses == lm.engine.losses(
        [
            lm._request("Why?", task.doc_to_visual, i, "pope", "test", answer=document["answer"])
            for i, document in enumerate(task.documents)
        ]
    )
    assert all(isinstance(one, StandInResult) and one.text == tuple(one) for one in losses)
    assert all(type(one.text) is tuple and one.token_counts is None for one in losses)
    assert lm.loglikelihood([SimpleNamespace(args=("", "Yes"))])[0][0] > 0  # without a document
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round([])
    lm.clean()
    assert lm.engine.session.loaded is None and lm.cleaned


def test_model_args(plugin):
    config = {"batch_size": 1, "device": None, "max_batch_size": 4}
    assert plugin.parse_model_args("tokens=64", config) == {"tokens": 64}
    assert plugin.parse_model_args("", {"batch_size": "8", "device": "cuda:1"}) == {
        "batch_size": "8",
        "device": "cuda:1",
    }
    assert plugin.parse_model_args("batch_size=1,tokens=2", {"batch_size": 8})["batch_size"] == 1
    with pytest.raises(ValueError, match="tokens is given twice"):
        plugin.parse_model_args("tokens=64,method=random,tokens=32", {})
    for text in ("vispruner", "tokens=64,vispruner"):
        with pytest.raises(ValueError, match="entry without value"):
            plugin.parse_model_args(text, {})
    with pytest.raises(ValueError, match="'token' is not an argument of model vispruner.*tokens"):
        plugin.EngineLmms.create_from_arg_string(f"pretrained={PATH},token=3", {})


# --- models of transformers ------------------------------------------------------------------------------


def host_requests(task: Task) -> list[Any]:
    inputs = HOSTS["llava"].batches()["single"]
    return [SimpleNamespace(args=(inputs, SHORT, task.doc_to_visual, 0, "pope", "test"))]


def test_a_host_is_pruned_and_recorded(plugin):
    from llava import pruning_of

    lm = plugin.HostLmms.create_from_arg_string("host=llava,tokens=3,important_ratio=0.5", {"batch_size": 1})
    assert isinstance(lm, StandInHost) and lm.is_simple
    assert lm.given["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    task = Task(DOCUMENTS)
    requests = host_requests(task)
    plain = HOSTS["llava"].build().generate(**requests[0].args[0], max_new_tokens=2)[0].tolist()
    pruned = lm.generate_until(requests)[0]
    assert len(pruned) == len(plain) and pruning_of(lm.model).last.rows[0].kept.numel() == 3
    named = {"host": "llava_hf", "method": "vispruner", "tokens": 3, "important_ratio": 0.5}
    assert named.items() <= task.args.vispruner.items()
    whole = plugin.HostLmms.create_from_arg_string("host=llava,method=vispruner,tokens=none", {})
    assert pruning_of(whole.model) is None and whole.generate_until(requests) == [plain]
    assert task.args.vispruner["method"] == "none"


def test_errors_of_a_host_are_not_empty_answers(plugin):
    lm = plugin.HostLmms.create_from_arg_string("host=llava_hf,keep=0.5", {})
    requests = host_requests(Task(DOCUMENTS))
    requests[0].args[0]["pixel_values"] = torch.zeros(1, 3, 7, 7)
    door = lm.model.generate
    with pytest.raises(RuntimeError, match="1 of 1 requests failed"):
        lm.generate_until(requests)
    assert lm.model.generate is door
    with pytest.raises(NotImplementedError):
        lm.loglikelihood(requests)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens=3,host=qwen", "host='qwen' is not supported.*qwen2_5_vl"),
        ("tokens=3", "host is missing"),
        (
            "host=llava,token=3",
            "'token' is not an argument of model vispruner_hf with host=llava_hf.*pretrained",
        ),
        ("host=llava,tokens=x", "tokens='x'"),
        ("host=llava,keep=much", "keep="),
        ("host=llava,keep=2", "keep"),
        ("host=llava,tokens=3,keep=0.5", "tokens"),
        ("host=llava,method=vispruner", "has no budget"),
        ("host=llava,tokens=3,method=no_such", "no_such"),
        ("host=llava,tokens=3,positions=old", "positions"),
    ],
)
def test_host_arguments_that_are_refused(plugin, monkeypatch, text, message):
    monkeypatch.setattr(StandInHost, "__init__", lambda self, pretrained="", device="": pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        plugin.HostLmms.create_from_arg_string(text, {})


@pytest.mark.parametrize(
    ("config", "host", "message"),
    [
        (
            {"model_type": "llava", "mm_vision_tower": "clip"},
            "host=llava,",
            "original LLaVA.*--model vispruner",
        ),
        ({"model_type": "qwen2_5_vl"}, "host=llava,", "model_type 'qwen2_5_vl' does not run with host=llava"),
        ({"model_type": "bert"}, "", "model_type 'bert' is not supported"),
    ],
)
def test_a_host_loads_only_its_checkpoints(plugin, tmp_path, config, host, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        plugin.HostLmms.create_from_arg_string(f"{host}pretrained={tmp_path},tokens=3", {})


def test_the_host_of_a_checkpoint(plugin, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    lm = plugin.HostLmms.create_from_arg_string(f"pretrained={tmp_path},tokens=3", {})
    assert lm.settings["host"] == "llava_hf" and lm.given["pretrained"] == str(tmp_path)


def test_a_host_refuses_settings_in_the_environment(plugin, monkeypatch):
    monkeypatch.setenv("VISPRUNER_TOKENS", "64")
    with pytest.raises(ValueError, match="VISPRUNER_TOKENS"):
        plugin.HostLmms.create_from_arg_string("host=llava", {})


def test_a_missing_package_is_named(plugin, monkeypatch):
    def get_model(name, force_simple):
        raise ModuleNotFoundError("No module named 'decord'", name="decord")

    monkeypatch.setattr(sys.modules["lmms_eval.models"], "get_model", get_model)
    with pytest.raises(ImportError, match="host=llava_hf.*package decord.*pip install decord"):
        plugin.HostLmms.create_from_arg_string("host=llava,tokens=3", {})
