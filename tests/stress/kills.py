"""Kill commands with SIGKILL at random instants, start them again, and compare with an undisturbed run.

    python -m tests.stress.kills --count 100
    python -m tests.stress.kills --count 20 --only torchrun --seed 3

Commands: `run`, `sweep`, `torchrun` (two processes; a kill hits the launcher or one worker) and `submit`.
Each is killed several times in the same output folder, at instants drawn from the time it needs, and then
left alone. After every kill whatever is on disk must be readable: `score.json` and submissions are whole or
absent, answer lines are whole except for the last one. In the end, answers (without their random ids), scores
and submissions must equal those of the undisturbed run. The last line is one JSON document
{"kills": n, "ends": n, "different": [descriptions]}; the exit code is 1 if anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # helpers, as pytest's pythonpath has it

from helpers.answers import without_ids  # noqa: E402
from helpers.synthetic_pope import make_pope  # noqa: E402

MODEL = ROOT / "tests/data/model/ckpt_llava15s"
KILLS = 4  # at most, before a command is left alone
SECONDS = 300  # of an undisturbed command, after which something hangs


@dataclass
class Command:
    """A command to kill, and where it writes."""

    name: str
    arguments: list[str]  # after the interpreter; {} is the output folder

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """Start it in a process group of its own, so that nothing of it survives a comparison."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        given = [part.replace("{}", str(output)).replace("{port}", port) for part in self.arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [sys.executable, *given],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )


def commands(data: Path, answers: Path) -> dict[str, Command]:
    """Return the commands by name; `answers` is the file that `submit` converts."""
    asked = ["--benchmark", "pope", "--model", str(MODEL), "--data", str(data), "--max-new-tokens", "6"]
    asked += ["--batch-size", "4", "--device", "cpu", "--num-workers", "0"]
    run = ["llava.eval.run", *asked, "--tokens", "16", "--output", "{}"]
    sweep = ["llava.eval.sweep", "--benchmarks", *asked[1:], "--methods", "none,random,vispruner"]
    ranks = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}", "-m"]
    submit = [
        "llava.eval.submit",
        "--benchmark",
        "gqa",
        "--answers",
        str(answers),
        "--output",
        "{}/upload.json",
    ]
    return {
        "run": Command("run", ["-m", *run]),
        "sweep": Command("sweep", ["-m", *sweep, "--tokens", "16,4", "--output", "{}"]),
        "torchrun": Command("torchrun", ["-m", *ranks, *run]),
        "submit": Command("submit", ["-m", *submit]),
    }


def contents(folder: Path) -> dict[str, object]:
    """Return what a finished command left, file by file; speeds and random ids are left out."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "answers.jsonl":
            found[name] = without_ids(path)
        elif path.name == "score.json":
            document = json.loads(path.read_bytes())
            found[name] = {key: document.get(key) for key in ("benchmark", "score", "answered", "details")}
        elif path.name == "upload.json":
            found[name] = path.read_bytes()
    return found


def readable(folder: Path) -> str | None:
    """Return what cannot be read of a killed command's files; None if all is well."""
    for path in [*folder.rglob("score.json"), *folder.rglob("upload.json")]:
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"{path.name}: {error}"
    for path in folder.rglob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                return f"{path.name}: a broken line before the last"
    return None


def victims(process: subprocess.Popen[bytes], rng: random.Random) -> int:
    """Return the process to kill: the started one, or one of its children."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(one) for one in listed.read_text().split()] if listed.is_file() else []
    return rng.choice([process.pid, *children])


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a command and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


def attack(
    command: Command, output: Path, rng: random.Random, seconds: float, most: int
) -> tuple[int, str | None]:
    """Kill a command up to `most` times, then let it finish. Returns the kills, and what went wrong."""
    output.mkdir(parents=True, exist_ok=True)
    kills = 0
    for _ in range(rng.randint(1, min(KILLS, most))):
        process = command.start(output)
        try:
            process.wait(rng.uniform(0.05, 1) * seconds)
            break  # it was faster
        except subprocess.TimeoutExpired:
            try:
                os.kill(victims(process, rng), signal.SIGKILL)
                kills += 1
            except ProcessLookupError:
                pass
            if command.name == "torchrun":
                time.sleep(rng.uniform(0, 0.5))  # what the others do meanwhile
        finally:
            end(process)
        if wrong := readable(output):
            return kills, f"after {kills} kills: {wrong}"
    for _ in range(2):  # the second start has nothing left to do
        process = command.start(output)
        try:
            _, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            end(process)
            return kills, f"no end within {SECONDS} seconds"
        if process.returncode:
            return kills, f"exit code {process.returncode}: {errors.decode(errors='replace')[-400:]}"
    return kills, None


def stress(count: int, seed: int = 0, only: list[str] | None = None) -> tuple[int, int, list[str]]:
    """Make at least `count` kills. Returns kills, finished commands, and descriptions of differences."""
    different, kills, ends = [], 0, 0
    with tempfile.TemporaryDirectory() as root, tqdm(total=count, unit="kill", disable=None) as bar:
        folder = Path(root)
        data = make_pope(folder / "pope", pictures=6, per_category=60)
        answers = folder / "answers.jsonl"
        row = {
            "question_id": "1",
            "prompt": "x",
            "text": "yes",
            "answer_id": "a",
            "model_id": "m",
            "metadata": {},
        }
        answers.write_text("".join(json.dumps({**row, "question_id": str(n)}) + "\n" for n in range(20_000)))
        known = commands(data, answers)
        names = only or list(known)
        whole, seconds = {}, {}
        for name in names:
            began = time.monotonic()
            output = folder / "whole" / name
            output.mkdir(parents=True)
            process = known[name].start(output)
            errors = process.communicate()[1].decode(errors="replace")
            if process.returncode:
                raise SystemExit(f"{name}: the undisturbed command fails: {errors[-600:]}")
            whole[name], seconds[name] = contents(output), time.monotonic() - began
        while kills < count:
            name = names[ends % len(names)]
            rng, output = random.Random(f"{seed}/{ends}"), folder / f"{name}-{ends}"
            made, wrong = attack(known[name], output, rng, seconds[name], count - kills)
            found = contents(output) if wrong is None else None
            if found is not None and found != whole[name]:
                wrong = f"{[key for key in whole[name] if found.get(key) != whole[name][key]]} differ"
            if wrong is not None:
                different.append(f"{name} {seed}/{ends}: {wrong}")
                tqdm.write(different[-1], file=sys.stderr)
            kills, ends = kills + made, ends + 1
            bar.update(made)
            shutil.rmtree(output)
    return kills, ends, different


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.stress.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=100, help="kills to make (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    names = ("run", "sweep", "torchrun", "submit")
    parser.add_argument("--only", nargs="+", choices=names, help="kill these commands only")
    args = parser.parse_args()
    kills, ends, different = stress(args.count, args.seed, args.only)
    print(json.dumps({"kills": kills, "ends": ends, "different": different}))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
