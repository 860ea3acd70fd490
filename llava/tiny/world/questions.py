"""Questions about scenes in the wording of the official benchmarks, with their answers.

Every `Maker` samples one question about a scene, or returns None if the scene allows none. Answers have the
form that LLaVA-1.5 gives in that format: one word, a number, a letter. Independent of images and models.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .scenes import Scene
from .vocabulary import COLORS, SHAPES, SPRITES, THEMES, WORDS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
OCR = "\nReference OCR token: "
MME_TAIL = " Please answer yes or no."
CHINESE = dict(
    zip(
        SPRITES + SHAPES,
        (
            "狗 猫 马 牛 羊 猪 鸡 兔 大象 长颈鹿 狮子 斑马 熊 猫头鹰 乌龟 企鹅 "
            "汽车 公交车 自行车 卡车 火车 飞机 船 摩托车 苹果 香蕉 比萨 蛋糕 面包 胡萝卜 梨 汉堡 "
            "椅子 时钟 书 雨伞 吉他 相机 电话 钥匙 圆形 方形 三角形 星形 心形 圆环 十字 菱形"
        ).split(),
        strict=True,
    )
)

Pair = tuple[str, str]  # question with its instruction, answer
Maker = Callable[[Scene, np.random.RandomState], Pair | None]


def article(name: str) -> str:
    """Return the name with its indefinite article: a dog, an apple."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """Return the plural of an object name."""
    irregular = {"sheep": "sheep", "bus": "buses", "cross": "crosses"}
    return irregular.get(name, f"{name}s")


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _pick(rs: np.random.RandomState, items):
    return items[rs.randint(len(items))]


def existence(name: str) -> str:
    """Word the question of POPE."""
    return f"Is there {article(name)} in the image?"


def absent_like(scene: Scene, rs: np.random.RandomState) -> str:
    """Sample a sprite that is absent, half the time of the theme of a present one (adversarial)."""
    present = scene.names()
    if present and rs.rand() < 0.5:
        seen = _pick(rs, present)
        theme = next(names for names in THEMES.values() if seen in names)
        pool = [name for name in theme if name not in present]
        if pool:
            return _pick(rs, pool)
    return _pick(rs, [name for name in SPRITES if name not in present])


def exist(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    present = scene.names()
    if present and rs.rand() < 0.5:
        return existence(_pick(rs, present)) + SHORT, "Yes"
    return existence(absent_like(scene, rs)) + SHORT, "No"


def _shapes(scene: Scene) -> list:
    return [item for item in scene.objects if item.kind == "shape"]


def color(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    shapes = _shapes(scene)
    if not shapes:
        return None
    item = _pick(rs, shapes)
    return f"What color is the {item.name}?" + SHORT, item.color


def color_check(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    shapes = _shapes(scene)
    if not shapes:
        return None
    item = _pick(rs, shapes)
    asked = item.color if rs.rand() < 0.5 else _pick(rs, [c for c in COLORS if c != item.color])
    form = (
        f"Is the {item.name} {asked}?"
        if rs.rand() < 0.5
        else f"Is there {article(asked)} {item.name} in the image?"
    )
    return form + SHORT, _yes(asked == item.color)


def count(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    present = scene.names()
    many = [name for name in present if scene.count(name) > 1]
    if not present:
        return None
    name = _pick(rs, many) if many and rs.rand() < 0.75 else _pick(rs, present)
    return f"How many {plural(name)} are there in the image?" + SHORT, str(scene.count(name))


def count_check(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    drawn = count(scene, rs)
    if drawn is None:
        return None
    true = int(drawn[1])
    said = true if rs.rand() < 0.5 else _pick(rs, [n for n in (1, 2, 3, 4) if n != true])
    name = drawn[0].split("How many ")[1].split(" are there")[0]
    return (
        f"Are there {said} {name} in the image?"
        if said > 1
        else f"Is there only one of the {name} in the image?"
    ) + SHORT, _yes(said == true)


def related(scene: Scene, rs: np.random.RandomState, gap: float = 30.0):
    """Return (first, relation, opposite, second) for two objects `gap` or more pixels apart, or None."""
    single = [t for t in scene.objects if t.kind != "word" and scene.count(t.name) == 1]
    if len(single) < 2:
        return None
    for _ in range(6):
        i, j = rs.permutation(len(single))[:2]
        (ax, ay), (bx, by) = single[i].center, single[j].center
        options = []
        if abs(ax - bx) > gap:
            options.append(
                ("to the left of", "to the right of") if ax < bx else ("to the right of", "to the left of")
            )
        if abs(ay - by) > gap:
            options.append(("above", "below") if ay < by else ("below", "above"))
        if options:
            relation, opposite = _pick(rs, options)
            return single[i].name, relation, opposite, single[j].name
    return None


def position(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    found = related(scene, rs)
    if found is None:
        return None
    first, relation, opposite, second = found
    true = rs.rand() < 0.5
    return f"Is the {first} {relation if true else opposite} the {second}?" + SHORT, _yes(true)


def options(scene: Scene, rs: np.random.RandomState, number: int = 4) -> tuple[list[str], int] | None:
    """Return names of which exactly one is in the image, and the index of that name."""
    present = scene.names()
    if not present:
        return None
    wrong = [str(n) for n in rs.permutation([name for name in SPRITES if name not in present])[: number - 1]]
    right = rs.randint(number)
    return wrong[:right] + [_pick(rs, present)] + wrong[right:], right


def lettered(question: str, names: list[str]) -> str:
    """Format question and options like MMBench, one option per line."""
    return question + "".join(f"\n{'ABCDE'[k]}. {name}" for k, name in enumerate(names))


def choice(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    drawn = options(scene, rs, rs.randint(2, 5))
    if drawn is None:
        return None
    names, right = drawn
    if rs.rand() < 0.5:
        return lettered("图中有哪一个？", [CHINESE[name] for name in names]) + LETTER_CN, "ABCD"[right]
    return lettered("Which of these is in the image?", names) + LETTER, "ABCD"[right]


def read(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    words = scene.names("word")
    if not words:
        return None
    tokens = ""
    if rs.rand() < 0.5:
        extra = [str(w) for w in rs.permutation([w for w in WORDS if w not in words])[: rs.randint(0, 3)]]
        tokens = OCR + ", ".join(str(w) for w in rs.permutation(words + extra))
    return "What word is written on the sign?" + tokens + SHORT, words[0]


def unanswerable(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask in the form of VizWiz for the color of a shape that may be absent."""
    there = {item.name: item.color for item in _shapes(scene)}
    name = (
        _pick(rs, list(there))
        if there and rs.rand() < 0.5
        else _pick(rs, [s for s in SHAPES if s not in there])
    )
    return f"What color is the {name}?" + UNANSWERABLE + SHORT, there.get(name, "unanswerable")


