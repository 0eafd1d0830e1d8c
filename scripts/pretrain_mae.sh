#!/usr/bin/env bash
# Plain 3D MAE, the baseline of GL-MAE: the same ViT-B and the same volumes, local views of 96^3 alone.
#
#   NPROC=8 bash scripts/pretrain_mae.sh --out_dir runs/mae_1k
#
# Hardware: GPUs of 24 GB or more (expected, not measured by us). All numbers are our choice, the same as GL-MAE's where both have them.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case " $* " in # a list of your own has its own folder as its root
  *" --datasets "*) data=(--data_root data) ;;
  *" --datalist "*) data=() ;;
  *) data=(--datasets 1k --data_root data) ;;
esac

launch Pretrain.main_pretrain \
  --method mae \
  --model base --patch_size 16 --decoder_embed_dim 576 --decoder_depth 8 --decoder_num_heads 16 \
  ${data[@]+"${data[@]}"} --cache_dir cache \
  --intensity window --low -1000 --high 1000 --spacing none \
  --local_views 8 --local_size 96 --local_scale 0.2 0.5 --crop_mode resize --flip_prob 0.2 \
  --mask_ratio_local 0.6 --norm_pix_loss \
  --epochs 1600 --warmup_epochs 40 --batch_size 32 --micro_batch_size 1 --blr 1.5e-4 --weight_decay 0.05 --clip_grad 3 \
  --save_every 100 --seed 0 \
  --out_dir runs/mae \
  "$@"
