#!/usr/bin/env bash
# COVID19_20: lesions of COVID-19; 160 training and 39 validation cases.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold and scores them.
#
#   DATA=/path/to/COVID19_20 bash scripts/COVID19_20/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/COVID19_20/run.sh --init scratch    random weights
#   bash scripts/COVID19_20/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below.
# DATA: COVID-19-20_v2/ as published, with Train/.
# OUT: folder of the run. NPROC: processes, one per GPU: 1, 2 or 4, because the batch of 4 stays the same.
#
# Hardware: one GPU with 24 GB (expected). Time and result: not measured.
# From the authors' code: loss, learning rate rule, weight decay, crops, overlap, feature_size 48.
# Our choice: warm-up, Gaussian blending. The 400 epochs are the authors'.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/COVID19_20}"
out="${OUT:-runs/COVID19_20}"
volumes="$data" labels="$data" images="$data/Train"

finetune COVID19_20 \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 400 --warmup_epochs 20 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 20 --overlap 0.5 --blending gaussian --seed 0 \
  --recipe scripts/COVID19_20/run.sh "$@"
