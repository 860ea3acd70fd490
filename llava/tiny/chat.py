"""Write text-only conversations, answered by the language model of `smol` itself, to train it with.

    python -m llava.tiny.chat --output chat.json       # about 450 conversations; an interrupted run resumes

A model that is trained on questions about images alone forgets how to talk: these conversations, in LLaVA's
format and without images, keep it from that. Prompts are generated from the lists below. Answers are greedy,
repeat no phrase of 8 tokens, have at most 120 tokens, and end with a sentence.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava.argtypes import at_least

from . import base
from .registry import FetchError

LONGEST = 120  # tokens of an answer
NO_REPEAT = 8  # tokens in a row that may not occur twice, since small models repeat themselves
TEMPLATE = "chatml_direct"

_COUNTRIES = (
    "Italy Spain Germany Japan Egypt Brazil Canada Norway Greece Portugal Kenya India Mexico Sweden Austria "
    "Poland Ireland Turkey Peru Finland"
).split()
_TERMS = (
    "gravity|a noun|evaporation|a prime number|democracy|a metaphor|photosynthesis|an island|a volcano|"
    "a verb|electricity|a fraction|an orchestra|inflation|a microscope|friction|a triangle|"
    "biology|a habit|a planet|recycling|a sonnet|a budget|an ecosystem|a satellite|"
    "erosion|a mammal|a compass|a rectangle|a vitamin"
).split("|")
_LISTS = (
    "fruits|vegetables|farm animals|musical instruments|colors|sports|months of the year|kitchen tools|"
    "kinds of trees|board games|things to take on a hike|breakfast foods|school subjects|jobs in a hospital|"
    "parts of a bicycle|ways to save water|birds|oceans|languages|things that are round"
).split("|")
_REASONS = (
    "the sky looks blue|leaves fall in autumn|people need sleep|ice floats on water|bread rises|"
    "birds fly south in winter|we brush our teeth|the moon seems to change its shape|exercise is healthy|"
    "iron rusts|plants need light|cities have parks|we wear seat belts|some animals hibernate|"
    "honey keeps long"
).split("|")
_HOW_TO = (
    "boil an egg|plant a tree|learn a new language|make a cup of tea|write a thank-you note|fold a shirt|"
    "calm down before a test|clean a window|start a conversation|remember a name|save money each month|"
    "pack a suitcase|take a good photograph|fix a flat bicycle tire|organize a bookshelf"
).split("|")
_SENTENCES = (
    "The weather was really bad yesterday.|I can't come to the meeting today.|He runs very fast.|"
    "The movie was boring and too long.|She was happy about her new job.|We need to buy some milk.|"
    "The train is late again.|This soup tastes good.|They live in a big house.|My phone is broken.|"
    "The children are playing outside.|I forgot my keys at home.|The test was hard.|It is cold in here.|"
    "The dog sleeps all day.|Our team won the game.|The store closes at nine.|He told us a funny story.|"
    "The flowers need water.|She reads a book every week."
).split("|")
_TOPICS = (
    "the sea|a rainy day|an old clock|friendship|a small village|the first snow|a lost letter|a busy market|"
    "a quiet library|a long journey|the night sky|a garden in spring|a brave mouse|a broken bridge|"
    "a lighthouse"
).split("|")
_PAIRS = (
    "a lake and a river|a cat and a dog|coffee and tea|a train and a bus|summer and winter|"
    "a novel and a poem|a village and a city|butter and oil|the sun and the moon|a guitar and a violin|"
    "walking and running|a letter and an email|fog and rain|a bee and a wasp|a hill and a mountain"
).split("|")
_OPPOSITES = "hot tall early empty loud heavy dark narrow wet strong young cheap near soft slow".split()
_GREETINGS = (
    "Hello!|Hi, how are you?|Good morning.|Good evening! Can you help me?|Hey there.|Nice to meet you.|"
    "Thank you for your help.|Goodbye!|Who are you?|What can you do?|Can I ask you a question?|"
    "Tell me something interesting.|I am bored. What can I do?|I had a bad day.|I am happy today.|"
    "Can you see me?|Do you like music?|What should I cook tonight?|Wish me luck!|How do you learn things?"
).split("|")
_FACTS = (
    "How many legs does a spider have?|What do bees make?|Which animal is known for its long neck?|"
    "What is the boiling point of water?|Who wrote Romeo and Juliet?|What is the largest ocean?|"
    "What gas do plants take in?|How many minutes are in an hour?|What is the opposite of north?|"
    "What do we call frozen water?|What is the tallest kind of grass?|How many sides does a hexagon have?|"
    "Which planet is known for its rings?|What is the main language of Brazil?|What do caterpillars become?|"
    "Which metal is liquid at room temperature?|What is the hardest natural material?|What do pandas eat?|"
    "How many strings does a violin have?|What is the currency of Japan?|What is a baby cat called?|"
    "Which organ pumps the blood?|What is the largest desert?|What is H2O?|How many letters has the alphabet?"
).split("|")
_FOLLOW_UPS = (
    "Can you say that in one short sentence?|Thank you!|Can you give me an example?|Why is that?|"
    "Tell me one more thing about it.|Please explain it to a child.|Are you sure?|What else should I know?"
).split("|")


def prompts(seed: int = 0) -> list[tuple[str, ...]]:
    """Build the user's turns of all conversations, one or two each, in random order."""
    rs = np.random.RandomState(seed)
    numbers = [(int(a), int(b)) for a, b in rs.randint(2, 40, size=(40, 2))]
    singles: list[str] = [
        *(f"What is the capital of {name}?" for name in _COUNTRIES),
        *(f"Name one thing that {name} is famous for." for name in _COUNTRIES),
        *(f"What is {term}?" for term in _TERMS),
        *(f"Explain in two sentences what {term} is." for term in _TERMS),
        *(f"Name three {things}." for things in _LISTS),
        *(f"Make a list of five {things}." for things in _LISTS),
        *(f"Why is it that {reason}?" for reason in _REASONS),
        *(f"How do I {task}?" for task in _HOW_TO),
        *(f"Give me one tip to {task}." for task in _HOW_TO),
        *(f"Rewrite this sentence in a more polite way: {text}" for text in _SENTENCES),
        *(f"Say this with other words: {text}" for text in _SENTENCES),
        *(f"Write two sentences about {topic}." for topic in _TOPICS),
        *(f"Suggest a title for a story about {topic}." for topic in _TOPICS),
        *(f"What is the difference between {pair}?" for pair in _PAIRS),
        *(f"What is the opposite of {word}?" for word in _OPPOSITES),
        *(f"Use the word {word} in a sentence." for word in _OPPOSITES),
        *(f"What is {a} plus {b}?" for a, b in numbers[:20]),
        *(f"What is {a + b} minus {b}?" for a, b in numbers[20:30]),
        *(f"Which number is larger, {a} or {b}?" for a, b in numbers[30:] if a != b),
        *_GREETINGS,
        *_FACTS,
    ]
    found = []
    for index in rs.permutation(len(singles)):  # a pair of numbers may occur twice
        follow = (_FOLLOW_UPS[rs.randint(len(_FOLLOW_UPS))],) if rs.rand() < 0.35 else ()
        found.append((singles[index], *follow))
    return list(dict.fromkeys(found))


