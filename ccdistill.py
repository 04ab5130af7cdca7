"""CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858): the framework figure, in code order.

    method = CCDistill(DeepLab("resnet18", weights="imagenet"))
    losses = method({"source_day": ..., "source_label": ..., "target_day": ..., "target_night": ...})
    losses["total"].backward()
    features, logits = method.night.eval()(images)      M_n, the one that is used at test time

Any network will do instead of DeepLab, see `CCDistill`. Domains: source_day (S_d), source_night (S_n),
target_day (T_d), target_night (T_n).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

from losses import content_terms, most_probable, pseudo_labels, segmentation_loss, style_distill
from models import ProjectionHead, domains_apart, with_domain_norms

NIGHT_STYLES = ("fda", "color", "histogram", "random")
NIGHT_WEIGHTS = ("shared", "norm", "separate")
BATCH_NORMS = ("domain", "joint")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
STRONG = v2.Compose(
    [v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomApply([v2.GaussianBlur(7, (0.15, 1.15))], p=0.5)]
)


class CCDistill(nn.Module):
    """The whole training objective around a segmenter.

    model: M_d. Called with images (B, 3, H, W) float RGB in [0, 1], it returns (features, logits): F (B, C,
    h, w), what its classifier sees, and P (B, K, H, W), at the labels' size; `model.feature_channels` is C.
    `day` is M_d, `night` is M_n (see `night_model`), `projection` is Proj (None: e is the average of F over
    positions). The weights scale the terms of
        total = seg_day + seg_night + pseudo_weight * pseudo + content_weight * CDC + style_weight * CDS
    and a term whose weight is 0 is not computed. target_paired: T_d and T_n of a sample show one place.
    num_static: so many classes, the first ones, stand still (of Cityscapes' 19: 11), see `most_probable`.
    batch_norm: S and T of one pass share their batch statistics ("joint", the figure's), or each has its own
    and the source's are kept for use ("domain", ours: the model's BatchNorm2d become `models.DomainNorm`).

    mix (ours, see `lesson`): the targets learn from averaged copies of M_d and M_n, see strong colours and
    blur, and T_n carries objects of S_n. Without it they learn from the networks' own confident predictions
    (softmax of `pseudo_threshold`) on the images as they are, as the figure shows.
    """

    def __init__(self, model, night_weights="norm", batch_norm="domain", night_style="random",
                 projection=True, content_weight=1.0, style_weight=1.0, js_weight=0.1, pseudo_weight=1.0,
                 pseudo_threshold=0.9, target_paired=True, mix=True, num_static=11):  # fmt: skip
        super().__init__()
        if batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
        if night_style not in NIGHT_STYLES:
            raise ValueError(f"night style must be one of {NIGHT_STYLES}, got {night_style!r}")
        if num_static < 0:
            raise ValueError(f"num_static: so many classes stand still, 0 or more, not {num_static}")
        if not 0 <= pseudo_threshold <= 1:
            raise ValueError(f"pseudo_threshold: a probability from 0 to 1, not {pseudo_threshold}")
        if not all(0 <= w < math.inf for w in (content_weight, style_weight, js_weight, pseudo_weight)):
            raise ValueError("weights must be finite and not negative")
        if batch_norm == "domain":
            with_domain_norms(model)
        self.day, self.night = model, night_model(model, night_weights)
        self.projection = ProjectionHead(model.feature_channels) if projection else None
        self.night_weights, self.target_paired, self.num_static = night_weights, target_paired, num_static
        self.night_style = night_style
        self.content_weight, self.style_weight, self.js_weight = content_weight, style_weight, js_weight
        self.pseudo_weight, self.pseudo_threshold = pseudo_weight, pseudo_threshold
        self.first, self.day_teacher, self.night_teacher = True, None, None
        if mix and pseudo_weight:
            self.day_teacher = averaged(self.day)
            self.night_teacher = self.day_teacher if self.night is self.day else averaged(self.night)

    def forward(self, batch, adapt=True):
        """batch: source_day, target_day, target_night, each (B, 3, H, W) float RGB in [0, 1], source_label
        (B, H, W) int64, and source_night if it is ready-made. Returns a dict of scalars: seg_day, seg_night,
        pseudo, content and style, unweighted; inherent, illumination and js, the parts of content; total.

        adapt=False: the targets stay out (T_n lends its style only), and their terms do not exist.
        """
        check_batch(batch, adapt, self.first)
        self.first = False
        s_d, label, s_n = batch["source_day"], batch["source_label"], batch.get("source_night")
        if s_n is None:  # Trans
            s_n = night_style(s_d, batch["target_night"], self.night_style, check=False).to(s_d.dtype)
        if adapt:
            t_d, t_n, lesson = batch["target_day"], batch["target_night"], None
            if self.night_teacher:
                t_d, t_n, lesson = self.lesson(s_n, label, t_d, t_n)
            (f_sd, p_sd), (f_td, p_td) = features_and_logits(self.day, s_d, t_d)
            (f_sn, p_sn), (f_tn, p_tn) = features_and_logits(self.night, s_n, t_n)
        else:
            ((f_sd, p_sd),) = features_and_logits(self.day, s_d)
            ((f_sn, p_sn),) = features_and_logits(self.night, s_n)

        terms, parts = {}, {}
        terms["seg_day"], terms["seg_night"] = (segmentation_loss(p, label) for p in (p_sd, p_sn))
        if adapt and self.pseudo_weight:
            (y_td, w_td), (y_tn, w_tn) = lesson or self.plain_lesson(p_td, p_tn)
            terms["pseudo"] = segmentation_loss(p_td, y_td, w_td) + segmentation_loss(p_tn, y_tn, w_tn)
        if adapt and self.content_weight:
            e = [self.embed(f) for f in (f_sd, f_sn, f_td, f_tn)]
            parts = content_terms(*e, self.target_paired, js=self.js_weight != 0)
            terms["content"] = parts["inherent"] + parts["illumination"] + self.js_weight * parts.get("js", 0)
        if adapt and self.style_weight:
            terms["style"] = style_distill(f_sd, f_sn, f_td, f_tn, self.target_paired)
        # seg_day and seg_night, and any term that you add above, have weight 1.
        total = sum(getattr(self, f"{name}_weight", 1.0) * term for name, term in terms.items())
        return terms | parts | {"total": total}

    def embed(self, features):
        """F (B, C, h, w) -> e (B, D)."""
        return features.mean((2, 3)) if self.projection is None else self.projection(features)

    def plain_lesson(self, p_td, p_tn):
        """[(labels, None)] of T_d and T_n, (B, H, W): own confident predictions, logits (B, K, H, W)."""
        day = p_td if self.target_paired else None
        night = pseudo_labels(p_tn, day, self.pseudo_threshold, self.num_static)
        return [(pseudo_labels(p_td, threshold=self.pseudo_threshold), None), (night, None)]

    @torch.no_grad()
    def lesson(self, s_n, label, t_d, t_n):
        """What the targets learn, ours: (T_d, T_n, [(labels, weights)] of both, (B, H, W)).

        Averaged copies of M_d and M_n label the plain images (mean teacher; Tarvainen & Valpola, 2017), and
        the share of confident pixels weighs an image's loss (DAFormer; Hoyer et al., CVPR 2022). Then half of
        the classes of S_n are pasted into T_n with their labels (DACS; Tranheden et al., WACV 2021), and both
        images get strong colours and blur.
        """
        for teacher, student in {self.day_teacher: self.day, self.night_teacher: self.night}.items():
            if self.training:
                teacher.update_parameters(student)
        ((_, p_td),) = features_and_logits(self.day_teacher.eval(), t_d)
        ((_, p_tn),) = features_and_logits(self.night_teacher.eval(), t_n)
        c_td, y_td = most_probable(p_td)
        c_tn, y_tn = most_probable(p_tn, p_td if self.target_paired else None, self.num_static)
        confident = [(c >= self.pseudo_threshold).float() for c in (c_td, c_tn)]
        w_td, w_tn = (c.mean((1, 2), keepdim=True).expand_as(c) for c in confident)
        coins = torch.rand(len(label), 256, device=label.device) < 0.5  # one for each class
        paste = coins.gather(1, label.flatten(1).clamp(0, 255)).view_as(label) & (label != 255)
        y_tn, w_tn = torch.where(paste, label, y_tn), torch.where(paste, 1.0, w_tn)
        with torch.autocast(t_n.device.type, enabled=False):
            t_n = torch.where(paste[:, None], s_n, t_n)
            t_d, t_n = (torch.stack([STRONG(image) for image in images]) for images in (t_d, t_n))
        return t_d, t_n, [(y_td, w_td), (y_tn, w_tn)]

    def _apply(self, fn, recurse=True):  # .to(), .to_empty() and the like may replace parameters
        super()._apply(fn, recurse)
        share_all_but_norms(self.day, self.night, self.night_weights)
        return self

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        share_all_but_norms(self.day, self.night, self.night_weights)  # assign=True replaces parameters
        return result


def check_batch(batch, adapt, first=True):
    """Raise ValueError naming the entry of a batch that `CCDistill.forward` cannot take. The values of images on
    a GPU are looked at in the first batch alone: the answer waits for the device."""
    used = ["source_day", "source_night" if batch.get("source_night") is not None else "target_night"]
    used = dict.fromkeys([*used, "target_day", "target_night"] if adapt else used)
    wanted, label = getattr(batch.get("source_day"), "shape", None), batch.get("source_label")
    for name in used:
        images = batch.get(name)
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != 3:
            got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"{name}: expected a float tensor (B, 3, H, W), got {got}")
        if images.shape != wanted and (adapt or name == "source_night"):
            got = f"source_day {tuple(wanted)}, {name} {tuple(images.shape)}"
            raise ValueError(f"the domains of a batch must have one shape, got {got}")
    if first or images.device.type == "cpu":
        _check_range(*(batch[name] for name in used))
    if not isinstance(label, torch.Tensor) or label.dtype != torch.int64 or label.shape != images[:, 0].shape:
        got = f"{label.dtype} {tuple(label.shape)}" if hasattr(label, "shape") else type(label).__name__
        raise ValueError(f"source_label: expected int64 {tuple(images[:, 0].shape)}, got {got}")


def averaged(network):
    """A copy whose weights follow the network's, by 1 % a step; its statistics are the network's."""
    return AveragedModel(network, multi_avg_fn=_follow).requires_grad_(False)


def _follow(averages, values, _):  # torch's own makes a function that cannot be pickled
    torch._foreach_lerp_(averages, values, 0.01)


def features_and_logits(network, *domains):
    """[(F, P)] of each domain; all are one batch, as the figure draws S_d and T_d through M_d."""
    with domains_apart(network, len(domains)):
        output = network(torch.cat(domains))
    pair = isinstance(output, tuple | list) and len(output) == 2
    pair = pair and all(isinstance(maps, torch.Tensor) and maps.ndim == 4 for maps in output)
    if not pair or output[1].shape[2:] != domains[0].shape[2:]:
        what = "(features (B, C, h, w), logits (B, K, H, W)), H and W those of the images"
        raise TypeError(f"the model must return {what}")
    sizes = [len(domain) for domain in domains]
    return list(zip(*(maps.split(sizes) for maps in output), strict=True))


def night_model(day, night_weights):
    """M_n for a given M_d. "shared": the same module; "norm": the weights are M_d's, only normalisation
    layers (their statistics, scale and shift) are M_n's own; "separate": a copy of everything. The figure
    does not say which. Raises ValueError."""
    if night_weights not in NIGHT_WEIGHTS:
        raise ValueError(f"night weights must be one of {NIGHT_WEIGHTS}, got {night_weights!r}")
    if night_weights == "shared":
        return day
    try:
        night = copy.deepcopy(day)
    except RuntimeError as error:  # a weight that hooks compute, as the old spectral_norm's
        way_out = "use torch.nn.utils.parametrizations, or night weights 'shared'"
        raise ValueError(f"this model cannot be copied for M_n ({error}); {way_out}") from None
    share_all_but_norms(day, night, night_weights)
    return night


def share_all_but_norms(day, night, night_weights):
    """Where only norms are M_n's own, make all its other parameters those of M_d."""
    for mine, theirs in zip(night.modules(), day.modules(), strict=True) if night_weights == "norm" else ():
        if not isinstance(mine, NORMS):
            mine._parameters.update(theirs._parameters)


@torch.no_grad()
def take_night_statistics(network, nights):
    """Give M_n's batch norms the statistics of real target nights, in place, when training has ended (ours).

    In training their running statistics are those of S_n, which has labels but is only styled as night; the
    weights stay (AdaBN; Li et al., 2017). nights: batches (B, 3, H, W) of T_n in [0, 1], each counted alike;
    ValueError if there is none. The network is in eval mode afterwards.
    """
    norms = [m for m in network.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before, momenta = copy.deepcopy([norm.state_dict() for norm in norms]), [norm.momentum for norm in norms]
    seen, whole = 0, False
    try:
        for seen, images in enumerate(nights, 1):
            _check_range(images)
            for norm in norms if seen == 1 else ():
                norm.train().reset_running_stats()
                norm.momentum = None  # a plain average over the batches
            network(images)
        whole = True
    finally:
        for norm, state, momentum in zip(norms, before, momenta, strict=True):
            norm.momentum = momentum
            # On an error, and where a norm saw no batch (PooledNorm does not count single images), as before.
            if not (whole and norm.num_batches_tracked):
                norm.load_state_dict(state)
        network.eval()
    if not seen:
        raise ValueError("nights: no batch to take statistics of")


# ---- Trans: S_d in the light of T_n ------------------------------------------------------------------------


@torch.no_grad()
def night_style(day, night, method="random", check=True):
    """The light of `night` on the content of `day`, without a trained network (our choice).

    fda: the lowest spatial frequencies take the night's amplitude and keep their phase (Yang & Soatto, CVPR
    2020, with their beta 0.01). color: each RGB channel takes the night's mean and standard deviation (after
    Reinhard et al., 2001, who did it in another colour space). histogram: each channel takes the night's
    whole histogram. random: one of the last two, drawn for each image. day: (B, 3, H, W), night: (B or 1, 3,
    any, any), float RGB in [0, 1]. Returns (B, 3, H, W) float32 in [0, 1]. Raises ValueError on an unknown
    method, other shapes or, with `check`, other values.
    """
    if method not in NIGHT_STYLES:
        raise ValueError(f"night style must be one of {NIGHT_STYLES}, got {method!r}")
    if {day.ndim, night.ndim} != {4} or day.shape[1] != 3 or night.shape[:2] not in {day.shape[:2], (1, 3)}:
        shapes = f"day {tuple(day.shape)}, night {tuple(night.shape)}"
        raise ValueError(f"expected (B, 3, H, W) twice, got {shapes}")
    with torch.autocast(day.device.type, enabled=False):
        day, night = day.float(), night.float()
        if check:  # on a GPU it waits for the device
            _check_range(day, night)
        if method == "random":
            coin = torch.rand(len(day), 1, 1, 1, device=day.device) < 0.5
            return torch.where(coin, _colors(day, night), _histograms(day, night)).clamp(0, 1)
        style = {"fda": _low_frequencies, "color": _colors, "histogram": _histograms}[method]
        return style(day, night).clamp(0, 1)


def _check_range(*images):
    """Raise ValueError unless all values are in [0, 1]. One exchange with the device."""
    low, high = torch.stack([limit.float() for x in images for limit in x.aminmax()]).aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"expected RGB in [0, 1], not normalised, got {low:.3g} to {high:.3g}")


def _low_frequencies(day, night, beta=0.01):
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
