"""Bundled benchmarks with one-word answers (VQAv2, GQA, VizWiz, TextVQA) and with free-form answers (MM-Vet).

Every function takes the root of all benchmarks and the images, writes the official files and returns the
number of questions. The readers in `llava.eval.benchmarks` describe the official files.
"""

from __future__ import annotations

from pathlib import Path

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.questions import OCR, SHORT, UNANSWERABLE

from .common import (
    BenchmarkImage,
    QuestionSampler,
    balanced,
    link_images,
    reference_answers,
    shuffled,
    write_json,
    write_jsonl,
)

SIGNS = 0.5  # number of TextVQA images, as a fraction of the images of the other benchmarks
FREE_FORM = 0.15  # fraction of the images


def vqav2(root: Path, images: list[BenchmarkImage]) -> int:
    """Write VQAv2: counts from 1 to 4 as balanced as possible, colors in every other image, yes/no."""
    folder, sampler = root / "vqav2", QuestionSampler(11)
    counts: dict[str, list] = {number: [] for number in "1234"}
    for image in images:
        for _ in range(3):
            drawn = sampler.sample(questions.count, image)
            if drawn:
                counts[drawn[1]].append(("number", "how many", image, *drawn))
    rows = balanced({key: shuffled(items, 12) for key, items in counts.items()}, len(images))
    rows += [("other", "what color is the", *row) for row in _colors(sampler, images[::2])]
    checks = (
        (questions.exist, "is there a"),
        (questions.color_check, "is the"),
        (questions.count_check, "are there"),
    )
    for offset, (maker, kind) in enumerate(checks):
        asked = sampler.yes_no(maker, images[offset % 2 :: 2])
        rows += [("yes/no", kind, *row) for row in asked]
    rows.sort(key=lambda row: row[2].number)
    asked, official, truth = [], [], []
    for number, (answer_type, question_type, image, text, answer) in enumerate(rows):
        identity = image.number * 1000 + number % 1000
        bare = text.removesuffix(SHORT)
        asked.append({"question_id": identity, "image": image.file, "text": text, "category": "default"})
        official.append({"image_id": image.number, "question": bare, "question_id": identity})
        truth.append(
            {
                "question_type": question_type,
                "multiple_choice_answer": answer.lower(),
                "answers": reference_answers(answer.lower()),
                "image_id": image.number,
                "answer_type": answer_type,
                "question_id": identity,
            }
        )
    about = {
        "info": {"description": "embedded world, VQA v2 layout"},
        "license": {},
        "data_type": "mscoco",
        "data_subtype": "val2014",
    }
    link_images(root, "vqav2/val2014")
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": official},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": truth})
    write_jsonl(folder / "llava_vqav2_mscoco_val2014.jsonl", asked)
    return len(asked)


def _colors(sampler: QuestionSampler, images: list[BenchmarkImage]) -> list[tuple[BenchmarkImage, str, str]]:
    """Ask for the color of every shape of every image."""
    found = []
    for image in images:
        while drawn := sampler.sample(questions.color, image):
            found.append((image, *drawn))
    return found


def gqa(root: Path, images: list[BenchmarkImage]) -> int:
    """Write GQA: objects, attributes and relations to verify (half are true), colors to name."""
    folder, sampler = root / "gqa", QuestionSampler(21)
    rows = [("exist", *row) for row in sampler.yes_no(questions.exist, images[1::2])]
    rows += [("color", *row) for row in _colors(sampler, images[1::2])]
    rows += [("color_check", *row) for row in sampler.yes_no(questions.color_check, images)]
    rows += [("position", *row) for row in sampler.yes_no(questions.position, images)]
    rows.sort(key=lambda row: row[1].number)
    asked, truth = [], {}
    for number, (kind, image, text, answer) in enumerate(rows):
        identity = f"{image.number:05d}{number:05d}"
        asked.append({"question_id": identity, "image": image.file, "text": text, "category": "default"})
        truth[identity] = _gqa_entry(identity, kind, image, text.removesuffix(SHORT), answer.lower())
    link_images(root, "gqa/data/images")
    write_json(folder / "data" / "testdev_balanced_questions.json", truth)
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", asked)
    return len(asked)


