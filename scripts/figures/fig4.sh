#!/usr/bin/env bash
# Draw Figure 4, how VisPruner chooses: bash scripts/figures/fig4.sh; see scripts/_figures.sh
here=$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")
. "$here/../_figures.sh" || { echo "error: $0 is a copy. Run the script in its repository; in a batch job: bash REPOSITORY/scripts/figures/fig4.sh" >&2; exit 2; }
vispruner_figure fig4 "$@"
