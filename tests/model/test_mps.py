"""The whole pipeline on a device without float64, by a stand-in for Apple's MPS (see `helpers.fake_mps`)."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from helpers.checkpoints import IDS, IMAGE, SOURCE, load, logits, write
from helpers.cues import make_cues
from helpers.fake_mps import MpsTensor, fake_mps
from helpers.synthetic_pope import make_pope
from llava.eval import model_vqa_loader, run, sweep
from llava.model.builder import load_pretrained_model
from llava.model.settings import choose_dtypes
from llava.pruning import Pruner, TextCue, get_pruner, has_float64, list_pruners

CPU, MPS = torch.device("cpu"), torch.device("mps")
FEATURES = torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(1))
ATTENTION = torch.rand(3, 4, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _probe_again():
    has_float64.cache_clear()
    yield
    has_float64.cache_clear()


def test_the_stand_in_refuses_float64_and_mixed_devices():
    with fake_mps() as ran:
        on = torch.ones(2, device="mps")
        assert on.device.type == "mps" and (on + 1).tolist() == [2, 2] and "add" in ran
        for wrong in (
            lambda: on.double(),
            lambda: on.sum(dtype=torch.float64),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: on + torch.ones(2),
        ):
            with pytest.raises((TypeError, RuntimeError)):
                wrong()


@pytest.mark.parametrize("method", list_pruners())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_method_keeps_the_tokens_that_it_keeps_on_a_cpu(method, dtype):
    features, attention = FEATURES.to(dtype), ATTENTION.to(dtype)
    pruner = get_pruner(method, tokens=None if method == "none" else 16)
    cue = TextCue("what?", torch.ones(2, 8))
    cues = make_cues(pruner, features, attention)
    expected = pruner.keep(features, attention, ["a", "b", "c"], cue, cues)
    with fake_mps():
        cue = TextCue("what?", torch.ones(2, 8).to("mps"))
        cues = {name: tensor.to("mps") for name, tensor in cues.items()}
        kept = pruner.keep(features.to("mps"), attention.to("mps"), ["a", "b", "c"], cue, cues)
        assert kept.indices.device.type == kept.important.device.type == "mps"
        assert kept.indices.tolist() == expected.indices.tolist()
        assert kept.important.tolist() == expected.important.tolist()


def test_a_method_of_a_user_gets_cpu_tensors():
    class LargestNorm(Pruner):
        needs_question = True

        def score(self, features, cues):
            assert features.device == cues.attention.device == cues.question.embeds.device == CPU
            return features.double().norm(dim=-1)

    with fake_mps():
        place = (FEATURES.to("mps"), ATTENTION.to("mps"))
        kept = LargestNorm(tokens=4).keep(*place, question=TextCue("what?", torch.ones(2, 8).to("mps")))
        assert kept.indices.shape == (3, 4)


def test_invalid_values_are_refused_as_on_a_cpu():
    features = FEATURES.clone()
    features[1, 3, 5] = float("nan")
    with fake_mps(), pytest.raises(ValueError, match=r"features .* NaN or infinite values in rows \[1\]"):
        get_pruner("vispruner", 16).keep(features.to("mps"), ATTENTION.to("mps"))


def test_a_device_that_computes_float64_in_float32_has_no_float64(monkeypatch):
    """Some NPUs accept float64 and lose its digits."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=torch.float32))
    assert not has_float64("npu")
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=dtype))
    has_float64.cache_clear()
    assert has_float64("npu") and has_float64("cpu") and has_float64("cuda")


def test_answers_equal_those_of_a_cpu():
    expected = load(SOURCE, visual_token_num=16)
    with fake_mps() as ran:
        _, model, _, _ = load_pretrained_model(
            str(SOURCE), device="mps", visual_token_num=16, dtype="float32"
        )
        places = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
        assert places == {"mps"} and all(isinstance(p, MpsTensor) for p in model.parameters())
        assert torch.equal(logits(model).cpu(), logits(expected))
        done = len(ran)
        given = {"images": IMAGE, "image_sizes": [(336, 336)], "do_sample": False, "max_new_tokens": 4}
        assert model.generate(IDS, **given).tolist() == expected.generate(IDS, **given).tolist()
        assert {"convolution", "mm", "_softmax", "argmax"} & set(ran[done:]) and len(ran) - done > 100


