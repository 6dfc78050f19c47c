#!/usr/bin/env bash
# Submits an array of tasks and the merge that follows them; prints the merge's job id on the last line.
#
#   slurm.sh [sbatch options] -- quantize MODEL OUT TASKS [options of quantize]
#   slurm.sh [sbatch options] -- calibrate MODEL FILE.safetensors TASKS [options of quantize]
#
# MODEL and OUT lie where every node sees them. The parts lie in OUT.parts (FILE.shard-I-of-N.safetensors) and stay there
# after the merge. The same command goes on where it was: a finished task is skipped, a stopped one resumes. Tasks that a
# node's failure or preemption ends are requeued by Slurm. Threads are those of the allocation (--cpus-per-task).
# Tasks that solve block by block run at the same time (--together MINUTES): as many nodes, or CPUs, must be free.
# To chain: slurm.sh --dependency=afterok:ID -- quantize ….
set -euo pipefail

# Of a checkout this script lies in it; elsewhere the npm package is asked for. ARROWQUANT names another command.
command_here() {
  local folder
  folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  if [ ! -f "$folder/scripts/arrowquant.ts" ]; then echo "npx --yes arrowquant"; return; fi
  local bun="$folder/node_modules/.bin/bun"
  [ -x "$bun" ] || bun=bun
  echo "$bun run $folder/scripts/arrowquant.ts"
}

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

submit() {
  local array=() after=()
  while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    # What the tasks wait for the merge waits for anyway, behind them.
    case "$1" in
      --dependency|-d)
        [ $# -ge 2 ] || usage
        array+=("$1" "$2")
        shift
        ;;
      --dependency=*|-d?*) array+=("$1") ;;
      *) array+=("$1"); after+=("$1") ;;
    esac
    shift
  done
  [ $# -ge 5 ] || usage
  shift
  local action=$1 model=$2 out=$3 tasks=$4 task option previous="" merged=()
  shift 4
  # What the merge has to know as well: which weights are meant, and what --for may do.
  for option in "$@"; do
    case "$option" in --variant|--variant=*|--allow-rounding) merged+=("$option") ;;
      *) [ "$previous" != --variant ] || merged+=("$option") ;;
    esac
    previous=$option
  done
  [[ "$action" =~ ^(quantize|calibrate)$ && "$tasks" =~ ^[1-9][0-9]*$ ]] || usage
  export ARROWQUANT="${ARROWQUANT:-$(command_here)}"
  local logs="${out%.safetensors}.logs"
  mkdir -p "$logs"
  task=$(sbatch --parsable --requeue --open-mode=append --job-name="arrowquant-$action" --array="1-$tasks" \
    --output="$logs/task-%a.log" ${array[@]+"${array[@]}"} "${BASH_SOURCE[0]}" --task "$action" "$model" "$out" "$@")
  echo "array $task: $tasks tasks, logs in $logs" >&2
  # Nothing is merged unless every task has finished.
  sbatch --parsable --requeue --open-mode=append --job-name=arrowquant-merge --dependency="afterok:${task%%;*}" \
    --kill-on-invalid-dep=yes --output="$logs/merge.log" ${after[@]+"${after[@]}"} "${BASH_SOURCE[0]}" \
    --merge "$action" "$model" "$out" "$tasks" ${merged[@]+"${merged[@]}"}
}

# The shard comes from the array's variables. --resume: go on, skip, or begin, whichever it is.
run_task() {
  local action=$1 model=$2 out=$3
  shift 3
  export ARROW_QUANT_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-0}}"
  if [ "$action" = calibrate ]; then exec $ARROWQUANT quantize "$model" --save-calibration "$out" "$@"; fi
  exec $ARROWQUANT quantize "$model" "$out.parts" --resume "$@"
}

run_merge() {
  local action=$1 model=$2 out=$3 tasks=$4
  shift 4
  if [ "$action" = calibrate ]; then
    exec $ARROWQUANT merge "${out%.safetensors}".shard-*-of-"$tasks".safetensors "$out"
  fi
  exec $ARROWQUANT merge "$out.parts" "$out" --model "$model" --resume "$@"
}

case "${1:-}" in
  --task) shift; run_task "$@" ;;
  --merge) shift; run_merge "$@" ;;
  *) submit "$@" ;;
esac
