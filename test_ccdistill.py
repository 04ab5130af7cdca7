"""pytest. In the order in which the library computes: the equations, a night's label, Trans, one step, networks
and weights, files, scores and submissions, whole runs. An equation stands twice in this project: fast in
losses.py, and slowly here, entry by entry, as the figure draws it."""

import copy
import csv
import functools
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
import urllib.error
import zipfile
import zlib
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
from datasets import DataError
from models import WeightsError

torch.set_num_threads(1)  # tiny tensors: a second thread waits more than it works


def close(found, expected, error=1e-7):
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


def fails(error, message, function, *args, **options):
    """The call raises this error, with one line that matches the message."""
    with pytest.raises(error, match=message) as raised:
        function(*args, **options)
    assert "\n" not in str(raised.value)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- the equations


def cor(a, b):
    """Cor(a, b): the cosine of each sample with each, those of a first."""
    samples = [*a, *b]
    graph = torch.empty(len(samples), len(samples), dtype=a.dtype)
    for i, x in enumerate(samples):
        for j, y in enumerate(samples):
            graph[i, j] = (x * y).sum() / (x.norm() * y.norm())
    return graph


def gram(features):
    """G: how often two channels are high at one position, for each pair of channels."""
    batch, channels, height, width = features.shape
    matrix = torch.zeros(batch, channels, channels, dtype=features.dtype)
    for n in range(batch):
        for y in range(height):
            for x in range(width):
                values = features[n, :, y, x]
                for i in range(channels):
                    for j in range(channels):
                        matrix[n, i, j] += values[i] * values[j] / (height * width)
    return matrix


def divergence(a, b):
    """D: Jensen-Shannon, of the softmax of two embeddings at length 1 over a temperature of 0.1."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        p = (x / x.norm() / 0.1).softmax(0)
        q = (y / y.norm() / 0.1).softmax(0)
        for p_k, q_k in zip(p, q, strict=True):
            middle = (p_k + q_k) / 2
            total += (p_k * math.log(p_k / middle) + q_k * math.log(q_k / middle)) / 2
    return total / len(a)


def mse(graph, other, paired=True):
    """The mean squared difference of two graphs. Unpaired, of the averages over different pictures, for each
    pair of domains."""
    batch = len(graph) // 2
    if paired:
        return ((graph - other) ** 2).mean()
    total = 0.0
    for first in (0, batch):
        for second in (0, batch):
            difference = 0.0
            for i in range(batch):
                for j in range(batch):
                    if i != j:
                        difference += graph[first + i, second + j] - other[first + i, second + j]
            total += (difference / max(1, batch * (batch - 1))) ** 2 / 4
    return torch.as_tensor(total, dtype=graph.dtype)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_content_distillation(batch, paired):
    s_d, s_n, t_d, t_n = torch.randn(4, batch, 5, dtype=torch.float64)
    inherent = mse(cor(s_d, t_d), cor(s_n, t_n), paired)
    illumination = mse(cor(s_d, s_n), cor(t_d, t_n), paired)
    js = divergence(s_d, s_n) - divergence(s_d, t_n) - divergence(s_n, t_d)
    if paired:
        js += divergence(t_d, t_n)

    close(losses.correlation(s_d, s_n), cor(s_d, s_n))
    parts = {}
    content = functools.partial(losses.content_distill, js_weight=0.5, target_paired=paired, parts=parts)
    close(content(s_d, s_n, t_d, t_n), inherent + illumination + 0.5 * js)
    close(parts, {"inherent": inherent, "illumination": illumination, "js": js})
    embeddings = [e.clone().requires_grad_() for e in (s_d, s_n, t_d, t_n)]
    assert torch.autograd.gradcheck(content, embeddings)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_style_distillation(batch, paired):
    sizes = (4, 5), (2, 2), (1, 7), (3, 3)  # which may differ between domains
    s_d, s_n, t_d, t_n = [torch.randn(batch, 3, *size, dtype=torch.float64) for size in sizes]
    expected = mse(cor(gram(s_d), gram(s_n)), cor(gram(t_d), gram(t_n)), paired)
    style = functools.partial(losses.style_distill, target_paired=paired)
    close(losses.gram(s_d), gram(s_d))
    close(style(s_d, s_n, t_d, t_n), expected)
    small = torch.randn(4, batch, 3, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(style, [features.requires_grad_() for features in small])


def test_place_distillation():
    s_d, s_n = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    t_d, t_n = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    counted = torch.rand(2, 2, 4) < 0.5
    squares = []
    for n, y, x in counted.nonzero().tolist():
        light = [cor(s_d[n, :, v, u][None], s_n[n, :, v, u][None])[0, 1] for v in range(5) for u in range(4)]
        change = cor(t_d[n, :, y, x][None], t_n[n, :, y, x][None])[0, 1]
        squares.append((change - sum(light) / 20) ** 2)
    place = functools.partial(losses.place_distill, s_d.requires_grad_(), s_n)
    close(place(t_d, t_n, counted=counted), sum(squares) / len(squares))
    close(place(t_d, t_n), place(t_d, t_n, counted=torch.ones_like(counted)))
    assert torch.autograd.gradcheck(place, [t_d, t_n])
    nothing = place(t_d, t_n, counted=torch.zeros_like(counted))
    (nothing + place(t_d, t_n)).backward()
    assert nothing == 0 and s_d.grad is None  # what is known does not move


@pytest.mark.parametrize("teacher", [True, False])
def test_places_of_pairs_are_distilled_but_not_what_is_pasted(teacher, monkeypatch):
    calls = []
    real = losses.place_distill
    monkeypatch.setattr(losses, "place_distill", lambda *maps, counted: calls.append(counted) or real(*maps))
    assert "place" not in ccdistill.CCDistill(Own(), target_paired=False, teacher=teacher)(toy_batch())
    method = ccdistill.CCDistill(Own(), teacher=teacher)
    batch = toy_batch()
    batch["source_label"].fill_(255)
    batch["source_label"][0, :4, :8] = 1  # the only class: it is pasted
    assert method(batch)["place"] > 0 and len(calls) == 1
    if teacher:
        features, _ = method.day(batch["target_day"])
        expected = torch.ones(2, *features.shape[2:], dtype=torch.bool)
        scale = 16 // features.shape[2]
        expected[0, : 4 // scale, : 8 // scale] = False
        assert torch.equal(calls[0], expected)
    else:
        assert calls == [None]


def test_segmentation_loss():
    logits = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 4, 4, dtype=torch.float64)
    labels = torch.randint(5, (2, 4, 4))
    labels[0, 1:] = 255
    plain = weighted = 0.0
    for n, y, x in (labels < 255).nonzero().tolist():
        probability = logits[n, :, y, x].softmax(0)[labels[n, y, x]]
        plain += -probability.log() / 20
        weighted += -probability.log() * weights[n, y, x] / 20
    close(losses.segmentation_loss(logits, labels), plain)
    close(losses.segmentation_loss(logits, labels, weights), weighted)
    nothing = losses.segmentation_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


def test_a_zero_sample_correlates_with_nothing_and_has_no_gradient():
    features = torch.zeros(2, 3, 4, 4)
    features[0] = 1
    features.requires_grad_()
    others = torch.randn(3, 2, 3, 4, 4)
    graph = losses.correlation(features, others[0])
    (losses.style_distill(features, *others) + (graph * torch.rand(4, 4)).sum()).backward()
    assert graph[1].abs().max() == graph[:, 1].abs().max() == 0
    assert features.grad.isfinite().all()
    assert features.grad[1].abs().max() == 0 and features.grad[0].abs().max() > 0


@pytest.mark.parametrize("scale", [1e9, 1e-9])
def test_scale_does_not_matter(scale):  # although squares of Gram entries leave float32's range
    maps = torch.randn(4, 2, 3, 4, 4)
    close(losses.style_distill(*maps * scale), losses.style_distill(*maps), 1e-5)


def test_the_largest_divergence_is_log_2():
    far = 1e4 * torch.eye(2)
    assert losses.js_divergence(far, far.flip(0)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_also_under_autocast(dtype, scale):
    embeddings = (scale * torch.randn(4, 3, 19)).to(dtype)
    maps = (scale * torch.randn(4, 3, 8, 6, 6)).to(dtype)
    labels = torch.randint(0, 8, (3, 6, 6))
    for function, inputs in (
        (losses.content_distill, embeddings),
        (losses.style_distill, maps),
        (losses.place_distill, maps),
        (losses.correlation, embeddings[:2]),
        (losses.gram, maps[:1]),
        (losses.js_divergence, embeddings[:2]),
        (functools.partial(losses.pseudo_labels, num_static=3), maps[:2]),
        (functools.partial(losses.segmentation_loss, labels=labels), maps[:1]),
    ):
        expected = function(*inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*inputs)
            assert torch.equal(function(*inputs.float()), expected)
        assert found.dtype == expected.dtype and found.isfinite().all() and torch.equal(found, expected)


def test_losses_need_torch_alone():
    code = "import sys; exec(open(sys.argv[1]).read()); print(float(content_distill(*[torch.eye(2)] * 4)),"
    code += "{'torchvision', 'PIL'} & {*sys.modules})"
    command = [sys.executable, "-c", code, Path(losses.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout == "0.0 set()\n", done.stderr


# ---------------------------------------------------------------- a night's label


def logits_of(*pixels):
    """Logits (1, K, 1, N) of N pixels, from the probabilities of their K classes."""
    return torch.tensor(pixels).log().T[None, :, None]


def test_a_confident_prediction_is_a_label():
    night = logits_of([0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.02, 0.93], [0.9, 0.05, 0.05])
    assert losses.pseudo_labels(night, num_static=2).flatten().tolist() == [0, 255, 2, 0]  # 0.9 reaches 0.9


def test_by_day_the_same_place_has_a_say_in_what_stands_still():
    night = logits_of([0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.02, 0.93], [0.9, 0.05, 0.05])
    day = logits_of([0.1, 0.8, 0.1], [0.01, 0.98, 0.01], [0.98, 0.01, 0.01], [0.9, 0.05, 0.05])
    # (.95 + .1) / 2 < .79; (.6 + .98) / 2 = .79; the third class moves, so the night decides alone; .9
    assert losses.pseudo_labels(night, day, 0.79, num_static=2).flatten().tolist() == [255, 1, 2, 0]
    assert losses.pseudo_labels(night, day, 0, num_static=0).equal(night.argmax(1))


def test_a_person_does_not_become_the_pavement_of_the_day():
    night, day = [0.1 / 17] * 19, [0.01 / 18] * 19  # 11 of Cityscapes' 19 classes stand still
    night[11], night[1], day[1] = 0.59, 0.31, 0.99
    assert losses.pseudo_labels(logits_of(night), logits_of(day), 0.58).item() == 11
    assert losses.pseudo_labels(logits_of(night), logits_of(day), 0.6).item() == 255


# ---------------------------------------------------------------- Trans


@pytest.fixture
def day_and_night():
    day = torch.rand(20, 3, 120, 160) * 0.3 + 0.35
    night = torch.rand(20, 3, 120, 160) * 0.3 + 0.3  # so close that nothing is clipped
    return day, night


def test_color_brings_means_and_deviations(day_and_night):
    day, night = day_and_night
    styled = ccdistill.night_style(day, night, "color")
    close(styled.mean((2, 3)), night.mean((2, 3)), 1e-4)
    close(styled.std((2, 3)), night.std((2, 3)), 1e-4)


def test_histogram_brings_the_nights_values_in_the_days_order(day_and_night):
    day, night = [images.flatten(0, 1).flatten(1) for images in day_and_night]
    styled = ccdistill.night_style(*day_and_night, "histogram").flatten(0, 1).flatten(1)
    assert (styled.gather(1, day.argsort()) - night.sort().values).abs().max() < 0.01


def test_fda_brings_the_lowest_frequencies(day_and_night):
    styled = torch.fft.fft2(ccdistill.night_style(*day_and_night, "fda"))
    day, night = [torch.fft.fft2(images) for images in day_and_night]
    for y in range(-5, 6):
        for x in range(-5, 6):
            source = night if abs(y) <= 1 and abs(x) <= 1 else day  # beta 0.01 of 120: frequencies up to 1
            close(styled[..., y, x].abs(), source[..., y, x].abs(), 1e-2)
    close(styled[0, :, 1, 1].angle(), day[0, :, 1, 1].angle(), 1e-3)


def test_random_draws_one_of_two_for_each_image(day_and_night):
    mixed = ccdistill.night_style(*day_and_night, "random")
    is_color = (mixed == ccdistill.night_style(*day_and_night, "color")).flatten(1).all(1)
    is_histogram = (mixed == ccdistill.night_style(*day_and_night, "histogram")).flatten(1).all(1)
    assert (is_color ^ is_histogram).all() and 2 < is_color.sum() < 18


@pytest.mark.parametrize("style", ccdistill.NIGHT_STYLES)
def test_styles_stay_in_range_and_bear_what_resizing_adds(style, day_and_night):
    day, night = day_and_night
    styled = ccdistill.night_style(day + 0.5, night[..., 1:] - 0.31, style)  # up to 1.15, down to -0.01
    assert styled.shape == day.shape and 0 <= styled.min() and styled.max() <= 1
    assert not ccdistill.night_style(day.clone().requires_grad_(), night, style).requires_grad


# ---------------------------------------------------------------- one step: CCDistill


class Own(nn.Module):
    """A network of a user's own, as CCDistill asks for it, with a norm of every kind."""

    feature_channels = 6
    checkpointed = False

    def __init__(self, classes=19):
        super().__init__()
        self.body = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3, 2, 1)),
            nn.SyncBatchNorm(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, 1, 1),
            nn.GroupNorm(2, 6),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        )
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(6, classes, 1)

    def forward(self, images):
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.body, images, use_reentrant=False)
        else:
            x = self.body(images)
        features = self.drop(self.norm(x.movedim(1, 3)).movedim(3, 1))
        return features, nn.functional.interpolate(self.classifier(features), images.shape[2:])


