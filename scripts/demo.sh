#!/usr/bin/env bash
# The whole chain on real CT volumes: data, cache, pretraining, fine-tuning, prediction, scores, pictures.
#
#   bash scripts/demo.sh                 GL-MAE and UNETR
#   bash scripts/demo.sh --method mim    MiM and its hybrid network
#   bash scripts/demo.sh --smoke         the same steps with a few updates each, to see that they work
#
# Hardware: two CPU cores. Result: runs/demo_glmae (or runs/smoke_glmae, runs/demo_mim, ...). A second run reuses environment, data and
# cache, and trains again.
# One scan with labels is used for training and one for scoring, so the table shows that the chain works, not how good a method is. A model
# made the labels. All numbers are our choice, made by looking at the scores of that same scan: there is no other.

# Arguments are refused before anything is installed.
method=glmae
size=demo
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) size=smoke ;;
    --method) method="${2:-}"; shift ;;
    *) echo "error: found '$1', expected --smoke, --method glmae or --method mim" >&2; exit 2 ;;
  esac
  shift
done
case "$method" in
  glmae | mim) ;;
  *) echo "error: --method: found '$method', expected glmae or mim" >&2; exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Two fine-tunings run at the same time. Where other work shares the cores, threads that wait for each other are slower than one.
export OMP_NUM_THREADS=1
preset=scripts/demo.yaml
data="${DATA:-data/sample_abdomen}"
cache="${CACHE:-cache/sample_abdomen}"
out="${OUT:-runs/${size}_$method}"
step() { printf '\n== %s   [%d s so far]\n   -> %s\n' "$1" "$SECONDS" "$2"; }

case "$method" in
  glmae)
    names=(GL-MAE UNETR)
    # The views have the size of the fine-tuning's crops. Patches are reconstructed as they are, not normalised, so that the pictures need
    # nothing of the true patch. These losses are about a twentieth of normalised ones, hence their weights.
    pretrain=(
      --model tiny --depth 6 --patch_size 8 --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4 --norm_pix_loss false
      --weight_rec_global 20 --weight_rec_local 20 --crop_mode fixed --global_views 2 --global_size 96 96 8 --local_views 4 --local_size 48 48 8 --flip_prob 0
      --mask_ratio_global 0.6 --mask_ratio_local 0.6 --out_dim 256 --hidden_dim 256 --bottleneck_dim 64
      --batch_size 4 --lr 1e-3 --teacher_temp 0.03 0.04 --teacher_temp_epochs 2 --momentum 0.98 1
    )
    finetune=(--model unetr --patch_size 8 --feature_size 8 --crops 2 --lr 1e-3)
    pretrain_epochs=12 pretrain_samples=160 finetune_epochs=10 finetune_samples=50
    minutes=(3 4)
    ;;
  mim)
    names=(MiM "MiM's network")
    local_size=64
    [ "$size" = smoke ] && local_size=32
    pretrain=(
      --model tiny --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4 --norm_pix_loss false
      --weight_rec_up 20 --weight_rec_mid 20 --weight_rec_down 20 --local_size "$local_size" --group 2
      --num_mid 4 --num_down 2 --crop_mode resize --global_scale 0.5 1.0
      --mask_ratio_up 0.5 --mask_ratio_mid 0.6 --mask_ratio_down 0.5 --align cosine
      --batch_size 2 --lr 1e-3
    )
    finetune=(--model mim --roi 96 96 32 --drop_path 0 --crops 1 --lr 1e-3)
    pretrain_epochs=4 pretrain_samples=20 finetune_epochs=6 finetune_samples=20
    minutes=(3 3)
    ;;
esac
if [ "$size" = smoke ]; then pretrain_epochs=1 pretrain_samples=4 finetune_epochs=1 finetune_samples=2; fi

if [ "$size" = demo ]; then
  cat <<TEXT
Expected on two cores of an Intel Xeon, longer where other work shares them:
  data and cache       under 1 minute, with a download of 39 MB
  pretraining          ${minutes[0]} minutes
  two fine-tunings     ${minutes[1]} minutes, at the same time: from the pretrained encoder, and from random weights
  prediction, scores   under 1 minute
