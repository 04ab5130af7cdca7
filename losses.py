"""The equations of CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858). Needs torch alone: copy
this file into your own code.

Domains come in one order: source_day (S_d), source_night (S_n), target_day (T_d), target_night (T_n). The
graphs follow the paper's framework figure; the L2 norm, the means over all entries, the softmax inside the
divergence and all weights are our reading; `place_distill` is ours. "Gain" is in points of mIoU at night, of ten
seeds on drawn pairs, beside an averaged teacher (RESULTS.md). All is computed in at least float32, also under
autocast. Shapes that do not fit raise ValueError.
"""

import math

import torch
import torch.nn.functional as F

TEMPERATURE = 0.1  # of the softmax inside JS


def correlation(a, b):
    """Cor(a, b): cosine similarities between all samples of two domains (the figure's graphs).

    a, b: (B, ...) of one shape. Returns (2B, 2B): row i < B belongs to a[i], row B + i to b[i]. An all-zero
    sample correlates 0 with everything, itself included, and gets zero gradient."""
    check_shapes(max(a.ndim, 2), a=a, b=b)
    unit = torch.cat([unit_rows(a), unit_rows(b)])
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.T


def gram(features):
    """G = F F^T / (H W): which channels occur together, not where. (B, C, H, W) -> (B, C, C)."""
    check_shapes(4, features=features)
    f = at_least_float32(features).flatten(2)
    with torch.autocast(f.device.type, enabled=False):
        return f @ f.mT / f.shape[2]


def js_divergence(p, q):
    """D: the mean Jensen-Shannon divergence of softmax(p[i]) and softmax(q[i]), of (B, D), in [0, ln 2]."""
    check_shapes(2, p=p, q=q)
    log_p = at_least_float32(p).log_softmax(1)
    log_q = at_least_float32(q).log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    kl_q = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return ((kl_p + kl_q) / (2 * len(p))).clamp(0, math.log(2))  # rounding can step outside by 1e-8


def content_terms(e_source_day, e_source_night, e_target_day, e_target_night, *, target_paired=True):
    """The parts of L_CDC, as a dict of scalars, from four embeddings (B, D) of one shape:

        inherent      mse(Cor(S_d, T_d), Cor(S_n, T_n))     how far the cities differ: by day as by night
        illumination  mse(Cor(S_d, S_n), Cor(T_d, T_n))     how far the light differs: in S as in T
        js            D(S_d, S_n) + D(T_d, T_n) - D(S_d, T_n) - D(S_n, T_d)       the figure's arcs

    D compares e at length 1, as Cor does, over a temperature of 0.1 (our reading: the figure has neither that
    nor a softmax). Of e as it is, the subtracted parts would grow with its length, without bound.
    target_paired=False (T_d[i] and T_n[i] show different places) compares the graphs as `graph_mse` says, and
    leaves out D(T_d, T_n)."""
    s_d, s_n, t_d, t_n = e_source_day, e_source_night, e_target_day, e_target_night
    check_shapes(2, e_source_day=s_d, e_source_night=s_n, e_target_day=t_d, e_target_night=t_n)
    inherent = graph_mse(correlation(s_d, t_d), correlation(s_n, t_n), target_paired)
    illumination = graph_mse(correlation(s_d, s_n), correlation(t_d, t_n), target_paired)
    u_sd, u_sn, u_td, u_tn = [unit_rows(e) / TEMPERATURE for e in (s_d, s_n, t_d, t_n)]
    js = js_divergence(u_sd, u_sn)
    if target_paired:
        js = js + js_divergence(u_td, u_tn)
    js = js - js_divergence(u_sd, u_tn) - js_divergence(u_sn, u_td)
    return {"inherent": inherent, "illumination": illumination, "js": js}


def content_distill(e_source_day, e_source_night, e_target_day, e_target_night, *,
                    js_weight=0.01, target_paired=True, parts=None):  # fmt: skip
    """L_CDC, cross-domain content distillation: inherent + illumination + js_weight * js of `content_terms`.
    A scalar, negative where the divergences that js subtracts outweigh the rest. Four embeddings (B, D) of
    one shape; pool feature maps first, for example features.mean((2, 3)). parts: a dict that takes the three
    terms too, for a log. Gain: 0.0 (a trained head makes the embeddings alike)."""
    e = e_source_day, e_source_night, e_target_day, e_target_night
    terms = content_terms(*e, target_paired=target_paired)
    if parts is not None:
        parts.update(terms)
    return terms["inherent"] + terms["illumination"] + js_weight * terms["js"]


def style_distill(f_source_day, f_source_night, f_target_day, f_target_night, *, target_paired=True):
    """L_CDS, cross-domain style distillation: mse(Cor(G_Sd, G_Sn), Cor(G_Td, G_Tn)), G the Gram matrix of F.
    A scalar. Four feature maps (B, C, H, W) of one B and C; H and W may differ between domains.
    target_paired=False: see `graph_mse`. Gain: 0.3, without the teacher 0.0."""
    s_d, s_n = gram(f_source_day), gram(f_source_night)
    t_d, t_n = gram(f_target_day), gram(f_target_night)
    check_shapes(3, f_source_day=s_d, f_source_night=s_n, f_target_day=t_d, f_target_night=t_n)
    return graph_mse(correlation(s_d, s_n), correlation(t_d, t_n), target_paired)


