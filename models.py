"""The segmenter and the projection head, out of torchvision's parts. Knows no losses and no data.

model = DeepLab("resnet101", output_stride=8, weights="imagenet")
features, logits = model(images)  # images (B, 3, H, W) float RGB in [0, 1]
"""

import contextlib
import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
HEADS = ("aspp", "deeplabv2")
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # DeepLab v3 (Chen et al., 2017), by output stride
V2_RATES = (6, 12, 18, 24)  # DeepLab v2 (Chen et al., 2016)
# Scale, mean, std: of torchvision, DANNet and most others; of Caffe and AdaptSegNet, whose channels are BGR.
INPUT_FORMATS = {
    "imagenet": (1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe": (255, (104.00698793, 116.66876762, 122.67891434), (1, 1, 1)),
}


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


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def apart(networks, sizes, noted):
    """From now on a training batch through networks[0] is taken in parts of `sizes` images by its batch
    norms, part i as networks[i] would: several networks with the same convolutions then cost one pass.

    noted[i]: whether the statistics of part i enter the running ones."""
    sizes, noted = tuple(sizes), tuple(noted)
    for norms in zip(*map(batch_norms, networks), strict=True):
        if getattr(norms[0].forward, "args", None) == (norms, sizes, noted):
            continue  # a new function would be compiled anew
        norms[0].twins = norms
        norms[0].forward = functools.partial(_in_parts, norms, sizes, noted)


def _in_parts(norms, sizes, noted, x):
    if not norms[0].training:
        return type(norms[0]).forward(norms[0], x)
    outputs = []
    for norm, part, note in zip(norms, x.split(sizes), noted, strict=True):
        norm.track_running_stats = note  # False: batch statistics are used but not noted
        try:
            outputs.append(type(norm).forward(norm, part))
        finally:
            norm.track_running_stats = True
    return torch.cat(outputs)


@contextlib.contextmanager
def statistics_kept(module):
    """What batch norms in `module` note inside goes into copies: running statistics stay as they are."""
    norms = [twin for norm in batch_norms(module) for twin in getattr(norm, "twins", [norm])]
    buffers = [dict(norm.named_buffers()) for norm in norms]
    for norm, real in zip(norms, buffers, strict=True):
        norm._buffers.update((name, value.clone()) for name, value in real.items())
    try:
        yield
    finally:
        for norm, real in zip(norms, buffers, strict=True):
            norm._buffers.update(real)


def recomputed(layer, x):
    """layer(x) of which only x is kept: what lies between is computed again in the backward pass."""
    contexts = contextlib.nullcontext(), statistics_kept(layer)
    return checkpoint(layer, x, use_reentrant=False, context_fn=lambda: contexts)


def as_deeplab_v2(resnet):
    """Turn a Bottleneck ResNet, in place, into the one of the public DeepLab v2 files: stride in the first
    convolution of a block, ceil-mode pooling, and every block of layer3 and layer4 dilated alike, the first
    too."""
    # ceil_mode=True in other words, which torch.export can follow: behind a ReLU, zeros never win.
    resnet.maxpool = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), 0.0), nn.MaxPool2d(3, 2, 1))
    resnet.layer2[0].conv1.stride, resnet.layer2[0].conv2.stride = (2, 2), (1, 1)
    for layer, dilation in ((resnet.layer3, 2), (resnet.layer4, 4)):
        dilate([layer])
        for block in layer:
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)


