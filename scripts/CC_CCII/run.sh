#!/usr/bin/env bash
# CC_CCII: normal, COVID-19 or common pneumonia, CT. Fine-tunes a ViT-B/16 classifier and reports accuracy and AUC of the validation cases.
#
#   python -m scripts.convert_cc_ccii --data CC-CCII --out data/CC_CCII    once: the published pictures to volumes
#   bash scripts/CC_CCII/run.sh --init runs/glmae/checkpoint-1599.pth
#   bash scripts/CC_CCII/run.sh --init runs/glmae/checkpoint-1599.pth --freeze    linear probe: only the last layer
#   bash scripts/CC_CCII/run.sh --help    all settings, with the values of this recipe
#
# Arguments are passed on to Finetune.main_finetune and override the values below.
# DATA: folder of the volumes. OUT: folder of the run, with classification.csv and classification.json.
#
# Hardware: one GPU with 24 GB (expected). Time and result: not measured.
# From the papers: 384 x 384 x 32 voxels, min-max intensities. Our choice: everything else, and folds by patient.

source "$(dirname "${BASH_SOURCE[0]}")/../finetune.sh"

data="${DATA:-data/CC_CCII}"
out="${OUT:-runs/CC_CCII}"
# the training writes the scores
volumes=""

finetune CC_CCII \
  --model classifier --size base --patch_size 16 \
  --epochs 50 --warmup_epochs 5 --lr 1e-4 --weight_decay 0.05 --clip_grad 1 \
  --batch_size 16 --micro_batch_size 2 --validate_every 5 --seed 0 \
  --recipe scripts/CC_CCII/run.sh "$@"
