#!/usr/bin/env bash
# BTCV_iso: 13 abdominal organs at GL-MAE's isotropic spacing.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold and scores them.
#
#   DATA=/path/to/BTCV_iso bash scripts/BTCV_iso/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/BTCV_iso/run.sh --init scratch    random weights
#   bash scripts/BTCV_iso/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below.
# DATA: RawData/Training of the challenge, with img/ and label/.
# OUT: folder of the run. NPROC: processes, one per GPU: 1, 2 or 4, because the batch of 4 stays the same.
#
# Hardware: one GPU with 24 GB (expected). Time and result: not measured.
# From the authors' code: loss, learning rate rule, weight decay, crops, overlap, feature_size 48.
# Our choice: epochs (not published for BTCV), warm-up of 50 epochs, Gaussian blending. 3000 epochs are 18k updates (24 cases, 4 per
# update). For 25k updates: --epochs 4167. Use the same number for all runs that are compared.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/BTCV_iso}"
out="${OUT:-runs/BTCV_iso}"
volumes="$data" labels="$data" images="$data/img"

finetune BTCV_iso \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 3000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 100 --overlap 0.5 --blending gaussian --seed 0 \
  --recipe scripts/BTCV_iso/run.sh "$@"