def toy_batch(batch=2):
    images = torch.rand(4, batch, 3, 16, 24)
    return dict(zip(ccdistill.IMAGES, images, strict=True)) | {
        "source_label": torch.randint(0, 19, (batch, 16, 24))
    }


def inputs_of(network):
    """A list that takes what the network is called with from now on."""
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    assert_same(found.values(), expected.values())


@pytest.mark.parametrize("joint", [True, False])
def test_m_d_sees_s_d_and_t_d_and_m_n_sees_s_n_and_t_n(joint):
    method = ccdistill.CCDistill(Own(), teacher=False, joint=joint)
    batch = toy_batch()
    s_d, s_n, t_d, t_n = [batch[name] for name in ccdistill.IMAGES]
    day, night = inputs_of(method.day), inputs_of(method.night)
    method(batch)
    if joint:
        assert_same(day, [torch.cat([s_d, t_d])])
        assert_same(night, [torch.cat([s_n, t_n])])
    else:
        assert_same(day, [s_d, t_d])
        assert_same(night, [s_n, t_n])


def test_a_source_step_leaves_the_targets_out():
    method = ccdistill.CCDistill(Own())
    batch = toy_batch()
    day, night = inputs_of(method.day), inputs_of(method.night)
    terms = method(
        {name: batch[name] for name in ("source_day", "source_night", "source_label")}, adapt=False
    )
    assert list(terms) == ["seg_day", "seg_night", "total"]
    assert_same([*day, *night], [batch["source_day"], batch["source_night"]])


def test_s_n_is_made_where_it_is_not_given():
    method = ccdistill.CCDistill(Own(), night_style="color")
    batch = toy_batch()
    del batch["source_night"]
    night = inputs_of(method.night)
    method(batch, adapt=False)
    assert_same(night, [ccdistill.night_style(batch["source_day"], batch["target_night"], "color")])


@pytest.mark.parametrize("teacher", [True, False])
def test_the_total_is_the_weighted_sum(teacher):
    weights = {"content": 2.0, "style": 3.0, "pseudo": 0.5, "place": 4.0}
    method = ccdistill.CCDistill(Own(), weights=weights, js_weight=0.7, pseudo_threshold=0, teacher=teacher)
    terms = method(toy_batch())
    assert terms["pseudo"] > 0 and terms["style"] > 0 and terms["place"] > 0
    close(terms["content"], terms["inherent"] + terms["illumination"] + 0.7 * terms["js"])
    weighted = 0.5 * terms["pseudo"] + 2 * terms["content"] + 3 * terms["style"] + 4 * terms["place"]
    close(terms["total"], terms["seg_day"] + terms["seg_night"] + weighted, 1e-6)


def test_under_autocast_logits_and_losses_are_float32(narrow):
    method = ccdistill.CCDistill(models.DeepLab(), weights={"pseudo": 1.0})
    batch = {name: nn.functional.interpolate(x, (32, 48)) for name, x in toy_batch().items() if x.ndim == 4}
    batch["source_label"] = torch.randint(0, 19, (2, 32, 48))
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(batch)
        features, logits = method.day(batch["source_day"])
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize("teacher", [True, False])
def test_a_term_of_weight_zero_is_not_computed(monkeypatch, teacher):
    monkeypatch.setattr(losses, "content_distill", None)  # whoever calls it, fails
    monkeypatch.setattr(losses, "style_distill", None)
    monkeypatch.setattr(losses, "place_distill", None)
    monkeypatch.setattr(ccdistill, "pseudo_labels", None)
    nothing = dict.fromkeys(ccdistill.WEIGHTS, 0)
    method = ccdistill.CCDistill(Own(), weights=nothing, teacher=teacher)
    assert list(method(toy_batch())) == ["seg_day", "seg_night", "total"] and method.teacher is None


def test_a_term_of_ones_own_needs_a_weight_and_a_value(monkeypatch):
    monkeypatch.setitem(ccdistill.WEIGHTS, "mine", 0.5)
    real = losses.content_distill

    def with_mine(*embeddings, parts, **options):  # as if it stood in forward
        parts["mine"] = embeddings[0].sum()
        return real(*embeddings, parts=parts, **options)

    monkeypatch.setattr(losses, "content_distill", with_mine)
    terms = ccdistill.CCDistill(Own())(toy_batch())
    known = [terms[name] for name in ("seg_day", "seg_night", "content", "style", "place")]
    close(terms["total"], sum(known) + 0.5 * terms["pseudo"] + 0.5 * terms["mine"], 1e-5)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_networks_share_what_night_weights_says(night_weights, joint):
    method = ccdistill.CCDistill(Own(), night_weights=night_weights, joint=joint)
    norms = ("body.1.", "body.4.", "body.5.", "norm.")
    for day, night in ((method.day, method.night), method.teacher.values()):
        for name, parameter in day.named_parameters():
            of_its_own = night_weights == "separate" or (night_weights == "norm" and name.startswith(norms))
            assert (parameter is night.get_parameter(name)) != of_its_own, name
        assert (night.body[1].running_mean is day.body[1].running_mean) == (night_weights == "shared")


@pytest.mark.parametrize("night_weights", ccdistill.NIGHT_WEIGHTS)
def test_all_but_the_teacher_learns_and_checkpointing_changes_no_gradient(night_weights):
    method = ccdistill.CCDistill(Own(), night_weights=night_weights)
    checkpointed = copy.deepcopy(method)
    checkpointed.day.checkpointed = checkpointed.night.checkpointed = True
    batch = toy_batch()
    gradients = []
    for each in (method, checkpointed):
        torch.manual_seed(0)
        each(batch)["total"].backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
        for name, parameter in each.named_parameters():
            assert (parameter.grad is None) == ("teacher" in name) == (not parameter.requires_grad), name
    close(*gradients, 1e-5)
    assert method.projection[2].weight.grad.abs().max() > 0


# One step: statistics


def test_each_domain_is_normalised_by_itself_and_the_sources_statistics_are_kept():
    method = ccdistill.CCDistill(Own(), teacher=False)
    for network in (method.day, method.night):
        before, after = [], []
        network.body[0].register_forward_hook(lambda _, i, out, to=before: to.append(out.detach()))
        network.body[1].register_forward_hook(lambda _, i, out, to=after: to.append(out.detach()))
        network.seen = before, after
    method(toy_batch(3))
    for network in (method.day, method.night):
        (source, _), normed = network.seen
        for images in normed:
            close(images.mean((0, 2, 3)), torch.zeros(6), 1e-5)
        norm = network.body[1]
        close(norm.running_mean, 0.1 * source.mean((0, 2, 3)), 1e-5)
        assert norm.num_batches_tracked == 1 and norm.momentum == 0.1


def test_a_norm_without_momentum_averages_the_source_alone():
    method = ccdistill.CCDistill(Own(), teacher=False)
    norm = method.day.body[1]
    norm.momentum = None  # torch's word for a plain average over calls
    sources = []
    for _ in range(3):
        batch = toy_batch()
        sources.append(method.day.body[0](batch["source_day"]).mean((0, 2, 3)))
        method(batch)
    assert norm.num_batches_tracked == 3
    close(norm.running_mean, torch.stack(sources).mean(0).detach(), 1e-2)  # spectral norm moves a little


def test_an_error_in_the_targets_call_leaves_the_norms_as_they_were():
    method = ccdistill.CCDistill(Own(), teacher=False)
    norm = method.day.body[1]
    method.day.classifier.register_forward_pre_hook(lambda *_: 1 / 0 if norm.momentum == 0 else None)
    with pytest.raises(ZeroDivisionError):
        method(toy_batch())
    assert norm.momentum == method.night.body[5].momentum == 0.1 and norm.num_batches_tracked == 1


class Pooling(nn.Module):
    """A network whose norm behind the pooling sees one value a channel, as many have it."""

    feature_channels = 6

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = norm(6)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), norm(6))
        self.classifier = nn.Conv2d(6, 19, 1)

    def forward(self, images):
        x = self.norm(self.norm(self.stem(images)))  # twice
        features = x + self.pooled(x)
        return features, nn.functional.interpolate(self.classifier(features), images.shape[2:])


class HandsOn(nn.BatchNorm2d):  # counts unguarded, and hands its momentum on
    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum)


class Standalone(nn.Module):  # no subclass of torch's
    def __init__(self, channels):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, None, None, self.training, self.momentum)


@pytest.mark.parametrize("wrap", [lambda network: network, torch.compile])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, HandsOn, Standalone])
def test_statistics_are_the_plain_mean_over_calls_in_any_norm(norm, wrap):
    network = wrap(Pooling(norm))
    images = torch.rand(4, 1, 3, 16, 24)
    calls = []
    for image in images:
        x = network.stem(image)
        deviation = x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        calls += [x, (x - x.mean((0, 2, 3), keepdim=True)) / deviation.sqrt()]
    expected_mean = torch.stack([x.mean((0, 2, 3)) for x in calls]).mean(0)
    expected_var = torch.stack([x.var((0, 2, 3)) for x in calls]).mean(0)
    weights = copy.deepcopy(list(network.parameters()))
    for _ in range(2):  # it can be done again
        ccdistill.take_statistics(network, images)
        close(network.norm.running_mean, expected_mean, 1e-5)
        close(network.norm.running_var, expected_var, 1e-5)
    assert (network.pooled[1].running_mean == 0).all() and (network.pooled[1].running_var == 1).all()
    assert network.norm.momentum == 0.1 and getattr(network.norm, "num_batches_tracked", 0) == 0
    assert not any(module.training for module in network.modules())
    assert_same(list(network.parameters()), weights)


@pytest.mark.parametrize("images, error", [
    ([torch.rand(1, 3, 16, 24), torch.rand(1, 3, 16, 24) * 255], "images: .*not normalised"),
    ([], "no batch"),
])  # fmt: skip
def test_statistics_that_cannot_be_taken_leave_the_network_as_it_was(images, error):
    network = Pooling()
    before = copy.deepcopy(network.state_dict())
    fails(ValueError, error, ccdistill.take_statistics, network, images)
    assert_same_state(network.state_dict(), before)
    assert not any(module.training for module in network.modules()) and network.norm.momentum == 0.1
    assert not network.norm._forward_pre_hooks


# One step: the teacher


def test_the_teacher_moves_by_a_share_and_its_norms_take_the_networks_statistics():
    method = ccdistill.CCDistill(Own())
    for share in (1, 0.01):
        old = copy.deepcopy(method.teacher)
        for value in (*method.day.parameters(), method.night.norm.bias, method.night.body[1].running_mean):
            value.data += 0.1
        method.update_teacher(share)
        for name, network in (("day", method.day), ("night", method.night)):
            expected = [
                p.lerp(q, share) for p, q in zip(old[name].parameters(), network.parameters(), strict=True)
            ]
            close(list(method.teacher[name].parameters()), expected)
            assert torch.equal(method.teacher[name].body[1].running_mean, network.body[1].running_mean)


def test_the_teacher_is_a_copy_until_the_targets_join_and_rests_in_eval_mode():
    method = ccdistill.CCDistill(Own(), teacher_share=0.25)
    bias, its_bias = method.day.classifier.bias, method.teacher["day"].classifier.bias
    bias.data += 1
    method(toy_batch(), adapt=False)
    assert torch.equal(its_bias, bias)
    bias.data += 1
    method(toy_batch())
    close(its_bias, bias - 0.75, 1e-6)
    kept = copy.deepcopy(method.teacher.state_dict())
    method.eval()(toy_batch())
    assert_same_state(method.teacher.state_dict(), kept)


@pytest.mark.parametrize("paired", [True, False])
def test_the_teacher_labels_the_plain_images_and_the_confident_share_weighs(paired):
    method = ccdistill.CCDistill(Own(), target_paired=paired)
    batch = toy_batch(8)
    s_n, t_d, t_n = [batch[name] for name in ccdistill.IMAGES[1:]]
    batch["source_label"].fill_(255)  # nothing to paste
    _, day = method.eval().day(t_d)
    _, night = method.night(t_n)
    method.pseudo_threshold = night.softmax(1).amax(1).median().item()
    _, _, _, y_td, y_tn, w_td, w_tn = method.train().teach(s_n, batch["source_label"], t_d, t_n)
    for y, w, logits in ((y_td, w_td, [day]), (y_tn, w_tn, [night, day] if paired else [night])):
        assert torch.equal(y, losses.pseudo_labels(*logits, threshold=0))
        confident = losses.pseudo_labels(*logits, threshold=method.pseudo_threshold) < 255
        close(w, confident.float().mean((1, 2), keepdim=True).expand(w.shape))
        assert 0 < w.min() and w.max() < 1 and not y.requires_grad


