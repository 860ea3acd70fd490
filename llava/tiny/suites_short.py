"""Embedded sets that are answered in a word: VQAv2, GQA, VizWiz, TextVQA; and MM-Vet, in a sentence.

Every function takes the root of all sets and its pictures, writes the official files and returns the number
of questions. The readers under `llava.eval.benchmarks` say what the official files are; nothing here scores.
"""

from __future__ import annotations

from pathlib import Path

from . import questions, world
from .questions import OCR, SHORT, UNANSWERABLE
from .suites import Asker, Picture, evenly, humans, link, shuffled, write_json, write_jsonl

SIGNS = 0.5  # pictures with a sign per picture of the other sets
FREE_FORM = 0.15  # of the pictures


def vqav2(root: Path, pictures: list[Picture]) -> int:
    """Counts from 1 to 4 as evenly as the pictures allow, colours of every other picture's shapes, yes/no."""
    folder, asker = root / "vqav2", Asker(11)
    counts: dict[str, list] = {number: [] for number in "1234"}
    for picture in pictures:
        for _ in range(3):
            drawn = asker.draw(questions.count, picture)
            if drawn:
                counts[drawn[1]].append(("number", "how many", picture, *drawn))
    rows = evenly({key: shuffled(items, 12) for key, items in counts.items()}, len(pictures))
    rows += [("other", "what color is the", *row) for row in _colours(asker, pictures[::2])]
    checks = (
        (questions.exist, "is there a"),
        (questions.color_check, "is the"),
        (questions.count_check, "are there"),
    )
    for place, (maker, kind) in enumerate(checks):
        asked = asker.yes_no(maker, pictures[place % 2 :: 2])
        rows += [("yes/no", kind, *row) for row in asked]
    rows.sort(key=lambda row: row[2].number)
    asked, official, truth = [], [], []
    for number, (answer_type, question_type, picture, text, answer) in enumerate(rows):
        identity = picture.number * 1000 + number % 1000
        bare = text.removesuffix(SHORT)
        asked.append({"question_id": identity, "image": picture.file, "text": text, "category": "default"})
        official.append({"image_id": picture.number, "question": bare, "question_id": identity})
        truth.append(
            {
                "question_type": question_type,
                "multiple_choice_answer": answer.lower(),
                "answers": humans(answer.lower()),
                "image_id": picture.number,
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
    link(root, "vqav2/val2014")
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": official},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": truth})
    write_jsonl(folder / "llava_vqav2_mscoco_val2014.jsonl", asked)
    return len(asked)


def _colours(asker: Asker, pictures: list[Picture]) -> list[tuple[Picture, str, str]]:
    """Every shape of every picture, and its colour."""
    found = []
    for picture in pictures:
        while drawn := asker.draw(questions.color, picture):
            found.append((picture, *drawn))
    return found


def gqa(root: Path, pictures: list[Picture]) -> int:
    """Objects, attributes and relations to verify (half of them true), colours to name."""
    folder, asker = root / "gqa", Asker(21)
    rows = [("exist", *row) for row in asker.yes_no(questions.exist, pictures[1::2])]
    rows += [("color", *row) for row in _colours(asker, pictures[1::2])]
    rows += [("color_check", *row) for row in asker.yes_no(questions.color_check, pictures)]
    rows += [("position", *row) for row in asker.yes_no(questions.position, pictures)]
    rows.sort(key=lambda row: row[1].number)
    asked, truth = [], {}
    for number, (kind, picture, text, answer) in enumerate(rows):
        identity = f"{picture.number:05d}{number:05d}"
        asked.append({"question_id": identity, "image": picture.file, "text": text, "category": "default"})
        truth[identity] = _gqa_entry(identity, kind, picture, text.removesuffix(SHORT), answer.lower())
    link(root, "gqa/data/images")
    write_json(folder / "data" / "testdev_balanced_questions.json", truth)
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", asked)
    return len(asked)


