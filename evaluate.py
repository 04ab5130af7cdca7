"""Score a checkpoint, write its predictions, pack them for a test server, or export the network.

    python evaluate.py --checkpoint OUT/last.pt --darkzurich DIR    night validation, per class
    python evaluate.py --checkpoint OUT/last.pt --cityscapes DIR    day validation
    python evaluate.py --checkpoint OUT/last.pt --darkzurich DIR --json scores.json --out predictions
    python evaluate.py --checkpoint OUT/last.pt --darkzurich DIR --split test --submit upload.zip
    python evaluate.py --checkpoint OUT/last.pt --images street.jpg folder --out predictions

Scores come from one integer count over all pixels of all images, each at its own size. IoU, mIoU and pixel
accuracy are percentages; `miou` leaves out classes with neither label nor prediction, as cityscapesScripts
does, and `miou_present` also those without label. A class that does not occur has no IoU: n/a, not 0.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import io
import json
import math
import os
import signal
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributed
from torchvision.transforms.v2 import functional as TF

import datasets
import models

FORMAT = 1  # of the checkpoints
THRESHOLDS = torch.arange(20) / 20  # of the confidence, for UIoU
LABEL_IDS = torch.tensor([label_id for _, label_id, _ in datasets.CLASSES], dtype=torch.uint8)
SIZES = {"darkzurich": (1920, 1080), "cityscapes": (2048, 1024)}  # what the test servers want


def best_device():
    return next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")


def device_problem(device):
    """Why torch cannot use a device, as one line, or None."""
    if device.partition(":")[0] not in ("cuda", "mps", "cpu"):
        return f"--device {device}: cuda, mps or cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = "" if len(str(error)) > 200 else f" ({datasets.one_line(error)})"
        return f"--device {device}: not to be had here{reason}; cuda, mps or cpu"
    return None


def ranks():
    """(rank, number of processes) that train together: (0, 1) unless torchrun started them."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def summed(numbers, device):
    """Numbers summed over all processes."""
    if ranks()[1] == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def quiet_worker(_):
    """Loader workers leave Ctrl-C and SIGTERM to the parent, also what its group gets (torchrun, timeout)."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def expected(error):
    """Is this told in one line, without a traceback?"""
    known = isinstance(error, ValueError | OSError | torch.OutOfMemoryError)
    said = "DataLoader worker" in str(error) or "can't allocate memory" in str(error)
    return known or said or type(error).__name__.startswith("Dist")


def to_float(images, device):
    """uint8 images on the CPU -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


# ---- checkpoints -------------------------------------------------------------------------------------------


def checked(state, path):
    """A dict that train.py saved. Raises ValueError in one line for anything else."""
    if not isinstance(state, dict) or "architecture" not in state or "model" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {state.get('format')}, this code reads {FORMAT}")
    return state


def damaged(path, error):
    """What to raise where a checkpoint's content does not fit, as one line."""
    return ValueError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})")


