"""The equations of CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858). Torch only: vendor this
file.

    from losses import content_distill, style_distill

Domains always come in the order source_day (S_d), source_night (S_n), target_day (T_d), target_night (T_n).
The paper's text was not at hand: the graphs come from its framework figure; the L2 norm, the mean over all
entries, the softmax inside D and the unit weights are our reading of it.

Precision: half types are raised to float32, float64 stays float64, autocast is off inside.
"""

import functools
import math

import torch
import torch.nn.functional as F


def full_precision(function):
    """Run `function` with autocast off, on tensors raised to one common type of at least float32.

    `.float()` alone would not do: under autocast the product of two float32 matrices is still a bfloat16 one.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)

        def raised(value):
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*map(raised, args), **{name: raised(value) for name, value in kwargs.items()})

    return wrapped


def _same_shape(dims=None, **tensors):
    """Raise ValueError, naming every shape, unless all agree in their first `dims` dimensions (None: in
    all)."""
    if len({tuple(t.shape[:dims]) for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"{'shapes' if dims is None else 'batch and channels'} must agree: {shapes}")


def _scaled(x):
    """Each sample divided by its largest value: correlations do not see it, and squares cannot overflow."""
    largest = x.detach().flatten(1).abs().amax(1).view(-1, *[1] * (x.ndim - 1))
    return x / largest.masked_fill(largest == 0, 1)


def _unit_rows(x):
    """(N, D): each row divided by its L2 norm. A zero row stays zero and passes no gradient."""
    x = _scaled(x)
    length = x.norm(dim=1, keepdim=True)
    return x * torch.where(length == 0, 0, 1 / length.masked_fill(length == 0, 1))


@full_precision
def correlation(a, b):
    """Cor(a, b): cosine similarities between all samples of two domains (the figure's fully connected
    graphs).

    a, b: (B, ...), equal shapes, flattened from dimension 1. Returns (2B, 2B): row i < B is a[i], row B + i
    is b[i]. A sample that is all zero correlates 0 with everything, itself included, and gets zero gradient.
    Raises ValueError if the shapes differ, have fewer than two dimensions, or hold no value.
    """
    _same_shape(a=a, b=b)
    if a.ndim < 2 or a.numel() == 0:
        raise ValueError(f"expected (B, ...) with at least one sample and one value, got {tuple(a.shape)}")
    z = _unit_rows(torch.cat([a, b]).flatten(1))
    return z @ z.T


@full_precision
def gram(features):
    """G = F F^T / (H*W), the style of a feature map: what occurs together, not where.

    features: (B, C, H, W). Returns (B, C, C). Raises ValueError unless it has four dimensions.
    """
    if features.ndim != 4:
        raise ValueError(f"expected features of shape (B, C, H, W), got {tuple(features.shape)}")
    f = features.flatten(2)
    return f @ f.transpose(1, 2) / f.shape[2]


@full_precision
def js_divergence(p, q):
    """D: Jensen-Shannon divergence of softmax(p) and softmax(q), sample i with sample i, mean over the batch.

    p, q: (B, D) logits of equal shape. Returns a scalar in [0, ln 2] (nats). Raises ValueError if shapes
    differ.
    """
    _same_shape(p=p, q=q)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(1)
    return ((kl_p + kl_q) / 2).mean().clamp(0, math.log(2))  # rounding can step outside by 1e-8


@full_precision
def content_distill(
    e_source_day, e_source_night, e_target_day, e_target_night, js_weight=1.0, target_paired=True
):
    """L_CDC, cross-domain content distillation: a difference of one kind has one degree wherever it is
    measured.

    Four embeddings (B, D) of one shape. Returns the scalar
        mse(Cor(S_d, T_d), Cor(S_n, T_n)) + mse(Cor(S_d, S_n), Cor(T_d, T_n)) + js_weight * JS
    with JS = D(S_d, S_n) + D(T_d, T_n) - D(S_d, T_n) - D(S_n, T_d), the figure's red and green arcs.
    js_weight 0 leaves JS uncomputed; target_paired=False (T_d and T_n show different places) leaves D(T_d,
    T_n) out. Raises ValueError, naming the shapes, if they differ.
    """
    s_d, s_n, t_d, t_n = e_source_day, e_source_night, e_target_day, e_target_night
    _same_shape(e_source_day=s_d, e_source_night=s_n, e_target_day=t_d, e_target_night=t_n)
    inherent = F.mse_loss(correlation(s_d, t_d), correlation(s_n, t_n))  # Cor_in_d with Cor_in_n
    illumination = F.mse_loss(correlation(s_d, s_n), correlation(t_d, t_n))  # Cor_illu_S with Cor_illu_T
    loss = inherent + illumination
    if js_weight:
        js = js_divergence(s_d, s_n) - js_divergence(s_d, t_n) - js_divergence(s_n, t_d)
        if target_paired:
            js = js + js_divergence(t_d, t_n)
        loss = loss + js_weight * js
    return loss


@full_precision
def style_distill(f_source_day, f_source_night, f_target_day, f_target_night):
    """L_CDS, cross-domain style distillation: mse(Cor(G_Sd, G_Sn), Cor(G_Td, G_Tn)), G the Gram matrix of F.

    Four feature maps (B, C, H, W) with the same B and C; H and W may differ between domains. Returns a
    scalar. Raises ValueError, naming the shapes, if batch or channels differ.
    """
    s_d, s_n, t_d, t_n = f_source_day, f_source_night, f_target_day, f_target_night
    _same_shape(dims=2, f_source_day=s_d, f_source_night=s_n, f_target_day=t_d, f_target_night=t_n)
    s_d, s_n, t_d, t_n = map(_scaled, (s_d, s_n, t_d, t_n))
    return F.mse_loss(_style_correlation(s_d, s_n), _style_correlation(t_d, t_n))


def _style_correlation(a, b):
    """Cor(G_a, G_b) of features (B, C, H, W), in the cheaper of two equal forms.

    2B Gram matrices take 4B C^2 HW operations and 2B C^2 values. As <G_i, G_j> = |F_i^T F_j|^2, products of
    positions give the same from 8B^2 C (HW)^2 operations and 4B^2 (HW)^2 values: less where 2B HW < C.
    """
    n, channels, positions = 2 * len(a), a.shape[1], a.shape[2] * a.shape[3]
    if a.shape == b.shape and n * positions < channels:
        f = torch.cat([a, b]).flatten(2).transpose(0, 1).flatten(1)  # (C, 2B HW)
        products = (f.T @ f).square().view(n, positions, n, positions).sum((1, 3))
    else:
        g = torch.cat([gram(a), gram(b)]).flatten(1)
        products = g @ g.T
    square = products.diag()
    inverse = torch.where(square == 0, 0, square.masked_fill(square == 0, 1).rsqrt())
    return products * inverse[:, None] * inverse


def segmentation_loss(logits, labels, ignore_index=255):
    """Cross-entropy, mean over the pixels whose label is not `ignore_index`; 0 where there is none (not nan).

    logits: (B, K, H, W). labels: (B, H, W) int64 in 0..K-1 or `ignore_index`. Returns a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


@torch.no_grad()
@full_precision
def pseudo_labels(night_logits, day_logits=None, threshold=0.9, num_static=11, ignore_index=255):
    """Confident predictions as labels (the figure's L_pseudo; how they are chosen is our reading).

    night_logits, day_logits: (B, K, H, W). Returns (B, H, W) int64: the most probable class where its softmax
    reaches `threshold`, `ignore_index` elsewhere. With day logits of the same place, the mean of both
    softmaxes speaks for the static classes (below `num_static`), as in DANNet (CVPR 2021); the others, which
    move, keep the night's alone. Raises ValueError, naming the shapes, if they differ.
    """
    probabilities = night_logits.softmax(1)
    if day_logits is not None:
        _same_shape(night_logits=night_logits, day_logits=day_logits)
        static = (probabilities[:, :num_static] + day_logits.softmax(1)[:, :num_static]) / 2
        probabilities = torch.cat([static, probabilities[:, num_static:]], 1)
    confidence, labels = probabilities.max(1)
    return labels.masked_fill(~(confidence >= threshold), ignore_index)
