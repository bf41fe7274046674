# Sourced by common.sh and rank.sh: the Python environment and the settings of the site.
# shellcheck shell=bash

# shellcheck disable=SC1091
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
site=${DORA_SITE:-slurm/site.sh}
# shellcheck source=slurm/site.example.sh
[ ! -f "$site" ] || source "$site"
