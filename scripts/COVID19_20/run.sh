#!/usr/bin/env bash
# COVID19_20: lesions of COVID-19, 160 cases train, 39 validate.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold, scores them.
#
#   DATA=/path/to/COVID19_20 bash scripts/COVID19_20/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/COVID19_20/run.sh --init scratch          the same from random weights
#   bash scripts/COVID19_20/run.sh --help                  every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. DATA: COVID-19-20_v2/ as published: Train/.
# OUT: folder of the run. NPROC: processes, one per GPU. The batch does not change with NPROC.
# Hardware: one GPU of 24 GB (expected). Time and result: not measured by us.
# From the authors' code: loss, lr rule, weight decay, crops, overlap, feature_size 48.
# Ours: warm-up, gaussian blending (400 epochs are the authors').

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/COVID19_20}"
out="${OUT:-runs/COVID19_20}"
volumes="$data" labels="$data" images="$data/Train"

finetune COVID19_20 \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 400 --warmup_epochs 20 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 20 --overlap 0.5 --blending gaussian --seed 0 \
  "$@"
