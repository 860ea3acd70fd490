"""The bundled model on two dozen held-out images, from the image file to the score."""

import json

from llava.eval import sweep


def test_the_bundled_model_answers_and_vispruner_beats_random(tmp_path, capsys):
    arguments = ["--limit", "144", "--methods", "none,random,vispruner", "--tokens", "32", "--ratios", "0.5"]
    assert sweep.main([*arguments, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Using the ") and "model and data of playground/tiny" in said[0]
    (table,) = json.loads(said[-1])["tables"]
    score = {cell["method"]: cell["score"] for cell in table["cells"]}
    assert table["images"] == 24 and [cell["visual_tokens"] for cell in table["cells"]] == [576, 32, 32]
    assert score["none"] > 90
    assert score["vispruner"] > score["random"] + 5
