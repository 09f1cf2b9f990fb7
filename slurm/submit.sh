#!/usr/bin/env bash
# Train, map and compare on a Slurm cluster: slurm/submit.sh data.csv [reference.nii.gz [mask.nii.gz]]
#
# Run it in the folder where models/ and heatmaps/ shall be. Settings are those of site.sh there, or else of the suite's.
# The same line again submits what is not finished.
set -euo pipefail

suite=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
settings=$suite/slurm/site.sh
[ ! -f site.sh ] || settings=$PWD/site.sh
# shellcheck source=slurm/site.sh
. "$settings"

fail() {
    echo "error: $1" >&2
    exit 2
}
quoted() { printf '%q ' "$@"; }
joined() (IFS=, && echo "$*")

# submit NAME SBATCH-OPTION... -- LINE...: submits a job and prints its number
submit() {
    local name=$1 options=()
    while [ "$2" != -- ]; do options+=("$2") && shift; done
    sbatch --parsable --job-name="cnn-$name" "${common[@]}" "${options[@]}" \
        "$suite/slurm/job.sh" $((LEAD - 30)) "$SETUP" "${@:3}" | sed 's/;.*//'
}

# What is asked for ---------------------------------------------------------------------------------

[ $# -ge 1 ] && [ $# -le 3 ] || fail "expected data.csv [reference.nii.gz [mask.nii.gz]], not $# files"
for file; do [ -f "$file" ] || fail "$file: no such file"; done
[ -n "$PARTITION" ] || fail "$settings: PARTITION is not set"
command -v sbatch > /dev/null || fail "sbatch: not found; submit where Slurm is"

device=cpu common=(--partition="$PARTITION" --time="$TIME" --cpus-per-task="$CPUS" --mem="$MEMORY" --chdir="$PWD")
common+=(--requeue --open-mode=append --signal="B:USR1@$LEAD" --kill-on-invalid-dep=yes)
[ -z "$ACCOUNT" ] || common+=(--account="$ACCOUNT")
[ "$GPUS" = 0 ] || device=0 common+=(--gres="gpu:$GPUS")

train="python3 $(quoted "$suite/train_cv.py" --path "$1" --fold "$FOLDS") $TRAIN"
explain="python3 $(quoted "$suite/heatmap.py") --method $METHODS $MAPS"
masked=${3:+$(quoted --mask "$3")}
rest=(
    "python3 $(quoted "$suite/svm.py")$masked"
    "python3 $(quoted "$suite/ttest.py")$masked"
    "python3 $(quoted "$suite/sanity.py")--device $device $masked$CHECKS"
)
[ $# = 1 ] || rest+=("python3 $(quoted "$suite/overlap.py" --reference "$2")$masked$COMPARE")

# What is open --------------------------------------------------------------------------------------

waiting=$(squeue --me --noheader --name=cnn-train,cnn-maps,cnn-rest --format='%i %Z' |
    while read -r job folder; do [ "$folder" != "$PWD" ] || echo -n " $job"; done)
[ -z "$waiting" ] || fail "jobs of this folder are in the queue:$waiting; wait for them, or scancel them"

set +eu # which modules and environments of sites are not made for
eval "$SETUP" || fail "$settings: SETUP ended with status $?"
set -eu
trained=$(eval "$train --status")
explained=$(eval "$explain --status")
mapped() { # mapped PART: whether every method has finished it
    for method in $METHODS; do
        grep -qE "^$method\S* $1: finished" <<< "$explained" || return
    done
}

# Where all that goes before is finished, the last of its jobs makes what was to be made of all.
folds=() parts=()
for ((fold = 0; fold < FOLDS; fold++)); do
    new='' before=${#parts[@]} # new weights need new maps
    grep -q "^fold $fold: finished" <<< "$trained" || { folds+=("$fold") && new=yes; }
    for ((part = 1; part <= PARTS; part++)); do
        [ -z "$new" ] && mapped "fold $fold(, part $part of $PARTS)?" || parts+=("$((fold * PARTS + part - 1))")
    done
    [ ${#parts[@]} -gt "$before" ] || mapped "fold $fold" || parts+=("$((fold * PARTS + PARTS - 1))")
done
[ ${#folds[@]} -gt 0 ] || grep -q "^summary: finished" <<< "$trained" || folds=($((FOLDS - 1)))
[ ${#parts[@]} -gt 0 ] || mapped summary || parts=($((FOLDS * PARTS - 1)))

# Submission ----------------------------------------------------------------------------------------

mkdir -p logs
after=() task=SLURM_ARRAY_TASK_ID # of the job, which evaluates its command line
if [ ${#folds[@]} -gt 0 ]; then
    job=$(submit train --array="$(joined "${folds[@]}")" --output=logs/train-%A_%a.txt -- "$train --device $device --run-folds \$$task")
    echo "training, folds ${folds[*]}: job $job"
    after=(--dependency="afterok:$job")
fi
if [ ${#parts[@]} -gt 0 ]; then
    job=$(submit maps --array="$(joined "${parts[@]}")" --output=logs/maps-%A_%a.txt "${after[@]}" -- "$explain --device $device \
        --run-folds \$(($task / $PARTS)) --part \$(($task % $PARTS + 1))/$PARTS")
    echo "maps, ${#parts[@]} of $((FOLDS * PARTS)) parts: job $job"
    after=(--dependency="afterok:$job")
fi
job=$(submit rest --output=logs/rest-%j.txt "${after[@]}" -- "${rest[@]}")
echo "svm.py, ttest.py, sanity.py${2:+, overlap.py}: job $job"
echo "next: squeue --me; python3 $suite/train_cv.py --status; tail logs/*; after an error the same line again"
