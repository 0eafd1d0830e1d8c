# Sourced by the templates and by the script that Finetune.sweep --slurm writes. Runs a command and puts the job back into the queue if
# the command should be started again.
#
# That is the case if it was asked to stop. It then ends with exit code 75 or, because torchrun always ends with 1, writes the file
# `requeue` into the folder of its run. Before it has installed its signal handlers, it ends with 128 + the number of the signal.
# It is also the case if the command failed (a dead rank, a hang, a node without memory) but has written a checkpoint since this start.
# A command that failed without a new checkpoint would fail again, so the job ends.

# srun does not inherit --cpus-per-task from sbatch (Slurm 22.05 and later), and might give a task a single core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# Usage: run_or_requeue FOLDER COMMAND...
# FOLDER: the run's folder.
run_or_requeue() {
  local folder="$1" status=0 started reason=""
  shift
  mkdir -p "$folder"
  started="$folder/.started-${SLURM_JOB_ID}"
  touch "$started"
  # The signal that stops the command must not end this shell.
  trap : TERM USR1
  "$@" || status=$?
  case "$status" in
    0) ;;
    75 | 138 | 143) reason="asked to stop" ;;
    *)
      if [ "$folder/requeue" -nt "$started" ]; then
        reason="asked to stop"
      elif [ "$folder/checkpoint-last.pth" -nt "$started" ]; then
        reason="failed with code $status after saving a checkpoint"
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

# Usage: refuse FLAG SETTING ARGUMENT...
# Refuse a flag among the arguments that the template passes itself, from its own setting.
refuse() {
  local flag="$1" setting="$2" word
  shift 2
  for word in "$@"; do
    case "$word" in
      "$flag" | "$flag"=*)
        echo "error: $word: set $setting instead, because the job looks for the run's files there" >&2
        exit 2
        ;;
    esac
  done
}
