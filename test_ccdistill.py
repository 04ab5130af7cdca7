"""pytest. The slow formulas live here, the fast ones in the library; data is written to temporary folders."""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

import ccdistill
import datasets
import evaluate
import losses
import models
import train

HERE = Path(__file__).parent
FULL = bool(os.environ.get("CCDISTILL_FULL"))  # the long counts: 25 kills, 2,000 steps
torch.set_num_threads(1)  # tiny tensors: a second thread waits more than it works


class Narrow(torchvision.models.ResNet):
    """A tenth of ResNet-18, in its place: the runs below are about everything but how well it learns."""

    def __init__(self, weights=None):
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(64, 1)

    def _make_layer(self, block, planes, *rest, **more):
        return super()._make_layer(block, planes // 8, *rest, **more)


torchvision.models.resnet18 = Narrow


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(found, expected, error=1e-7):
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


def fails(error, told, function, *args, **options):
    """The call raises this error, whose one line matches `told`."""
    with pytest.raises(error, match=told) as raised:
        function(*args, **options)
    assert "\n" not in str(raised.value)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b


@pytest.fixture(autouse=True)
def seeded_and_tidy(tmp_path):
    torch.manual_seed(0)
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)  # checkpoints of all tests together are many gigabytes


# ---- losses against loops written from the formulas --------------------------------------------------------


def slow_correlation(a, b):
    rows = [r.flatten() for r in (*a, *b)]
    out = torch.zeros(len(rows), len(rows), dtype=a.dtype)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        norm = math.sqrt((rows[i] ** 2).sum()) * math.sqrt((rows[j] ** 2).sum())
        out[i, j] = (rows[i] * rows[j]).sum() / norm if norm else 0
    return out


def slow_gram(f):
    batch, channels, height, width = f.shape
    out = torch.zeros(batch, channels, channels, dtype=f.dtype)
    for n, i, j in itertools.product(range(batch), range(channels), range(channels)):
        for y, x in itertools.product(range(height), range(width)):
            out[n, i, j] += f[n, i, y, x] * f[n, j, y, x] / (height * width)
    return out


def slow_js(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        a, b = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        for x, y in zip(a, b, strict=True):
            m = (x + y) / 2
            total += (x * math.log(x / m) + y * math.log(y / m)) / 2
    return total / len(p)


def slow_distance(x, y, paired=True):
    """Mean square over all entries; unpaired: but those of i with B + i."""
    pairs = itertools.product(range(len(x)), repeat=2)
    kept = [(i, j) for i, j in pairs if paired or abs(i - j) != len(x) // 2]
    return sum((x[i, j] - y[i, j]) ** 2 for i, j in kept) / len(kept)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_losses_are_their_formulas(batch, paired, monkeypatch):
    a, b = rand(2, batch, 3, 2, 4)
    close(losses.correlation(a, b), slow_correlation(a, b))
    close(losses.gram(a), slow_gram(a))
    sd, sn, td, tn = e = rand(4, batch, 5)
    close(losses.js_divergence(sd, sn), slow_js(sd, sn))
    js = slow_js(sd, sn) + (slow_js(td, tn) if paired else 0) - slow_js(sd, tn) - slow_js(sn, td)
    inherent = slow_distance(slow_correlation(sd, td), slow_correlation(sn, tn))
    illumination = slow_distance(slow_correlation(sd, sn), slow_correlation(td, tn), paired)
    expected = {"inherent": inherent, "illumination": illumination, "js": js}
    close(losses.content_terms(*e, target_paired=paired), expected)
    close(losses.content_distill(*e, 0.5, paired), inherent + illumination + 0.5 * js)
    f = [rand(batch, 3, *size) for size in ((4, 5), (2, 2), (1, 7), (3, 3))]  # sizes may differ
    graphs = slow_correlation(*map(slow_gram, f[:2])), slow_correlation(*map(slow_gram, f[2:]))
    close(losses.style_distill(*f, target_paired=paired), slow_distance(*graphs, paired))
    for function, inputs in ((losses.content_distill, e), (losses.style_distill, rand(4, 2, 3, 2, 2))):
        inputs = [x.clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x, f=function: f(*x, target_paired=paired), inputs)
    monkeypatch.setattr(losses, "js_divergence", None)  # a zero weight does no work
    close(losses.content_distill(*e, 0, paired), inherent + illumination)


def test_segmentation_loss_is_its_formula():
    logits, labels, weights = rand(2, 5, 4, 4).requires_grad_(), torch.randint(5, (2, 4, 4)), rand(2, 4, 4)
    labels[0, 1:], slow = 255, {}
    for n, y, x in (labels < 255).nonzero().tolist():
        slow[n, y, x] = -logits[n, :, y, x].log_softmax(0)[labels[n, y, x]]
    close(losses.segmentation_loss(logits, labels), sum(slow.values()) / 20)
    weighted = [weights[at] * value for at, value in slow.items()]
    close(losses.segmentation_loss(logits, labels, weights), sum(weighted) / 20)
    nothing = losses.segmentation_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


def test_pseudo_labels():
    def column(*probabilities):  # logits (1, K, 1, N) of N pixels
        return torch.tensor(probabilities).log().T[None, :, None]

    night = column([0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.02, 0.93], [0.9, 0.05, 0.05])
    assert losses.pseudo_labels(night, num_static=2).flatten().tolist() == [0, 255, 2, 0]  # 0.9 reaches 0.9
    day = column([0.1, 0.8, 0.1], [0.01, 0.98, 0.01], [0.98, 0.01, 0.01], [0.9, 0.05, 0.05])
    # static: (.95 + .1) / 2 < .79 | (.6 + .98) / 2 = .79 | dynamic, the day is left out | .9
    assert losses.pseudo_labels(night, day, 0.79, num_static=2).flatten().tolist() == [255, 1, 2, 0]
    # a pedestrian at night, on what was sidewalk by day, never becomes sidewalk
    walk, person = datasets.NAMES.index("sidewalk"), datasets.NAMES.index("person")
    night, day = [0.1 / 17] * 19, [0.01 / 18] * 19
    night[person], night[walk], day[walk] = 0.59, 0.31, 0.99
    got = [losses.pseudo_labels(column(night), column(day), threshold).item() for threshold in (0, 0.58, 0.6)]
    assert got == [person, person, 255]


def test_zero_rows_and_extremes():
    a, b = rand(2, 2, 5)
    a[1] = 0
    cor = losses.correlation(a.requires_grad_(), b.requires_grad_())
    assert cor[1].abs().max() == 0 and cor[:, 1].abs().max() == 0
    (cor * rand(4, 4)).sum().backward()
    assert a.grad[1].abs().max() == 0 and a.grad.isfinite().all() and a.grad[0].abs().max() > 0
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    losses.style_distill(zero, zero * 1, *rand(2, 2, 3, 4, 4).float()).backward()
    assert zero.grad.abs().max() == 0
    maps = rand(4, 2, 3, 4, 4).float()
    for scale in (1e9, 1e-9):  # squares of Gram entries leave float32's range
        close(losses.style_distill(*maps * scale), losses.style_distill(*maps), 1e-5)
    far = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert losses.js_divergence(far, far.flip(0)).item() == pytest.approx(math.log(2))  # its most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1000])
def test_half_inputs_equal_their_float32_copies_even_under_autocast(dtype, scale):
    e, f = (scale * rand(4, 3, 19)).to(dtype), (scale * rand(4, 3, 8, 6, 6)).to(dtype)
    labels = torch.randint(0, 8, (3, 6, 6))
    for function, inputs in (
        (losses.content_distill, e), (losses.style_distill, f), (losses.correlation, e[:2]),
        (losses.gram, f[:1]), (losses.js_divergence, e[:2]), (losses.pseudo_labels, f[:2]),
        (lambda logits: losses.segmentation_loss(logits, labels), f[:1]),
    ):  # fmt: skip
        expected = function(*inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            for got in (function(*inputs), function(*inputs.float())):
                assert got.dtype == expected.dtype and got.isfinite().all() and torch.equal(got, expected)


def test_what_does_not_fit_is_named():
    v, maps, tokens, loss = rand(2, 3), rand(2, 3, 4, 4), rand(2, 16, 3), losses
    for told, function, *inputs in (
        (r"b \(3, 3\)", loss.correlation, v, rand(3, 3)), (r"\(2, 16, 3\)", loss.gram, tokens),
        (r"\(0, 3\)", loss.correlation, v[:0], v[:0]), (r"q \(2, 4\)", loss.js_divergence, v, rand(2, 4)),
        ("complex", loss.gram, maps.to(torch.complex64)), ("meta", loss.gram, maps.to("meta")),
        ("sparse", loss.gram, maps.to_sparse()),
        (r"e_target_night \(1, 3\)", loss.content_distill, v, v, v, rand(1, 3)),
        (r"e_source_day.*\(2, 3, 4, 4\)", loss.content_distill, *[maps] * 4),
        (r"f_target_night \(2, 5, 4, 4\)", loss.style_distill, *[maps] * 3, rand(2, 5, 4, 4)),
        (r"f_source_day.*\(2, 16, 3\)", loss.style_distill, *[tokens] * 4), ("list", loss.gram, [1]),
        (r"\(1, 9, 4, 5\)", loss.pseudo_labels, rand(1, 9, 4, 4), rand(1, 9, 4, 5)),
        ("js_weight: expected a number", loss.content_distill, v, v, v, v, False),
        ("e_source_night.*NoneType", loss.content_distill, v, None, v, v), ("list", loss.pseudo_labels, [1]),
        (r"int64 \(2, 4, 4\).*float64", loss.segmentation_loss, maps, maps[:, 0]),
        ("labels: not in 0..2 nor 255", loss.segmentation_loss, maps, torch.full((2, 4, 4), 3)),
        (r"weights \(2, 4\)|weights.*\(2, 4\)", loss.segmentation_loss, maps, torch.zeros(2, 4, 4).long(), v[:, :1].expand(2, 4)),
        ("labels.*list", loss.segmentation_loss, maps, [0]),
    ):  # fmt: skip
        strange = any(not torch.is_tensor(x) for x in inputs)
        fails(TypeError if strange else ValueError, told, function, *inputs)
    fails(TypeError, "ndarray", losses.gram, pytest.importorskip("numpy").ones((2, 3, 4, 4)))


def test_losses_can_be_vendored():
    """It imports torch and the standard library, nothing else, and runs alone."""
    code = "import sys; exec(open(sys.argv[1]).read()); print(float(content_distill(*[torch.eye(2)] * 4)),"
    code += "{'torchvision', 'PIL'} & {*sys.modules})"
    command = [sys.executable, "-c", code, HERE / "losses.py"]
    out = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert out.stdout == "0.0 set()\n", out.stderr


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_computes_the_same_on_a_denser_grid(backbone, stride):
    model, images = models.DeepLab(backbone, output_stride=stride).eval(), torch.rand(1, 3, 65, 97)
    theirs = getattr(torchvision.models, backbone)(weights=None).eval()
    theirs.load_state_dict(model.backbone.state_dict(), strict=False)
    with torch.no_grad():
        dense, sparse = model.backbone(images), nn.Sequential(*list(theirs.children())[:-2])(images)
    assert dense.shape[2:] == (math.ceil(65 / stride), math.ceil(97 / stride))
    some = dense[..., :: 32 // stride, :: 32 // stride]
    assert (some - sparse).abs().max() < 1e-4 * sparse.abs().max()


def test_deeplab_is_torchvisions_deeplabv3_and_its_files_are_read(tmp_path):
    path, images, build = str(tmp_path / "w.pth"), torch.rand(1, 3, 64, 96), torchvision.models.segmentation
    theirs = build.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=19, aux_loss=True)
    torch.save(theirs.state_dict(), path)
    ours = models.DeepLab("resnet50", output_stride=8, weights=path).eval()
    found, description = evaluate.load_model(path)  # which finds out what it is
    with torch.no_grad():
        expected = theirs.eval()((images - ours.mean) / ours.std)["out"]
        for network in (ours, found):
            close(network(images)[1], expected, 1e-4)
    assert description["architecture"] == ours.architecture
    torch.save({k: v for k, v in ours.state_dict().items() if not k.startswith("classifier.4")}, path)
    fails(ValueError, "w.pth: neither a checkpoint of train.py nor", evaluate.load_model, path)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (65, 40)])
def test_any_size_and_a_single_training_image_but_no_other_choices(height, width):
    model, grid = models.DeepLab(), (math.ceil(height / 16), math.ceil(width / 16))
    features, logits = model(torch.rand(1, 3, height, width))
    logits.mean().backward()
    assert logits.shape == (1, 19, height, width) and features.shape == (1, model.feature_channels, *grid)
    assert model.eval()(torch.ones(1, 3, height, width), upsample=False)[1].shape == (1, 19, *grid)
    fails(ValueError, r"\(1, 3, 31, 40\)", model, torch.rand(1, 3, 31, 40))
    for wrong in ({"backbone": "vgg"}, {"output_stride": 32}):
        fails(ValueError, next(iter(wrong)), models.DeepLab, **wrong)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def test_weights_are_found_in_whatever_wraps_them(tmp_path):
    path, net = str(tmp_path / "w.pth"), models.DeepLab(num_classes=7).state_dict()
    resnet = {k: v for k, v in Narrow().state_dict().items() if not k.startswith("fc.")}
    for state, head, wrap in itertools.product((net, resnet), ("", "module.module."), (
        lambda s: {"model_state_dict": s, "epoch": 3}, lambda s: {"net": s}, lambda s: prefixed(s, "model."),
        lambda s: {"state_dict": s, "optimizer": {"x": torch.ones(1)}}, lambda s: prefixed(s, "_orig_mod."),
        lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(19)}},
        lambda s: {"model": {"state_dict": s}, "epoch": 3},
    )):  # fmt: skip
        torch.save(wrap(prefixed(state, head)), path)
        found = models.DeepLab(num_classes=7, weights=path).state_dict()
        expected = net if state is net else prefixed(resnet, "backbone.")
        assert_same(expected, {name: found[name] for name in expected})
    torch.save(net, path)
    with pytest.warns(UserWarning, match="w.pth: its classifier, for another number of classes, is left out"):
        model = models.DeepLab(weights=path)
    assert torch.equal(model.classifier[1].weight, net["classifier.1.weight"])
    assert len(model.classifier[4].bias) == 19


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_do_not_fit_are_named_and_no_code_of_theirs_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    state, path = models.DeepLab().state_dict(), tmp_path / "w.pth"
    for content, told in (
        (state | {"surprise": torch.ones(1)}, "does not fit DeepLab with resnet18.*surprise"),
        (state | {"backbone.conv1.weight": torch.ones(3)}, "conv1.weight"), ([1, 2], "no state dict"),
        ({k: v for k, v in state.items() if "layer2" not in k}, "layer2"), ({"model": Payload()}, ".mkdir"),
        ({"a": state, "b": state}, r"several state dicts \(a, b\)"), (b"<html>", "not a file of tensors"),
        ({"model": state, "args": argparse.Namespace(lr=1)}, "it holds a argparse.Namespace.*strip it"),
        (state | {"classifier.4.bias": torch.full((19,), math.nan)}, "classifier.4.bias holds nan"),
        (torch.jit.trace(nn.ReLU(), torch.ones(1)), "a TorchScript program"),
    ):  # fmt: skip
        save = getattr(content, "save", lambda path, content=content: torch.save(content, path))
        path.write_bytes(content) if isinstance(content, bytes) else save(path)
        fails(ValueError, f"w.pth: .*{told}", models.DeepLab, weights=str(path))
    assert not (tmp_path / "ran").exists()
    fails(ValueError, r"no.pth: cannot be read \(No such", models.DeepLab, weights=str(tmp_path / "no.pth"))
    torch.save({"model": state, "best": pytest.importorskip("numpy").float64(1)}, path)
    fails(ValueError, "it holds a numpy.*scalar", models.DeepLab, weights=str(path))


