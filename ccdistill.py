"""CCDistill (Gao, Guo, Wang, Zhang, CVPR 2022, arXiv 2205.00858): the framework figure, in code order.

Domains: source_day (S_d), source_night (S_n), target_day (T_d), target_night (T_n). At test time M_n is used.
"""

import collections
import contextlib
import copy
import functools
import types

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import losses
from losses import check_shapes, most_probable, pseudo_labels, segmentation_loss
from models import ProjectionHead

# Of the terms beside the segmentation's. For one of your own: a weight here, of which train.py makes a switch
# --NAME-weight, and in CCDistill.forward, before the sum: if self.weights[NAME]: terms[NAME] = ...
WEIGHTS = {"pseudo": 0.5, "content": 1.0, "style": 1.0, "place": 1.0}
IMAGES = ("source_day", "source_night", "target_day", "target_night")
NIGHT_STYLES = ("random", "color", "histogram", "fda")
NIGHT_WEIGHTS = ("norm", "shared", "separate")
CONSTANTS = (int, float, str, bytes, type(None), type, torch.dtype, torch.device, types.ModuleType,
             types.FunctionType, types.BuiltinFunctionType)  # fmt: skip
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
BLUR = v2.RandomApply([v2.GaussianBlur(7, (0.15, 1.15))], p=0.5)
STRONG = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), BLUR])


