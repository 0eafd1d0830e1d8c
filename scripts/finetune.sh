# Sourced by the recipes of the data sets: finetune PRESET SETTING... fine-tunes, predicts the validation cases of the fold, scores them.
#
# The recipe sets data (folder or list), out (folder of the run), volumes (what to predict), labels, images (for the pictures).

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

finetune() {
  local preset="$1"
  shift
  case " $* " in *" --out_dir "* | *" --data "*) echo "error: --data, --out_dir: give them as DATA= and OUT=, prediction and scores use them too" >&2; exit 2 ;; esac
  launch Finetune.main_finetune --preset "$preset" --data "$data" --out_dir "$out" --fold 0 "$@"
  case " $* " in *" --help "* | *" -h "*) return ;; esac
  "$PYTHON" -m Finetune.predict --checkpoint "$out" --images "$volumes" --cases validation --out "$out/predictions"
  "$PYTHON" -m Finetune.evaluate --predictions "$out/predictions" --labels "$labels" --preset "$preset" --images "$images" --out "$out/scores"
}