def test_imagenet_weights_come_from_torchvisions_enum_and_only_when_asked(monkeypatch):
    resnet, asked = Narrow(), []
    answer = lambda self, **_: asked.append(self) or (resnet.state_dict() if len(asked) == 1 else 1 / 0)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", answer)
    models.DeepLab()
    assert not asked
    assert torch.equal(models.DeepLab(weights="imagenet").backbone.conv1.weight, resnet.conv1.weight)
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    told = r"\(division by zero\); download https://.*pth and give --weights"
    fails(ValueError, told, models.DeepLab, weights="imagenet")


def test_networks_can_be_exported_for_any_size():
    model, any_size = models.DeepLab().eval(), dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes={"images": any_size})
    for images in (torch.rand(1, 3, 65, 33), torch.rand(3, 3, 80, 120)):
        close(program.module()(images), model(images), 1e-4)


# ---- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ccdistill.NIGHT_STYLES)
def test_night_style_brings_the_light_and_keeps_the_content(method):
    day, night = torch.rand(2, 3, 33, 47) * 0.5 + 0.4, torch.rand(2, 3, 66, 94) * 0.2
    torch.manual_seed(1)
    styled = ccdistill.night_style(day, night, method)
    assert styled.shape == day.shape and styled.dtype == torch.float32
    assert 0 <= styled.min() <= styled.max() <= 1 and (styled.mean((2, 3)) - 0.1).abs().max() < 0.05
    both = torch.stack([day.flatten(), styled.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.6  # the day's structure is still there, in place
    assert (ccdistill.night_style(day, day, method) - day).abs().max() < 0.51 / 255
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(ccdistill.night_style(day, night, method), styled)
    if method == "histogram":  # the night's values in the day's order
        d, s, n = (images.flatten(0, 1).flatten(1) for images in (day, styled, night))
        assert (s.gather(1, d.argsort()) - n.sort().values[:, 2::4]).abs().max() < 0.01
    for told, *wrong in (
        (r"day \(3, 33, 47\)", day[0], night[0], method), (r"in \[0, 1\].*got -", day * 4 - 2, night, method),
        ("not normalised", day, night * 255, method), ("got nan", day * float("nan"), night, method),
    ):  # fmt: skip
        fails(ValueError, told, ccdistill.night_style, *wrong)


def test_fda_exchanges_low_amplitudes_and_keeps_the_phase_and_random_is_one_of_two_styles():
    day, night = (torch.rand(20, 3, 120, 160) * 0.3 + low for low in (0.35, 0.3))  # none is clipped
    styles = "fda", "random", "color", "histogram"
    fda, mixed, *both = (ccdistill.night_style(day, night, style) for style in styles)
    d, n, s = map(torch.fft.fft2, (day, night, fda))
    for y, x in itertools.product(range(-5, 6), range(-5, 6)):
        source = n if abs(y) <= 1 and abs(x) <= 1 else d  # beta 0.01: frequencies up to 1
        close(s[..., y, x].abs(), source[..., y, x].abs(), 1e-2)
    close(s[0, :, 1, 1].angle(), d[0, :, 1, 1].angle(), 1e-3)
    color, histogram = ((mixed == styled).flatten(1).all(1) for styled in both)
    assert (color ^ histogram).all() and 2 < color.sum() < 18


class Own(nn.Module):
    """A network of the user's own, as CCDistill asks for it, with a norm of every kind."""

    feature_channels = 6

    def __init__(self):
        super().__init__()
        first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, 2, 1))
        norms = nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.body = nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), *norms)
        self.norm, self.classifier = nn.LayerNorm(6), nn.Conv2d(6, 19, 1)

    def forward(self, images):
        features = self.norm(self.body(images).movedim(1, 3)).movedim(3, 1)
        return features, nn.functional.interpolate(self.classifier(features), images.shape[2:])


def toy_batch(size=(16, 24), batch=2):
    images = torch.rand(4, batch, 3, *size)
    names = "source_day", "source_night", "target_day", "target_night", "source_label"
    return dict(zip(names, (*images, torch.randint(0, 19, (batch, *size))), strict=True))


@pytest.mark.parametrize("after", ["nothing", "double", "to_empty", "assign"])
@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_night_weights_share_what_they_say(night_weights, after):
    method = ccdistill.CCDistill(Own(), night_weights)
    if after == "assign":
        method.load_state_dict({k: v.clone() for k, v in method.state_dict().items()}, assign=True)
    method = method.to("meta").to_empty(device="cpu") if after == "to_empty" else method
    method = method.double() if after == "double" else method
    assert (method.night is method.day) == (night_weights == "shared")
    for name, parameter in method.day.named_parameters():
        own = night_weights == "norm" and name.startswith(("body.1.", "body.4.", "body.5.", "norm."))
        shared = parameter is method.night.get_parameter(name)
        assert shared == (night_weights != "separate" and not own), name
    statistics = method.night.body[1].running_mean, method.day.body[1].running_mean
    assert (statistics[0] is statistics[1]) == (night_weights == "shared")
    fails(ValueError, "night weights must be one of", ccdistill.CCDistill, Own(), "all")


