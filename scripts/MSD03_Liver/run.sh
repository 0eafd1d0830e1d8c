#!/usr/bin/env bash
# MSD03_Liver: liver and tumours.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold, scores them.
#
#   DATA=/path/to/MSD03_Liver bash scripts/MSD03_Liver/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/MSD03_Liver/run.sh --init scratch          the same from random weights
#   bash scripts/MSD03_Liver/run.sh --help                  every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. DATA: Task03_Liver as published.
# OUT: folder of the run. NPROC: processes, one per GPU. The batch does not change with NPROC.
# Hardware: one GPU of 24 GB (expected). Time and result: not measured by us.
# From the authors' code: loss, lr rule, weight decay, crops, overlap, feature_size 48.
# Ours: epochs, warm-up, gaussian blending.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/MSD03_Liver}"
out="${OUT:-runs/MSD03_Liver}"
volumes="$data/dataset.json" labels="$data/labelsTr" images="$data/imagesTr"

finetune MSD03_Liver \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 1000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 50 --overlap 0.5 --blending gaussian --seed 0 \
  "$@"
