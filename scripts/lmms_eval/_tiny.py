"""The bundled benchmarks as tasks of lmms-eval, and the comparison of its scores with ours; used by tiny.sh.

    python scripts/lmms_eval/_tiny.py tasks FOLDER            # FOLDER/tasks/*.yaml, FOLDER/data/*.parquet
    python scripts/lmms_eval/_tiny.py host FOLDER             # FOLDER/host, the bundled model in -hf format
    python scripts/lmms_eval/_tiny.py check FOLDER RUN [RUN]  # results of lmms-eval in FOLDER/RUN

Every task is one of lmms-eval's own (its YAML is included), with local files in place of its dataset. A check
scores the logged answers with our scorers too and exits with 1 if a score differs, or an answer of two runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava import paths
from llava.eval.benchmarks import get_benchmark
from llava.eval.benchmarks.textvqa import _OCR_LINE

DATA = paths.BUNDLED_DATA
TOLERANCE = 1e-9
POPE = {"adversarial": "pope_adv", "popular": "pope_pop", "random": "pope_random"}
# task -> (YAML in lmms_eval/tasks, our benchmark, its metrics)
TASKS = {
    **{
        f"tiny_{task}": (f"pope/{task}.yaml", "pope", ("pope_f1_score", "pope_accuracy"))
        for task in POPE.values()
    },
    "tiny_gqa": ("gqa/gqa.yaml", "gqa", ("exact_match",)),
    "tiny_mme": ("mme/mme.yaml", "mme", ("mme_perception_score",)),
    "tiny_textvqa": ("textvqa/textvqa_val.yaml", "textvqa", ("exact_match",)),
}


def rows(task: str) -> Iterator[dict[str, Any]]:
    """Yield the documents of a task, in the order of our questions, with the columns that lmms-eval reads."""
    name = TASKS[task][1]
    benchmark = get_benchmark(name)
    folder, issues = DATA / benchmark.folder, []
    for question in benchmark.questions(folder, issues):
        text = question.text.split("\n")[0]
        row = {"question_id": str(question.question_id), "image": str(question.image), "question": text}
        truth = benchmark.truth(folder)[benchmark.question_key(question)]
        if name == "pope":
            if f"tiny_{POPE[question.category]}" != task:
                continue
            row["answer"] = truth["label"]
        elif name == "gqa":
            row["answer"] = truth["answer"]
        elif name == "mme":
            row |= {"answer": truth[1], "category": question.category}
        else:
            listed = question.text.split("\n")[1].removeprefix(_OCR_LINE)
            row |= {"answers": truth, "answer": truth[0], "ocr_tokens": listed.split(", ")}
        yield row | {"index": question.index}
    if issues:
        raise SystemExit(f"error: {issues[0]}")


def write_tasks(folder: Path) -> None:
    """Write the tasks and their data. Needs lmms-eval, whose YAML files they include."""
    import datasets
    import lmms_eval.tasks
    import yaml

    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "tasks").mkdir(exist_ok=True)
    installed = Path(lmms_eval.tasks.__file__).parent
    for task, (included, _, _) in TASKS.items():
        documents = [{name: value for name, value in row.items() if name != "index"} for row in rows(task)]
        data = folder / "data" / f"{task}.parquet"
        found = datasets.Dataset.from_list(documents).cast_column("image", datasets.Image())
        found.to_parquet(data)
        split = {"data_files": {"test": str(data.resolve())}}
        config: dict[str, Any] = {"include": str(installed / included), "task": task, "test_split": "test"}
        config |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": split}
        if task == "tiny_gqa":
            config["process_docs"] = None  # would join images of the Hub
        if task == "tiny_textvqa":  # the prompt of LLaVA, with OCR tokens
            prompt = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
            config["lmms_eval_specific_kwargs"] = {"default": prompt | {"ocr": True}}
        (folder / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def fast_tokenizer(path: Path) -> Any:
    """Return a tokenizer of the `tokenizers` package for a SentencePiece model with byte-pair merges."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    content = SentencePieceProcessor(model_file=str(path))
    scores = {content.IdToPiece(i): (i, content.GetScore(i)) for i in range(content.GetPieceSize())}
    merges = []
    for piece, (_, score) in scores.items():
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(a, b) for a, b in parts if a in scores and b in scores]
        merges += [(-score, scores[a][0], scores[b][0], (a, b)) for a, b in known]
    vocabulary = {piece: index for piece, (index, _) in scores.items()}
    pairs = [pair for *_, pair in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_host(folder: Path) -> None:
    """Write the bundled model as a checkpoint of transformers' LlavaForConditionalGeneration."""
    import torch
    from transformers import (
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessorPil,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    from llava.mm_utils import tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    none = {"method": "none", "visual_token_num": 0, "important_ratio": 0.5}
    tokenizer, model, image_processor, _ = load_pretrained_model(paths.BUNDLED_MODEL, device="cpu", **none)
    tower = model.get_vision_tower()
    image_token, ours = len(tokenizer), tokenizer
    names = ("bos_token", "eos_token", "unk_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(paths.BUNDLED_MODEL / "tokenizer.model"),
        **{name: getattr(ours, name) for name in names},
        pad_token=ours.convert_ids_to_tokens(0),
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    prompt = "A chat. USER: <image>\nIs there a dog?\nAnswer using a single word. ASSISTANT:"
    expected = tokenizer_image_token(prompt, ours, image_token)
    if (found := tokenizer(prompt).input_ids) != expected:
        raise SystemExit(f"error: the tokenizer of the host gives {found}, expected {expected}")
    text = {
        name: getattr(model.config, name)
        for name in (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
            *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        )
    }
    rows = image_token + 64 - image_token % 64
    vision = tower.vision_tower.config.to_dict()
    for name in ("out_features", "out_indices", "stage_names"):
        vision.pop(name, None)
    select, depth = model.config.mm_vision_select_layer, len(tower.vision_tower.encoder.layer)
    vision["num_hidden_layers"] = depth - select - 1  # the layers after the select layer are not loaded
    config = LlavaConfig(
        vision_config=Dinov2Config(**vision),
        text_config=LlamaConfig(vocab_size=rows, bos_token_id=1, eos_token_id=2, pad_token_id=0, **text),
        image_token_index=image_token,
        image_seq_length=tower.num_patches,
        vision_feature_layer=select,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    host = LlavaForConditionalGeneration(config).float().eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            continue
        name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
        name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        if not name.startswith(("lm_head", "model.multi_modal_projector")):
            name = name.replace("model.", "model.language_model.", 1)
        if name.startswith(("lm_head", "model.language_model.embed_tokens")):
            tensor = torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])
        weights[name] = tensor
    for name, tensor in tower.vision_tower.state_dict().items():
        weights[f"model.vision_tower.{name}"] = tensor
    lost = host.load_state_dict(weights, strict=False)
    unused = (
        ".embeddings.mask_token",
        ".vision_tower.layernorm.",
        *(f".layer.{i}." for i in range(depth, 99)),
    )
    if lost.unexpected_keys or not all(any(part in one for part in unused) for one in lost.missing_keys):
        raise SystemExit(f"error: weights of the host do not match: {lost}")
    host.save_pretrained(folder / "host")
    names = ("size", "crop_size", "image_mean", "image_std", "resample")
    padding = LlavaImageProcessorPil(do_pad=True, **{name: getattr(image_processor, name) for name in names})
    LlavaProcessor(
        padding,
        tokenizer,
        patch_size=tower.vision_tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder / "host")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, dict[int, dict[str, Any]]]]:
    """Return the newest result file of a run, and its samples: task -> document -> sample."""
    results = sorted(folder.rglob("*_results.json"))
    if not results:
        raise SystemExit(f"error: {folder}: no results of lmms-eval. Look for its error above.")
    document = json.loads(results[-1].read_text(encoding="utf-8"))
    samples: dict[str, dict[int, dict[str, Any]]] = {}
    for task in document["results"]:
        path = results[-1].with_name(results[-1].name.replace("_results.json", f"_samples_{task}.jsonl"))
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        samples[task] = {line["doc_id"]: line for line in lines}
    return document, samples


