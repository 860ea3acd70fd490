"""Every supported checkpoint format in, one model's weights and configuration out.

`find` turns names into folders, `folder` selects the files of a folder and of its base that make the model,
`config` reads config.json and `tower` finds the vision tower it names. `read`, `keys` and `lora` produce
named tensors, `fill` assigns them to a model, `quantize` and `placement` decide in which form and on which
device. `fingerprint` identifies a checkpoint. `llava.model.builder.load_pretrained_model` uses all of them.
"""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or the keys, and the fix."""
