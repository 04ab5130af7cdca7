"""pytest. The slow formulas live here, the fast ones in the library; data is written to temporary folders."""

import copy
import csv
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
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
torch.set_num_threads(1)  # tiny tensors: a second thread waits more than it works


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


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
    out = torch.zeros(len(f), f.shape[1], f.shape[1], dtype=f.dtype)
    for n, i, j in itertools.product(range(len(f)), range(f.shape[1]), range(f.shape[1])):
        out[n, i, j] = sum(
            f[n, i, y, x] * f[n, j, y, x] for y in range(f.shape[2]) for x in range(f.shape[3])
        )
    return out / (f.shape[2] * f.shape[3])


def slow_js(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        a, b = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        m = (a + b) / 2
        total += sum(
            x * math.log(x / z) / 2 + y * math.log(y / z) / 2 for x, y, z in zip(a, b, m, strict=True)
        )
    return total / len(p)


def slow_mse(x, y):
    return sum((a - b) ** 2 for a, b in zip(x.flatten(), y.flatten(), strict=True)) / x.numel()


def slow_content(sd, sn, td, tn, js_weight, paired):
    cdc = slow_mse(slow_correlation(sd, td), slow_correlation(sn, tn))
    cdc += slow_mse(slow_correlation(sd, sn), slow_correlation(td, tn))
    js = slow_js(sd, sn) + (slow_js(td, tn) if paired else 0) - slow_js(sd, tn) - slow_js(sn, td)
    return cdc + js_weight * js


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_correlation_gram_js_are_their_formulas(batch):
    a, b = rand(batch, 3, 2, 4), rand(batch, 3, 2, 4)
    torch.testing.assert_close(losses.correlation(a, b), slow_correlation(a, b))
    torch.testing.assert_close(losses.gram(a), slow_gram(a))
    p, q = rand(batch, 7), rand(batch, 7)
    assert losses.js_divergence(p, q).item() == pytest.approx(slow_js(p, q).item(), abs=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("js_weight", [0, 0.5, 1])
@pytest.mark.parametrize("paired", [True, False])
def test_content_distill_is_its_formula(batch, js_weight, paired):
    e = [rand(batch, 5) for _ in range(4)]
    expected = slow_content(*e, js_weight, paired)
    assert losses.content_distill(*e, js_weight, paired).item() == pytest.approx(float(expected), abs=1e-12)


def test_style_distill_is_its_formula_for_maps_of_different_sizes():
    sd, sn, td, tn = rand(2, 3, 4, 5), rand(2, 3, 2, 2), rand(2, 3, 1, 7), rand(2, 3, 3, 3)
    g = [slow_gram(f) for f in (sd, sn, td, tn)]
    expected = slow_mse(slow_correlation(g[0], g[1]), slow_correlation(g[2], g[3]))
    assert losses.style_distill(sd, sn, td, tn).item() == pytest.approx(expected.item(), abs=1e-12)


def test_gradients_are_right():
    e = [rand(2, 4).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(losses.content_distill, e)
    f = [rand(2, 3, 2, 2).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(losses.style_distill, f)


def test_losses_do_not_depend_on_the_order_of_the_batch():
    e, f, order = [rand(4, 6) for _ in range(4)], [rand(4, 3, 5, 5) for _ in range(4)], [2, 0, 3, 1]
    torch.testing.assert_close(losses.content_distill(*e), losses.content_distill(*(x[order] for x in e)))
    torch.testing.assert_close(losses.style_distill(*f), losses.style_distill(*(x[order] for x in f)))


def test_identical_domains_cost_nothing():
    e, f = rand(3, 6), rand(3, 4, 5, 5)
    assert losses.content_distill(e, e, e, e).abs() < 1e-12
    assert losses.style_distill(f, f, f, f).abs() < 1e-12
    night = rand(3, 4, 5, 5)  # day and night differ in the source as they do in the target
    assert losses.style_distill(f, night, f, night) < 1e-12


def test_style_does_not_see_where_things_are():
    f = [rand(2, 3, 4, 6) for _ in range(4)]
    moved = [x.flatten(2)[..., torch.randperm(24)].unflatten(2, (4, 6)) for x in f]
    torch.testing.assert_close(losses.style_distill(*f), losses.style_distill(*moved))


def test_a_zero_row_correlates_zero_and_gets_no_gradient():
    a, b = rand(2, 5, dtype=torch.float32), rand(2, 5, dtype=torch.float32)
    a[1] = 0
    a.requires_grad_(), b.requires_grad_()
    cor = losses.correlation(a, b)
    assert cor[1].abs().max() == 0 and cor[:, 1].abs().max() == 0
    (cor * rand(4, 4, dtype=torch.float32)).sum().backward()
    assert a.grad[1].abs().max() == 0 and a.grad.isfinite().all() and a.grad[0].abs().max() > 0
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    losses.style_distill(zero, zero * 1, rand(2, 3, 4, 4).float(), rand(2, 3, 4, 4).float()).backward()
    assert zero.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 300])
def test_half_inputs_equal_their_float32_copies_even_under_autocast(dtype, scale):
    e = [(scale * rand(3, 16)).to(dtype) for _ in range(4)]
    f = [(scale * rand(3, 8, 6, 6)).to(dtype) for _ in range(4)]
    p, q = e[:2]
    for half, full in (
        (lambda: losses.content_distill(*e), lambda: losses.content_distill(*(x.float() for x in e))),
        (lambda: losses.style_distill(*f), lambda: losses.style_distill(*(x.float() for x in f))),
        (lambda: losses.correlation(p, q), lambda: losses.correlation(p.float(), q.float())),
        (lambda: losses.gram(f[0]), lambda: losses.gram(f[0].float())),
        (lambda: losses.js_divergence(p, q), lambda: losses.js_divergence(p.float(), q.float())),
    ):
        expected = full()
        with torch.autocast("cpu", torch.bfloat16):
            got, got_full = half(), full()
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert torch.equal(got, expected) and torch.equal(got_full, expected)
    assert losses.correlation(rand(2, 3), rand(2, 3)).dtype == torch.float64
    huge = [(1e20 * rand(2, 4, 3, 3)).to(torch.bfloat16).requires_grad_() for _ in range(4)]
    losses.style_distill(*huge).backward()
    assert all(f.grad.isfinite().all() for f in huge)
    big = torch.full((1, 64), 1e30)
    torch.testing.assert_close(losses.correlation(big, big), torch.ones(2, 2))


def test_js_stays_within_its_bounds():
    far = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert losses.js_divergence(*far).item() == pytest.approx(math.log(2))
    same = rand(64, 128, dtype=torch.float32)
    assert 0 <= losses.js_divergence(same, same.clone()) < 1e-6


@pytest.mark.parametrize(
    "call, shape",
    [
        (lambda: losses.correlation(rand(2, 3), rand(3, 3)), r"\(3, 3\)"),
        (lambda: losses.correlation(rand(2), rand(2)), r"\(2,\)"),
        (lambda: losses.gram(rand(2, 3, 4)), r"\(2, 3, 4\)"),
        (lambda: losses.js_divergence(rand(2, 3), rand(2, 4)), r"\(2, 4\)"),
        (
            lambda: losses.content_distill(rand(2, 3), rand(2, 3), rand(2, 3), rand(1, 3)),
            r"e_target_night \(1, 3\)",
        ),
        (
            lambda: losses.style_distill(*[rand(2, 3, 4, 4)] * 3, rand(2, 5, 4, 4)),
            r"f_target_night \(2, 5, 4, 4\)",
        ),
        (lambda: losses.pseudo_labels(rand(1, 19, 4, 4), rand(1, 19, 4, 5)), r"\(1, 19, 4, 5\)"),
    ],
)
def test_shapes_that_do_not_match_are_named(call, shape):
    with pytest.raises(ValueError, match=shape):
        call()


def test_pseudo_labels():
    probabilities = torch.tensor([[0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.02, 0.93], [0.9, 0.05, 0.05]])
    night = probabilities.log().T.reshape(1, 3, 2, 2)
    assert losses.pseudo_labels(night, num_static=2).flatten().tolist() == [0, 255, 2, 0]  # 0.9 reaches 0.9
    day = torch.tensor([[0.1, 0.8, 0.1], [0.01, 0.98, 0.01], [0.98, 0.01, 0.01], [0.9, 0.05, 0.05]])
    got = losses.pseudo_labels(night, day.log().T.reshape(1, 3, 2, 2), threshold=0.79, num_static=2)
    # static: (.95 + .1) / 2 < .79 | (.6 + .98) / 2 = .79 | dynamic, the day has no say | .9
    assert got.flatten().tolist() == [255, 1, 2, 0] and got.dtype == torch.int64
    assert losses.pseudo_labels(torch.full((1, 3, 2, 2), float("nan"))).unique().tolist() == [255]


def test_segmentation_loss_ignores_255_and_survives_nothing_else():
    logits = rand(2, 5, 4, 4).requires_grad_()
    labels = torch.randint(0, 5, (2, 4, 4))
    labels[0] = 255
    expected = -sum(logits[1].log_softmax(0)[labels[1, y, x], y, x] for y in range(4) for x in range(4)) / 16
    torch.testing.assert_close(losses.segmentation_loss(logits, labels), expected)
    nothing = losses.segmentation_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


def test_both_forms_of_the_style_correlation_agree(monkeypatch):
    wide, few = rand(2, 40, 2, 3), rand(2, 40, 2, 3)  # 4 samples x 6 positions < 40 channels
    wide[0] = 0
    wide.requires_grad_()
    expected = losses.correlation(losses.gram(wide), losses.gram(few))
    (slow,) = torch.autograd.grad((expected * torch.arange(4)).sum(), wide)
    long = torch.nn.functional.pad(wide, [0, 7]), torch.nn.functional.pad(few, [0, 7])  # too many positions
    with monkeypatch.context() as patch:
        patch.setattr(losses, "gram", None)  # the short form does without
        torch.testing.assert_close(losses._style_correlation(wide, few), expected)
        with pytest.raises(TypeError):
            losses._style_correlation(*long)
    for inputs in ((wide, few), long):
        found = losses._style_correlation(*inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad((found * torch.arange(4)).sum(), wide)[0], slow)


def test_losses_can_be_vendored():
    """It imports torch and the standard library, nothing else, and runs alone."""
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', '.')]; exec(open(sys.argv[1]).read());"
    )
    code += "print(float(content_distill(*[torch.eye(2)] * 4)));"
    code += "print('torchvision' in sys.modules, 'PIL' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code, HERE / "losses.py"], capture_output=True, text=True, cwd="/", check=False
    )
    assert out.stdout.split()[1:] == ["False", "False"], out.stderr


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_computes_the_same_on_a_denser_grid(backbone, stride):
    model = models.DeepLab(backbone, output_stride=stride).eval()
    plain = getattr(torchvision.models, backbone)(weights=None).eval()
    state = {f"backbone.{k}": v for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    for name, tensor in model.state_dict().items():
        if name in state:
            tensor.copy_(state[name])
    images = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        dense = model.backbone(images)
        sparse = nn.Sequential(*list(plain.children())[:-2])(images)
    assert dense.shape[2:] == (math.ceil(65 / stride), math.ceil(97 / stride))
    error = (dense[..., :: 32 // stride, :: 32 // stride] - sparse).abs().max()
    assert error < 1e-4 * sparse.abs().max()
    if backbone == "resnet50":  # where torchvision can, it does the same
        switch = [False, stride == 8, True]
        theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=switch).eval()
        theirs.load_state_dict(plain.state_dict())
        with torch.no_grad():
            error = (dense - nn.Sequential(*list(theirs.children())[:-2])(images)).abs().max()
        assert error < 1e-4 * dense.abs().max()


def test_deeplab_is_torchvisions_deeplabv3(tmp_path):
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=19, aux_loss=True
    )
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = models.DeepLab("resnet50", output_stride=8, weights=str(tmp_path / "theirs.pth")).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.eval()((images - ours.mean) / ours.std)["out"]
        torch.testing.assert_close(ours(images)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 40)])
