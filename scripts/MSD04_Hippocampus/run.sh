#!/usr/bin/env bash
# MSD04_Hippocampus: anterior and posterior hippocampus, MRI. The one data set that two CPU cores run in earnest.
# Fine-tunes UNETR on a small ViT with patch 8 (or MiM's network), predicts the validation cases of the fold, scores them.
#
#   DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/run.sh --init scratch
#   MODEL=mim DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/run.sh --init scratch
#   bash scripts/MSD04_Hippocampus/run.sh --help       every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. DATA: Task04_Hippocampus as published.
# OUT: folder of the run. NPROC: processes. The batch does not change with NPROC.
# Hardware: two CPU cores, under half an hour. Mean Dice 0.837 (UNETR), 0.841 (MiM): docs/finetuning.md. All settings are our choice: the papers do not use this data set.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/Task04_Hippocampus}"
model="${MODEL:-unetr}"
out="${OUT:-runs/MSD04_Hippocampus_$model}"
volumes="$data/dataset.json" labels="$data/labelsTr" images="$data/imagesTr"

case "$model" in
  unetr) epochs=20 network=(--model unetr --size tiny --depth 6 --patch_size 8 --feature_size 16) ;;
  mim) epochs=8 network=(--model mim --size tiny --depths 2 2 2 6 --roi 32 64 32) ;; # its network needs multiples of 32
  *) echo "error: MODEL=$model; allowed: unetr, mim" >&2; exit 2 ;;
esac

finetune MSD04_Hippocampus \
  "${network[@]}" \
  --epochs "$epochs" --warmup_epochs 1 --lr 1e-3 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 4 --crops 1 --validate_every 0 --overlap 0.5 --blending gaussian --seed 0 --workers 0 \
  "$@"
