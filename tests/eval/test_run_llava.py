"""LLaVA's quick start: one question about one or several images, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.loaded import share_models
from llava.conversation import template_for_name
from llava.eval import model_vqa_loader, run_llava
from llava.eval.benchmarks import DataError
from llava.pruning import Pruner, register_pruner, registry

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
PHOTOS = ROOT / "playground" / "tiny" / "photos"
CAT, CUP = PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"
QUERY = "Is there a cat in the image?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def jobs():
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))


def given(**changes) -> SimpleNamespace:
    """Return the object of LLaVA's README."""
    usual = {
        "model_path": str(MODEL),
        "model_base": None,
        "model_name": "llava-v1.5-7b",
        "query": QUERY,
        "conv_mode": None,
        "image_file": str(CAT),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 4,
    }
    return SimpleNamespace(**{**usual, **changes})


def arguments(*more: str, image: str | Path = CAT, query: str = QUERY) -> list[str]:
    command = ["--model-path", str(MODEL), "--image-file", str(image), "--query", query]
    return [*command, "--max_new_tokens", "4", *more]


def test_the_object_of_the_readme(jobs, capsys):
    assert run_llava.eval_model(given()) is None
    out, err = capsys.readouterr()
    assert out.strip() and out.count("\n") == 1 and err == ""
    job = jobs[-1]
    assert (job.conv_mode, job.temperature, job.max_new_tokens) == ("llava_v1", 0, 4)
    parser = run_llava.build_parser()
    args = parser.parse_args(["--model-path", "m", "--image-file", "i", "--query", "q"])
    assert (args.temperature, args.max_new_tokens, args.sep, args.conv_mode) == (0.2, 512, ",", None)


