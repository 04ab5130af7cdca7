"""pytest. The slow formulas live here, the fast ones in the library; data is written to temporary folders."""

import copy
import csv
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial
from itertools import chain, count, product
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image, PngImagePlugin
from torch import nn

import ccdistill
import datasets
import evaluate
import losses
import models
import train

HERE, DataError, WeightsError = Path(__file__).parent, datasets.DataError, models.WeightsError
FULL = bool(os.environ.get("CCDISTILL_FULL"))  # the long count: 25 kills in 200 steps
torch.set_num_threads(1)  # tiny tensors: a second thread waits more than it works
IMAGE, LABEL = "demo_000000_000000_leftImg8bit.png", "demo_000000_000000_gtFine_labelIds.png"
PAIR = "train/night/DEMO_night/DEMO_night_frame_000002", "train/day/DEMO_day/DEMO_day_frame_000004"
LINE = ",".join(PAIR)
OFFICIAL = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
COLOURS, GREYS = [*chain(*datasets.COLOURS)], [13, 13, 13, 0, 0, 0, 5, 5, 5]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
TRAIN = [sys.executable, "-uc", "import runpy, test_ccdistill; runpy.run_path('train.py', {}, '__main__')"]
rand = partial(torch.randn, dtype=torch.float64)
close = lambda a, b, error=1e-7: torch.testing.assert_close(a, b, rtol=error, atol=error)


