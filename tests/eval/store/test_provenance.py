"""The configuration of answers: what is hashed, what is recorded, and what a refusal says."""

from __future__ import annotations

import dataclasses

from llava.eval.store.provenance import Configuration, compared, differences

CONFIGURATION = Configuration(
    model="toy",
    weights="w",
    questions="q",
    conv_mode="vicuna_v1",
    dtype="float32",
    tower_dtype="float32",
    pruning=(("method", "vispruner"), ("tokens", 64), ("important_ratio", 0.5)),
    attn_implementation="sdpa",
    device="cpu",
    max_new_tokens=8,
)
SAMPLED = dataclasses.replace(CONFIGURATION, temperature=1.0, batch_size=64, top_k=50)


def test_the_hash_of_earlier_versions_stays():
    """Files that were written before a field existed have to be resumed."""
    assert CONFIGURATION.hash() == "9cdfb10ad677a1e3"
    assert CONFIGURATION.metadata()["preset"] == "exact"
    assert not {"batch_size", "top_k", "unused_settings"} & CONFIGURATION.metadata().keys()
    earlier = {key: value for key, value in CONFIGURATION.metadata().items() if key != "preset"}
    assert differences(earlier, CONFIGURATION) == []


def test_a_preset_is_another_configuration():
    published = dataclasses.replace(CONFIGURATION, preset="published")
    assert published.hash() != CONFIGURATION.hash()
    said = ["preset is 'exact' in the file, 'published' in this run"]
    earlier = {key: value for key, value in CONFIGURATION.metadata().items() if key != "preset"}
    assert differences(earlier, published) == differences(CONFIGURATION.metadata(), published) == said


def test_the_batch_of_sampled_answers_is_part_of_the_configuration():
    other = dataclasses.replace(SAMPLED, batch_size=16)
    assert other.hash() != SAMPLED.hash() and SAMPLED.metadata()["top_k"] == 50
    (said,) = differences(SAMPLED.metadata(), other)
    assert said.startswith("batch_size is 64 in the file, 16 in this run (sampled answers depend on")
    earlier = {key: value for key, value in SAMPLED.metadata().items() if key not in ("batch_size", "top_k")}
    assert differences(earlier, SAMPLED)[0].startswith(
        "batch_size is not recorded in the file, 64 in this run ("
    )


def test_settings_of_the_checkpoint_that_are_not_used_are_recorded():
    one = dataclasses.replace(CONFIGURATION, unused_settings=(("repetition_penalty", 1.2),))
    assert one.metadata()["unused_settings"] == {"repetition_penalty": 1.2}
    assert one.hash() != CONFIGURATION.hash()
    (said,) = differences(CONFIGURATION.metadata(), one)
    assert said == "unused_settings is not recorded in the file, {'repetition_penalty': 1.2} in this run"


def test_batch_size_and_graphs_of_greedy_answers_are_recorded_and_not_compared():
    one = dataclasses.replace(CONFIGURATION, batch_size=256, graphs=True)
    assert one.metadata()["batch_size"] == 256 and one.metadata()["graphs"] is True
    assert one.hash() == CONFIGURATION.hash()
    assert differences(one.metadata(), CONFIGURATION) == differences(CONFIGURATION.metadata(), one) == []
    longer = dataclasses.replace(one, max_new_tokens=9, batch_size=64, graphs=False)
    assert differences(one.metadata(), longer) == ["max_new_tokens is 8 in the file, 9 in this run"]
    assert compared(one.flat()) == compared(CONFIGURATION.flat())
    eager = dataclasses.replace(SAMPLED, graphs=True)
    assert eager.hash() == SAMPLED.hash() and differences(eager.metadata(), SAMPLED) == []


def test_compiled_layers_are_another_configuration():
    compiled = dataclasses.replace(CONFIGURATION, compile=True)
    assert compiled.metadata()["compile"] is True and "compile" not in CONFIGURATION.metadata()
    assert compiled.hash() != CONFIGURATION.hash()
    (said,) = differences(CONFIGURATION.metadata(), compiled)
    assert said == "compile is not recorded in the file, True in this run"
    (said,) = differences(compiled.metadata(), CONFIGURATION)
    assert said == "compile is True in the file, not recorded in this run"