class DeepLab(nn.Module):
    """A dilated ResNet under atrous spatial pyramid pooling, out of torchvision's parts and with its key
    names.

    backbone: one of BACKBONES. output_stride: 8 or 16. head: "aspp" (DeepLab v3, torchvision's
    `deeplabv3_*`), or "deeplabv2" (a sum of dilated classifiers on layer4, as AdaptSegNet and DANNet have it;
    resnet50 or resnet101, output stride 8). weights: "none", "imagenet" (torchvision's IMAGENET1K_V1,
    downloaded on first use) or the path of a state dict (see `load_weights`). input_format: what the weights
    expect, "imagenet" or "caffe" (BGR 0-255 minus a mean, AdaptSegNet's); images are RGB in [0, 1] all the
    same. branches: how many of the dilated classifiers are summed (a multi-level v2 file sets it to 2).
    Set `low_memory` to trade a second forward pass in training for the memory of activations.
    Raises ValueError on what it does not know.
    """

    def __init__(self, backbone="resnet18", num_classes=19, output_stride=16, head="aspp", weights="none",
                 input_format="imagenet", branches=4):  # fmt: skip
        super().__init__()
        # What a checkpoint needs in order to build this model again.
        self.architecture = {"backbone": backbone, "num_classes": num_classes, "output_stride": output_stride}
        self.architecture |= {"head": head, "input_format": input_format, "branches": branches}
        choices = {"backbone": BACKBONES, "output_stride": tuple(ATROUS_RATES), "head": HEADS}
        for name, known in (choices | {"input_format": tuple(INPUT_FORMATS)}).items():
            if self.architecture[name] not in known:
                raise ValueError(f"{name} must be one of {known}, got {self.architecture[name]!r}")
        if head == "deeplabv2" and (output_stride != 8 or backbone not in ("resnet50", "resnet101")):
            wrong = f"{backbone} at {output_stride}"
            raise ValueError(f"head deeplabv2 needs resnet50 or resnet101 at output_stride 8, not {wrong}")
        self.low_memory = False
        resnet = getattr(torchvision.models, backbone)(weights=None)
        channels = resnet.fc.in_features
        if head == "deeplabv2":
            as_deeplab_v2(resnet)
            self.feature_channels = channels
            convs = (nn.Conv2d(channels, num_classes, 3, padding=r, dilation=r) for r in V2_RATES[:branches])
            self.classifier = nn.ModuleList(convs)
        else:
            dilate([resnet.layer4] if output_stride == 16 else [resnet.layer3, resnet.layer4])
            self.feature_channels = 256
            # A plain Sequential: ASPP, 3 x 3 convolution, norm, ReLU, classifier.
            self.classifier = nn.Sequential(*DeepLabHead(channels, num_classes, ATROUS_RATES[output_stride]))
            self.classifier[0].convs[-1][2] = PooledNorm(256)
        # All but avgpool and fc.
        self.backbone = nn.Sequential(OrderedDict(list(resnet.named_children())[:-2]))
        self.scale, mean, std = INPUT_FORMATS[input_format]
        # Not in the state dict: torchvision's files do not have them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        load_weights(self, weights)

    def forward(self, images, upsample=True):
        """images: (B, 3, H, W) float RGB in [0, 1], H and W at least 32; normalised here.

        Returns features F (B, feature_channels, h, w), what the classifier sees, and logits (B, num_classes,
        H, W), or (B, num_classes, h, w) with upsample=False; h is about H / output_stride. Raises ValueError
        on other shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32:
            raise ValueError(f"expected images (B, 3, H, W), H and W at least 32, got {tuple(images.shape)}")
        images = images.flip(1) if self.architecture["input_format"] == "caffe" else images
        features = (images * self.scale - self.mean) / self.std
        is_v2 = self.architecture["head"] == "deeplabv2"
        for stage in (self.backbone, () if is_v2 else self.classifier[:-1]):
            for layer in stage:
                for block in layer if isinstance(layer, nn.Sequential) else [layer]:
                    again = self.low_memory and self.training and any(block.children())
                    features = recomputed(block, features) if again else block(features)
        logits = sum(conv(features) for conv in self.classifier) if is_v2 else self.classifier[-1](features)
        if upsample:  # in float32, channel after channel: on a CPU a quarter faster than what autocast leaves
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
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
    """The content of a torch file, on the CPU, no code of it run. Raises ValueError in one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # noqa: BLE001 (unpickling raises whatever the bytes suggest)
        refused = "truncated, no torch file, or one with more than tensors and plain values: not loaded"
        raise ValueError(f"{path}: not a file of tensors ({refused})") from None


def torchvision_keys(state):
    """The public files' keys in the words of this model, which are torchvision's: `backbone.*`,
    `classifier.*`.

    DeepLab v2 files have layer6 (fed by layer4), beside an unused layer5, or layer5 alone (single-level).
    """
    state = {key.removeprefix("module.").removeprefix("Scale."): value for key, value in state.items()}
    if any(key.startswith("night.") for key in state):  # train.py's own
        state = {key.removeprefix("night."): v for key, v in state.items() if key.startswith("night.")}
    state = {key: v for key, v in state.items() if not key.startswith(("aux_classifier.", "fc."))}
    if "conv1.weight" not in state:
        return state
    multi_level = any(key.startswith("layer6.") for key in state)
    head = "layer6." if multi_level else "layer5."
    used = ("0.", "1.", "2.", "3.")[: 2 if multi_level else 4]  # the published code returns in its loop
    converted = {}
    for key, value in state.items():
        branch = key.removeprefix(f"{head}conv2d_list.")
        if branch != key:
            converted |= {f"classifier.{branch}": value} if branch.startswith(used) else {}
        elif not key.startswith("layer5."):
            converted[f"backbone.{key}"] = value
    return converted