def test_any_size_and_a_single_training_image(size):
    model = models.DeepLab()
    features, logits = model(torch.rand(1, 3, *size))
    logits.mean().backward()
    assert logits.shape == (1, 19, *size) and features.shape[1] == model.feature_channels
    assert features.shape[2:] == (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    torch.testing.assert_close(
        model.eval()(torch.ones(1, 3, *size), upsample=False)[1].shape[2:], features.shape[2:]
    )
    assert models.ProjectionHead(256, 32)(features).shape == (1, 32)


def test_wrong_shapes_and_choices_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 31, 40\)"):
        models.DeepLab()(torch.rand(1, 3, 31, 40))
    for arguments in ({"backbone": "vgg"}, {"output_stride": 32}, {"head": "fcn"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            models.DeepLab(**arguments)


def test_initial_weights(tmp_path, capsys):
    path = str(tmp_path / "w.pth")
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), path)
    model = models.DeepLab(weights=path)
    assert torch.equal(model.backbone.layer3[0].conv1.weight, resnet.layer3[0].conv1.weight)

    other = models.DeepLab(num_classes=7)
    torch.save({"module." + k: v for k, v in other.state_dict().items()}, path)
    model = models.DeepLab(weights=path)
    assert torch.equal(model.classifier[1].weight, other.classifier[1].weight)
    assert "7 classes left out" in capsys.readouterr().out and len(model.classifier[4].weight) == 19

    for content, message in (
        (other.state_dict() | {"surprise": torch.ones(1)}, "surprise"),
        (
            {k: v for k, v in other.state_dict().items() if k != "backbone.conv1.weight"},
            "backbone.conv1.weight",
        ),
        (
            other.state_dict() | {"backbone.conv1.weight": torch.ones(3)},
            "other shapes for backbone.conv1.weight",
        ),
        ([1, 2], "no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            models.DeepLab(weights=path)
    Path(path).write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match="w.pth: not a file of tensors"):
        models.DeepLab(weights=path)


def test_imagenet_weights_come_from_torchvisions_enum_and_only_when_asked(monkeypatch):
    resnet, asked = torchvision.models.resnet18(weights=None), []
    monkeypatch.setattr(
        torchvision.models.WeightsEnum,
        "get_state_dict",
        lambda self, **_: asked.append(self) or resnet.state_dict(),
    )
    models.DeepLab()
    assert not asked
    model = models.DeepLab(weights="imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert torch.equal(model.backbone.conv1.weight, resnet.conv1.weight)

    def cut_short(*_, **__):
        raise EOFError("ran out of input")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", cut_short)
    with pytest.raises(ValueError, match=r"ran out of input.*fetch https://.*give the file's path"):
        models.DeepLab(weights="imagenet")


def test_a_checkpoint_tells_its_input_format(tmp_path):
    model = models.DeepLab(input_format="caffe")
    state = {f"night.{name}": value for name, value in model.state_dict().items()}
    torch.save({"architecture": model.architecture, "model": state}, tmp_path / "last.pt")
    models.DeepLab(input_format="caffe", weights=tmp_path / "last.pt")
    with pytest.raises(ValueError, match="wants input_format caffe, not imagenet"):
        models.DeepLab(weights=tmp_path / "last.pt")


# ---- the method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ccdistill.NIGHT_STYLES)
def test_night_style_brings_the_light_and_keeps_the_content(method):
    day, night = torch.rand(2, 3, 33, 47) * 0.5 + 0.4, torch.rand(2, 3, 50, 81) * 0.2
    torch.manual_seed(1)
    styled = ccdistill.night_style(day, night, method)
    assert (
        styled.shape == day.shape and styled.dtype == torch.float32 and 0 <= styled.min() <= styled.max() <= 1
    )
    assert (styled.mean((2, 3)) - night.mean((2, 3))).abs().max() < 0.05
    both = torch.stack([day.flatten(), styled.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.6  # the day's structure is still there, in place
    same = ccdistill.night_style(day, day, method)
    torch.testing.assert_close(same, day, atol=1e-4 if method in ("fda", "color") else 0.5 / 255, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(ccdistill.night_style(day, night, method), styled)
    with pytest.raises(ValueError, match="night style must be"):
        ccdistill.night_style(day, night, "gan")
    with pytest.raises(ValueError, match=r"night \(3, 3, 8, 8\)"):
        ccdistill.night_style(day, torch.rand(3, 3, 8, 8), method)


def test_histogram_gives_the_nights_values_in_the_days_order():
    day, night = (torch.randint(256, (2, 3, 30, 40)) / 255 for _ in range(2))
    night = night**2
    styled = ccdistill.night_style(day, night, "histogram")
    for channel in range(3):
        d, s, n = (images[1, channel].flatten() for images in (day, styled, night))
        assert (s.sort().values - n.sort().values).abs().max() < 0.05
        assert (s[d.argsort(stable=True)].diff() >= 0).all()
    one = ccdistill.night_style(day, night[:1], "histogram", 0.5)
    torch.testing.assert_close(one[0], (day[0] + styled[0]) / 2)


def test_random_draws_one_of_two_styles_for_each_image():
    day, night = torch.rand(40, 3, 8, 9), torch.rand(40, 3, 8, 9) ** 3
    styled = ccdistill.night_style(day, night, "random")
    kinds = [
        (styled == ccdistill.night_style(day, night, kind)).flatten(1).all(1)
        for kind in ("color", "histogram")
    ]
    assert (kinds[0] ^ kinds[1]).all() and 5 < kinds[0].sum() < 35


def test_fda_exchanges_low_amplitudes_and_keeps_the_phase():
    day, night = (
        torch.rand(1, 3, 40, 60) * 0.3 + 0.35,
        torch.rand(1, 3, 40, 60) * 0.3 + 0.3,
    )  # nothing is clipped
    styled = ccdistill.night_style(day, night, "fda", 0.1)  # beta 0.1: frequencies up to 4
    d, n, s = (torch.fft.fft2(x) for x in (day, night, styled))
    for y, x in itertools.product(range(-20, 20), range(-30, 30)):
        source = n if abs(y) <= 4 and abs(x) <= 4 else d
        torch.testing.assert_close(s[..., y, x].abs(), source[..., y, x].abs(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(s[..., 3, 2].angle(), d[..., 3, 2].angle(), rtol=1e-3, atol=1e-3)


def toy_batch(size=(48, 64), batch=2):
    images = {name: torch.rand(batch, 3, *size) for name in ("source_day", "target_day", "target_night")}
    return images | {"source_label": torch.randint(0, 19, (batch, *size))}


@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_night_weights_share_what_they_say(night_weights):
    method = ccdistill.CCDistill(models.DeepLab(), night_weights)
    day, night = dict(method.day.named_parameters()), dict(method.night.named_parameters())
    norms = [n for n, m in method.day.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert method.night is method.day or night_weights != "shared"
    for name, parameter in day.items():
        is_norm = name.rpartition(".")[0] in norms
        apart = night_weights == "separate" or (night_weights == "norm" and is_norm)
        assert (parameter is night[name]) != apart, name
    if night_weights != "shared":
        assert method.night.backbone.bn1.running_mean is not method.day.backbone.bn1.running_mean
    losses = method(toy_batch())
    losses["total"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_two_days_and_two_nights_share_a_batch():
    method, seen = ccdistill.CCDistill(models.DeepLab(), "separate", "joint"), []
    for net, domain in ((method.day, "day"), (method.night, "night")):
        net.register_forward_pre_hook(lambda _, inputs, domain=domain: seen.append((domain, inputs[0])))
    batch = toy_batch() | {"source_night": torch.rand(2, 3, 48, 64)}
    method(batch)
    assert [domain for domain, _ in seen] == ["day", "night"]
    assert torch.equal(seen[0][1], torch.cat([batch["source_day"], batch["target_day"]]))
    assert torch.equal(seen[1][1], torch.cat([batch["source_night"], batch["target_night"]]))


@pytest.mark.parametrize("batch_norm", ccdistill.BATCH_NORMS)
@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_one_pass_computes_what_several_do(night_weights, batch_norm):
    method, batch = ccdistill.CCDistill(models.DeepLab(), night_weights, batch_norm).double(), toy_batch()
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    slow = copy.deepcopy(method)
    sd, td, tn = (batch[name].double() for name in ("source_day", "target_day", "target_night"))
    found = method.networks([sd, td], [sd.flip(3), tn])
    sum(logits.square().sum() for _, logits in found).backward()
    days, nights = ([sd], [td]), ([sd.flip(3)], [tn])
    if batch_norm == "joint":
        days, nights = ([sd, td],), ([sd.flip(3), tn],)
    expected = []
    for network, groups in ((slow.day, days), (slow.night, nights)):
        for number, group in enumerate(groups):
            kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
            features, logits = network(torch.cat(group))
            if number:  # a target's statistics are used, not kept
                network.load_state_dict(kept, strict=False, assign=True)
            expected += zip(features.split(2), logits.split(2), strict=True)
    sum(logits.square().sum() for _, logits in expected).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    buffers = zip(method.buffers(), slow.buffers(), strict=True)
    assert all(torch.allclose(a, b) for a, b in buffers)
    for (name, a), (_, b) in zip(method.named_parameters(), slow.named_parameters(), strict=True):
        if not name.startswith("projection"):
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_warm_up_leaves_the_targets_out():
    method, seen = ccdistill.CCDistill(models.DeepLab(), "separate"), []
    method.stage = "source"
    for net in (method.day, method.night):
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = toy_batch() | {"source_night": torch.rand(2, 3, 48, 64)}
    values = method(batch)
    assert torch.equal(seen[0], batch["source_day"]) and torch.equal(seen[1], batch["source_night"])
    assert values["pseudo"] == values["content"] == values["style"] == 0
    torch.testing.assert_close(values["total"], values["seg_day"] + values["seg_night"])
    method.stage, seen[:] = "day", []
    assert set(method(batch)) == {"seg_day", "total"}
    assert len(seen) == 1 and torch.equal(seen[0], batch["source_day"])


def test_total_is_the_weighted_sum_and_a_zero_weight_does_no_work(monkeypatch):
    options = {"content_weight": 2.0, "style_weight": 3.0, "pseudo_weight": 0.5}
    method = ccdistill.CCDistill(models.DeepLab(), pseudo_threshold=0.0, **options)
    values = method(toy_batch())
    assert set(values) == {"seg_day", "seg_night", "pseudo", "content", "style", "total"}
    expected = values["seg_day"] + values["seg_night"] + 0.5 * values["pseudo"]
    torch.testing.assert_close(values["total"], expected + 2 * values["content"] + 3 * values["style"])
    assert values["pseudo"] > 0 and values["style"] > 0 and values["content"] != 0

    def forbidden(*_):
        raise AssertionError("computed for nothing")

    for name in ("content_distill", "style_distill", "pseudo_labels"):
        monkeypatch.setattr(ccdistill, name, forbidden)
    method.content_weight = method.style_weight = method.pseudo_weight = 0
    assert method(toy_batch())["content"] == 0
    monkeypatch.setattr(losses, "js_divergence", forbidden)
    losses.content_distill(*[rand(2, 3)] * 4, js_weight=0)


def test_content_teaches_the_projection_head_and_the_network():
    method = ccdistill.CCDistill(models.DeepLab())
    method(toy_batch())["content"].backward()
    assert method.projection.layers[0].weight.grad.abs().max() > 0
    assert method.day.backbone.conv1.weight.grad.abs().max() > 0
    bare = ccdistill.CCDistill(models.DeepLab(), projection=False)
    features = torch.rand(2, 256, 3, 4)
    torch.testing.assert_close(bare.embed(features), features.mean((2, 3)))
    assert not any("projection" in name for name in bare.state_dict())


def test_pseudo_labels_use_the_day_only_where_targets_are_paired(monkeypatch):
    seen = []
    real = losses.pseudo_labels
    monkeypatch.setattr(
        ccdistill, "pseudo_labels", lambda n, d=None, **k: seen.append(d is not None) or real(n, d, **k)
    )
    for paired in (True, False):
        ccdistill.CCDistill(models.DeepLab(), target_paired=paired)(toy_batch())
    assert seen == [False, True, False, False]


# ---- files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    datasets.make_demo_city(root, train=6, val=3)
    return root


@pytest.fixture
def tree(city, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(city, tmp_path / "city")
    return tmp_path / "city"


def first(folder, pattern):
    return min(Path(folder).rglob(pattern))


def test_the_label_table():
    table = dict(enumerate(datasets.TABLES["labelIds"]))
    official = {
        7: 0,
        8: 1,
        11: 2,
        12: 3,
        13: 4,
        17: 5,
        19: 6,
        20: 7,
        21: 8,
        22: 9,
        23: 10,
        24: 11,
        25: 12,
        26: 13,
    }
    official |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for value in range(256):
        expected = official.get(value, 255 if value < 34 or value == 255 else None)
        assert table[value] == expected, value
    assert datasets.colourise(torch.tensor([[0, 18, 255]]))[:, 0].tolist() == [
        [128, 119, 0],
        [64, 11, 0],
        [128, 32, 0],
    ]


def test_label_ids_are_read_directly(tmp_path):
    path = tmp_path / "x_gtFine_labelIds.png"
    Image.frombytes("L", (5, 1), bytes([7, 33, 0, 255, 24])).save(path)
    assert list(datasets.open_label(path).tobytes()) == [0, 18, 255, 255, 11]
    Image.frombytes("L", (2, 1), bytes([7, 34])).save(path)
    with pytest.raises(datasets.DataError, match=r"x_gtFine_labelIds.png: value 34"):
        datasets.open_label(path)
    path = tmp_path / "x_gt_labelTrainIds.png"
    Image.frombytes("L", (3, 1), bytes([0, 18, 255])).save(path)
    assert list(datasets.open_label(path).tobytes()) == [0, 18, 255]
    Image.frombytes("L", (2, 1), bytes([19, 0])).save(path)
    with pytest.raises(datasets.DataError, match="value 19 is no labelTrainIds"):
        datasets.open_label(path)


def test_readers_follow_symbolic_links(city, tmp_path):
    (tmp_path / "links" / "leftImg8bit").mkdir(parents=True)
    (tmp_path / "links" / "gtFine").symlink_to(city / "cityscapes" / "gtFine")
    (tmp_path / "links" / "leftImg8bit" / "train").mkdir()
    (tmp_path / "links" / "leftImg8bit" / "train" / "demo").symlink_to(
        city / "cityscapes/leftImg8bit/train/demo"
    )
    (tmp_path / "night").symlink_to(city / "darkzurich")
    assert len(datasets.samples("cityscapes", tmp_path / "links", "train")) == 6
    assert len(datasets.samples("darkzurich", tmp_path / "night")) == 3
    days, nights = datasets.targets("darkzurich", tmp_path / "night")
    assert len(days) == len(nights) == 6
    assert [p.name.split("_")[-3] for p in days] == [p.name.split("_")[-3] for p in nights]


def test_pair_lists(tree):
    table = tree / "mine.csv"
    lines = [
        "train/night/DEMO_night/DEMO_night_frame_000002,train/day/DEMO_day/DEMO_day_frame_000004",
        "",
        "  ",
    ]
    table.write_bytes(("\ufeff" + " \r\n".join(lines)).encode())  # BOM, CRLF, spaces, empty lines
    days, nights = datasets.targets("darkzurich", tree / "darkzurich", table)
    assert [p.name for p in days + nights] == [
        f"DEMO_{x}_rgb_anon.png" for x in ("day_frame_000004", "night_frame_000002")
    ]
    days, nights = datasets.targets("darkzurich", tree / "darkzurich", "none")
    assert len(days) == len(nights) == 6
    for text, message in (
        ("a,b,c", "line 1 is not NIGHT,DAY"),
        ("\n/etc/passwd,train/day/x", "line 2 leads out of"),
        ("train/night/../../../x,train/day/x", "line 1 leads out of"),
        ("train/night/x,train/day/x", "train/night/x_rgb_anon.png: no such file"),
        ("", "no pair in it"),
    ):
        table.write_text(text)
        with pytest.raises(datasets.DataError, match=message):
            datasets.targets("darkzurich", tree / "darkzurich", table)


def test_a_crop_cuts_image_and_label_alike(tmp_path):
    gradient = Image.frombytes("L", (200, 100), bytes(x for _ in range(100) for x in range(200)))
    rng, flips, widths = random.Random(0), set(), set()
    for _ in range(40):
        cut = datasets.random_crop((100, 200), (40, 60), (0.5, 1.0), rng)
        image, label = cut(gradient.convert("RGB")), cut(gradient, TF.InterpolationMode.NEAREST_EXACT)
        assert image.shape == (3, 40, 60) and label.shape == (1, 40, 60) and image.dtype == torch.uint8
        assert (image[0, :, 3:-3].int() - label[0, :, 3:-3].int()).abs().max() <= 2
        row = label[0, 0].int()
        flips.add(bool(row[0] > row[-1]))
        widths.add(int((row[0] - row[-1]).abs()))
    assert flips == {False, True} and min(widths) < 65 and max(widths) > 110
    assert datasets.random_crop((100, 200), (40, 60), (99, 99), rng)(gradient).shape == (1, 40, 60)


def stream_of(city, **options):
    source = datasets.samples("cityscapes", city / "cityscapes", "train")
    days, nights = datasets.targets(
        "darkzurich", city / "darkzurich", "corresp" if options.get("paired", True) else "none"
    )
    return datasets.FourDomains(source, days, nights, (64, 96), length=12, **options)


def test_pairs_are_cut_alike_and_unpaired_targets_are_not(city, monkeypatch):
    cuts = []
    real = datasets.random_crop
    monkeypatch.setattr(datasets, "random_crop", lambda *a: cuts.append(a[0]) or real(*a))
    item = stream_of(city)[0]
    assert len(cuts) == 2  # source; the pair
    assert set(item) == {"source_day", "source_label", "target_day", "target_night", "broken"}
    stream_of(city, paired=False)[0]
    assert len(cuts) == 5  # source; night; day


def test_an_item_depends_on_the_seed_and_its_number_alone(city):
    one, two, other = (stream_of(city), stream_of(city), stream_of(city, seed=1))
    forward, backward = [one[k] for k in range(12)], [two[k] for k in reversed(range(12))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert_same(a, b)
    assert any(not torch.equal(a["source_day"], other[k]["source_day"]) for k, a in enumerate(forward))
    assert sorted(datasets._order(6, "any")) == list(range(6))  # every pass takes all


def test_a_folder_of_synthetic_nights_replaces_the_style(tree):
    shutil.copytree(tree / "cityscapes/leftImg8bit", tree / "gan/leftImg8bit")
    source = datasets.samples("cityscapes", tree / "cityscapes", "train")
    for root in (tree / "gan", tree / "gan/leftImg8bit"):
        nights = datasets.synthetic_nights(root, source)
        stream = datasets.FourDomains(source, [], [], (64, 96), synthetic=nights, length=1)
        assert torch.equal(stream[0]["source_night"], stream[0]["source_day"])
    nights[0].unlink()
    with pytest.raises(datasets.DataError, match="no such file"):
        datasets.synthetic_nights(tree / "gan", source)


def test_the_demo_city_is_the_same_every_time_and_hard(city, tmp_path):
    datasets.make_demo_city(tmp_path, train=1, val=1)
    for path in (p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")):
        assert (tmp_path / path).read_bytes() == (city / path).read_bytes()
    pair = [first(city, f"DEMO_{t}_frame_000000_rgb_anon.png") for t in ("day", "night")]
    day, night = (
        sum(Image.open(p).convert("L").histogram()[i] * i for i in range(256)) / (256 * 128) for p in pair
    )
    assert night < day / 2
    classes = set()
    for _, label, _ in datasets.samples("cityscapes", city / "cityscapes", "train"):
        classes |= {v for v, n in enumerate(datasets.open_label(label).histogram()) if n}
    assert len(classes - {255}) >= 9


# ---- scores ------------------------------------------------------------------------------------------------


def test_scores_are_counted_pixel_by_pixel():
    label, prediction = torch.randint(0, 6, (20, 30)), torch.randint(2, 8, (20, 30))
    label[0] = 255
    counted = [[0] * 19 for _ in range(19)]
    for a, b in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if a != 255:
            counted[a][b] += 1
    result = evaluate.scores(evaluate.count(label.byte(), prediction, 19))
    assert result["confusion_matrix"] == counted
    iou = {}
    for c, name in enumerate(datasets.NAMES):
        union = sum(counted[c]) + sum(row[c] for row in counted) - counted[c][c]
        iou[name] = 100 * counted[c][c] / union if union else None
    assert result["iou"] == pytest.approx(iou) and iou["bus"] is None
    defined = [v for v in iou.values() if v is not None]
    assert result["miou"] == pytest.approx(sum(defined) / len(defined))
    assert result["miou_present"] == pytest.approx(sum(list(iou.values())[:6]) / 6)
    hits = sum(counted[c][c] for c in range(19))
    assert result["pixel_accuracy"] == pytest.approx(100 * hits / sum(map(sum, counted)))
    assert "bus              n/a" in evaluate.table(result) and "road             0.0" in evaluate.table(
        result
    )
    assert evaluate.scores(torch.zeros(19, 19, dtype=torch.int64))["miou"] is None


# ---- the commands ------------------------------------------------------------------------------------------

TINY = ["--crop", "64", "96", "--batch-size", "2", "--workers", "0", "--device", "cpu"]


def arguments(city, out, *more):
    data = ["--cityscapes", str(city / "cityscapes"), "--darkzurich", str(city / "darkzurich")]
    return [*data, "--out", str(out), *TINY, *map(str, more)]


def log_of(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def state_of(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_train_save_evaluate(city, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        train.main(arguments(city, out, "--steps", 30, "--lr", 1e-3, "--eval-every", 15, "--warmup", 0)) == 0
    )
    assert {p.name for p in out.iterdir()} == {"args.json", "best.pt", "last.pt", "log.csv", "samples.png"}
    rows = log_of(out)
    assert len(rows) == 30 and rows[14]["miou"] and not rows[13]["miou"]
    assert sum(float(r["total"]) for r in rows[-5:]) < 0.8 * sum(float(r["total"]) for r in rows[:5])
    assert json.loads((out / "args.json").read_text())["batch_size"] == 2
    printed = capsys.readouterr().out
    assert "step 20/30" in printed and "left" in printed and "content" in printed
    assert Image.open(out / "samples.png").size == (3 * 258 + 2, 3 * 130 + 2)

    best, last = state_of(out / "best.pt"), state_of(out / "last.pt")
    assert not [k for k in best["model"] if "projection" in k] and [
        k for k in last["model"] if "projection" in k
    ]
    assert "optimizer" in last and "optimizer" not in best

    scores = {}
    for name, *more in (("last", "--model", "day"), ("best",), ("last", "--model", "night")):
        command = ["--checkpoint", str(out / f"{name}.pt"), "--darkzurich", str(city / "darkzurich"), *more]
        command += ["--json", str(tmp_path / "s.json"), "--out", str(tmp_path / "p"), "--device", "cpu"]
        assert evaluate.main(command) == 0
        scores[name] = json.loads((tmp_path / "s.json").read_text())
    assert scores["last"]["miou"] == pytest.approx(float(rows[-1]["miou"]))
    assert scores["last"]["images"] == 3 and scores["last"]["args"]["model"] == "night"
    assert scores["best"]["miou_present"] == pytest.approx(max(float(r["miou_present"] or 0) for r in rows))
    assert scores["last"]["iou"]["train"] is None or scores["last"]["iou"]["train"] == 0
    stem = "DEMO_val_frame_000000_rgb_anon"
    prediction = Image.open(tmp_path / "p/labelTrainIds" / f"{stem}.png")
    colour = Image.open(tmp_path / "p/color" / f"{stem}.png")
    assert prediction.mode == "L" and prediction.size == (256, 128) and colour.mode == "RGB"
    value = prediction.getpixel((10, 100))
    assert colour.getpixel((10, 100)) == datasets.CLASSES[value][2]
    assert (
        evaluate.main(["--checkpoint", str(out / "last.pt"), "--cityscapes", str(city / "cityscapes")]) == 0
    )
    assert "  n/a" in capsys.readouterr().out


SWITCHES = {
    "content": ["--content-weight", 0],
    "style": ["--style-weight", 0],
    "pseudo": ["--pseudo-weight", 0],
    "seg_night": ["--day-only"],
}


@pytest.mark.parametrize("term", SWITCHES)
def test_ablation_switches(city, tmp_path, term):
    assert (
        train.main(
            arguments(
                city, tmp_path / "run", "--steps", 1, "--pseudo-threshold", 0, "--warmup", 0, *SWITCHES[term]
            )
        )
        == 0
    )
    (row,) = log_of(tmp_path / "run")
    off = [name for name in train.TERMS if not row[name] or float(row[name]) == 0]
    assert off == (["seg_night", "pseudo", "content", "style"] if term == "seg_night" else [term])
    keys = state_of(tmp_path / "run/last.pt")["model"].keys()
    assert any("projection" in k for k in keys) == (term not in ("content", "seg_night"))


def test_the_other_switches_change_what_they_say(city, tmp_path):
    first_rows = {}
    for name, *switch in (
        ("base",), ("js", "--js-weight", 0), ("projection", "--no-projection"),
        ("style", "--night-style", "fda"),
        ("pairs", "--pairs", "none"), ("shared", "--night-weights", "shared"), ("bf16", "--amp", "bf16"),
        ("joint", "--batch-norm", "joint"), ("sgd", "--optimizer", "sgd"), ("warmup", "--warmup", 0.5),
    ):  # fmt: skip
        assert train.main(arguments(city, tmp_path / name, "--steps", 2, "--warmup", 0, *switch)) == 0
        first_rows[name] = log_of(tmp_path / name)
    base = first_rows.pop("base")
    for name, rows in first_rows.items():
        different = [t for t in train.TERMS if rows[1][t] != base[1][t]]
        assert different, name
    assert [t for t in train.TERMS if first_rows["js"][0][t] != base[0][t]] == ["content", "total"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--night-weights", "separate"],
        ["--night-weights", "shared", "--power", "0"],
        ["--optimizer", "sgd", "--workers", "2"],
    ],
)
def test_resume_is_exact(city, tmp_path, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(arguments(city, whole, "--steps", 5, *more, "--eval-every", 2)) == 0
    # Stopped by hand after three steps of five, with a row too many in the log, as after a crash.
    real = train.save
    try:
        train.save = lambda state, path: (
            real(state, path) or (state["step"] == 3 and os.kill(os.getpid(), signal.SIGINT))
        )
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(city, cut, "--steps", 5, *more, "--eval-every", 2, "--save-every", 3))
    finally:
        train.save = real
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.value.code == 130
    assert (
        train.main(arguments(city, cut, "--steps", 5, *more, "--eval-every", 2, "--resume", cut / "last.pt"))
        == 0
    )
    a, b = state_of(whole / "last.pt"), state_of(cut / "last.pt")
    for state in (a, b):
        for key in ("out", "resume", "save_every"):
            state["args"].pop(key)
    assert_same(a, b)
    assert log_of(whole) == log_of(cut)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(city, tmp_path):
    command = [
        sys.executable,
        "-u",
        HERE / "train.py",
        *arguments(city, tmp_path / "run", "--steps", 10000, "--log-every", 1),
    ]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step 2/"):
            run.send_signal(signal.SIGINT)
            break
    printed, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "--resume goes on" in printed and "Traceback" not in errors
    state = state_of(tmp_path / "run/last.pt")
    assert state["step"] == len(log_of(tmp_path / "run")) >= 2


def test_a_run_is_protected(city, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(city, out, "--steps", 1)) == 0
    for more, message in (
        (["--steps", 2], "exists; go on with --resume"),
        (
            ["--steps", 2, "--resume", "--lr", 1, "--backbone", "resnet34"],
            "--backbone resnet18 there, resnet34 here",
        ),
        (["--steps", 2, "--resume", out / "best.pt"], "resume from a last.pt"),
        (["--steps", 2, "--resume", out / "log.csv"], "log.csv: not a file of tensors"),
    ):
        assert train.main(arguments(city, out, *more)) == 2
        assert message in capsys.readouterr().err
    assert train.main(arguments(city, out, "--steps", 2, "--resume")) == 0
    assert [row["step"] for row in log_of(out)] == ["1", "2"]


def test_a_loss_that_is_not_finite_stops_and_is_named(city, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ccdistill, "style_distill", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    assert train.main(arguments(city, tmp_path / "run", "--steps", 2)) == 2  # after one step of warm-up
    assert "step 2: style is nan; batch and weights are in" in capsys.readouterr().err
    kept = torch.load(tmp_path / "run/nonfinite.pt", weights_only=True)
    assert (
        kept["step"] == 2
        and math.isnan(kept["losses"]["style"])
        and kept["batch"]["target_night"].shape[0] == 2
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--steps", "0"], "--steps must be positive"),
        (["--batch-size", "-1"], "--batch-size must be positive"),
        (["--crop", "16", "64"], "--crop must be at least 32 x 32"),
        (["--scale", "1", "0.5"], "--scale wants"),
        (["--content-weight", "-1"], "--content-weight must not be negative"),
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--lr", "inf"], "--lr must be a finite number"),
        (["--night-strength", "-1"], "--night-strength wants 0 to 1"),
        (["--night-strength", "7"], "--night-strength wants 0 to 1"),
        (["--seed", "9" * 20], "--seed wants 63 bits"),
        (["--device", "meta"], "--device meta"),
        (["--day-only", "--synthetic-night", "x"], "leave --synthetic-night out"),
        (["--demo"], "--demo draws its own data"),
        (["--backbone", "vgg"], "invalid choice"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--low-memory", "--compile"], "leave one out"),
        (["--json", "x.json"], "for --benchmark"),
        (["--benchmark", "0"], "--benchmark must be positive"),
        (["--benchmark", "--day-only"], "leave --day-only out"),
    ],
)
def test_nonsense_is_refused_in_one_line(city, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as refused:
        train.main(arguments(city, tmp_path / "run", *more))
    errors = capsys.readouterr().err
    assert refused.value.code == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_missing_datasets_are_refused(city, capsys):
    for command, message in (
        ([], "--cityscapes DIR is needed"),
        (["--cityscapes", "x"], "--darkzurich DIR or --acdc DIR is needed"),
    ):
        with pytest.raises(SystemExit):
            train.main(command)
        assert message in capsys.readouterr().err


def damage(path, how):
    path = Path(path)
    data = path.read_bytes()
    size = Image.open(path).size
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    elif how == "small":
        Image.open(path).resize((size[0] - 1, size[1])).save(path)
    elif how == "16-bit":
        Image.new("I;16", size).save(path)
    elif how == "colour":
        Image.new("RGB", size).save(path)
    elif how == "value":
        Image.new("L", size, 77).save(path)


IMAGE, LABEL = "demo_000000_000000_leftImg8bit.png", "demo_000000_000000_gtFine_labelIds.png"
NIGHT, DAY = "DEMO_night_frame_000000_rgb_anon.png", "DEMO_day_frame_000000_rgb_anon.png"
VAL_LABEL = "DEMO_val_frame_000000_gt_labelTrainIds.png"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "name, how, message",
    [
        (IMAGE, "truncate", "not a readable image"),
        (IMAGE, "empty", "not a readable image"),
        (IMAGE, "16-bit", "expected an 8-bit RGB image"),
        (LABEL, "delete", "no such label"),
        (LABEL, "small", "255 x 128, but"),
        (LABEL, "colour", "expected an 8-bit single-channel label"),
        (LABEL, "value", "value 77 is no labelIds value"),
        (NIGHT, "delete", "no such file"),
        (NIGHT, "text", "not a readable image"),
        (DAY, "small", "255 x 128, but"),
        (VAL_LABEL, "delete", "no such label"),
        (VAL_LABEL, "value", "value 77 is no labelTrainIds value"),
    ],
)
def test_bad_files_are_named_in_one_line(tree, tmp_path, capsys, name, how, message, workers):
    damage(first(tree, name), how)
    assert train.main(arguments(tree, tmp_path / "run", "--steps", 3, "--workers", workers)) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and errors.startswith("train.py: error: ")
    assert name.replace("labelIds", "label").split("_label")[0] in errors


def test_missing_folders_are_named(tree, tmp_path, capsys):
    shutil.rmtree(tree / "darkzurich/corresp")
    assert train.main(arguments(tree, tmp_path / "run", "--steps", 1)) == 2
    assert "--pairs none" in capsys.readouterr().err
    shutil.rmtree(tree / "darkzurich/gt")  # no labelled nights: training works, without scores
    assert train.main(arguments(tree, tmp_path / "run", "--steps", 1, "--pairs", "none")) == 0
    assert "validation: none" in capsys.readouterr().out and not (tmp_path / "run/best.pt").exists()
    baseline = arguments(
        tree, tmp_path / "other", "--steps", 1, "--day-only", "--darkzurich", tmp_path / "typo"
    )
    assert train.main(baseline) == 2
    assert "typo: no such folder" in capsys.readouterr().err
    shutil.rmtree(tree / "cityscapes/gtFine")
    assert train.main(arguments(tree, tmp_path / "other", "--steps", 1)) == 2
    assert train.main(arguments(tree / "nowhere", tmp_path / "other", "--steps", 1)) == 2
    assert "leftImg8bit/train: no such folder" in capsys.readouterr().err
    assert (
        evaluate.main(["--checkpoint", str(tmp_path / "none.pt"), "--darkzurich", str(tree / "darkzurich")])
        == 2
    )


def test_the_crop_must_fit(city, tmp_path, capsys):
    assert train.main(arguments(city, tmp_path / "run", "--crop", 129, 96)) == 2
    assert (
        "256 x 128 (width x height) is smaller than --crop 129 96; give a smaller one"
        in capsys.readouterr().err
    )


def test_a_payload_in_a_checkpoint_does_not_run(tmp_path, capsys, city):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"model": Payload(), "architecture": {}}, tmp_path / "evil.pt")
    command = ["--checkpoint", str(tmp_path / "evil.pt"), "--darkzurich", str(city / "darkzurich")]
    assert evaluate.main(command) == 2
    assert "not a file of tensors" in capsys.readouterr().err
    assert train.main(arguments(city, tmp_path / "run", "--weights", tmp_path / "evil.pt")) == 2
    assert not marker.exists()


def test_the_demo_compares_day_only_with_the_method(tmp_path, capsys, monkeypatch):
    real = datasets.make_demo_city
    monkeypatch.setattr(datasets, "make_demo_city", lambda root: real(root, train=4, val=2))
    command = ["--demo", "--steps", "2", "--out", str(tmp_path / "demo"), "--workers", "0", "--device", "cpu"]
    assert train.main(command) == 0
    printed = capsys.readouterr().out
    assert "day-only  ccdistill" in printed and "miou_present" in printed
    assert Image.open(tmp_path / "demo/comparison.png").width == 4 * 258 + 2
    assert train.main(command) == 0  # again: nothing is trained twice
    assert "step 2/2" not in capsys.readouterr().out


# ---- broken files, killed runs, long runs ------------------------------------------------------------------

FULL = bool(os.environ.get("CCDISTILL_FULL"))  # the long counts: 25 kills, 2,000 steps


@pytest.fixture(scope="session")
def small_city(tmp_path_factory):
    """One file of each kind, so that whatever is damaged is met."""
    root = tmp_path_factory.mktemp("small")
    datasets.make_demo_city(root, train=1, val=1)
    return root


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def redraw(change, **options):
    """Decode, change the picture, write it back (as PNG if nothing else is said)."""

    def apply(path):
        with Image.open(path) as image:
            image.load()
        change(image).save(path, **{"format": "PNG"} | options)

    return apply


def replaced(make):
    def apply(path):
        path.unlink()
        make(path)

    return apply


def png_of_size(width, height):
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def flip_byte(where):
    def change(data):
        at = int(len(data) * where)
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return rewrite(change)


EVERY_FILE = {
    "cut in half": rewrite(lambda data: data[: len(data) // 2]),
    "cut by 40 bytes": rewrite(lambda data: data[:-40]),
    "empty": rewrite(lambda data: b""),
    "zero bytes": rewrite(lambda data: bytes(len(data))),
    "text": rewrite(lambda data: b"<html>404</html>"),
    "a flipped byte in the header": flip_byte(0.001),
    "a flipped byte in the pixels": flip_byte(0.5),
    "16 bits": redraw(lambda image: Image.new("I;16", image.size)),
    "CMYK": redraw(lambda image: image.convert("CMYK"), format="JPEG"),
    "a pixel narrower": redraw(lambda image: image.resize((image.width - 1, image.height))),
    "a bomb": rewrite(lambda data: png_of_size(60000, 60000)),
    "a large bomb": rewrite(lambda data: png_of_size(12000, 12000)),
    "missing": Path.unlink,
    "a folder": replaced(Path.mkdir),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
}
IMAGES_ONLY = {
    "palette": redraw(lambda image: image.quantize(64)),
    "alpha": redraw(lambda image: image.convert("RGBA")),
    "grey": redraw(lambda image: image.convert("L")),
    "one bit": redraw(lambda image: image.convert("1")),
    "a JPEG": redraw(lambda image: image, format="JPEG"),
}
LABELS_ONLY = {
    "palette": redraw(lambda image: image.convert("P")),
    "alpha": redraw(lambda image: image.convert("LA")),
    "colour": redraw(lambda image: image.convert("RGB")),
    "one bit": redraw(lambda image: image.convert("1")),
    "a value of 99": redraw(lambda image: Image.new("L", image.size, 99)),
}
PAIR = "train/night/DEMO_night/DEMO_night_frame_000000", "train/day/DEMO_day/DEMO_day_frame_000000"
CSVS = {
    "empty": b"",
    "blank": b"\n \n\r\n",
    "binary": bytes(range(128, 256)),
    "one column": PAIR[0].encode(),
    "three columns": ",".join((*PAIR, "x")).encode(),
    "semicolons": ";".join(PAIR).encode(),
    "absolute": f"/etc/passwd,{PAIR[1]}".encode(),
    "dots": f"{PAIR[0]},train/../../../x".encode(),
    "no such frame": f"{PAIR[0]},train/day/x".encode(),
    "a NUL": f"{PAIR[0]}\0,{PAIR[1]}".encode(),
    "BOM": b"\xef\xbb\xbf" + ",".join(PAIR).encode(),
    "CRLF": (",".join(PAIR) + "\r\n").encode(),
    "spaces": f"  {PAIR[0]} , {PAIR[1]}  \n\n".encode(),
    "quotes": f'"{PAIR[0]}","{PAIR[1]}"'.encode(),
    "endings": f"{PAIR[0]}_rgb_anon.png,{PAIR[1]}_rgb_anon.png".encode(),
}
WORKS = {"palette", "grey", "a JPEG", "BOM", "CRLF", "spaces", "quotes", "endings"}  # as it should
IMAGE_FILES = {"S_d": IMAGE, "T_d": DAY, "T_n": NIGHT, "val": "DEMO_val_frame_000000_rgb_anon.png"}
LABEL_FILES = {"label": LABEL, "val label": VAL_LABEL}
DAMAGES = [
    (f, how, file, act) for f, file in IMAGE_FILES.items() for how, act in (EVERY_FILE | IMAGES_ONLY).items()
]
DAMAGES += [
    (f, how, file, act) for f, file in LABEL_FILES.items() for how, act in (EVERY_FILE | LABELS_ONLY).items()
]
DAMAGES += [("csv", how, "*_ref_day.csv", rewrite(lambda _, data=data: data)) for how, data in CSVS.items()]
DAMAGES += [
    ("label", "the image itself", LABEL, lambda path: shutil.copy(first(path.parents[4], IMAGE), path))
]
DAMAGES += [("S_d", "its label", IMAGE, lambda path: shutil.copy(first(path.parents[4], LABEL), path))]
WORKS_HERE = {("S_d", "alpha"), ("T_d", "alpha"), ("T_n", "alpha"), ("val", "alpha"), ("S_d", "its label")}


@pytest.mark.parametrize("file, how, name, act", DAMAGES, ids=[f"{f}: {how}" for f, how, *_ in DAMAGES])
def test_every_damage_is_told_in_one_line_or_works(
    small_city, tmp_path, capfd, monkeypatch, file, how, name, act
):
    shutil.copytree(small_city, tmp_path / "city")
    act(first(tmp_path / "city", name))
    monkeypatch.setattr(train, "save", lambda *_: None)  # 200 MB a time
    tiny = ["--crop", "32", "32", "--steps", "1", "--batch-size", "1"]
    status = train.main([*arguments(tmp_path / "city", tmp_path / "run"), *tiny])
    errors = capfd.readouterr().err
    if how in WORKS or (file, how) in WORKS_HERE:
        assert status == 0, errors
    else:
        assert status == 2 and errors.count("\n") == 1 and errors.startswith("train.py: error: "), errors
        stem = name.strip("*").removesuffix("_leftImg8bit.png").removesuffix("_gtFine_labelIds.png")
        where = (stem.removesuffix("_gt_labelTrainIds.png"), "DEMO_val", "train/day", "no file", "line 1")
        assert any(part in errors for part in where), errors


def test_unreadable_permissions(tree, tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    first(tree, IMAGE).chmod(0)
    assert train.main(arguments(tree, tmp_path / "run", "--steps", 1)) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_odd_names_work(tree, tmp_path):
    for kind in ("leftImg8bit", "gtFine"):
        folder = tree / "cityscapes" / kind / "train"
        (folder / "demo").rename(folder / "Zürich, alt 1")
    (tree / "cityscapes/leftImg8bit/train/Zürich, alt 1/notes.txt").write_text("not data")
    assert len(datasets.samples("cityscapes", tree / "cityscapes", "train")) == 6


def test_a_loop_of_links_ends(tree):
    (tree / "darkzurich/corresp/train/night/again").symlink_to(tree / "darkzurich/corresp")
    (tree / "darkzurich/corresp/train/night/once more").symlink_to(tree / "darkzurich/corresp/train")
    assert len(datasets.targets("darkzurich", tree / "darkzurich")[0]) == 6


def test_skip_broken_leaves_files_out_and_counts_them(tree, tmp_path, capsys):
    damage(first(tree, IMAGE), "truncate")
    more = ["--steps", 8, "--eval-every", 100, "--save-every", 100]
    assert train.main(arguments(tree, tmp_path / "no", *more, "--skip-broken", 1)) == 2
    captured = capsys.readouterr()
    assert "demo_000000" in captured.err and "--skip-broken 2 would" in captured.err
    saved = state_of(tmp_path / "no/last.pt")  # what was reached is kept
    assert saved["step"] == len(log_of(tmp_path / "no")) > 0 and saved["skipped"] == 1
    # the same run goes on once it is allowed to, and ends where one that was allowed from the start does
    assert train.main(arguments(tree, tmp_path / "no", *more, "--skip-broken", 100, "--resume")) == 0
    assert train.main(arguments(tree, tmp_path / "yes", *more, "--skip-broken", 100)) == 0
    assert "left out (1 of 100): " in capsys.readouterr().out
    assert (
        log_of(tmp_path / "no") == log_of(tmp_path / "yes")
        and int(log_of(tmp_path / "no")[-1]["skipped"]) >= 2
    )
    assert_same(state_of(tmp_path / "no/last.pt")["model"], state_of(tmp_path / "yes/last.pt")["model"])


def command(city, out, *more):
    return [sys.executable, "-u", str(HERE / "train.py"), *arguments(city, out, *more)]


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_killed_at_any_moment_it_ends_with_the_same_bits(small_city, tmp_path):
    kills, steps = (25, 60) if FULL else (3, 8)
    more = ["--crop", 32, 32, "--batch-size", 1, "--steps", steps, "--save-every", 1, "--eval-every", 4]
    more += ["--night-weights", "norm", "--workers", 1, "--log-every", 1]
    subprocess.run(
        command(small_city, tmp_path / "whole", *more), check=True, env=ONE_THREAD, capture_output=True
    )
    rng, out, killed, saving = random.Random(0), tmp_path / "killed", 0, 0
    while True:
        goes_on = ["--resume"] if (out / "last.pt").exists() else []
        run = subprocess.Popen(
            command(small_city, out, *more, *goes_on), env=ONE_THREAD, stdout=subprocess.PIPE, text=True
        )
        if killed == kills:
            assert "step" in run.communicate()[0] and run.returncode == 0
            break
        for line in run.stdout:
            if line.startswith("step"):
                break  # the first step after the start is done and being saved
        time.sleep(rng.uniform(0, 1.5))
        saving += Path(f"{out / 'last.pt'}.tmp").exists()
        run.kill()
        run.communicate()
        killed += run.returncode == -signal.SIGKILL
        if (out / "last.pt").exists():
            state_of(out / "last.pt")  # whole, whenever it was killed
        if run.returncode == 0:  # it was faster than the kills: begin again
            shutil.rmtree(out)
    print(f"{killed} kills, {saving} of them while saving")
    whole, last = state_of(tmp_path / "whole/last.pt"), state_of(out / "last.pt")
    for state in (whole, last):
        state.pop("args")
    assert_same(whole, last)
    assert log_of(out) == log_of(tmp_path / "whole")


def test_sigterm_saves_and_exits_143(small_city, tmp_path):
    more = ["--crop", 32, 32, "--steps", 10000, "--log-every", 1]
    run = subprocess.Popen(
        command(small_city, tmp_path / "run", *more), env=ONE_THREAD, stdout=subprocess.PIPE, text=True
    )
    for line in run.stdout:
        if line.startswith("step 1/"):
            run.terminate()
            break
    assert "--resume goes on" in run.communicate()[0] and run.returncode == 143
    assert state_of(tmp_path / "run/last.pt")["step"] >= 1


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(small_city, tmp_path):
    more = ["--crop", 32, 32, "--batch-size", 1, "--eval-every", 100]
    out = tmp_path / "run"
    subprocess.run(
        command(small_city, out, *more, "--steps", 1), check=True, env=ONE_THREAD, capture_output=True
    )
    before = (out / "last.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))

    run = subprocess.run(
        command(small_city, out, *more, "--steps", 2, "--resume"),
        env=ONE_THREAD, capture_output=True, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert re.search(
        r"(last|best)\.pt: not saved \(File too large\); what it held before is still whole", run.stderr
    )
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.tmp").exists()


def test_files_from_strangers_are_one_line_each(small_city, tmp_path, capsys):
    good = tmp_path / "run/last.pt"
    data = ["--darkzurich", str(small_city / "darkzurich"), "--device", "cpu"]
    assert train.main(arguments(small_city, tmp_path / "run", "--steps", 1, "--crop", 32, 32)) == 0
    state = state_of(good)
    cases = {
        "truncated": lambda path: path.write_bytes(good.read_bytes()[:100000]),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("weights"),
        "old": lambda path: torch.save(state | {"format": 0}, path),
        "other architecture": lambda path: torch.save(
            state | {"architecture": {"backbone": "resnet50", "output_stride": 16}}, path
        ),
        "another class number": lambda path: torch.save(
            state | {"architecture": state["architecture"] | {"num_classes": 21}}, path
        ),
        "a path inside": lambda path: torch.save(
            state | {"architecture": state["architecture"] | {"weights": "/etc/passwd", "head": "x"}}, path
        ),
        "numbered keys": lambda path: torch.save({0: torch.ones(1)}, path),
        "no args": lambda path: torch.save(
            {k: v for k, v in state.items() if k not in ("args", "model")}, path
        ),
        "no architecture": lambda path: torch.save(state | {"architecture": {"backbone": "vgg"}}, path),
        "a list": lambda path: torch.save([1], path),
        "a folder": lambda path: path.mkdir(),
        "missing": lambda path: None,
    }
    for name, make in cases.items():
        path = tmp_path / f"{name}.pt"
        make(path)
        capsys.readouterr()
        assert evaluate.main(["--checkpoint", str(path), *data]) == 2, name
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and str(path) in errors, errors
        assert train.main(arguments(small_city, tmp_path / "other", "--steps", 1, "--resume", path)) == 2, (
            name
        )
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and (str(path) in errors), errors


def test_a_checkpoint_that_is_damaged_inside_is_told(small_city, tmp_path, capsys):
    command = arguments(small_city, tmp_path / "run", "--steps", 1, "--crop", 32, 32)
    assert train.main(command) == 0
    path = tmp_path / "run/last.pt"
    whole = state_of(path)
    for damaged in ({"model": {}}, {"architecture": {"nonsense": 1}}, {"architecture": "vgg"}):
        torch.save(whole | damaged, path)
        assert train.main([*command, "--resume"]) == 2
        errors = capsys.readouterr().err
        assert f"{path}: damaged checkpoint (" in errors and errors.count("\n") == 1


def test_resumed_elsewhere_a_run_has_its_own_best(small_city, tmp_path):
    command = ("--steps", 2, "--crop", 32, 32, "--save-every", 1)
    assert train.main(arguments(small_city, tmp_path / "run", *command)) == 0
    path = tmp_path / "run/last.pt"
    torch.save(state_of(path) | {"best": 99.0, "step": 1}, tmp_path / "other.pt")
    assert (
        train.main(arguments(small_city, tmp_path / "new", *command, "--resume", tmp_path / "other.pt")) == 0
    )
    assert (tmp_path / "new/best.pt").exists()


def test_too_little_memory_is_told(small_city, tmp_path, capsys):
    more = ("--steps", 1, "--crop", 32, 32, "--embedding-dim", 10**11)
    assert train.main(arguments(small_city, tmp_path / "run", *more)) == 2
    errors = capsys.readouterr().err
    assert "can't allocate memory" in errors and errors.count("\n") == 1


def resident(pid):
    """MB of a process and all its children, and its open files."""
    pids = [
        pid,
        *(int(p) for t in Path(f"/proc/{pid}/task").glob("*/children") for p in t.read_text().split()),
    ]
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_long_run_does_not_grow_and_leaves_no_worker(small_city, tmp_path):
    early, late = (200, 2000) if FULL else (60, 200)
    more = ["--crop", 32, 32, "--batch-size", 1, "--steps", 10000, "--log-every", 1, "--workers", 2]
    more += ["--save-every", 100000, "--eval-every", early // 2 + 7]  # no validation at either moment
    run = subprocess.Popen(
        command(small_city, tmp_path / "run", *more), env=ONE_THREAD, stdout=subprocess.PIPE, text=True
    )
    seen = {}
    for line in run.stdout:
        step = (
            int(line.split("/")[0].removeprefix("step ")) if line.startswith("step ") and "/" in line else 0
        )
        if step in (early, late):
            seen[step] = resident(run.pid)
        if step == late:
            break
    children = [
        int(p) for t in Path(f"/proc/{run.pid}/task").glob("*/children") for p in t.read_text().split()
    ]
    run.kill()  # the parent gets no chance to tidy up
    run.communicate()
    print(f"MB and open files at step {early}: {seen[early]}, at {late}: {seen[late]}")
    # Batches in flight hold a few files each, which come and go; a leak would show in every step.
    assert seen[late][0] < 1.05 * seen[early][0] and seen[late][1] <= seen[early][1] + 8
    assert children
    deadline = time.monotonic() + 60
    while any(
        Path(f"/proc/{p}").exists() and "Z" not in Path(f"/proc/{p}/stat").read_text().split()[2]
        for p in children
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.2)


def test_the_worker_count_does_not_change_a_bit(city, tmp_path):
    for workers in (0, 2):
        assert train.main(arguments(city, tmp_path / str(workers), "--steps", 3, "--workers", workers)) == 0
    assert log_of(tmp_path / "0") == log_of(tmp_path / "2")
    assert_same(*(state_of(tmp_path / w / "last.pt")["model"] for w in ("0", "2")))


# ---- public weights, every benchmark, the servers ----------------------------------------------------------


class V2Block(nn.Module):
    """The Bottleneck of the public DeepLab v2 files: stride in conv1."""

    def __init__(self, inside, width, stride, dilation, downsample):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        if downsample:
            conv = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class V2(nn.Module):
    """ResNet-101 DeepLab v2 as those files have it, written from the facts, for raw logits."""

    def __init__(self, multi_level, classes=19):
        super().__init__()
        self.multi_level, inside = multi_level, 64
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        layers = ((64, 3, 1, 1), (128, 4, 2, 1), (256, 23, 1, 2), (512, 3, 1, 4))
        for n, (width, depth, stride, dilation) in enumerate(layers, 1):
            blocks = [V2Block(inside, width, stride, dilation, True)]
            blocks += [V2Block(4 * width, width, 1, dilation, False) for _ in range(depth - 1)]
            inside = 4 * width
            setattr(self, f"layer{n}", nn.Sequential(*blocks))
        self.layer5 = self.head(1024 if multi_level else 2048, classes)
        if multi_level:
            self.layer6 = self.head(2048, classes)

    @staticmethod
    def head(channels, classes):
        module = nn.Module()
        convs = [nn.Conv2d(channels, classes, 3, padding=r, dilation=r) for r in (6, 12, 18, 24)]
        module.conv2d_list = nn.ModuleList(convs)
        return module

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        convs = list(self.layer6.conv2d_list)[:2] if self.multi_level else self.layer5.conv2d_list
        return sum(conv(x) for conv in convs)


def calm(network):
    """Random networks explode; small last norms keep a hundred layers within reason, and norms not
    trivial."""
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.3 if name.endswith("bn3") else 1)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return network.eval()


@pytest.mark.parametrize("multi_level", [True, False])
@pytest.mark.parametrize("input_format", ["imagenet", "caffe"])
def test_deeplab_v2_files_give_their_logits(tmp_path, multi_level, input_format):
    theirs, images = calm(V2(multi_level)), torch.rand(1, 3, 65, 90)
    path = str(tmp_path / "v2.pth")
    prefix = "module." if multi_level else "Scale."
    torch.save({prefix + k: v for k, v in theirs.state_dict().items()}, path)
    options = {"output_stride": 8, "head": "deeplabv2", "input_format": input_format}
    ours = models.DeepLab("resnet101", **options, weights=path).eval()
    if input_format == "imagenet":
        x = (images - torch.tensor(models.INPUT_FORMATS["imagenet"][1]).view(1, 3, 1, 1)) / ours.std
    else:
        mean = torch.tensor([104.00698793, 116.66876762, 122.67891434])
        x = images.flip(1) * 255 - mean.view(1, 3, 1, 1)
    with torch.no_grad():
        features, logits = ours(images, upsample=False)
        torch.testing.assert_close(logits, theirs(x), rtol=1e-4, atol=1e-4)
        assert features.shape[1] == 2048 and logits.std() > 0.01
        # a checkpoint of ours remembers all of it; the evaluation reads the public file as well
        again, description = evaluate.load_model(path, input_format=input_format)
        torch.testing.assert_close(again(images, upsample=False)[1], logits)
    assert ours.architecture["branches"] == (2 if multi_level else 4)
    assert description["architecture"] == ours.architecture
    rebuilt = models.DeepLab(**ours.architecture)
    rebuilt.load_state_dict(ours.state_dict())


def test_public_files_in_evaluation(tmp_path):
    path = tmp_path / "w.pth"
    build = torchvision.models.segmentation.deeplabv3_resnet50
    for aux in (True, False):
        torch.save(
            build(weights=None, weights_backbone=None, num_classes=19, aux_loss=aux).state_dict(), path
        )
        model, description = evaluate.load_model(path)
        assert (
            description["architecture"]["backbone"] == "resnet50" and model.architecture["output_stride"] == 8
        )
    torch.save(build(weights=None, weights_backbone=None, num_classes=21).state_dict(), path)
    with pytest.raises(ValueError, match="w.pth: predicts 21 classes"):
        evaluate.load_model(path)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(ValueError, match="w.pth: neither a DeepLab"):
        evaluate.load_model(path)
    with pytest.raises(ValueError, match="head deeplabv2 needs"):
        models.DeepLab("resnet18", head="deeplabv2", output_stride=8)


@pytest.fixture(scope="session")
def checkpoint(city, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train.main(arguments(city, out / "run", "--steps", 2)) == 0
    return out / "run/last.pt"


def picture_file(root, path, size=(64, 48), mode="RGB", value=0):
    path = Path(root, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def evaluated(checkpoint, tmp_path, *more):
    command = [
        "--checkpoint",
        checkpoint,
        "--json",
        tmp_path / "s.json",
        "--device",
        "cpu",
        "--workers",
        0,
        *more,
    ]
    status = evaluate.main([str(c) for c in command])
    return json.loads((tmp_path / "s.json").read_text()) if status == 0 else status


def test_acdc(checkpoint, tmp_path, capsys):
    root = tmp_path / "acdc"
    for n in (1, 2):
        picture_file(root, f"rgb_anon/night/train/GP010376/GP010376_frame_00000{n}_rgb_anon.png", (96, 64))
        picture_file(
            root, f"rgb_anon/night/train_ref/GP010376/GP010376_frame_00000{n}_rgb_ref_anon.png", (96, 64)
        )
        picture_file(root, f"rgb_anon/night/test/GP1/GP1_frame_00000{n}_rgb_anon.png")
    picture_file(root, "rgb_anon/night/val/GP2/GP2_frame_000003_rgb_anon.png")
    picture_file(root, "gt/night/val/GP2/GP2_frame_000003_gt_labelTrainIds.png", mode="L", value=3)
    picture_file(root, "gt/night/val/GP2/GP2_frame_000003_gt_labelIds.png", mode="L", value=7)
    days, nights = datasets.targets("acdc", root)
    assert [d.name for d in days] == [n.name.replace("rgb_anon", "rgb_ref_anon") for n in nights] and len(
        days
    ) == 2
    result = evaluated(checkpoint, tmp_path, "--acdc", root)
    assert sum(result["confusion_matrix"][3]) == 64 * 48 and result["miou_present"] == result["iou"]["wall"]
    assert "labelIds are there too: --labels labelIds reads them" in capsys.readouterr().out
    assert (
        sum(evaluated(checkpoint, tmp_path, "--acdc", root, "--labels", "labelIds")["confusion_matrix"][0])
        == 64 * 48
    )
    assert evaluated(checkpoint, tmp_path, "--acdc", root, "--split", "test") == 2
    assert "no labels to score against; give --out" in capsys.readouterr().err
    evaluated(checkpoint, tmp_path, "--acdc", root, "--split", "test", "--out", tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*/GP1_frame_00000?_rgb_anon.png"))) == 2 * 4
    with pytest.raises(SystemExit):
        evaluated(checkpoint, tmp_path, "--acdc", root, "--split", "test", "--submit", tmp_path / "x.zip")
    assert "elsewhere --out writes the folders" in capsys.readouterr().err
    days[0].unlink()
    with pytest.raises(datasets.DataError, match="000001_rgb_ref_anon.png: no such file"):
        datasets.targets("acdc", root)
    assert datasets.targets("acdc", root, "none") == (days[1:], nights)


def test_training_on_acdc(city, tmp_path):
    root = tmp_path / "acdc"
    for n, (day, night) in enumerate(zip(*datasets.targets("darkzurich", city / "darkzurich"), strict=True)):
        for light, path in (("train", night), ("train_ref", day)):
            name = f"GP_frame_00000{n}_rgb_{'ref_' * light.endswith('ref')}anon.png"
            (root / f"rgb_anon/night/{light}/GP").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / f"rgb_anon/night/{light}/GP" / name)
    data = ["--cityscapes", str(city / "cityscapes"), "--acdc", str(root), "--out", str(tmp_path / "run")]
    assert train.main([*data, *TINY, "--steps", "1"]) == 0


def test_nighttime_driving(checkpoint, tmp_path):
    root = tmp_path / "ntd"
    picture_file(root, "leftImg8bit/test/night/0_frame_0004_leftImg8bit.png")
    picture_file(
        root,
        "gtCoarse_daytime_trainvaltest/test/night/0_frame_0004_gtCoarse_labelTrainIds.png",
        mode="L",
        value=13,
    )
    result = evaluated(checkpoint, tmp_path, "--nighttime-driving", root)
    assert sum(result["confusion_matrix"][13]) == 64 * 48 and result["images"] == 1


def test_darkzurich_reference_days_and_missing_test_labels(checkpoint, tmp_path, capsys):
    root = tmp_path / "dz"
    for split in ("val", "test"):
        picture_file(root, f"rgb_anon/{split}_ref/day/GOPR0356_ref/GOPR0356_frame_000324_ref_rgb_anon.png")
        out = tmp_path / split
        evaluated(checkpoint, tmp_path, "--darkzurich", root, "--split", f"{split}_ref", "--out", out)
        assert (out / "color/GOPR0356_frame_000324_ref_rgb_anon.png").is_file()
    assert "1 images, no labels" in capsys.readouterr().out
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--split", "val") == 2
    assert "rgb_anon/val/night: no such folder" in capsys.readouterr().err


def test_uiou_is_its_definition(checkpoint, tmp_path, capsys):
    label, prediction = torch.randint(0, 4, (12, 20)), torch.randint(0, 5, (12, 20))
    confidence, invalid = torch.rand(12, 20), torch.randint(0, 2, (12, 20))
    confidence[0, :5] = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.95])  # on a threshold is not below it
    label[1] = 255
    got = evaluate.uncertainty_scores(
        evaluate.count(label.byte(), prediction, 19, confidence, invalid.byte())
    )
    expected = []
    for n in range(20):
        per_class = []
        for c in range(19):
            inter = union = 0
            for y, x in itertools.product(range(12), range(20)):
                if label[y, x] == 255:
                    continue
                is_c, declared = bool(label[y, x] == c), bool(confidence[y, x] < torch.tensor(n / 20))
                says_c = bool(prediction[y, x] == c)
                right = is_c and ((declared and invalid[y, x] == 1) or (not declared and says_c))
                inter += right
                union += right or is_c or (says_c and not declared)
            if union:
                per_class.append(100 * inter / union)
        expected.append(sum(map(float, per_class)) / len(per_class))
    assert got["uiou"] == pytest.approx(expected) and got["auiou"] == pytest.approx(sum(expected) / 20)

    root = tmp_path / "dz"
    picture_file(root, "rgb_anon/val/night/GOPR/GOPR_frame_000001_rgb_anon.png")
    picture_file(root, "gt/val/night/GOPR/GOPR_frame_000001_gt_labelTrainIds.png", mode="L", value=2)
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--uiou") == 2
    assert "--uiou needs a gt_invIds.png" in capsys.readouterr().err
    picture_file(root, "gt/val/night/GOPR/GOPR_frame_000001_gt_invIds.png", mode="L", value=1)
    result = evaluated(checkpoint, tmp_path, "--darkzurich", root, "--uiou")
    assert len(result["uiou"]) == 20 and result["uiou"][0] == pytest.approx(result["miou"])
    picture_file(root, "gt/val/night/GOPR/GOPR_frame_000001_gt_invIds.png", mode="L", value=255)
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--uiou") == 2
    assert "value 255 is no invIds value" in capsys.readouterr().err


def test_scores_agree_with_cityscapes_scripts(city, checkpoint, tmp_path):
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    result = evaluated(checkpoint, tmp_path, "--cityscapes", city / "cityscapes", "--out", tmp_path / "p")
    truth = sorted((city / "cityscapes/gtFine/val").glob("*/*_labelIds.png"))
    found = [
        next((tmp_path / "p/labelIds").glob(f"{t.name.removesuffix('_gtFine_labelIds.png')}*.png"))
        for t in truth
    ]
    scripts.args.evalInstLevelScore, scripts.args.quiet = False, True
    theirs = scripts.evaluateImgLists([str(p) for p in found], [str(t) for t in truth], scripts.args)
    assert result["miou"] == pytest.approx(100 * theirs["averageScoreClasses"], abs=1e-6)


class Position(nn.Module):
    """A network whose probabilities are known for every pixel: sigmoid of the red channel, and the rest."""

    def forward(self, images):
        assert min(images.shape[2:]) >= 32
        return None, torch.stack([images[:, 0], torch.zeros_like(images[:, 0])], 1)


def test_flip_scales_and_windows_average_the_softmax():
    images, model = torch.rand(1, 3, 70, 90), Position()
    whole = evaluate.probabilities(model, images)
    torch.testing.assert_close(whole[:, 0], images[:, 0].sigmoid())
    torch.testing.assert_close(
        evaluate.probabilities(model, images, window=(32, 40)), whole
    )  # nothing lost, no seams
    torch.testing.assert_close(evaluate.probabilities(model, images, flip=True), whole)  # flipped back
    smooth = images.mean((2, 3), keepdim=True).expand_as(images)
    got = evaluate.probabilities(model, smooth, (0.75, 1.0, 1.25), True, (48, 48))
    torch.testing.assert_close(got, evaluate.probabilities(model, smooth))
    assert (evaluate.probabilities(model, images, (1.0, 0.5)) - whole).abs().max() > 0.01
    assert evaluate.probabilities(model, images[:, :, :9, :20]).shape == (
        1,
        2,
        9,
        20,
    )  # smaller than the network's least


def test_windows_and_flips_reach_the_command(city, checkpoint, tmp_path):
    data = ["--darkzurich", city / "darkzurich"]
    plain = evaluated(checkpoint, tmp_path, *data)
    for views in (["--flip"], ["--scales", 0.75, 1.25], ["--window", 64, 96]):
        result = evaluated(checkpoint, tmp_path, *data, *views)
        assert result["confusion_matrix"] != plain["confusion_matrix"]
    assert (
        result["checkpoint"]["architecture"]["backbone"] == "resnet18" and result["checkpoint"]["step"] == 2
    )


def test_any_picture(checkpoint, tmp_path, capsys):
    for n, ending in enumerate(("png", "jpg", "webp", "PNG")):
        picture_file(tmp_path / "in", f"a{n}.{ending}", (33 + n, 20 + 30 * n), value=(200, 30, 90))
    evaluated(checkpoint, tmp_path, "--images", tmp_path / "in", "--out", tmp_path / "out")
    for kind, mode in (("labelTrainIds", "L"), ("labelIds", "L"), ("color", "RGB"), ("overlay", "RGB")):
        for n in range(4):
            with Image.open(tmp_path / f"out/{kind}/a{n}.png") as image:
                assert image.size == (33 + n, 20 + 30 * n) and image.mode == mode
    ids, train_ids = (Image.open(tmp_path / f"out/{kind}/a3.png") for kind in ("labelIds", "labelTrainIds"))
    assert ids.getpixel((5, 5)) == datasets.CLASSES[train_ids.getpixel((5, 5))][1]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for ending, size in (("jpg", (30, 40)), ("png", (40, 30))):
        path = tmp_path / f"turned.{ending}"
        Image.new("RGB", (40, 30)).save(path, exif=exif)
        assert datasets.open_image(path).size == datasets.size_of(path) == size
    picture_file(tmp_path / "in", "a0.jpg")
    assert evaluated(checkpoint, tmp_path, "--images", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "would overwrite" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert evaluated(checkpoint, tmp_path, "--images", tmp_path / "nothing", "--out", tmp_path / "out") == 2
    assert "no picture in it" in capsys.readouterr().err


def test_submissions(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SIZES", {"darkzurich": (64, 48), "cityscapes": (64, 48)})
    root, file = tmp_path / "data", tmp_path / "upload.zip"
    for n in (1, 2):
        picture_file(
            root, f"rgb_anon/test/night/GOPR0364/GOPR0364_frame_00000{n}_rgb_anon.png", value=(9, 9, 40)
        )
        picture_file(root, f"leftImg8bit/test/berlin/berlin_00000{n}_000019_leftImg8bit.png")
    evaluated(checkpoint, tmp_path, "--darkzurich", root, "--submit", file)  # the test split, what else
    assert "6 entries for 2 images, checked" in capsys.readouterr().out
    with zipfile.ZipFile(file) as packed:
        kinds = {"labelTrainIds": "L", "labelTrainIds_invalid": "L", "confidence": "I;16"}
        expected = {f"{kind}/GOPR0364_frame_00000{n}.png" for kind in kinds for n in (1, 2)}
        assert set(packed.namelist()) == expected
        for name in expected:
            image = Image.open(io.BytesIO(packed.read(name)))
            assert image.size == (64, 48) and image.mode == kinds[name.split("/")[0]]
        model, _ = evaluate.load_model(checkpoint)
        pixels = torchvision.transforms.v2.functional.pil_to_tensor(
            datasets.open_image(next(root.rglob("GOPR*1_rgb_anon.png")))
        )
        with torch.no_grad():
            best = model(pixels[None] / 255)[1].softmax(1).max(1)[0][0, 20, 30].item()
        stored = Image.open(io.BytesIO(packed.read("confidence/GOPR0364_frame_000001.png"))).getpixel(
            (30, 20)
        )
        assert stored == pytest.approx(65535 * best, abs=2)
    evaluated(checkpoint, tmp_path, "--cityscapes", root, "--split", "test", "--submit", file)
    with zipfile.ZipFile(file) as packed:
        assert packed.namelist() == [f"berlin_00000{n}_000019_leftImg8bit.png" for n in (1, 2)]
        values = {v for _, v in Image.open(io.BytesIO(packed.read(packed.namelist()[0]))).getcolors()}
        assert values <= {label_id for _, label_id, _ in datasets.CLASSES}
    before = file.read_bytes()  # what does not pass the check does not take the file's name
    monkeypatch.setattr(evaluate, "SIZES", {"darkzurich": (1920, 1080)})
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--split", "test", "--submit", file) == 2
    assert "GOPR0364_frame_000001_rgb_anon.png: the server wants (1920, 1080)" in capsys.readouterr().err
    assert file.read_bytes() == before and not Path(f"{file}.tmp").exists()
    monkeypatch.setattr(evaluate, "SIZES", {"darkzurich": (64, 48)})
    image = next(root.rglob("GOPR*2_rgb_anon.png"))
    whole = image.read_bytes()
    image.write_bytes(whole[:-40])
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--submit", file) == 2
    assert file.read_bytes() == before and not Path(f"{file}.tmp").exists()
    image.write_bytes(whole)
    capsys.readouterr()
    monkeypatch.setattr(evaluate.Submission, "add", lambda *_: None)  # a prediction that gets lost
    assert evaluated(checkpoint, tmp_path, "--darkzurich", root, "--submit", file) == 2
    assert "missing or too many" in capsys.readouterr().err
    assert file.read_bytes() == before and not Path(f"{file}.tmp").exists()


def test_export_runs_without_our_files(checkpoint, tmp_path):
    assert (
        evaluate.main(
            ["--checkpoint", str(checkpoint), "--export", str(tmp_path / "net.pt2"), "--device", "cpu"]
        )
        == 0
    )
    model, _ = evaluate.load_model(checkpoint)
    images = [torch.rand(1, 3, 64, 96), torch.rand(3, 3, 65, 33), torch.rand(2, 3, 120, 200)]
    with torch.no_grad():
        torch.save([images, [model(i)[1] for i in images]], tmp_path / "io.pt")
    code = """import sys, torch
program = torch.export.load(sys.argv[1]).module()
images, expected = torch.load(sys.argv[2])
for image, logits in zip(images, expected):
    torch.testing.assert_close(program(image)[1], logits, rtol=1e-4, atol=1e-4)
assert not {"models", "evaluate", "torchvision"} & set(sys.modules)
print("same")"""
    files = [str(tmp_path / "net.pt2"), str(tmp_path / "io.pt")]
    run = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.stdout == "same\n", run.stderr


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "is needed"),
        (["--images", "x"], "give --out DIR"),
        (["--images", "x", "--out", "y", "--uiou"], "--uiou needs a data set"),
        (["--export", "x", "--json", "s.json"], "nothing to write"),
        (["--darkzurich", "x", "--scales", "0"], "--scales must be positive"),
        (["--darkzurich", "x", "--window", "8", "8"], "--window at least 32 x 32"),
        (["--darkzurich", "x", "--acdc", "y"], "not allowed with argument"),
        (["--darkzurich", "x", "--device", "abacus"], "--device abacus"),
        (
            ["--darkzurich", "x", "--submit", "s.zip", "--split", "val"],
            "--submit is for the test split, not val",
        ),
        (["--darkzurich", "x", "--json", "no/such/folder/s.json"], "not a file in a folder that exists"),
    ],
)
def test_nonsense_for_evaluate_is_refused_in_one_line(capsys, more, message):
    with pytest.raises(SystemExit) as refused:
        evaluate.main(["--checkpoint", "x.pt", *more])
    errors = capsys.readouterr().err
    assert refused.value.code == 2 and message in errors and errors.count("\n") == 1


def test_the_v2_head_can_be_exported_too(tmp_path):
    model = models.DeepLab("resnet50", output_stride=8, head="deeplabv2").eval()
    evaluate.export(model, tmp_path / "v2.pt2")
    images = torch.rand(1, 3, 65, 90)
    with torch.no_grad():
        got = torch.export.load(tmp_path / "v2.pt2").module()(images)[1]
        torch.testing.assert_close(got, model(images)[1], rtol=1e-3, atol=1e-3 * got.abs().max().item())


# ---- speed: every fast path computes what the slow one does ------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"head": "deeplabv2", "backbone": "resnet50", "output_stride": 8}])
@pytest.mark.parametrize("night_weights", ["norm", "shared"])
def test_low_memory_changes_no_bit(options, night_weights):
    found, sizes, batch = [], [], toy_batch()

    def counted(tensor):  # kept for the backward pass
        sizes[-1] += tensor.numel()
        return tensor

    for low_memory in (False, True):
        torch.manual_seed(0)
        model = models.DeepLab(**options)
        model.low_memory = low_memory
        method = ccdistill.CCDistill(model, night_weights)
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(counted, lambda t: t):
            total = method(batch)["total"]
        total.backward()
        gradients = {name: p.grad for name, p in method.named_parameters()}
        found.append((total, gradients, dict(method.named_buffers())))
    assert_same(*found)
    assert any("num_batches_tracked" in name for name in found[0][2])
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("paired", [True, False])
def test_the_cache_gives_the_same_samples(tree, tmp_path, paired, monkeypatch):
    def streams(**options):
        return stream_of(tree, paired=paired, **options)

    plain, cache = streams(), datasets.Cache(tmp_path / "cache")
    for _ in range(2):  # filled, then read
        for k in range(12):
            assert_same(plain[k], streams(cache=cache)[k])
    expected = [plain[k] for k in range(12)]
    monkeypatch.setattr(datasets, "_decode", None)  # from now on nothing is decoded
    for k in range(12):
        assert_same(expected[k], streams(cache=datasets.Cache(tmp_path / "cache"))[k])


def test_a_cache_entry_belongs_to_its_file_and_is_whole_or_nothing(tree, tmp_path, capsys, monkeypatch):
    path, folder = first(tree, IMAGE), tmp_path / "cache"
    cache = datasets.Cache(folder)

    def opened(cache=cache):
        return TF.to_image(cache.open(path, datasets.open_image)).tolist()

    pixels = opened()
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    assert opened() == pixels == TF.to_image(datasets.open_image(path)).tolist()
    for part in (b"", whole[:7], whole[:-1], whole + b"x", b"x" * 400):
        entry.write_bytes(part)
        assert opened() == pixels and entry.read_bytes() == whole  # decoded and written again
    datasets.Cache(folder, 0.5).open(path, datasets.open_image)
    half = datasets.Cache(folder, 0.5).open(path, datasets.open_image)
    assert len(list(folder.iterdir())) == 2 and half.shape[:0:-1] == tuple(
        s // 2 for s in Image.open(path).size
    )
    Image.open(path).transpose(Image.FLIP_TOP_BOTTOM).save(path)
    assert opened() == TF.to_image(datasets.open_image(path)).tolist() != pixels
    path.unlink()
    with pytest.raises(datasets.DataError, match="no such file"):
        opened()


def test_many_processes_fill_one_cache(tree, tmp_path):
    script = (
        "import sys, datasets, pathlib\n"
        "cache, convert = datasets.Cache(sys.argv[1]), datasets.TF.to_image\n"
        "for path in sorted(pathlib.Path(sys.argv[2]).rglob('*_leftImg8bit.png')):\n"
        "    image = cache.open(path, datasets.open_image)\n"
        "    assert (convert(image) == convert(datasets.open_image(path))).all()\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "cache", tree / "cityscapes"]
    runs = [subprocess.Popen(command, env=ONE_THREAD, cwd=HERE) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == len(list((tree / "cityscapes").rglob("*_leftImg8bit.png")))
    assert not any(name.endswith(".tmp") for name in names)


def test_a_full_disk_is_told_once_and_training_goes_on_without_the_cache(tree, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = datasets.Cache(tmp_path / "cache")
    for k in range(3):
        assert_same(stream_of(tree)[k], stream_of(tree, cache=cache)[k])
    assert not list((tmp_path / "cache").iterdir())
    assert capsys.readouterr().out.count("not written (No space left on device); going on") == 1


def test_the_cache_reaches_the_command(city, tmp_path):
    for name, more in (("plain", []), ("cached", ["--cache", tmp_path / "cache", "--workers", 1])):
        assert train.main(arguments(city, tmp_path / name, "--steps", 2, *more)) == 0
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "cached")
    assert list((tmp_path / "cache").iterdir())


def test_what_fails_while_the_network_goes_on_is_raised(checkpoint, tmp_path):
    network, _ = evaluate.load_model(checkpoint)
    for name in "ab":
        picture_file(tmp_path, f"{name}.png")
    found = datasets.pictures([tmp_path])
    for bad in "ab":

        def each(item, *_, bad=bad):
            if item["name"] == bad:
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            evaluate.evaluate(network, found, "cpu", each=each)


def test_the_benchmark_writes_what_it_says(city, tmp_path, capsys):
    path = tmp_path / "b.json"
    alone = [
        "--benchmark",
        "1",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--crop",
        "32",
        "64",
        "--batch-size",
        "1",
    ]
    assert train.main([*alone, "--json", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    for name in ("plain_ms", "method_ms", "ratio", "data_ms", "images_per_second", "peak_memory_mb"):
        assert result[name] > 0 and re.search(f"^{name} ", printed, re.MULTILINE)
    assert result["ratio"] == pytest.approx(result["method_ms"] / result["plain_ms"])
    took = result["method_ms"] + result["data_ms"]
    assert result["images_per_second"] == pytest.approx(4 * 1000 / took)
    assert [(row["batch_size"], row["crop"]) for row in result["growth"]] == [(1, [32, 32]), (1, [32, 64])]
    more = ["--benchmark", 1, "--cache", tmp_path / "cache", "--crop", 32, 64, "--low-memory"]
    assert train.main(arguments(city, tmp_path / "out", *more)) == 0
    assert "sample_cached_ms" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_compiled_networks_compute_the_same(city, tmp_path, monkeypatch):
    real, compiled = nn.Module.compile, []

    def quick(module):  # without the minute that generating code takes
        compiled.append(module)
        real(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", quick)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert train.main(arguments(city, tmp_path / name, "--steps", 2, *more)) == 0
    assert len(compiled) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # of two batch sizes, and to evaluate
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "compiled"), strict=True):
        assert float(a["total"]) == pytest.approx(float(b["total"]), rel=1e-3)
    assert (
        state_of(tmp_path / "plain/last.pt")["model"].keys()
        == state_of(tmp_path / "compiled/last.pt")["model"].keys()
    )


def together(processes, *command, **options):
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        HERE / "train.py",
    ]
    environment = ONE_THREAD | {"TORCHELASTIC_ERROR_FILE": os.devnull}
    return subprocess.run(
        [sys.executable, *map(str, (*launch, *command))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_two_processes_are_one_training(city, tmp_path):
    more = ["--crop", 32, 64, "--optimizer", "sgd", "--lr", 0.01, "--workers", 0, "--eval-every", 1]
    out = tmp_path / "two"
    run = together(2, *arguments(city, out, *more, "--steps", 2))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("at night:") == 2  # the first process alone speaks
    last = state_of(out / "last.pt")

    # The same by hand: each process's samples through the same weights, gradients averaged.
    args = train.parse_args(arguments(city, tmp_path / "hand", *more, "--steps", 2))
    args.processes = 2
    torch.manual_seed(args.seed)
    stream, validation = train.load_data(args)
    method, optimizer = train.build(args)
    assert len(stream) == 8
    buffers = [{name: b.clone() for name, b in method.named_buffers()}] * 2
    for step in (1, 2):
        gradients = []
        for rank in (0, 1):
            method.load_state_dict(buffers[0], strict=False)  # the first process's statistics
            torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
            samples = [stream[k] for k in range((2 * step - 2 + rank) * 2, (2 * step - 1 + rank) * 2)]
            batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0] if name != "broken"}
            label = batch.pop("source_label").long()
            method.stage = "source" if step == 1 else "target"
            optimizer.zero_grad()
            method({k: v.float() / 255 for k, v in batch.items()} | {"source_label": label})[
                "total"
            ].backward()
            gradients.append([p.grad for p in method.parameters()])
            buffers[rank] = {name: b.clone() for name, b in method.named_buffers()}
        for p, *both in zip(method.parameters(), *gradients, strict=True):
            p.grad = None if both[0] is None else sum(both) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - (step - 1) / args.steps) ** args.power
        optimizer.step()
    method.load_state_dict(buffers[0], strict=False)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(last["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)

    scores = evaluate.evaluate(evaluate.load_model(out / "last.pt")[0], validation, "cpu")
    assert float(log_of(out)[-1]["miou"]) == pytest.approx(scores["miou"], abs=1e-9)

    # Resumed to the bit; with another number of processes it is another run.
    more = [*more, "--power", 0, "--warmup", 0]
    for name, *steps in (("cut", 1, 2), ("whole", 2)):
        for n, length in enumerate(steps):
            resume = ["--resume"] if n else []
            run = together(2, *arguments(city, tmp_path / name, *more, "--steps", length, *resume))
            assert run.returncode == 0, run.stderr
    cut, whole = (state_of(tmp_path / name / "last.pt") for name in ("cut", "whole"))
    assert_same(*({key: s[key] for key in ("model", "optimizer", "step", "best")} for s in (cut, whole)))
    refused = together(1, *arguments(city, tmp_path / "cut", *more, "--steps", 3, "--resume"))
    assert "--processes 2 there, 1 here" in refused.stderr


def test_two_processes_tell_of_broken_files(tree, tmp_path):
    more = ["--crop", 32, 64, "--eval-every", 2, "--save-every", 9, "--steps", 2]
    path = sorted((tree / "darkzurich/rgb_anon/val").rglob("*.png"))[1]  # that of the second process
    damage(path, "truncate")
    run = together(2, *arguments(tree, tmp_path / "run", *more))
    assert (
        run.returncode != 0 and "Traceback" not in run.stderr.split("ChildFailedError")[0].split("torch/")[0]
    )
    assert f"{path}: not a readable image" in run.stderr and "another process could not" in run.stderr
    assert state_of(tmp_path / "run/last.pt")["step"] == 2  # what was reached is kept


def test_a_group_that_is_told_to_stop_saves(small_city, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py"]
    more = ["--crop", 32, 32, "--steps", 10000, "--log-every", 1, "--workers", 1]
    command = [sys.executable, *map(str, launch), *arguments(small_city, tmp_path / "run", *more)]
    run = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step 1/"):
            run.terminate()
            break
    assert "--resume goes on" in run.communicate()[0] and run.returncode != 0
    assert state_of(tmp_path / "run/last.pt")["step"] >= 1
