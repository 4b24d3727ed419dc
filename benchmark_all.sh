#!/usr/bin/env bash
# The sweep: benchmark.py for every model, batch size and precision, then the tables and the pictures.
#
#   bash benchmark_all.sh                                     the founding sweep
#   MODELS="google/vit-base-patch16-224" BATCH_SIZES="1 8" PRECISIONS="fp32 fp16" bash benchmark_all.sh -- --iterations 100
#   GPUS="0 1 2 3" bash benchmark_all.sh                      four cases at once, one on each GPU
#   bash benchmark_all.sh --list                              one command line a case, for another engine (Slurm, say)
#   bash benchmark_all.sh --help                              these lines
#
# MODELS, BATCH_SIZES   what to run, separated by spaces, tabs or line breaks, like all lists here; MODELS=builtin:
#                       every model that benchmark.py has built in
# PRECISIONS            likewise (default: fp32)
# PHASES, CONTEXT_LENS  likewise (default: forward; for decode 1024)
# RESULTS               the CSV that rows are appended to (default: results/local/benchmark.csv, which git ignores)
# PYTHON                the interpreter (default: python)
# All cases of a model are of one process, which pays for its imports once, unless several cases run at once.
# Rows that are there (same case, item, device and versions) are not run again, so a sweep that was stopped goes on.
# FORCE=1               run them all the same
# RETRY=failed          run those again that are not ok
# With one of these, GNU parallel runs several cases at once, each on its share of the CPU cores:
# GPUS                  one case at a time on each of these GPUs (numbers or UUIDs, as in CUDA_VISIBLE_DEVICES)
# JOBS                  so many cases at once (default: one for each of GPUS)
# HOSTS                 on these hosts, by ssh, and not on this one; each has this directory at the same path
# Options after -- go to benchmark.py unchanged, but for those that the sweep itself gives it, which are refused. A case
# that fails does not stop the sweep. Exit code: 0 all rows ok, 1 not all, 2 bad arguments of this script, 130 interrupted.
set -u

fail() {
    echo "benchmark_all.sh: error: $1" >&2
    exit 2
}

