# Sourced by the recipes of the data sets. `finetune PRESET FLAG...` fine-tunes, predicts the validation cases of the fold and scores them.
#
# The recipe sets data (folder or list), out (folder of the run), volumes (what to predict), labels, and images (folders, for the pictures).
# With volumes="" nothing is predicted.

# The arguments of the recipe are refused before anything is installed.
recipe="$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)"
for word in "$@"; do
  case "$word" in
    --out_dir | --out_dir=* | --data | --data=*)
      echo "error: $word: expected as DATA=... or OUT=... before the command; prediction and scores use it too" >&2
      exit 2
      ;;
    --preset | --preset=*)
      echo "error: $word: this recipe is for ${recipe##*/}; prediction and scores use it too" >&2
      exit 2
      ;;
  esac
done

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

finetune() {
  local preset="$1" word
  shift
  # last, because prediction and scores use them too: they win over a file of settings
  set -- --fold 0 "$@" --preset "$preset" --data "$data" --out_dir "$out"
  for word in "$@"; do
    case "$word" in
      --help | -h | --dry_run)
        launch Finetune.main_finetune "$@"
        return
        ;;
    esac
  done
  # Finetune.predict refuses this too, but only after the training
  if [ -d "$volumes" ]; then
    case "$("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$out")/" in
      "$(cd "$volumes" && pwd -P)"/*)
        echo "error: OUT=$out: is in $volumes, expected a folder outside it (its label maps would be taken for images)" >&2
        exit 2
        ;;
    esac
  fi
  # in a subshell, which the program replaces when LAUNCHER is set
  (launch Finetune.main_finetune "$@")
  [ -n "$volumes" ] || return 0
  "$PYTHON" -m Finetune.predict --checkpoint "$out" --images "$volumes" --cases validation --out "$out/predictions"
  "$PYTHON" -m Finetune.evaluate --predictions "$out/predictions" --labels "$labels" --preset "$preset" --images "${images[@]}" --out "$out/scores"
}
