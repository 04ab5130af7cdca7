"""The segmenter and the projection head, out of torchvision's parts. Knows no losses and no data."""

import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")  # a file holds their number: append new ones
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # DeepLab v3 (Chen et al., 2017), by output stride


class WeightsError(ValueError):
    """A file of weights cannot be read or does not fit the network."""


class DeepLab(nn.Module):
    """A dilated ResNet under atrous spatial pyramid pooling (DeepLab v3), with torchvision's parameter names.
    backbone: one of BACKBONES. output_stride: 8 or 16. weights: "none", "imagenet" (torchvision's, downloaded
    on first use) or the path of a state dict, see `weights_in`; WeightsError where that fails."""

    feature_channels = 256

    def __init__(self, backbone="resnet18", num_classes=19, output_stride=16, weights="none"):
        super().__init__()
        imagenet = "IMAGENET1K_V1" if weights == "imagenet" else None
        resnet = getattr(torchvision.models, backbone)(weights=imagenet)
        dilate([resnet.layer4] if output_stride == 16 else [resnet.layer3, resnet.layer4])
        self.backbone = nn.Sequential(OrderedDict(list(resnet.named_children())[:-2]))  # no avgpool, no fc
        head = DeepLabHead(resnet.fc.in_features, num_classes, ATROUS_RATES[output_stride])
        self.classifier = nn.Sequential(*head)  # ASPP, 3 x 3 convolution, norm, ReLU, classifier
        self.classifier[0].convs[-1][2] = PooledNorm(256)
        self.register_buffer("architecture", torch.tensor([BACKBONES.index(backbone), output_stride]))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        if weights not in ("none", "imagenet"):
            load_weights(self, weights_in(read_file(weights), weights), weights)

    def forward(self, images):
        """images: (B, 3, H, W) float RGB in [0, 1], normalised here. Returns the features F (B, 256, h, w),
        which the classifier sees, and logits (B, num_classes, H, W); h is about H / output_stride."""
        if not images.is_floating_point():
            raise ValueError(f"expected float images in [0, 1], got {images.dtype}: divide by 255")
        features = self.classifier[:-1](self.backbone((images - self.mean) / self.std))
        logits = self.classifier[-1](features)
        # In float32, channel after channel: on a CPU a quarter faster than what autocast leaves.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        return features, F.interpolate(logits, images.shape[2:], mode="bilinear")


class ProjectionHead(nn.Sequential):
    """Proj: features F (B, in_channels, h, w) -> content embeddings e (B, embedding_dim). Training only. That
    it pools over positions first and has two layers is our reading: the figure shows a box."""

    def __init__(self, in_channels, embedding_dim=128):
        pool, hidden = [nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.Linear(in_channels, in_channels)
        super().__init__(*pool, hidden, nn.ReLU(), nn.Linear(in_channels, embedding_dim))


class PooledNorm(nn.BatchNorm2d):
    """Batch norm for ASPP's pooled branch, which holds one value a channel and image: divided by their own
    deviation, two values become 1 and -1, whatever they were. So training subtracts the batch's mean (from a
    single image the running one) but divides by the running deviation, which it updates from single images as
    well. In eval mode it is plain batch norm. Without momentum, as for the statistics of nights, the mean
    alone moves: whole frames differ less than the crops of training do."""

    def forward(self, x):
        if self.training and self.momentum != 0:
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            values = x.detach().flatten(1).to(self.running_mean.dtype)
            from_old_mean = values - self.running_mean
            self.running_mean.lerp_(values.mean(0), share)
            if self.momentum is not None:
                self.running_var.lerp_((from_old_mean * (values - self.running_mean)).mean(0), share)
        # Copies: a later call must not change what backward needs.
        several, var = self.training and len(x) > 1, self.running_var.clone()
        mean = torch.zeros_like(var) if several else self.running_mean.clone()
        x = x - x.mean(0, keepdim=True) if several else x
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


def dilate(stages):
    """Trade the strides of ResNet stages for dilation, in place: the same values on a denser grid. (To
    torchvision's `replace_stride_with_dilation` BasicBlocks are unknown.)"""
    dilation = 1
    for conv in (m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
            if conv.stride == (2, 2):
                dilation *= 2  # from the next 3 x 3 on: this one still sees the denser grid of its input
        conv.stride = (1, 1)


def load_weights(model, state, path):
    """Initialise a DeepLab from a state dict. A ResNet's leaves the head as it is; a classifier for another
    number of classes is left out with a warning; what else does not fit raises WeightsError."""
    bias, own = state.get("classifier.4.bias"), model.classifier[4].bias
    optional = "classifier." if bias is None else "none" if bias.shape == own.shape else "classifier.4."
    if optional == "classifier.4.":
        warnings.warn(f"{path}: its classifier, for another number of classes, is left out", stacklevel=3)
    kept = optional, "architecture"
    state = {k: v for k, v in state.items() if not k.startswith(kept)}
    state |= {k: v for k, v in model.state_dict().items() if k.startswith(kept)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # which names what is missing, unknown or of another shape
        raise WeightsError(f"{path}: does not fit ({' '.join(str(error).split())[:200]})") from None


def weights_in(content, path, which="night"):
    """The state dict in a file's content, in DeepLab's names: of night.pt, of last.pt (`which`: its M_n or
    M_d), of torchvision's ResNets and `deeplabv3_*`, also as {"model": ...} or {"state_dict": ...}."""
    state = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    state = {k.removeprefix("module."): v for k, v in items if isinstance(k, str) and torch.is_tensor(v)}
    if which == "day" or any(key.startswith("night.") for key in state):  # as last.pt has it
        state = {k.removeprefix(f"{which}."): v for k, v in state.items() if k.startswith(f"{which}.")}
    if not state:
        raise WeightsError(f"{path}: holds no state dict" + (" of M_d" if which == "day" else ""))
    state = {k: v for k, v in state.items() if not k.startswith(("aux_classifier.", "fc."))}
    return {f"backbone.{key}": value for key, value in state.items()} if "conv1.weight" in state else state


def read_file(path):
    """The content of a torch file, on the CPU; no code in it is run. Raises WeightsError in one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (unpickling raises whatever the bytes suggest)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:150]
        raise WeightsError(f"{path}: not a readable file of tensors ({reason})") from None
