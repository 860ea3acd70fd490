#!/usr/bin/env bash
# Compare measured scores with the table of other models: bash scripts/tables/other_vlms.sh; see scripts/_tables.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_tables.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/tables/other_vlms.sh" >&2; exit 2; }
cat <<'TEXT'
How to run each model (docs/other_vlms.md): load it with load_remote(NAME, trust_remote_code=True) of
llava.integrations.remote, or by its authors' package, after reading that code; select tokens as below; score answer files
with python -m llava.eval.score --benchmark NAME --data DATA --answers FILE.
  Qwen-VL-7B           Qwen/Qwen-VL-Chat                             keep_places(features, cue, tokens=128), of 256 queries
  InternVL-Chat-13B    OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-13B     keep_places(features, cue, tokens=144), of 576 patches
  CogVLM-Chat-1.1-17B  THUDM/cogvlm-chat-hf                          keep_places(features, cue, tokens=123), of 1225 patches
None of them was run here. Published scores, and what was measured:
TEXT
vispruner_table other-vlms "$@"
