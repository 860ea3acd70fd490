"""Attention analysis of a LLaVA model: where the decoder and the vision tower look.

    from llava.analysis.attention.reader import AttentionReader

    reader = AttentionReader(engine)
    found = analyze([reader.read(question) for question in questions])

`rows.py` recomputes the attention of a layer beside its fused kernels, `reader.py` runs one question,
`records.py` keeps samples on disk so that an analysis resumes, `statistics.py` holds the definitions of all
curves. Layers, tokens and quarters count from 0.
"""

from llava.analysis.attention.collect import Collected, collect, records_file
from llava.analysis.attention.records import Records
from llava.analysis.attention.rows import KINDS, AttentionSample, UnreadableSample
from llava.analysis.attention.statistics import AttentionStatistics, Curves, analyze, top_mask

__all__ = [
    "KINDS",
    "AttentionSample",
    "AttentionStatistics",
    "Collected",
    "Curves",
    "Records",
    "UnreadableSample",
    "analyze",
    "collect",
    "records_file",
    "top_mask",
]