class Narrow(torchvision.models.ResNet):  # an eighth of ResNet-18: the runs are not about how well it learns
    def __init__(self, weights=None):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(64, 1)

    def _make_layer(self, block, planes, *rest, **more):
        return super()._make_layer(block, planes // 8, *rest, **more)


torchvision.models.resnet18 = Narrow


def fails(error, told, function, *args, **options):  # with one line that matches `told`
    with pytest.raises(error, match=told) as raised:
        function(*args, **options)
    assert "\n" not in str(raised.value)


def assert_same(a, b):
    if isinstance(a, dict):
        a, b = sorted(a.items()), sorted(b.items())
    if isinstance(a, list | tuple):
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(autouse=True)
def seeded_and_tidy(tmp_path):
    torch.manual_seed(0)
    yield
    train.STOPPED.clear()
    shutil.rmtree(tmp_path, ignore_errors=True)  # checkpoints of all tests together are many gigabytes


def slow_correlation(a, b):
    rows = [r.flatten() for r in (*a, *b)]
    out = torch.zeros(len(rows), len(rows), dtype=a.dtype)
    for i, j in product(range(len(rows)), repeat=2):
        norm = math.sqrt((rows[i] ** 2).sum()) * math.sqrt((rows[j] ** 2).sum())
        out[i, j] = (rows[i] * rows[j]).sum() / norm if norm else 0
    return out


def slow_gram(f):
    batch, channels, height, width = f.shape
    out = torch.zeros(batch, channels, channels, dtype=f.dtype)
    for n, i, j, y, x in product(*map(range, (batch, channels, channels, height, width))):
        out[n, i, j] += f[n, i, y, x] * f[n, j, y, x] / (height * width)
    return out


def slow_js(p, q):
    total = 0.0
    for x, y in zip(p.softmax(1).flatten(), q.softmax(1).flatten(), strict=True):
        m = (x + y) / 2
        total += (x * math.log(x / m) + y * math.log(y / m)) / 2
    return total / len(p)


def slow_distance(x, y, paired=True):  # over all entries; unpaired: but those of i with B + i
    kept = [(i, j) for i, j in product(range(len(x)), repeat=2) if paired or abs(i - j) != len(x) // 2]
    return sum((x[i, j] - y[i, j]) ** 2 for i, j in kept) / len(kept)


@pytest.mark.parametrize("batch, paired", [*product((1, 2, 3), (True, False))])
def test_losses_are_their_formulas(batch, paired):
    a, b = rand(2, batch, 3, 2, 4)
    close(losses.correlation(a, b), slow_correlation(a, b))
    close(losses.gram(a), slow_gram(a))
    sd, sn, td, tn = e = rand(4, batch, 5)
    close(losses.js_divergence(sd, sn), slow_js(sd, sn))
    inherent = slow_distance(slow_correlation(sd, td), slow_correlation(sn, tn))
    illumination = slow_distance(slow_correlation(sd, sn), slow_correlation(td, tn), paired)
    sd, sn, td, tn = (rows / rows.square().sum(1, keepdim=True).sqrt() / 0.1 for rows in e)
    js = slow_js(sd, sn) + (slow_js(td, tn) if paired else 0) - slow_js(sd, tn) - slow_js(sn, td)
    found = losses.content_terms(*e, target_paired=paired)
    close(found, {"inherent": inherent, "illumination": illumination, "js": js})
    close(losses.content_distill(*e, js_weight=0.5, target_paired=paired), inherent + illumination + js / 2)
    f = [rand(batch, 3, *size) for size in ((4, 5), (2, 2), (1, 7), (3, 3))]  # sizes may differ
    graphs = slow_correlation(*map(slow_gram, f[:2])), slow_correlation(*map(slow_gram, f[2:]))
    close(losses.style_distill(*f, target_paired=paired), slow_distance(*graphs, paired))
    for function, x in (losses.content_distill, e.clone()), (losses.style_distill, rand(4, 2, 3, 2, 2)):
        check = lambda x, function=function: function(*x, target_paired=paired)
        assert torch.autograd.gradcheck(check, x.requires_grad_())
    logits, labels, weights = rand(2, 5, 4, 4).requires_grad_(), torch.randint(5, (2, 4, 4)), rand(2, 4, 4)
    labels[0, 1:], plain, weighted = 255, 0, 0
    for n, y, x in (labels < 255).nonzero().tolist():
        loss = -logits[n, :, y, x].log_softmax(0)[labels[n, y, x]] / 20
        plain, weighted = plain + loss, weighted + weights[n, y, x] * loss
    close(losses.segmentation_loss(logits, labels), plain)
    close(losses.segmentation_loss(logits, labels, weights), weighted)
    (nothing := losses.segmentation_loss(logits, torch.full_like(labels, 255))).backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


def test_pseudo_labels():
    column = lambda *rows: torch.tensor(rows).log().T[None, :, None]  # logits (1, K, 1, N) of N pixels
    night = column([0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.02, 0.93], [0.9, 0.05, 0.05])
    assert losses.pseudo_labels(night, num_static=2).flatten().tolist() == [0, 255, 2, 0]  # 0.9 reaches 0.9
    day = column([0.1, 0.8, 0.1], [0.01, 0.98, 0.01], [0.98, 0.01, 0.01], [0.9, 0.05, 0.05])
    # static: (.95 + .1) / 2 < .79 | (.6 + .98) / 2 = .79 | dynamic, the day is left out | .9
    assert losses.pseudo_labels(night, day, 0.79, num_static=2).flatten().tolist() == [255, 1, 2, 0]
    assert losses.pseudo_labels(night, day, 0, num_static=0).equal(night.argmax(1))
    night, day = [0.1 / 17] * 19, [0.01 / 18] * 19  # 11 of 19 classes stand still:
    night[11], night[1], day[1] = 0.59, 0.31, 0.99  # a person on the day's sidewalk does not become sidewalk
    assert [losses.pseudo_labels(column(night), column(day), t).item() for t in (0.58, 0.6)] == [11, 255]


def test_losses_bear_zero_rows_and_extremes_and_run_alone():
    zero, other, maps = torch.zeros(2, 3, 4, 4), rand(2, 3, 4, 4).float(), rand(4, 2, 3, 4, 4).float()
    zero[0] = 1
    cor = losses.correlation(zero.requires_grad_(), other)
    losses.style_distill(zero, other, *maps[:2]).add((cor * torch.rand(4, 4)).sum()).backward()
    assert cor[1].abs().max() == cor[:, 1].abs().max() == zero.grad[1].abs().max() == 0
    assert zero.grad.isfinite().all() and zero.grad[0].abs().max() > 0
    for scale in (1e9, 1e-9):  # squares of Gram entries leave float32's range
        close(losses.style_distill(*maps * scale), losses.style_distill(*maps), 1e-5)
    far = 1e4 * torch.eye(2)
    assert losses.js_divergence(far, far.flip(0)).item() == pytest.approx(math.log(2))  # its most
    code = "import sys; exec(open(sys.argv[1]).read()); print(float(content_distill(*[torch.eye(2)] * 4)),"
    command = [sys.executable, "-c", code + "{'torchvision', 'PIL'} & {*sys.modules})", HERE / "losses.py"]
    out = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert out.stdout == "0.0 set()\n", out.stderr


@pytest.mark.parametrize("dtype, scale", [*product((torch.float16, torch.bfloat16), (1, 1000))])
def test_half_inputs_equal_their_float32_copies_even_under_autocast(dtype, scale):
    e, f = (scale * rand(4, 3, 19)).to(dtype), (scale * rand(4, 3, 8, 6, 6)).to(dtype)
    segmentation = partial(losses.segmentation_loss, labels=torch.randint(0, 8, (3, 6, 6)))
    pseudo_labels = partial(losses.pseudo_labels, num_static=3)
    for function, inputs in (
        (losses.content_distill, e), (losses.style_distill, f), (losses.correlation, e[:2]),
        (losses.gram, f[:1]), (losses.js_divergence, e[:2]), (pseudo_labels, f[:2]), (segmentation, f[:1]),
    ):  # fmt: skip
        expected = function(*inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            for got in (function(*inputs), function(*inputs.float())):
                assert got.dtype == expected.dtype and got.isfinite().all() and torch.equal(got, expected)


@pytest.mark.parametrize("backbone, stride", [*product(("resnet34", "resnet50"), (8, 16))])
def test_dilation_computes_the_same_on_a_denser_grid(backbone, stride):
    model, images = models.DeepLab(backbone, output_stride=stride).eval(), torch.rand(1, 3, 65, 97)
    theirs = getattr(torchvision.models, backbone)(weights=None).eval()
    theirs.load_state_dict(model.backbone.state_dict(), strict=False)
    dense, sparse = model.backbone(images), nn.Sequential(*list(theirs.children())[:-2])(images)
    some = dense[..., :: 32 // stride, :: 32 // stride]
    assert some.shape == sparse.shape and (some - sparse).abs().max() < 1e-4 * sparse.abs().max()


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_any_size_and_batch_trains_and_eval_mode_is_plain_batch_norm(batch):
    _, logits = models.DeepLab()(torch.rand(batch, 3, 33, 47))
    assert logits.shape == (batch, 19, 33, 47) and logits.mean().backward() is None
    norm, plain, x = models.PooledNorm(5), nn.BatchNorm2d(5).eval(), torch.randn(400, 5, 1, 1) * 3 + 7
    out = torch.cat([norm(images) for images in x.split(batch)])
    close(norm.running_mean, x[-60:].mean((0, 2, 3)), 0.3)  # those of the values, of one as of many
    close(norm.running_var, torch.full((5,), 9.0), 0.8)
    plain.load_state_dict(norm.state_dict())
    mean = x[-batch:].mean(0) if batch > 1 else norm.running_mean.view(5, 1, 1)
    close(out[-batch:], (x[-batch:] - mean) / norm.running_var.sqrt().view(5, 1, 1), 1e-4)  # not 1 and -1
    close(norm.eval()(x), plain(x))


def test_weights_are_found_in_what_wraps_them_or_told_in_one_line(tmp_path, monkeypatch):
    path, images, build = tmp_path / "w.pth", torch.rand(1, 3, 64, 96), torchvision.models.segmentation
    theirs = build.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=19, aux_loss=True)
    torch.save({"model": theirs.state_dict()}, path)
    ours = models.DeepLab("resnet50", output_stride=8, weights=path).eval()  # it computes the same
    close(ours(images)[1], theirs.eval()((images - ours.mean) / ours.std)["out"], 1e-4)
    fails(WeightsError, "w.pth: no night.pt or last.pt", evaluate.load_model, path)
    net, resnet = models.DeepLab().state_dict(), Narrow().state_dict()
    load = lambda content: torch.save(content, path) or models.DeepLab(weights=path)
    last = {f"night.{k}": v for k, v in net.items()} | {f"day.{k}": v + 1 for k, v in net.items()}
    for file in (net, {"model": net}, {"state_dict": {f"module.{k}": net[k] for k in net}}, {"model": last}):
        assert_same(load(file).state_dict(), net)
    assert_same(models.weights_in({"model": last}, "", "day"), {k: v + 1 for k, v in net.items()})
    found, seven, asked = load(resnet).backbone.state_dict(), models.DeepLab(num_classes=7), []
    assert_same(found, {k: v for k, v in resnet.items() if k in found})
    with pytest.warns(UserWarning, match="w.pth: its classifier, for another number of classes, is left out"):
        assert_same(load(seven.state_dict()).classifier[1].state_dict(), seven.classifier[1].state_dict())
    for content, told in (
        (net | {"odd": torch.ones(1)}, "odd"), (net | {"backbone.conv1.weight": torch.ones(3)}, "conv1"),
        ({k: v for k, v in net.items() if "layer2" not in k}, "layer2"), ([1, 2], "no state dict"),
        ({"model": os.mkdir}, "not a readable file of tensors"), ({"model": "x"}, "no state dict"),
    ):  # fmt: skip
        fails(WeightsError, f"w.pth: .*{told}", load, content)
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: asked.append(weights) or Narrow())
    assert models.DeepLab() and models.DeepLab(weights="imagenet") and asked[0] is None
    assert torchvision.models.ResNet18_Weights.verify(asked[1]).name == "IMAGENET1K_V1"


def test_night_styles_bring_the_light_and_keep_the_content():
    day, night = (torch.rand(20, 3, 120, 160) * 0.3 + low for low in (0.35, 0.3))  # none is clipped
    styles = "color", "histogram", "fda", "random"
    color, histogram, fda, mixed = (ccdistill.night_style(day, night, style) for style in styles)
    close(torch.stack(torch.std_mean(color, (2, 3))), torch.stack(torch.std_mean(night, (2, 3))), 1e-4)
    d, h, n = (images.flatten(0, 1).flatten(1) for images in (day, histogram, night))
    assert (h.gather(1, d.argsort()) - n.sort().values).abs().max() < 0.01  # the night's, in the day's order
    d, s, n = map(torch.fft.fft2, (day, fda, night))
    for y, x in product(range(-5, 6), range(-5, 6)):
        source = n if abs(y) <= 1 and abs(x) <= 1 else d  # beta 0.01: frequencies up to 1
        close(s[..., y, x].abs(), source[..., y, x].abs(), 1e-2)
    close(s[0, :, 1, 1].angle(), d[0, :, 1, 1].angle(), 1e-3)
    first, second = ((mixed == styled).flatten(1).all(1) for styled in (color, histogram))
    assert (first ^ second).all() and 2 < first.sum() < 18
    for styled in (ccdistill.night_style(day + 0.35, night[..., 1:] - 0.3, style) for style in styles):
        assert styled.shape == day.shape and 0 <= styled.min() and styled.max() <= 1  # clipped


class Own(nn.Module):  # a network of the user's own, as CCDistill asks for it, with a norm of every kind
    feature_channels, recomputing = 6, False

    def __init__(self, classes=19):
        super().__init__()
        first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, 2, 1))
        norms = nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.body = nn.Sequential(first, nn.SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), *norms)
        self.norm, self.drop, self.classifier = nn.LayerNorm(6), nn.Dropout(0.1), nn.Conv2d(6, classes, 1)

    def forward(self, images):
        again = partial(torch.utils.checkpoint.checkpoint, self.body, use_reentrant=False)
        x = (again if self.recomputing else self.body)(images)
        features = self.drop(self.norm(x.movedim(1, 3)).movedim(3, 1))
        return features, nn.functional.interpolate(self.classifier(features), images.shape[2:])


