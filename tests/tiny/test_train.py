"""Training: packed questions are the prompts asked later, and a resumed run is the same run."""

import json

import numpy as np
import pytest
import torch

from llava.tiny import export, questions, tokenizer, train, world
from llava.tiny.features import GRID, PATCH, FeatureStore, patch_labels, pixels

torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shipped = train.Path(train.__file__).parents[2] / "playground" / "tiny" / "llava-tiny"
    for name in export.TOKENIZER_FILES:
        (folder / name).write_bytes((shipped / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random features of a dozen pictures: nothing here needs the tower."""
    store = FeatureStore(tmp_path_factory.mktemp("features"), 12)
    for row in range(12):
        store.write(row, torch.randn(576, 384))
    return store


RECIPE = train.Recipe(
    pictures=12,
    validation=(6, 10),
    phases=(
        train.Phase(2, 2, (16, 32), pool=6, averaged=True),
        train.Phase(2, 1, (576, 576), (1.0, 0.0), mixture="late", pool=8, wide=True, averaged=True),
    ),
    questions=2,
    width=32,
    layers=1,
    heads=1,
    mlp=64,
    bfloat16=False,
)


def test_store_keeps_rows_and_grows(tmp_path):
    store = FeatureStore(tmp_path, 2)
    row = torch.randn(576, 384)
    store.write(1, row)
    larger = FeatureStore(tmp_path, 3)
    assert larger.done.tolist() == [0, 1, 0]
    assert torch.equal(larger.read(np.array([1]))[0], row.to(torch.bfloat16).float())


def test_patch_labels_point_at_things():
    for seed in range(5):
        image, scene = world.draw(seed)
        tensor, (x0, y0) = pixels(image)
        assert tensor.shape == (3, 336, 336)
        labels = patch_labels(scene).reshape(GRID, GRID)
        for thing in scene.things:
            row, column = int((thing.center[1] + y0) // PATCH), int((thing.center[0] + x0) // PATCH)
            assert (world.THINGS + world.WORDS)[labels[row, column]] == thing.name


def test_packed_questions_are_single_prompts(folder, store):
    """Logits of every answer in a packed batch equal those of its prompt alone."""
    trainer = train.Trainer(RECIPE, store, folder)
    rs = np.random.RandomState(0)
    asked, features, patches = trainer.batch(np.array([0, 1]), rs, 24)
    with torch.no_grad():
        _, _, _, logits, labels, _ = trainer.losses(asked, features, patches)
        student = trainer.student
        visual = student.model.mm_projector(features)
        place = 0
        for row, items in enumerate(asked):
            for _, text, answer in items:
                prompt = trainer.tokens.encode(f"\n{text} ASSISTANT:")
                target = [*trainer.tokens.encode(answer), 2]
                front = student.model.embed_tokens(torch.tensor([trainer.packer.prefix]))
                back = student.model.embed_tokens(torch.tensor([prompt + target[:-1]]))
                embeds = torch.cat([front, visual[row : row + 1], back], dim=1)
                hidden = student.model(inputs_embeds=embeds).last_hidden_state[0, -len(target) :]
                assert torch.allclose(student.lm_head(hidden), logits[place : place + len(target)], atol=2e-4)
                assert labels[labels != train.IGNORE][place : place + len(target)].tolist() == target
                place += len(target)
        assert place == len(logits)


def test_prompt_is_llavas(folder):
    """The training prompt is vicuna_v1's, tokenised as LLaVA tokenises it."""
    import sentencepiece

    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token
    from llava.model.tokenizer import load_tokenizer

    text = questions.existence("dog") + questions.SHORT
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" + text)
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), load_tokenizer(folder), IMAGE_TOKEN_INDEX)
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    packer = train.Packer(tokens)
    assert ids == packer.prefix + [IMAGE_TOKEN_INDEX] + packer.encode(f"\n{text} ASSISTANT:")


def test_hints_stand_at_the_words_they_are_about(folder):
    import sentencepiece

    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    packer = train.Packer(tokens)

    def hints(kind, text, answer, wide):
        prompt = packer.encode(f"\n{text} ASSISTANT:")
        found = packer.hints(kind, prompt, answer, wide)
        return [(tokens.decode([prompt[k]]), tokens.decode([token])) for k, token in found.items()]

    asked = questions.existence("dog") + questions.SHORT
    assert hints("exist", asked, "No", False) == hints("exist", asked, "No", True) == [("dog", "No")]
    asked = questions.lettered("图中有哪一个？", ["时钟", "狗", "书"]) + questions.LETTER_CN
    assert hints("choice", asked, "B", False) == []
    assert hints("choice", asked, "B", True) == [("时钟", "No"), ("狗", "Yes"), ("书", "No")]
    asked = "What word is written on the sign?" + questions.OCR + "STOP, EXIT" + questions.SHORT
    assert hints("read", asked, "EXIT", True) == [("STOP", "No"), ("EXIT", "Yes")]
    assert hints("position", "Is the dog above the cat?", "Yes", True) == [("cat", "Yes")]


