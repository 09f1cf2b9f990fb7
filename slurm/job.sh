#!/usr/bin/env bash
# The batch script of every job: job.sh SECONDS SETUP LINE...
#
# Runs SETUP, which makes python3 ready, then one command line after the other. USR1, Slurm's warning before the time
# limit, and TERM are passed on to the command, USR1 once more after SECONDS: the first has it finish its epoch or scan,
# the second ends it at once. Where it saved what it has, and ended with 138 or 143, the job goes back to the queue
# before its time is up; any other status is the job's own.

signal='' child='' seconds=$1
pass_on() {
    signal=$1 interrupted=yes
    [ -n "$child" ] || return
    kill -s "$1" "$child"
    if [ "$1" = USR1 ]; then
        (sleep "$seconds" && kill -s USR1 $$) > /dev/null 2>&1 &
    fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
eval "$2" || exit
for line in "${@:3}"; do
    status=143
    [ -z "$signal" ] || break # it came while no command ran
    eval "exec $line" &
    child=$!
    [ -z "$signal" ] || pass_on "$signal" # it came while the command had no number yet
    while
        interrupted=''
        wait "$child"
        status=$?
        [ -n "$interrupted" ] # then that is the signal's status, not the command's
    do :; done
    child=''
    [ "$status" = 0 ] || break
done

trap '' USR1 TERM # Slurm sends its TERM to all that runs in a job, so to what follows
jobs -p | xargs -r kill # a second warning that is due
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
if [ "$status" = 138 ] || [ "$status" = 143 ]; then
    for _ in 1 2 3; do # the controller may be busy
        state=$(squeue --noheader --jobs="$job" --format='%T %r') && break
        sleep 5
    done
    case $state in
        RUNNING* | *TimeLimit) scontrol requeue "$job" ;;
        *) ;; # somebody cancelled it
    esac
fi
exit "$status"
