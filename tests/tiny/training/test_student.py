"""Packing: packed questions equal the prompts of inference."""

import numpy as np
import torch

from llava.tiny import world
from llava.tiny.training import tokenizer
from llava.tiny.training.student import IGNORE, Packer
from llava.tiny.training.trainer import Trainer
from llava.tiny.world import questions


def test_packed_questions_are_single_prompts(folder, store, recipe):
    """Logits of every answer in a packed batch equal those of its prompt alone."""
    trainer = Trainer(recipe, store, folder)
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
                assert labels[labels != IGNORE][place : place + len(target)].tolist() == target
                place += len(target)
        assert place == len(logits)


def test_the_training_prompt_equals_that_of_llava(folder):
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
    packer = Packer(tokens)
    assert ids == packer.prefix + [IMAGE_TOKEN_INDEX] + packer.encode(f"\n{text} ASSISTANT:")


def test_hints_are_at_the_object_in_the_question(folder):
    import sentencepiece

    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    packer = Packer(tokens)

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


def test_every_name_is_a_single_piece(folder):
    import sentencepiece

    tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name in (*world.OBJECTS, *world.COLORS, *world.WORDS, *questions.CHINESE.values()):
        assert len(tokens.encode(name)) == 1, name
    assert tokenizer.VOCABULARY == len(tokens)
