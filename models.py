"""The segmenter and the projection head, out of torchvision's parts. Knows no losses and no data.

model = DeepLab("resnet101", output_stride=8, weights="imagenet")
features, logits = model(images)  # images (B, 3, H, W) float RGB in [0, 1]
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # DeepLab v3 (Chen et al., 2017), by output stride
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB


def dilate(layers):
    """Trade the strides of ResNet stages for dilation, in place ("a trous"): same values on a denser grid.

    torchvision's `replace_stride_with_dilation` does the same for Bottleneck blocks but refuses BasicBlocks.
    """
    dilation = 1
    for conv in (m for layer in layers for m in layer.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
            if conv.stride == (2, 2):
                dilation *= 2  # from the next 3 x 3 on: this one still sees the denser grid of its input
        conv.stride = (1, 1)


class PooledNorm(nn.BatchNorm2d):
    """Batch norm for ASPP's pooled branch, which holds one value a channel and image: with a single image in
    training there is no batch statistic (torch raises), so that image is normalised by the running ones."""

    def forward(self, x):
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class DeepLab(nn.Module):
    """DeepLab v3 (Chen et al., 2017): a dilated ResNet under atrous spatial pyramid pooling.

    backbone: one of BACKBONES; output_stride: 8 or 16; head: "aspp"; weights: "none", "imagenet" (torchvision's
    IMAGENET1K_V1, downloaded on first use) or the path of a state dict (see `load_weights`).
    Parameter names are those of torchvision's `deeplabv3_resnet*`. Raises ValueError on unknown choices.
    """

    def __init__(self, backbone="resnet18", num_classes=19, output_stride=16, head="aspp", weights="none"):
        super().__init__()
        for name, value, known in (
            ("backbone", backbone, BACKBONES),
            ("output_stride", output_stride, tuple(ATROUS_RATES)),
            ("head", head, ("aspp",)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        resnet = getattr(torchvision.models, backbone)(weights=None)
        dilate([resnet.layer4] if output_stride == 16 else [resnet.layer3, resnet.layer4])
        channels = resnet.fc.in_features
        self.backbone = nn.Sequential(
            OrderedDict(list(resnet.named_children())[:-2])
        )  # without avgpool and fc
        # A plain Sequential with torchvision's key names: ASPP, 3 x 3 convolution, norm, ReLU, classifier.
        self.classifier = nn.Sequential(*DeepLabHead(channels, num_classes, ATROUS_RATES[output_stride]))
        self.classifier[0].convs[-1][2] = PooledNorm(256)
        self.feature_channels = 256
        # Not in the state dict: torchvision's files do not have them.
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        load_weights(self, backbone, weights)

    def forward(self, images, upsample=True):
        """images: (B, 3, H, W) float RGB in [0, 1], H and W at least 32; normalised here.

        Returns features F (B, 256, h, w), what the classifier sees, and logits (B, num_classes, H, W), or
        (B, num_classes, h, w) with upsample=False; h = ceil(H / output_stride). Raises ValueError on other shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(f"expected images (B, 3, H, W), H and W at least 32, got {tuple(images.shape)}")
        features = self.backbone((images - self.mean) / self.std)
        for layer in self.classifier[:-1]:
            features = layer(features)
        logits = self.classifier[-1](features)
        if upsample:
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        return features, logits


class ProjectionHead(nn.Module):
    """Proj: features F (B, in_channels, h, w) -> content embeddings e (B, embedding_dim). Training only.

    That it pools over positions first and has two layers is our reading: the figure shows a box.
    """

    def __init__(self, in_channels, embedding_dim=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_channels, in_channels), nn.ReLU(), nn.Linear(in_channels, embedding_dim)
        )

    def forward(self, features):
        return self.layers(features.mean((2, 3)))


def read_state(path):
    """The content of a torch file, read on the CPU without running code from it. Raises ValueError in one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 (unpickling raises whatever the bytes suggest)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a file of tensors that torch can load safely ({reason[:150]})"
        ) from None


def load_weights(model, backbone, weights):
    """Initialise a DeepLab from "none", "imagenet" or the path of a state dict.

    A path may hold a DeepLab or torchvision segmentation state dict, an ImageNet ResNet's (the head then starts
    from scratch) or a checkpoint of train.py (its M_n). A classifier for another number of classes is left out
    with one printed line. Anything else that does not fit raises ValueError naming the keys.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        state = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.get_state_dict(progress=True)
    else:
        state = read_state(weights)
        state = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else None
        if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
            raise ValueError(f"{weights}: holds no state dict (names and tensors)")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("night.") for key in state):
        state = {
            key.removeprefix("night."): value for key, value in state.items() if key.startswith("night.")
        }
    state = {key: value for key, value in state.items() if not key.startswith(("aux_classifier.", "fc."))}
    if "conv1.weight" in state:
        state = {f"backbone.{key}": value for key, value in state.items()}
    wanted, head = model.state_dict(), any(key.startswith("classifier.") for key in state)
    last = f"classifier.{len(model.classifier) - 1}."
    if f"{last}weight" in state and len(state[f"{last}weight"]) != len(wanted[f"{last}weight"]):
        classes = len(state[f"{last}weight"]), len(wanted[f"{last}weight"])
        print(f"{weights}: classifier for {classes[0]} classes left out, {classes[1]} are wanted", flush=True)
        state = {key: value for key, value in state.items() if not key.startswith(last)}
        wanted = {key: value for key, value in wanted.items() if not key.startswith(last)}
    missing = [k for k in wanted if k not in state and (head or k.startswith("backbone."))]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]  # files of before torch 0.4.1
    unknown = [k for k in state if k not in wanted]
    shapes = [k for k in state if k in wanted and state[k].shape != wanted[k].shape]
    for what, keys in (("lacks", missing), ("has the unknown", unknown), ("has other shapes for", shapes)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise ValueError(f"{weights}: does not fit {backbone}: {what} {', '.join(keys[:4])}{more}")
    model.load_state_dict(state, strict=False)
