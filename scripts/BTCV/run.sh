#!/usr/bin/env bash
# BTCV: 13 abdominal organs, 24 cases train, 6 validate.
# Fine-tunes UNETR on a ViT-B/16, predicts the validation cases of the fold, scores them.
#
#   DATA=/path/to/BTCV bash scripts/BTCV/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/BTCV/run.sh --init scratch          the same from random weights
#   bash scripts/BTCV/run.sh --model mim --init runs/mim/checkpoint-799.pth      MiM: its encoder and its network
#   bash scripts/BTCV/run.sh --help                  every setting, with the values of this recipe
#
# Arguments go to Finetune.main_finetune and win over the ones below. DATA: RawData/Training of the challenge: img/, label/.
# OUT: folder of the run. NPROC: processes, one per GPU. The batch does not change with NPROC.
# Hardware: one GPU of 24 GB (expected). Time and result: not measured by us.
# From the authors' code: loss, lr rule, weight decay, crops, overlap, feature_size 48.
# Ours: epochs (BTCV's are shipped by nobody), warm-up 50, gaussian blending. 3000 epochs are 18k updates (24 cases, 4 per update);
# the second recipe has 25k: --epochs 4167. Take the same one for all that is compared.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/BTCV}"
out="${OUT:-runs/BTCV}"
volumes="$data" labels="$data" images="$data/img"

finetune BTCV \
  --model unetr --size base --patch_size 16 --feature_size 48 \
  --epochs 3000 --warmup_epochs 50 --blr 1e-4 --weight_decay 1e-5 --clip_grad 1 \
  --batch_size 4 --micro_batch_size 1 --crops 4 --validate_every 100 --overlap 0.5 --blending gaussian --seed 0 \
  "$@"
