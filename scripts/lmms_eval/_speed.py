"""Questions per second of model vispruner and of lmms-eval's model llava, in turns; used by speed.sh.

    python scripts/lmms_eval/_speed.py FOLDER --tokens 32 --ratio 0.5 --images 20 --rounds 3

FOLDER has the tasks of _tiny.py. Both models get the same requests: all POPE questions of the first images,
as lmms-eval makes them from its own task. They load the same checkpoint and prune alike. Pixels are rounded
to float16 for both, as model llava does. It answers one request at a time (--batch_size 1, its default).
Encoded images are not kept between rounds. The document on the last line has the seconds of every round and
the number of different answers; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from llava import argtypes, paths


def requests_of(folder: Path, images: int) -> tuple[list[Any], dict[str, Any]]:
    """Return the requests about the first images, and the documents by task."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    names = ["tiny_pope_adv", "tiny_pope_pop", "tiny_pope_random"]
    tasks = get_task_dict(names, TaskManager("ERROR", include_path=str(folder / "tasks")), "simple")
    wanted: dict[str, None] = {}
    found = []
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
        task.args = None
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for one in task.instances:
            image = one.args[2](task.dataset["test"][one.args[3]])[0].tobytes()
            if image in wanted or len(wanted) < images:
                wanted[image] = None
                found.append(one)
    return found, {name: task.dataset for name, task in tasks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--tokens", type=argtypes.at_least(0), default=32)
    add("--ratio", type=argtypes.ratio, default=0.5)
    add("--images", type=argtypes.at_least(1), default=20)
    add("--rounds", type=argtypes.at_least(1), default=3)
    args = parser.parse_args()
    # The model llava takes no pruning arguments, only the environment.
    budget = {"VISPRUNER_METHOD": "vispruner", "VISPRUNER_TOKENS": args.tokens, "VISPRUNER_RATIO": args.ratio}
    os.environ |= {name: str(value) for name, value in budget.items()} | {"VISPRUNER_VISION_CACHE": "0"}
    import torch
    from lmms_eval.models import get_model

    requests, documents = requests_of(args.folder, args.images)
    settings = f"method=vispruner,tokens={args.tokens},important_ratio={args.ratio}"
    ours = f"{settings},preset=published,anyres=paper,tower_dtype=float32,device=cpu"
    theirs = f"pretrained={paths.BUNDLED_MODEL},device=cpu,device_map=auto"
    models = {
        "vispruner": get_model("vispruner").create_from_arg_string(ours),
        "llava": get_model("llava").create_from_arg_string(theirs, {"batch_size": 1}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    cpu_seconds: dict[str, list[float]] = {
        name: [] for name in models
    }  # of all threads; other load matters less
    answers: dict[str, list[str]] = {}
    for lm in models.values():
        lm.task_dict |= documents
        lm.generate_until(copy.deepcopy(requests[:2]))  # warm up
    for number in range(args.rounds):
        for name in list(models)[:: 1 if number % 2 else -1]:
            asked = [copy.copy(one) for one in requests]
            for one in asked:  # the model llava changes the arguments
                one.arguments = (one.args[0], copy.deepcopy(one.args[1]), *one.args[2:])
            if name == "vispruner":
                models[name].engine.session.cache = None
            start, cpu = time.perf_counter(), time.process_time()
            answers[name] = [one.strip() for one in models[name].generate_until(asked)]
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu)
    different = sum(a != b for a, b in zip(*answers.values(), strict=True))
    rates = {name: len(requests) / statistics.median(times) for name, times in seconds.items()}
    result = {
        "questions": len(requests),
        "images": args.images,
        "tokens": args.tokens,
        "important_ratio": args.ratio,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "questions_per_second": rates,
        "speedup": rates["vispruner"] / rates["llava"],
        "cpu_speedup": statistics.median(cpu_seconds["llava"]) / statistics.median(cpu_seconds["vispruner"]),
        "different_answers": different,
    }
    print(json.dumps(result))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
