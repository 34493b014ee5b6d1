#!/usr/bin/env bash
# From text to an exported model under Slurm, in one command: jobs that begin
# (train a tokenizer), tokenize the text and pack shards (arrays), merge (write
# the manifest), verify, train, evaluate and export. Each waits for the one
# before. Run this from the root of the repository, on a login node:
#
#   bash slurm/pipeline.sh --source 'texts/*.parquet' --data data/texts \
#       --run runs/texts --tasks 32 --train '--nodes=4 --gpus-per-node=8' \
#       -- --config 125M train.steps=20000
#
# --source WHAT        the text, as data_prep/shard.py takes it
# --data DIR           where the shards go
# --run DIR            the run's folder; evaluation.json and export/ are in it
# --tasks N            tasks that tokenize, and pack (default: 1); 32%8 runs
#                      8 of 32 at once
# --shard ARGUMENTS    more arguments of data_prep/shard.py
# --prepare OPTIONS    of sbatch, for the jobs without a GPU (all but two)
# --train OPTIONS      of sbatch, for training
# --evaluate OPTIONS   of sbatch, for the evaluation (default: --gpus-per-node=1)
# -- ...               arguments of launch/train.py
#
# ARGUMENTS and OPTIONS are one word each on this command line, quoted within as
# in a shell. When a job fails, those that wait for it are cancelled. Repair what
# its output (slurm-JOB.out) names and run the same command again: shards that
# are complete stay, training continues. While jobs of the same run are in the
# queue, this script refuses to submit others.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# Set the array `words` to the words of an option's value.
split() {
    mapfile -d '' -t words < <(xargs --no-run-if-empty printf '%s\0' <<<"$2" 2>/dev/null)
    wait $! || fail "$1 $2: a quotation mark is not closed"
}

source='' data='' run='' tasks=1 shard=() prepare=() train=() evaluate=(--gpus-per-node=1)
while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --help ]]; then
        sed -n '2,/^set /{ /^set /d; s/^# \{0,1\}//; p }' "$0"
        exit
    fi
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    (($# > 1)) || fail "$1 needs a value: see --help"
    case $1 in --shard | --prepare | --train | --evaluate) split "$1" "$2" ;; esac
    case $1 in
    --source) source=$2 ;;
    --data) data=$2 ;;
    --run) run=$2 ;;
    --tasks) tasks=$2 ;;
    --shard) shard=("${words[@]}") ;;
    --prepare) prepare=("${words[@]}") ;;
    --train) train=("${words[@]}") ;;
    --evaluate) evaluate=("${words[@]}") ;;
    *) fail "$1 is not an option: see --help (arguments of launch/train.py come after --)" ;;
    esac
    shift 2
done
[[ ${1:-} != -- ]] || shift
for word; do
    case $word in data.path=* | run.path=*) fail "$word: say it with --data or --run" ;; esac
done
[[ -n $source && -n $data && -n $run ]] || fail "--source, --data and --run are needed: see --help"
[[ $tasks =~ ^[1-9][0-9]*(%[1-9][0-9]*)?$ ]] || fail "--tasks $tasks is not like 32, nor like 32%8"
[[ -f slurm/job.sh ]] || fail "$PWD is not the root of the repository: run this from there"

# Jobs are named STAGE:RUN, with : for /, because %x in a job's --output stands for its name.
path=$(realpath -m "$run") queued=()
path=${path#/} path=${path//\//:}
queue=$(squeue --me --noheader --format='%F %j' | sort -un) # a line for an array
while read -r id name; do
    [[ ${name#*:} != "$path" ]] || queued+=("$id")
done <<<"$queue"
((!${#queued[@]})) ||
    fail "jobs of this run are in the queue: ${queued[*]}: wait for them, or end them with scancel"

# Submit a job that waits for the one before, if there is one, and print its number.
jobs=()
submit() {
    local stage=$1 options=(--parsable --job-name="$1:$path") job
    ((!${#jobs[@]})) || options+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    if ! job=$(sbatch "${options[@]}" "${@:2}"); then
        ((!${#jobs[@]})) || scancel "${jobs[@]}"
        fail "sbatch does not take the job that is to $stage: nothing is submitted"
    fi
    jobs+=("${job%%;*}") # the cluster's name may follow
    printf '%-9s job %s\n' "$stage" "${jobs[-1]}"
}

shards=(slurm/shard.sbatch --alone --source "$source" --out "$data" "${shard[@]}")
submit begin "${prepare[@]}" "${shards[@]}" --begin
submit tokenize "${prepare[@]}" --array="1-$tasks" "${shards[@]}"
submit pack "${prepare[@]}" --array="1-$tasks" "${shards[@]}" --merge
submit merge "${prepare[@]}" "${shards[@]}" --merge
submit verify "${prepare[@]}" slurm/run.sbatch data_prep/verify.py "$data"
submit train "${train[@]}" slurm/train.sbatch "$@" data.path="$data" run.path="$run"
submit evaluate "${evaluate[@]}" slurm/run.sbatch launch/evaluate.py --checkpoint "$run" \
    --data "$data" --json "$run/evaluation.json"
submit export "${prepare[@]}" slurm/run.sbatch launch/export.py --overwrite "$run" "$run/export"