def tidy(text: str, ended: bool) -> str:
    """Strip an answer; cut one that reached the limit after its last sentence."""
    text = text.strip()
    if ended:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def answer_all(
    asked: list[tuple[str, ...]], folder: Path, batch_size: int
) -> Iterable[list[tuple[int, list[dict[str, str]]]]]:
    """Answer conversations in batches: yields (number, turns in LLaVA's format) for each of a batch.

    Args:
        asked: The user's turns of each conversation.
        folder: Of the language model.
        batch_size: Conversations that are answered at once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llava.conversation import conv_templates
    from llava.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()  # half the time
    order = sorted(range(len(asked)), key=lambda number: (len(asked[number]), len(asked[number][0])))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        turns: dict[int, list[dict[str, str]]] = {number: [] for number in rows}
        for turn in range(max(len(asked[number]) for number in rows)):
            current = [number for number in rows if turn < len(asked[number])]
            texts = []
            for number in current:
                turns[number].append({"from": "human", "value": asked[number][turn]})
                conv = conv_templates[TEMPLATE].copy()
                for said in [*turns[number], None]:
                    role = conv.roles[len(conv.messages) % 2]
                    conv.append_message(role, said and said["value"])
                texts.append(conv.get_prompt())
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=LONGEST,
                    do_sample=False,
                    no_repeat_ngram_size=NO_REPEAT,
                )
            for number, ids in zip(current, out[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                ended = tokenizer.eos_token_id in ids
                text = tidy(tokenizer.decode(ids, skip_special_tokens=True), ended)
                turns[number].append({"from": "gpt", "value": text})
        yield list(turns.items())


def write(output: Path, folder: Path, asked: list[tuple[str, ...]], batch_size: int) -> int:
    """Write the conversations; answers of an interrupted run beside the output are reused.

    Returns:
        Number of conversations; those with an empty answer are left out.
    """
    from tqdm import tqdm

    progress, done = output.with_name(f".{output.name}.progress"), {}
    if progress.is_file():
        for line in progress.read_bytes().split(b"\n")[:-1]:  # an incomplete last line is discarded
            row = json.loads(line)
            done[tuple(one["value"] for one in row[::2])] = row
    output.parent.mkdir(parents=True, exist_ok=True)
    progress.write_text("".join(json.dumps(row) + "\n" for row in done.values()), encoding="utf-8")
    missing = [turns for turns in asked if turns not in done]
    with progress.open("a", encoding="utf-8") as log:
        bar = tqdm(desc="answering", unit="conversation", total=len(asked), initial=len(asked) - len(missing))
        for batch in answer_all(missing, folder, batch_size) if missing else ():
            for number, row in batch:
                done[missing[number]] = row
                log.write(json.dumps(row) + "\n")
            log.flush()
            bar.update(len(batch))
        bar.close()
    entries = [
        {"id": f"chat_{number:04d}", "conversations": done[turns]}
        for number, turns in enumerate(asked)
        if all(one["value"] for one in done[turns])
    ]
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
    temporary.replace(output)
    progress.unlink()
    return len(entries)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.chat", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the language model (default: that of smol, downloaded if needed)",
    )
    parser.add_argument(
        "--limit", type=at_least(1), help="answer only the first N conversations (default: all)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=48, help="conversations at once (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        folder = args.model or base.fetch()
        count = write(args.output, folder, prompts()[: args.limit], args.batch_size)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"output": str(args.output), "conversations": count}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
