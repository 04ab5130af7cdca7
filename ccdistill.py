"""CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858): the framework figure, in code order.

method = CCDistill(DeepLab("resnet18"))
losses = method({"source_day": ..., "source_label": ..., "target_day": ..., "target_night": ...})
losses["total"].backward()
features, logits = method.night(images)  # M_n, the one that is used at test time
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from losses import content_distill, pseudo_labels, segmentation_loss, style_distill
from models import ProjectionHead, apart

NIGHT_STYLES = ("fda", "color", "histogram", "random")
NIGHT_WEIGHTS = ("shared", "norm", "separate")
BATCH_NORMS = ("joint", "domain")
STRENGTH = {"fda": 0.01}  # of the others: 1


@torch.no_grad()
def night_style(day, night, method="random", strength=None):
    """The figure's "Trans": the light of `night` on the content of `day`; no trained network (our choice).

    fda: the lowest spatial frequencies take the night's amplitude and keep their phase (Yang & Soatto, CVPR
    2020); strength is the paper's beta, the half-width of the exchanged window as a share of the shorter
    side. color: each RGB channel takes the night's mean and standard deviation (after Reinhard et al., 2001,
    who did it in another colour space). histogram: each channel takes the night's whole histogram. random:
    one of the last two, drawn for each image. Their strength blends from 0 (day) to 1. day: (B, 3, H, W),
    night: (B or 1, 3, any, any), float RGB in [0, 1]. Returns (B, 3, H, W) float32 in [0, 1]. Raises
    ValueError on an unknown method or shapes that do not match.
    """
    if method not in NIGHT_STYLES:
        raise ValueError(f"night style must be one of {NIGHT_STYLES}, got {method!r}")
    if {day.ndim, night.ndim} != {4} or day.shape[1] != 3 or night.shape[:2] not in {day.shape[:2], (1, 3)}:
        shapes = f"day {tuple(day.shape)}, night {tuple(night.shape)}"
        raise ValueError(f"expected (B, 3, H, W) twice, got {shapes}")
    strength = STRENGTH.get(method, 1.0) if strength is None else strength
    with torch.autocast(day.device.type, enabled=False):
        day, night = day.float(), night.float()
        if method == "fda":
            return _low_frequencies(day, night, strength).clamp(0, 1)
        if method == "random":
            coin = torch.rand(len(day), 1, 1, 1, device=day.device) < 0.5
            styled = torch.where(coin, _colors(day, night), _histograms(day, night))
        else:
            styled = (_colors if method == "color" else _histograms)(day, night)
        return torch.lerp(day, styled, strength).clamp(0, 1)


def _low_frequencies(day, night, beta):
    height, width = day.shape[2:]
    night = F.interpolate(night, (height, width), mode="bilinear", antialias=True)
    spectrum, target = torch.fft.rfft2(day), torch.fft.rfft2(night).abs()
    b = int(beta * min(height, width))
    low = torch.fft.fftfreq(height, 1 / height, device=day.device).abs()[:, None] <= b
    low = low & (torch.arange(width // 2 + 1, device=day.device) <= b)
    amplitude = torch.where(low, target, spectrum.abs())
    return torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=(height, width))


def _colors(day, night):
    std, mean = torch.std_mean(day, (2, 3), keepdim=True, correction=0)
    night_std, night_mean = torch.std_mean(night, (2, 3), keepdim=True, correction=0)
    return (day - mean) / std.clamp(min=1e-5) * night_std + night_mean


def _histograms(day, night):
    def levels_and_ranks(images):  # 256 levels, and the share of a channel's pixels up to each
        levels = (images.flatten(0, 1).flatten(1) * 255).round().long()
        place = levels + 256 * torch.arange(len(levels), device=images.device)[:, None]
        counts = place.flatten().bincount(minlength=256 * len(levels)).view(-1, 256)
        return levels, counts.cumsum(1) / levels.shape[1]

    levels, ranks = levels_and_ranks(day)
    _, night_ranks = levels_and_ranks(night.expand(len(day), -1, -1, -1))
    table = torch.searchsorted(night_ranks, ranks).clamp(max=255) / 255
    return table.gather(1, levels).view_as(day)


def night_model(day, night_weights):
    """M_n for a given M_d. "shared": the same module; "norm": convolutions are M_d's, normalisation layers
    (statistics, scale and shift) a copy; "separate": a copy of everything. The figure does not say which."""
    if night_weights not in NIGHT_WEIGHTS:
        raise ValueError(f"night weights must be one of {NIGHT_WEIGHTS}, got {night_weights!r}")
    if night_weights == "shared":
        return day
    night = copy.deepcopy(day)
    if night_weights == "norm":
        for mine, theirs in zip(night.modules(), day.modules(), strict=True):
            if not isinstance(mine, nn.modules.batchnorm._BatchNorm):
                for name, parameter in theirs.named_parameters(recurse=False):
                    setattr(mine, name, parameter)
    return night


class CCDistill(nn.Module):
    """The whole training objective. `day` is M_d, `night` is M_n (see `night_model`), `projection` is Proj.
    In training call `networks`, not `day` or `night`: a batch is taken apart as the last call said.

    model: a DeepLab. The weights scale the terms of
        total = seg(S_d) + seg(S_n) + pseudo_weight * pseudo + content_weight * CDC + style_weight * CDS
    and a term whose weight is 0 is not computed. projection=False: e is the globally average-pooled F.
    batch_norm: in training, batch statistics are those of S and T together ("joint", the figure's: two days,
    or two nights, are one batch), or of each domain alone, the source's being kept for use ("domain", ours).
    target_paired: T_d and T_n of a sample show the same place.
    """

    def __init__(self, model, night_weights="norm", batch_norm="domain", night_style="random",
                 night_strength=None, projection=True, embedding_dim=128, content_weight=1.0, style_weight=1.0,
                 js_weight=0.1, pseudo_weight=0.25, pseudo_threshold=0.6, target_paired=True):  # fmt: skip
        super().__init__()
        self.day = model
        self.night = night_model(model, night_weights)
        if batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
        self.night_weights, self.batch_norm = night_weights, batch_norm
        self.projection = ProjectionHead(model.feature_channels, embedding_dim) if projection else None
        self.night_style, self.night_strength = night_style, night_strength
        self.content_weight, self.style_weight, self.js_weight = content_weight, style_weight, js_weight
        self.pseudo_weight, self.pseudo_threshold = pseudo_weight, pseudo_threshold
        self.target_paired = target_paired
        # "target": everything. "source": S_d and S_n alone, the warm-up of train.py (ours). "day": S_d alone,
        # the baseline.
        self.stage = "target"

    def embed(self, features):
        """F (B, C, h, w) -> e (B, D)."""
        return features.mean((2, 3)) if self.projection is None else self.projection(features)

    def networks(self, days, nights):
        """[(F, P)] of M_d on each batch of days and of M_n on each of nights, in one pass where they share
        their convolutions."""
        runs = [(self.day, days), (self.night, nights)] if nights else [(self.day, days)]
        found = []
        for run in [[run] for run in runs] if self.night_weights == "separate" else [runs]:
            images = [batch for _, batches in run for batch in batches]
            parts = [(net, batches, True) for net, batches in run]
            if self.batch_norm == "domain":  # the source, which has the labels, comes first
                parts = [(net, [b], b is batches[0]) for net, batches in run for b in batches]
            networks, batches, noted = zip(*parts, strict=True)
            apart(networks, [sum(map(len, part)) for part in batches], noted)
            sizes = [len(batch) for batch in images]
            maps = (values.split(sizes) for values in run[0][0](torch.cat(images)))  # F and P of all
            found += zip(*maps, strict=True)
        return found

    def forward(self, batch):
        """batch: source_day, target_day, target_night, optionally source_night, each (B, 3, H, W) float RGB
        in [0, 1], and source_label (B, H, W) int64. Returns scalars: seg_day, seg_night, pseudo, content,
        style (unweighted) and total."""
        source_day, label = batch["source_day"], batch["source_label"]
        if self.stage == "day":
            ((_, p_sd),) = self.networks([source_day], [])
            loss = segmentation_loss(p_sd, label)
            return {"seg_day": loss, "total": loss}
        target_day, target_night = batch["target_day"], batch["target_night"]
        source_night = batch.get("source_night")
        if source_night is None:
            source_night = night_style(source_day, target_night, self.night_style, self.night_strength)

        losses = dict.fromkeys(("pseudo", "content", "style"), label.new_zeros((), dtype=torch.float32))
        if self.stage == "source":
            (_, p_sd), (_, p_sn) = self.networks([source_day], [source_night])
        else:
            maps = self.networks([source_day, target_day], [source_night, target_night])
            (f_sd, p_sd), (f_td, p_td), (f_sn, p_sn), (f_tn, p_tn) = maps
            if self.pseudo_weight:
                losses["pseudo"] = self.pseudo(p_td, p_tn)
            if self.content_weight:
                embeddings = [self.embed(f) for f in (f_sd, f_sn, f_td, f_tn)]
                losses["content"] = content_distill(*embeddings, self.js_weight, self.target_paired)
            if self.style_weight:
                losses["style"] = style_distill(f_sd, f_sn, f_td, f_tn)
        losses["seg_day"], losses["seg_night"] = (segmentation_loss(p, label) for p in (p_sd, p_sn))
        losses["total"] = (
            losses["seg_day"]
            + losses["seg_night"]
            + self.pseudo_weight * losses["pseudo"]
            + self.content_weight * losses["content"]
            + self.style_weight * losses["style"]
        )
        return losses

    def pseudo(self, p_td, p_tn):
        """L_pseudo: the targets learn from their own confident predictions; with paired targets the day has
        its say in the night's static classes. Logits (B, K, H, W). Returns a scalar."""
        day = pseudo_labels(p_td, threshold=self.pseudo_threshold)
        night = pseudo_labels(p_tn, p_td if self.target_paired else None, threshold=self.pseudo_threshold)
        return segmentation_loss(p_td, day) + segmentation_loss(p_tn, night)
