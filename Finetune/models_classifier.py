"""Classification of whole volumes (CC-CCII): a ViT, the mean of its patch tokens, one linear layer; accuracy and AUC.

Fine-tuned as a whole, or linear: `--freeze` trains the last layer alone. The volume is resized to the preset's roi.
"""

from torch import Tensor, nn


class Classifier(nn.Module):
    """(B, C, D, H, W) -> logits (B, K). The authors pool before the encoder's norm, here it is after it (our choice),
    so that the pretrained norm sees what it was trained on."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x, return_features=True)["patch_features"].mean(dim=1))