class CCDistill(nn.Module):
    """The whole training objective around any segmenter.

    model: M_d. Called with images (B, 3, H, W) float RGB in [0, 1], it returns (features, logits): F
    (B, C, h, w), what its classifier sees, and P (B, K, H, W), at the labels' size; `model.feature_channels`
    is C, and K is at most 255. M_n is a copy of it, see `night_model`. weights: of the terms, where they
    differ from WEIGHTS; a term of weight 0 is not computed. js_weight: of JS within CDC. projection False: e
    is F averaged over positions. target_paired: T_d[i] and T_n[i] show one place (if not, "place" weighs 0);
    then num_static, how many classes (the first ones) do not move, must be given unless K is 19. joint: S and
    T are one batch to batch norm, as in the figure; else (ours) each domain has batch statistics of its own,
    and only the source's enter the running ones. teacher: see `teach`; it moves by teacher_share in each
    call, so divide that by the number of calls whose gradients you add up for one step."""

    def __init__(self, model, *, weights=None, js_weight=0.01, pseudo_threshold=0.9, night_weights="norm",
                 night_style="random", joint=False, projection=True, target_paired=True, num_static=None,
                 teacher=True, teacher_share=0.01):  # fmt: skip
        super().__init__()
        self.weights = WEIGHTS | (weights or {})
        if self.weights.keys() != WEIGHTS.keys():
            raise ValueError(f"weights: expected some of {list(WEIGHTS)}, got {list(weights)}")
        if not target_paired:
            self.weights["place"] = 0
        check_style(night_style)
        if not hasattr(model, "feature_channels"):
            what = "how many channels the features that it returns have"
            raise ValueError(f"the network needs an attribute `feature_channels`: {what}")
        self.js_weight, self.pseudo_threshold = js_weight, pseudo_threshold
        self.style, self.joint = night_style, joint
        self.target_paired, self.num_static = target_paired, num_static
        self.day, self.night = model, night_model(model, night_weights)
        self.projection = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if projection and self.weights["content"]:
            self.projection = ProjectionHead(model.feature_channels)
        self.teacher, self.teacher_share = None, teacher_share
        if teacher and self.weights["pseudo"]:
            self.teacher = copied(nn.ModuleDict({"day": self.day, "night": self.night})).requires_grad_(False)
        self.values_seen = set()  # the names of the images whose range was looked at

    def forward(self, batch, adapt=True):
        """batch: source_day, target_day, target_night, each (B, 3, H, W) float RGB in [0, 1], source_label
        (B, H, W) int64, source_night if it is ready-made; whatever else it holds is not looked at. Returns a
        dict of scalars: each term, unweighted, the parts of CDC, and total. adapt=False: only the source is
        learned from, and the teacher is a copy of the networks. ValueError for other shapes, values far
        outside [0, 1] (on a GPU in the first call alone: to read them back makes it wait), or a network that does
        not return the above."""
        self.check(batch)
        s_d, label = batch["source_day"], batch["source_label"]
        s_n = batch.get("source_night")
        if s_n is None:  # Trans
            s_n = night_style(s_d, batch["target_night"], self.style)
        if self.teacher and self.training:
            self.update_teacher(self.teacher_share if adapt else 1.0)
        if not adapt:
            seg_day = segmentation_loss(self.look(self.day, s_d)[1], label)
            seg_night = segmentation_loss(self.look(self.night, s_n)[1], label)
            return {"seg_day": seg_day, "seg_night": seg_night, "total": seg_day + seg_night}

        t_d, t_n = batch["target_day"], batch["target_night"]
        seen_d, seen_n, pasted, answers = t_d, t_n, None, None
        if self.teacher:
            seen_d, seen_n, pasted, *answers = self.teach(s_n, label, t_d, t_n)
        (f_sd, p_sd), (f_td, p_td) = self.look_at_both(self.day, s_d, seen_d)
        (f_sn, p_sn), (f_tn, p_tn) = self.look_at_both(self.night, s_n, seen_n)

        terms = {"seg_day": segmentation_loss(p_sd, label), "seg_night": segmentation_loss(p_sn, label)}
        if self.weights["pseudo"]:
            y_td, y_tn, w_td, w_tn = answers or self.own_answers(p_td, p_tn)
            terms["pseudo"] = segmentation_loss(p_td, y_td, w_td) + segmentation_loss(p_tn, y_tn, w_tn)
        if self.weights["content"]:
            e = [self.projection(f) for f in (f_sd, f_sn, f_td, f_tn)]
            terms["content"] = losses.content_distill(
                *e, js_weight=self.js_weight, target_paired=self.target_paired, parts=terms
            )
        if self.weights["style"]:
            terms["style"] = losses.style_distill(f_sd, f_sn, f_td, f_tn, target_paired=self.target_paired)
        if self.weights["place"]:
            counted = None if pasted is None else F.adaptive_max_pool2d(pasted.float(), f_tn.shape[2:]) == 0
            terms["place"] = losses.place_distill(f_sd, f_sn, f_td, f_tn, counted=counted)
        # L = L_seg_d + L_seg_n + w_pseudo L_pseudo + w_content L_CDC + w_style L_CDS + w_place L_place
        weighted = [weight * terms[name] for name, weight in self.weights.items() if weight]
        terms["total"] = sum(weighted, start=terms["seg_day"] + terms["seg_night"])
        return terms

    def check(self, batch):
        """ValueError, as `forward` says, for a batch that does not fit."""
        images = {name: batch[name] for name in IMAGES if batch.get(name) is not None}
        check_images(images, values=images.keys() - self.values_seen)
        self.values_seen |= images.keys()
        check_shapes(3, source_label=batch["source_label"], source_day=batch["source_day"][:, 0])
        losses.check_labels(batch["source_label"])

    def look(self, network, images):
        """(F, P) of a network, which must be what `forward` needs of it, also while the source is alone."""
        output = network(images)
        if not isinstance(output, tuple | list) or len(output) != 2:
            got = f"got a {type(output).__name__}: wrap the network in one that returns the two"
            raise ValueError(f"the network's output: expected a tuple (features, logits), {got}")
        features, logits = output
        batch, _, *size = images.shape
        channels, classes = self.day.feature_channels, logits.shape[1]
        as_map = features.ndim == 4 and features.shape[:2] == (batch, channels)
        if not as_map or logits.shape != (batch, classes, *size) or classes > 255:
            wanted = f"features (B, feature_channels = {channels}, h, w) and logits (B, at most 255, H, W)"
            got = f"{tuple(features.shape)} and {tuple(logits.shape)} of images {tuple(images.shape)}"
            if as_map and logits.shape[2:] != images.shape[2:]:
                got += ": resize the logits with F.interpolate(logits, images.shape[2:], mode='bilinear')"
            raise ValueError(f"the network's output: expected {wanted}, got {got}")
        if self.target_paired and self.weights["pseudo"]:
            losses.static_classes(classes, self.num_static)
        return features, logits

    def look_at_both(self, network, source, target):
        """(F, P) of S and (F, P) of T. joint: of one batch. Else each has batch statistics of its own, and the
        source's alone enter the running ones."""
        if self.joint:
            features, logits = self.look(network, torch.cat([source, target]))
            f_s, f_t = features.chunk(2)
            p_s, p_t = logits.chunk(2)
            return (f_s, p_s), (f_t, p_t)
        of_source = self.look(network, source)
        with statistics_kept(network):
            of_target = self.look(network, target)
        if of_source[0] is of_target[0]:  # a copy's hook, say, fills a dict that the copy does not read
            raise ValueError("the network's features are one tensor in two calls: they are not of the call")
        return of_source, of_target

    def own_answers(self, p_td, p_tn):
        """Without a teacher, as in the figure: labels are the networks' own confident predictions."""
        day = p_td if self.target_paired else None
        y_td = pseudo_labels(p_td, threshold=self.pseudo_threshold)
        y_tn = pseudo_labels(p_tn, day, self.pseudo_threshold, self.num_static)
        return y_td, y_tn, None, None

    @torch.no_grad()
    def teach(self, s_n, label, t_d, t_n):
        """What the targets learn (ours): T_d, T_n, what is pasted into T_n, their labels and the labels' weights,
        all (B, H, W) but the images.

        Averaged copies of M_d and M_n label the plain images (mean teacher; Tarvainen & Valpola, 2017); the
        share of confident pixels weighs an image's loss (DAFormer; Hoyer et al., CVPR 2022). Then half of the
        classes that S_n shows are pasted into T_n with their labels (DACS; Tranheden et al., WACV 2021), and
        both images get strong colours and blur."""
        teacher = self.teacher.eval()
        _, p_td = self.look(teacher["day"], t_d)
        _, p_tn = self.look(teacher["night"], t_n)
        confidence_d, y_td = most_probable(p_td)
        confidence_n, y_tn = most_probable(p_tn, p_td if self.target_paired else None, self.num_static)
        w_td, w_tn = self.share_of_confident(confidence_d), self.share_of_confident(confidence_n)
        paste = half_of_the_classes(label)
        y_tn, w_tn = torch.where(paste, label, y_tn), w_tn.masked_fill(paste, 1.0)
        with torch.autocast(t_n.device.type, enabled=False):
            seen_d = STRONG(t_d)
            seen_n = STRONG(torch.where(paste[:, None], s_n, t_n))
        return seen_d, seen_n, paste, y_td, y_tn, w_td, w_tn

    def share_of_confident(self, confidence):
        """For each pixel the share of its image's pixels that are at least that confident, (B, H, W)."""
        confident = (confidence >= self.pseudo_threshold).float()
        return confident.mean((1, 2), keepdim=True).expand_as(confident)

    @torch.no_grad()
    def update_teacher(self, share):
        """Move the teacher's weights by this share towards the networks'; its norms take their statistics."""
        networks = nn.ModuleDict({"day": self.day, "night": self.night})
        mine, theirs = list(self.teacher.parameters()), list(networks.parameters())
        if any(parameter.dtype.itemsize < 4 for parameter in mine):
            raise ValueError("a teacher of half-precision weights would stand still: use autocast instead")
        torch._foreach_lerp_(mine, theirs, share)  # one kernel for all
        mine = [buffer for buffer in self.teacher.buffers() if buffer.is_floating_point()]
        theirs = [buffer for buffer in networks.buffers() if buffer.is_floating_point()]
        if mine:
            torch._foreach_copy_(mine, theirs)