def test_every_name_is_one_piece(folder):
    import sentencepiece

    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name in (*world.THINGS, *world.COLORS, *world.WORDS, *questions.CHINESE.values()):
        assert len(tokens.encode(name)) == 1, name
    assert tokenizer.VOCABULARY == len(tokens)


def test_resuming_is_exact(folder, store, tmp_path):
    def fresh(name):
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        (work / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        return train.Trainer(RECIPE, store, work)

    whole = fresh("whole")
    losses = [whole.train_step()["loss"] for _ in range(4)]
    first = fresh("parts")
    parts = [first.train_step()["loss"] for _ in range(2)]
    first.save()
    second = fresh("parts")
    second.resume()
    assert second.step == 2
    parts += [second.train_step()["loss"] for _ in range(2)]
    assert parts == losses
    for a, b in zip(whole.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_ships_is_the_mean_of_the_ends(folder, store, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    first = train.Trainer(RECIPE, store, tmp_path)
    first.train_step()
    first.save()
    trainer = train.Trainer(RECIPE, store, tmp_path)  # goes on from the file
    trainer.resume()
    ends = []
    for step in (2, 3, 4):
        trainer.train_step()
        trainer.keep_end()
        if step != 3:
            ends.append([value.detach().clone() for value in trainer.student.parameters()])
    trainer.save()
    again = train.Trainer(RECIPE, store, tmp_path)
    again.resume()
    found = again.finish()
    assert again.log[-1] == {"averaged": 2, "step": 4, "validation": found}
    for one, two, mean in zip(*ends, again.student.parameters(), strict=True):
        assert torch.equal((one + two) / 2, mean)


def test_another_recipe_is_refused(folder, store, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    train.Trainer(RECIPE, store, tmp_path).save()
    other = train.Recipe(**{**train.asdict(RECIPE), "seed": 5})
    with pytest.raises(SystemExit, match="another recipe"):
        train.Trainer(other, store, tmp_path).resume()


def test_export_is_a_llava_checkpoint(folder, store, tmp_path):
    """The folder loads through the same door as every checkpoint, weights equal to the bit of float16."""
    from llava.model.builder import load_pretrained_model

    trainer = train.Trainer(RECIPE, store, folder)
    export.export(trainer.student, folder, tmp_path / "llava-new", train.asdict(RECIPE), train.TOWER_NAME)
    _, model, _, context = load_pretrained_model(str(tmp_path / "llava-new"), None, "llava-new", device="cpu")
    assert context == 2048 and model.pruner.name == "none"
    loaded = dict(model.named_parameters())
    for name, tensor in trainer.student.named_parameters():
        assert torch.equal(loaded[name], tensor.detach().half().float()), name


def test_anyres_variant_has_the_same_weights(folder, store, tmp_path):
    from llava.model.builder import load_pretrained_model

    trainer = train.Trainer(RECIPE, store, folder)
    base, output = tmp_path / "llava-new", tmp_path / "llava-new-anyres"
    export.export(trainer.student, folder, base, train.asdict(RECIPE), train.TOWER_NAME)
    export.export_anyres(base, output)
    assert (output / "model-00001-of-00002.safetensors").resolve() == (base / "model.safetensors").resolve()
    tokenizer, model, _, context = load_pretrained_model(str(output), None, output.name, device="cpu")
    assert context == 4096 and model.config.image_aspect_ratio == "anyres"
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert torch.equal(model.model.image_newline, model.model.embed_tokens.weight[newline])


def test_curves_are_drawn(tmp_path):
    log = [{"step": k, "loss": 1 / k, "align": 2 / k, "validation": {"exist": 0.5}} for k in (50, 100)]
    log.append({"step": 100, "averaged": 2, "validation": {"exist": 0.6}})
    export.curves(log, train.asdict(RECIPE), tmp_path)
    assert (tmp_path / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [
        json.loads(line)["step"] for line in (tmp_path / "training_log.jsonl").read_text().splitlines()
    ] == [50, 100, 100]