def read_weights(path, input_format=None):
    """The state dict in a file, in torchvision's words. Raises ValueError in one line, also where the file says
    that it wants another input_format."""
    state = read_state(path)
    told = state.get("architecture") if isinstance(state, dict) else None
    told = told.get("input_format") if isinstance(told, dict) else None
    if input_format and told not in (None, input_format):
        raise ValueError(f"{path}: wants input_format {told}, not {input_format}")
    state = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else None
    ok = isinstance(state, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())
    if not ok or not state:
        raise ValueError(f"{path}: holds no state dict (names and tensors)")
    return torchvision_keys(state)


def load_weights(model, weights, strict=False):
    """Initialise a DeepLab from "none", "imagenet" or the path of a state dict.

    A path may hold a DeepLab or torchvision segmentation state dict, a DeepLab v2 of AdaptSegNet or DANNet,
    an ImageNet ResNet's (the head then starts from scratch) or a checkpoint of train.py (its M_n). A
    classifier for another number of classes is left out with one printed line, unless `strict`, which also
    wants a head. Anything else that does not fit raises ValueError naming the keys.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        name = model.architecture["backbone"]
        public = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = torchvision_keys(public.get_state_dict(progress=True))
        except Exception as error:  # noqa: BLE001 (no network, no space, or a half download's bytes)
            way_out = f"fetch {public.url} and give the file's path instead"
            raise ValueError(f"imagenet: no weights ({' '.join(str(error).split())}); {way_out}") from None
    else:
        state = read_weights(weights, model.architecture["input_format"])
    branches = sum(key.startswith("classifier.") and key.endswith(".weight") for key in state)
    if model.architecture["head"] == "deeplabv2" and 0 < branches < len(model.classifier):
        del model.classifier[branches:]
        model.architecture["branches"] = branches
    wanted, head = model.state_dict(), branches > 0
    is_v2 = model.architecture["head"] == "deeplabv2"
    last = "classifier." if is_v2 else f"classifier.{len(model.classifier) - 1}."
    one = "classifier.0.weight" if is_v2 else f"{last}weight"
    if one in state and one in wanted and state[one].shape[:1] != wanted[one].shape[:1] and not strict:
        found, want = state[one].shape[:1].numel(), len(wanted[one])
        print(f"{weights}: classifier for {found} classes left out, {want} are wanted", flush=True)
        state = {key: value for key, value in state.items() if not key.startswith(last)}
        wanted = {key: value for key, value in wanted.items() if not key.startswith(last)}
    missing = [k for k in wanted if k not in state and (head or strict or k.startswith("backbone."))]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]  # files of before torch 0.4.1
    unknown = [k for k in state if k not in wanted]
    shapes = [k for k in state if k in wanted and state[k].shape != wanted[k].shape]
    for what, keys in (("has the unknown", unknown), ("lacks", missing), ("has other shapes for", shapes)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            name = f"{model.architecture['backbone']} with head {model.architecture['head']}"
            raise ValueError(f"{weights}: does not fit {name}: {what} {', '.join(keys[:4])}{more}")
    model.load_state_dict(state, strict=False)


def architecture_of(path):
    """What a public segmentation file holds, as arguments of DeepLab; all are at output stride 8. Raises
    ValueError if it is none with a ResNet-50 or 101 and a classifier."""
    state = read_weights(path)
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.layer3.")})
    name = {6: "resnet50", 23: "resnet101"}.get(depth if "backbone.layer3.0.conv3.weight" in state else None)
    heads = {"classifier.4.weight": "aspp", "classifier.0.weight": "deeplabv2"}
    last = next((key for key in heads if key in state and state[key].ndim), None)
    if name is None or last is None:
        what = "a DeepLab v3 nor v2 state dict (ResNet-50 or 101, with its classifier)"
        raise ValueError(f"{path}: neither {what}")
    return {"backbone": name, "num_classes": len(state[last]), "output_stride": 8, "head": heads[last]}