def check_images(images, values=()):
    """ValueError unless all of a dict's are float RGB (B, 3, H, W) of one shape, and in [0, 1] but for what
    resizing adds. values: the names of those whose range is looked at on a GPU too, which makes it wait."""
    check_shapes(4, **images)
    for name, x in images.items():
        low, high = 0, 1
        if name in values or x.device.type == "cpu":
            low, high = (limit.item() for limit in x.aminmax())
        if x.shape[1] != 3 or not x.is_floating_point() or not -0.2 <= low <= high <= 1.2:
            wanted = "expected float RGB (B, 3, H, W) in [0, 1], not normalised (uint8: divide by 255)"
            raise ValueError(f"{name}: {wanted}, got {tuple(x.shape)} {x.dtype}, {low:.3g} to {high:.3g}")


def half_of_the_classes(label):
    """(B, H, W) bool: the pixels of half (rounded up) of the classes that each label (B, H, W) holds."""
    present = torch.zeros(len(label), 256, device=label.device).scatter_(1, label.flatten(1), 1.0)
    present[:, 255] = 0
    score = (1 + torch.rand_like(present)) * present  # at random; 0 for a class that is absent
    rank = score.argsort(1, descending=True).argsort(1)
    taken = rank < (present.sum(1, keepdim=True) + 1) // 2
    return taken.gather(1, label.flatten(1)).view_as(label)


def night_model(day, night_weights):
    """M_n for a given M_d; the figure does not say what they share. "shared": all, one module. "norm": all
    but normalisation layers (statistics, scale, shift). "separate": nothing."""
    if night_weights not in NIGHT_WEIGHTS:
        raise ValueError(f"night_weights: expected one of {NIGHT_WEIGHTS}, got {night_weights!r}")
    if night_weights == "shared":
        return day
    shared = {}  # deepcopy copies nothing that it finds here
    for module in day.modules():
        if night_weights == "norm" and not is_norm(module):
            shared |= {id(parameter): parameter for parameter in module.parameters(recurse=False)}
    return copied(day, shared)


