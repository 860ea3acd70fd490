"""What lies beside an answer file."""

from __future__ import annotations

from llava.eval.store.run_record import FAILURES, beside


def test_answer_files_without_a_suffix_do_not_share_their_lists(tmp_path):
    names = [beside(tmp_path / name, FAILURES).name for name in ("r_0.5.jsonl", "r_0.5", "r_0.25")]
    assert names == ["r_0.5.failures.jsonl", "r_0.5.failures.jsonl", "r_0.25.failures.jsonl"]