def our_score(task: str, samples: dict[int, dict[str, Any]]) -> list[float]:
    """Return the metrics of TASKS by our scorer, of the logged answers."""
    name = TASKS[task][1]
    benchmark = get_benchmark(name)
    folder = DATA / benchmark.folder
    questions = {question.index: question for question in benchmark.questions(folder, [])}
    indices = [row["index"] for row in rows(task)]
    answers = []
    for document, sample in sorted(samples.items()):
        question = questions[indices[document]]
        text = sample["filtered_resps"]
        answers.append({"question_id": question.question_id, "prompt": question.text, "text": text})
    scored = benchmark.official_score(folder, answers, fixed=True)
    if name == "pope":
        category = next(key for key, value in POPE.items() if f"tiny_{value}" == task)
        return [scored.details[category]["f1"], scored.details[category]["accuracy"]]
    return [scored.score if name == "mme" else scored.score / 100]


def check(folder: Path, runs: list[str]) -> int:
    """Print scores of lmms-eval and ours side by side; return 1 if one differs."""
    from transformers.utils import is_torchvision_available

    wrong, answers = 0, []
    for run in runs:
        document, samples = read_run(folder / run)
        settings = document["config"]["resolved_cli_args"].get("vispruner")
        print(f"{run}: {json.dumps(settings)}")
        if settings is None or settings.get("failed"):
            print("  the result file has no pruning settings, or requests failed")
            wrong += 1
        for task, found in samples.items():
            theirs = [document["results"][task][f"{metric},none"] for metric in TASKS[task][2]]
            for metric, one, other in zip(TASKS[task][2], theirs, our_score(task, found), strict=True):
                equal = abs(one - other) <= TOLERANCE
                wrong += not equal
                print(
                    f"  {task:18} {metric:22} lmms-eval {one:10.4f}   ours {other:10.4f}   "
                    f"{'equal' if equal else 'DIFFERENT'} ({len(found)} answers)"
                )
        answers.append(
            {(task, key): one["filtered_resps"] for task in samples for key, one in samples[task].items()}
        )
    if len(runs) == 2:
        shared = answers[0].keys() & answers[1].keys()
        same = sum(answers[0][key] == answers[1][key] for key in shared)
        print(f"{runs[0]} and {runs[1]}: {same} of {len(shared)} answers are equal")
        wrong += same < len(shared) and not is_torchvision_available()  # it resizes in another way
    print("all scores agree" if not wrong else f"{wrong} differences")
    return int(wrong > 0)


if __name__ == "__main__":
    action, place, *names = sys.argv[1:]
    if action == "tasks":
        write_tasks(Path(place))
    elif action == "host":
        write_host(Path(place))
    else:
        sys.exit(check(Path(place), names))