TEXT
fi

step "1/6 Data: two abdominal CT scans with labels, a chest and a trunk without" "$data"
"$PYTHON" -m scripts.make_sample_data --out "$data"

step "2/6 Cache: preprocess the volumes once" "$cache"
preprocessing=(--spacing 3 --low -200 --high 600)
"$PYTHON" generate_cache_files.py --datalist "$data/structures.json" --section pretraining --cache_dir "$cache" "${preprocessing[@]}"
"$PYTHON" generate_cache_files.py --preset "$preset" --data_root "$data" --cache_dir "$cache"

step "3/6 Pretraining: ${names[0]} on three scans, without labels" "$out/pretrain"
# Results of an earlier run are removed, because this one trains again.
rm -rf "$out/pretrain" "$out/finetune" "$out/predictions" "$out/scores" "$out/scratch" "$out/dice.txt"
launch Pretrain.main_pretrain --method "$method" "${pretrain[@]}" "${preprocessing[@]}" \
  --datalist "$data/structures.json" --section pretraining --cache_dir "$cache" \
  --epochs "$pretrain_epochs" --samples_per_epoch "$pretrain_samples" --warmup_epochs 1 --save_every 100 --log_every 1 --workers 0 --seed 0 \
  --out_dir "$out/pretrain" --recipe scripts/demo.sh

# Start the command "${@:2}" with its output in the file $1. It is ended when this script ends.
in_background() {
  log="$1"
  "${@:2}" >"$log" 2>&1 &
  background=$!
  trap 'kill "$background" 2>/dev/null || true' EXIT
}

# Wait for that command. Where it fails, show the end of its output and stop.
await_background() {
  wait "$background" || { tail -n 5 "$log" >&2; exit 1; }
  trap - EXIT
}

# Fine-tune into the folder $1, with further settings.
finetune() {
  launch Finetune.main_finetune --preset "$preset" --data "$data" --cache_dir "$cache" --fold 0 \
    --init "$out/pretrain/checkpoint-last.pth" "${finetune[@]}" \
    --epochs "$finetune_epochs" --samples_per_epoch "$finetune_samples" --warmup_epochs 0.5 --batch_size 1 --class_balance 0.7 --validate_every 0 \
    --save_every 1000 --workers 0 --seed 0 --out_dir "$1" --recipe scripts/demo.sh "${@:2}"
}

step "4/6 Fine-tuning: ${names[1]} on one scan, from that checkpoint; the same from random weights at the same time" "$out/finetune"
mkdir -p "$out/scratch"
in_background "$out/scratch/finetune.log" finetune "$out/scratch/finetune" --scratch_twin
finetune "$out/finetune"
await_background

# Predict the other scan and score it, in the folder $1. Only the trunk is kept: the training scan shows no arms. Bones and back muscles have
# several parts.
predict() {
  "$PYTHON" -m Finetune.predict --checkpoint "$1/finetune/checkpoint-last.pth" --images "$data/imagesTs" --out "$1/predictions" \
    --largest_foreground --largest_component 1 2 3 4 6
  "$PYTHON" -m Finetune.evaluate --predictions "$1/predictions" --labels "$data/structuresTs" --preset "$preset" \
    --images "$data/imagesTs" --out "$1/scores"
}

step "5/6 Prediction: the other scan, a DICOM series, in its own geometry; scores against its reference labels" "$out/scores"
in_background "$out/scratch/predict.log" predict "$out/scratch"
predict "$out"
await_background

step "6/6 Dice: the encoder pretrained, and from random weights" "$out/dice.txt"
"$PYTHON" -m scripts.demo_table --pretrained "$out/scores" --scratch "$out/scratch/scores" --out "$out/dice.txt"

printf '\nDone. Results:\n'
find "$out" \( -name '*.png' -o -name '*.nii.gz' -o -name 'scores.*' -o -name 'dice.txt' -o -name 'checkpoint-last.pth' \) | sort | sed 's/^/  /'
