#!/usr/bin/env bash
# Everything that docs/performance.md shows of whole runs, on a machine with nothing else to do.
# Leave OMP_NUM_THREADS unset: every tool then computes with the threads that it takes by itself.
#
#   benchmarks/quiet_hour.sh ~/venvs results             all parts, about 80 minutes on two cores
#   benchmarks/quiet_hour.sh ~/venvs results a b c d     some of them
#
# Parts, each with its minutes on two Zen 4 cores: a (20), c (9), b (7), d (5), flat (10), everyone
# (12: every tool once on workload a), curve (31). Each writes results/PART.md and, but for the curve,
# results/PART.json; `python benchmarks/train.py --show results/?.json` prints the tables again.
set -euo pipefail
venvs=$(realpath "$1") results=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."
parts=("$@")
(($#)) || parts=(a c b d flat everyone curve)
mkdir -p "$results"

compare() { # compare PART WORKLOAD STEPS ROUNDS TOOL...
    local part=$1 workload=$2 steps=$3 rounds=$4
    shift 4
    python benchmarks/train.py --venvs "$venvs" --workloads "$workload" --steps "$steps" \
        --rounds "$rounds" --json "$results/$part.json" ${@:+--only "$@"} | tee "$results/$part.md"
}

for part in "${parts[@]}"; do
    began=$SECONDS
    case $part in
    a) compare a a 20 3 ftlevel plain "plain, sorted" "unsloth, sorted" "llamafactory, neat_packing" ;;
    b) compare b b 6 3 ftlevel plain "plain, sorted" "unsloth, sorted" ;;
    c) compare c c 3 2 ftlevel plain "unsloth, sorted" "llamafactory, neat_packing" ;;
    d) compare d d 20 3 ftlevel plain "plain, sorted" swift ;;
    everyone) compare everyone a 6 1 ;;
    flat) python benchmarks/flat.py --json "$results/flat.json" | tee "$results/flat.md" ;;
    curve) python benchmarks/curve.py | tee "$results/curve.md" ;;
    *) echo "$part is no part: a b c d everyone flat curve" >&2 && exit 2 ;;
    esac
    echo "$part: $((SECONDS - began)) s" >&2
done
