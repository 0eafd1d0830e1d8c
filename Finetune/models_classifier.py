"""Classification of volumes (CC-CCII): a ViT's summary of the volume and one linear layer."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """ViT with a linear layer: (B, C, D, H, W) -> logits (B, K).

    The input of the layer is the CLS token, or the mean of the patch tokens of a ViT without one. Both are taken after
    the encoder's norm, which keeps the input it was pretrained on (our choice; the authors take the mean before it).
    """

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))
