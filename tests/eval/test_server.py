"""`--server URL`: a vLLM stand-in as the language model of the runs, and the client command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.answers import without_ids
from helpers.loaded import share_models
from helpers.stub_vllm import StubVllm, stub_vllm
from helpers.synthetic_pope import make_pope
from llava import endpoint
from llava.eval import run
from llava.eval.inference import server
from llava.eval.inference.server import Prompt, VllmServer, chat_template, encode_embeds, prompt_difference
from llava.integrations import vllm_client
from llava.model.builder import load_pretrained_model
from llava.model.decode import Decoding, Row

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
PHOTOS = ROOT / "playground" / "tiny" / "photos"


@pytest.fixture(scope="module")
def loaded():
    tokenizer, model, _, _ = load_pretrained_model(str(MODEL), device="cpu")
    return model, tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=3, per_category=4)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Retry without waiting."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    retry(monkeypatch)


def retry(monkeypatch, timeout: float = 30, attempts: int = 3) -> None:
    plain = endpoint.JsonEndpoint

    def fast(*args, **options):
        return plain(*args, **{**options, "seconds": 0.001, "timeout": timeout, "attempts": attempts})

    monkeypatch.setattr(server, "JsonEndpoint", fast)


@pytest.fixture(scope="module")
def shared():
    """Load the model of the commands once; the run of the first test loads its own, without the decoder."""
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


def arguments(data: Path, output: Path, *more: str, tokens: str = "16") -> list[str]:
    command = ["--benchmark", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(output)]
    return [*command, "--tokens", tokens, "--max-new-tokens", "2", "--batch-size", "5", *more]


def texts(path: Path) -> list[tuple[int, str]]:
    return [(row["question_id"], row["text"]) for row in without_ids(path)]


@pytest.fixture(scope="module")
def local(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("local")
    assert run.main(arguments(data, output)) == 0
    return output / "answers.jsonl"


def test_a_run_asks_the_server_and_has_the_same_answers(data, local, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with stub_vllm(*loaded, fault=lambda number: 0.02) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 0
        assert len(stub.asked) == 12 and set(stub.keys) == {"Bearer secret"}
        assert {shape for (shape,) in stub.shapes} == {(1, 16, 64)}
        assert 1 < stub.busy <= 5
        assert texts(tmp_path / "answers.jsonl") == texts(local)
        rows, before = without_ids(tmp_path / "answers.jsonl"), without_ids(local)
        assert {row["metadata"]["server"] for row in rows} == {"llava"}
        assert {row["metadata"]["tokens"] for row in rows} == {16}
        assert rows[0]["metadata"]["config"] != before[0]["metadata"]["config"]
        # a finished run asks nothing
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 0 and len(stub.asked) == 12
    assert json.loads((tmp_path / "score.json").read_text())["server"] == "llava"
    # nor does it need the server, if the model is named
    assert run.main(arguments(data, tmp_path, "--server", stub.url, "--server-model", "llava")) == 0
    capsys.readouterr()
    with stub_vllm(*loaded, name="other") as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 1 and not stub.asked
    assert "server is 'llava' in the file, 'other' in this run" in capsys.readouterr().err
    assert run.main(arguments(data, tmp_path)) == 1
    assert "server is 'llava' in the file, not recorded in this run" in capsys.readouterr().err


def test_the_decoder_is_not_loaded(data, loaded, tmp_path):
    _, model, _, _ = load_pretrained_model(str(MODEL), device="cpu", decoder=False)
    own = {name: one for name, one in loaded[0].named_parameters() if not name.startswith("model.layers.")}
    found = dict(model.named_parameters())
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="were not loaded"):
        model(input_ids=torch.tensor([[1, 5]]))


@pytest.mark.parametrize("fault", [429, "close"])
def test_faults_that_pass_are_retried(shared, data, local, loaded, tmp_path, fault):
    with stub_vllm(*loaded, fault=lambda number: fault if number in (0, 6, 7) else None) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 0
        assert len(stub.asked) == 15
    assert texts(tmp_path / "answers.jsonl") == texts(local)


def test_a_reply_that_does_not_come_is_asked_for_again(shared, data, local, loaded, tmp_path, monkeypatch):
    retry(monkeypatch, 1.0, 9)
    with stub_vllm(*loaded, fault=lambda number: 2.0 if number == 3 else None) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 0
        assert len(stub.asked) > 12
    assert texts(tmp_path / "answers.jsonl") == texts(local)


@pytest.mark.parametrize("fault", [500, "close", "html", 403])
def test_a_server_that_dies_loses_nothing(shared, data, local, loaded, tmp_path, capsys, fault):
    with stub_vllm(*loaded, fault=lambda number: fault if number > 6 else None) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 1
        kept = len((tmp_path / "answers.jsonl").read_text().splitlines())
        assert kept == 7  # every answer that was given, also of the batch in which the server died
    error = capsys.readouterr().err
    expected = {
        500: "500: scripted",
        "close": "no answer after 3",
        "html": "'<!doctype html>",
        403: "OPENAI_API",
    }
    assert expected[fault] in error and "Traceback" not in error
    with stub_vllm(*loaded) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 0
        assert len(stub.asked) == 12 - kept
    assert texts(tmp_path / "answers.jsonl") == texts(local)


def test_a_question_that_the_server_refuses_is_skipped(shared, data, local, loaded, tmp_path, capsys):
    with stub_vllm(*loaded, fault=lambda number: 400 if number == 8 else None) as stub:
        assert run.main(arguments(data, tmp_path, "--server", stub.url)) == 1
        assert len(stub.asked) == 12
    assert "request rejected (400: scripted)" in capsys.readouterr().err
    assert len(texts(tmp_path / "answers.jsonl")) == 11


def asked(capsys, data: Path, tmp_path: Path, *more: str) -> str:
    """Run in vain and return the error."""
    assert run.main(arguments(data, tmp_path, *more)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (tmp_path / "answers.jsonl").exists()
    return error


def test_wrong_servers(shared, data, loaded, tmp_path, capsys):
    with stub_vllm(*loaded) as stub:
        assert "/wrong/v1/models: request rejected (404" in asked(
            capsys, data, tmp_path, "--server", f"{stub.url}/wrong"
        )
        error = asked(capsys, data, tmp_path, "--server", stub.url, "--server-model", "7b")
        assert "The model `7b` does not exist" in error and "Set --server-model to one of llava" in error
        port = stub.server.server_port
    error = asked(capsys, data, tmp_path, "--server", f"http://127.0.0.1:{port}")
    assert "no answer after 3 attempts" in error and "refused" in error and "that the server runs" in error
    assert "not an address" in asked(capsys, data, tmp_path, "--server", "localhost")
    with stub_vllm(*loaded, mm_embeds=False) as stub:
        assert "Start the server with --enable-mm-embeds" in asked(
            capsys, data, tmp_path, "--server", stub.url
        )
        assert len(stub.asked) == 1
    with stub_vllm(*loaded, fault=lambda number: "html") as stub:
        assert "reply is not JSON" in asked(capsys, data, tmp_path, "--server", stub.url)


@pytest.mark.parametrize("returns_ids", [True, False])
def test_another_chat_template_is_refused(shared, data, loaded, tmp_path, capsys, returns_ids):
    template = "USER: {{ messages[0]['content'] }} ASSISTANT:"
    with stub_vllm(*loaded, template=template, returns_ids=returns_ids) as stub:
        error = asked(capsys, data, tmp_path, "--server", stub.url)
        assert "of the server's prompt is" in error if returns_ids else "the server's prompt has" in error
        assert "--print-template vicuna_v1" in error and len(stub.asked) == 1


@pytest.mark.parametrize("mode", ["vicuna_v1", "llava_llama_2", "mpt", "v0", "chatml_direct"])
def test_printed_templates_make_our_prompts(loaded, mode, capsys):
    import jinja2

    from llava.conversation import conv_templates

    assert vllm_client.main(["--print-template", mode]) == 0
    content = '<image>\nIs it "red" {{ 1 }} ü?\nYes.'
    made = jinja2.Template(capsys.readouterr().out).render(messages=[{"role": "user", "content": content}])
    conversation = conv_templates[mode].copy()
    conversation.append_message(conversation.roles[0], content)
    conversation.append_message(conversation.roles[1], None)
    assert made == conversation.get_prompt()
    assert vllm_client.main([f"--print-template={mode}"]) == 0  # needs no other argument in this form either


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_beams", "2"], "without beams"),
        (["--method", "fastv"], "prunes inside the language model"),
        (["--tokens", "0"], "no image without tokens"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_it_is_asked(data, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        run.main(arguments(data, tmp_path, "--server", "http://127.0.0.1:9", *given))
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(arguments(data, tmp_path, "--server-model", "x"))
    assert "there is no --server" in capsys.readouterr().err


def test_the_client_asks_about_one_and_several_images(shared, loaded, capsys):
    model, tokenizer = loaded
    with stub_vllm(*loaded) as stub:
        base = ["--server", stub.url, "--model", str(MODEL), "--tokens", "9", "--max-new-tokens", "4"]
        assert vllm_client.main([*base, "--image", str(PHOTOS / "cat.jpg"), "--question", "What?"]) == 0
        out = capsys.readouterr()
        assert "9 visual tokens" in out.err and stub.shapes[0] == [(1, 9, 64)]
        images = [str(PHOTOS / name) for name in ("cat.jpg", "coffee.jpg")]
        assert vllm_client.main([*base, "--image", *images]) == 0
        assert stub.shapes[1] == [(9, 64), (9, 64)]
        assert torch.equal(stub.embeds[1][0], stub.embeds[0][0])  # the round trip changes nothing
        one = capsys.readouterr().out
        from llava.eval import run_llava

        assert (
            run_llava.main(
                [
                    *(
                        "--model-path",
                        str(MODEL),
                        "--image-file",
                        ",".join(images),
                        "--visual_token_num",
                        "9",
                    ),
                    *(
                        "--query",
                        "Describe this image in detail.",
                        "--temperature",
                        "0",
                        "--max_new_tokens",
                        "4",
                    ),
                    *("--conv-mode", "vicuna_v1"),
                ]
            )
            == 0
        )
        assert capsys.readouterr().out == one
        with pytest.raises(SystemExit):
            vllm_client.main([*base, "--image", images[0], "--question", "<image>?"])


def test_embeddings_are_saved_alone_and_read_back():
    import base64
    import io

    whole = torch.randn(1000, 8)
    for part in (whole[3:5], whole[:, :4][:2], whole.half()[1:3], whole[:2].requires_grad_()):
        raw = base64.b64decode(encode_embeds(part))
        assert len(raw) < 4000
        found = torch.load(io.BytesIO(raw), weights_only=True)
        assert torch.equal(found, part) and found.is_contiguous() and not found.requires_grad


def test_prompts_are_compared_token_by_token():
    row = Row((1, 5, -200, 7), torch.zeros(2, 4))
    assert prompt_difference(row, [1, 5, 32000, 32000, 7], None) is None
    assert prompt_difference(row, None, 5) is None and prompt_difference(row, None, None) is None
    assert "has 4 tokens, expected 5" in prompt_difference(row, [1, 5, 32000, 32000], None)
    assert "token 4 of the server's prompt is 8" in prompt_difference(row, [1, 5, 9, 9, 8], None)
    assert "has 6 tokens, expected 5" in prompt_difference(row, None, 6)


def test_sampling_has_a_seed_per_question():
    asked = VllmServer(endpoint.JsonEndpoint("http://127.0.0.1:9/v1"), None)
    body = asked._body(Prompt("a", Row((1,), None), 7), Decoding(temperature=0.5, top_p=0.9), {2})
    assert (body["seed"], body["top_p"], body["top_k"], body["stop_token_ids"]) == (7, 0.9, 50, [2])
    assert "model" not in body and body["messages"][0]["content"] == "a"
    with pytest.raises(ValueError, match="unknown conversation template"):
        chat_template("vicuna")
    assert StubVllm
