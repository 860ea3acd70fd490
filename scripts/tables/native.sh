#!/usr/bin/env bash
# Evaluate a model of transformers on ten benchmarks at all tokens, 33, 20 and 10 % and at 128, 64 and 32 tokens, and
# compare the scores with published ones, text-reading benchmarks apart:
#
#   bash scripts/tables/native.sh HOST [flags of python -m llava.eval.native, e.g. --limit 100 --benchmarks pope,textvqa]
#   HOST: qwen2_5_vl, qwen3_vl or internvl (InternVL3.5)
#
# Without a checkpoint, a tiny random model of the family is used, and the output says that this is a rehearsal.
# Rerunning the command resumes an interrupted run. The last line of output is one JSON document.
#
# Environment variables:
#   CKPT_DIR, CKPT   folder of checkpoints and the name of one of them; CKPT without CKPT_DIR is a path or a Hub name
#   DATA_DIR         folder of the benchmarks, LLaVA's playground/data/eval (default: the bundled benchmarks)
#   METHOD           pruning method (default: vispruner)
#   OUT_DIR          folder for answers and scores (default: outputs/ in the repository)

here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_eval.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/native.sh" >&2; exit 2; }
case ${1:-} in "" | -*) _vp_wrong "HOST is missing. Run: bash scripts/tables/native.sh HOST; choose from qwen2_5_vl, qwen3_vl, internvl." ;; esac
host=$1
shift
_vp_checkpoint "$host"
output=$(_vp_absolute "${OUT_DIR:-$ROOT/outputs}")
_vp_folder "$output" OUT_DIR
vispruner_env
exec "$PY" "$ROOT/scripts/_launch.py" llava.eval.native --host "$host" ${MODEL_:+--model "$MODEL_"} \
    ${DATA_DIR:+--data "$(_vp_path "$DATA_DIR")"} ${METHOD:+--method "$METHOD"} --output "$output/native" "$@"
