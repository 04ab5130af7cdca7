"""The segmenter and the projection head, out of torchvision's parts. Knows no losses and no data."""

import argparse
import re
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # DeepLab v3 (Chen et al., 2017), by output stride


class WeightsError(ValueError):
    """A file of weights cannot be read or does not fit the network."""


class DeepLab(nn.Module):
    """A dilated ResNet under atrous spatial pyramid pooling (DeepLab v3), with torchvision's parameter names.

    The head has no pooled branch (ours): that one averages over a crop in training but over a whole frame at
    test, and it tells a night by how dark it is. backbone: one of BACKBONES. output_stride: 8 or 16. weights:
    "none", "imagenet" (torchvision's, downloaded on first use) or a file, see `load_weights`; WeightsError
    where that fails."""

    feature_channels = 256

    def __init__(self, backbone="resnet18", num_classes=19, output_stride=16, weights="none"):
        super().__init__()
        imagenet = "IMAGENET1K_V1" if weights == "imagenet" else None
        try:
            resnet = getattr(torchvision.models, backbone)(weights=imagenet)
        except (OSError, RuntimeError) as error:  # no network; not the whole file
            ways = "--weights FILE takes a file of them, --weights none starts from nothing"
            raise WeightsError(f"imagenet: weights cannot be downloaded ({error}): {ways}") from None
        dilate([resnet.layer4] if output_stride == 16 else [resnet.layer3, resnet.layer4])
        self.backbone = nn.Sequential(OrderedDict(list(resnet.named_children())[:-2]))  # no avgpool, no fc
        head = DeepLabHead(resnet.fc.in_features, num_classes, ATROUS_RATES[output_stride])
        self.classifier = nn.Sequential(*head)  # ASPP, 3 x 3 convolution, norm, ReLU, classifier
        aspp = self.classifier[0]
        aspp.convs = aspp.convs[:-1]  # 1 x 1 and three atrous branches
        aspp.project[0] = nn.Conv2d(4 * 256, 256, 1, bias=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        if weights not in ("none", "imagenet"):
            load_weights(self, weights)

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
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(in_channels, in_channels),
            nn.ReLU(),
            nn.Linear(in_channels, embedding_dim),
        )


def dilate(stages):
    """Trade the strides of ResNet stages for dilation, in place: the same values on a denser grid. (To
    torchvision's `replace_stride_with_dilation` BasicBlocks are unknown.)"""
    dilation = 1
    convs = [m for m in nn.ModuleList(stages).modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
            if conv.stride == (2, 2):
                dilation *= 2  # from the next 3 x 3 on: this one still sees the denser grid of its input
        conv.stride = (1, 1)


def read_file(path):
    """The content of a torch file, on the CPU; no code in it is run. Raises WeightsError in one line."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # as torchvision's references save
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (unpickling raises whatever the bytes suggest)
        reason = getattr(error, "strerror", None) or "damaged, or of another kind"
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            reason = f"holds a {foreign[1]}: save the weights alone, torch.save(model.state_dict(), FILE)"
        raise WeightsError(f"{path}: not a readable file of tensors ({reason})") from None


def weights_in(content, path, which="night"):
    """The state dict in a file's content, in DeepLab's names: of night.pt, of last.pt (`which`: its M_n or
    M_d), of torchvision's ResNets and `deeplabv3_*`; bare, or as "model", "state_dict" or "model_state_dict"
    of a dict; of a network that was compiled or wrapped for several devices."""
    for name in ("model", "model_state_dict", "state_dict", "model"):  # one may hold the other
        if isinstance(content, dict):
            content = content.get(name, content)
    state = {}
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(key, str) and torch.is_tensor(value):
                state[re.sub(r"^(module\.|model\.)+", "", key.replace("_orig_mod.", ""))] = value
    if which == "day" or any(key.startswith("night.") for key in state):  # as last.pt has it
        state = {k.removeprefix(f"{which}."): v for k, v in state.items() if k.startswith(f"{which}.")}
    if not state:
        what = "state dict of M_d" if which == "day" else "state dict"
        raise WeightsError(f"{path}: holds no {what}")
    state = {k: v for k, v in state.items() if not k.startswith(("aux_classifier.", "fc."))}
    if "conv1.weight" in state:
        state = {f"backbone.{key}": value for key, value in state.items()}
    return state


def load_weights(model, path):
    """Initialise a DeepLab from the file `path`, see `weights_in`. A ResNet's weights leave the head as it is.
    A head that pools (as in torchvision's `deeplabv3_*` and our first versions), or a classifier for another
    number of classes, is left out with a warning. What else does not fit raises WeightsError."""
    state = weights_in(read_file(path), path)
    spared = ()  # what the model keeps of its own
    if not any(key.startswith("classifier.") for key in state):
        spared = ("classifier.",)
    elif pools(state):
        spared = ("classifier.", "architecture")
        warnings.warn(
            f"{path}: its head has a pooled branch and is left out: only the backbone's weights are used",
            stacklevel=3,
        )
    elif "classifier.4.bias" in state and len(state["classifier.4.bias"]) != len(model.classifier[4].bias):
        spared = ("classifier.4.",)
        warnings.warn(f"{path}: its classifier, for another number of classes, is left out", stacklevel=3)
    its_own = {k: v for k, v in model.state_dict().items() if k.startswith(spared)}
    fit(model, {k: v for k, v in state.items() if not k.startswith(spared)} | its_own, path)


def pools(state):
    """Does this state dict belong to a head with a pooled branch, which DeepLab has not?"""
    return any(key.endswith("classifier.0.convs.4.1.weight") for key in state)


def check_head(state, path):
    if pools(state):
        raise WeightsError(f"{path}: of a head with a pooled branch, as an earlier version had: train again")


def fit(module, state, path):
    """module.load_state_dict(state), but WeightsError, in one line, where something is missing, unknown or of
    another shape."""
    check_head(state, path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: expected weights of this network (backbone?), but {reason}") from None
