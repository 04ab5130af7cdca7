"""The equations of CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858). Imports torch alone: copy
this file into your own code.

    from losses import content_distill, style_distill

Domains come in one order everywhere: source_day (S_d), source_night (S_n), target_day (T_d), target_night
(T_n). The paper's text was not at hand: the graphs come from its framework figure; the L2 norm, the mean over
all entries, the softmax inside D and all weights are our reading. Half precision is raised to float32, float64
stays, autocast changes nothing. What is no tensor raises TypeError; a tensor that does not fit raises ValueError.
"""

import math

import torch
import torch.nn.functional as F


def correlation(a, b):
    """Cor(a, b): cosine similarities between all samples of two domains (the figure's graphs).

    a, b: (B, ...) of one shape, flattened from dimension 1. Returns (2B, 2B): row i < B is a[i], row B + i is
    b[i]. A sample that is all zero correlates 0 with everything, itself included, and gets zero gradient.
    """
    a, b = _checked("(B, ...)", a=a, b=b)
    rows = torch.cat([a, b]).flatten(1)
    largest = rows.detach().abs().amax(1, keepdim=True)
    rows = rows / largest.masked_fill(largest == 0, 1)  # no cosine changes, and no square overflows
    length = rows.norm(dim=1, keepdim=True)
    unit = rows * (1 / length.masked_fill(length == 0, 1)).masked_fill(length == 0, 0)
    return _product(unit, unit.T)


def gram(features):
    """G = F F^T / (H * W): which channels occur together, not where. (B, C, H, W) -> (B, C, C)."""
    (features,) = _checked("(B, C, H, W)", features=features)
    f = features.flatten(2)
    return _product(f, f.transpose(1, 2)) / f.shape[2]


def js_divergence(p, q):
    """D: Jensen-Shannon divergence of softmax(p) and softmax(q), sample i with sample i, mean over the batch.
    p, q: (B, D). Returns a scalar in [0, ln 2] (nats)."""
    p, q = _checked("(B, D)", p=p, q=q)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(1)
    return ((kl_p + kl_q) / 2).mean().clamp(0, math.log(2))  # rounding can step outside by 1e-8


def content_terms(e_source_day, e_source_night, e_target_day, e_target_night, target_paired=True, js=True):
    """The parts of L_CDC, as a dict of scalars, from four embeddings (B, D) of one shape:

        inherent      mse(Cor(S_d, T_d), Cor(S_n, T_n))     how far the cities differ: by day as by night
        illumination  mse(Cor(S_d, S_n), Cor(T_d, T_n))     how far the light differs: in S as in T
        js            D(S_d, S_n) + D(T_d, T_n) - D(S_d, T_n) - D(S_n, T_d)       the figure's arcs

    target_paired=False (T_d[i] and T_n[i] show different places): S_d[i] with S_n[i] has no counterpart in
    the target, so these entries are left out of `illumination`, and D(T_d, T_n) out of `js`. js=False: the
    last part is not computed.
    """
    s_d, s_n, t_d, t_n = _checked(
        "(B, D)", e_source_day=e_source_day, e_source_night=e_source_night,
        e_target_day=e_target_day, e_target_night=e_target_night,
    )  # fmt: skip
    inherent = F.mse_loss(correlation(s_d, t_d), correlation(s_n, t_n))
    illumination = _distance(correlation(s_d, s_n), correlation(t_d, t_n), target_paired)
    terms = {"inherent": inherent, "illumination": illumination}
    if js:
        terms["js"] = js_divergence(s_d, s_n) - js_divergence(s_d, t_n) - js_divergence(s_n, t_d)
        terms["js"] = terms["js"] + (js_divergence(t_d, t_n) if target_paired else 0)
    return terms


def content_distill(
    e_source_day, e_source_night, e_target_day, e_target_night, js_weight=0.1, target_paired=True
):
    """L_CDC, cross-domain content distillation: inherent + illumination + js_weight * js of `content_terms`.

    Four embeddings (B, D) of one shape; pool feature maps first, for example features.mean((2, 3)). Returns a
    scalar, which may be negative, since js subtracts two divergences.
    """
    if isinstance(js_weight, bool):
        raise TypeError("js_weight: expected a number; give target_paired by its name")
    embeddings = e_source_day, e_source_night, e_target_day, e_target_night
    terms = content_terms(*embeddings, target_paired, js=js_weight != 0)
    return terms["inherent"] + terms["illumination"] + js_weight * terms.get("js", 0)


