"""Every supported checkpoint format in, one model's weights and configuration out.

`find` turns names into folders, `folder` selects the files of a folder and of its base that make the model,
`entries` reads and checks all JSON files, `config` interprets config.json and `tower` finds the vision tower
it names. `read`, `keys` and `lora` produce named tensors, `fill` assigns them to a model, `quantize` and
`placement` decide in which form and on which device. `fingerprint` identifies a checkpoint.
`llava.model.builder.load_pretrained_model` uses all of them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or the keys, and the fix."""


class CheckpointWarning(UserWarning):
    """A checkpoint that was loaded, but not as its files claim. The loaded model keeps the text."""


def warn(text: str) -> None:
    """Warn about a checkpoint; `load_pretrained_model` also keeps the text in `model.loading_notes`."""
    warnings.warn(text, CheckpointWarning, stacklevel=3)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Pass all warnings of the block on when it ends, and return the texts of `warn`, filled then."""
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as recorded:
            caught = recorded
            warnings.simplefilter("always", CheckpointWarning)
            yield texts
    finally:
        own = (str(one.message) for one in caught if issubclass(one.category, CheckpointWarning))
        texts += dict.fromkeys(own)
        for one in caught:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
