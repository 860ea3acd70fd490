"""The training command: invalid arguments are refused before anything is computed."""

import pytest

from llava.tiny import train


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-images", "210"], "--num-images: expected at least 212, got 210"),
        (["--pictures", "210"], "--num-images: expected at least 212, got 210"),
        (["--scale", "0"], "--scale: expected a number above 0"),
        (["--num-workers", "0"], "--num-workers"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "prepare", lambda *_, **__: pytest.fail("started to encode images"))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
