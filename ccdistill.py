"""CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858): the framework figure, in code order.

Domains: source_day (S_d), source_night (S_n), target_day (T_d), target_night (T_n). At test time M_n is used.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import losses
from losses import check_shapes, most_probable, pseudo_labels, segmentation_loss
from models import ProjectionHead

NIGHT_STYLES = ("random", "color", "histogram", "fda")
NIGHT_WEIGHTS = ("norm", "shared", "separate")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
BLUR = v2.RandomApply([v2.GaussianBlur(7, (0.15, 1.15))], p=0.5)
STRONG = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), BLUR])


class CCDistill(nn.Module):
    """The whole training objective around any segmenter.

    model: M_d. Called with images (B, 3, H, W) float RGB in [0, 1], it returns (features, logits): F
    (B, C, h, w), what its classifier sees, and P (B, K, H, W), at the labels' size; `model.feature_channels`
    is C. projection False: e is F averaged over positions. A term of weight 0 (but for js) is not computed.
    target_paired: T_d[i] and T_n[i] show one place; then num_static, how many classes (the first ones) do not
    move, must be given unless K is 19. joint: S and T are one batch to batch norm, as in the figure; else
    (ours) each domain has batch statistics of its own, and only the source's enter the running ones."""

    def __init__(self, model, *, night_weights="norm", joint=False, night_style="random", projection=True,
                 content_weight=1.0, style_weight=1.0, js_weight=0.01, pseudo_weight=1.0,
                 pseudo_threshold=0.9, target_paired=True, teacher=True, num_static=None):  # fmt: skip
        super().__init__()
        self.day, self.night = model, night_model(model, night_weights)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection = ProjectionHead(model.feature_channels) if projection and content_weight else pool
        networks = nn.ModuleDict({"day": self.day, "night": self.night})
        self.teacher = copy.deepcopy(networks).requires_grad_(False) if teacher and pseudo_weight else None
        self.joint, self.style, self.target_paired = joint, night_style, target_paired
        self.content_weight, self.style_weight, self.js_weight = content_weight, style_weight, js_weight
        self.pseudo_weight, self.pseudo_threshold = pseudo_weight, pseudo_threshold
        self.num_static = num_static

    def forward(self, batch, adapt=True):
        """batch: source_day, target_day, target_night, each (B, 3, H, W) float RGB in [0, 1], source_label
        (B, H, W) int64, source_night if it is ready-made; ValueError for other shapes or values. Returns a
        dict of scalars: each term, unweighted, the parts of CDC, and total. adapt=False: only the source is
        learned from, and the teacher is a copy of the networks."""
        check_images(**{name: images for name, images in batch.items() if name != "source_label"})
        s_d, y = batch["source_day"], batch["source_label"]
        check_shapes(3, source_label=y, source_day=s_d[:, 0])
        if self.teacher and self.training:
            self.update_teacher(0.01 if adapt else 1.0)
        s_n = batch.get("source_night")
        if s_n is None:  # Trans
            s_n = night_style(s_d, batch["target_night"], self.style)
        if not adapt:
            p_sd, p_sn = self.day(s_d)[1], self.night(s_n)[1]
            if self.target_paired and self.pseudo_weight:  # raises now, not when the targets join
                losses.static_classes(p_sd.shape[1], self.num_static)
            seg_day, seg_night = segmentation_loss(p_sd, y), segmentation_loss(p_sn, y)
            return {"seg_day": seg_day, "seg_night": seg_night, "total": seg_day + seg_night}

        t_d, t_n = batch["target_day"], batch["target_night"]
        if self.teacher:
            t_d, t_n, y_td, y_tn, w_td, w_tn = self.teach(s_n, y, t_d, t_n)
        if self.joint:
            (f_sd, f_td), (p_sd, p_td) = (x.chunk(2) for x in self.day(torch.cat([s_d, t_d])))
            (f_sn, f_tn), (p_sn, p_tn) = (x.chunk(2) for x in self.night(torch.cat([s_n, t_n])))
        else:
            f_sd, p_sd = self.day(s_d)
            f_sn, p_sn = self.night(s_n)
            with momentum((self.day, self.night), 0.0):  # running statistics are the source's alone
                f_td, p_td = self.day(t_d)
                f_tn, p_tn = self.night(t_n)
        terms = {"seg_day": segmentation_loss(p_sd, y), "seg_night": segmentation_loss(p_sn, y)}
        if self.pseudo_weight:
            if not self.teacher:  # own confident predictions, as in the figure
                day_logits, w_td, w_tn = p_td if self.target_paired else None, None, None
                y_td = pseudo_labels(p_td, threshold=self.pseudo_threshold)
                y_tn = pseudo_labels(p_tn, day_logits, self.pseudo_threshold, self.num_static)
            terms["pseudo"] = segmentation_loss(p_td, y_td, w_td) + segmentation_loss(p_tn, y_tn, w_tn)
        if self.content_weight:
            e = [self.projection(f) for f in (f_sd, f_sn, f_td, f_tn)]
            parts = losses.content_terms(*e, target_paired=self.target_paired)
            content = parts["inherent"] + parts["illumination"] + self.js_weight * parts["js"]
            terms |= {"content": content, **parts}
        if self.style_weight:
            terms["style"] = losses.style_distill(f_sd, f_sn, f_td, f_tn, target_paired=self.target_paired)
        terms["total"] = (  # a term of your own: put it into terms above, and add it here
            terms["seg_day"] + terms["seg_night"] + self.pseudo_weight * terms.get("pseudo", 0)
            + self.content_weight * terms.get("content", 0) + self.style_weight * terms.get("style", 0)
        )  # fmt: skip
        return terms

    @torch.no_grad()
    def teach(self, s_n, label, t_d, t_n):
        """What the targets learn (ours): T_d, T_n, their labels and the labels' weights, (B, H, W).

        Averaged copies of M_d and M_n label the plain images (mean teacher; Tarvainen & Valpola, 2017); the
        share of confident pixels weighs an image's loss (DAFormer; Hoyer et al., CVPR 2022). Then half of the
        classes that S_n shows are pasted into T_n with their labels (DACS; Tranheden et al., WACV 2021), and
        both images get strong colours and blur."""
        teacher = self.teacher.eval()
        p_td, p_tn = teacher["day"](t_d)[1], teacher["night"](t_n)[1]
        c_td, y_td = most_probable(p_td)
        c_tn, y_tn = most_probable(p_tn, p_td if self.target_paired else None, self.num_static)
        confident = [(c >= self.pseudo_threshold).float() for c in (c_td, c_tn)]
        w_td, w_tn = [share.mean((1, 2), keepdim=True).expand_as(share) for share in confident]
        paste = half_of_the_classes(label)
        y_tn, w_tn = torch.where(paste, label, y_tn), w_tn.masked_fill(paste, 1.0)
        with torch.autocast(t_n.device.type, enabled=False):
            t_d, t_n = STRONG(t_d), STRONG(torch.where(paste[:, None], s_n, t_n))
        return t_d, t_n, y_td, y_tn, w_td, w_tn

    @torch.no_grad()
    def update_teacher(self, share):
        """Move the teacher's weights by this share towards the networks'; its norms take their statistics."""
        teacher, networks = self.teacher, nn.ModuleDict({"day": self.day, "night": self.night})
        torch._foreach_lerp_([*teacher.parameters()], [*networks.parameters()], share)  # one kernel for all
        mine, theirs = ([b for b in m.buffers() if b.is_floating_point()] for m in (teacher, networks))
        if mine:
            torch._foreach_copy_(mine, theirs)