def test_half_of_the_classes_of_s_n_are_pasted_into_t_n_with_their_labels(monkeypatch):
    monkeypatch.setattr(ccdistill, "STRONG", nn.Identity())
    method = ccdistill.CCDistill(Own())
    batch = toy_batch(8)
    s_n, t_d, t_n = [batch[name] for name in ccdistill.IMAGES[1:]]
    label = batch["source_label"]
    label[0], label[:, :4], label[1] = 7, 255, 255
    seen_d, seen_n, pasted, _, y_tn, _, w_tn = method.teach(s_n, label, t_d, t_n)
    assert torch.equal(pasted, (seen_n == s_n).all(1))
    assert torch.equal(seen_d, t_d) and torch.equal(seen_n, torch.where(pasted[:, None], s_n, t_n))
    assert (
        torch.equal(y_tn[pasted], label[pasted]) and (w_tn[pasted] == 1).all() and (w_tn[~pasted] < 1).all()
    )
    for y, mine in zip(label, pasted, strict=True):
        classes = [c for c in y.unique().tolist() if c < 255]
        taken = [c for c in classes if mine[y == c].all()]
        assert len(taken) == math.ceil(len(classes) / 2)
        assert mine.sum() == sum((y == c).sum() for c in taken)  # whole classes


def test_the_networks_learn_from_strong_images_and_the_teachers_labels(monkeypatch):
    method = ccdistill.CCDistill(Own())
    batch = toy_batch()
    s_n, t_d, t_n = [batch[name] for name in ccdistill.IMAGES[1:]]
    lesson = method.teach(s_n, batch["source_label"], t_d, t_n)
    for images, plain in zip(lesson, (t_d, t_n), strict=False):
        assert 0 <= images.min() <= images.max() <= 1 and (images == plain).float().mean() < 0.5
    monkeypatch.setattr(method, "teach", lambda *_: lesson)
    day, night = inputs_of(method.day), inputs_of(method.night)
    method(batch)
    assert torch.equal(day[1], lesson[0]) and torch.equal(night[1], lesson[1])


@pytest.mark.parametrize("paired", [True, False])
def test_without_a_teacher_the_networks_own_confident_predictions_are_the_labels(paired):
    method = ccdistill.CCDistill(Own(), target_paired=paired, teacher=False)
    batch = toy_batch()
    method.day.drop.p = method.night.drop.p = 0.0
    _, p_td = method.day(batch["target_day"])
    _, p_tn = method.night(batch["target_night"])
    threshold = p_tn.softmax(1).amax(1).median().item()
    method.pseudo_threshold = threshold
    y_td = losses.pseudo_labels(p_td, threshold=threshold)
    y_tn = losses.pseudo_labels(p_tn, p_td if paired else None, threshold)
    assert 0 < (y_tn < 255).sum() < y_tn.numel()
    expected = losses.segmentation_loss(p_td, y_td) + losses.segmentation_loss(p_tn, y_tn)
    close(method(batch)["pseudo"], expected, 1e-2)  # spectral norm moves a little


# One step: what does not fit

BATCH = toy_batch()
VECTORS, MAPS = torch.rand(2, 3), torch.rand(2, 3, 4, 4)
DAY, LABELS = BATCH["source_day"], torch.zeros(2, 4, 4)


class Odd(Own):
    """What a network may return by mistake."""

    def __init__(self, change, classes=19):
        super().__init__(classes)
        self.change = change

    def forward(self, images):
        return self.change(*super().forward(images))


@pytest.mark.parametrize("call, message", [
    ((losses.correlation, VECTORS, torch.rand(3, 3)), r"a \(2, 3\), b \(3, 3\)"),
    ((losses.correlation, VECTORS[:0], VECTORS[:0]), r"\(0, 3\)"),
    ((losses.correlation, VECTORS[0], VECTORS[0]), r"\(3,\)"),
    ((losses.js_divergence, VECTORS, VECTORS[:, :2]), r"q \(2, 2\)"),
    ((losses.gram, MAPS[0]), r"\(3, 4, 4\)"),
    ((losses.content_distill, *[VECTORS] * 3, VECTORS[:1]), r"e_target_night \(1, 3\)"),
    ((losses.content_distill, *[MAPS] * 4), r"e_source_day \(2, 3, 4, 4\)"),
    ((losses.style_distill, *[MAPS] * 3, MAPS[:, :2]), r"f_target_night \(2, 2, 2"),
    ((losses.segmentation_loss, MAPS, LABELS[0, :2]), r"labels \(2, 4\)"),
    ((losses.segmentation_loss, MAPS, LABELS.long(), LABELS[0, :2]), r"weights \(2, 4\)"),
    ((losses.segmentation_loss, MAPS, MAPS[:, 0].byte()), r"expected int64, got torch.uint8: labels.long"),
    ((losses.pseudo_labels, MAPS, MAPS), "of the 3 classes"),
    ((losses.pseudo_labels, MAPS, MAPS, 0, 4), "got 4"),
    ((losses.pseudo_labels, MAPS, MAPS[:1]), r"day_logits \(1, 3"),
    ((ccdistill.night_style, DAY * math.nan, DAY), "day.*nan to nan"),
    ((ccdistill.night_style, DAY, DAY * 255), "night.*not normalised"),
    ((ccdistill.night_style, DAY.byte(), DAY), "divide by 255"),
    ((ccdistill.night_style, DAY, DAY, "colour"), "night_style: expected one of .*, got 'colour'"),
    ((lambda: ccdistill.CCDistill(Own(), night_style="colour"),), "night_style: expected one of"),
    ((ccdistill.CCDistill, nn.Conv2d(3, 5, 1)), "needs an attribute `feature_channels`"),
    ((ccdistill.night_model, Own(), "all"), "night_weights: expected one of"),
    ((models.DeepLab(), MAPS.byte()), "divide by 255"),
])  # fmt: skip
def test_a_function_names_what_does_not_fit_it(call, message):
    fails(ValueError, message, *call)


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("change, message", [
    ({"target_day": DAY[:, :, 8:]}, r"target_day \(2, 3, 8, 24\)"),
    ({"target_day": DAY - 1}, r"target_day.*\[0, 1\].*not normalised"),
    ({"target_night": DAY.byte()}, "target_night.*uint8: divide by 255"),
    ({"source_day": DAY.movedim(1, 3)}, r"source_day \(2, 16, 24, 3\)"),
    ({"source_label": LABELS}, r"source_label \(2, 4, 4\)"),
    ({"source_label": BATCH["source_label"].byte()}, "expected int64, got torch.uint8"),
])  # fmt: skip
def test_a_step_names_what_does_not_fit_in_its_batch(change, message, adapt):
    fails(ValueError, message, ccdistill.CCDistill(Own()), BATCH | change, adapt)


def test_a_step_looks_at_what_it_uses_alone():
    extra = {"name": ["a", "b"], "weather": None, "source_night": None, "depth": torch.rand(2, 7)}
    assert ccdistill.CCDistill(Own())(BATCH | extra)["total"] > 0
    barely = {name: BATCH[name] * 1.0001 + 1e-5 for name in ccdistill.IMAGES}  # as resizing leaves it
    assert ccdistill.CCDistill(Own())(BATCH | barely)["total"] > 0


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("network, message", [
    (Odd(lambda f, p: (f[:, :4], p)), r"feature_channels = 6, .*, got \(2, 4, 8, 12\)"),
    (Odd(lambda f, p: (f.flatten(2), p)), r"feature_channels = 6, .*, got \(2, 6, 96\)"),
    (Odd(lambda f, p: (f, p[..., ::2])), r"\(2, 19, 16, 12\) of images \(2, 3, 16, 24\): resize the logits"),
    (Odd(lambda f, p: (f, p), 256), r"at most 255, .* and \(2, 256,"),
    (Odd(lambda f, p: {"out": p}), "expected a tuple .features, logits., got a dict: wrap the network"),
    (Own(5), "of the 5 classes"),
])  # fmt: skip
def test_a_network_that_does_not_fit_is_told_in_the_first_step(network, message, adapt):
    method = ccdistill.CCDistill(network)
    fails(ValueError, message, method, BATCH, adapt)


def test_other_numbers_of_classes_say_how_many_stand_still():
    batch = BATCH | {"source_label": BATCH["source_label"] % 5}
    for options in ({"num_static": 3}, {"target_paired": False}):
        assert ccdistill.CCDistill(Own(5), **options)(batch)["total"] > 0
    fails(ValueError, "weights: expected some of", ccdistill.CCDistill, Own(), weights={"contents": 1})


# Copies: M_n and the teacher


class Tapped(nn.Module):
    """The usual ways to reach a foreign network's features; some survive a copy, some point at the original."""

    feature_channels = 6

    def __init__(self, how):
        super().__init__()
        self.net = Own()
        seen = {}
        if how == "closure":
            self.net.drop.register_forward_hook(lambda _, i, out: seen.update(features=out))
        elif how == "self":
            self.net.drop.register_forward_hook(lambda _, i, out: setattr(self, "features", out))
        elif how == "partial":
            keep = functools.partial(lambda name, _, i, out: seen.update({name: out}), "features")
            self.net.drop.register_forward_hook(keep)
        elif how == "attribute":
            self.net.read = lambda: seen["features"]
        elif how == "default":
            self.net.drop.register_forward_hook(lambda _, i, out, to=seen: to.update(features=out))
        elif how == "method of a list":
            add = [].append
            self.net.drop.register_forward_hook(lambda _, i, out: add(out))
        elif how == "function in a function":
            read = lambda: seen["features"]
            self.net.read = lambda: read()
        elif how == "in a list":
            self.steps = [functools.partial(lambda images, net: net(images), net=3), lambda x: self.net(x)]
        elif how == "module":
            self.net.drop.register_forward_hook(lambda module, i, out: setattr(module, "features", out))
        elif how == "method":
            self.net.drop.register_forward_hook(self.keep)
        elif how == "constants":
            slope, kinds = 0.1, (torch.float32, "x")
            self.act = lambda x: nn.functional.leaky_relu(x, slope).to(kinds[0])
            again = self.again = lambda x: again(x - 1) if x else 0
            self.table = {}
            self.table["itself"] = self.table

    def keep(self, _, inputs, output):
        self.features = output

    def forward(self, images):
        features, logits = self.net(images)
        if hasattr(self, "features"):
            features = self.features
        return features, logits


@pytest.mark.parametrize("how", [
    "closure", "self", "partial", "attribute", "default", "method of a list", "function in a function", "in a list",
])  # fmt: skip
def test_a_network_whose_copy_would_use_the_original_is_refused(how):
    fails(
        ValueError,
        "a function that uses an object around it .a closure.: .* sets self.features",
        ccdistill.CCDistill,
        Tapped(how),
    )
    ccdistill.CCDistill(Tapped(how), night_weights="shared", teacher=False)  # nothing is copied


@pytest.mark.parametrize("how", ["module", "method", "constants"])
def test_other_hooks_are_copied_with_the_network(how):
    method = ccdistill.CCDistill(Tapped(how))
    terms = method(toy_batch())
    (gradient,) = torch.autograd.grad(terms["style"], method.night.net.body[1].weight)
    assert gradient.abs().max() > 0


def test_features_of_another_call_are_refused():  # as of a hook that fills a global dict
    stale = torch.rand(2, 6, 8, 12)
    network = Odd(None)
    network.change = functools.partial(lambda features, logits, stale: (stale, logits), stale=stale)
    fails(ValueError, "one tensor in two calls", ccdistill.CCDistill(network), BATCH)


def test_a_network_that_keeps_a_call_cannot_be_copied():
    network = Tapped("method")
    network(BATCH["source_day"])
    fails(ValueError, "cannot be copied .* before the network's first call", ccdistill.CCDistill, network)


def test_compiled_networks_are_copied():
    method = ccdistill.CCDistill(torch.compile(Own(), backend="eager"), night_weights="separate")
    with torch.no_grad():
        method.night.classifier.weight.zero_()
    assert method.day.classifier.weight.abs().max() > 0
    assert method(BATCH)["total"] > 0


def test_half_precision_under_a_teacher_is_refused():
    batch = {name: x.bfloat16() if name != "source_label" else x for name, x in BATCH.items()}
    fails(ValueError, "use autocast", ccdistill.CCDistill(Pooling()).bfloat16(), batch, False)


# ---------------------------------------------------------------- networks and weights