@pytest.mark.parametrize("share", [True, False])
def test_a_run_on_mps(tmp_path, capsys, share):
    data = make_pope(tmp_path / "pope", pictures=3, per_category=4)
    common = ["--benchmark", "pope", "--model", str(SOURCE), "--data", str(data), "--tokens", "16"]
    common += ["--max-new-tokens", "3", "--dtype", "float32"] + ([] if share else ["--no-share-prefix"])

    def answers(name: str, *more: str) -> list[tuple]:
        assert run.main([*common, "--output", str(tmp_path / name), *more]) == 0
        lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["metadata"]["device"] for row in rows} == {name}
        return [(row["question_id"], row["text"]) for row in rows]

    expected = answers("cpu", "--device", "cpu")
    with fake_mps():
        assert answers("mps", "--device", "mps", "--num-workers", "0") == expected


@pytest.mark.parametrize("command", [run, sweep, model_vqa_loader])
def test_without_mps_the_commands_say_so_before_loading(command, tmp_path, capsys):
    data = make_pope(tmp_path / "pope", pictures=1, per_category=1)
    arguments = ["--benchmark", "pope", "--model", str(SOURCE), "--data", str(data)]
    if command is model_vqa_loader:
        arguments = ["--model-path", str(SOURCE), "--question-file", str(data / "llava_pope_test.jsonl")]
        arguments += ["--image-folder", str(data / "val2014"), "--answers-file", str(tmp_path / "a.jsonl")]
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--device", "mps"])
    message = capsys.readouterr().err
    assert stop.value.code and "'mps' is missing" in message and "Traceback" not in message


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_without_the_device_loading_is_refused(device):
    with pytest.raises(ValueError, match=rf"device: '{device}' is missing .* Use device='cpu'"):
        load_pretrained_model(str(SOURCE), device=device)


def test_dtypes_on_mps(tmp_path):
    assert choose_dtypes(None, None, "bfloat16", MPS) == (torch.float16, torch.float16)
    assert choose_dtypes(None, None, "float16", MPS) == (torch.float16, torch.float16)
    assert choose_dtypes(None, "float32", None, MPS) == (torch.float16, torch.float32)
    assert choose_dtypes("bfloat16", None, "float16", MPS)[0] == torch.bfloat16  # asked for
    for wrong in (("float64", None), (None, "float64")):
        with pytest.raises(ValueError, match=r"mps devices have no float64. Choose float32 or float16"):
            choose_dtypes(*wrong, "float16", MPS)
    write(tmp_path / "half", config={"torch_dtype": "bfloat16"})
    with fake_mps(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, model, _, _ = load_pretrained_model(str(tmp_path / "half"), device="mps", tower_dtype="float32")
        assert model.dtype == torch.float16 and model.get_vision_tower().dtype == torch.float32


def test_merging_in_the_tower_and_encoded_images_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VISPRUNER_VISION_CACHE", "1")
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    data = make_pope(tmp_path / "pope", pictures=1, per_category=1)
    common = ["--benchmark", "pope", "--model", str(SOURCE), "--data", str(data), "--tokens", "16"]
    common += ["--method", "tome", "--max-new-tokens", "3", "--dtype", "float32"]

    def answers(name: str, device: str) -> list[str]:
        more = ["--output", str(tmp_path / name), "--device", device, "--num-workers", "0"]
        assert run.main([*common, *more]) == 0
        return [json.loads(line)["text"] for line in (tmp_path / name / "answers.jsonl").open()]

    expected = answers("cpu", "cpu")
    with fake_mps():
        assert answers("encoded", "mps") == expected
        assert answers("read", "mps") == expected