def toy_batch(batch=2):
    images, label = torch.rand(4, batch, 3, 16, 24), torch.randint(0, 19, (batch, 16, 24))
    names = "source_day", "source_night", "target_day", "target_night", "source_label"
    return dict(zip(names, (*images, label), strict=True))


@pytest.mark.parametrize("night_weights, joint", [*product(ccdistill.NIGHT_WEIGHTS, (True, False))])
def test_networks_share_what_night_weights_says_and_all_but_the_teacher_learns(night_weights, joint):
    method, batch = ccdistill.CCDistill(Own(), night_weights=night_weights, joint=joint), toy_batch()
    for day, night in ((method.day, method.night), method.teacher.values()):
        for name, parameter in day.named_parameters():
            own = night_weights == "norm" and name.startswith(("body.1.", "body.4.", "body.5.", "norm."))
            assert (parameter is night.get_parameter(name)) == (night_weights != "separate" and not own), name
        assert (night.body[1].running_mean is day.body[1].running_mean) == (night_weights == "shared")
    same, gradients = copy.deepcopy(method), []
    same.day.recomputing = same.night.recomputing = True  # activation checkpointing changes no gradient
    for each in (method, same):
        torch.manual_seed(0)
        each(batch)["total"].backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
        for name, parameter in each.named_parameters():
            assert (parameter.grad is None) == ("teacher" in name) == (not parameter.requires_grad), name
    close(*gradients, 1e-5)
    assert method.projection[2].weight.grad.abs().max() > 0


def test_each_domain_has_statistics_of_its_own_the_sources_are_kept_and_at_the_end_the_nights():
    method, seen = ccdistill.CCDistill(Own(), teacher=False), {"day": [], "night": []}
    for name, layer in product(seen, (0, 1)):
        hook = lambda _, i, out, name=name: seen[name].append(out.detach().mean((0, 2, 3)))
        getattr(method, name).body[layer].register_forward_hook(hook)
    method(toy_batch(3))
    for name, (source, *normed) in seen.items():
        close(torch.stack(normed[::2]), torch.zeros(2, 6), 1e-5)  # source and target, each by itself
        close((norm := getattr(method, name).body[1]).running_mean, 0.1 * source, 1e-5)
        assert norm.num_batches_tracked == 1
    method.day.classifier.register_forward_pre_hook(lambda *_: 1 / 0 if not norm.momentum else None)
    fails(ZeroDivisionError, "zero", method, toy_batch())  # in the target's call
    assert method.day.body[1].momentum == method.night.body[5].momentum == 0.1
    network, nights, model = Own(), torch.rand(4, 3, 3, 16, 24) * 0.2, models.DeepLab()
    before, norm = copy.deepcopy(list(network.parameters())), network.body[1]
    ccdistill.take_night_statistics(network, nights)
    x = torch.stack([network.body[0](images) for images in nights])
    close(norm.running_mean, x.mean((0, 1, 3, 4)), 1e-5)
    close(norm.running_var, torch.stack([batch.var((0, 2, 3)) for batch in x]).mean(0), 1e-5)
    assert_same(before, list(network.parameters()))
    assert norm.momentum == 0.1 and not any(module.training for module in network.modules())
    for norm in (plain := model.backbone.bn1, pooled := model.classifier[0].convs[-1][2]):
        norm.running_mean += 5
    ccdistill.take_night_statistics(model, torch.rand(2, 1, 3, 64, 96))  # whole frames, one at a time
    assert max(plain.running_mean.max(), pooled.running_mean.max()) < 5 and (pooled.running_var == 1).all()


V, MAPS, BATCH, METHOD = torch.rand(2, 3), torch.rand(2, 3, 4, 4), toy_batch(), ccdistill.CCDistill(Own())
DAY, NIGHT, LABELS = BATCH["source_day"], torch.rand(2, 3, 8, 8), torch.zeros(2, 4, 4)
STYLE, SEG, FIVE = ccdistill.night_style, losses.segmentation_loss, ccdistill.CCDistill(Own(5))
COR, CDC, PSEUDO = losses.correlation, losses.content_distill, losses.pseudo_labels


@pytest.mark.parametrize("told, call", [
    (r"a \(2, 3\), b \(3, 3\)", (COR, V, torch.rand(3, 3))), (r"labels \(2, 4\)", (SEG, MAPS, LABELS[0, :2])),
    (r"\(0, 3\)", (COR, V[:0], V[:0])), ("not norm", (ccdistill.take_night_statistics, Own(), [DAY * 255])),
    (r"\(3,\)", (COR, V[0], V[0])), ("night_weights: expected one of", (ccdistill.night_model, Own(), "all")),
    (r"q \(2, 2\)", (losses.js_divergence, V, V[:, :2])), (r"e_target_night \(1, 3\)", (CDC, V, V, V, V[:1])),
    (r"e_source_day \(2, 3, 4, 4\)", (CDC, *[MAPS] * 4)), ("divide by 255", (models.DeepLab(), MAPS.byte())),
    (r"f_target_night \(2, 2, 2", (losses.style_distill, MAPS, MAPS, MAPS, MAPS[:, :2])),
    (r"\(3, 4, 4\)", (losses.gram, MAPS[0])), ("day.*nan to nan", (STYLE, DAY * math.nan, NIGHT)),
    (r"weights \(2, 4\)", (SEG, MAPS, LABELS, LABELS[0, :2])), ("of the 3 classes", (PSEUDO, MAPS, MAPS)),
    (r"day_logits \(1, 3", (PSEUDO, MAPS, MAPS[:1])), ("night.*not normalised", (STYLE, DAY, NIGHT * 255)),
    ("got 4", (PSEUDO, MAPS, MAPS, 0, 4)), ("of the 5", (FIVE, BATCH, False)),
    ("no batch", (ccdistill.take_night_statistics, Own(), [])), ("divide by 255", (STYLE, DAY.byte(), NIGHT)),
    (r"target_day \(2, 3, 8, 8\)", (METHOD, BATCH | {"target_day": NIGHT})),
    (r"target_day.*\[0, 1\].*not normalised", (METHOD, BATCH | {"target_day": DAY - 1}, False)),
    ("target_night.*uint8: divide by 255", (METHOD, BATCH | {"target_night": DAY.byte()}, False)),
    (r"source_day \(2, 16, 24, 3\)", (METHOD, BATCH | {"source_day": DAY.movedim(1, 3)}, False)),
    (r"source_label \(2, 4, 4\)", (METHOD, BATCH | {"source_label": LABELS})), ("of the 5", (FIVE, BATCH)),
])  # fmt: skip
def test_what_does_not_fit_is_named(told, call):
    fails(ValueError, told, *call)


def test_source_steps_leave_targets_out_and_nights_go_through_m_n():
    method, seen, batch = ccdistill.CCDistill(Own(), night_style="color", teacher=False), [], toy_batch()
    method.night.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    without = lambda name: {k: v for k, v in batch.items() if k != name}
    assert " ".join(method(without("target_day"), adapt=False)) == "seg_day seg_night total"
    before = method.eval()(without("source_night"))
    made = ccdistill.night_style(batch["source_day"], batch["target_night"], "color")
    assert_same(seen, [batch["source_night"], made, batch["target_night"]])
    method.night.body[1].running_mean += 1
    after = method(without("source_night"))
    assert after["seg_day"] == before["seg_day"] and after["seg_night"] != before["seg_night"]
    batch["source_label"] %= 5  # other classes, of which is said how many stand still, if it matters
    for adapt, options in product((True, False), ({"num_static": 3}, {"target_paired": False})):
        ccdistill.CCDistill(Own(5), **options)(batch, adapt)["total"].backward()