def _gqa_entry(identity: str, kind: str, picture: Picture, text: str, answer: str) -> dict:
    """What GQA says about a question: its program, types, groups and answers."""
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
        "imageId": Path(picture.file).stem,
        "isBalanced": True,
        "groups": {"global": group, "local": f"10-{program[0][1]}_{kind}"},
        "answer": answer,
        "semanticStr": "->".join(f"{one['operation']}: {one['argument']}" for one in semantic),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": dict(zip(("detailed", "semantic", "structural"), types, strict=True)),
        "fullAnswer": whole,
    }


def vizwiz(root: Path, pictures: list[Picture]) -> int:
    """One question per picture: the colour of a shape; four in ten ask about a shape that is not there."""
    folder, asker = root / "vizwiz", Asker(31)
    shaped = [picture for picture in pictures if picture.scene.names("shape")]
    spare = max(0, len(shaped) - round(0.6 * len(pictures)))
    answerable = {picture.number for picture in shaped[spare:]}
    asked, truth = [], []
    for number, picture in enumerate(pictures):
        there = picture.number in answerable
        drawn = asker.draw(
            questions.unanswerable,
            picture,
            lambda _, answer, there=there: (answer != "unanswerable") == there,
        )
        assert drawn, f"no question about picture {picture.number}"
        asked.append({"question_id": number, "image": picture.file, "text": drawn[0], "category": "default"})
        truth.append(
            {
                "image": picture.file,
                "question": drawn[0].removesuffix(UNANSWERABLE + SHORT),
                "answers": [{"answer": drawn[1], "answer_confidence": "yes"} for _ in range(10)],
                "answer_type": "other" if there else "unanswerable",
                "answerable": int(there),
            }
        )
    link(root, "vizwiz/val")
    write_json(folder / "val.json", truth)
    write_jsonl(folder / "llava_val.jsonl", asked)
    return len(asked)


def textvqa(root: Path, pictures: list[Picture], quality: int = 70) -> int:
    """The word of every sign, in pictures of its own (few of the others have one), half with OCR tokens.

    An OCR line names the word among two others, in any order; without one the word must be seen.
    """
    folder = root / "textvqa"
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    wanted, seed = max(1, round(SIGNS * len(pictures))), pictures[-1].scene.seed + 1
    asked, truth = [], []
    while len(asked) < wanted:
        image, scene = world.draw(seed)
        seed += 1
        words = scene.names("word")
        if not words:
            continue
        picture = Picture(len(pictures) + len(asked) + 1, scene)
        name = Path(picture.file).stem
        with_line = len(asked) % 2 == 0
        text, answer = _reading(picture, with_line)
        image.save(folder / "train_images" / picture.file, quality=quality, method=6)
        asked.append({"question_id": name, "image": picture.file, "text": text, "category": "default"})
        truth.append(
            {
                "question": text.split("\n")[0],
                "image_id": name,
                "question_id": len(asked),
                "image_classes": [],
                "image_width": image.size[0],
                "image_height": image.size[1],
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


def _reading(picture: Picture, with_line: bool) -> tuple[str, str]:
    """The question about a sign, with a line of three OCR tokens or without one."""
    drawn = Asker(41).draw(
        questions.read, picture, lambda text, _: text.count(", ") == 2 if with_line else OCR not in text
    )
    assert drawn
    return drawn


def mmvet(root: Path, pictures: list[Picture]) -> int:
    """Free form: what is in the picture? The ground truth names all of it, for a judge."""
    folder, asker, asked, truth = root / "mm-vet", Asker(51), [], {}
    for picture in pictures[: max(1, round(FREE_FORM * len(pictures)))]:
        drawn = asker.draw(questions.inventory, picture)
        assert drawn
        number = len(asked)
        asked.append({"image": picture.file, "text": drawn[0], "category": "conv", "question_id": number})
        truth[f"v1_{number}"] = {
            "imagename": picture.file,
            "question": drawn[0],
            "answer": drawn[1].replace(", ", "<AND>"),
            "capability": ["rec"],
            "imagesource": "embedded world",
        }
    link(root, "mm-vet/images")
    write_json(folder / "mm-vet.json", truth)
    write_jsonl(folder / "llava-mm-vet.jsonl", asked)
    return len(asked)