def inventory(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask for a free-form answer: all objects in alphabetical order."""
    names = sorted(scene.names("sprite") + scene.names("shape"))
    return ("What things are in the image?", ", ".join(names)) if names else None


def polite(makers: tuple, scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Sample a yes/no question with the instruction of MME."""
    pair = _pick(rs, makers)(scene, rs)
    return pair and (pair[0].removesuffix(SHORT) + MME_TAIL + SHORT, pair[1])


def mme(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Sample a yes/no question in the form of MME."""
    return polite((exist, color_check, count_check, position), scene, rs)


def choice_color(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Sample a multiple-choice question about a color."""
    shapes = _shapes(scene)
    if not shapes:
        return None
    item = _pick(rs, shapes)
    wrong = [str(c) for c in rs.permutation([c for c in COLORS if c != item.color])[: rs.randint(1, 4)]]
    right = rs.randint(len(wrong) + 1)
    names = wrong[:right] + [item.color] + wrong[right:]
    return lettered(f"What color is the {item.name}?", names) + LETTER, "ABCD"[right]


def context(scene: Scene) -> str:
    """Word the hint of ScienceQA, which names the theme of most sprites."""
    names = scene.names()
    theme = max(THEMES, key=lambda theme: sum(name in THEMES[theme] for name in names))
    return f"Context: The picture shows things from the {theme} collection.\n"


def science(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Sample a question in the form of ScienceQA: hint, question, options."""
    drawn = options(scene, rs, rs.randint(2, 5))
    if drawn is None:
        return None
    names, right = drawn
    return context(scene) + lettered("Which of these is in the image?", names) + LETTER, "ABCD"[right]
