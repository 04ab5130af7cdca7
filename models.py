"""The segmenter and the projection head, out of torchvision's parts. Knows no losses and no data.

model = DeepLab("resnet101", output_stride=8, weights="imagenet")
features, logits = model(images)        images (B, 3, H, W) float RGB in [0, 1]
"""

import contextlib
import os
import re
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")  # any of torchvision's ResNets may stand here
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # DeepLab v3 (Chen et al., 2017), by output stride


class DeepLab(nn.Module):
    """A dilated ResNet under atrous spatial pyramid pooling, with torchvision's key names.

    backbone: one of BACKBONES. output_stride: 8 or 16. weights: "none", "imagenet" (torchvision's
    IMAGENET1K_V1, downloaded on first use) or the path of a state dict (see `load_weights`). Raises
    ValueError on what it does not know.
    """

    feature_channels = 256

    def __init__(self, backbone="resnet18", num_classes=19, output_stride=16, weights="none"):
        super().__init__()
        # What a checkpoint needs in order to build this model again.
        self.architecture = {"backbone": backbone, "num_classes": num_classes, "output_stride": output_stride}
        for name, known in {"backbone": BACKBONES, "output_stride": tuple(ATROUS_RATES)}.items():
            if self.architecture[name] not in known:
                raise ValueError(f"{name} must be one of {known}, got {self.architecture[name]!r}")
        resnet = getattr(torchvision.models, backbone)(weights=None)
        dilate([resnet.layer4] if output_stride == 16 else [resnet.layer3, resnet.layer4])
        # All but avgpool and fc.
        self.backbone = nn.Sequential(OrderedDict(list(resnet.named_children())[:-2]))
        # A plain Sequential: ASPP, 3 x 3 convolution, norm, ReLU, classifier.
        head = DeepLabHead(resnet.fc.in_features, num_classes, ATROUS_RATES[output_stride])
        self.classifier = nn.Sequential(*head)
        self.classifier[0].convs[-1][2] = PooledNorm(256)
        # Not in the state dict: torchvision's files do not have them.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        load_weights(self, weights)

    def forward(self, images, upsample=True):
        """images: (B, 3, H, W) float RGB in [0, 1], H and W at least 32; normalised here.

        Returns features F (B, feature_channels, h, w), what the classifier sees, and logits (B, num_classes,
        H, W), or (B, num_classes, h, w) with upsample=False; h is about H / output_stride. Raises ValueError
        on other shapes.
        """
        shape, uint8 = images.shape, images.dtype == torch.uint8
        if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < 32 or uint8:
            got = f"{tuple(shape)} {images.dtype}"
            raise ValueError(f"expected float images (B, 3, H, W), H and W at least 32, got {got}")
        features = self.classifier[:-1](self.backbone((images - self.mean) / self.std))
        logits = self.classifier[-1](features)
        if upsample:  # in float32, channel after channel: on a CPU a quarter faster than what autocast leaves
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
            logits = F.interpolate(logits, shape[2:], mode="bilinear", align_corners=False)
        return features, logits


class ProjectionHead(nn.Module):
    """Proj: features F (B, in_channels, h, w) -> content embeddings e (B, embedding_dim). Training only.

    That it pools over positions first and has two layers is our reading: the figure shows a box.
    """

    def __init__(self, in_channels, embedding_dim=128):
        super().__init__()
        first, last = nn.Linear(in_channels, in_channels), nn.Linear(in_channels, embedding_dim)
        self.layers = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, features):
        return self.layers(features.mean((2, 3)))


# ---- norms -------------------------------------------------------------------------------------------------


class DomainNorm(nn.BatchNorm2d):
    """Batch norm for a batch of several domains, in `parts` of equal size (ours): in training each is
    normalised by its own statistics, and those of the first, the labelled source, enter the running ones.
    Outside of `domains_apart` there is one part: plain batch norm."""

    parts = 1

    def forward(self, x):
        if self.parts == 1 or not self.training:
            return super().forward(x)
        first, *others = x.chunk(self.parts)
        others = [F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps) for x in others]
        return torch.cat([super().forward(first), *others])


@contextlib.contextmanager
def domains_apart(network, parts):
    """For the passes inside, the DomainNorms of a network take their batch as so many domains."""
    norms = [module for module in network.modules() if isinstance(module, DomainNorm)]
    try:
        for norm in norms:
            norm.parts = parts
        yield
    finally:
        for norm in norms:
            norm.parts = 1


