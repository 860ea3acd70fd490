"""The data set: bad samples stop a training or are replaced by the next good one, also in workers."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from helpers.golden_model import DATA
from llava.model.image_processor import load_image_processor
from llava.model.tokenizer import load_tokenizer
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.preprocess import training_template
from llava.train.samples import SampleError

PROCESSOR = load_image_processor(DATA / "ckpt_clip336p42")


def sample(question="What is it?", answer="A dog.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def with_image(name, **more):
    return sample("<image>\nWhat is it?", image=name, **more)


class Folder:
    """A folder with images and a data file."""

    def __init__(self, path):
        self.path = path
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(path / "good.png")
        Image.fromarray(pixels).resize((40, 90)).save(path / "tall.png")
        (path / "broken.png").write_bytes((path / "good.png").read_bytes()[:500])

    def dataset(self, data, max_length=2048, multimodal=True, **options):
        file = self.path / "data.json"
        file.write_text(json.dumps(data), encoding="utf-8")
        options = {"conversation": training_template("v1"), "image_folder": str(self.path), **options}
        tokenizer = load_tokenizer(DATA / "ckpt_llava15", model_max_length=max_length)
        processor = PROCESSOR if multimodal else None
        return LazySupervisedDataset(str(file), tokenizer, processor, is_multimodal=multimodal, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def indices(dataset):
    return [dataset[index]["index"] for index in range(len(dataset))]


def test_an_item_has_ids_pixels_and_where_they_come_from(folder):
    dataset = folder.dataset([with_image("good.png"), sample()], image_aspect_ratio="pad")
    image, text = dataset[0], dataset[1]
    assert image["image"].shape == (3, 336, 336) and image["image"].dtype == torch.float32
    assert image["image_size"] == (60, 40) and image["image_path"] == str(folder.path / "good.png")
    assert (image["input_ids"] == -200).sum() == 1 and image["index"] == 0
    assert not text["image"].any() and text["image"].shape == (3, 336, 336) and text["image_path"] is None
    assert text["image_size"] == (336, 336) and (text["labels"] >= 0).any()
    assert dataset.modality_lengths == [6, -5] and dataset.lengths == [134, 5]
    with pytest.raises(IndexError):
        dataset[2]
    batch = DataCollatorForSupervisedDataset(dataset.tokenizer)([image, text])
    assert batch["images"].shape == (2, 3, 336, 336) and batch["image_paths"][1] is None
    assert batch["attention_mask"].dtype == torch.bool


def test_the_end_of_an_answer_is_not_taken_for_padding(folder):
    """Many tokenizers pad with the token that ends an answer, and the attention mask drops padding."""
    dataset = folder.dataset([sample(), sample("Why is it?")], multimodal=False)
    for pad in ("</s>", "<unk>"):
        dataset.tokenizer.pad_token = pad
        items = [dataset[0], dataset[1]]
        mask = DataCollatorForSupervisedDataset(dataset.tokenizer)(items)["attention_mask"]
        assert mask.sum(1).tolist() == [len(item["input_ids"]) for item in items]
        assert not mask.all() and items[0]["labels"][-1] == dataset.tokenizer.eos_token_id


def test_text_alone_has_no_images(folder):
    dataset = folder.dataset([sample(), sample("Why?")], multimodal=False)
    assert set(dataset[0]) == {"input_ids", "labels", "index"}
    assert set(DataCollatorForSupervisedDataset(dataset.tokenizer)([dataset[0], dataset[1]])) == {
        "input_ids", "labels", "attention_mask",
    }  # fmt: skip


def test_anyres_images_are_lists_of_crops(folder):
    class Config:
        image_grid_pinpoints = ((336, 672), (672, 336))

    data = [with_image("good.png"), sample()]
    dataset = folder.dataset(data, image_aspect_ratio="anyres", model_config=Config)
    assert dataset[0]["image"].shape == (3, 3, 336, 336)
    batch = DataCollatorForSupervisedDataset(dataset.tokenizer)([dataset[0], dataset[1]])
    assert [one.shape[0] for one in batch["images"]] == [3, 3] and isinstance(batch["images"], list)
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        folder.dataset(data, image_aspect_ratio="anyres")


MIXED = [
    with_image("broken.png", id="b"),  # 0 -> 3, the next with an image
    sample(answer=""),  # 1 -> 2
    sample(),  # 2
    with_image("tall.png"),  # 3
    sample("a" * 4000),  # 4 -> 6: too long
    sample(answer="x</s>y"),  # 5 -> 6: mismatch
    sample("Why?"),  # 6
    with_image("none.png"),  # 7 -> 2, as the file is checked before
]


def test_bad_samples_are_replaced_by_the_next_good_one(folder):
    dataset = folder.dataset(MIXED, max_length=300, bad_samples="skip")
    assert sorted(dataset.bad) == [1, 7]
    assert indices(dataset) == [3, 2, 2, 3, 6, 6, 6, 3]
    kinds = {index: error.kind for index, error in dataset.bad.items()}
    assert kinds == {
        0: "broken image", 1: "empty answer", 4: "too long", 5: "mismatch", 7: "missing image",
    }  # fmt: skip
    assert indices(dataset) == [3, 2, 2, 3, 6, 6, 6, 3]  # and again, from what was found
    assert indices(folder.dataset(MIXED, max_length=300, bad_samples="skip"))[::-1] == [
        3,
        6,
        6,
        6,
        3,
        2,
        2,
        3,
    ]
    assert all(dataset.lengths) and dataset.modality_lengths[1] == dataset.modality_lengths[2]


def test_workers_report_what_they_skip(folder):
    dataset = folder.dataset([one for one in MIXED if one is not MIXED[7]], 300, bad_samples="skip")
    copy = pickle.loads(pickle.dumps(dataset))  # as for workers that are started, not forked
    assert copy[0]["index"] == 3
    batches = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert [item["index"] for batch in batches for item in batch] == [3, 2, 2, 3, 6, 6, 6]
    assert sorted(dataset.bad) == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("place", "reason"), [(0, "broken.png: a corrupt"), (4, "no answer begins within 300")]
)
def test_a_bad_sample_stops_with_its_name_also_from_a_worker(folder, place, reason):
    data = [sample(), MIXED[place]]
    dataset = folder.dataset(data, 300)
    for workers in (0, 1):
        with pytest.raises(SampleError) as error:
            list(DataLoader(dataset, batch_size=None, num_workers=workers))
        message = str(error.value)
        assert message.startswith(f"{folder.path / 'data.json'}: sample 1") and reason in message
        assert "Traceback" not in message and message.endswith("leave it out by --bad_samples skip.")


def test_a_file_with_bad_samples_is_refused_at_once(folder):
    with pytest.raises(SampleError, match="2 of 8 samples are bad: 1 x empty answer, 1 x missing image"):
        folder.dataset(MIXED)
    with pytest.raises(SampleError, match="no sample can be used"):
        folder.dataset([MIXED[1]], bad_samples="skip")
    dataset = folder.dataset([MIXED[0], MIXED[0]], bad_samples="skip")
    with pytest.raises(SampleError, match="no sample can be used. 2 of 2 samples are bad: 2 x broken image"):
        dataset[0]


def test_an_answer_behind_the_visual_tokens_is_too_long(folder):
    """The ids of the sample fit, but its answer is cut once 64 tokens stand for the image."""
    length = len(folder.dataset([with_image("good.png")])[0]["input_ids"])
    assert folder.dataset([with_image("good.png")], length + 63, image_tokens=64)[0]["index"] == 0
    with pytest.raises(SampleError, match="no answer begins within"):
        folder.dataset([with_image("good.png")], length + 40, image_tokens=64)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_samples": "ignore"}, "--bad_samples: 'ignore' is unknown"),
        ({"image_aspect_ratio": "stretch"}, "--image_aspect_ratio: 'stretch' is unknown"),
        ({"image_folder": None}, "Set --image_folder"),
        ({"multimodal": False}, "Set --vision_tower"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        folder.dataset([with_image("good.png")], **options)
