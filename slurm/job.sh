#!/usr/bin/env bash
# What the jobs of this folder share. They source this file when they have found the repository,
# $root, and then have: $job_id, the job's name for Slurm's commands; $job, what Slurm says of it;
# python, the command that starts Python; srun_options, what the site adds to srun. Outside of a job
# they print their help, if asked to.
# shellcheck disable=SC2034,SC2154

fail() {
    echo "error: $*" >&2
    exit 1
}

if [[ ${1:-} == --help ]]; then
    sed -n '2,/^#SBATCH/{ /^#SBATCH/d; s/^# \{0,1\}//; p }' "$0" # the comment it begins with
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || fail "submit this file with sbatch; bash $0 --help explains it"

# The SLURM_JOB_ID of an array's last task is the array's number: with that, Slurm's commands show,
# requeue and change all tasks.
job_id=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job_id=${job_id:-$SLURM_JOB_ID}
job=$(scontrol show --details job "$job_id")
# Where its folder is missing on a node, Slurm starts a job in /tmp.
folder=$(sed -n 's/^ *WorkDir=//p' <<<"$job")
[[ $PWD -ef $folder ]] || fail "${SLURMD_NODENAME:-this node} has no folder $folder:" \
    "submit from a folder that all nodes see, or with --chdir=FOLDER"

srun_options=() python=(python3)
for file in slurm/site.sh .venv/bin/activate; do
    # shellcheck disable=SC1090
    [[ -f $root/$file ]] && source "$root/$file"
done
unset file folder

# Have Slurm start this job again, and end. Where that is not allowed (sbatch --no-requeue) the
# status asks for it.
requeue_job() {
    echo "requeueing job $job_id"
    scontrol requeue "$job_id" || # if it succeeds it ends this script
        [[ $(scontrol show job "$job_id") == *JobState=PENDING* ]] || # Slurm has done it meanwhile
        echo "warning: job $job_id is not requeued: submit it again, and it continues" >&2
    exit 75
}

# Print the words of the file's line for this task of an array, each ended by a zero byte. Empty
# lines and comments do not count, nor does what Windows ends lines with.
sweep_words() {
    local file=$1 task=${SLURM_ARRAY_TASK_ID:-0} lines count line
    [[ -f $file && -r $file ]] || fail "--sweep: $PWD has no file $file that can be read"
    lines=$(sed 's/\r$//; /^[[:space:]]*\(#\|$\)/d' "$file")
    count=$(grep -c . <<<"$lines" || true)
    ((task >= 1 && task <= count)) ||
        fail "--sweep: $file has $count lines, and this is task $task: submit --array=1-$count"
    line=$(sed -n "${task}p" <<<"$lines")
    xargs printf '%s\0' <<<"$line" 2>/dev/null ||
        fail "--sweep: a quotation mark is not closed in this line of $file: $line"
}

# Print "NODES: GPUS" for each group of nodes of the job, where those of a group are alike.
gpus_of_nodes() {
    local line rest count gpus='gpu(:[^:,(]+)?:([0-9]+)(.*)'
    while read -r line; do
        [[ $line == Nodes=* ]] || continue
        rest=${line##* GRES=} count=0
        while [[ $rest =~ $gpus ]]; do
            ((count += BASH_REMATCH[2]))
            rest=${BASH_REMATCH[3]}
        done
        line=${line%% *}
        echo "${line#Nodes=}: $count"
    done <<<"$job"
}

# Print the fewest CPUs that the job has on a node. Slurm writes "16(x2),8".
fewest_cpus() {
    tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1
}

# Print the folder for the ranks' output: beside the job's output, if that is a file.
rank_folder() {
    local output
    output=$(readlink "/proc/$$/fd/1")
    [[ -f $output ]] || output=slurm-$SLURM_JOB_ID.out
    echo "${output%.out}.ranks"
}

# A task of a step, for `bash -c "$logged" rank FOLDER FILE PROGRAM ...`: it shows what the program
# prints, and keeps it in a file of the rank's own. A signal reaches all processes of a task, and
# only the program is to follow it. Readers of data, or a command of tracking.notify, may hold the
# output open when the program has ended. That is not waited for, and cut off 5 s later, because a
# step lasts as long as its output. A node that lacks FILE or PROGRAM ends the job, as late as
# programs do that the ranks of other nodes are to follow with status 1.
# shellcheck disable=SC2016
logged='lacks() {
    ((SLURM_LOCALID)) || echo "error: ${SLURMD_NODENAME:-a node} has no $1: put the repository" \
        "and the environment where all nodes see them" >&2
    sleep 6
    exit 1
}
[[ -f $2 ]] || lacks "$2"
type -P "$3" >/dev/null || lacks "$3"
trap : HUP USR1 TERM
exec 3> >(trap "" HUP USR1 TERM && exec tee -a "$1/rank-$SLURM_PROCID.log")
tee=$! status=0
"${@:3}" >&3 2>&3 3>&- || status=$?
exec 3>&-
for _ in {1..10}; do
    kill -0 "$tee" 2>/dev/null || break
    sleep 0.1
done
kill -0 "$tee" 2>/dev/null && (sleep 5; kill -KILL "$tee") &>/dev/null &
exit "$status"'