@pytest.mark.parametrize("teacher", [True, False])
def test_total_is_the_weighted_sum_and_a_zero_weight_does_no_work(monkeypatch, teacher):
    weights = {"content_weight": 2.0, "style_weight": 3.0, "pseudo_weight": 0.5}
    v = ccdistill.CCDistill(Own(), **weights, js_weight=0.7, pseudo_threshold=0, teacher=teacher)(BATCH)
    assert " ".join(v) == "seg_day seg_night pseudo content inherent illumination js style total"
    assert v["pseudo"] > 0 and v["style"] > 0
    close(v["content"], v["inherent"] + v["illumination"] + 0.7 * v["js"])
    total = v["seg_day"] + v["seg_night"] + 0.5 * v["pseudo"] + 2 * v["content"] + 3 * v["style"]
    close(v["total"], total, 1e-6)
    for module, name in ((losses, "content_terms"), (losses, "style_distill"), (ccdistill, "pseudo_labels")):
        monkeypatch.setattr(module, name, None)  # whoever calls it, fails
    nothing = ccdistill.CCDistill(Own(), teacher=teacher, **dict.fromkeys(weights, 0))
    assert " ".join(nothing(BATCH)) == "seg_day seg_night total" and nothing.teacher is None


def test_the_teacher_follows_in_training_alone():
    method = ccdistill.CCDistill(Own())
    pairs = [(method.teacher[name], getattr(method, name)) for name in ("day", "night")]
    for share in (1, 0.01):
        before = copy.deepcopy([list(teacher.parameters()) for teacher, _ in pairs])
        for value in (*method.day.parameters(), method.night.norm.bias, method.night.body[1].running_mean):
            value.data += 0.1
        method.update_teacher(share)
        for (teacher, student), old in zip(pairs, before, strict=True):
            expected = [p.lerp(q, share) for p, q in zip(old, student.parameters(), strict=True)]
            close(list(teacher.parameters()), expected)
            assert torch.equal(teacher.body[1].running_mean, student.body[1].running_mean)
    bias, mine = method.day.classifier.bias, method.teacher["day"].classifier.bias
    for adapt in (True, False):  # before the targets join, it is a copy
        bias.data += 1
        method(toy_batch(), adapt)
        assert torch.equal(mine, bias) != adapt
    kept = copy.deepcopy(method.teacher.state_dict())
    method.eval().day.classifier.bias.data += 1
    method(toy_batch())
    assert_same(kept, method.teacher.state_dict())


@pytest.mark.parametrize("paired", [True, False])
def test_half_of_the_classes_of_s_n_are_pasted_and_confidence_weighs(monkeypatch, paired):
    method, batch, seen = ccdistill.CCDistill(Own(), target_paired=paired), toy_batch(8), []
    _, s_n, t_d, t_n, label = batch.values()
    label[0], label[:, :4], label[1] = 7, 255, 255
    method.pseudo_threshold = threshold = method.eval().night(t_n)[1].softmax(1).amax(1).median().item()
    for images, plain in zip(method.train().teach(s_n, label, t_d, t_n), (t_d, t_n), strict=False):
        assert 0 <= images.min() <= images.max() <= 1 and (images == plain).float().mean() < 0.5  # strong
    monkeypatch.setattr(ccdistill, "STRONG", nn.Identity())
    new_d, new_n, y_d, y_n, w_d, w_n = lesson = method.teach(s_n, label, t_d, t_n)
    pasted = (new_n == s_n).all(1)
    assert torch.equal(new_d, t_d) and torch.equal(new_n, torch.where(pasted[:, None], s_n, t_n))
    for y, mine in zip(label, pasted, strict=True):
        classes = [c for c in y.unique().tolist() if c < 255]
        taken = [c for c in classes if mine[y == c].all()]  # whole classes, half of them
        assert len(taken) == math.ceil(len(classes) / 2) and mine.sum() == sum((y == c).sum() for c in taken)
    p_d, p_n = method.teacher["day"](t_d)[1], method.teacher["night"](t_n)[1]
    day, night = (pasted & False, y_d, w_d, p_d), (pasted, y_n, w_n, p_n, p_d if paired else None)
    for mine, y, w, *logits in (day, night):
        confident = losses.pseudo_labels(*logits, threshold=threshold) < 255
        share = confident.float().mean((1, 2), keepdim=True).expand(w.shape)
        close(w, torch.where(mine, 1.0, share))
        assert 0 < share.min() and share.max() < 1 and not y.requires_grad
        assert torch.equal(y, torch.where(mine, label, losses.pseudo_labels(*logits, threshold=0)))
    monkeypatch.setattr(method, "teach", lambda *_: lesson)  # the networks learn from it
    method.night.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method(batch)
    assert_same(seen, [s_n, new_n])
    own = lambda *a, real=losses.pseudo_labels, **b: seen.append(a) or real(*a, **b)
    monkeypatch.setattr(ccdistill, "pseudo_labels", own)  # without a teacher
    ccdistill.CCDistill(Own(), target_paired=paired, teacher=False)(batch)
    assert len(seen) == 4 and (seen[3][1] is seen[2][0]) == paired and seen[3][2] == 0.9


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    datasets.make_demo_city(root := tmp_path_factory.mktemp("city"), train=6, val=3)
    return root


@pytest.fixture
def tree(city, tmp_path):
    return Path(shutil.copytree(city, tmp_path / "city"))  # that a test may damage


def picture(path, size=(64, 48), mode="RGB", value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)
    return path


@pytest.mark.parametrize("kind, palette, stored, expected", [
    ("labelIds", 0, range(34), [OFFICIAL.index(v) if v in OFFICIAL else 255 for v in range(34)]),
    ("labelIds", 0, [255], [255]), ("labelIds", 0, [34], "value 34"), ("labelIds", 0, [254], "value 254"),
    ("LABELTRAINIDS", 0, [*range(19), 255], [*range(19), 255]), ("labelTrainIds", 0, [19], "value 19"),
    ("labelTrainIds", GREYS, range(3), [13, 0, 5]), ("labelTrainIds", [*GREYS[:8], 6], range(3), [0, 1, 2]),
    ("labelTrainIds", COLOURS, range(3), [0, 1, 2]), ("labelTrainIds", [0] * 9, range(3), [0, 1, 2]),
])  # fmt: skip
def test_labels_are_read_by_the_official_table_and_their_name(tmp_path, kind, palette, stored, expected):
    path, image = tmp_path / f"x_{kind}.png", Image.frombytes("L", (len(stored), 1), bytes(stored))
    if palette:
        image.putpalette(palette)
    image.save(path)
    read, told = lambda: list(datasets.open_label(path).tobytes()), isinstance(expected, str)
    fails(DataError, f"{path.name}: holds the {expected}", read) if told else assert_same(read(), expected)