def with_domain_norms(module):
    """Put a DomainNorm, with the same parameters and statistics, in the place of each BatchNorm2d."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = DomainNorm(child.num_features)
            norm.__dict__.update(child.__dict__)
            setattr(module, name, norm)
        with_domain_norms(child)


class PooledNorm(nn.BatchNorm2d):
    """Batch norm for ASPP's pooled branch, which holds one value a channel and image: always over the whole
    batch, since a domain of two images has two values, and normalising two values gives 1 and -1, whatever
    they were. A single training image has no batch statistics: it is normalised by the running ones."""

    def forward(self, x):
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


# ---- dilation ----------------------------------------------------------------------------------------------


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


# ---- weights -----------------------------------------------------------------------------------------------


def load_weights(model, weights, strict=False):
    """Initialise a DeepLab from "none", "imagenet" or the path of a state dict.

    A path may hold a state dict of DeepLab, of torchvision's `deeplabv3_*` or of a ResNet (the head then
    starts from scratch), or a checkpoint of train.py (its M_n). A classifier for another number of classes is
    left out with a warning, unless `strict`, which also wants a head. Anything else that does not fit raises
    ValueError naming the keys.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        public = torchvision.models.get_model_weights(model.architecture["backbone"]).IMAGENET1K_V1
        try:
            state = our_names(public.get_state_dict(progress=True))
        except Exception as error:  # noqa: BLE001 (no network, no space, or a half download's bytes)
            way_out = f"download {public.url} and give --weights its path, or give --weights none"
            raise ValueError(f"imagenet weights cannot be fetched ({one_line(error)}); {way_out}") from None
    else:
        state = read_weights(weights)
    own, last = model.state_dict(), "classifier.4."
    other = any(k.startswith(last) and v.shape[:1] != own[k].shape[:1] for k, v in state.items() if k in own)
    if other and not strict:
        warnings.warn(f"{weights}: its classifier, for another number of classes, is left out", stacklevel=2)
        state = {k: v for k, v in state.items() if not k.startswith(last)}
    # What a file may lack: counts (of before torch 0.4.1), a classifier left out above, the head of a ResNet.
    no_head = not strict and not any(k.startswith("classifier.") for k in state)
    lacking = last if other else "classifier." if no_head else None
    kept = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    kept |= {k: v for k, v in own.items() if lacking and k.startswith(lacking)}
    try:
        model.load_state_dict(kept | state)
    except RuntimeError as error:
        name = f"DeepLab with {model.architecture['backbone']}"
        raise ValueError(f"{weights}: does not fit {name}: {one_line(error)[:300]}") from None
    check_finite(model, weights)


def check_finite(model, path):
    """Raise ValueError if a network's weights, which come from the file, hold nan or infinite values."""
    if bad := [k for k, v in model.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]:
        raise ValueError(f"{path}: {bad[0]} holds nan or infinite values")


def architecture_of(path):
    """The arguments of DeepLab for a file of torchvision's `deeplabv3_*` (output stride 8). Raises ValueError
    if it is none with a ResNet-50 or 101 and a classifier."""
    state, last = read_weights(path), "classifier.4.weight"
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    name = {6: "resnet50", 23: "resnet101"}.get(depth if "backbone.layer3.0.conv3.weight" in state else None)
    if name is None or last not in state or not state[last].ndim:
        what = "a DeepLab v3 state dict (ResNet-50 or 101, with its classifier)"
        raise ValueError(f"{path}: neither a checkpoint of train.py nor {what}")
    return {"backbone": name, "num_classes": len(state[last]), "output_stride": 8}


def read_state(path):
    """The content of a torch file, on the CPU, no code of it run. Raises ValueError in one line."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("a folder, a pipe or a device, no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 (unpickling raises whatever the bytes suggest)
        reason = "truncated, or no torch file"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            strip = (
                "x = torch.load(FILE, weights_only=False); x = x if isinstance(x, dict) else x.state_dict()"
            )
            strip = f"strip it: {strip}; torch.save(x.get('model', x.get('state_dict', x)), NEW)"
            reason = f"it holds a {refused[1]}, which could run code; if you trust it, {strip}"
        elif "TorchScript" in str(error):
            strip = "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            reason = f"a TorchScript program; keep its tensors alone: {strip}"
        raise ValueError(f"{path}: not a file of tensors ({reason})") from None


def read_weights(path):
    """The state dict in a file, in our names; wrapped ({"model": ...}) or not. Raises ValueError in one line."""
    content = read_state(path)
    content = content if isinstance(content, dict) else {}

    def is_state(value):
        full = isinstance(value, dict) and value
        return full and all(isinstance(k, str) and torch.is_tensor(v) for k, v in value.items())

    states = {"": content} if is_state(content) else {k: v for k, v in content.items() if is_state(v)}
    if not states:  # wrapped twice
        deeper = [v for v in content.values() if isinstance(v, dict)]
        states = {k: v for inside in deeper for k, v in inside.items() if is_state(v)}
    states = {k: v for k, v in states.items() if k in ("model", "state_dict")} or states
    if len(states) != 1:
        names = f"several state dicts ({', '.join(states)}): save one alone" if states else "no state dict"
        raise ValueError(f"{path}: holds {names}")
    return our_names(*states.values())


def our_names(state):
    """A state dict in the names of DeepLab, which are torchvision's: `backbone.*`, `classifier.*`. What
    wrapped the network (module., model., _orig_mod., night. of train.py) is taken off."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while not {"backbone", "classifier", "conv1"} & (first := {key.partition(".")[0] for key in state}):
        wrappers = first if len(first) == 1 else first & {"module", "model", "net", "network", "night"}
        inside = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] in wrappers}
        if len(wrappers) != 1 or "" in inside:
            break
        state = inside
    state = {key: v for key, v in state.items() if not key.startswith(("aux_classifier.", "fc."))}
    return {f"backbone.{k}": v for k, v in state.items()} if "conv1.weight" in state else state


def one_line(error):
    """An exception's message in one line; its type where it has none."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
