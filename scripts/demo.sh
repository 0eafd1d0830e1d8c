#!/usr/bin/env bash
# The whole chain on real CT volumes: data, cache, pretraining, fine-tuning, prediction, scores, pictures.
#
#   bash scripts/demo.sh                 GL-MAE and UNETR
#   bash scripts/demo.sh --method mim    MiM and its hybrid network
#   bash scripts/demo.sh --smoke         the same steps with a few updates each, to see that they work
#
# Hardware: two CPU cores. Time, without the installation: under 10 minutes (6 min 37 s measured for GL-MAE), --smoke under 90 seconds.
# Result: runs/demo_glmae (or runs/smoke_glmae, runs/demo_mim, ...). A second run reuses environment, data and cache, and trains again.
# The Dice table shows that the chain works, not how good a method is: there is one training scan, and the labels come from a model.
# GL-MAE has all its loss terms, on a small ViT and small views. MiM has its three levels of 64^3 in crops of 128^3 and both alignments,
# on the tiny encoder. All numbers are our choice.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

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

data="${DATA:-data/sample_abdomen}"
cache="${CACHE:-cache/sample_abdomen}"
out="${OUT:-runs/${size}_$method}"
step() { printf '\n== %s\n   -> %s\n' "$1" "$2"; }

case "$method" in
  glmae)
    names=(GL-MAE UNETR)
    pretrain=(
      --model tiny --depth 6 --patch_size 8 --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4
      --global_views 2 --global_size 80 --global_scale 0.5 1.0 --local_views 4 --local_size 48 --local_scale 0.2 0.5
      --mask_ratio_global 0.6 --mask_ratio_local 0.6 --out_dim 256 --hidden_dim 256 --bottleneck_dim 64
      --batch_size 2 --lr 3e-4 --teacher_temp_epochs 2
    )
    # The scan to predict is 40 mm thick: a flat window fits it better than the preset's 64^3.
    finetune=(--model unetr --patch_size 8 --feature_size 16 --roi 64 64 16 --crops 3 --lr 2e-3)
    pretrain_epochs=8 pretrain_samples=40 finetune_epochs=10 finetune_samples=50
    ;;
  mim)
    names=(MiM "MiM's network")
    local_size=64
    [ "$size" = smoke ] && local_size=32
    pretrain=(
      --model tiny --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4
      --local_size "$local_size" --group 2 --num_mid 4 --num_down 2 --crop_mode resize --global_scale 0.5 1.0
      --mask_ratio_up 0.5 --mask_ratio_mid 0.6 --mask_ratio_down 0.5 --align cosine
      --batch_size 2 --lr 1e-3
    )
    finetune=(--model mim --roi 64 --drop_path 0 --crops 2 --lr 4e-3)
    pretrain_epochs=4 pretrain_samples=20 finetune_epochs=6 finetune_samples=20
    ;;
  *) echo "error: --method: found '$method', expected glmae or mim" >&2; exit 2 ;;
esac
if [ "$size" = smoke ]; then pretrain_epochs=1 pretrain_samples=4 finetune_epochs=1 finetune_samples=2; fi

step "1/6 Data: two abdominal CT scans with organ labels, one chest CT without" "$data"
"$PYTHON" -m scripts.make_sample_data --out "$data"

step "2/6 Cache: preprocess the volumes once" "$cache"
"$PYTHON" generate_cache_files.py --datalist "$data/dataset.json" --section pretraining --cache_dir "$cache"
"$PYTHON" generate_cache_files.py --preset sample_abdomen --data_root "$data" --cache_dir "$cache"

step "3/6 Pretraining: ${names[0]} on the training scan and the chest scan, without labels" "$out/pretrain"
# Results of an earlier run are removed, because this one trains again.
rm -rf "$out/pretrain" "$out/finetune" "$out/predictions" "$out/scores"
launch Pretrain.main_pretrain --method "$method" "${pretrain[@]}" \
  --datalist "$data/dataset.json" --section pretraining --cache_dir "$cache" \
  --epochs "$pretrain_epochs" --samples_per_epoch "$pretrain_samples" --warmup_epochs 1 --save_every 4 --log_every 1 --workers 0 --seed 0 \
  --out_dir "$out/pretrain"

step "4/6 Fine-tuning: ${names[1]} on one scan, from that checkpoint" "$out/finetune"
launch Finetune.main_finetune --preset sample_abdomen --data "$data" --cache_dir "$cache" --fold 0 \
  --init "$out/pretrain/checkpoint-last.pth" "${finetune[@]}" \
  --epochs "$finetune_epochs" --samples_per_epoch "$finetune_samples" --warmup_epochs 0.5 --batch_size 1 --validate_every 0 \
  --save_every 1000 --workers 0 --seed 0 --out_dir "$out/finetune"

step "5/6 Prediction: the other scan, a DICOM series, in its own geometry" "$out/predictions"
"$PYTHON" -m Finetune.predict --checkpoint "$out/finetune/checkpoint-last.pth" --images "$data/imagesTs" --out "$out/predictions"

step "6/6 Scores: against the reference labels of that scan" "$out/scores"
"$PYTHON" -m Finetune.evaluate --predictions "$out/predictions" --labels "$data/labelsTs" --preset sample_abdomen \
  --images "$data/imagesTs" --out "$out/scores"

printf '\nDone. Results:\n'
find "$out" -name '*.png' -o -name '*.nii.gz' -o -name 'scores.*' -o -name 'checkpoint-last.pth' | sort | sed 's/^/  /'