def place_distill(f_source_day, f_source_night, f_target_day, f_target_night, *, counted=None):
    """L_place, illumination position by position (ours, not the paper's): the mean of (cos(T_d, T_n) - c)^2 over
    positions of pairs T_d[i], T_n[i] that show one place. cos is the cosine of two features at one position, c
    the mean of cos(S_d, S_n) over source image i, without gradient: night may change a position of T as much
    as it changes S, where both images are known to show the same. (Pooled, as in CDC and CDS, a picture does
    not say where things are.) A scalar. Four feature maps (B, C, h, w), of one shape in S and of one in T.
    counted: (B, h, w) bool, the positions of T that count (default: all); 0 if there is none. Gain: 2.1 where
    pairs match to the pixel, little where they do not."""
    check_shapes(4, f_source_day=f_source_day, f_source_night=f_source_night)
    check_shapes(4, f_target_day=f_target_day, f_target_night=f_target_night)
    with torch.autocast(f_target_day.device.type, enabled=False):
        source = F.cosine_similarity(at_least_float32(f_source_day), at_least_float32(f_source_night))
        target = F.cosine_similarity(at_least_float32(f_target_day), at_least_float32(f_target_night))
    squares = (target - source.detach().mean((1, 2), keepdim=True)).square()
    if counted is None:
        return squares.mean()
    check_shapes(3, cosines=target, counted=counted)
    return (squares * counted).sum() / counted.sum().clamp(min=1)


def segmentation_loss(logits, labels, weights=None, ignore_index=255):
    """Cross-entropy of logits (B, K, H, W) and labels (B, H, W) int64, each pixel's times its weight
    (B, H, W) if given; mean over the pixels that are not `ignore_index`, 0 (not nan) if there is none."""
    check_shapes(3, logits=logits[:, 0], labels=labels)
    check_labels(labels)
    loss = F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="none")
    if weights is not None:
        check_shapes(3, logits=logits[:, 0], weights=weights)
        loss = loss * weights
    return loss.sum() / (labels != ignore_index).sum().clamp(min=1)


@torch.no_grad()
def most_probable(night_logits, day_logits=None, num_static=None):
    """(probability, class), both (B, H, W), of the most probable class at night. Logits are (B, K, H, W).

    With the day's logits of the same place: where the night's class is static (see `static_classes`), the
    mean of both softmaxes decides among the static classes, as in DANNet (CVPR 2021). Where the night shows
    what moves, the day is not used: a pedestrian must not become the day frame's pavement."""
    night = at_least_float32(night_logits).softmax(1)
    probability, classes = night.max(1)
    if day_logits is None:
        return probability, classes
    check_shapes(4, night_logits=night_logits, day_logits=day_logits)
    num_static = static_classes(night.shape[1], num_static)
    if num_static == 0:
        return probability, classes
    both = (night + at_least_float32(day_logits).softmax(1)) / 2
    static_probability, static = both[:, :num_static].max(1)
    stands = classes < num_static
    return torch.where(stands, static_probability, probability), torch.where(stands, static, classes)


def pseudo_labels(night_logits, day_logits=None, threshold=0.9, num_static=None, ignore_index=255):
    """Confident predictions as labels, (B, H, W) int64: the class of `most_probable` where its probability is
    at least `threshold`, `ignore_index` elsewhere (our reading of the figure's L_pseudo)."""
    probability, classes = most_probable(night_logits, day_logits, num_static)
    return classes.masked_fill(~(probability >= threshold), ignore_index)


def static_classes(num_classes, num_static=None):
    """How many classes, the first ones, do not move: `num_static`; if not given, 11 of Cityscapes' 19."""
    if num_static is None and num_classes == 19:
        num_static = 11
    if num_static is None or not 0 <= num_static <= num_classes:
        what = f"say how many of the {num_classes} classes, the first ones, do not move"
        raise ValueError(f"num_static: {what}, got {num_static}")
    return num_static


def graph_mse(source, target, paired=True):
    """Mean squared difference of two graphs (2B, 2B).

    Unpaired (ours): of the means of their four blocks (B, B), each without its diagonal, so 0 if B is 1. Where
    T_d[i] and T_n[i] show different places, entry (i, j) of one graph compares other pictures than entry (i, j)
    of the other, and their difference is what happens to be in the pictures. Only the average over pictures
    means the same in both; on the diagonals S has a picture with itself, and T has not."""
    difference = source - target
    if not paired:
        batch = len(source) // 2
        others = 1 - torch.eye(batch, dtype=source.dtype, device=source.device)
        blocks = difference.view(2, batch, 2, batch).movedim(2, 1)
        difference = (blocks * others).sum((2, 3)) / max(1, batch**2 - batch)
    return difference.square().mean()


def unit_rows(x):
    """The samples of x (B, ...) as rows (B, D) of length 1; an all-zero one stays so, with zero gradient."""
    rows = at_least_float32(x).flatten(1)
    largest = rows.detach().abs().amax(1, keepdim=True)  # divided by it, no square overflows
    return F.normalize(rows / largest.masked_fill(largest == 0, math.inf), dim=1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_labels(labels):
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype}: labels.long()")


def check_shapes(dimensions, **tensors):
    """Raise ValueError unless the tensors have one shape, of so many dimensions, none of them empty."""
    shapes = [tuple(x.shape) for x in tensors.values()]
    first = shapes[0]
    if len(first) != dimensions or 0 in first or any(shape != first for shape in shapes):
        got = ", ".join(f"{name} {shape}" for name, shape in zip(tensors, shapes, strict=True))
        raise ValueError(f"expected one shape of {dimensions} dimensions, not empty, got {got}")