@pytest.mark.parametrize("layout, split, image, label", [
    ("cityscapes", "val", "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png"),
    ("darkzurich", "val", "rgb_anon/val/night/G/G_rgb_anon.png", "gt/val/night/G/G_gt_labelTrainIds.png"),
    ("acdc", "val", "rgb_anon/night/val/G/G_rgb_anon.png", "gt/night/val/G/G_gt_labelTrainIds.png"),
    ("nighttime-driving", "test", "leftImg8bit/test/night/0_leftImg8bit.png",
     "gtCoarse_daytime_trainvaltest/test/night/0_gtCoarse_labelTrainIds.png"),
])  # fmt: skip
def test_layouts(checkpoint, tmp_path, capsys, layout, split, image, label):
    find = partial(datasets.samples, layout, split=split)
    for n, at, label_at, ending in zip("012", ("", "zip", "a"), ("", "b", "a"), (".png", ".png", ".PNG")):
        image_file = picture((tmp_path / n / at / image).with_suffix(ending))
        label_file = picture((tmp_path / n / label_at / label).with_suffix(ending), mode="L", value=8)
        picture(image_file.with_name(f"._{image_file.name}"))  # macOS leaves such
        (image_file.parent / "again").symlink_to(tmp_path / n)  # a loop
        assert find(tmp_path / n) == [(image_file, label_file)]
    matrix = evaluated(checkpoint, f"--{layout}", tmp_path / "0", "--split", split)["confusion_matrix"]
    warning = "none is above 18: if they are trainIds" if layout == "cityscapes" else "void are vegetation"
    assert sum(matrix[1 if layout == "cityscapes" else 8]) == 64 * 48 and warning in capsys.readouterr().out
    shutil.copytree(tmp_path / "2/a", tmp_path / "2/copy", symlinks=True)
    fails(DataError, "is there more than once: .*2/a.*2/copy", find, tmp_path / "2")
    fails(DataError, "no such folder .* holds", find, tmp_path / "p")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name, act, told", [
    (LABEL, Path.unlink, f"{IMAGE}: there is no label of this image"),
    (IMAGE, Path.unlink, f"{LABEL}: there is no image of this label"),
    (IMAGE, lambda p: (p.unlink(), p.symlink_to("gone")), f"{IMAGE}: a link to nothing"),
    (IMAGE, lambda p: p.rename(p.with_suffix(".jpg")), "_leftImg8bit.jpg: expected a name that ends"),
    (IMAGE, lambda p: p.with_name("gone").symlink_to("x"), "gone: a link to nothing"),
    (IMAGE, lambda p: p.symlink_to(shutil.move(p, p.parents[4] / "x.png")), ""),
    (IMAGE, lambda p: p.parent.symlink_to(shutil.move(p.parent, p.parents[4] / "x")), ""),
])  # fmt: skip
def test_a_part_of_the_data_that_is_missing_is_told(tree, split, name, act, told):
    find = partial(datasets.samples, "cityscapes", tree / "cityscapes", split)
    whole = find()
    act(min(tree.rglob(f"{split}/demo/{name}")))
    fails(DataError, told, find) if told else assert_same(find(), whole)


def test_targets(tree, monkeypatch):
    root, acdc, targets, real = tree / "darkzurich", tree / "acdc", datasets.targets, os.scandir
    paired = targets("darkzurich", root)
    assert len(paired[1]) == 6 and targets("darkzurich", root, "none") == paired
    nights = [picture(acdc / f"rgb_anon/night/train/GP/GP_{n}_rgb_anon.png") for n in (1, 2)]
    days = [picture(acdc / f"rgb_anon/night/train_ref/GP/GP_{n}_rgb_ref_anon.png") for n in (1, 2)]
    assert targets("acdc", acdc) == (days, nights)
    days[0].unlink()
    fails(DataError, "GP_1_rgb_ref_anon.png: no such file", targets, "acdc", acdc)
    for name in ("again", "and_again"):  # two links to one folder are two folders
        (root / "rgb_anon/train/night" / name).symlink_to(paired[1][0].parent)
    assert len(targets("darkzurich", root, "none")[1]) == 18
    monkeypatch.setattr(os, "scandir", lambda path: real("/none" if "again" in str(path) else path))
    fails(DataError, "cannot be listed", targets, "darkzurich", root, "none")


@pytest.mark.parametrize("content, wrong", [
    (LINE, ""), (f"\r\n {PAIR[0]} , {PAIR[1]} \r\n  \r\n", ""), ("\n", "no pair"), (PAIR[0], "line 1"),
    (f"{LINE},x", "line 1"), (",".join(PAIR[::-1]), "line 1"), (f"night,day\n{LINE}", "line 1"),
    (f"{LINE}\n{PAIR[0]},train/day/x", "line 2"), ("\udcff", "line 1"),
])  # fmt: skip
def test_pair_lists(city, tmp_path, content, wrong):
    (table := tmp_path / "mine.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    read = partial(datasets.targets, "darkzurich", city / "darkzurich", table)
    expected = tuple([city / f"darkzurich/rgb_anon/{stem}_rgb_anon.png"] for stem in PAIR[::-1])
    fails(DataError, f"mine.csv: {wrong}", read) if wrong else assert_same(read(), expected)


def redraw(change=lambda image: image, kind="PNG", **options):
    return lambda path: change(Image.open(path).copy()).save(path, format=kind, **options)


def long_text(path):
    (info := PngImagePlugin.PngInfo()).add_text("note", "x" * (2**26 + 1), zip=True)
    redraw(pnginfo=info)(path)


def four_bits(path):  # greys, which Pillow spreads over 0 to 255
    redraw(lambda image: image.convert("L").convert("P"), bits=4)(path)
    head = (png := path.read_bytes())[12:25] + b"\0" + png[26:29]  # that its numbers are no indices
    path.write_bytes(png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:])