def _gqa_entry(identity: str, kind: str, image: BenchmarkImage, text: str, answer: str) -> dict:
    """Build the annotation of a question: program, types, groups and answers."""
    words = text.rstrip("?").split()
    if kind == "exist":
        program = [("select", words[3], []), ("exist", "?", [0])]
        types, group = ("exist", "obj", "verify"), None
    elif kind == "color":
        program = [("select", words[4], []), ("query: color", "?", [0])]
        types, group = ("categoryAttr", "attr", "query"), "color"
    elif kind == "color_check" and words[1] == "the":
        program = [("select", words[2], []), ("verify color", words[3], [0])]
        types, group = ("verifyAttr", "attr", "verify"), None
    elif kind == "color_check":
        program = [("select", words[4], []), ("filter color", words[3], [0]), ("exist", "?", [1])]
        types, group = ("existAttr", "attr", "verify"), None
    else:
        relation = " ".join(words[3:-2])
        program = [("select", words[-1], []), ("verify rel", f"{words[2]},{relation},s", [0])]
        types, group = ("relVerify", "rel", "verify"), None
    semantic = [
        {"operation": operation, "dependencies": depends, "argument": argument}
        for operation, argument, depends in program
    ]
    whole = {"Yes": "Yes.", "No": "No."}.get(answer.capitalize(), f"It is {answer}.")
    return {
        "semantic": semantic,
        "entailed": [],
        "equivalent": [identity],
        "question": text,
        "imageId": Path(image.file).stem,
        "isBalanced": True,
        "groups": {"global": group, "local": f"10-{program[0][1]}_{kind}"},
        "answer": answer,
        "semanticStr": "->".join(f"{one['operation']}: {one['argument']}" for one in semantic),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": dict(zip(("detailed", "semantic", "structural"), types, strict=True)),
        "fullAnswer": whole,
    }


def vizwiz(root: Path, images: list[BenchmarkImage]) -> int:
    """Write VizWiz: the color of one shape per image; four in ten ask about an absent shape."""
    folder, sampler = root / "vizwiz", QuestionSampler(31)
    shaped = [image for image in images if image.scene.names("shape")]
    spare = max(0, len(shaped) - round(0.6 * len(images)))
    answerable = {image.number for image in shaped[spare:]}
    asked, truth = [], []
    for number, image in enumerate(images):
        there = image.number in answerable
        drawn = sampler.sample(
            questions.unanswerable,
            image,
            lambda _, answer, there=there: (answer != "unanswerable") == there,
        )
        assert drawn, f"no question about image {image.number}"
        asked.append({"question_id": number, "image": image.file, "text": drawn[0], "category": "default"})
        truth.append(
            {
                "image": image.file,
                "question": drawn[0].removesuffix(UNANSWERABLE + SHORT),
                "answers": [{"answer": drawn[1], "answer_confidence": "yes"} for _ in range(10)],
                "answer_type": "other" if there else "unanswerable",
                "answerable": int(there),
            }
        )
    link_images(root, "vizwiz/val")
    write_json(folder / "val.json", truth)
    write_jsonl(folder / "llava_val.jsonl", asked)
    return len(asked)


def textvqa(root: Path, images: list[BenchmarkImage]) -> int:
    """Write TextVQA: the word of a sign, on images of its own, since few of the shared ones have a sign.

    Half of the prompts have a line of three OCR tokens in random order, one of which is the word.
    """
    folder = root / "textvqa"
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    wanted, seed = max(1, round(SIGNS * len(images))), images[-1].scene.seed + 1
    asked, truth = [], []
    while len(asked) < wanted:
        pixels, scene = world.draw(seed, images[-1].scene.world)
        seed += 1
        words = scene.names("word")
        if not words:
            continue
        image = BenchmarkImage(len(images) + len(asked) + 1, pixels, scene)
        name = Path(image.file).stem
        with_line = len(asked) % 2 == 0
        text, answer = _reading(image, with_line)
        image.save(folder / "train_images")
        asked.append({"question_id": name, "image": image.file, "text": text, "category": "default"})
        truth.append(
            {
                "question": text.split("\n")[0],
                "image_id": name,
                "question_id": len(asked),
                "image_classes": [],
                "image_width": scene.size[0],
                "image_height": scene.size[1],
                "set_name": "val",
                "seed": scene.seed,
                "answers": [answer.lower()] * 10,
            }
        )
    write_json(
        folder / "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": truth},
    )
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", asked)
    return len(asked)


def _reading(image: BenchmarkImage, with_line: bool) -> tuple[str, str]:
    """Sample the question about a sign, with or without a line of three OCR tokens."""
    drawn = QuestionSampler(41).sample(
        questions.read, image, lambda text, _: text.count(", ") == 2 if with_line else OCR not in text
    )
    assert drawn
    return drawn


def mmvet(root: Path, images: list[BenchmarkImage]) -> int:
    """Write MM-Vet: a free-form question about the content; the ground truth lists all objects."""
    folder, sampler, asked, truth = root / "mm-vet", QuestionSampler(51), [], {}
    for image in images[: max(1, round(FREE_FORM * len(images)))]:
        drawn = sampler.sample(questions.inventory, image)
        assert drawn
        number = len(asked)
        asked.append({"image": image.file, "text": drawn[0], "category": "conv", "question_id": number})
        truth[f"v1_{number}"] = {
            "imagename": image.file,
            "question": drawn[0],
            "answer": drawn[1].replace(", ", "<AND>"),
            "capability": ["rec"],
            "imagesource": "embedded world",
        }
    link_images(root, "mm-vet/images")
    write_json(folder / "mm-vet.json", truth)
    write_jsonl(folder / "llava-mm-vet.jsonl", asked)
    return len(asked)
