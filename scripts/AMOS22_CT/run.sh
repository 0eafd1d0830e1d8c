#!/usr/bin/env bash
# AMOS22_CT: 15 abdominal organs; 240 training and 60 validation cases.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold and scores them.
#
#   DATA=/path/to/AMOS22_CT bash scripts/AMOS22_CT/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/AMOS22_CT/run.sh --init scratch    random weights
#   bash scripts/AMOS22_CT/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below.
# DATA: amos22/ as published, with imagesTr, labelsTr, imagesVa, labelsVa.
# OUT: folder of the run. NPROC: processes, one per GPU: 1, 2 or 4, because the batch of 4 stays the same.
#
# Hardware: one GPU with 24 GB (expected). Time and result: not measured.
# From the authors' code: loss, learning rate rule, weight decay, crops, overlap, feature_size 48.
# Our choice: epochs, warm-up, Gaussian blending.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/AMOS22_CT}"
out="${OUT:-runs/AMOS22_CT}"
volumes="$data" labels="$data" images=("$data/imagesTr" "$data/imagesVa")

finetune AMOS22_CT \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 1000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 50 --overlap 0.5 --blending gaussian --seed 0 \
  --recipe scripts/AMOS22_CT/run.sh "$@"
