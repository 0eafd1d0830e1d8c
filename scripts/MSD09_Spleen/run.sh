#!/usr/bin/env bash
# MSD09_Spleen: spleen, 32 cases train, 9 validate.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold, scores them.
#
#   DATA=/path/to/MSD09_Spleen bash scripts/MSD09_Spleen/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/MSD09_Spleen/run.sh --init scratch          the same from random weights
#   bash scripts/MSD09_Spleen/run.sh --help                  every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. DATA: Task09_Spleen as published.
# OUT: folder of the run. NPROC: processes, one per GPU. The batch does not change with NPROC.
# Hardware: one GPU of 24 GB (expected). Time and result: not measured by us.
# From the authors' code: loss, lr rule, weight decay, crops, overlap, feature_size 48.
# Ours: epochs, warm-up, gaussian blending.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/MSD09_Spleen}"
out="${OUT:-runs/MSD09_Spleen}"
volumes="$data/dataset.json" labels="$data/labelsTr" images="$data/imagesTr"

finetune MSD09_Spleen \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 1000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 50 --overlap 0.5 --blending gaussian --seed 0 \
  "$@"
