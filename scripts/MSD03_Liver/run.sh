#!/usr/bin/env bash
# MSD03_Liver: liver and tumours.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold and scores them.
#
#   DATA=/path/to/MSD03_Liver bash scripts/MSD03_Liver/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/MSD03_Liver/run.sh --init scratch    random weights
#   bash scripts/MSD03_Liver/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below.
# DATA: Task03_Liver as published.
# OUT: folder of the run. NPROC: processes, one per GPU: 1, 2 or 4, because the batch of 4 stays the same.
#
# Hardware: one GPU with 24 GB (expected). Time and result: not measured.
# From the authors' code: loss, learning rate rule, weight decay, crops, overlap, feature_size 48.
# Our choice: epochs, warm-up, Gaussian blending.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/MSD03_Liver}"
out="${OUT:-runs/MSD03_Liver}"
volumes="$data/dataset.json" labels="$data/labelsTr" images="$data/imagesTr"

finetune MSD03_Liver \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 1000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 50 --overlap 0.5 --blending gaussian --seed 0 \
  --recipe scripts/MSD03_Liver/run.sh "$@"