@pytest.mark.parametrize("survives, act", [
    ("", lambda path: os.truncate(path, 999)), ("", lambda path: os.truncate(path, 0)), ("", Path.unlink),
    ("", lambda path: path.write_bytes(path.read_bytes()[:999] + path.read_bytes()[1009:])),
    ("", lambda path: path.write_text("<html>")), ("", lambda path: (path.unlink(), path.mkdir())),
    ("", redraw(lambda i: Image.new("I;16", i.size))), ("", redraw(lambda i: i.convert("CMYK"), "JPEG")),
    ("", redraw(kind="TIFF")), ("image", redraw(kind="JPEG")), ("image", redraw(lambda i: i.convert("RGB"))),
    ("image", redraw(lambda i: i.point(lambda _: 99))), ("image", four_bits), ("image label", long_text),
    ("image", redraw(kind="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)),
    ("image label", redraw(icc_profile=bytes(2**21))),
])  # fmt: skip
def test_every_damage_is_told_in_one_line_and_metadata_is_none(city, tmp_path, survives, act):
    for kind, name, read in (("image", IMAGE, datasets.open_image), ("label", LABEL, datasets.open_label)):
        act(path := Path(shutil.copy(min(city.rglob(name)), tmp_path)))
        told = name + (".*mode L, 4 bits" if act is four_bits else "")
        read(path) if kind in survives else fails(DataError, told, read, path)


def test_a_crop_cuts_image_and_label_alike():
    gradient, rng, ends = Image.frombytes("L", (200, 100), bytes(range(200)) * 100), random.Random(0), []
    for _ in range(40):
        cut = datasets.random_crop((200, 100), (40, 60), (0.5, 1.0), rng)
        image, label = cut(gradient.convert("RGB")), cut(gradient, Image.NEAREST)
        assert (image[0, :, 3:-3].int() - label[0, :, 3:-3].int()).abs().max() <= 2
        ends.append(int(label[0, 0, 0]) - int(label[0, 0, -1]))
    assert min(ends) < -100 and max(ends) > 100 and min(map(abs, ends)) < 65  # flips and scales
    for size, scale in (((200, 100), (99, 99)), ((20, 10), (0.5, 1))):  # larger and smaller than the image
        assert datasets.random_crop(size, (40, 60), scale, rng)(gradient.resize(size)).shape == (1, 40, 60)


def stream_of(city, paired=True, **options):
    source = datasets.samples("cityscapes", city / "cityscapes", "train")
    days, nights = datasets.targets("darkzurich", city / "darkzurich", "corresp" if paired else "none")
    return datasets.FourDomains(source, days, nights, (64, 96), paired, length=12, **options)


@pytest.mark.parametrize("paired", [True, False])
def test_an_item_depends_on_the_seed_and_its_number_alone(city, monkeypatch, paired):
    one, two = stream_of(city, paired), stream_of(city, paired)
    items = [two[k] for k in reversed(range(12))][::-1]
    monkeypatch.setattr(torch, "set_num_threads", None)  # decoding threads leave it alone
    for workers in (0, 1, 3):
        assert_same(items, list(datasets.ahead(one.__getitem__, range(12), workers)))
    assert sorted(one.pick("night", one.nights, k) for k in range(6, 12)) == [*range(6)]  # a pass takes all
    seen, real = [], datasets.open_image
    monkeypatch.setattr(datasets, "open_image", lambda path: seen.append(path.name) or real(path))
    resting, made = (stream_of(city, paired, targets_from=2) for _ in range(2))
    made.synthetic = datasets.synthetic_nights(city / "cityscapes", made.source)  # instead of a style
    for k, stream, names in ((0, resting, ["night"]), (0, made, []), (2, resting, ["day", "night"])):
        item = seen.clear() or stream[k]
        assert_same(item.pop("source_night", None), item["source_day"] if stream is made else None)
        assert_same(item, {name: items[k][name] for name in item})
        assert sorted(name.split("_")[1] for name in seen if "DEMO" in name) == names


@pytest.mark.parametrize("folder", ["ready", "DEMO_day", "gtFine/train"])
def test_partners_of_other_sizes_and_missing_ready_made_nights_are_told(tree, folder):
    stream, ready = stream_of(tree), tree / "ready"
    shutil.copytree(tree / "cityscapes/leftImg8bit", ready / "leftImg8bit")
    stream.synthetic = datasets.synthetic_nights(ready, stream.source)
    for path in [p for p in tree.rglob("*.png") if folder in str(p)]:
        Image.open(path).resize((255, 128), Image.NEAREST).save(path)
    fails(DataError, r".png: width and height are \(255, 128\), but", stream.__getitem__, 0)
    stream.synthetic[0].unlink()
    fails(DataError, "_leftImg8bit.png: no such file", datasets.synthetic_nights, ready, stream.source)


def arguments(city, out, *more):
    tiny = "--crop", 32, 64, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--weights", "none"
    data = "--cityscapes", city / "cityscapes", "--darkzurich", city / "darkzurich"
    return [str(part) for part in (*data, "--out", out, *tiny, *more)]


def log_of(out):  # the rows, which are the checkpoint's steps
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert len(rows) == models.read_file(out / "last.pt")["step"]
    return rows


def trained(city, out, *more):
    train.main(arguments(city, out, *more))
    return log_of(out)


@pytest.fixture(scope="session")
def checkpoint(city, tmp_path_factory):
    trained(city, out := tmp_path_factory.mktemp("trained") / "run", "--steps", 2)
    return out / "last.pt"


def evaluated(checkpoint, *more):
    (scores := checkpoint.with_name("scores.json")).unlink(missing_ok=True)
    evaluate.main([str(p) for p in ("--checkpoint", checkpoint, "--json", scores, "--device", "cpu", *more)])
    return json.loads(scores.read_text())


def test_scores_are_counted_pixel_by_pixel_and_views_averaged():
    label, prediction = torch.randint(0, 6, (20, 30)), torch.randint(2, 8, (20, 30))
    label[0], counted = 255, [[0] * 19 for _ in range(19)]
    for a, b in zip(label[1:].flatten().tolist(), prediction[1:].flatten().tolist(), strict=True):
        counted[a][b] += 1
    hits = [counted[c][c] for c in range(8)]
    iou = [100 * hits[c] / (sum(counted[c]) + sum(row[c] for row in counted) - hits[c]) for c in range(8)]
    result = evaluate.scores(evaluate.count(label.byte(), prediction, 19))
    assert result["confusion_matrix"] == counted and "bus                   n/a" in evaluate.table(result)
    assert [*result["iou"].values()] == pytest.approx([*iou, *[math.nan] * 11], nan_ok=True)
    means = {"miou": sum(iou) / 8, "miou_present": sum(iou[:6]) / 6, "pixel_accuracy": sum(hits) / 5.7}
    assert {name: result[name] for name in means} == pytest.approx(means)
    model, images = lambda images: (None, images[:, :2]), torch.rand(1, 3, 70, 90)
    whole, flipped = (evaluate.probabilities(model, images, flip=flip) for flip in (False, True))
    close(whole, images[:, :2].softmax(1))
    close(flipped, whole)  # flipped back
    half, resize = evaluate.probabilities(model, images, (0.5,)), nn.functional.interpolate
    small = resize(images[:, :2], (35, 45), mode="bilinear", antialias=True).softmax(1)
    close(half, resize(small, (70, 90), mode="bilinear"))
    close(evaluate.probabilities(model, images, (0.5, 1.0), flip=True), (half + whole) / 2, 1e-6)


@pytest.mark.parametrize("bad", [None, 0, 2, "nan"])
def test_an_evaluation_leaves_every_module_in_its_mode(city, checkpoint, bad):
    samples, (model, _) = datasets.samples("darkzurich", city / "darkzurich"), evaluate.load_model(checkpoint)
    model.train().backbone.bn1.eval()  # frozen
    modes, numbers = [module.training for module in model.modules()], count()
    model.classifier[4].bias.data[3] = math.nan if bad == "nan" else 0
    command = model, samples, "cpu", 1, lambda *_: 1 / 0 if next(numbers) == bad else None
    told, errors = "zero|DEMO_.*: the network puts out nan", (ZeroDivisionError, WeightsError)
    evaluate.evaluate(*command) if bad is None else fails(errors, told, evaluate.evaluate, *command)
    assert modes == [module.training for module in model.modules()]


def test_pictures(checkpoint, tmp_path):
    given, out, kinds = tmp_path / "in", tmp_path / "out", ("labelTrainIds", "labelIds", "color", "overlay")
    (turned := Image.Exif())[0x0112] = 6  # by 90 degrees: for all but a PNG
    for n, name in enumerate(("a.png", "b.webp", "c.PNG", "d.jpg", ".e.png")):
        picture(given / name, (40 + n, 30), value=(200, 30, 90), exif=turned)
    (given / "notes.txt").write_text("no picture")
    predict = partial(evaluated, checkpoint, "--out", out, "--images")
    predict(given)
    found = {str(path.relative_to(out)): Image.open(path) for path in out.rglob("*.png")}
    sizes = {"a": (40, 30), "b": (30, 41), "c": (42, 30), "d": (30, 43)}
    assert {n: i.size for n, i in found.items()} == {f"{k}/{n}.png": sizes[n] for k in kinds for n in sizes}
    pixels = [found[f"{kind}/a.png"].getpixel((5, 5)) for kind in kinds]
    assert datasets.CLASSES[pixels[0]][1:] == tuple(pixels[1:3])
    shutil.rmtree(out)
    predict(given, picture(tmp_path / "a.jpg"))  # a name that occurs twice
    assert len(list(out.rglob("*.png"))) == 20
    for wrong in (tmp_path / "typo.png", out):
        fails(DataError, f"{wrong.name}: no picture there", datasets.pictures, [wrong])


@pytest.mark.parametrize("data, image, entries", [
    ("cityscapes", "leftImg8bit/test/berlin/b_{}_leftImg8bit.png", {"b_{}_leftImg8bit.png": "L"}),
    ("darkzurich", "rgb_anon/test/night/G/G_{}_rgb_anon.png", {
        "labelTrainIds/G_{}.png": "L", "labelTrainIds_invalid/G_{}.png": "L", "confidence/G_{}.png": "I;16"}),
])  # fmt: skip
def test_submissions(checkpoint, tmp_path, monkeypatch, data, image, entries):
    path = [picture(tmp_path / image.format(n), value=(9, 9, 40)) for n in (1, 2)][-1]
    pixels, (model, _) = datasets.load(datasets.Sample(path))["image"], evaluate.load_model(checkpoint)
    submit = partial(evaluated, checkpoint, f"--{data}", tmp_path, "--submit", tmp_path / "x.zip")
    fails(DataError, r"_1_.*: the server wants \(\d+, \d+\), not \(64, 48\)", submit)
    monkeypatch.setitem(evaluate.SIZES, data, (64, 48))
    submit()
    with zipfile.ZipFile(tmp_path / "x.zip") as packed:
        found = {name: Image.open(packed.open(name)).copy() for name in packed.namelist()}
    assert {n: i.mode for n, i in found.items()} == {e.format(n): entries[e] for e in entries for n in (1, 2)}
    confidence, best = (x[20, 30].item() for x in evaluate.probabilities(model, pixels[None] / 255)[0].max(0))
    values = {"cityscapes": [OFFICIAL[best]], "darkzurich": [best, best, 65535 * confidence]}[data]
    assert [found[entry.format(2)].getpixel((30, 20)) for entry in entries] == pytest.approx(values, abs=0.9)
    (tmp_path / "x.zip").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", lambda *_: None)
        fails(DataError, "entries and images differ", submit)
    picture(path.parent.parent / "H" / path.name)
    fails(DataError, "two images would have one name", submit)  # and no file gets its name
    assert not list(tmp_path.glob("x.zip*"))


def test_train_save_evaluate(city, tmp_path, capsys):
    out, data = tmp_path / "run", ("--darkzurich", city / "darkzurich")
    more = "--steps", 20, "--lr", 1e-3, "--eval-every", 10, "--crop", 64, 96, "--log-every", 5
    rows, printed = trained(city, out, *more), capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["args.json", "last.pt", "log.csv", "night.pt", "samples.png"]
    assert [n for n, row in enumerate(rows) if row["miou"]] == [9, 19]
    assert [n for n, row in enumerate(rows) if row["pseudo"]] == [*range(5, 20)]  # they join after a quarter
    assert sum(float(r["seg_day"]) for r in rows[-5:]) < 0.8 * sum(float(r["seg_day"]) for r in rows[:5])
    assert all(part in printed for part in ("step 5/20", "left", "steps/s", "images/s", "MB", *rows[-1]))
    assert Image.open(out / "samples.png").size == (3 * 258 + 2, 3 * 130 + 2) and "warning" not in printed
    night, last = (evaluated(out / name, *data) for name in ("night.pt", "last.pt"))
    assert night["miou"] == last["miou"] == pytest.approx(float(rows[-1]["miou"]))
    assert night["miou"] != evaluated(out / "last.pt", *data, "--model", "day")["miou"]
    assert_same(models.DeepLab(weights=out / "last.pt").state_dict(), models.read_file(out / "night.pt"))


def test_every_switch_does_what_it_says(city, tmp_path):
    switches = {  # and the terms that are gone
        "": "", "--style-weight 0": "style", "--pseudo-weight 0": "pseudo", "--night-weights separate": "",
        "--content-weight 0": "content inherent illumination js", f"--synthetic-night {city}/cityscapes": "",
        "--js-weight 0": "", "--no-projection": "", "--batch-norm joint": "", "--night-style fda": "",
        "--seed 1": "", "--pairs none": "", "--scale 1 1": "", "--amp bf16": "", "--no-teacher": "",
        "--day-only": "seg_night pseudo content style inherent illumination js", "--night-weights shared": "",
        "--adapt-from 1": "pseudo content style inherent illumination js", "--night-statistics source": "",
        "--day-only --night-statistics target": "seg_night pseudo content style inherent illumination js",
    }  # fmt: skip
    totals, start = set(), ["--steps", 2, "--adapt-from", 0, "--batch-size", 1, "--pseudo-threshold", 0]
    for n, (switch, gone) in enumerate(switches.items()):
        row = trained(city, tmp_path / str(n), *start, *switch.split())[-1]
        assert [name for name in switches["--day-only"].split() if not row.get(name)] == gone.split(), switch
        state = models.read_file(tmp_path / f"{n}/night.pt")
        totals.add((row["total"], state["backbone.bn1.running_mean"].sum().item()))
    assert len(totals) == len(switches)  # none is without effect


def test_a_term_that_is_added_is_logged_and_nan_stops_the_run(city, tmp_path, monkeypatch, capsys):
    real, extra = ccdistill.CCDistill.forward, {"extra": torch.tensor(7.0)}
    forward = lambda self, batch, adapt: real(self, batch, adapt) | (extra if adapt else {})
    monkeypatch.setattr(ccdistill.CCDistill, "forward", forward)
    more = "--steps", 4, "--adapt-from", 0.5, "--log-every", 1
    found = [row["extra"] for row in trained(city, tmp_path / "run", *more)]
    assert found == ["", "", "7.0", "7.0"] and "extra 7" in capsys.readouterr().out
    extra["extra"] += math.nan
    told = "step 3 is not finite .*'extra': nan.*a lower --lr"
    fails(FloatingPointError, told, trained, city, tmp_path / "nan", *more)


def assert_same_runs(one, other):
    assert_same(*(models.read_file(out / "last.pt") | {"args": ""} for out in (one, other)))
    for name in ("night.pt", "log.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("end, more", [
    ("SIGINT", ""), ("SIGTERM", "--night-weights separate --workers 1"), ("SIGHUP", "--day-only"),
    ("full disk", "--night-weights shared --no-teacher"), ("crash", "--batch-norm joint"), ("late crash", ""),
])  # fmt: skip
def test_resume_is_exact_however_a_run_ended(city, tmp_path, monkeypatch, capsys, end, more):
    whole, cut, more = tmp_path / "whole", tmp_path / "cut", [*more.split(), "--steps", 6, "--eval-every", 3]
    trained(city, whole, *more)
    last = {"full disk": 0, "late crash": 6}.get(end, 3)

    def replace(aside, path, real=Path.replace):  # ends the run when a step is saved, but not yet validated
        if end == "full disk" and path.exists():
            raise OSError(28, end)
        real(aside, path)
        if path.name == "last.pt" and models.read_file(path)["step"] == last and not train.STOPPED:
            signal.raise_signal(signal.Signals[end]) if "SIG" in end else 1 / 0

    with monkeypatch.context() as patch, pytest.raises((ZeroDivisionError, SystemExit, OSError)) as stopped:
        patch.setattr(Path, "replace", replace)
        trained(city, cut, *more)
    if "SIG" in end:
        assert stopped.value.code == 128 + signal.Signals[end] and len(log_of(cut)) == 4
        assert "the same command with --resume goes on" in capsys.readouterr().out
    assert ("written (full disk)" in str(stopped.value)) == (end == "full disk") and not [*cut.glob("*.tmp")]
    train.STOPPED.clear()
    for _ in range(2):
        trained(city, cut, *more, "--resume")
        assert_same_runs(whole, cut)


def test_killed_at_any_moment_it_ends_with_the_same_bits(city, tmp_path):
    (kills, steps), whole, out = (25, 200) if FULL else (2, 12), tmp_path / "whole", tmp_path / "out"
    more = ["--steps", steps, "--eval-every", 2, "--workers", 1, "--log-every", 1, "--resume"]
    trained(city, whole, *more)  # begins where there is nothing
    for _ in range(kills):
        process = subprocess.Popen([*TRAIN, *arguments(city, out, *more)], **PIPES)
        assert any(line.startswith("step") for line in process.stdout) or not process.wait()
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.wait()
    trained(city, out, *more)
    assert_same_runs(whole, out)


@pytest.mark.parametrize("how, name", [("unread", "SIGHUP"), ("torchrun", "SIGTERM"), ("demo", "SIGINT")])
def test_a_signal_ends_the_run_with_its_step_saved(city, tmp_path, how, name):
    out, number, launch = tmp_path / "day-only", getattr(signal, name), TWO if how == "torchrun" else []
    command = [*TRAIN, *arguments(city, out, "--steps", 9999, "--log-every", 1, "--eval-every", 2)]
    if how == "demo":
        command = [*TRAIN, "--demo", "--out", tmp_path, "--log-every", "1", "--device", "cpu"]
        (tmp_path / "city").symlink_to(city)
    process = subprocess.Popen([*launch, *command], **PIPES, start_new_session=True)
    assert any(line.startswith("step 1/") for line in process.stdout), process.stderr.read()
    if how == "unread":  # as from a terminal that was closed: nothing can be printed any more
        process.stdout = process.stdout.close() or time.sleep(2)
    process.send_signal(number) if how == "torchrun" else os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert len(log_of(out)) > (2 if how == "unread" else 0) and not (tmp_path / "ccdistill").exists()
    assert process.returncode in (1, 120, 128 + number) and "goes on" in (printed or "goes on")
    assert how != "demo" or (process.returncode == 130 and not errors)


def test_an_out_belongs_to_one_run(city, checkpoint, tmp_path):
    start = partial(trained, city, checkpoint.parent, "--steps", 2)
    fails(DataError, "holds args.json: add --resume", start)
    for more, told in (
        ("--steps 3", "steps 2 there, 3 here"), ("--lr 1 --seed 4", "lr 0.0005 there, 1.0 here, seed 0"),
        ("--crop 64 64", r"\[32, 64\] there"), ("--pairs none", "paired"), ("--no-teacher", "teacher"),
    ):  # fmt: skip
        fails(DataError, f"args.json: is of another run: .*{told}", start, "--resume", *more.split())
    start("--resume", "--cityscapes", shutil.copytree(city, tmp_path / "new") / "cityscapes", "--workers", 2)
    for name, more in product(("log.csv", "last.pt"), ([], ["--resume"])):
        (out := tmp_path / f"{name} {more}").mkdir()
        (out / name).write_text("somebody's")
        fails(DataError, f"holds {name}", trained, city, out, *more)
        assert (out / name).read_text() == "somebody's"


def test_a_damaged_file_ends_training_with_the_step_saved(tree, tmp_path):
    number = stream_of(tree).pick("source", range(6), 5)  # the second process's of step 3
    os.truncate(damaged := sorted(tree.rglob("train/demo/*_leftImg8bit.png"))[number], 999)
    told, one, two = f"{damaged.name}: not a readable image", tmp_path / "one", tmp_path / "two"
    fails(DataError, told, trained, tree, one, "--steps", 9, "--workers", 1)
    command = [*TWO, *TRAIN, *arguments(tree, two, "--steps", 9, "--batch-size", 1)]
    done = subprocess.run(command, **PIPES, check=False)
    assert done.returncode and done.stderr.count(told) == 1 and len(log_of(one)) == len(log_of(two)) == 2


@pytest.mark.parametrize("command, told", [
    ("train.py", "give --cityscapes DIR"), ("train.py --demo --cityscapes x", "--demo draws its own"),
    ("train.py --cityscapes x --darkzurich x", "x/leftImg8bit/train: no such folder"),
    ("train.py --cityscapes CITY/cityscapes --day-only --weights no.pth", "no.pth: not a readable file"),
    ("train.py --demo --night-weights shared --night-statistics target", "norms of M_n's own"),
    ("train.py --demo --adapt-from 25", "0 to 1"),
    ("evaluate.py --images x", "give --out DIR"), ("evaluate.py --acdc x --submit y", "for the test split"),
    ("evaluate.py --acdc x --json CITY", "exists: give"), ("evaluate.py --acdc x --out CITY", "exists: give"),
    ("evaluate.py --darkzurich CITY/darkzurich", "no.pt: not a readable file of tensors (No such file"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_status_2(city, tmp_path, monkeypatch, capsys, command, told):
    program, *more = command.replace("CITY", str(city)).split()
    more += ["--out", str(tmp_path / "run")] if program == "train.py" else ["--checkpoint", "no.pt"]
    monkeypatch.setattr(sys, "argv", [program, *more])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(HERE / program), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{program}: error: ") and told in line


def test_training_needs_no_labelled_nights_and_bears_void_ones_and_no_picture(tree, tmp_path, capsys):
    for label in (tree / "darkzurich/gt/val").rglob("*.png"):
        picture(label, (256, 128), "L", 255)
    (tmp_path / "void/samples.png").mkdir(parents=True)  # as if another program held it
    trained(tree, tmp_path / "void", "--steps", 3, "--eval-every", 1)
    printed = capsys.readouterr().out
    assert "every pixel is void" in printed and "samples.png'; the run goes on" in printed
    shutil.rmtree(tree / "darkzurich/gt")
    trained(tree, tmp_path / "run", "--steps", 1, "--pairs", "none")
    assert "0 labelled nights" in capsys.readouterr().out and (tmp_path / "run/night.pt").exists()


@pytest.mark.parametrize("ablation", [
    "", "--content-weight 0", "--style-weight 0 --content-weight 0", "--no-projection", "--pseudo-weight 0",
    "--no-teacher", "--batch-norm joint", "--night-weights shared", "--day-only", "--adapt-from 0.5",
][: None if FULL else 2])  # fmt: skip
def test_two_processes_are_one_training(city, tmp_path, ablation):
    more = ["--lr", 1e-3, "--steps", 1, "--adapt-from", 0, *ablation.split()]
    command = [*TWO, *TRAIN, *arguments(city, tmp_path / "two", *more, "--steps", 3)]
    done = subprocess.run(command, **PIPES, check=False)
    assert done.returncode == 0 and done.stdout.count("at night:") == 1, done.stderr  # one alone speaks
    args = train.parse_args(arguments(city, tmp_path / "hand", *more))
    (stream, *_), (method, _), sums = train.load_data(args), train.build(args), {}
    stream.length, start = 4, copy.deepcopy(method.train().state_dict())
    for rank, batch in enumerate(train.batches(stream, 0, args)):  # step 1 by hand, gradients add up
        method.load_state_dict(start)
        torch.manual_seed(random.Random(f"{args.seed} 1 {rank}").getrandbits(63))
        terms = method(batch, adapt=args.adapt_from == 0)
        terms["total"].div(2).backward()
        sums = {name: sums.get(name, 0) + term.item() / 2 for name, term in terms.items()}
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    sums["gradient"], row = nn.utils.get_total_norm(gradients).item(), log_of(tmp_path / "two")[0]
    assert {name: float(row[name]) for name in sums} == pytest.approx(sums, rel=1e-4, abs=1e-5)


def test_compiled_networks_compute_the_same_and_resume(city, tmp_path, monkeypatch):
    seen, real = [], nn.Module.compile  # without the minute that generating code takes, but in the long count
    other, step = ({}, 0) if FULL and shutil.which("c++") else ({"backend": "aot_eager"}, -1)  # code rounds
    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: seen.append(m) or real(m, **(other or how)))
    eager, fast = (trained(city, tmp_path / f"{n}", "--steps", 3, *["--compile"] * n)[step] for n in (0, 1))
    assert len(seen) == 4 and float(eager["total"]) == pytest.approx(float(fast["total"]), rel=1e-5)
    trained(city, tmp_path / "1", "--steps", 3, "--resume")  # without it, which is the machine's


def test_the_demo_compares_day_only_with_the_method_and_goes_on(city, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "make_demo_city", partial(datasets.make_demo_city, train=4, val=2))
    for trains in (True, False):  # the second time nothing is trained again
        train.main(["--demo", "--steps", "2", "--out", str(tmp_path), "--workers", "0", "--device", "cpu"])
        printed = capsys.readouterr().out
        assert "day-only  ccdistill" in printed and ("step 2/2" in printed) == trains
    assert Image.open(tmp_path / "comparison.png").width == 4 * 258 + 2
