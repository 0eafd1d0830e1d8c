"""Classification of volumes (CC-CCII): the mean of a ViT's patch tokens and one linear layer."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """ViT with a linear layer on the mean of its patch tokens: (B, C, D, H, W) -> logits (B, K).

    The mean is taken after the encoder's norm, which keeps the input it was pretrained on (our choice; the authors
    take it before).
    """

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x, return_features=True)["patch_features"].mean(dim=1))