class Narrow(torchvision.models.ResNet):
    """An eighth of ResNet-18's channels: what is tested with it is not how well it learns."""

    def __init__(self, weights=None):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(64, 1)

    def _make_layer(self, block, planes, *rest, **more):
        return super()._make_layer(block, planes // 8, *rest, **more)


@pytest.fixture(scope="session")
def narrow():
    patch = pytest.MonkeyPatch()
    patch.setattr(torchvision.models, "resnet18", Narrow)
    yield
    patch.undo()


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_dilation_computes_the_same_on_a_denser_grid(backbone, stride):
    model = models.DeepLab(backbone, output_stride=stride).eval()
    theirs = getattr(torchvision.models, backbone)(weights=None).eval()
    theirs.load_state_dict(model.backbone.state_dict(), strict=False)
    images = torch.rand(1, 3, 65, 97)
    sparse = nn.Sequential(*list(theirs.children())[:-2])(images)
    dense = model.backbone(images)[..., :: 32 // stride, :: 32 // stride]
    assert dense.shape == sparse.shape and (dense - sparse).abs().max() < 1e-4 * sparse.abs().max()


@pytest.mark.parametrize("stride, rates", [(16, [6, 12, 18]), (8, [12, 24, 36])])
def test_atrous_rates_are_those_of_deeplab_v3(narrow, stride, rates):
    _, *branches = models.DeepLab(output_stride=stride).classifier[0].convs
    assert [branch[0].dilation for branch in branches] == [(rate, rate) for rate in rates]


@pytest.mark.parametrize("batch", [1, 2])
def test_any_size_and_batch_trains(narrow, batch):
    features, logits = models.DeepLab(num_classes=7)(torch.rand(batch, 3, 33, 47))
    assert features.shape == (batch, 256, 3, 3) and logits.shape == (batch, 7, 33, 47)
    logits.mean().backward()


def test_the_head_has_no_pooled_branch_and_gives_a_crop_what_it_gives_the_frame(narrow):
    model = models.DeepLab().eval()
    frame = torch.rand(1, 3, 256, 1024)
    whole, left = model(frame)[0], model(frame[..., :768])[0]
    close(whole[..., :4], left[..., :4], 1e-5)  # the atrous branches reach that far, and no farther


def test_images_are_normalised_inside(narrow):
    model = models.DeepLab().eval()
    seen = inputs_of(model.backbone)
    model(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    close(seen[0], torch.zeros(1, 3, 32, 32), 1e-6)


def wrapped(state):
    """What people save around a state dict."""
    return {
        "bare": state,
        "model": {"model": state},
        "state_dict, DDP": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        "model_state_dict, compiled": {"model_state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
        "both": {"model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}},
        "compiled, then DDP": {f"_orig_mod.module.{k}": v for k, v in state.items()},
        "compiled inside": {k.replace("backbone.", "backbone._orig_mod."): v for k, v in state.items()},
        "Lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        "Namespace": {"model": state, "args": train.argparse.Namespace(lr=0.1)},
        "last.pt": {"model": {f"night.{k}": v for k, v in state.items()} | {"day.x": torch.ones(1)}},
    }


@pytest.mark.parametrize("how", wrapped({}))
def test_weights_are_found_in_what_wraps_them(narrow, tmp_path, how):
    state = models.DeepLab().state_dict()
    torch.save(wrapped(state)[how], tmp_path / "w.pth")
    assert_same_state(models.DeepLab(weights=tmp_path / "w.pth").state_dict(), state)


def test_m_d_is_found_in_last_pt():
    state = {"night.a": torch.zeros(1), "day.a": torch.ones(1)}
    assert models.weights_in({"model": state}, "", "day") == {"a": torch.ones(1)}
    fails(
        WeightsError,
        "x.pt: holds no state dict of M_d",
        models.weights_in,
        {"a": torch.ones(1)},
        "x.pt",
        "day",
    )


def test_of_a_resnet_the_backbone_is_taken(narrow, tmp_path):
    theirs = Narrow().state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    ours = models.DeepLab(weights=tmp_path / "w.pth").backbone.state_dict()
    assert_same_state(ours, {name: theirs[name] for name in ours})


def test_of_torchvisions_deeplab_the_backbone_is_taken_and_that_is_told(tmp_path):
    build = torchvision.models.segmentation.deeplabv3_resnet50
    theirs = build(weights=None, weights_backbone=None, num_classes=19, aux_loss=True).state_dict()
    torch.save({"model": theirs}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="w.pth: its head has a pooled branch and is left out") as told:
        ours = models.DeepLab("resnet50", output_stride=8, weights=tmp_path / "w.pth").backbone.state_dict()
    assert_same_state(ours, {name: theirs[f"backbone.{name}"] for name in ours})
    assert len(told) == 1


def test_a_classifier_for_other_classes_is_left_out_and_that_is_told(narrow, tmp_path):
    theirs = models.DeepLab(num_classes=7).state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="w.pth: its classifier, for another number of classes, is left out"):
        ours = models.DeepLab(weights=tmp_path / "w.pth").state_dict()
    kept = [name for name in ours if not name.startswith("classifier.4.")]
    assert_same([ours[name] for name in kept], [theirs[name] for name in kept])


class Foreign:
    pass


@pytest.mark.parametrize("change, message", [
    (lambda state: state | {"odd": torch.ones(1)}, "expected weights of this network.*Unexpected.*odd"),
    (lambda state: state | {"backbone.conv1.weight": torch.ones(3)}, "expected weights.*conv1"),
    (lambda state: {k: v for k, v in state.items() if "layer2" not in k}, "expected weights.*Missing.*layer2"),
    (lambda state: [1, 2], "holds no state dict"),
    (lambda state: {"model": "x"}, "holds no state dict"),
    (lambda state: {"model": Foreign()}, "holds a test_ccdistill.Foreign: save the weights alone"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_told(narrow, tmp_path, change, message):
    torch.save(change(models.DeepLab().state_dict()), tmp_path / "w.pth")
    fails(WeightsError, f"w.pth: .*{message}", models.DeepLab, weights=tmp_path / "w.pth")


def test_a_file_that_is_none_is_told(tmp_path):
    (tmp_path / "w.pth").write_text("<html>")
    fails(
        WeightsError, "w.pth: not a readable file of tensors .damaged", models.read_file, tmp_path / "w.pth"
    )
    fails(WeightsError, "x.pth: not a readable file .*No such file", models.read_file, tmp_path / "x.pth")


def test_imagenet_asks_torchvision_and_says_what_to_do_without_a_network(monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: asked.append(weights) or Narrow())
    models.DeepLab()
    models.DeepLab(weights="imagenet")
    assert asked[0] is None
    assert torchvision.models.ResNet18_Weights.verify(asked[1]).name == "IMAGENET1K_V1"

    def offline(weights):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    fails(
        WeightsError,
        "weights cannot be downloaded .*no route.*: --weights FILE",
        models.DeepLab,
        weights="imagenet",
    )


def eager_code(graph, inputs, **options):
    """In the place of inductor's code generation, which takes a minute and a compiler: the graph as it is."""

    def run(arguments):
        return graph(*arguments)

    run._boxed_call = True
    return run


@pytest.mark.parametrize("night_weights, joint", [
    ("norm", False), ("shared", False), ("separate", True),
])  # fmt: skip
def test_compiled_networks_have_the_same_gradients(narrow, monkeypatch, night_weights, joint):
    """All of torch.compile but generated code: its partitioner decides what backward sees of a buffer."""
    monkeypatch.setattr("torch._inductor.compile_fx._compile_fx_inner", eager_code)
    torch.compiler.reset()
    eager = ccdistill.CCDistill(models.DeepLab(), night_weights=night_weights, joint=joint, teacher=False)
    eager = eager.double()
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    compiled = copy.deepcopy(eager)
    for network in {compiled.day, compiled.night}:
        network.compile(dynamic=False)
    batch = {name: images.double() for name, images in zip(ccdistill.IMAGES, torch.rand(4, 2, 3, 32, 48))}
    batch["source_label"] = torch.randint(0, 19, (2, 32, 48))
    for adapt in (False, True, True):
        gradients = []
        for method in (eager, compiled):
            torch.manual_seed(0)
            method.zero_grad()
            method(batch, adapt)["total"].backward()
            gradients.append([p.grad for p in method.parameters() if p.grad is not None])
        close(*gradients, 1e-9)
        close(list(eager.buffers()), list(compiled.buffers()), 1e-9)


# ---------------------------------------------------------------- files

IMAGE, LABEL = "demo_000000_000000_leftImg8bit.png", "demo_000000_000000_gtFine_labelIds.png"
OFFICIAL = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # labelIds by trainId


@pytest.fixture(scope="session")
def city(tmp_path_factory, narrow):
    root = tmp_path_factory.mktemp("city")
    datasets.make_demo_city(root, train=6, val=3)
    return root


@pytest.fixture
def tree(city, tmp_path):
    """A copy of the city that a test may damage."""
    return Path(shutil.copytree(city, tmp_path / "city"))


def picture(path, size=(64, 48), mode="RGB", value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)
    return path


def stored_label(path, values):
    Image.frombytes("L", (len(values), 1), bytes(values)).save(path)
    return path


@pytest.mark.parametrize("kind, stored, expected", [
    ("labelIds", range(34), [OFFICIAL.index(v) if v in OFFICIAL else 255 for v in range(34)]),
    ("labelIds", [255], [255]),
    ("labelTrainIds", [*range(19), 255], [*range(19), 255]),
    ("LABELTRAINIDS", [3], [3]),
])  # fmt: skip
def test_labels_are_read_by_the_official_table_and_their_name(tmp_path, kind, stored, expected):
    label = datasets.open_label(stored_label(tmp_path / f"x_{kind}.png", stored))
    assert list(label.tobytes()) == expected


@pytest.mark.parametrize("kind, value", [("labelIds", 34), ("labelIds", 254), ("labelTrainIds", 19)])
def test_values_that_do_not_exist_are_told(tmp_path, kind, value):
    path = stored_label(tmp_path / f"x_{kind}.png", [0, value])
    fails(DataError, f"x_{kind}.png: holds the value {value}", datasets.open_label, path)


@pytest.mark.parametrize("palette", [[13, 13, 13, 0, 0, 0, 5, 5, 5], [128, 64, 128, 244, 35, 232, 0, 0, 142]])
def test_a_label_with_a_palette_is_refused_and_told_how_to_make_it_grey(tmp_path, palette):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette(palette)
    image.save(tmp_path / "x_labelTrainIds.png")
    message = r"x_labelTrainIds.png: has a palette.*i = Image.open\(FILE\).*convert\('L'\).*frombytes"
    fails(DataError, message, datasets.open_label, tmp_path / "x_labelTrainIds.png")


LAYOUTS = [
    ("cityscapes", "val", "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png"),
    ("darkzurich", "val", "rgb_anon/val/night/G/G_rgb_anon.png", "gt/val/night/G/G_gt_labelTrainIds.png"),
    ("acdc", "val", "rgb_anon/night/val/G/G_rgb_anon.png", "gt/night/val/G/G_gt_labelTrainIds.png"),
    ("nighttime-driving", "test", "leftImg8bit/test/night/0_leftImg8bit.png",
     "gtCoarse_daytime_trainvaltest/test/night/0_gtCoarse_labelTrainIds.png"),
]  # fmt: skip


@pytest.mark.parametrize(
    "image_in, label_in, ending", [("", "", ".png"), ("zip", "b", ".png"), ("a", "a", ".PNG")]
)
@pytest.mark.parametrize("layout, split, image, label", LAYOUTS)
def test_layouts(tmp_path, layout, split, image, label, image_in, label_in, ending):
    image_file = picture((tmp_path / image_in / image).with_suffix(ending))
    label_file = picture((tmp_path / label_in / label).with_suffix(ending), mode="L", value=8)
    picture(image_file.with_name(f"._{image_file.name}"))  # macOS leaves such
    (image_file.parent / "again").symlink_to(tmp_path)  # a loop
    assert datasets.samples(layout, tmp_path, split) == [(image_file, label_file)]
    if image_in == "a":
        shutil.copytree(tmp_path / "a", tmp_path / "copy", symlinks=True)
        fails(DataError, "is there more than once: .*a.*copy", datasets.samples, layout, tmp_path, split)
    fails(DataError, "no such folder .* holds", datasets.samples, layout, tmp_path / "typo", split)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name, act, message", [
    (LABEL, Path.unlink, f"{IMAGE}: there is no label of this image"),
    (IMAGE, Path.unlink, f"{LABEL}: there is no image of this label"),
    (IMAGE, lambda p: (p.unlink(), p.symlink_to("gone")), f"{IMAGE}: a link to nothing"),
    (IMAGE, lambda p: p.with_name("gone").symlink_to("x"), "gone: a link to nothing"),
    (IMAGE, lambda p: p.rename(p.with_suffix(".jpg")), "_leftImg8bit.jpg: expected a name that ends"),
    (IMAGE, lambda p: picture(p.with_name("another.tif")), "another.tif: expected a name that ends"),
    (LABEL, lambda p: p.rename(p.with_suffix(".bmp")), "labelIds.bmp: expected a name that ends"),
    (IMAGE, lambda p: shutil.copy(p, p.with_suffix(".PNG")), "has the name of .* but for capitals: remove one"),
    (LABEL, lambda p: shutil.copy(p, p.with_suffix(".PNG")), "has the name of .* but for capitals: remove one"),
])  # fmt: skip
def test_a_part_of_the_data_that_is_missing_or_there_twice_is_told(tree, split, name, act, message):
    act(min(tree.rglob(f"{split}/demo/{name}")))
    fails(DataError, message, datasets.samples, "cityscapes", tree / "cityscapes", split)


def test_labels_of_other_names_are_told(tree):
    for number, label in enumerate((tree / "cityscapes/gtFine/train/demo").glob("*.png")):
        label.rename(label.with_name(f"s{number}.png"))
    message = "gtFine/train: no label in it: expected names that end with _gtFine_labelIds.png .* found s"
    fails(DataError, message, datasets.samples, "cityscapes", tree / "cityscapes", "train")


def test_links_are_followed(tree):
    expected = datasets.samples("cityscapes", tree / "cityscapes", "train")
    first = expected[0].image
    first.symlink_to(shutil.move(first, tree / "elsewhere.png"))
    folder = expected[0].label.parent
    folder.symlink_to(shutil.move(folder, tree / "elsewhere"))
    assert datasets.samples("cityscapes", tree / "cityscapes", "train") == expected


def test_pairs_of_dark_zurich_and_acdc(tree, monkeypatch):
    root = tree / "darkzurich"
    days, nights = datasets.targets("darkzurich", root)
    assert [path.name.replace("day", "night") for path in days] == [path.name for path in nights]
    assert len(nights) == 6 and datasets.targets("darkzurich", root, "none") == (days, nights)
    acdc = tree / "acdc/rgb_anon/night"
    nights = [picture(acdc / f"train/GP/GP_{n}_rgb_anon.png") for n in (1, 2)]
    days = [picture(acdc / f"train_ref/GP/GP_{n}_rgb_ref_anon.png") for n in (1, 2)]
    assert datasets.targets("acdc", tree / "acdc") == (days, nights)
    days[0].unlink()
    fails(DataError, "GP_1_rgb_ref_anon.png: no such file", datasets.targets, "acdc", tree / "acdc")


def test_a_folder_that_cannot_be_listed_is_told(tree, monkeypatch):
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir("/none" if "DEMO" in str(path) else path))
    fails(DataError, "cannot be listed", datasets.targets, "darkzurich", tree / "darkzurich", "none")


NIGHT, DAY_STEM = "train/night/DEMO_night/DEMO_night_frame_000002", "train/day/DEMO_day/DEMO_day_frame_000004"
LINE = f"{NIGHT},{DAY_STEM}"


@pytest.mark.parametrize("content", [LINE, f"\r\n {NIGHT} , {DAY_STEM} \r\n  \r\n", f"\ufeff{LINE}"])
def test_a_list_of_pairs_is_read(city, tmp_path, content):
    (tmp_path / "mine.csv").write_text(content)
    pairs = datasets.targets("darkzurich", city / "darkzurich", tmp_path / "mine.csv")
    assert pairs == tuple([city / f"darkzurich/rgb_anon/{stem}_rgb_anon.png"] for stem in (DAY_STEM, NIGHT))


@pytest.mark.parametrize("content, message", [
    ("\n", "no pair"), (NIGHT, "line 1"), (f"{LINE},x", "line 1"), (f"{DAY_STEM},{NIGHT}", "line 1"),
    (f"night,day\n{LINE}", "line 1"), (f"{LINE}\n{NIGHT},train/day/x", "line 2"), ("\udcff", "line 1"),
])  # fmt: skip
def test_what_is_wrong_in_a_list_of_pairs_is_told(city, tmp_path, content, message):
    (tmp_path / "mine.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    read = functools.partial(datasets.targets, "darkzurich", city / "darkzurich")
    fails(DataError, f"mine.csv: {message}", read, tmp_path / "mine.csv")


@pytest.mark.parametrize("pairs", ["corresp", "typo.csv"])
def test_missing_pairs_name_both_ways_out(tree, pairs):
    shutil.rmtree(tree / "darkzurich/corresp")
    message = "no list of pairs there: --pairs FILE .* --pairs none"
    fails(DataError, message, datasets.targets, "darkzurich", tree / "darkzurich", pairs)


def redraw(change=lambda image: image, kind="PNG", **options):
    return lambda path: change(Image.open(path).copy()).save(path, format=kind, **options)


def with_long_text(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * (2**26 + 1), zip=True)
    redraw(pnginfo=info)(path)


def with_depth(path, depth, colour, rows):
    """Write a PNG by hand, for what Pillow does not write. rows: the bytes of the rows, each behind a 0."""
    width, height = Image.open(path).size

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    data = zlib.compress((b"\0" + rows * width) * height)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9


@pytest.mark.parametrize("readable_as, act", [
    ("", lambda path: os.truncate(path, path.stat().st_size // 2)),
    ("", lambda path: os.truncate(path, 0)),
    ("", Path.unlink),
    ("", lambda path: path.write_bytes(path.read_bytes()[:300] + path.read_bytes()[310:])),
    ("", lambda path: path.write_text("<html>")),
    ("", lambda path: (path.unlink(), path.mkdir())),
    ("", redraw(lambda image: Image.new("I;16", image.size))),
    ("", redraw(lambda image: image.convert("CMYK"), "JPEG")),
    ("", redraw(kind="TIFF")),
    ("", redraw(save_all=True, append_images=[Image.new("L", (9, 9))])),
    ("", redraw(lambda image: image.convert("RGB"), "WEBP", save_all=True, append_images=[Image.new("RGB", (256, 128), 9)])),
    ("", lambda path: with_depth(path, 16, 2, b"\x07\xff" * 3)),  # 12 bits in 16, as cv2 writes raw frames
    ("", lambda path: with_depth(path, 16, 6, b"\x07\xff" * 4)),
    ("image", redraw(kind="JPEG")),
    ("image", redraw(lambda image: image.convert("RGB"))),
    ("image", redraw(kind="JPEG", exif=BROKEN_EXIF)),
    ("image", redraw(lambda image: image.convert("L").convert("P"))),
    ("image label", with_long_text),
    ("image label", redraw(icc_profile=bytes(2**21))),
])  # fmt: skip
def test_every_damage_is_told_in_one_line_and_metadata_is_none(city, tmp_path, readable_as, act):
    for kind, name, read in (("image", IMAGE, datasets.open_image), ("label", LABEL, datasets.open_label)):
        path = Path(shutil.copy(min(city.rglob(name)), tmp_path))
        act(path)
        if kind in readable_as:
            read(path)
        else:
            fails(DataError, name, read, path)


def test_four_bit_greys_are_no_labels(tmp_path):  # Pillow spreads their 16 values over 0 to 255
    with_depth(stored_label(tmp_path / "x_labelTrainIds.png", [0, 0]), 4, 0, b"\x01")
    fails(DataError, "mode L, 4 bits", datasets.open_label, tmp_path / "x_labelTrainIds.png")


def test_a_crop_cuts_image_and_label_alike():
    gradient = Image.frombytes("L", (200, 100), bytes(range(200)) * 100)
    rng = random.Random(0)
    rises = []
    for _ in range(40):
        cut = datasets.random_crop((200, 100), (40, 60), (0.5, 1.0), rng)
        image, label = cut(gradient.convert("RGB")), cut(gradient, Image.NEAREST)
        assert (image[0, :, 3:-3].int() - label[0, :, 3:-3].int()).abs().max() <= 2
        rises.append(int(label[0, 0, -1]) - int(label[0, 0, 0]))
    assert min(rises) < -100 and max(rises) > 100 and min(map(abs, rises)) < 65  # flips and scales


@pytest.mark.parametrize("size, scale", [((200, 100), (99, 99)), ((20, 10), (0.5, 1))])
def test_a_crop_may_be_larger_or_smaller_than_the_image(size, scale):
    cut = datasets.random_crop(size, (40, 60), scale, random.Random(0))
    assert cut(Image.new("L", size)).shape == (1, 40, 60)


def stream_of(city, paired=True, **options):
    source = datasets.samples("cityscapes", city / "cityscapes", "train")
    days, nights = datasets.targets("darkzurich", city / "darkzurich", "corresp" if paired else "none")
    return datasets.FourDomains(source, days, nights, (64, 96), paired=paired, length=12, **options)


@pytest.mark.parametrize("paired", [True, False])
def test_an_item_depends_on_the_seed_and_its_number_alone(city, monkeypatch, paired):
    monkeypatch.setattr(torch, "set_num_threads", None)  # decoding threads leave it alone
    stream, again = stream_of(city, paired), stream_of(city, paired)
    items = [again[k] for k in reversed(range(12))][::-1]
    for workers in (0, 1, 3):
        for found, expected in zip(
            datasets.prefetch(stream.__getitem__, range(12), workers), items, strict=True
        ):
            assert_same_state(found, expected)
    other = stream_of(city, paired, seed=1)[0]
    assert not torch.equal(other["source_day"], items[0]["source_day"])
    assert sorted(stream.pick("night", stream.nights, k) for k in range(6, 12)) == [*range(6)]  # one pass


def test_a_pair_is_cut_alike(city):
    stream = stream_of(city)
    stream.days = stream.nights  # the same picture: so must be the crops
    for k in range(6):
        item = stream[k]
        assert torch.equal(item["target_day"], item["target_night"])


def test_a_source_and_its_label_and_ready_made_night_are_cut_alike(city):
    stream = stream_of(city, synthetic=datasets.synthetic_nights(city / "cityscapes", city / "cityscapes"))
    for k in range(6):
        item = stream[k]
        assert torch.equal(item["source_night"], item["source_day"])


def test_what_no_step_needs_is_not_decoded(city, monkeypatch):
    opened = []
    open_image = datasets.open_image
    monkeypatch.setattr(datasets, "open_image", lambda path: opened.append(path.name) or open_image(path))
    stream = stream_of(city, targets_from=2)
    made = stream_of(city, targets_from=2, synthetic=[sample.image for sample in stream.source])
    for k, each, expected in ((0, stream, ["night"]), (0, made, []), (2, stream, ["day", "night"])):
        opened.clear()
        each[k]
        assert sorted(name.split("_")[1] for name in opened if "DEMO" in name) == expected


@pytest.mark.parametrize("folder, partner", [
    ("ready", "leftImg8bit"), ("DEMO_day", "DEMO_night"), ("gtFine/train", "leftImg8bit"),
])  # fmt: skip
def test_partners_of_other_sizes_are_both_named(tree, folder, partner):
    shutil.copytree(tree / "cityscapes/leftImg8bit", tree / "ready/leftImg8bit")
    stream = stream_of(tree, synthetic=datasets.synthetic_nights(tree / "ready", tree / "cityscapes"))
    for path in tree.rglob("*.png"):
        if folder in str(path):
            Image.open(path).resize((255, 128), Image.NEAREST).save(path)
    message = f"{folder}.*png: is 255 x 128, but .*{partner}.*png is 256 x 128"
    fails(DataError, message, stream.__getitem__, 0)


def test_ready_made_nights_lie_as_the_days_do(tmp_path):
    for name in ("flat", "in cities"):
        city = "ulm" if name == "in cities" else ""
        day = picture(tmp_path / name / "leftImg8bit/train" / city / "a_leftImg8bit.png")
        assert datasets.synthetic_nights(tmp_path / name, tmp_path / name) == [day]
    message = "a_leftImg8bit.png: no such file beside"
    fails(DataError, message, datasets.synthetic_nights, tmp_path / "flat", tmp_path / "in cities")


def labelled(folder, *values, kind="labelIds"):
    paths = [stored_label(folder / f"{n}_{kind}.png", [value, 0]) for n, value in enumerate(values)]
    return [datasets.Sample(path, path) for path in paths]


def test_odd_labels_are_told(tmp_path):
    assert datasets.label_warning(labelled(tmp_path, 7, 26)) is None
    assert "all pixels that are not void are road" in datasets.label_warning(labelled(tmp_path, 7, 7))
    assert "none is above 18: if they are trainIds" in datasets.label_warning(labelled(tmp_path, 7, 11))
    void = labelled(tmp_path, 3, 3)
    assert "every pixel is void" in datasets.label_warning(void)
    fails(
        DataError,
        "every pixel is void .ignored.: nothing to learn",
        datasets.label_warning,
        void,
        needed=True,
    )


def test_pictures_are_found_in_folders_and_those_in_folders(tmp_path):
    names = "a.png", "b.webp", "c.PNG", "d.jpg", "in/a.jpeg"
    expected = [picture(tmp_path / name) for name in names]
    picture(tmp_path / ".e.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [sample.image for sample in datasets.pictures([tmp_path])] == expected
    assert datasets.pictures(expected[:1]) == [(expected[0], None)]
    for wrong in (tmp_path / "typo.png", tmp_path / "notes"):
        fails(DataError, f"{wrong.name}: no picture there", datasets.pictures, [wrong])


@pytest.mark.parametrize("name", ["x.bmp", "x.tif", "x.GIF", "in/x.tiff"])
def test_pictures_that_are_not_read_are_told(tmp_path, name):
    picture(tmp_path / "a.png")
    picture(tmp_path / name)
    fails(DataError, f"{name}: not read: save it as one of", datasets.pictures, [tmp_path])


# ---------------------------------------------------------------- scores, predictions, submissions

HERE = Path(__file__).parent
# A command in a process of its own, with the narrow network.
PROGRAM = "import runpy, sys, torchvision, test_ccdistill as t; torchvision.models.resnet18 = t.Narrow; "
PROGRAM += "runpy.run_path(sys.argv[0], run_name='__main__')"


def command(program, *arguments):
    code = f"import sys; sys.argv = sys.argv[1:]; {PROGRAM}"
    return [sys.executable, "-uc", code, program, *map(str, arguments)]


def start(words, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE} | options
    return subprocess.Popen([str(word) for word in words], **options)


def training(city, out, *more):
    """The arguments of a tiny run."""
    data = "--cityscapes", city / "cityscapes", "--darkzurich", city / "darkzurich", "--out", out
    tiny = "--crop", 32, 64, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--weights", "none"
    return [str(part) for part in (*data, *tiny, *more)]


def log_of(out):
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == models.read_file(out / "last.pt")["step"]
    return rows


def trained(city, out, *more):
    train.main(training(city, out, *more))
    return log_of(out)


@pytest.fixture(autouse=True)
def nothing_stops():
    yield
    train.STOP.clear()
    assert signal.getsignal(signal.SIGTERM) is not train.on_signal  # a run gives its handlers back


@pytest.fixture(scope="session")
def checkpoint(city, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    trained(city, out, "--steps", 2)
    return out / "last.pt"


def evaluated(checkpoint, *more):
    scores = checkpoint.with_name("scores.json")
    scores.unlink(missing_ok=True)
    evaluate.main(
        [str(part) for part in ("--checkpoint", checkpoint, "--json", scores, "--device", "cpu", *more)]
    )
    return json.loads(scores.read_text())


def test_scores_are_counted_pixel_by_pixel():
    label, prediction = torch.randint(0, 6, (20, 30)), torch.randint(2, 8, (20, 30))
    label[0] = 255
    counted = [[0] * 19 for _ in range(19)]
    for truth, guess in zip(label[1:].flatten().tolist(), prediction[1:].flatten().tolist(), strict=True):
        counted[truth][guess] += 1
    iou = []
    for c in range(8):
        union = sum(counted[c]) + sum(row[c] for row in counted) - counted[c][c]
        iou.append(100 * counted[c][c] / union)
    hits = sum(counted[c][c] for c in range(8))

    result = evaluate.scores(evaluate.count(label.byte(), prediction, 19))
    assert result["confusion_matrix"] == counted
    assert list(result["iou"].values()) == pytest.approx([*iou, *[math.nan] * 11], nan_ok=True)
    assert result["miou"] == pytest.approx(sum(iou) / 8)  # without label, but predicted: counts, as 0
    assert result["miou_present"] == pytest.approx(sum(iou[:6]) / 6)
    assert result["pixel_accuracy"] == pytest.approx(100 * hits / 570)
    assert "bus                   n/a" in evaluate.table(result)


def test_views_are_averaged():
    def model(images):  # whose logits are the image's red and green
        return None, images[:, :2]

    images = torch.rand(1, 3, 70, 90)
    whole = evaluate.probabilities(model, images)
    close(whole, images[:, :2].softmax(1))
    close(evaluate.probabilities(model, images, flip=True), whole)  # flipped back
    half = evaluate.probabilities(model, images, (0.5,))
    small = nn.functional.interpolate(images[:, :2], (35, 45), mode="bilinear", antialias=True)
    close(half, nn.functional.interpolate(small.softmax(1), (70, 90), mode="bilinear"))
    close(evaluate.probabilities(model, images, (0.5, 1.0), flip=True), (half + whole) / 2, 1e-6)


def test_switches_of_an_evaluation_reach_the_network(city, checkpoint, monkeypatch):
    calls = []
    forward = models.DeepLab.forward
    monkeypatch.setattr(models.DeepLab, "forward", lambda self, x: calls.append(x) or forward(self, x))
    evaluated(checkpoint, "--darkzurich", city / "darkzurich", "--flip", "--scales", 0.5, 1)
    assert len(calls) == 3 * 4 and calls[0].shape == (1, 3, 64, 128) and calls[2].shape == (1, 3, 128, 256)
    assert torch.equal(calls[3], calls[2].flip(3))


class Answers(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.part = nn.Identity()
        self.part.eval()  # frozen
        self.classes, self.calls = classes, 0

    def forward(self, images):
        assert not self.training
        self.calls += 1
        return None, torch.full((1, self.classes, *images.shape[2:]), math.nan if self.calls == 3 else 0.0)


@pytest.mark.parametrize("classes, message", [(19, "DEMO_.*: the network puts out nan"), (21, "not of 21")])
def test_an_evaluation_leaves_every_module_in_its_mode_also_after_an_error(city, classes, message):
    model = Answers(classes)
    samples = datasets.samples("darkzurich", city / "darkzurich")
    fails(ValueError, message, evaluate.evaluate, model, samples, "cpu")
    assert model.training and not model.part.training
    assert classes == 21 or evaluate.evaluate(model, samples, "cpu")["pixel_accuracy"] > 0


def test_pictures(checkpoint, tmp_path):
    given, out, kinds = tmp_path / "in", tmp_path / "out", ("labelTrainIds", "labelIds", "color", "overlay")
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees: for all but a PNG
    for n, name in enumerate(("a.png", "b.webp", "c.PNG", "d.jpg")):
        picture(given / name, (40 + n, 30), value=(200, 30, 90), exif=turned)
    evaluated(checkpoint, "--out", out, "--images", given)
    sizes = {"a": (40, 30), "b": (30, 41), "c": (42, 30), "d": (30, 43)}
    for kind in kinds[:3]:
        assert {path.stem: Image.open(path).size for path in (out / kind).iterdir()} == sizes
    assert {path.stem for path in (out / "overlay").iterdir()} == set(sizes)
    train_id, label_id, colour, _ = [Image.open(out / kind / "a.png").getpixel((5, 5)) for kind in kinds]
    assert datasets.CLASSES[train_id][1:] == (label_id, colour)


def test_an_overlay_lifts_a_dark_image_and_lines_its_classes():
    image = torch.full((3, 40, 60), 20, dtype=torch.uint8)
    classes = torch.zeros(40, 60, dtype=torch.int64)
    classes[:, 30:] = 13
    drawn = evaluate.regions(image, classes)
    assert drawn[:, 0, 0].tolist() == [113, 84, 113]  # 0.55 of 102, the lifted grey, and 0.45 of the road's
    assert drawn[2, 0, 50] > drawn[0, 0, 50] == drawn[1, 0, 50] == 56
    bright = (drawn.amin(0) > 200).nonzero()[:, 1]
    assert set(bright.tolist()) == {29} and len(bright) == 40
    unknown = torch.full((40, 60), 255, dtype=torch.int64)  # shows the image alone
    assert evaluate.regions(image, unknown).unique().tolist() == [102]
    label = torch.full((40, 60), 8, dtype=torch.uint8)
    alone, beside = evaluate.overlay(image, classes), evaluate.overlay(image, classes, label)
    for page, colours in ((alone, [0, 13]), (beside, [0, 8, 13])):
        names = page.crop((0, page.height - 4 * 16, page.width, page.height))
        pixels = {colour for _, colour in names.getcolors(99999)}
        assert [number for number in (0, 8, 13) if datasets.COLOURS[number] in pixels] == colours


def test_a_sheet_has_headings_rows_and_the_colours_that_occur():
    row = [torch.full((3, 64, 128), 77, dtype=torch.uint8), torch.zeros(64, 128, dtype=torch.int64)]
    page = evaluate.sheet([row, row], ["image", "prediction"])
    assert page.width == 2 * 130 + 2 and page.height == 2 * 66 + 2 + 2 * 16  # a heading and a legend
    heading, legend = (
        page.crop((0, 0, page.width, 16)),
        page.crop((0, page.height - 16, page.width, page.height)),
    )
    for strip, colours in ((heading, 0), (legend, 1)):
        held = [colour for _, colour in strip.getcolors(9999)]
        assert (0, 0, 0) in held and sum(colour == datasets.COLOURS[0] for colour in held) == colours
    assert page.getpixel((65, 50)) == (77, 77, 77) and page.getpixel((195, 116)) == datasets.COLOURS[0]


@pytest.mark.parametrize("second", ["a.png", "A.jpg", "\u00e4.png"])
def test_pictures_of_names_that_a_disk_may_not_tell_apart_are_numbered(checkpoint, tmp_path, second):
    first = "a\u0308.png" if second == "\u00e4.png" else "a.png"  # an a with dots, written in two ways
    picture(tmp_path / "in" / first)
    picture(tmp_path / "more" / second)
    evaluated(checkpoint, "--out", tmp_path / "out", "--images", tmp_path / "in", tmp_path / "more")
    names = sorted(path.stem for path in (tmp_path / "out/color").iterdir())
    assert names == [f"00000_{Path(first).stem}", f"00001_{Path(second).stem}"]


ZIPS = [
    ("cityscapes", "leftImg8bit/test/berlin/b_{}_leftImg8bit.png", {"b_{}_leftImg8bit.png": "L"}),
    ("darkzurich", "rgb_anon/test/night/G/G_{}_rgb_anon.png", {
        "labelTrainIds/G_{}.png": "L", "labelTrainIds_invalid/G_{}.png": "L", "confidence/G_{}.png": "I"}),
]  # fmt: skip


@pytest.mark.parametrize("data, image, entries", ZIPS)
def test_submissions(checkpoint, tmp_path, monkeypatch, data, image, entries):
    path = [picture(tmp_path / image.format(n), value=(9, 9, 40)) for n in (1, 2)][-1]
    monkeypatch.setitem(evaluate.SIZES, data, (64, 48))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock without a battery
    evaluated(checkpoint, f"--{data}", tmp_path, "--submit", tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as packed:
        found = {name: Image.open(packed.open(name)).copy() for name in packed.namelist()}
    expected = {entry.format(n): mode for entry, mode in entries.items() for n in (1, 2)}
    modes = {name: image.mode.replace(";16", "") for name, image in found.items()}  # older Pillows: I
    assert modes == expected

    model, _ = evaluate.load_model(checkpoint)
    pixels = datasets.load(datasets.Sample(path))["image"]
    confidence, best = evaluate.probabilities(model, pixels[None] / 255)[0].max(0)
    best, confidence = best[20, 30].item(), confidence[20, 30].item()
    values = [OFFICIAL[best]] if data == "cityscapes" else [best, best, 65535 * confidence]
    packed = [found[entry.format(2)].getpixel((30, 20)) for entry in entries]
    assert packed == pytest.approx(values, abs=0.9)


@pytest.mark.parametrize("data, image, entries", ZIPS)
def test_submissions_that_a_server_would_refuse_get_no_name(
    checkpoint, tmp_path, monkeypatch, data, image, entries
):
    path = picture(tmp_path / image.format(1))
    submit = functools.partial(evaluated, checkpoint, f"--{data}", tmp_path, "--submit", tmp_path / "x.zip")
    fails(DataError, r"_1_.*: the server wants \(\d+, \d+\), not \(64, 48\)", submit)
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.SIZES, data, (64, 48))
        patch.setattr(zipfile.ZipFile, "writestr", lambda *_: None)
        fails(DataError, "entries and images differ", submit)
    picture(path.parent.parent / "H" / (path.name[0].swapcase() + path.name[1:]))
    fails(DataError, "two images would have one name", submit)
    assert not list(tmp_path.glob("x.zip*"))


@pytest.mark.parametrize("switch", ["--json", "--out", "--submit"])
def test_results_that_cannot_be_written_are_told_before_the_work(checkpoint, tmp_path, monkeypatch, switch):
    monkeypatch.setattr(evaluate, "predict", None)
    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", lambda dir: os.truncate("/none/x", 0))
    picture(tmp_path / "rgb_anon/test/night/G/G_1_rgb_anon.png")
    words = [
        "--checkpoint",
        checkpoint,
        "--darkzurich",
        tmp_path,
        "--split",
        "test",
        switch,
        tmp_path / "new",
    ]
    if switch == "--json":
        words += ["--out", tmp_path / "out"]
    fails(OSError, "new.*: cannot be written", evaluate.main, [str(word) for word in words])


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("whole")

    def full(path, content):
        open(path, "w").close()
        raise OSError(28, "disk is full")

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(OSError, "x.json: not written .disk is full", evaluate.write_whole, tmp_path / "x.json", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_odd_arguments_are_named_by_their_type(capsys):
    for value, message in (("x", "invalid int value: 'x'"), ("0", "0 is not above 0")):
        with pytest.raises(SystemExit):
            train.parse_args(["--demo", "--steps", value])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("encoding, name", [("ascii", "Z\u00fcrich"), ("utf-8", "Z\udcfcrich")])
def test_a_name_that_a_terminal_cannot_show_ends_nothing(tmp_path, monkeypatch, encoding, name):
    with open(tmp_path / "log.txt", "w", encoding=encoding) as log:
        monkeypatch.setattr(sys, "stdout", log)
        evaluate.say(f"before {name} after")
    assert (tmp_path / "log.txt").read_text().startswith("before Z\\")


@pytest.mark.parametrize("change, message", [
    (lambda file: {"model": file["model"]}, "no night.pt or last.pt that train.py wrote"),
    (lambda file: file | {"args": file["args"] | {"backbone": "resnet50"}}, "expected weights of this network"),
    (lambda file: file | {"model": {"night.classifier.0.convs.4.1.weight": torch.ones(1)}}, "a pooled branch"),
    (lambda file: {"classifier.0.convs.4.1.weight": torch.ones(1)}, "a pooled branch"),
    (lambda file: file["step"], "holds no state dict"),
])  # fmt: skip
def test_a_file_of_another_network_is_told(checkpoint, tmp_path, change, message):
    torch.save(change(models.read_file(checkpoint)), tmp_path / "x.pt")
    fails(WeightsError, f"x.pt: .*{message}", evaluate.load_model, tmp_path / "x.pt")


# ---------------------------------------------------------------- whole runs


def test_train_save_evaluate(city, tmp_path, capsys):
    out, data = tmp_path / "run", ("--darkzurich", city / "darkzurich")
    more = "--steps", 20, "--lr", 1e-3, "--eval-every", 10, "--crop", 64, 96, "--log-every", 5
    rows = trained(city, out, *more)
    printed = capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["args.json", "last.pt", "log.csv", "night.pt", "samples.png"]
    assert [row["step"] for row in rows if row["miou"]] == ["10", "20"]
    assert [row["step"] for row in rows if not row["pseudo"]] == ["1", "2", "3", "4", "5"]
    assert sum(float(row["seg_day"]) for row in rows[-5:]) < 0.8 * sum(
        float(row["seg_day"]) for row in rows[:5]
    )
    for part in ("rehearsed: the run needs", "step 5/20", "left", "steps/s", "images/s", "MB", *rows[-1]):
        assert part in printed
    picture = Image.open(out / "samples.png")
    assert picture.width == 3 * 258 + 2 and picture.height > 3 * 130 + 2 and "warning" not in printed
    night, last = [evaluated(out / name, *data) for name in ("night.pt", "last.pt")]
    assert night["miou"] == last["miou"] == pytest.approx(float(rows[-1]["miou"]))
    told = night["checkpoint"]
    assert (told["path"], told["step"], told["seed"]) == (str(out / "night.pt"), 20, 0)
    assert night["miou"] != evaluated(out / "last.pt", *data, "--model", "day")["miou"]
    state = models.read_file(out / "night.pt")["model"]
    assert_same_state(models.DeepLab(weights=out / "last.pt").state_dict(), state)


def test_speeds_count_the_images_of_all_domains(capsys, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 12.0)
    args = train.argparse.Namespace(steps=8, adapt_from=0.5, batch_size=3, day_only=False, device="cpu")
    for step, day_only, images in ((4, False, 6), (6, False, 12), (6, True, 3)):
        args.day_only = day_only
        assert train.report({"step": step}, (step - 2, 10.0), args) == (step, 12.0)
        assert f" s left  1.00 steps/s  {images}.0 images/s" in capsys.readouterr().out
    monkeypatch.setattr(train, "peak_memory", lambda _: 0)  # where the system does not tell
    train.report({"step": 8}, (6, 10.0), args)
    assert capsys.readouterr().out == "step 8/8  1.00 steps/s  3.0 images/s\n"


def test_an_error_in_a_validation_loses_no_step(city, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(city, tmp_path / "run", "--steps", 4, "--eval-every", 2, "--day-only")
    assert len(log_of(tmp_path / "run")) == 2


def test_a_second_ctrl_c_stops_at_once_but_not_after_a_bad_file():
    train.STOP.append(DataError("x.png: bad"))
    train.on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        train.on_signal(signal.SIGINT, None)


def test_the_rate_decays_polynomially(city, tmp_path):
    rates = [
        float(row["lr"]) for row in trained(city, tmp_path / "run", "--steps", 4, "--lr", 0.001, "--day-only")
    ]
    assert rates == pytest.approx([0.001 * share**0.9 for share in (1, 0.75, 0.5, 0.25)])


def test_m_n_ends_with_statistics_of_the_nights_or_of_the_source(city, tmp_path):
    found = {}
    for statistics in ("source", "target"):
        out = tmp_path / statistics
        trained(city, out, "--steps", 2, "--night-statistics", statistics)
        found[statistics] = models.read_file(out / "night.pt")["model"]
    model = models.DeepLab()
    model.load_state_dict(found["source"])
    _, nights = datasets.targets("darkzurich", city / "darkzurich")
    frames = [datasets.load(datasets.Sample(night))["image"][None] / 255 for night in nights]
    ccdistill.take_statistics(model, frames)
    for name, value in model.state_dict().items():
        close(value, found["target"][name], 1e-5)
    assert not torch.equal(*[state["backbone.bn1.running_mean"] for state in found.values()])


SWITCHES = {  # and the terms that are gone
    "": [],
    "--style-weight 0": ["style"],
    "--pseudo-weight 0": ["pseudo"],
    "--content-weight 0": ["content", "inherent", "illumination", "js"],
    "--js-weight 0": [],
    "--no-projection": [],
    "--no-teacher": [],
    "--pseudo-threshold 0.9": [],
    "--batch-norm joint": [],
    "--night-weights separate": [],
    "--night-weights shared": [],
    "--night-style fda": [],
    "--night-statistics source": [],
    "--synthetic-night CITY/cityscapes": [],
    "--pairs none": [],
    "--scale 1 1": [],
    "--lr 0.001": [],
    "--seed 1": [],
    "--amp bf16": [],
    "--adapt-from 1": ["pseudo", "content", "style", "inherent", "illumination", "js"],
    "--day-only": ["seg_night", "pseudo", "content", "style", "inherent", "illumination", "js"],
}


def test_every_switch_does_what_it_says(city, tmp_path):
    outcomes = set()
    common = ["--steps", 2, "--adapt-from", 0, "--batch-size", 1, "--pseudo-threshold", 0]
    for number, (switch, gone) in enumerate(SWITCHES.items()):
        out = tmp_path / str(number)
        row = trained(city, out, *common, *switch.replace("CITY", str(city)).split())[-1]
        assert {name for name in SWITCHES["--day-only"] if not row.get(name)} == {*gone}, switch
        state = models.read_file(out / "night.pt")["model"]
        outcomes.add((row["total"], state["backbone.bn1.running_mean"].sum().item()))
    assert len(outcomes) == len(SWITCHES)  # none is without effect


def test_what_does_not_fit_the_targets_is_told_before_the_first_step(tree, tmp_path, capsys):
    for path in (tree / "darkzurich/rgb_anon/train/day").rglob("*.png"):
        Image.open(path).resize((255, 128)).save(path)
    fails(DataError, "is 255 x 128, but .*is 256 x 128", trained, tree, tmp_path / "run", "--steps", 100)
    assert "step 1/" not in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_rehearsal_keeps_nothing(city, tmp_path):
    args = train.parse_args(training(city, tmp_path / "run", "--steps", 8))
    stream, _, _ = train.load_data(args)
    method, _ = train.build(args)
    before = copy.deepcopy(method.state_dict())
    seen = inputs_of(method.night)
    train.rehearse(method, stream, args)
    assert len(seen) == 2 and all(p.grad is None for p in method.parameters())  # S_n and T_n
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize("name, message", [
    ("total", r"step 3 is not finite .*'total': nan.*begin again with a lower --lr and a new --out"),
])  # fmt: skip
def test_nan_ends_the_run_and_says_what_works(city, tmp_path, monkeypatch, name, message):
    forward = ccdistill.CCDistill.forward

    def broken(self, batch, adapt):
        terms = forward(self, batch, adapt)
        return terms | ({name: terms[name] * math.nan} if adapt and self.training else {})

    monkeypatch.setattr(ccdistill.CCDistill, "forward", broken)
    more = "--steps", 4, "--adapt-from", 0.5, "--eval-every", 2
    fails(FloatingPointError, message, trained, city, tmp_path / "run", *more)
    assert len(log_of(tmp_path / "run")) == 2


def assert_same_runs(one, other):
    one_pt, other_pt = [models.read_file(out / "last.pt") for out in (one, other)]
    assert_same_state(one_pt["model"], other_pt["model"])
    for key, moments in one_pt["optimizer"]["state"].items():
        assert_same_state(moments, other_pt["optimizer"]["state"][key])
    nights = [models.read_file(out / "night.pt")["model"] for out in (one, other)]
    assert_same_state(*nights)
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()


@pytest.mark.parametrize("end, more", [
    ("SIGINT", ""),
    ("SIGTERM", "--night-weights separate --workers 1"),
    ("SIGHUP", "--day-only"),
    ("SIGUSR1", "--no-projection"),
    ("SIGXCPU", "--pairs none"),
    ("full disk", "--night-weights shared --no-teacher"),
    ("crash", "--batch-norm joint"),
    ("late crash", ""),
])  # fmt: skip
def test_resume_is_exact_however_a_run_ended(city, tmp_path, monkeypatch, capsys, end, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*more.split(), "--steps", 6, "--eval-every", 3]
    trained(city, whole, *more)
    last = {"full disk": 0, "late crash": 6}.get(end, 3)
    replace = Path.replace

    def ending(aside, path):  # ends the run when a step is saved
        if end == "full disk" and path.exists():
            raise OSError(28, end)
        replace(aside, path)
        if path.name == "last.pt" and models.read_file(path)["step"] == last and not train.STOP:
            signal.raise_signal(signal.Signals[end]) if "SIG" in end else 1 / 0

    with monkeypatch.context() as patch, pytest.raises((ZeroDivisionError, SystemExit, OSError)) as stopped:
        patch.setattr(Path, "replace", ending)
        trained(city, cut, *more)
    if "SIG" in end:
        assert stopped.value.code == 128 + signal.Signals[end] and len(log_of(cut)) == 4
        assert "the same command with --resume goes on" in capsys.readouterr().out
    assert ("not written (full disk)" in str(stopped.value)) == (end == "full disk")
    assert not list(cut.glob("*.tmp"))
    train.STOP.clear()
    for _ in range(2):  # a finished run may be resumed too
        trained(city, cut, *more, "--resume")
        assert_same_runs(whole, cut)


def test_killed_at_any_moment_it_ends_with_the_same_bits(city, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ["--steps", 12, "--eval-every", 2, "--workers", 1, "--log-every", 1, "--resume"]
    trained(city, whole, *more)  # begins where there is nothing
    for _ in range(2):
        process = start(command("train.py", *training(city, out, *more)))
        assert any(line.startswith("step") for line in process.stdout) or not process.wait()
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.wait()
    trained(city, out, *more)
    assert_same_runs(whole, out)


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]


@pytest.mark.parametrize("how, name", [("unread", "SIGHUP"), ("torchrun", "SIGTERM"), ("demo", "SIGINT")])
def test_a_signal_ends_the_run_with_its_step_saved(city, tmp_path, how, name):
    out, number = tmp_path / "day-only", getattr(signal, name)
    words = command("train.py", *training(city, out, "--steps", 9999, "--log-every", 1, "--eval-every", 2))
    if how == "demo":
        words = command("train.py", "--demo", "--out", tmp_path, "--log-every", 1, "--device", "cpu")
        (tmp_path / "city").symlink_to(city)
    process = start([*TWO, *words] if how == "torchrun" else words, start_new_session=True)
    assert any(line.startswith("step 1/") for line in process.stdout), process.stderr.read()
    if how == "unread":  # as from a terminal that was closed: nothing can be printed any more
        process.stdout.close()
        process.stdout = None
        time.sleep(2)
    if how == "torchrun":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert len(log_of(out)) > (2 if how == "unread" else 0) and not (tmp_path / "ccdistill").exists()
    assert process.returncode in (1, 120, 128 + number)
    assert how == "unread" or "goes on" in printed
    assert how != "demo" or (process.returncode == 130 and not errors)


def test_a_signal_after_the_last_step_lets_the_run_end(city, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_: signal.raise_signal(signal.SIGTERM))
    trained(city, tmp_path / "run", "--steps", 2)
    assert (tmp_path / "run/night.pt").exists() and "goes on" not in capsys.readouterr().out


def test_an_out_belongs_to_one_run(city, checkpoint, tmp_path, monkeypatch):
    begin = functools.partial(trained, city, checkpoint.parent, "--steps", 2)
    same = train.parse_args(training(city, checkpoint.parent, "--steps", 2, "--resume"))
    fails(DataError, "holds args.json: add --resume", begin)
    for more, message in (
        ("--steps 3", "steps 2 there, 3 here"),
        ("--lr 1 --seed 4", "lr 0.0005 there, 1.0 here, seed 0"),
        ("--crop 64 64", r"\[32, 64\] there"),
        ("--pairs none", "paired corresp there, none here"),
        ("--amp bf16", "amp off there, bf16 here"),
        ("--no-teacher", "teacher"),
        ("--night-statistics source", "night_statistics target there, source here"),
        (f"--synthetic-night {city}/cityscapes", "ready_made False there, True here"),
    ):
        fails(DataError, f"args.json: is of another run: .*{message}", begin, "--resume", *more.split())
    with monkeypatch.context() as patch:
        patch.setattr(train, "target", lambda args: "acdc")
        fails(
            DataError,
            "target darkzurich there, acdc here",
            train.compare,
            checkpoint.with_name("args.json"),
            same,
        )
    with monkeypatch.context() as patch:
        patch.setattr(train, "PROCESSES", 2)
        fails(DataError, "processes 1 there, 2 here", train.compare, checkpoint.with_name("args.json"), same)
    moved = Path(shutil.copytree(city, tmp_path / "new"))
    begin("--resume", "--cityscapes", moved / "cityscapes", "--workers", 2)


@pytest.mark.parametrize("more", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["log.csv", "last.pt", "night.pt"])
def test_somebody_elses_files_are_not_written_over(city, tmp_path, name, more):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("somebody's")
    fails(DataError, f"holds {name}", trained, city, tmp_path / "run", *more)
    assert (tmp_path / "run" / name).read_text() == "somebody's"


@pytest.mark.parametrize("name, content, message", [
    ("args.json", b'{"lr"', "args.json: is not what train.py wrote"),
    ("args.json", b"[1]", "args.json: is not what train.py wrote"),
    ("args.json", b"\xff\xfe{\0}\0", "args.json: is not what train.py wrote"),
    ("args.json", b"", "args.json: is empty beside last.pt"),
    ("last.pt", b"<html>", "last.pt: not a readable file of tensors"),
    ("last.pt", {"weights": torch.ones(1)}, "last.pt: is not what train.py wrote"),
    ("last.pt", {"model": {}, "optimizer": {}, "rows": [], "step": 1}, "last.pt: expected weights of this"),
    ("last.pt", {"model": {"night.classifier.0.convs.4.1.weight": torch.ones(1)}, "optimizer": {}, "rows": [],
                 "step": 1}, "last.pt: .*a pooled branch"),
])  # fmt: skip
def test_what_a_resumed_run_cannot_read_is_told(city, checkpoint, tmp_path, name, content, message):
    out = Path(shutil.copytree(checkpoint.parent, tmp_path / "run"))
    if isinstance(content, dict):
        torch.save(content, out / name)
    else:
        (out / name).write_bytes(content)
    fails((DataError, WeightsError), message, trained, city, out, "--steps", 2, "--resume")


def test_a_byte_order_mark_is_no_matter(city, checkpoint, tmp_path):
    out = Path(shutil.copytree(checkpoint.parent, tmp_path / "run"))
    (out / "args.json").write_text((out / "args.json").read_text(), "utf-8-sig")
    trained(city, out, "--steps", 2, "--resume")


@pytest.mark.skipif(train.fcntl is None, reason="no locks on Windows")
def test_a_run_that_ended_is_not_begun_again(city, checkpoint, tmp_path):
    for name in ("args.json", "night.pt"):  # last.pt was deleted to save space
        shutil.copy(checkpoint.with_name(name), tmp_path)
    fails(DataError, "and no last.pt to go on from", trained, city, tmp_path, "--steps", 2, "--resume")


def test_one_process_at_a_time_trains_into_an_out(city, tmp_path):
    process = start(command("train.py", *training(city, tmp_path / "run", "--steps", 9999, "--log-every", 1)))
    assert any(line.startswith("step 1/") for line in process.stdout), process.stderr.read()
    args = train.parse_args(training(city, tmp_path / "run", "--steps", 9999, "--resume"))
    fails(DataError, "args.json: another process trains there .*torchrun", train.claim(args).__enter__)
    process.kill()
    process.wait()


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_part_of_torchruns_environment_is_not_believed(city, tmp_path, variable):
    words = command("train.py", *training(city, tmp_path / "run", "--steps", 1, "--day-only"))
    process = start(words, env=os.environ | {variable: "1"})
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "run/night.pt").exists()


def test_a_damaged_file_ends_training_with_the_step_saved(tree, tmp_path):
    number = stream_of(tree).pick("source", range(6), 5)  # the second process's of step 3
    damaged = sorted(tree.rglob("train/demo/*_leftImg8bit.png"))[number]
    os.truncate(damaged, 999)
    message, one, two = f"{damaged.name}: not a readable image", tmp_path / "one", tmp_path / "two"
    more = "--steps", 9, "--adapt-from", 0
    fails(DataError, message, trained, tree, one, *more, "--workers", 1)
    words = command("train.py", *training(tree, two, *more, "--batch-size", 1))
    process = start([*TWO, *words])
    _, errors = process.communicate()
    assert process.returncode and errors.count(message) == 1 and len(log_of(one)) == len(log_of(two)) == 2


@pytest.mark.parametrize("ablation", ["", "--content-weight 0"])
def test_two_processes_are_one_training(city, tmp_path, ablation):
    more = ["--lr", 1e-3, "--steps", 1, "--adapt-from", 0, *ablation.split()]
    process = start([*TWO, *command("train.py", *training(city, tmp_path / "two", *more, "--steps", 3))])
    printed, errors = process.communicate()
    assert process.returncode == 0 and printed.count("at night:") == 1, errors  # one alone speaks
    args = train.parse_args(training(city, tmp_path / "hand", *more))
    stream, _, _ = train.load_data(args)
    method, _ = train.build(args)
    stream.length = 4
    before = copy.deepcopy(method.train().state_dict())
    sums = {}
    for rank, batch in enumerate(train.batches(stream, 0, args)):  # step 1 by hand: gradients add up
        method.load_state_dict(before)
        torch.manual_seed(random.Random(f"{args.seed} 1 {rank}").getrandbits(63))
        terms = method(batch)
        terms["total"].div(2).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.item() / 2
    sums["gradient"] = nn.utils.get_total_norm(
        [p.grad for p in method.parameters() if p.grad is not None]
    ).item()
    row = log_of(tmp_path / "two")[0]
    assert {name: float(row[name]) for name in sums} == pytest.approx(sums, rel=1e-4, abs=1e-5)


def test_a_compiled_run_computes_the_same_and_resumes_without(city, tmp_path, monkeypatch):
    compiled = []
    compile_module = nn.Module.compile

    def without_code(module, **options):
        compiled.append(options)
        compile_module(module, backend="aot_eager", dynamic=options["dynamic"])

    monkeypatch.setattr(nn.Module, "compile", without_code)
    eager = trained(city, tmp_path / "eager", "--steps", 3, "--adapt-from", 0)[0]
    fast = trained(city, tmp_path / "fast", "--steps", 3, "--adapt-from", 0, "--compile")[0]
    assert len(compiled) == 4
    for name in ("total", "gradient"):
        assert float(eager[name]) == pytest.approx(float(fast[name]), rel=1e-4)
    trained(
        city, tmp_path / "fast", "--steps", 3, "--adapt-from", 0, "--resume"
    )  # to compile is the machine's matter


COMMANDS = [
    ("train.py", "give --cityscapes DIR"),
    ("train.py --demo --cityscapes x", "--demo draws its own"),
    ("train.py --cityscapes x --darkzurich x", "x/leftImg8bit/train: no such folder"),
    ("train.py --cityscapes CITY/cityscapes --day-only --weights no.pth", "no.pth: not a readable file"),
    ("train.py --cityscapes CITY/cityscapes --day-only --weights none --darkzurich x", "x: no such folder"),
    ("train.py --demo --night-weights shared --night-statistics target", "norms of M_n's own"),
    ("train.py --demo --adapt-from 25", "0 to 1"),
    ("train.py --demo --steps 0", "0 is not above 0"),
    ("train.py --demo --batch-size -1", "-1 is not above 0"),
    ("train.py --demo --log-every 0", "0 is not above 0"),
    ("train.py --demo --scale 0 1", "0 is not above 0"),
    ("train.py --demo --lr nan", "nan is not above 0"),
    ("train.py --demo --device warp:1", "--device warp:1: "),
    ("train.py --demo --device cuda:77", "(--device cpu works everywhere)"),
    ("evaluate.py --images x", "give --out DIR"),
    ("evaluate.py --acdc x --submit y", "for the test split"),
    ("evaluate.py --acdc x --json CITY", "exists: give"),
    ("evaluate.py --acdc x --out CITY", "exists: give"),
    ("evaluate.py --acdc x --scales 0", "above 0"),
    ("evaluate.py --darkzurich CITY/darkzurich", "no.pt: not a readable file of tensors (No such file"),
]


@pytest.mark.parametrize("words, message", COMMANDS)
def test_what_a_user_can_mend_is_one_line_and_status_2(city, tmp_path, monkeypatch, capsys, words, message):
    program, *more = words.replace("CITY", str(city)).split()
    more += ["--out", str(tmp_path / "run")] if program == "train.py" else ["--checkpoint", "no.pt"]
    monkeypatch.setattr(sys, "argv", [program, *more])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(HERE / program), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{program}: error: ") and message in line


def test_training_needs_no_labelled_nights(tree, tmp_path, capsys):
    shutil.rmtree(tree / "darkzurich/gt")
    trained(tree, tmp_path / "run", "--steps", 1, "--pairs", "none", "--batch-size", 1)
    printed = capsys.readouterr().out
    assert "0 labelled nights" in printed and (tmp_path / "run/night.pt").exists()
    assert "warning: of one image a domain, unpaired" in printed


def test_validation_nights_of_other_names_are_told(tree, tmp_path):
    for night in (tree / "darkzurich/rgb_anon/val").rglob("*.png"):
        night.rename(night.with_suffix(".jpg"))
    fails(
        DataError, "_rgb_anon.jpg: expected a name that ends", trained, tree, tmp_path / "run", "--steps", 1
    )


def test_void_labels_by_night_and_a_picture_that_cannot_be_written_end_no_run(tree, tmp_path, capsys):
    for label in (tree / "darkzurich/gt/val").rglob("*.png"):
        picture(label, (256, 128), "L", 255)
    (tmp_path / "void/samples.png").mkdir(parents=True)  # as if another program held it
    trained(tree, tmp_path / "void", "--steps", 3, "--eval-every", 1)
    printed = capsys.readouterr().out
    assert "every pixel is void" in printed and "samples.png'; the run goes on" in printed


def test_void_labels_of_the_source_end_the_run_before_it_begins(tree, tmp_path):
    for label in (tree / "cityscapes/gtFine/train").rglob("*.png"):
        picture(label, (256, 128), "L", 0)
    message = "every pixel is void .ignored.: nothing to learn from"
    fails(DataError, message, trained, tree, tmp_path / "run", "--steps", 1)


def test_the_demo_compares_its_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        datasets, "make_demo_city", functools.partial(datasets.make_demo_city, train=4, val=2)
    )
    words = ["--demo", "--steps", "2", "--out", str(tmp_path), "--workers", "0", "--device", "cpu"]
    tables = []
    for trains in (True, False):  # the second time nothing is trained again
        train.main(words)
        printed = capsys.readouterr().out
        assert ("step 2/2" in printed) == trains and "0 target days" not in printed
        tables.append(printed[printed.index("   day-only      + S_n  CCDistill\nroad") :])
    assert tables[0] == tables[1]
    assert Image.open(tmp_path / "comparison.png").width == 5 * 258 + 2
    assert not list(tmp_path.rglob("last.pt"))
    night = tmp_path / "s_n/night.pt"
    args = models.read_file(night)["args"]
    assert args["adapt_from"] == 1 and not args["day_only"]
    words[2] = "3"
    fails(DataError, "steps 2 there, 3 here", train.main, words)


def test_a_check_reads_every_file_and_says_all_that_is_wrong(tree, tmp_path, capsys):
    out = tmp_path / "run"
    data = "--cityscapes", tree / "cityscapes", "--darkzurich", tree / "darkzurich"
    words = [str(word) for word in (*data, "--check", "--device", "cpu", "--out", out)]
    train.main(words)
    printed = capsys.readouterr().out
    assert "all 15 images and pairs can be read" in printed  # 6 labelled days, 3 labelled nights, 6 pairs
    line = printed[printed.index("labelled days, percent of pixels: road ") :].splitlines()[0]
    assert ", car " in line and "ignored" not in line
    assert "images are 256 x 128 to 256 x 128" in printed
    spoilt = []
    for pattern in ("**/leftImg8bit/train/**/*_000000_*.png", "**/train/day/**/*000001_rgb_anon.png",
                    "**/gt/val/**/*000002_gt_*.png"):  # fmt: skip
        spoilt.append(next(tree.glob(pattern)))
        spoilt[-1].write_bytes(b"none")
    fails(DataError, "3 things are wrong in 15 images and pairs", train.main, words)
    printed = capsys.readouterr().out
    for path in spoilt:
        assert f"wrong: {path}: not a readable image" in printed
    picture(spoilt[1], (99, 50))
    fails(DataError, "3 things", train.main, words)
    assert f"wrong: {spoilt[1]}: is 99 x 50, but " in capsys.readouterr().out
    for more, count in (("--pairs none", 21), ("--day-only", 9), ("--day-only --night-statistics target", 15),
                        (f"--synthetic-night {tree}/cityscapes", 21)):  # fmt: skip
        fails(DataError, f"in {count} images", train.main, [*words, *more.split()])
    assert not out.exists()
