# Sourced by the templates: run a command, and put the job back into the queue if it was stopped by a signal and has saved.
#
# The program says so by its exit code, 75, and by a file `requeue` in its folder (torchrun and srun do not pass the code on). Any other
# failure ends the job: started again it would only fail again.

run_or_requeue() { # FOLDER COMMAND...: FOLDER is where the command's runs are
  local folder="$1" status=0 started
  shift
  mkdir -p "$folder"
  started="$folder/.started-${SLURM_JOB_ID}"
  touch "$started"
  trap : TERM USR1 # this shell outlives the signal that its command acts on
  "$@" || status=$?
  if [ "$status" -ne 0 ] && { [ "$status" -eq 75 ] || [ -n "$(find "$folder" -name requeue -newer "$started" -print -quit)" ]; }; then
    rm -f "$started"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
      echo "error: started ${SLURM_RESTART_COUNT} times, not again (MAX_RESTARTS)" >&2
      exit "$status"
    fi
    echo "stopped by a signal after saving: job ${SLURM_JOB_ID} goes back into the queue"
    scontrol requeue "${SLURM_JOB_ID}"
    exit 0
  fi
  rm -f "$started"
  exit "$status"
}