def copied(network, shared=None):
    """A deep copy. ValueError for a network whose copy would go on using the original, in silence."""
    say = (
        "M_n and the teacher are copies, and theirs would still use that one. Keep features by a method that "
    )
    say += "sets self.features = ..."
    for name, module in network.named_modules():
        if hasattr(module, "_orig_mod"):  # torch.compile's wrapper, which a copy makes anew
            continue
        for attribute, value in vars(module).items():
            if "state_dict" in attribute or attribute == "_compiled_call_impl":  # no matter, or not copied
                continue
            values = value.values() if isinstance(value, dict) else [value]
            if isinstance(value, list | tuple):
                values = value
            if any(holds_on(each) for each in values):
                what = f"{attribute} holds a function that uses an object around it (a closure)"
                raise ValueError(f"{name or 'the network'}: {what}: {say}")
    try:
        return copy.deepcopy(network, shared)
    except RuntimeError as error:  # it keeps a tensor with a history
        say = "build CCDistill before the network's first call, or make that call under torch.no_grad()"
        raise ValueError(f"the network cannot be copied ({str(error).splitlines()[0][:99]}): {say}") from None


def holds_on(value, known=()):
    """Is value a function that uses an object around it, by a closure, a default or as its method?"""
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, types.BuiltinFunctionType):
        return not constant(value.__self__)
    if not isinstance(value, types.FunctionType) or value in known:
        return False
    around = list(value.__defaults__ or ())
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            around.append(cell.cell_contents)
    return not all(constant(each, (*known, value)) for each in around)


def constant(value, known=()):
    """Does a copy of this value mean the same as the value?"""
    if isinstance(value, tuple):
        return all(constant(each, known) for each in value)
    return isinstance(value, CONSTANTS) and not holds_on(value, known)


def is_norm(module):
    """Is it one of torch's norms, of a subclass, or of a class of one's own that has a `running_mean`?"""
    return isinstance(module, NORMS) or hasattr(module, "running_mean")


def norms_with_statistics(network):
    """The network's norms whose running statistics move with a `momentum`, as torch's do."""
    norms = [module for module in network.modules() if is_norm(module) and hasattr(module, "momentum")]
    return [norm for norm in norms if norm.running_mean is not None]


@contextlib.contextmanager
def statistics_kept(network):
    """Inside, norms use the statistics of their batch, but their running ones do not move, no call counts."""
    norms = norms_with_statistics(network)
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if hasattr(norm, "num_batches_tracked")]
    counts = [counter.clone() for counter in counters]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if counts:
            torch._foreach_copy_(counters, counts)


@torch.no_grad()
def take_statistics(network, batches):
    """Give a network's norms the statistics of real images when training has ended (ours; AdaBN, Li et al.,
    2017): to M_n those of target nights, for in training they were those of S_n.

    batches: images (B, 3, H, W) float RGB in [0, 1], of any size; statistics are the plain mean over a norm's
    calls. A norm that sees one value a channel, as behind pooling, keeps its own. ValueError without a batch.
    The network is in eval mode afterwards; after an error with the statistics that it had."""
    norms = norms_with_statistics(network)
    momenta = [norm.momentum for norm in norms]
    before = [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]
    calls = collections.Counter()

    def average(norm, inputs):
        images = inputs[0]
        norm.train(images.numel() > images.shape[1])
        calls[norm] += norm.training
        norm.momentum = 1 / max(1, calls[norm])

    hooks = [norm.register_forward_pre_hook(average) for norm in norms]
    network.eval()
    images = None
    taken = False
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled network would not see the hooks
            for images in batches:
                check_images({"images": images}, values=["images"])
                network(images)
        if images is None:
            raise ValueError("batches: no batch to take statistics of")
        taken = True
    finally:
        for norm, hook, momentum, buffers in zip(norms, hooks, momenta, before, strict=True):
            hook.remove()
            norm.momentum = momentum
            for name, buffer in buffers.items():
                if not taken or not buffer.is_floating_point():  # counters stay, so it can be done twice
                    norm.get_buffer(name).copy_(buffer)
        network.eval()


def check_style(name):
    if name not in NIGHT_STYLES:
        raise ValueError(f"night_style: expected one of {NIGHT_STYLES}, got {name!r}")


@torch.no_grad()
def night_style(day, night, method="random"):
    """Trans: the light of `night` on the content of `day`, without a trained network (our choice). Both are
    (B, 3, H, W) float RGB in [0, 1], H and W may differ; so is the result, at the day's size.

    color: each RGB channel takes the night's mean and deviation (after Reinhard et al., 2001). histogram: the
    night's whole histogram. random: one of these two, drawn for each image. fda: the lowest spatial
    frequencies take the night's amplitude (Yang & Soatto, CVPR 2020, with their beta 0.01)."""
    check_style(method)
    check_images({"day": day})
    check_images({"night": night})
    dtype = day.dtype
    day, night = day.float().clamp(0, 1), night.float().clamp(0, 1)
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