def test_it_answers_as_the_engine_does(jobs, tmp_path, capsys):
    from llava.eval import model_vqa_loader

    rows = [{"question_id": 1, "image": "cat.jpg", "text": QUERY}]
    rows.append({"question_id": 2, "image": "cat.jpg", "text": "What color is the cat?"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = ["--temperature", "0", "--conv-mode", "vicuna_v1", "--visual_token_num", "16"]
    same += ["--max_new_tokens", "4"]
    files = ["--question-file", tmp_path / "q.jsonl", "--image-folder", CAT.parent]
    command = ["--model-path", MODEL, *files, "--answers-file", tmp_path / "a.jsonl", *same]
    assert model_vqa_loader.main(list(map(str, command))) == 0
    answers = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    capsys.readouterr()
    for row, answer in zip(rows, answers, strict=True):
        assert run_llava.main(arguments(*same, query=row["text"])) == 0
        assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize("image", [CAT, f"{CAT},{CUP}"], ids=["one image", "two images"])
def test_drawn_answers_replay_captured_stages(jobs, capsys, monkeypatch, image):
    import torch

    from llava.model.llava_arch import LlavaMetaForCausalLM
    from llava.model.runtime import Runtime

    assert run_llava.eval_model(given(temperature=0.8, image_file=str(image))) is None
    runtime = Runtime(torch.device("cpu"), graphs=True)
    monkeypatch.setattr(LlavaMetaForCausalLM, "runtime", runtime)
    assert run_llava.eval_model(given(temperature=0.8, image_file=str(image))) is None
    eager, captured = capsys.readouterr().out.splitlines()
    assert eager == captured and {"prefill", "decoding step"} <= {key[0] for key in runtime.captured._graphs}


def test_several_images_and_placeholders(jobs, capsys, monkeypatch):
    seen = []
    from llava import mm_utils

    tokenize = mm_utils.tokenizer_image_token

    def look(prompt, *rest):
        seen.append(prompt)
        return tokenize(prompt, *rest)

    monkeypatch.setattr(mm_utils, "tokenizer_image_token", look)
    more = ["--temperature", "0", "--conv-mode", "vicuna_v1"]
    assert run_llava.main(arguments(*more, image=f"{CAT}|{CUP}", query="Which?") + ["--sep", "|"]) == 0
    assert "USER: <image>\n<image>\nWhich? ASSISTANT:" in seen[-1]
    query = "Is <image-placeholder> the same as <image-placeholder>?"
    assert run_llava.main(arguments(*more, image=f"{CAT},{CUP}", query=query)) == 0
    assert "USER: Is <image> the same as <image>? ASSISTANT:" in seen[-1]
    with pytest.raises(SystemExit):
        run_llava.main(arguments(*more, image=f"{CAT},{CUP}", query="<image-placeholder>?"))
    assert "1 <image-placeholder> for 2 images" in capsys.readouterr().err


def test_an_address_is_downloaded(jobs, tmp_path, capsys):
    shutil.copy(CAT, tmp_path / "view.jpg")
    (tmp_path / "page.html").write_text("<html>not an image</html>")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def __init__(self, *rest, **named):
            super().__init__(*rest, directory=str(tmp_path), **named)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    run_llava.eval_model(given())
    expected = capsys.readouterr().out
    try:
        run_llava.eval_model(given(image_file=f"{address}/view.jpg"))
        assert capsys.readouterr().out == expected
        for name, says in (
            ("page.html", "a web page, not an image"),
            ("gone.jpg", "cannot be downloaded (File not found)"),
        ):
            assert run_llava.main(arguments(image=f"{address}/{name}")) == 1
            assert f"error: {address}/{name}: {says}" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "address", ["http://[bad/x.jpg", "http:///x.jpg", "http://127.0.0.1:1/x.jpg", "https://"]
)
def test_an_address_that_cannot_be_reached_is_one_line(address, unloaded, capsys):
    assert run_llava.main(arguments(image=address)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {address}: cannot be downloaded (") and said.count("\n") == 1


@pytest.mark.parametrize(
    "name, template",
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-Llama-2-13b-chat", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b-delta-v0", "llava_v0"),
        ("my-own", "llava_v0"),
    ],
)
def test_the_template_follows_from_the_name(name, template):
    assert template_for_name(name) == template


def test_another_template_than_that_of_the_name_is_a_warning(jobs, capsys):
    run_llava.eval_model(given(conv_mode="vicuna_v1"))
    assert "--conv-mode vicuna_v1: the checkpoint's name calls for llava_v1" in capsys.readouterr().err
    assert jobs[-1].conv_mode == "vicuna_v1"
    run_llava.eval_model(given(model_name=None))  # ckpt_llava15s
    said = capsys.readouterr().err
    assert "'ckpt_llava15s' calls for the template llava_v0, its config.json for vicuna_v1" in said
    assert jobs[-1].conv_mode == "llava_v0"


def test_pruning_of_the_fork(jobs, capsys, monkeypatch):
    from llava.model import decode

    rows = []
    generate = decode.generate
    monkeypatch.setattr(
        decode,
        "generate",
        lambda model, tokenizer, new, *how: (rows.extend(new), generate(model, tokenizer, new, *how))[1],
    )
    run_llava.eval_model(given(visual_token_num=16, important_ratio=0.5))
    run_llava.eval_model(given())
    assert [len(row.visual[0]) for row in rows] == [16, 64]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"query": None}, "args has no query. Set them; known are model_path, image_file, query"),
        ({"image_file": None, "query": None}, "args has no image_file, query"),
        ({"image_file": "gone.jpg"}, "gone.jpg: no such image"),
        ({"image_file": "~nobody-here/cat.jpg"}, "~nobody-here/cat.jpg: no such image"),
        ({"image_file": f"{CAT},"}, "an empty name between separators"),
        ({"image_file": str(MODEL / "config.json")}, "config.json: "),
        ({"image_file": [str(CAT)]}, "args.image_file is ["),
        ({"sep": ""}, "--sep: empty"),
        ({"query": "<image>\nWhat?"}, "contains <image>, which is added here"),
        ({"temperature": "warm"}, "expected a number >= 0"),
        ({"temperature": -1}, "expected a number >= 0"),
        ({"num_beams": 0}, "expected a number >= 1"),
        ({"max_new_tokens": 0}, "expected a number >= 1"),
        ({"top_p": 1.5}, "expected a number from 0 to 1"),
        ({"conv_mode": "v9"}, "no such template"),
        ({"model_path": "nowhere/at/all"}, "--model-path nowhere/at/all: no such folder"),
        ({"model_path": str(PHOTOS)}, "config.json: no such file"),
        ({"visual_token_num": -1}, "expected an integer >= 0"),
        ({"important_ratio": 2}, "from 0 to 1"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(unloaded, changes, says):
    with pytest.raises((DataError, OSError)) as caught:
        run_llava.eval_model(given(**changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_objects_without_attributes(unloaded):
    for wrong in (None, object(), SimpleNamespace()):
        with pytest.raises(DataError, match="args has no model_path, image_file, query"):
            run_llava.eval_model(wrong)
    with pytest.raises(DataError, match="args is a dict"):
        run_llava.eval_model(vars(given()))


def test_a_prompt_beyond_the_context_is_an_error(jobs, capsys):
    assert run_llava.main(arguments(query="word " * 5000)) == 1
    said = capsys.readouterr().err
    assert "--query: the prompt has" in said and "in config.json is" in said


@pytest.mark.parametrize(
    "method, budget, said", [("tome", "3", "Use 8 tokens or more"), ("cdpruner", "8", "the whole CLIP")]
)
def test_a_method_that_the_model_cannot_run_ends_with_one_line(jobs, tmp_path, capsys, method, budget, said):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": CAT.name, "text": QUERY}))
    more = ["--method", method, "--visual_token_num", budget, "--temperature", "0"]
    assert run_llava.main(arguments(*more)) == 1
    first = capsys.readouterr().err.splitlines()[-1]
    files = ["--question-file", tmp_path / "q.jsonl", "--image-folder", CAT.parent]
    command = ["--model-path", MODEL, *files, "--answers-file", tmp_path / "a.jsonl", *more]
    assert model_vqa_loader.main([str(one) for one in command]) == 1
    assert first == capsys.readouterr().err.splitlines()[-1]
    assert first.startswith(f"error: {method}: ") and said in first


def test_methods_that_read_the_question_get_it(jobs, monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "_PRUNERS", dict(registry._PRUNERS))

    @register_pruner("reader")
    class Reader(Pruner):
        needs_question = True

        def score(self, features, cues):
            asked.append((cues.question.bare, len(cues.question.embeds) > 0))
            return features.double().norm(dim=-1)

    both = f"{CAT},{CUP}"
    query = f"<image-placeholder><image-placeholder>{QUERY}"
    assert (
        run_llava.main(arguments("--method", "reader", "--visual_token_num", "4", image=both, query=query))
        == 0
    )
    assert asked == [("Is there a cat in the image?", True)] * 2


def test_infinite_logits_are_an_error(capsys, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        share_models(patch)
        from llava.eval.jobs import session

        load = session.load_model

        def overflowing(job):
            model, *others = load(job)
            model.lm_head.weight.data.fill_(float("nan"))
            return model, *others

        patch.setattr(session, "load_model", overflowing)
        assert run_llava.main(arguments("--temperature", "0")) == 1
    out, err = capsys.readouterr()
    assert out == "" and "NaN or infinite logits" in err


VIDEO_DATA = ROOT / "tests" / "data" / "video"
CLIP = VIDEO_DATA / "clip_a.mp4"


@pytest.mark.parametrize("method", ["vispruner", "fastv"])
def test_a_video_is_answered_as_by_the_model_itself(jobs, capsys, method):
    pytest.importorskip("av")
    from llava.conversation import conv_templates
    from llava.mm_utils import media_tags, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.video_files import read_frames

    path = str(VIDEO_DATA / "Video-LLaVA-7B-split")
    command = [
        "--model-path",
        path,
        "--image-file",
        str(CLIP),
        "--query",
        "What is it?",
        "--temperature",
        "0",
    ]
    more = ["--max_new_tokens", "6", "--visual_token_num", "30", "--method", method]
    assert run_llava.main([*command, *more]) == 0
    printed = capsys.readouterr()
    assert "template" not in printed.err

    tokenizer, model, processor, _ = load_pretrained_model(path, device="cpu")
    model.set_pruner(method, tokens=30, clip_budget="total")
    conversation = conv_templates["llava_v1"].copy()
    tags = media_tags([True], model.config)
    conversation.append_message(conversation.roles[0], f"{tags}\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    pixels = process_images([read_frames(CLIP)], processor, model.config)
    new = model.generate(ids, images=list(pixels), do_sample=False, max_new_tokens=6)
    assert printed.out == tokenizer.decode(new[0], skip_special_tokens=True).strip() + "\n"


def test_videos_that_cannot_be_asked_about(unloaded, tmp_path, capsys):
    video = str(VIDEO_DATA / "Video-LLaVA-7B-split")
    (tmp_path / "broken.mp4").write_bytes(CLIP.read_bytes()[:5000])
    for path, file, message in (
        (str(MODEL), CLIP, "a video, but the model takes images only"),
        (video, "http://localhost/clip.mp4", "videos are not downloaded"),
        (video, tmp_path / "broken.mp4", "broken.mp4: truncated"),
        (video, tmp_path / "none.mkv", "none.mkv: no such video"),
    ):
        assert run_llava.main(["--model-path", path, "--image-file", str(file), "--query", "?"]) == 1
        assert message in capsys.readouterr().err