def rebuilt(state, path):
    """The DeepLab that a checkpoint describes, its weights not yet filled in. Raises ValueError in one line."""
    try:
        return models.DeepLab(**state["architecture"] | {"weights": "none"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from None


def load_model(path, which="night", device="cpu", input_format="imagenet"):
    """(DeepLab in eval mode, description): M_n ("night") or M_d ("day") of a last.pt or best.pt, or the
    network of a public file (torchvision, AdaptSegNet, DANNet; output stride 8), whose input_format nothing
    in it tells.

    The projection head is neither built nor loaded. Raises ValueError in one line."""
    state = models.read_state(path)
    if isinstance(state, dict) and "architecture" in state:
        model, own = rebuilt(checked(state, path), path), f"{which}."
        try:
            model.load_state_dict(
                {k.removeprefix(own): v for k, v in state["model"].items() if k.startswith(own)}
            )
        except (TypeError, AttributeError, RuntimeError) as error:
            raise damaged(path, error) from None
        description = {name: state.get(name) for name in ("architecture", "args", "step")}
    else:
        model = models.DeepLab(**models.architecture_of(path), input_format=input_format)
        models.load_weights(model, path, strict=True)
        description = {"architecture": model.architecture}
    if (classes := model.architecture["num_classes"]) != len(datasets.NAMES):
        raise ValueError(f"{path}: predicts {classes} classes, scores need the 19 of Cityscapes")
    return model.to(device, memory_format=torch.channels_last).eval(), description


# ---- predictions -------------------------------------------------------------------------------------------


def probabilities(model, images, scales=(1.0,), flip=False, window=None):
    """Softmax (1, K, H, W) of one image (1, 3, H, W), averaged over scales, flips and overlapping windows."""
    size, total = images.shape[2:], 0
    for scale in scales:
        resized = [max(1, round(side * scale)) for side in size]
        scaled = F.interpolate(images, resized, mode="bilinear", antialias=True) if scale != 1 else images
        for mirrored in (False, True) if flip else (False,):
            p = _in_windows(model, scaled.flip(3) if mirrored else scaled, window)
            p = p.flip(3) if mirrored else p
            total = total + (F.interpolate(p, size, mode="bilinear") if scale != 1 else p)
    return total / (len(scales) * (2 if flip else 1))


def _in_windows(model, images, window):
    """Softmax of windows (H, W) that overlap by at least a third, averaged; None: the image as a whole."""
    height, width = images.shape[2:]
    short = (0, max(0, 32 - width), 0, max(0, 32 - height))  # of the least that the network takes
    images = F.pad(images, short, mode="replicate")
    h, w = (min(a, b) for a, b in zip(window or images.shape[2:], images.shape[2:], strict=True))
    if (h, w) == images.shape[2:]:
        return model(images)[1].softmax(1)[:, :, :height, :width]

    def starts(length, part):
        return sorted({*range(0, length - part, part * 2 // 3), length - part})

    total, count = 0, images.new_zeros(1, 1, *images.shape[2:])
    for top in starts(images.shape[2], h):
        for left in starts(images.shape[3], w):
            p = model(images[:, :, top : top + h, left : left + w])[1].softmax(1)
            if not torch.is_tensor(total):
                total = images.new_zeros(1, p.shape[1], *images.shape[2:])
            total[:, :, top : top + h, left : left + w] += p
            count[:, :, top : top + h, left : left + w] += 1
    return (total / count)[:, :, :height, :width]


@torch.no_grad()
def predictions(model, found, device, workers=0, scales=(1.0,), flip=False, window=None):
    """Yield (item of datasets.load, prediction (H, W) int64, confidence (H, W)), the last two on the
    device, one image at a time; scales, flip and window as in `probabilities`."""
    training = model.training
    model.eval()
    loader = torch.utils.data.DataLoader(
        found,
        collate_fn=datasets.load,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )
    for item in loader:
        images = to_float(item["image"][None], device)
        if tuple(scales) != (1.0,) or flip or window or min(images.shape[2:]) < 32:
            confidence, prediction = probabilities(model, images, scales, flip, window)[0].max(0)
        else:  # the same in strips, which stay in the processor's cache
            strips = (strip.softmax(1).max(1) for strip in model(images)[1].split(32, 2))
            confidence, prediction = (torch.cat(parts, 1)[0] for parts in zip(*strips, strict=True))
        yield item, prediction, confidence
    model.train(training)


# ---- scores ------------------------------------------------------------------------------------------------


def count(label, prediction, num_classes, confidence=None, invalid=None):
    """Integer pixel counts on the prediction's device: (K, K), rows are labels, label 255 left out.

    With confidence and invalid: (2, 21, K, K), first by gt_invIds, then by how many THRESHOLDS the confidence
    reaches."""
    label = label.to(prediction.device).long()
    valid = label != datasets.IGNORE
    index, shape = label * num_classes + prediction, (num_classes, num_classes)
    if confidence is not None:
        reached = torch.bucketize(confidence, THRESHOLDS.to(confidence), right=True)
        bins = len(THRESHOLDS) + 1
        index = (invalid.to(index.device).long() * bins + reached) * num_classes**2 + index
        shape = (2, bins, *shape)
    return torch.bincount(index[valid], minlength=torch.Size(shape).numel()).view(shape)


def scores(matrix):
    """(K, K) counts, rows are labels -> dict of miou, miou_present, iou, pixel_accuracy (percent, None where
    undefined) and confusion_matrix."""
    matrix = matrix.cpu()
    hits, labelled, predicted = matrix.diag().double(), matrix.sum(1), matrix.sum(0)
    iou = 100 * hits / (labelled + predicted - hits)  # 0 / 0 = nan: no label, no prediction
    return {
        "miou": _number(iou.nanmean()),
        "miou_present": _number(iou[labelled > 0].mean()),
        "iou": {name: _number(value) for name, value in zip(datasets.NAMES, iou, strict=True)},
        "pixel_accuracy": _number(100 * hits.sum() / matrix.sum()),
        "confusion_matrix": matrix.tolist(),
    }


def uncertainty_scores(counts):
    """(2, 21, K, K) counts -> dict of uiou (percent, one per THRESHOLDS) and auiou, their mean.

    UIoU (Sakaridis et al., ICCV 2019), per class (TP + TI) / (TP + TI + FP + FN + FI): a pixel below the
    threshold is declared invalid, rightly so (TI) where gt_invIds says 1, else wrongly (FI); the others count
    as usual."""
    counts, uiou = counts.cpu(), []
    for n in range(len(THRESHOLDS)):
        kept, declared = counts[:, n + 1 :].sum((0, 1)), counts[:, : n + 1].sum((1, 3))
        hits, rightly, wrongly = kept.diag().double(), declared[1], declared[0]
        union = kept.sum(0) + kept.sum(1) - hits + rightly + wrongly
        uiou.append(100 * ((hits + rightly) / union).nanmean())
    return {"uiou": [_number(value) for value in uiou], "auiou": _number(torch.stack(uiou).mean())}


def _number(value):
    return None if value.isnan() else value.item()


def evaluate(model, found, device, workers=0, each=None, uiou=False, **views):
    """Scores of a model on [Sample], an empty dict where they have no labels; each(item, prediction,
    confidence) is called for every image, in a thread, while the network goes on; uiou: with uncertainty
    scores, for samples with gt_invIds. Processes that train together share the images, and all get the scores
    of all."""
    classes, (rank, processes) = len(datasets.NAMES), ranks()
    bins = (2, len(THRESHOLDS) + 1) if uiou else ()
    counts = torch.zeros(*bins, classes, classes, dtype=torch.int64, device=device)
    shared, failed = predictions(model, found[rank::processes], device, workers, **views), None
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as background:
            last = None
            for item, prediction, confidence in shared:
                if "label" in item:
                    extra = (confidence, item["invalid"]) if uiou else ()
                    counts += count(item["label"], prediction, classes, *extra)
                if last:
                    last.result()  # raises what went wrong there; one image ahead at most
                if each:
                    last = background.submit(each, item, prediction, confidence)
            if last:
                last.result()
    except datasets.DataError as error:
        failed = error
    if processes > 1:
        distributed.all_reduce(counts)
    (lost,) = summed([bool(failed)], device)
    if lost:
        raise failed or datasets.DataError("another process could not read its data")
    if not found[0].label:
        return {}
    return scores(counts.sum((0, 1))) | uncertainty_scores(counts) if uiou else scores(counts)


def percent(value):
    return "  n/a" if value is None else f"{value:5.1f}"


def summary(result):
    return "  ".join(
        f"{name} {percent(result[name]).strip()}" for name in ("miou", "miou_present", "pixel_accuracy")
    )


def table(*results):
    """Scores as aligned text, a column each."""
    means = ("miou", "miou_present", "pixel_accuracy", "auiou")
    columns = [result["iou"] | {name: result[name] for name in means if name in result} for result in results]
    rows = ((name, *(column[name] for column in columns)) for name in columns[0])
    return "\n".join(f"{name:14} " + "      ".join(map(percent, values)) for name, *values in rows)


# ---- files -------------------------------------------------------------------------------------------------


def write_prediction(folder, item, prediction):
    """FOLDER/{labelTrainIds,labelIds,color,overlay}/NAME.png, at the image's own size."""
    prediction = prediction.cpu()
    colours, image = TF.to_pil_image(datasets.colourise(prediction)), TF.to_pil_image(item["image"])
    pictures = {
        "labelTrainIds": TF.to_pil_image(prediction.to(torch.uint8)),
        "labelIds": TF.to_pil_image(LABEL_IDS[prediction]),
        "color": colours,
        "overlay": Image.blend(image, colours, 0.5),
    }
    for kind, picture in pictures.items():
        path = Path(folder, kind, f"{item['name']}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, compress_level=1)  # a quarter of the time of the default, a fifth more bytes


class Submission:
    """A zip for a test server, written as FILE.tmp; `with` checks it at the end and names it FILE, or removes it.

    Dark Zurich: labelTrainIds/, labelTrainIds_invalid/ (the same) and confidence/ (16 bit, 65535 times the
    largest softmax) at its top, names beginning with SEQ_frame_NNNNNN. Cityscapes: labelIds, one PNG an
    image."""

    def __init__(self, path, layout, found):
        self.path, self.layout, self.found = Path(path), layout, found
        for sample in found:
            if datasets.size_of(sample.image) != SIZES[layout]:
                raise datasets.DataError(
                    f"{sample.image}: the server wants {SIZES[layout]}, width and height"
                )
        self.aside = Path(f"{path}.tmp")
        self.zip = zipfile.ZipFile(self.aside, "w")

    def entries(self, name):
        if self.layout == "cityscapes":
            return {f"{name}.png": "labelIds"}
        kinds = ("labelTrainIds", "labelTrainIds_invalid", "confidence")
        return {f"{kind}/{name.removesuffix('_rgb_anon')}.png": kind for kind in kinds}

    def add(self, item, prediction, confidence):
        confidence = (confidence.cpu().double() * 65535).round().to(torch.uint16).view(torch.int16)
        pixels = {"confidence": confidence, "labelIds": LABEL_IDS[prediction.cpu()]}
        pixels["labelTrainIds"] = pixels["labelTrainIds_invalid"] = prediction.cpu().to(torch.uint8)
        for entry, kind in self.entries(item["name"]).items():
            file = io.BytesIO()
            TF.to_pil_image(pixels[kind]).save(file, format="PNG")
            self.zip.writestr(entry, file.getvalue())

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        try:
            self.zip.close()
            if not failed:
                entries = self.check()
                self.aside.replace(self.path)
                print(f"{self.path}: {entries} entries for {len(self.found)} images, checked")
        finally:
            self.aside.unlink(missing_ok=True)

    def check(self):
        """Open the zip again and count its entries, every image's. Raises ValueError."""
        with zipfile.ZipFile(self.aside) as packed:
            names, wanted = packed.namelist(), {}
            for sample in self.found:
                wanted |= self.entries(Path(sample.image).stem)
            if sorted(names) != sorted(wanted):
                raise ValueError(f"{self.path}: {sorted({*names} ^ {*wanted})[:3]} missing or too many")
            for entry, kind in wanted.items():
                with Image.open(io.BytesIO(packed.read(entry))) as image:
                    mode = "I;16" if kind == "confidence" else "L"
                    allowed = LABEL_IDS.tolist() if kind == "labelIds" else range(len(LABEL_IDS))
                    if (image.mode, image.size) != (mode, SIZES[self.layout]) or (
                        mode == "L" and any(value not in allowed for _, value in image.getcolors())
                    ):
                        raise ValueError(
                            f"{self.path}: {entry} is {image.mode} {image.size}, or holds unknown values"
                        )
        return len(wanted)


def export(model, path):
    """Write the network with torch.export, batch, height and width dynamic: torch.export.load(path).module()
    maps float RGB images (B, 3, H, W) in [0, 1] to (features, logits) without any file of ours."""
    model = copy.deepcopy(model).cpu()  # a program remembers its device, and a CPU is everywhere
    least = {0: ("batch", 1), 2: ("height", 32), 3: ("width", 32)}
    dims = {n: torch.export.Dim(name, min=value) for n, (name, value) in least.items()}
    try:
        program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes={"images": dims})
    except RuntimeError as error:
        raise ValueError(
            f"{path}: torch.export cannot follow this network ({datasets.one_line(error)})"
        ) from None
    torch.export.save(program, path)
    print(f"{path}: exported")


# ---- the command -------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with every default that says something, and the module's docstring as it stands."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def parse_args(argv):
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=examples, formatter_class=Help)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add, flag = parser.add_argument, {"action": "store_true"}
    what = "last.pt or best.pt of train.py, or a public state dict"
    add("--checkpoint", metavar="FILE", required=True, help=what)
    data = parser.add_mutually_exclusive_group()
    for layout in datasets.LAYOUTS:
        data.add_argument(f"--{layout}", metavar="DIR", help="predict and score its --split")
    data.add_argument("--images", nargs="+", metavar="PATH", help="predict pictures and folders of pictures")
    add("--split", help="of the data set: val if not given, with --nighttime-driving or --submit test")
    kinds, formats = tuple(datasets.TABLES), tuple(models.INPUT_FORMATS)
    add("--labels", choices=kinds, default="labelTrainIds", help="read where both kinds are there")
    add("--model", choices=("night", "day"), default="night", help="M_n or M_d")
    add("--input-format", choices=formats, default="imagenet", help="of a public state dict")
    add("--flip", **flag, help="average with the mirrored image")
    add("--scales", type=float, nargs="+", default=[1.0], help="average over resized images")
    add("--window", type=int, nargs=2, metavar=("H", "W"), help="predict in overlapping windows")
    add("--uiou", **flag, help="UIoU and AUIoU too, where there are gt_invIds")
    add("--json", metavar="FILE", help="write scores, confusion matrix and descriptions")
    add("--out", metavar="DIR", help="write labelTrainIds/, labelIds/, color/ and overlay/, NAME.png each")
    add("--submit", metavar="FILE", help="write the zip for the test server of Dark Zurich or Cityscapes")
    add("--export", metavar="FILE", help="write the network with torch.export")
    add("--device", default=best_device(), help="cuda, mps or cpu; the default is the best there is")
    add("--workers", type=int, default=1, help="decoding processes")
    args = parser.parse_args(argv)
    if problem := contradiction(args):
        parser.error(problem)
    return args


def chosen(args):
    """(layout, root) of the data set that was named, or (None, None)."""
    named = {layout: getattr(args, layout.replace("-", "_")) for layout in datasets.LAYOUTS}
    return next(((layout, root) for layout, root in named.items() if root), (None, None))


def contradiction(args):
    """What is wrong with the arguments, as one line, or None."""
    layout, _ = chosen(args)
    if not layout and not args.images and not args.export:
        return (
            "one of --darkzurich, --cityscapes, --acdc, --nighttime-driving, --images or --export is needed"
        )
    if args.uiou and not layout:
        return "--uiou needs a data set with gt_invIds: --darkzurich or --acdc"
    if args.json and not layout and not args.images:
        return f"--json {args.json}: nothing to write, no data set or pictures are named"
    if args.images and not args.out:
        return "--images has nothing to score: give --out DIR for the predictions"
    if args.submit and args.split not in (None, "test"):
        return f"--submit is for the test split, not {args.split}"
    for path in filter(None, (args.json, args.submit, args.export)):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            return f"{path}: not a file in a folder that exists"
    if args.submit and layout not in SIZES:
        return (
            "--submit is for Dark Zurich's and Cityscapes' test servers; elsewhere --out writes the folders"
        )
    if not all(0 < s < math.inf for s in args.scales) or args.workers < 0 or min(args.window or [32]) < 32:
        return "--scales must be positive, --workers not negative, --window at least 32 x 32"
    return device_problem(args.device)


def run(args):
    layout, root = chosen(args)
    found, where = [], f"{layout} {root}"
    if layout:
        split = args.split or ("test" if args.submit or layout == "nighttime-driving" else "val")
        found = datasets.samples(layout, root, split, args.labels)
        print(f"{layout} {split}: {datasets.describe(found, root)}", flush=True)
    elif args.images:
        found = datasets.pictures(args.images)
        print(f"{len(found)} pictures", flush=True)
    if layout and not found[0].label and not (args.out or args.submit):
        raise ValueError(
            f"{where}: no labels to score against; give --out DIR or --submit FILE for the predictions"
        )
    if args.uiou and not all(sample.invalid for sample in found):
        raise ValueError(f"{where}: --uiou needs a gt_invIds.png beside every label")
    model, description = load_model(args.checkpoint, args.model, args.device, args.input_format)
    if args.export:
        export(model, args.export)
    if not found:
        return
    views = {"scales": args.scales, "flip": args.flip, "window": args.window}
    with Submission(args.submit, layout, found) if args.submit else contextlib.nullcontext() as submission:

        def write(item, prediction, confidence):
            if args.out:
                write_prediction(args.out, item, prediction)
            if submission:
                submission.add(item, prediction, confidence)

        result = evaluate(model, found, args.device, args.workers, write, args.uiou, **views)
        if result:
            print(table(result))
        if args.json:
            result |= {"images": len(found), "args": vars(args), "checkpoint": description}
            Path(args.json).write_text(json.dumps(result, indent=1))
        if args.out:
            print(f"{args.out}: labelTrainIds/, labelIds/, color/ and overlay/ of {len(found)} images")


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if not expected(error):
            raise
        print(f"evaluate.py: error: {datasets.one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
