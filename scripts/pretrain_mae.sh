#!/usr/bin/env bash
# Plain 3D MAE, the baseline of GL-MAE: the same ViT-B and volumes, with local views of 96^3 only, 1600 epochs.
#
#   NPROC=8 bash scripts/pretrain_mae.sh --out_dir runs/mae_1k
#   bash scripts/pretrain_mae.sh --decoder cross --decode_fraction 0.25                      cheaper: a quarter of the removed patches is decoded
#
# Arguments are passed on to the program and override the values below. NPROC: number of processes, one per GPU.
# Data: as pretrain_glmae.sh.
# Hardware: GPUs of 24 GB or more. Expected, not measured here; the full run was not made here either.
# Result: checkpoint-1599.pth, for scripts/BTCV/run.sh.
# All numbers are our choice, and equal to GL-MAE's where both methods have the setting.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

read -ra data <<<"$(pretraining_data "$@")"

launch Pretrain.main_pretrain \
  --method mae \
  --model base --patch_size 16 --decoder_embed_dim 576 --decoder_depth 8 --decoder_num_heads 16 --standardize \
  ${data[@]+"${data[@]}"} --cache_dir cache \
  --intensity window --low -1000 --high 1000 --spacing none \
  --local_views 8 --local_size 96 --local_scale 0.2 0.5 --crop_mode resize --flip_prob 0.2 \
  --mask_ratio_local 0.6 --norm_pix_loss \
  --epochs 1600 --warmup_epochs 40 --batch_size 32 --micro_batch_size 1 --blr 1.5e-4 --weight_decay 0.05 --clip_grad 3 \
  --save_every 100 --seed 0 \
  --out_dir runs/mae \
  --recipe scripts/pretrain_mae.sh "$@"