def check_images(**images):
    """ValueError unless all are float (B, 3, H, W) of one shape, in [0, 1] (on a CPU: a GPU would stall)."""
    check_shapes(4, **images)
    for name, x in images.items():
        low, high = (limit.item() for limit in x.aminmax()) if x.device.type == "cpu" else (0, 1)
        if x.shape[1] != 3 or not x.is_floating_point() or not 0 <= low <= high <= 1:
            wanted = "expected float RGB (B, 3, H, W) in [0, 1], not normalised (uint8: divide by 255)"
            raise ValueError(f"{name}: {wanted}, got {tuple(x.shape)} {x.dtype}, {low:.3g} to {high:.3g}")


@contextlib.contextmanager
def momentum(networks, value):
    """Inside, running statistics of the networks' norms move with this momentum (0: not at all, no call is
    counted; None: as a plain average over batches, begun anew). Yields the norms."""
    norms = [m for m in nn.ModuleList(networks).modules() if getattr(m, "track_running_stats", False)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, (_, count) in zip(norms, before, strict=True):
            uncounted = value == 0 and not isinstance(norm, nn.SyncBatchNorm)  # which has to count
            norm.momentum, norm.num_batches_tracked = value, None if uncounted else torch.zeros_like(count)
        yield norms
    finally:
        for norm, its_own in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = its_own


def half_of_the_classes(label):
    """(B, H, W) bool: the pixels of half (rounded up) of the classes that each label (B, H, W) holds."""
    there = torch.zeros(len(label), 256, device=label.device).scatter_(1, label.flatten(1), 1.0)
    there[:, 255] = 0
    order = ((1 + torch.rand_like(there)) * there).argsort(1, descending=True)  # at random, absent ones last
    chosen = order.argsort(1) < (there.sum(1, keepdim=True) + 1) // 2  # by rank
    return chosen.gather(1, label.flatten(1)).view_as(label)


def night_model(day, night_weights):
    """M_n for a given M_d; the figure does not say what they share. "shared": all, one module. "norm": all
    but normalisation layers (statistics, scale, shift). "separate": nothing."""
    if night_weights not in NIGHT_WEIGHTS:
        raise ValueError(f"night_weights: expected one of {NIGHT_WEIGHTS}, got {night_weights!r}")
    if night_weights == "shared":
        return day
    others = [m for m in day.modules() if night_weights == "norm" and not isinstance(m, NORMS)]
    shared = {id(p): p for module in others for p in module.parameters(recurse=False)}
    return copy.deepcopy(day, shared)  # which copies nothing that it finds there


@torch.no_grad()
def take_night_statistics(network, nights):
    """Give M_n's batch norms the statistics of real target nights when training has ended (ours; AdaBN, Li et
    al., 2017): in training they were those of S_n. nights: batches (B, 3, H, W) of T_n in [0, 1], of any
    size, each counted alike; ValueError without one. The network is in eval mode afterwards."""
    network.eval()
    images = None
    with momentum([network], None) as norms:
        for norm in norms:
            norm.train(isinstance(norm, nn.modules.batchnorm._BatchNorm))
        for images in nights:
            check_images(nights=images)
            network(images)
    network.eval()
    if images is None:
        raise ValueError("nights: no batch to take statistics of")


@torch.no_grad()
def night_style(day, night, method="random"):
    """Trans: the light of `night` on the content of `day`, without a trained network (our choice). Both are
    (B, 3, H, W) float RGB in [0, 1], H and W may differ; so is the result, at the day's size.

    color: each RGB channel takes the night's mean and deviation (after Reinhard et al., 2001). histogram: the
    night's whole histogram. random: one of these two, drawn for each image. fda: the lowest spatial
    frequencies take the night's amplitude (Yang & Soatto, CVPR 2020, with their beta 0.01)."""
    check_images(day=day)
    check_images(night=night)
    dtype, day, night = day.dtype, day.float(), night.float()
    if method == "random":
        coin = torch.rand(len(day), 1, 1, 1, device=day.device) < 0.5
        styled = torch.where(coin, colors(day, night), histograms(day, night))
    else:
        styled = {"color": colors, "histogram": histograms, "fda": low_frequencies}[method](day, night)
    return styled.clamp(0, 1).to(dtype)


def colors(day, night):
    std, mean = torch.std_mean(day, (2, 3), keepdim=True, correction=0)
    night_std, night_mean = torch.std_mean(night, (2, 3), keepdim=True, correction=0)
    return (day - mean) / std.clamp(min=1e-5) * night_std + night_mean


def histograms(day, night):
    def levels_and_ranks(images):
        """256 levels, and the share of a channel's pixels up to each."""
        levels = (images.flatten(0, 1).flatten(1) * 255).round().long()
        counts = torch.zeros(len(levels), 256, device=levels.device)  # bincount would wait for a GPU
        counts.scatter_add_(1, levels, counts.new_ones(()).expand_as(levels))
        return levels, counts.cumsum(1) / levels.shape[1]

    levels, ranks = levels_and_ranks(day)
    _, night_ranks = levels_and_ranks(night)
    table = torch.searchsorted(night_ranks, ranks).clamp(max=255) / 255
    return table.gather(1, levels).view_as(day)


def low_frequencies(day, night, beta=0.01):
    height, width = day.shape[2:]
    night = F.interpolate(night, (height, width), mode="bilinear", antialias=True)
    spectrum, target = torch.fft.rfft2(day), torch.fft.rfft2(night)
    b = int(beta * min(height, width))
    low = torch.fft.fftfreq(height, 1 / height, device=day.device).abs()[:, None] <= b
    low = low & (torch.arange(width // 2 + 1, device=day.device) <= b)
    amplitude = torch.where(low, target.abs(), spectrum.abs())
    return torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=(height, width))