@pytest.mark.parametrize("batch_norm", ccdistill.BATCH_NORMS)
@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_every_part_learns_and_the_users_model_is_left_as_it_was(night_weights, batch_norm):
    model, images = Own(), torch.rand(2, 3, 8, 8)
    plain, names = copy.deepcopy(model), set(vars(model))
    method = ccdistill.CCDistill(model, night_weights, batch_norm)
    method(toy_batch())["content"].backward()
    assert all(m.weight.grad.abs().max() > 0 for m in (method.projection.layers[0], model.body[3]))
    method(toy_batch())["total"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == ("teacher" in name) == (not parameter.requires_grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.forward = lambda images: 1 / 0 if len(images) > 4 else images
    fails(TypeError, "must return", method, toy_batch())
    fails(ZeroDivisionError, "zero", method, toy_batch(batch=3))
    del model.forward
    batch = toy_batch()
    for told, wrong in (
        ("must have one shape", {"target_day": images}), ("in \\[0, 1\\]", {"target_day": batch["target_day"] - 1}),
        ("source_label: expected int64", {"source_label": batch["source_label"].byte()}),
        ("source_label: expected int64", {"source_label": batch["source_label"][:, None]}),
        ("source_label: .* got NoneType", {"source_label": None}), ("target_night: .* got NoneType", {"target_night": None}),
        (r"source_day: expected .*got \(2, 16, 24, 3\)", {"source_day": batch["source_day"].movedim(1, 3)}),
    ):  # fmt: skip
        fails(ValueError, told, method, batch | wrong)
    dark = batch | {"source_night": batch["source_night"] * 255}
    fails(ValueError, "not normalised", method, dark, adapt=False)
    for told, wrong in (
        ("num_static: .* not -1", {"num_static": -1}), ("pseudo_threshold: .* not 90", {"pseudo_threshold": 90}),
        ("weights must be finite", {"content_weight": math.nan}), ("weights must be", {"js_weight": -1}),
    ):  # fmt: skip
        fails(ValueError, told, ccdistill.CCDistill, Own(), **wrong)
    plain.load_state_dict(model.state_dict())
    assert_same(model(images), plain(images))  # in training mode: no domains are told apart any more
    assert method.day is model and set(vars(model)) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_method_is_pickled_and_runs_in_other_precisions(dtype):
    method = pickle.loads(pickle.dumps(ccdistill.CCDistill(models.DeepLab()))).to(dtype)
    batch = {k: v if "label" in k else v.to(dtype) for k, v in toy_batch((32, 48)).items()}
    batch.pop("source_night")
    for adapt in (True, False):
        method(batch, adapt)["total"].backward()


def test_domains_of_a_pass_are_normalised_apart_and_the_sources_statistics_are_kept():
    apart, joint = (ccdistill.CCDistill(Own(), batch_norm=how).day.body[1] for how in ("domain", "joint"))
    assert type(joint) is nn.BatchNorm2d
    x = torch.randn(6, 6, 8, 8) + torch.arange(6).view(6, 1, 1, 1)
    with models.domains_apart(apart, 2):
        y = apart(x)
    close(y.view(2, 3, 6, 8, 8).mean((1, 3, 4)), torch.zeros(2, 6), 1e-5)
    close(apart.running_mean, 0.1 * x[:3].mean((0, 2, 3)), 1e-5)
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict(apart.state_dict())
    close(apart(x), plain(x))  # outside it is plain batch norm


def test_night_statistics_are_those_of_the_nights_and_nothing_else_changes():
    network, nights = Own(), torch.rand(4, 3, 3, 16, 24) * 0.2
    before, norm = copy.deepcopy(network.state_dict()), network.body[1]
    ccdistill.take_night_statistics(network, nights)
    x = torch.stack([network.body[0](images) for images in nights])
    close(norm.running_mean, x.mean((0, 1, 3, 4)), 1e-5)
    close(norm.running_var, torch.stack([batch.var((0, 2, 3)) for batch in x]).mean(0), 1e-5)
    own = "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"
    states = before, network.state_dict()
    assert_same(*({k: v for k, v in state.items() if k not in own} for state in states))
    assert norm.momentum == 0.1 and not any(module.training for module in network.modules())
    before = copy.deepcopy(network.state_dict())
    fails(ValueError, "no batch", ccdistill.take_night_statistics, network, [])
    mixed = [nights[0], nights[1] * 255]  # the first batch counts for nothing then
    fails(ValueError, "not normalised", ccdistill.take_night_statistics, network, mixed)
    assert_same(before, network.state_dict())
    assert norm.momentum == 0.1 and not norm.training
    model = models.DeepLab()
    norms = model.backbone.bn1, model.classifier[0].convs[-1][2]
    for norm in norms:
        norm.running_mean += 5
    ccdistill.take_night_statistics(model, torch.rand(2, 1, 3, 64, 96))  # one image has no pooled statistics
    assert norms[0].running_mean.abs().max() < 5 and (norms[1].running_mean == 5).all()


def test_source_steps_leave_targets_out_and_nights_go_through_the_norms_of_m_n():
    method, seen, batch = ccdistill.CCDistill(Own(), night_style="color", mix=False), [], toy_batch()
    method.night.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    s_d, s_n, _, t_n, _ = batch.values()
    assert " ".join(method({**batch, "target_day": None}, adapt=False)) == "seg_day seg_night total"
    del batch["source_night"]
    kept, before = copy.deepcopy(dict(method.eval().named_buffers())), method(batch)
    made = ccdistill.night_style(s_d, t_n, "color")  # S_n is made of S_d in the light of T_n
    assert_same(seen, [s_n, torch.cat([made, t_n])])
    before["total"].backward()
    for norm in (method.night.body[1], method.night.body[4], method.night.body[5], method.night.norm):
        assert norm.weight.grad.abs().max() > 0
    assert_same(kept, dict(method.named_buffers()))
    method.night.body[1].running_mean += 1
    after = method(batch)
    assert after["seg_day"] == before["seg_day"] and after["seg_night"] != before["seg_night"]


@pytest.mark.parametrize("mix", [True, False])
def test_total_is_the_weighted_sum_and_a_zero_weight_does_no_work(monkeypatch, mix):
    weights = {"content_weight": 2.0, "style_weight": 3.0, "pseudo_weight": 0.5, "js_weight": 0.7}
    v = ccdistill.CCDistill(Own(), pseudo_threshold=0.0, mix=mix, **weights)(toy_batch())
    assert " ".join(v) == "seg_day seg_night pseudo content style inherent illumination js total"
    assert v["pseudo"] > 0 and v["style"] > 0
    close(v["content"], v["inherent"] + v["illumination"] + 0.7 * v["js"])
    expected = v["seg_day"] + v["seg_night"] + 0.5 * v["pseudo"] + 2 * v["content"] + 3 * v["style"]
    close(v["total"], expected, 1e-6)
    monkeypatch.setattr(losses, "js_divergence", None)  # whoever calls it, fails
    v = ccdistill.CCDistill(Own(), js_weight=0, projection=False, mix=mix)(toy_batch())
    assert "js" not in v and v["content"] == v["inherent"] + v["illumination"]
    for name in ("content_terms", "style_distill", "pseudo_labels", "averaged"):
        monkeypatch.setattr(ccdistill, name, None)
    nothing = ccdistill.CCDistill(Own(), mix=mix, **dict.fromkeys(weights, 0))
    assert " ".join(nothing(toy_batch())) == "seg_day seg_night total"


def test_teachers_are_averages_that_follow_only_in_training():
    method, (_, s_n, t_d, t_n, label) = ccdistill.CCDistill(Own(), "norm"), toy_batch().values()
    pairs = (method.day_teacher.module, method.day), (method.night_teacher.module, method.night)
    for step in range(3):
        before = [copy.deepcopy(dict(teacher.named_parameters())) for teacher, _ in pairs]
        for value in (*method.day.parameters(), method.night.norm.bias, method.night.body[1].running_mean):
            value.data += 0.1
        method.lesson(s_n, label, t_d, t_n)
        for (teacher, student), old in zip(pairs, before, strict=True):
            for name, p in student.named_parameters():
                close(teacher.get_parameter(name), 0.99 * old[name] + 0.01 * p if step else p)
            assert_same(dict(teacher.named_buffers()), dict(student.named_buffers()))
    kept = copy.deepcopy([teacher.state_dict() for teacher, _ in pairs])
    method.eval().day.classifier.bias.data += 1
    method.lesson(s_n, label, t_d, t_n)
    assert_same(kept, [teacher.state_dict() for teacher, _ in pairs])


@pytest.mark.parametrize("paired", [True, False])
def test_a_lesson_pastes_classes_of_s_n_and_weighs_by_confidence(monkeypatch, paired):
    method, batch = ccdistill.CCDistill(Own(), target_paired=paired), toy_batch(batch=8)
    _, s_n, t_d, t_n, label = batch.values()
    label[:, :4] = 255
    threshold = method.eval().night(t_n)[1].softmax(1).amax(1).median().item()
    method.train().pseudo_threshold = threshold
    strong_d, strong_n, _ = method.lesson(s_n, label, t_d, t_n)
    for images, plain in ((strong_d, t_d), (strong_n, t_n)):  # colours and blur change nearly all of it
        assert 0 <= images.min() <= images.max() <= 1 and (images == plain).float().mean() < 0.5
    monkeypatch.setattr(ccdistill, "STRONG", nn.Identity())
    new_d, new_n, ((y_d, w_d), (y_n, w_n)) = lesson = method.lesson(s_n, label, t_d, t_n)
    pasted = (new_n == s_n).all(1)
    assert torch.equal(new_d, t_d) and torch.equal(new_n, torch.where(pasted[:, None], s_n, t_n))
    classes = [pasted[n][label[n] == c] for n in range(8) for c in label[n].unique() if c < 255]
    taken = [bool(pixels.all()) for pixels in classes]  # whole classes, half of them
    assert taken == [bool(pixels.any()) for pixels in classes] and 0.3 < sum(taken) / len(taken) < 0.7
    assert not pasted[label == 255].any()
    p_d, p_n = method.day_teacher(t_d)[1], method.night_teacher(t_n)[1]
    day, night = (pasted & False, y_d, w_d, p_d), (pasted, y_n, w_n, p_n, p_d if paired else None)
    for mine, y, w, *logits in (day, night):
        confident = losses.pseudo_labels(*logits, threshold=threshold) < 255
        share = confident.float().mean((1, 2), keepdim=True).expand(w.shape)
        assert 0 < share.min() and share.max() < 1 and not y.requires_grad and not w.requires_grad
        assert torch.equal(y, torch.where(mine, label, losses.pseudo_labels(*logits, threshold=0)))
        close(w, torch.where(mine, 1.0, share))
    assert torch.equal(method.plain_lesson(p_d, p_n)[1][0] < 255, confident)  # with mix=False
    monkeypatch.setattr(method, "lesson", lambda *_: lesson)  # the networks learn from it
    method.night.register_forward_pre_hook(lambda _, inputs: assert_same(inputs[0], torch.cat([s_n, new_n])))
    method(batch)


# ---- files -------------------------------------------------------------------------------------------------

DataError = datasets.DataError
IMAGE, LABEL = "demo_000000_000000_leftImg8bit.png", "demo_000000_000000_gtFine_labelIds.png"


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    datasets.make_demo_city(root := tmp_path_factory.mktemp("city"), train=6, val=3)
    return root


@pytest.fixture
def tree(city, tmp_path):
    return Path(shutil.copytree(city, tmp_path / "city"))  # that a test may damage


def first(folder, pattern):
    return min(Path(folder).rglob(pattern))


def picture(path, size=(64, 48), mode="RGB", value=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return Path(path)


def test_labels_are_read_by_the_official_table_and_what_their_name_says(tmp_path):
    official = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    void = [255 if value < 34 or value == 255 else None for value in range(256)]
    expected = [official.index(v) if v in official else void[v] for v in range(256)]
    assert datasets.TABLES["labelIds"] == expected
    assert datasets.colourise(torch.tensor([[0, 18, 255]]))[0].tolist() == [[128, 119, 0]]
    for kind, stored, expected, wrong in (
        ("labelIds", [7, 33, 0, 255], [0, 18, 255, 255], 34), ("LABELTRAINIDS", [0, 18], [0, 18], 19),
    ):  # fmt: skip
        path = tmp_path / f"x_gt_{kind}.png"
        Image.frombytes("L", (len(stored), 1), bytes(stored)).save(path)
        assert list(datasets.open_label(path).tobytes()) == expected
        picture(path, mode="L", value=wrong)
        told = f"{path.name}: value {wrong} is no label"
        fails(DataError, told, datasets.open_label, path)
        fails(DataError, told, datasets.label_warning, [datasets.Sample(None, path)])
    for kind, value, told in (
        ("labelIds", 8, r"2 are named labelIds and hold no value above 18 ("), ("labelIds", 26, None), ("labelIds", 0, "is void"),
        ("labelTrainIds", 3, None),
    ):  # fmt: skip
        sample = datasets.Sample(None, picture(tmp_path / f"x_{kind}.png", mode="L", value=value))
        good = datasets.Sample(None, picture(tmp_path / "good_labelIds.png", mode="L", value=26))
        warning = datasets.label_warning([sample, sample, *[good] * 4 * (value == 8)])
        assert told in warning and "\n" not in warning if told else warning is None


@pytest.mark.parametrize("kind, ids, pole", [("Ids", (7, 26, 18), 255), ("TrainIds", (0, 13, 5), 5)])
def test_a_palette_may_colour_labels_but_not_contradict_them(tmp_path, kind, ids, pole):
    def voc(value):
        return tuple(sum((value >> 3 * j + c & 1) << 7 - j for j in range(3)) for c in range(3))

    path, official = tmp_path / f"label{kind}.png", [datasets.COLOURS[n] for n in (0, 13, 5)]
    for indices, colours in itertools.product(
        (ids, (3, 1, 2)), ([(v, v, v) for v in ids], [voc(v) for v in ids], official)
    ):
        image, palette = Image.frombytes("P", (3, 1), bytes(indices)), [1, 2, 3] * 256
        for index, rgb in zip(indices, colours, strict=True):
            palette[3 * index : 3 * index + 3] = rgb
        image.putpalette(palette)
        image.save(path)
        if indices == ids:
            assert list(datasets.open_label(path).tobytes()) == [0, 13, pole]  # 18, polegroup, is void
        else:
            fails(DataError, "its palette says that its indices are no", datasets.open_label, path)


LAYOUTS = {
    "cityscapes val": ("leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png"),
    "darkzurich val": ("rgb_anon/val/night/G/G_1_rgb_anon.png", "gt/val/night/G/G_1_gt_labelTrainIds.png"),
    "darkzurich val_ref": ("rgb_anon/val_ref/day/G_ref/G_1_ref_rgb_anon.png", None),
    "acdc val": ("rgb_anon/night/val/GP/GP_1_rgb_anon.png", "gt/night/val/GP/GP_1_gt_labelTrainIds.png"),
    "acdc val_ref": ("rgb_anon/night/val_ref/GP/GP_1_rgb_ref_anon.png", None),
    "nighttime-driving test": ("leftImg8bit/test/night/0_4_leftImg8bit.png",
                               "gtCoarse_daytime_trainvaltest/test/night/0_4_gtCoarse_labelTrainIds.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(checkpoint, tmp_path, name):
    (layout, split), (image, label) = name.split(), LAYOUTS[name]
    for n, (at, gt_at, png) in enumerate((("", "", ".png"), ("zip", "other", ".png"), ("a", "a", ".PNG"))):
        root = tmp_path / str(n)
        image_file = picture(root / at / image.replace(".png", png))
        label_file = label and picture(root / gt_at / label.replace(".png", png), mode="L", value=8)
        for hidden in (f"._{image_file.name}", f".old/{image_file.name}"):  # macOS leaves such
            picture(image_file.parent / hidden)
        (image_file.parent / "again").symlink_to(root)  # a loop is walked once
        assert datasets.samples(layout, root, split) == [datasets.Sample(image_file, label_file)]
    more, row = ["--split", split, "--out", tmp_path / "p"], 1 if layout == "cityscapes" else 8
    result = evaluated(checkpoint, tmp_path, f"--{layout}", tmp_path / "0", *more)
    assert sum(result["confusion_matrix"][row]) == 64 * 48 if label else "miou" not in result
    assert len(list((tmp_path / "p").rglob("*.png"))) == 4
    shutil.copytree(root / "a", root / "copy", symlinks=True)
    fails(DataError, "is there more than once: .*2/a.*2/copy", datasets.samples, layout, root, split)
    fails(DataError, "no such folder .* exists and holds", datasets.samples, layout, tmp_path / "p", split)


@pytest.mark.parametrize("depth", [2, 4])
def test_greys_of_few_bits_are_refused_as_labels(tmp_path, depth):
    # Pillow reads them, spread over 0 to 255: 1 becomes 17 or 85.
    (path := tmp_path / "x_labelTrainIds.png").write_bytes(b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        if kind else data for kind, data in (
            (b"", b"\x89PNG\r\n\x1a\n"), (b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, depth, 0, 0, 0, 0])),
            (b"IDAT", zlib.compress(b"\0\x11")), (b"IEND", b""),
        )
    ))  # fmt: skip
    fails(DataError, f"an 8-bit single-channel label, found mode L, {depth} bits", datasets.open_label, path)


def test_what_is_incomplete_or_there_twice(tree):
    root, data, acdc = tree / "darkzurich", tree / "cityscapes", tree / "acdc/rgb_anon/night"
    label, other, *_ = sorted((data / "gtFine/train").rglob("*.png"))
    shutil.copy(other, str(other).replace("labelIds", "labelTrainIds"))
    for wanted, count in (("labelTrainIds", 1), ("labelIds", 0)):
        found = [s.label.name for s in datasets.samples("cityscapes", data, "train", wanted)]
        assert len(found) == 6 and sum("TrainIds" in name for name in found) == count
    twin = Path(shutil.copy(label, label.with_suffix(".PNG")))
    fails(DataError, "keep one of them", datasets.samples, "cityscapes", data, "train")
    twin.unlink(), label.unlink()
    fails(DataError, f"{LABEL}: no such label", datasets.samples, "cityscapes", data, "train")
    paired = datasets.targets("darkzurich", root)
    shutil.rmtree(root / "corresp")
    fails(DataError, r"no \*_ref_day.csv there; give --pairs", datasets.targets, "darkzurich", root)
    assert datasets.targets("darkzurich", root, "none") == paired and len(paired[1]) == 6
    nights = [picture(acdc / f"train/GP/GP_{n}_rgb_anon.png") for n in (1, 2)]
    days = [picture(acdc / f"train_ref/GP/GP_{n}_rgb_ref_anon.png") for n in (1, 2)]
    assert datasets.targets("acdc", tree / "acdc") == (days, nights) and not days[0].unlink()
    fails(DataError, "GP_1_rgb_ref_anon.png: no such file", datasets.targets, "acdc", tree / "acdc")


PAIR = "train/night/DEMO_night/DEMO_night_frame_000002", "train/day/DEMO_day/DEMO_day_frame_000004"
LINE = ",".join(PAIR)
CSVS = {  # what a list holds, and what is wrong with it
    "plain": (LINE, ""), "a comma at the end": (f"{LINE},", ""), "BOM, CRLF, blank lines": (f"\ufeff\r\n {PAIR[0]} , {PAIR[1]} \r\n  \r\n", ""),
    "a heading": (f"night,day\n{LINE}", ""), "days first": (",".join(PAIR[::-1]), ""),
    "quotes": (f'"{PAIR[0]}","{PAIR[1]}"', ""), "backslashes": (LINE.replace("/", "\\"), ""),
    "endings": (",".join(f"./rgb_anon/{stem}_rgb_anon.PNG" for stem in PAIR), ""), "blank": ("\n", "no pair"),
    "one column": (PAIR[0], "line 1 is not NIGHT,DAY"), "three columns": (f"{LINE},x", "line 1 is not NIGHT"),
    "a NUL": (LINE.replace(",", "\0,"), ".*line"), "semicolons": (";".join(PAIR), "line 1 is not NIGHT,DAY"),
    "a path": (f"\n/etc/passwd,{PAIR[1]}", "line 2 is not train/night"),
    "no frame": (f"{PAIR[0]},train/day/x", "line 1: no file train/day/x_rgb_anon.png in"),
    "binary": ("\udcff", "not a readable csv"), "two nights": (f"{PAIR[0]},{PAIR[0]}", "line 1 is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", CSVS)
def test_pair_lists(city, tmp_path, name):
    (content, wrong), root, table = CSVS[name], city / "darkzurich", tmp_path / "mine.csv"
    table.write_bytes(content.encode("utf-8", "surrogateescape"))
    if wrong:
        fails(DataError, f"mine.csv: {wrong}", datasets.targets, "darkzurich", root, table)
    else:
        expected = [[root / f"rgb_anon/{stem}_rgb_anon.png"] for stem in PAIR[::-1]]
        assert list(datasets.targets("darkzurich", root, table)) == expected


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def redraw(change, kind="PNG"):
    return lambda path: change(Image.open(path).copy()).save(path, format=kind)


DAMAGES = {  # what is done to a file, and what survives it
    "cut in half": (rewrite(lambda data: data[: len(data) // 2]), ""), "empty": (rewrite(lambda _: b""), ""),
    "a hole": (rewrite(lambda data: data[:999] + data[1009:]), ""), "missing": (Path.unlink, ""),
    "text": (rewrite(lambda _: b"<html>"), ""), "16 bits": (redraw(lambda i: Image.new("I;16", i.size)), ""),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), ""), "a TIFF": (redraw(lambda i: i, "TIFF"), ""),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), ""), "a link to itself": (lambda path: (path.unlink(), path.symlink_to(path.name)), ""),
    "CMYK": (redraw(lambda i: i.convert("CMYK"), "JPEG"), ""),
    "RGB": (redraw(lambda i: i.convert("RGB")), "image"),
    "palette": (redraw(lambda i: i.quantize(64)), "image"), "a JPEG": (redraw(lambda i: i, "JPEG"), "image"),
    "alpha": (redraw(lambda i: i.convert("RGBA")), "image"), "L": (redraw(lambda i: i.convert("L")), "both"),
    "narrower": (redraw(lambda i: i.resize((255, 128), Image.NEAREST)), "both"),
    "99": (redraw(lambda i: Image.new("L", i.size, 99)), "image"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_told_in_one_line_or_works(city, tmp_path, how, monkeypatch):
    act, survives = DAMAGES[how]
    for kind, name, read in (("image", IMAGE, datasets.open_image), ("label", LABEL, datasets.open_label)):
        path = Path(shutil.copy(first(city, name), tmp_path))
        act(path)
        if survives in (kind, "both"):
            assert read(path).height == 128
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20000)  # now it is a decompression bomb
        fails(DataError, name, read, path)
        monkeypatch.undo()


def test_a_crop_cuts_image_and_label_alike():
    gradient = Image.frombytes("L", (200, 100), bytes(x for _ in range(100) for x in range(200)))
    rng, ends = random.Random(0), []
    for _ in range(40):
        cut = datasets.random_crop((100, 200), (40, 60), (0.5, 1.0), rng)
        image, label = cut(gradient.convert("RGB")), cut(gradient, TF.InterpolationMode.NEAREST_EXACT)
        assert image.shape == (3, 40, 60) and label.shape == (1, 40, 60) and image.dtype == torch.uint8
        assert (image[0, :, 3:-3].int() - label[0, :, 3:-3].int()).abs().max() <= 2
        ends.append(int(label[0, 0, 0]) - int(label[0, 0, -1]))
    assert min(ends) < -100 and max(ends) > 100 and min(map(abs, ends)) < 65  # flips and scales
    assert datasets.random_crop((100, 200), (40, 60), (99, 99), rng)(gradient).shape == (1, 40, 60)


def stream_of(city, paired=True, **options):
    source = datasets.samples("cityscapes", city / "cityscapes", "train")
    days, nights = datasets.targets("darkzurich", city / "darkzurich", "corresp" if paired else "none")
    return datasets.FourDomains(source, days, nights, (64, 96), paired, length=12, **options)


@pytest.mark.parametrize("paired", [True, False])
def test_an_item_depends_on_the_seed_and_its_number_alone(city, tmp_path, monkeypatch, paired):
    one, two, other = (stream_of(city, paired, seed=seed) for seed in (0, 0, 1))
    items, backward = [one[k] for k in range(12)], [two[k] for k in reversed(range(12))]
    assert_same(items, backward[::-1])
    assert any(not torch.equal(item["source_day"], other[k]["source_day"]) for k, item in enumerate(items))
    assert sorted(datasets._order(6, "any")) == list(range(6))  # every pass takes all
    seen, real = [], datasets.open_image
    monkeypatch.setattr(datasets, "open_image", lambda path: seen.append(path.name) or real(path))
    resting, made = (stream_of(city, paired, targets_from=2) for _ in range(2))
    made.synthetic = datasets.synthetic_nights(city / "cityscapes", made.source)  # instead of a style
    for k, stream, names in ((0, resting, ["night"]), (0, made, []), (2, resting, ["day", "night"])):
        item = seen.clear() or stream[k]
        assert_same(item.pop("source_night", None), item["source_day"] if stream is made else None)
        assert_same(item, {name: items[k][name] for name in item})
        assert sorted(name.split("_")[1] for name in seen if "DEMO" in name) == names
    for _ in range(2):  # a cache, filled, then read, changes nothing
        cached = stream_of(city, paired, cache=datasets.Cache(tmp_path / "cache"))
        assert_same(items, [cached[k] for k in range(12)])
        monkeypatch.setattr(datasets, "_opened", None)  # from now on nothing is decoded


def test_a_cache_entry_belongs_to_its_file_and_is_whole_or_nothing(tree, tmp_path, monkeypatch):
    folder, paths = tmp_path / "cache", sorted(tree.rglob("*_leftImg8bit.png"))

    def fill():
        found = map(datasets.Cache(folder).open, paths, [datasets.open_image] * len(paths))
        assert_same([*found], [TF.pil_to_tensor(datasets.open_image(path)) for path in paths])

    runs = [torch.multiprocessing.get_context("fork").Process(target=fill) for _ in range(3)]
    assert [run.start() for run in runs] and [run.join() or run.exitcode for run in runs] == [0, 0, 0]
    entries = sorted(folder.iterdir())
    assert len(entries) == len(paths) and {entry.suffix for entry in entries} == {".pt"}
    for entry, size in zip(entries, (0, 7, -1), strict=False):
        whole = entry.read_bytes()
        entry.write_bytes(whole[:size])
        fill()
        assert entry.read_bytes() == whole  # decoded and written again
    assert datasets.Cache(folder, 0.5).open(paths[0], datasets.open_image).shape == (3, 64, 128)
    Image.open(paths[0]).transpose(Image.FLIP_TOP_BOTTOM).save(paths[0])
    fill()
    shutil.rmtree(folder)
    monkeypatch.setattr(os, "fsync", lambda _: os.open("/dev/null/full", 0))  # raises
    with pytest.warns(UserWarning, match="not written .*; the cache is not filled further") as told:
        fill()
    assert len(told) == 1 and not list(folder.iterdir())


# ---- scores and predictions --------------------------------------------------------------------------------

TINY = ["--crop", 32, 64, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--weights", "none"]


def run(command, main=train.main):
    return main([str(part) for part in command])


def arguments(city, out, *more):
    data = ["--cityscapes", city / "cityscapes", "--darkzurich", city / "darkzurich"]
    return [str(part) for part in (*data, "--out", out, *TINY, *more)]


def log_of(out):
    return [*csv.DictReader(log.read_text().splitlines())] if (log := out / "log.csv").exists() else []


def trained(city, out, *more):
    assert train.main(arguments(city, out, *more)) == 0
    return log_of(out)


def refused(capsys, command, told, main=train.main):
    capsys.readouterr()
    try:
        status = run(command, main)
    except SystemExit as stop:
        status = stop.code
    errors = capsys.readouterr().err
    assert status == 2 and errors.count("\n") == 1 and ": error: " in errors and told in errors, errors


@pytest.fixture(scope="session")
def checkpoint(city, tmp_path_factory):
    trained(city, out := tmp_path_factory.mktemp("trained") / "run", "--steps", 2)
    return out / "last.pt"


def evaluated(checkpoint, tmp_path, *more):
    command = ["--checkpoint", checkpoint, "--json", tmp_path / "s.json", "--device", "cpu", "--workers", 0]
    assert run([*command, *more], evaluate.main) == 0
    return json.loads((tmp_path / "s.json").read_text())


def test_scores_are_counted_pixel_by_pixel():
    label, prediction = torch.randint(0, 6, (20, 30)), torch.randint(2, 8, (20, 30))
    label[0], counted = 255, [[0] * 19 for _ in range(19)]
    for a, b in zip(label[1:].flatten().tolist(), prediction[1:].flatten().tolist(), strict=True):
        counted[a][b] += 1
    hits = [counted[c][c] for c in range(19)]
    unions = [sum(counted[c]) + sum(row[c] for row in counted) - hits[c] for c in range(19)]
    iou = [100 * hit / union if union else None for hit, union in zip(hits, unions, strict=True)]
    result = evaluate.scores(evaluate.count(label.byte(), prediction, 19))
    assert result["confusion_matrix"] == counted
    assert result["iou"] == pytest.approx(dict(zip(datasets.NAMES, iou, strict=True))) and iou[8] is None
    means = {"miou": sum(iou[:8]) / 8, "miou_present": sum(iou[:6]) / 6, "pixel_accuracy": sum(hits) / 5.7}
    assert {name: result[name] for name in means} == pytest.approx(means)
    assert "bus              n/a" in evaluate.table(result)


def test_flips_and_scales_average_the_softmax_and_what_goes_wrong_is_told(city, checkpoint, tmp_path):
    def model(images):  # known for every pixel: the sigmoid of its red
        assert min(images.shape[2:]) >= 32
        return None, images[:, :2] * torch.tensor([1.0, 0.0]).view(2, 1, 1)

    images = torch.rand(1, 3, 70, 90)
    whole, smooth = evaluate.probabilities(model, images), images.mean((2, 3), keepdim=True).expand_as(images)
    close(whole[:, 0], images[:, 0].sigmoid())
    close(evaluate.probabilities(model, images, flip=True), whole)  # flipped back
    views = evaluate.probabilities(model, smooth, (0.75, 1.0, 1.25), True)
    close(views, evaluate.probabilities(model, smooth), 1e-6)
    assert evaluate.probabilities(model, images[:, :, :9, :20]).shape == (1, 2, 9, 20)
    data, views = ["--darkzurich", city / "darkzurich"], ([], ["--flip"], ["--scales", 0.75, 1.25])
    found = [evaluated(checkpoint, tmp_path, *data, *view) for view in views]
    assert len({str(result["confusion_matrix"]) for result in found}) == 3
    samples, (model, _) = datasets.samples("darkzurich", data[1]), evaluate.load_model(checkpoint)
    for bad in samples:  # the writer is a thread of its own
        each = lambda item, *_, bad=bad: item["name"] == bad.image.stem and 1 / 0
        fails(ZeroDivisionError, "zero", evaluate.evaluate, model, samples, "cpu", each=each)
    full, told = [], "DefaultCPUAllocator: can't allocate memory"
    large = lambda _: (_ for _ in ()).throw(RuntimeError(told))
    large.training, large.eval, large.train = False, int, bool
    fails(DataError, "DEMO_.*: 256 x 128 is too large for the mem", evaluate.evaluate, large, samples, "cpu")
    assert evaluate.evaluate(large, samples, "cpu", failed=full)["miou"] is None and len(full) == 3
    model.classifier[4].bias.data[3] = float("nan")
    fails(ValueError, "DEMO_.*: the network puts out nan", evaluate.evaluate, model, samples, "cpu")


def test_an_evaluation_that_nobody_reads_ends_well(city, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 10).__next__)  # time to tell of every header
    with open(tmp_path / "closed", "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
    assert evaluated(checkpoint, tmp_path, "--darkzurich", city / "darkzurich")["images"] == 3


def test_any_picture(checkpoint, tmp_path, capsys):
    sizes, given = {"b": (30, 40), "c": (40, 30)}, tmp_path / "in"
    for n, ending in enumerate(("png", "jpg", "webp", "PNG")):
        sizes[f"a{n}"] = 33 + n, 20 + 30 * n
        picture(given / f"a{n}.{ending}", sizes[f"a{n}"], value=(200, 30, 90))
    (turned := Image.Exif())[0x0112] = 6  # by 90 degrees: for a JPEG, not for a PNG
    for name in ("b.jpg", "c.png"):
        Image.new("RGB", (40, 30)).save(given / name, exif=turned)
    for name in ("notes.txt", ".hidden.png", "scan.tiff"):
        (given / name).write_text("no picture")
    (given / "more.png").mkdir()
    command = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--images", given]
    assert run(command, evaluate.main) == 0
    said, pixels = capsys.readouterr().out, []
    assert all(part in said for part in ("skipped 3, not read", "notes.txt", "scan.tiff", "more.png"))
    for kind, mode in (("labelTrainIds", "L"), ("labelIds", "L"), ("color", "RGB"), ("overlay", "RGB")):
        found = {path.stem: Image.open(path) for path in (tmp_path / "out" / kind).iterdir()}
        assert {n: i.size for n, i in found.items()} == sizes and {i.mode for i in found.values()} == {mode}
        pixels.append(found["a3"].getpixel((5, 5)))
    assert datasets.CLASSES[pixels[0]][1:] == tuple(pixels[1:3])
    (given / "a1.jpg").write_bytes(b"no picture")  # one bad one among good ones
    (tmp_path / "out/color/a2.png").unlink()
    refused(capsys, command, "a1.jpg: not a readable image", evaluate.main)
    assert (tmp_path / "out/color/a2.png").exists()
    refused(capsys, [*command[:-1], tmp_path / "out"], "no picture in it (.jpeg", evaluate.main)
    refused(capsys, [*command, tmp_path / "typo.png"], "typo.png: no such file", evaluate.main)
    shutil.rmtree(tmp_path / "out/color"), (tmp_path / "out/color").write_text("in the way")
    refused(capsys, command, "a0.png: not written (", evaluate.main)


def test_outputs_over_each_other_or_over_inputs_are_refused_first(
    city, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(evaluate.SIZES, "darkzurich", (64, 48))
    one, two, new = tmp_path / "one", tmp_path / "two", ["--out", tmp_path / "new"]
    for folder in ("one", "two", "out", "dz/rgb_anon/test/night/1", "dz/rgb_anon/test/night/2"):
        picture(tmp_path / folder / "a_rgb_anon.png")
    (tmp_path / "out/color").symlink_to(one)
    picture(tmp_path / "mine/labelIds/a_rgb_anon.png", mode="L")  # labels made by hand
    (tmp_path / "link.pt").symlink_to(checkpoint)
    over, dz = "no regular file, or one that this command reads", ["--darkzurich", city / "darkzurich"]
    for told, *more in (
        ("a_rgb_anon.png: two outputs would be written there", "--images", one, two, *new),
        ("two outputs would be written there", "--darkzurich", tmp_path / "dz", "--split", "test", *new),
        (f"color/a_rgb_anon.png: {over}", "--images", one, "--out", tmp_path / "out"),
        (f"link.pt: {over}", *dz, "--json", tmp_path / "link.pt"), (f"one: {over}", *dz, "--json", one),
        ("cannot be written to", *dz, "--out", first(city, IMAGE)),
        ("color: two outputs would be", *dz, *new, "--json", tmp_path / "new/color"),
        ("no: cannot be written to (No such file", *dz, "--json", tmp_path / "no/s.json"),
        ("null: no regular file", *dz, "--json", "/dev/null"),
        ("args.json: exists and is no result of this", *dz, "--json", checkpoint.parent / "args.json"),
        ("best.pt: exists and is no result of this", *dz, "--json", checkpoint.parent / "best.pt"),
        ("a_rgb_anon.png: exists and is no result", *dz, "--json", two / "a_rgb_anon.png"),
        ("labelIds/a_rgb_anon.png: exists and is no result", "--images", one, "--out", tmp_path / "mine"),
        ("would become images of", *dz, "--out", city / "darkzurich/rgb_anon/val/night/p"),
        ("made/: no regular file", *dz, "--json", f"{tmp_path}/made/"),
        ("y.zip: two images would be labelTrainIds/a.png in it", "--darkzurich", tmp_path / "dz", "--submit", tmp_path / "y.zip"),
        ("d.zip: exists and is no result", "--darkzurich", tmp_path / "dz", "--submit", tmp_path / "d.zip"),
    ):  # fmt: skip
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as mine:
            mine.writestr("letter.txt", "kept")
        refused(capsys, ["--checkpoint", checkpoint, *more], told, evaluate.main)
    for _ in range(2):  # into a folder that it makes, under any name, and again
        more = [*dz, "--out", one / "x", "--json", one / "x/scores.txt"]
        run(["--checkpoint", checkpoint, *more], evaluate.main)
    assert "miou" in (one / "x/scores.txt").read_text()


def test_submissions(checkpoint, tmp_path, capsys, monkeypatch):
    sizes, root, file = {"darkzurich": (64, 48), "cityscapes": (64, 48)}, tmp_path / "d", tmp_path / "x.zip"
    monkeypatch.setattr(evaluate, "SIZES", sizes)
    for n in (1, 2):
        image = picture(root / f"rgb_anon/test/night/G/G_frame_00000{n}_rgb_anon.png", value=(9, 9, 40))
        picture(root / f"leftImg8bit/test/berlin/berlin_{n}_leftImg8bit.png")

    def packed(data):
        evaluated(checkpoint, tmp_path, data, root, "--submit", file)  # the test split, what else
        with zipfile.ZipFile(file) as packed:
            return {name: Image.open(packed.open(name)).copy() for name in packed.namelist()}

    kinds, found = ("labelTrainIds L", "labelTrainIds_invalid L", "confidence I"), packed("--darkzurich")
    expected = {f"{kind.split()[0]}/G_frame_00000{n}.png": kind.split()[1] for kind in kinds for n in (1, 2)}
    assert {name: p.mode[0] for name, p in found.items()} == expected  # I: 16 bits
    pixels, (model, _) = datasets.load(datasets.Sample(image))["image"], evaluate.load_model(checkpoint)
    best = model(pixels[None] / 255)[1].softmax(1).max(1)[0][0, 20, 30].item()
    assert found["confidence/G_frame_000002.png"].getpixel((30, 20)) == pytest.approx(65535 * best, abs=2)
    found = packed("--cityscapes")
    assert [*found] == [f"berlin_{n}_leftImg8bit.png" for n in (1, 2)]
    assert {v for p in found.values() for _, v in p.getcolors()} <= {*datasets.LABEL_IDS}
    before = file.read_bytes()  # what does not pass the check does not take the file's name
    command = ["--checkpoint", checkpoint, "--darkzurich", root, "--submit", file, "--device", "cpu"]
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: None)
    refused(capsys, command, "missing or too many", evaluate.main)
    image.write_bytes(image.read_bytes()[:-40])
    refused(capsys, command, "not a readable image", evaluate.main)
    sizes["darkzurich"] = (1920, 1080)
    refused(capsys, command, "rgb_anon.png: the server wants (1920, 1080)", evaluate.main)
    assert file.read_bytes() == before and not Path(f"{file}.tmp").exists()


def test_files_from_strangers_are_one_line_each(city, checkpoint, tmp_path, capsys):
    state, path = models.read_state(checkpoint), tmp_path / "x.pt"
    kind, data = state["architecture"], ["--darkzurich", city / "darkzurich", "--device", "cpu"]
    for content in (
        state | {"format": 0}, state | {"architecture": kind | {"backbone": "resnet50"}}, {0: torch.ones(1)},
        state | {"architecture": kind | {"num_classes": 21}}, state | {"model": {}}, [1], b"", b"<html>",
        state | {"architecture": kind | {"head": "deeplabv2"}}, checkpoint.read_bytes()[:9999],
        state | {"architecture": {"nonsense": 1}}, state | {"architecture": "vgg"}, {"architecture": kind},
    ):  # fmt: skip
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(capsys, ["--checkpoint", path, *data], str(path), evaluate.main)
        refused(capsys, ["--out", tmp_path / "o", "--resume", path], str(path))
    state["model"]["night.classifier.4.bias"][0] = math.nan
    torch.save(state, path)
    refused(capsys, ["--checkpoint", path, *data], "x.pt: classifier.4.bias holds nan", evaluate.main)


# ---- training ----------------------------------------------------------------------------------------------

PYTHON = [sys.executable, "-u", "-c", "import sys, test_ccdistill as t; sys.exit(t.train.main(sys.argv[1:]))"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
PIPES["env"] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}


def started(command, beginning, **options):  # and has printed a line that begins like this
    process = subprocess.Popen([str(part) for part in command], **PIPES, **options)
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()
    return process


def assert_same_runs(one, other):
    states = [models.read_state(out / "last.pt") for out in (one, other)]
    for state, key in itertools.product(states, ("out", "resume")):
        state["args"].pop(key)
    assert_same(*states)
    assert (one / "log.csv").read_text() == (other / "log.csv").read_text()


def test_train_save_evaluate(city, tmp_path, capsys):
    out, data = tmp_path / "run", ["--darkzurich", city / "darkzurich", "--model"]
    more = "--steps", 20, "--lr", 1e-3, "--eval-every", 10, "--crop", 64, 96, "--log-every", 5
    rows, printed = trained(city, out, *more), capsys.readouterr().out
    files = " ".join(sorted(path.name for path in out.iterdir()))
    assert files == ".lock args.json best.pt last.pt log.csv samples.png"
    assert [bool(row["miou"]) for row in rows] == [n in (9, 19) for n in range(20)]
    assert [bool(row["pseudo"]) for row in rows] == [n >= 5 for n in range(20)]  # they join after a quarter
    assert sum(float(r["seg_day"]) for r in rows[-5:]) < 0.8 * sum(float(r["seg_day"]) for r in rows[:5])
    assert all(part in printed for part in ("step 5/20", "pseudo -", "left", "at night: miou"))
    assert Image.open(out / "samples.png").size == (3 * 258 + 2, 3 * 130 + 2)
    best, last = (models.read_state(out / f"{name}.pt")["model"] for name in ("best", "last"))
    assert {name.split(".")[0] for name in best} == {"day", "night"} and {*last} > {*best}
    day, night = (evaluated(out / "last.pt", tmp_path, *data, light) for light in ("day", "night"))
    assert night["miou"] == pytest.approx(float(rows[-1]["miou"])) != day["miou"]
    best = evaluated(out / "best.pt", tmp_path, *data, "night")["miou_present"]
    assert best == pytest.approx(max(float(row["miou_present"] or 0) for row in rows))


SWITCHES = {  # and the terms that are gone
    "": "", "--content-weight 0": "content inherent illumination js", "--js-weight 0": "js", "--seed 1": "",
    "--style-weight 0": "style", "--pseudo-weight 0": "pseudo", "--pairs none": "", "--night-style fda": "",
    "--day-only": "seg_night pseudo content style inherent illumination js", "--amp bf16": "", "--no-mix": "",
    "--adapt-from 1": "pseudo content style inherent illumination js", "--no-projection": "",
    "--batch-norm joint": "", "--night-weights shared": "", "--optimizer sgd": "", "--scale 1 1": "",
    "--synthetic-night CITY": "", "--night-statistics source": "",
}  # fmt: skip


def test_every_switch_does_what_it_says(city, tmp_path):
    totals, start = set(), ["--steps", 2, "--adapt-from", 0, "--batch-size", 1, "--pseudo-threshold", 0]
    for n, (switch, gone) in enumerate(SWITCHES.items()):
        more = switch.replace("CITY", str(city / "cityscapes")).split()
        row = trained(city, tmp_path / str(n), *start, *more)[-1]
        assert [name for name in SWITCHES["--day-only"].split() if not row.get(name)] == gone.split(), switch
        state = models.read_state(tmp_path / f"{n}/last.pt")["model"]
        names = " ".join(state)
        assert ("teacher" in names) == (switch not in ("--no-mix", "--pseudo-weight 0", "--day-only"))
        assert ("projection" in names) == (switch not in ("--no-projection", "--day-only"))
        totals.add((row["total"], state["night.backbone.bn1.running_mean"].sum().item()))
    assert len(totals) == len(SWITCHES)  # none is without effect


def test_a_term_that_is_added_trains_and_is_logged_when_it_appears(city, tmp_path, monkeypatch, capsys):
    def forward(self, batch, adapt=True, real=ccdistill.CCDistill.forward):
        terms, extra = real(self, batch, adapt), self.day.classifier[4].weight.square().sum()
        return terms | ({"extra": extra, "total": terms["total"] + extra} if adapt else {})

    more = ["--steps", 4, "--adapt-from", 0.5, "--log-every", 1]
    plain = trained(city, tmp_path / "plain", *more)
    monkeypatch.setattr(ccdistill.CCDistill, "forward", forward)
    rows = trained(city, tmp_path / "more", *more)
    assert [bool(row["extra"]) for row in rows] == [False, False, True, True]
    assert rows[:2] == [row | {"extra": ""} for row in plain[:2]] and "extra" in capsys.readouterr().out
    states = (models.read_state(tmp_path / name / "last.pt")["model"] for name in ("more", "plain"))
    small, plain = (state["day.classifier.4.weight"].norm() for state in states)
    assert small < plain


@pytest.mark.parametrize("end, more", [
    ("SIGINT", ""), ("SIGTERM", "--night-weights separate --workers 1"), ("SIGHUP", "--day-only"),
    ("SIGINT", "--night-weights shared --power 0 --no-mix"), ("crash", "--optimizer sgd --batch-norm joint"),
])  # fmt: skip
def test_resume_is_exact_however_a_run_ended(city, tmp_path, monkeypatch, capsys, end, more):
    more, cut = [*more.split(), "--steps", 6, "--eval-every", 3, "--save-every", 3], tmp_path / "cut"
    trained(city, tmp_path / "whole", *more)

    def save(state, path, real=train.save):
        real(state, path)
        if state["step"] == 3 and path.name == "last.pt":  # its row and validation are still to come
            1 / 0 if end == "crash" else os.kill(os.getpid(), getattr(signal, end))

    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save)
        with pytest.raises(ZeroDivisionError if end == "crash" else SystemExit) as stopped:
            train.main(arguments(city, cut, *more))
    told = f"stopped at step 4; train.py --out {cut} --resume goes on" in capsys.readouterr().out
    assert end == "crash" or (told and stopped.value.code == 128 + getattr(signal, end))
    assert models.read_state(cut / "last.pt")["step"] == len(log_of(cut)) + (end == "crash") * 0
    (cut / "log.csv").write_text((cut / "log.csv").read_text() + "4,0.00")  # torn
    for _ in range(2):
        assert run(["--out", cut, "--resume"]) == 0  # it knows its arguments
        assert_same_runs(tmp_path / "whole", cut)
    assert "at step 6 of 6 already" in capsys.readouterr().out


def test_killed_at_any_moment_it_ends_with_the_same_bits(city, tmp_path, capsys):
    (kills, steps), whole, out = (25, 200) if FULL else (3, 16), tmp_path / "whole", tmp_path / "out"
    more = ["--steps", steps, "--save-every", 1, "--eval-every", 2, "--workers", 1, "--log-every", 1]
    trained(city, whole, *more)
    command, resume, killed = arguments(city, out, *more), ["--out", out, "--resume"], []
    while len(killed) < kills and 0 not in killed:  # 0: it was faster
        process = started([*PYTHON, *command], "step")
        if any(line.startswith("step") for line in process.stdout) and not killed:  # the first is saved
            refused(capsys, resume, "another run is writing there; choose another --out")
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        killed.append(process.wait())
        command = resume
        models.read_state(out / "last.pt")  # whole, whenever it was killed
    assert -signal.SIGKILL in killed and run(resume) == 0
    assert_same_runs(whole, out)


def test_nohup_and_a_terminated_evaluation(city, checkpoint, tmp_path):
    more = arguments(city, tmp_path / "run", "--steps", 8, "--log-every", 1)
    process = started(["sh", "-c", 'trap "" HUP; exec "$@"', "-", *PYTHON, *more], "step 1/")
    process.send_signal(signal.SIGHUP)
    assert process.communicate()[1] == "" and process.returncode == 0 and len(log_of(tmp_path / "run")) == 8
    for n in range(400):
        picture(tmp_path / f"dz/rgb_anon/test/night/G/G_{n:03}_rgb_anon.png")
    code = "import sys, test_ccdistill as t; t.evaluate.SIZES['darkzurich'] = 64, 48; "
    code += "sys.exit(t.evaluate.main(sys.argv[1:]))"
    more = ["--checkpoint", checkpoint, "--darkzurich", tmp_path / "dz", "--submit", tmp_path / "x.zip"]
    process = started([sys.executable, "-u", "-c", code, *more], "darkzurich test")
    while not list(tmp_path.glob("x.zip*.tmp")):
        assert process.poll() is None
    time.sleep(0.5)  # it is among the pictures
    process.terminate()
    assert process.wait() == 143 and not list(tmp_path.glob("x.zip*"))


@pytest.mark.parametrize("launch, number", [([], signal.SIGHUP), (TWO, signal.SIGTERM)])
def test_a_closed_terminal_or_torchrun_stops_all_together(city, tmp_path, launch, number):
    more = arguments(city, tmp_path / "run", "--steps", 10000, "--log-every", 1, "--workers", 1)
    process = started([*launch, *PYTHON, *more], "step 1/", start_new_session=True)
    process.send_signal(number) if launch else os.killpg(process.pid, number)  # its worker is told as well
    printed, errors = process.communicate()
    assert "--resume goes on" in printed and (launch or printed.count("finishing this step") == 1)
    assert process.returncode if launch else process.returncode == 129 and "Traceback" not in errors
    assert models.read_state(tmp_path / "run/last.pt")["step"] >= 1


def test_resuming_takes_the_runs_arguments_and_refuses_others(city, checkpoint, tmp_path, capsys):
    out, resume, new = checkpoint.parent, ["--out", checkpoint.parent, "--resume"], tmp_path / "new"
    refused(
        capsys, arguments(city, out, "--steps", 2), f"last.pt: exists; --out {out} --resume alone goes on"
    )
    for told, more in (
        ("another run: --steps 2 there, 3 here; leave it out", "--steps 3"), ("--lr 0.0005 there", "--lr 1"),
        ("target darkzurich there, acdc here", "--acdc x"), ("--crop [32, 64] there", "--crop 64 64"),
        ("--no-mix False there, True here", "--no-mix"), ("no such file, nothing to go on from", f"--out {new}"),
        ("best.pt: not a last.pt that a run can go on from", f"{out}/best.pt --out {new}"),
    ):  # fmt: skip
        refused(capsys, [*resume, *more.split()], told)
    torch.save(models.read_state(checkpoint) | {"step": 1}, tmp_path / "other.pt")
    refused(capsys, [*resume, tmp_path / "other.pt"], "holds another run; choose another --out")
    refused(capsys, [*resume[:2], "--resume", out, "--lr", 1], "--lr 0.0005 there")  # a folder will do
    for name in "ab":  # a list of pairs that was moved
        (tmp_path / name).write_text(LINE)
    trained(city, tmp_path / "p", "--steps", 1, "--pairs", tmp_path / "a")
    (tmp_path / "a").unlink()
    assert run(["--out", tmp_path / "p", "--resume", "--pairs", tmp_path / "b"]) == 0
    moved = ["--workers", 2, "--cityscapes", shutil.copytree(city / "cityscapes", tmp_path / "moved")]
    assert run([*resume, tmp_path / "other.pt", "--out", new, *moved]) == 0
    Path(first(tmp_path / "moved", IMAGE)).rename(first(tmp_path / "moved", IMAGE).with_name(f"z{IMAGE}"))
    Path(first(tmp_path / "moved", LABEL)).rename(first(tmp_path / "moved", LABEL).with_name(f"z{LABEL}"))
    refused(capsys, ["--out", new, "--resume"], "the run saw 6 source images, 6 days, 6 nights (names: ")
    assert (new / "best.pt").exists()  # its own: the score of the other place does not count


NO_LAST = "holds best.pt, samples.png, log.csv or args.json, but no last.pt; choose another --out"


@pytest.mark.parametrize("name", ["args.json", "log.csv"])
def test_a_file_of_another_program_is_not_written_over(city, tmp_path, capsys, name):
    (tmp_path / name).write_text("somebody's")
    refused(capsys, arguments(city, tmp_path, "--steps", 1), f"{tmp_path}: {NO_LAST}")
    assert (tmp_path / name).read_text() == "somebody's"


@pytest.mark.parametrize("recipe", [
    "--lr 1e-9 --content-weight 0", "--optimizer sgd", "--no-mix", "--no-projection",
    "--batch-norm joint", "--backbone resnet34", "--day-only", "--night-weights separate",
])  # fmt: skip
def test_another_recipe_begins_there_or_is_refused(city, checkpoint, tmp_path, capsys, recipe):
    begin = ["--init-from", checkpoint, *recipe.split(), "--steps"]
    refused(capsys, arguments(city, tmp_path / "c", *begin, 2), "last.pt: is at step 2: give more --steps")
    more = [*begin, 4, "--weights", checkpoint]
    refused(capsys, arguments(city, tmp_path / "c", *more), "the weights come from --init-from")
    if "backbone" in recipe:
        return refused(
            capsys, arguments(city, tmp_path / "c", *begin, 4), "another network: --backbone must agree"
        )
    rows, printed = trained(city, tmp_path / "b", *begin, 4), capsys.readouterr().out
    (tmp_path / "b/last.pt").rename(tmp_path / "b/kept.pt")
    refused(capsys, arguments(city, tmp_path / "b"), NO_LAST)
    (tmp_path / "b/kept.pt").rename(tmp_path / "b/last.pt")
    assert [row["step"] for row in rows] == ["3", "4"] and recipe.split()[0] in printed
    if "lr" in recipe:  # it is where the other one was
        states = [models.read_state(path)["model"] for path in (checkpoint, tmp_path / "b/last.pt")]
        close(*(state["day.backbone.conv1.weight"] for state in states), 1e-6)


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(city, tmp_path, capsys, monkeypatch):
    out, kept = tmp_path / "run", []

    def fsync(file):  # full once a checkpoint is there
        if os.fstat(file).st_size > 10**6 and (out / "last.pt").exists():
            kept.append((out / "last.pt").read_bytes())
            raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", fsync)
    told = "last.pt: not written (disk full); what it held before is still whole"
    refused(capsys, arguments(city, out, "--steps", 4, "--save-every", 1), told)
    assert (out / "last.pt").read_bytes() == kept[-1] and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("reader", ["| head -n 1", ">&-"])
def test_output_that_nobody_reads_or_can_print_does_not_end_a_run(city, tmp_path, reader):
    more = ["--steps", 3, "--batch-size", 1, "--log-every", 1, "--day-only"]
    command = ["bash", "-c", f'set -o pipefail; "$@" {reader}', "-", sys.executable, HERE / "train.py"]
    done = subprocess.run([*command, *arguments(city, tmp_path / "夜", *more)], **PIPES, check=False)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert len(log_of(tmp_path / "夜")) == 3


@pytest.mark.parametrize("told, more", [
    ("--steps: 0 is not from 1", "--steps 0"), ("--crop: 16 is not from 32", "--crop 16 64"),
    ("--lr: nan", "--lr nan"), ("7 is not from 0 to 1", "--adapt-from 7"), ("--device", "--device meta"),
    ("--scale wants MIN <= MAX", "--scale 1 0.5"), ("--seed", "--seed 99999999999999999999"),
    ("invalid choice", "--backbone vgg"), ("--foo", "--foo"), ("is empty: an unset", "--cityscapes="),
    ("--day-only sees no night", "--day-only --synthetic-night x"), ("--demo draws its own", "--demo"),
    ("no.pth: no such file", "--weights no.pth"), ("no folder rgb_anon", "--day-only --darkzurich taken --weights taken"), ("no.csv: not a readable csv", "--pairs no.csv"),
    ("256 x 128 (width x height) is smaller than --crop 129 96; give a smaller one", "--crop 129 96"),
    ("is empty: an unset", "--resume="), ("taken: cannot be written to", "--cache taken"),
    ("is empty: an unset", "evaluate --acdc x --split="), ("leave one out", "evaluate --images x --split x --out y"),
    ("x/leftImg8bit/train: no", "--cityscapes x"),
    ("_leftImg8bit.png: no such", "--synthetic-night x"), ("typo: no folder rgb_anon", "--day-only --darkzurich typo"),
    ("pip install tensorboard", "--tensorboard"), ("not allowed", "--acdc x"), ("/proc/x", "--cache /proc/x"),
    ("step 1: style is nan; a lower --lr may help", "--adapt-from 0"), ("start with torchrun", "WORLD_SIZE"),
    ("WORLD_SIZE=2 is set, but RANK=2: start", "WORLD_SIZE RANK MASTER_ADDR MASTER_PORT"),
    ("--cityscapes DIR is needed", "nothing"), ("give --out DIR", "evaluate --images x"),
    ("--scales: 0", "evaluate --acdc x --scales 0"), ("not allowed", "evaluate --darkzurich x --acdc y"),
    ("for the test split", "evaluate --acdc x --submit s --split val"), ("x/rgb_anon", "evaluate --acdc x"),
    ("elsewhere --out", "evaluate --acdc x --submit s"), ("no.jpg: no", "evaluate --images no.jpg --out y"),
])  # fmt: skip
def test_nonsense_is_refused_in_one_line(city, checkpoint, tmp_path, capsys, monkeypatch, told, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(ccdistill, "style_distill", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    command, main = [*arguments(city, "run", "--steps", 2), *more.split()], train.main
    if more.startswith("evaluate"):
        command, main = ["--checkpoint", checkpoint, *more.split()[1:]], evaluate.main
    Path("taken").touch()
    for name in more.split() if more.startswith(("nothing", "WORLD")) else ():
        command = monkeypatch.setenv(name, "2") or []
    refused(capsys, command, told, main)
    assert not Path("run/last.pt").exists()


@pytest.mark.parametrize("name, how, told", [
    (IMAGE, "cut in half", "not a readable image"), (LABEL, "99", "value 99 is no labelIds value"),
    ("DEMO_day_frame_000000_rgb_anon.png", "narrower", "255 x 128, but"),
    ("DEMO_val_frame_000001_gt_labelTrainIds.png", "RGB", "expected an 8-bit single-channel label"),
    ("DEMO_val_frame_000002_gt_labelTrainIds.png", "missing", "no such label"),
])  # fmt: skip
def test_a_damaged_file_ends_training_with_one_line(tree, tmp_path, capsys, name, how, told):
    DAMAGES[how][0](first(tree, name))
    for workers in "01":
        refused(capsys, arguments(tree, tmp_path / workers, "--steps", 5, "--workers", workers), told)
        rows, last = log_of(tmp_path / workers), tmp_path / workers / "last.pt"
        assert len(rows) < 5 and (not rows or models.read_state(last)["step"] == len(rows))  # all is saved


def test_a_damaged_file_of_one_process_ends_all_with_the_step_saved(tree, tmp_path):
    number = datasets._order(6, "0 source 0")[5]  # the second process's of step 3
    DAMAGES["cut in half"][0](damaged := sorted(tree.rglob("train/demo/*_leftImg8bit.png"))[number])
    command = [*TWO, *PYTHON, *arguments(tree, tmp_path / "run", "--steps", 9, "--batch-size", 1)]
    done = subprocess.run(command, **PIPES, check=False)
    assert done.returncode and done.stderr.count(f"{damaged.name}: not a readable image") == 1
    assert "Error:" not in done.stderr.replace("ChildFailedError:", "")
    assert len(log_of(tmp_path / "run")) == models.read_state(tmp_path / "run/last.pt")["step"] == 2


def test_waiting_for_processes_that_never_come_can_be_ended(city, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = PIPES | {"env": PIPES["env"] | more}
    process = subprocess.Popen([*PYTHON, *arguments(city, tmp_path / "run")], **pipes)
    assert process.stderr.readline() == f"waiting for 1 more processes at 127.0.0.1:{port}\n"
    time.sleep(1)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_training_needs_no_labelled_nights_and_bears_void_ones(tree, tmp_path, capsys):
    for label in (tree / "darkzurich/gt/val").rglob("*.png"):
        Image.new("L", (256, 128), 255).save(label)
    trained(tree, tmp_path / "void", "--steps", 3, "--eval-every", 1)
    assert "every pixel is void" in capsys.readouterr().out
    shutil.rmtree(tree / "darkzurich/gt")
    trained(tree, tmp_path / "run", "--steps", 1, "--pairs", "none")
    assert "validation: none" in capsys.readouterr().out and not (tmp_path / "run/best.pt").exists()


def test_workers_the_cache_and_tensorboard_change_no_bit(city, tmp_path):
    plain, cache = trained(city, tmp_path / "plain", "--steps", 3), tmp_path / "cache"
    board = ["--tensorboard"] if train.importlib.util.find_spec("tensorboard") else []
    more = ["--steps", 3, "--workers", 2, "--cache", cache, *board]
    assert plain == trained(city, tmp_path / "more", *more) and len(list(cache.iterdir())) > 6
    assert_same(*(models.read_state(tmp_path / name / "last.pt")["model"] for name in ("plain", "more")))
    assert len(list(tmp_path.rglob("events*"))) == 3 * len(board)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_long_run_does_not_grow(city, tmp_path, monkeypatch):
    (early, late), seen = (200, 2000) if FULL else (20, 80), {}

    def report(row, *rest):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen[row["step"]] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(train, "report", report)
    more = ["--batch-size", 1, "--crop", 32, 32, "--workers", 1, "--eval-every", early, "--adapt-from", 0]
    more += ["--log-every", 1]
    trained(city, tmp_path / "run", "--steps", late, *more)
    (memory, files), (grown, more_files) = seen[early + 1], seen[late - 1]
    assert grown < memory + 32 and more_files <= files + 8  # MB; a leak would show in every step


def test_two_processes_are_one_training_and_stay_two(city, tmp_path, capsys):
    more = ["--optimizer", "sgd", "--lr", 0.01, "--adapt-from", 0, "--batch-norm", "joint", "--steps", 1]
    done = subprocess.run([*TWO, *PYTHON, *arguments(city, tmp_path / "two", *more)], **PIPES, check=False)
    assert done.returncode == 0 and done.stdout.count("at night:") == 1, done.stderr  # one alone speaks
    # The same by hand: each process's samples through the same weights, gradients averaged.
    args, _ = train.parse_args(arguments(city, tmp_path / "hand", *more))
    args.processes = 2
    (stream, validation), (method, optimizer) = train.load_data(args), train.build(args)
    start = copy.deepcopy(method.train().state_dict())
    for rank in (0, 1):  # both add to the gradients
        method.load_state_dict(start)
        torch.manual_seed(random.Random(f"{args.seed} 1 {rank}").getrandbits(63))
        batch = torch.utils.data.default_collate([stream[2 * rank], stream[2 * rank + 1]])
        batch = {k: v.long() if "label" in k else v / 255 for k, v in batch.items()}
        method(batch)["total"].div(2).backward()
    optimizer.step()
    last = models.read_state(tmp_path / "two/last.pt")["model"]
    close(last, last | {name: p.detach() for name, p in method.named_parameters()}, 1e-5)
    miou = evaluate.evaluate(evaluate.load_model(tmp_path / "two/last.pt")[0], validation, "cpu")["miou"]
    assert f",{miou}," in (tmp_path / "two/log.csv").read_text()
    told = "another run: processes 2 there, 1 here; give torchrun as many"
    refused(capsys, ["--out", tmp_path / "two", "--resume"], told)


def test_each_process_resumes_on_its_own_device(checkpoint, tmp_path, monkeypatch):
    state = models.read_state(checkpoint)
    torch.save(state | {"args": state["args"] | {"processes": 2, "device": "cuda:0"}}, tmp_path / "last.pt")
    monkeypatch.setattr(evaluate, "best_device", lambda: "cuda")
    monkeypatch.setattr(evaluate, "a_device", str)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name == "RANK" else "2")
    assert train.parse_args(["--out", str(tmp_path), "--resume"])[0].device == "cuda:2"


def test_without_shared_memory_everything_runs(city, checkpoint, tmp_path):
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"', "-"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("mounts a small /dev/shm, which takes root and unshare")
    predict = ["--checkpoint", str(checkpoint), "--darkzurich", str(city / "darkzurich"), "--workers", "2"]
    fit = arguments(city, tmp_path / "run", "--crop", 128, 256, "--steps", 2, "--workers", 2)
    code = f"import test_ccdistill as t; print(t.evaluate.main({predict})); exit(t.train.main({fit}))"
    done = subprocess.run([*mount, sys.executable, "-c", code], **PIPES, timeout=100, check=False)
    assert "\n0\n" in done.stdout and done.returncode == 0 and not done.stderr, done.stderr


def test_compiled_networks_compute_the_same(city, tmp_path, monkeypatch):
    compiled, real = [], nn.Module.compile  # without the minute that generating code takes
    monkeypatch.setattr(nn.Module, "compile", lambda m: compiled.append(m) or real(m, backend="aot_eager"))
    rows = [trained(city, tmp_path / f"{n}", "--steps", 2, *["--compile"] * n) for n in (0, 1)]
    assert len(compiled) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # of two batch sizes, and to evaluate
    assert float(rows[0][1]["total"]) == pytest.approx(float(rows[1][1]["total"]), rel=1e-3)
    assert len({" ".join(models.read_state(path)["model"]) for path in tmp_path.glob("*/last.pt")}) == 1


def test_the_benchmark_prints_what_it_says(city, tmp_path, capsys):
    def measured(*command):
        assert run(command) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2}

    result = measured("--benchmark", 2, *TINY, "--batch-size", 1, "--out", tmp_path / "b")
    for name in ("plain_ms", "method_ms", "ratio", "data_ms", "images_per_second", "peak_memory_mb"):
        assert result[name] > 0
    expected = 4000 / (result["method_ms"] + result["data_ms"])
    assert result["images_per_second"] == pytest.approx(expected, rel=1e-2)
    assert measured(*arguments(city, tmp_path / "out", "--benchmark", 1)) and not (tmp_path / "out").exists()


def test_the_demo_compares_day_only_with_the_method_and_goes_on(city, tmp_path, capsys, monkeypatch):
    real = datasets.make_demo_city
    monkeypatch.setattr(datasets, "make_demo_city", lambda root: real(root, train=4, val=2))
    command = ["--demo", "--steps", 2, "--out", tmp_path / "demo", "--workers", 0, "--device", "cpu"]
    for trains in (True, False):  # the second time nothing is trained again
        assert run(command) == 0
        printed = capsys.readouterr().out
        assert "day-only  ccdistill" in printed and ("step 2/2" in printed) == trains
    assert Image.open(tmp_path / "demo/comparison.png").width == 4 * 258 + 2
    for path in (drawn := tmp_path / "demo/city").rglob("*.png"):
        assert path.read_bytes() == (city / path.relative_to(drawn)).read_bytes()  # always the same pixels
