# Sourced by the templates, and by what Finetune.sweep --slurm writes: run a command, and put the job back into the queue where that
# helps.
#
# It helps when the command was asked to stop: it says so by its exit code, 75, or, as torchrun ends with 1 whatever happens, by a file
# `requeue` in the folder of its run; and one that had not come as far as to listen died of the signal (128 + its number). And it helps
# when it failed (a dead rank, a hang, a node without memory) but has written a checkpoint since this start. What fails without having
# got any further would only fail again, and ends the job.

# srun does not take --cpus-per-task over from sbatch (Slurm 22.05 and later): a task might be left with a single core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

run_or_requeue() { # FOLDER COMMAND...: FOLDER is that of the command's run
  local folder="$1" status=0 started reason=""
  shift
  mkdir -p "$folder"
  started="$folder/.started-${SLURM_JOB_ID}"
  touch "$started"
  trap : TERM USR1 # this shell outlives the signal that its command acts on
  "$@" || status=$?
  case "$status" in
    0) ;;
    75 | 138 | 143) reason="asked to stop" ;;
    *)
      if [ "$folder/requeue" -nt "$started" ]; then
        reason="asked to stop"
      elif [ "$folder/checkpoint-last.pth" -nt "$started" ]; then
        reason="failed with code $status, but got further"
      fi
      ;;
  esac
  rm -f "$started"
  if [ -n "$reason" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
      echo "error: started ${SLURM_RESTART_COUNT} times, not again (MAX_RESTARTS)" >&2
      exit "$status"
    fi
    echo "$reason: job ${SLURM_JOB_ID} goes back into the queue"
    scontrol requeue "${SLURM_JOB_ID}"
    exit 0
  fi
  exit "$status"
}

refuse() { # FLAG SETTING ARGUMENT...: a flag that the template sets from one of its own settings, which it needs itself
  local flag="$1" setting="$2" word
  shift 2
  for word in "$@"; do
    case "$word" in
      "$flag" | "$flag"=*)
        echo "error: $word: set $setting instead, the job looks there for what the run has left" >&2
        exit 2
        ;;
    esac
  done
}