# What GNU parallel calls: one case ("$@") in a slot of this host, out of so many, on the slot's GPU if GPUs are given.
in_slot() {
    local slots=$1 gpus slot cores share start=(setpriv --pdeathsig TERM)
    read -ra gpus <<<"$2"
    shift 2
    # Job slots are numbered across all hosts; a login stands for one slot of its host and carries that number.
    if slot=$(expr "$PARALLEL_SSHLOGIN" : 'env SLOT=\([0-9]*\)'); then
        # GNU parallel kills a remote job's group for good as soon as its shell has ended: out of that group, so that
        # the case, which gets its signal when the shell ends, has time to remove its temporary files.
        start=(setsid --wait "${start[@]}")
    else
        slot=$PARALLEL_JOBSLOT
    fi
    [ ${#gpus[@]} -eq 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[slot - 1]}
    read -ra cores <<<"$("$1" -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
    share=$((${#cores[@]} / slots))
    if [ $share -gt 0 ]; then
        taskset -cp "$(IFS=, && echo "${cores[*]:(slot - 1) * share:share}")" $$ >/dev/null
    fi
    exec "${start[@]}" "$@" --concurrent-cases "$slots"
}

if [ "${1-}" = --in-slot ]; then
    shift
    in_slot "$@"
fi

if [[ ${1-} = --help || ${1-} = -h ]]; then
    sed -n '2,/^set/ { /^#/ s/^# \{0,1\}//p }' "${BASH_SOURCE[0]}"
    exit
fi

# Fills an array with the words of an environment variable, or of a default where that is unset or empty.
read_list() { # array, variable, default
    local -n words=$1
    local text=${!2-}
    read -rd '' -a words <<<"${text:-$3}" # to the end of the text, over all its lines
    [ -z "$text" ] || [ ${#words[@]} -gt 0 ] || fail "$2 is set, but there is nothing in it"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read_list models MODELS "facebook/convnext-tiny-224 microsoft/resnet-50"
read_list batch_sizes BATCH_SIZES "1 4 16"
read_list precisions PRECISIONS fp32
read_list phases PHASES forward
read_list context_lens CONTEXT_LENS 1024
read_list gpus GPUS ""
read_list hosts HOSTS ""
results=$(realpath -m "${RESULTS:-$here/results/local/benchmark.csv}" 2>/dev/null) || fail "RESULTS=${RESULTS-} is no path"
python=${PYTHON:-python}
if [ "${models[*]}" = builtin ]; then
    read -ra models < <(cd "$here" && "$python" -c 'from harness.architectures import BUILTIN_ARCHITECTURES as names; print(*names)')
    [ ${#models[@]} -gt 1 ] || fail "$python cannot import harness.architectures to list its models"
fi

list=
if [ "${1-}" = --list ]; then
    list=1
    shift
fi
[ "${1---}" = -- ] || fail "unknown argument $1; options for benchmark.py stand after --"
shift $(($# > 0))
declare -A given=([--model]=MODELS [--batch-size]=BATCH_SIZES [--precision]=PRECISIONS [--results]=RESULTS
    [--phase]=PHASES [--context-len]=CONTEXT_LENS [--skip]="RETRY or FORCE" [--concurrent-cases]=JOBS)
for option in "$@"; do
    name=${option%%=*}
    for whole in "${!given[@]}"; do
        # The beginning of one too: it is meant as an abbreviation, which benchmark.py does not take.
        [[ $name != --?* || $whole != "$name"* ]] || fail "$option: the sweep gives benchmark.py $whole; set ${given[$whole]}"
    done
done

case ${RETRY:-} in
'') skip=(--skip ended) ;;
failed) skip=(--skip ok) ;;
*) fail "RETRY takes failed, not $RETRY" ;;
esac
[ -z "${FORCE:-}" ] || skip=()

jobs=${JOBS:-${#gpus[@]}}
[[ $jobs =~ ^[0-9]{1,4}$ ]] || fail "JOBS takes a whole number, not $jobs"
[ ${#gpus[@]} -eq 0 ] || [ "$jobs" -eq ${#gpus[@]} ] || fail "JOBS=$jobs, but GPUS names ${#gpus[@]}: a GPU runs one case at a time"
[ "$jobs" -gt 0 ] || [ ${#hosts[@]} -eq 0 ] || jobs=1
if [ "$jobs" -gt 0 ]; then
    [[ $(parallel --version 2>/dev/null) == "GNU parallel"* ]] ||
        fail "GPUS, JOBS and HOSTS need GNU parallel (apt install parallel); without them the cases run one by one"
fi

processes=() # command lines
options=("$@")
add_process() { # model, batch sizes, precisions, options of the phase: all but the first are words in one argument each
    processes+=("$(printf '%q ' "$python" "$here/benchmark.py" --model "$1" --batch-size $2 --precision $3 $4 \
        --results "$results" "${skip[@]}" "${options[@]}")")
}
add_processes() { # model, options of the phase
    if [ -z "$list" ] && [ "$jobs" -eq 0 ]; then
        add_process "$1" "${batch_sizes[*]}" "${precisions[*]}" "$2"
        return
    fi
    for batch_size in "${batch_sizes[@]}"; do
        for precision in "${precisions[@]}"; do
            add_process "$1" "$batch_size" "$precision" "$2"
        done
    done
}
phase_options=()
for phase in "${phases[@]}"; do
    case $phase in
    forward) phase_options+=("") ;;
    decode) phase_options+=("${context_lens[@]/#/--phase decode --context-len }") ;;
    *) fail "PHASES takes forward and decode, not $phase" ;;
    esac
done
for model in "${models[@]}"; do
    for of_phase in "${phase_options[@]}"; do
        add_processes "$model" "$of_phase"
    done
done
if [ -n "$list" ]; then
    printf '%s\n' "${processes[@]}"
    exit
fi
for program in "$python" setpriv; do
    command -v -- "$program" >/dev/null || fail "$program is not there; PYTHON names the interpreter, util-linux has setpriv"
done
[ -n "${RESULTS:-}" ] || mkdir -p "$here/results/local"
# What cannot be printed, because the reader of a pipe has gone say, costs no row.
trap '' PIPE
[ -e /proc/self/fd/1 ] || exec >/dev/null
say() {
    printf '%s\n' "$@" 2>/dev/null
}

# Children run in the background, so that a signal to this script alone reaches them too, and at once; setpriv ends them
# when this script is killed outright.
child=
stop() {
    if [ -n "$child" ]; then
        kill -"$1" "$child" 2>/dev/null
        wait "$child"
    fi
    echo "benchmark_all.sh: interrupted; finished rows are kept, the same command goes on from there" >&2
    exit 130
}

problems=()
if [ "$jobs" -eq 0 ]; then
    trap 'stop TERM' INT TERM
    for i in "${!processes[@]}"; do
        say "[$((i + 1))/${#processes[@]}]"
        eval "setpriv --pdeathsig TERM ${processes[i]} &"
        child=$!
        wait "$child"
        code=$?
        [ $code -eq 0 ] || problems+=("exit code $code: benchmark.py ${processes[i]#*/benchmark.py }")
    done
else
    trap 'stop INT' INT TERM
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    logins=()
    for host in "${hosts[@]}"; do
        for ((slot = 1; slot <= jobs; slot++)); do
            logins+=(--sshlogin "1/env SLOT=$slot ssh $host")
        done
    done
    [ ${#hosts[@]} -gt 0 ] || logins=(--jobs "$jobs")
    # A case gets 20 s to end its processes and to remove its temporary files before it is killed.
    setpriv --pdeathsig INT parallel "${logins[@]}" --workdir "$PWD" --termseq TERM,20000,KILL,25 --joblog "$log" \
        --line-buffer --tagstring "[{#}/${#processes[@]}]" \
        ::: "${processes[@]/#/"$(printf '%q ' bash "$here/benchmark_all.sh" --in-slot "$jobs" "${gpus[*]}")"}" &
    child=$!
    wait "$child"
    ended=0
    while IFS=$'\t' read -r _ _ _ _ _ _ code signal command; do
        ended=$((ended + 1))
        [ "$code $signal" = "0 0" ] || problems+=("exit code $code, signal $signal: benchmark.py ${command#*/benchmark.py }")
    done < <(tail -n +2 "$log")
    [ $ended -eq ${#processes[@]} ] || problems+=("$((${#processes[@]} - ended)) did not run")
fi
trap - INT TERM

cases=$((${#models[@]} * ${#batch_sizes[@]} * ${#precisions[@]} * ${#phase_options[@]}))
say "" "$cases cases by ${#processes[@]} processes in $SECONDS s, ${#problems[@]} with rows that are not ok"
[ ${#problems[@]} -eq 0 ] || say "${problems[@]/#/  }"

if [ -s "$results" ]; then # without a row there is nothing to draw
    "$python" "$here/plot.py" "$results" || exit 1
fi
[ ${#problems[@]} -eq 0 ]