def style_distill(f_source_day, f_source_night, f_target_day, f_target_night, target_paired=True):
    """L_CDS, cross-domain style distillation: mse(Cor(G_Sd, G_Sn), Cor(G_Td, G_Tn)), G the Gram matrix of F.

    Four feature maps (B, C, H, W) of one B and C; H and W may differ between domains. target_paired=False
    leaves out S_d[i] with S_n[i], as in `content_terms`. Returns a scalar.
    """
    s_d, s_n, t_d, t_n = _checked(
        "(B, C, H, W)", 2, f_source_day=f_source_day, f_source_night=f_source_night,
        f_target_day=f_target_day, f_target_night=f_target_night,
    )  # fmt: skip
    source, target = correlation(gram(s_d), gram(s_n)), correlation(gram(t_d), gram(t_n))
    return _distance(source, target, target_paired)


def segmentation_loss(logits, labels, weights=None, ignore_index=255):
    """Cross-entropy, mean over the pixels whose label is not `ignore_index`; 0 where there is none (not nan).
    logits: (B, K, H, W). labels: (B, H, W) int64 in 0..K-1 or `ignore_index`; others raise ValueError on a
    CPU and a device error on a GPU. weights: of each pixel's loss, (B, H, W). Returns a scalar."""
    (logits,) = _checked("(B, K, H, W)", logits=logits)
    _checked("(B, H, W)", labels=labels, **({} if weights is None else {"weights": weights}))
    if labels.dtype != torch.int64 or labels.shape != logits[:, 0].shape:
        wanted, got = tuple(logits[:, 0].shape), f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels: expected int64 {wanted}, one for each pixel of the logits, got {got}")
    try:
        pixels = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    except IndexError as error:
        raise ValueError(f"labels: not in 0..{logits.shape[1] - 1} nor {ignore_index} ({error})") from None
    pixels = pixels if weights is None else pixels * weights
    return pixels.sum() / (labels != ignore_index).sum().clamp(min=1)


def pseudo_labels(night_logits, day_logits=None, threshold=0.9, num_static=11, ignore_index=255):
    """Confident predictions as labels (the figure's L_pseudo; how they are chosen is our reading).

    night_logits, day_logits: (B, K, H, W). Returns (B, H, W) int64: the class of `most_probable` where its
    probability reaches `threshold`, `ignore_index` elsewhere.
    """
    probability, classes = most_probable(night_logits, day_logits, num_static)
    return classes.masked_fill(~(probability >= threshold), ignore_index)


@torch.no_grad()
def most_probable(night_logits, day_logits=None, num_static=11):
    """(probability, class), each (B, H, W), of the most probable class at night. Logits (B, K, H, W).

    With day logits of the same place, and where the night's most probable class is static (below
    `num_static`), the static classes are judged by the mean of both softmaxes, as in DANNet (CVPR 2021).
    Where the night shows something that moves, the day's prediction is not used: a pedestrian must not become
    the pavement of the day frame.
    """
    given = {"night_logits": night_logits} | ({} if day_logits is None else {"day_logits": day_logits})
    night, *day = (logits.softmax(1) for logits in _checked("(B, K, H, W)", **given))
    probability, classes = night.max(1)
    if day and num_static > 0:
        mean_probability, mean_classes = ((night + day[0]) / 2)[:, :num_static].max(1)
        static = classes < num_static
        probability = torch.where(static, mean_probability, probability)
        classes = torch.where(static, mean_classes, classes)
    return probability, classes


def _distance(source, target, target_paired):
    """mse of two graphs (2B, 2B); with unpaired targets without the entries of sample i with sample B + i."""
    if target_paired:
        return F.mse_loss(source, target)
    size = len(source)
    index = torch.arange(size, device=source.device)
    left_out = (index[:, None] - index).abs() == size // 2  # one entry in each row
    return (source - target).square().masked_fill(left_out, 0).sum() / (size * (size - 1))


def _product(a, b):
    """a @ b; under autocast the product of two float32 matrices would be a bfloat16 one."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _checked(layout, agree=None, **tensors):
    """The tensors in at least float32, if they have the layout and agree in the first `agree` dimensions
    (None: in all)."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch tensor {layout}, got {type(x).__name__}")
        dims = layout.count(",") + 1
        if (x.ndim < dims if "..." in layout else x.ndim != dims) or not x.numel():
            raise ValueError(f"{name}: expected {layout} with at least one value, got {tuple(x.shape)}")
        if x.is_meta or x.is_complex() or x.is_quantized or x.layout != torch.strided:
            raise ValueError(f"{name}: expected dense real values, got {x.dtype} {x.layout} on {x.device}")
    if len({x.shape[:agree] for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{'batch and channels' if agree else 'shapes'} must agree: {shapes}")
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors.values()]
