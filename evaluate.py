"""Score a checkpoint, write its predictions, or pack them for a test server.

    python evaluate.py --checkpoint OUT/night.pt --darkzurich DIR --json scores.json --out predictions
    python evaluate.py --checkpoint OUT/night.pt --darkzurich DIR --split test --submit upload.zip
    python evaluate.py --checkpoint OUT/night.pt --images street.jpg folder --out predictions

Scores come from one integer count over all pixels of all images, each at its own size. IoU, mIoU and pixel
accuracy are percentages; `miou` leaves out classes with neither label nor prediction, as cityscapesScripts
does, and `miou_present` also those without label. A class that does not occur has no IoU: n/a, not 0.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import datasets
import models

SIZES = {"darkzurich": (1920, 1080), "cityscapes": (2048, 1024)}  # what the test servers want
MEANS = ("miou", "miou_present", "pixel_accuracy")


@torch.no_grad()
def evaluate(model, samples, device, workers=1, each=None, scales=(1.0,), flip=False):
    """Scores of a model on [Sample]; scales, flip: see `probabilities`. For every image it calls each(item of
    datasets.load, prediction (H, W) int64, confidence (H, W)). The model's modules keep their modes."""
    classes = len(datasets.NAMES)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for item in datasets.ahead(datasets.load, samples, workers):
            images = item["image"][None].to(device) / 255
            confidence, prediction = probabilities(model, images, scales, flip)[0].max(0)
            if confidence.isnan().any():
                raise models.WeightsError(f"{item['name']}: the network puts out nan")
            if "label" in item:
                counts += count(item["label"], prediction, classes)
            if each:
                each(item, prediction, confidence)
    finally:
        for module, training in modes:
            module.training = training
    return scores(counts)


def count(label, prediction, num_classes):
    """(K, K) integer pixel counts on the prediction's device, rows are labels, label 255 left out."""
    label = label.to(prediction.device).long()
    index = (label * num_classes + prediction)[label != datasets.IGNORE]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix):
    """(K, K) counts, rows are labels -> dict of miou, miou_present, pixel_accuracy, iou (percent, nan where
    undefined) and confusion_matrix."""
    matrix = matrix.cpu()
    hits, labelled, predicted = matrix.diag().double(), matrix.sum(1), matrix.sum(0)
    iou = 100 * hits / (labelled + predicted - hits)  # 0 / 0 = nan: no label, no prediction
    return {
        "miou": iou.nanmean().item(),
        "miou_present": iou[labelled > 0].mean().item(),
        "pixel_accuracy": (100 * hits.sum() / matrix.sum()).item(),
        "iou": dict(zip(datasets.NAMES, iou.tolist(), strict=True)),
        "confusion_matrix": matrix.tolist(),
    }


def table(*results):
    """Scores as aligned text, a column each."""
    columns = [result["iou"] | {name: result[name] for name in MEANS} for result in results]
    lines = [name.ljust(14) + "".join(f"{column[name]:11.1f}" for column in columns) for name in columns[0]]
    return "\n".join(lines).replace("nan", "n/a")


def probabilities(model, images, scales=(1.0,), flip=False):
    """Softmax (B, K, H, W) of images (B, 3, H, W), averaged over scales and flips."""
    size, views = images.shape[2:], []
    for scale in scales:
        resized = [max(1, round(side * scale)) for side in size]
        scaled = F.interpolate(images, resized, mode="bilinear", antialias=True) if scale != 1 else images
        views.append(model(scaled)[1].softmax(1))
        if flip:
            views.append(model(scaled.flip(3))[1].softmax(1).flip(3))
    if any(scale != 1 for scale in scales):
        views = [F.interpolate(view, size, mode="bilinear") for view in views]
    return sum(views) / len(views)


def load_model(path, which="night", device="cpu"):
    """(DeepLab in eval mode, the file's content): of a night.pt of train.py, or M_n ("night") or M_d ("day")
    of a last.pt. Raises models.WeightsError."""
    content = models.read_file(path)
    state = models.weights_in(content, path, which)
    if "architecture" not in state or len(state.get("classifier.4.bias", ())) != len(datasets.NAMES):
        raise models.WeightsError(f"{path}: no night.pt or last.pt that train.py wrote, of 19 classes")
    backbone, output_stride = state["architecture"].tolist()
    model = models.DeepLab(models.BACKBONES[backbone], output_stride=output_stride)
    models.load_weights(model, state, path)
    return model.to(device, memory_format=torch.channels_last).eval(), content


def drawn(image, prediction, confidence):
    """{kind: Pillow image, at the image's own size} of what --out and --submit write."""
    ids, levels = TF.to_pil_image(prediction.byte().cpu()), (confidence.cpu().double() * 65535).round()
    colours = TF.to_pil_image(datasets.colourise(prediction))
    return {
        "labelTrainIds": ids,
        "labelIds": ids.point(datasets.TO_LABEL_ID),
        "color": colours,
        "overlay": Image.blend(TF.to_pil_image(image), colours, 0.5),
        "confidence": TF.to_pil_image(levels.to(torch.uint16).view(torch.int16)),
    }


def grid(tiles, columns):
    """(3, H, W) uint8 tiles as one picture, each in the shape of the first, at most 480 wide."""
    width = min(480, tiles[0].shape[2])
    size = [round(tiles[0].shape[1] * width / tiles[0].shape[2]), width]
    tiles = [TF.resize(tile, size, TF.InterpolationMode.NEAREST) for tile in tiles]
    return TF.to_pil_image(make_grid(tiles, columns))


def entries(layout, name):
    """{entry of a test server's zip: what it holds} for the image of this name."""
    if layout == "cityscapes":
        return {f"{name}.png": "labelIds"}
    folders = ("labelTrainIds", "labelTrainIds_invalid", "confidence")
    return {f"{f}/{name.removesuffix('_rgb_anon')}.png": f.removesuffix("_invalid") for f in folders}


@contextlib.contextmanager
def submission(path, layout, samples):
    """A zip for a test server; yields add(name, pictures of `drawn`). Dark Zurich: labelTrainIds/,
    labelTrainIds_invalid/ (the same) and confidence/ (16 bit, 65535 times the largest softmax). Cityscapes:
    labelIds. It is written aside, compared with the images' names, and then gets its name."""
    wanted = sorted(entry for sample in samples for entry in entries(layout, Path(sample.image).stem))
    if len({*wanted}) < len(wanted):
        raise datasets.DataError(f"{path}: two images would have one name in it")

    def add(name, pictures):
        if (size := pictures["labelIds"].size) != SIZES[layout]:
            raise datasets.DataError(f"{name}: the server wants {SIZES[layout]}, not {size}")
        for entry, kind in entries(layout, name).items():
            pictures[kind].save(png := io.BytesIO(), format="PNG")
            archive.writestr(entry, png.getvalue())

    aside = Path(f"{path}.tmp")
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            yield add
            if odd := sorted({*archive.namelist()} ^ {*wanted}):
                raise datasets.DataError(f"{path}: entries and images differ: {odd[:3]}")
        aside.replace(path)
        print(f"{path}: {len(wanted)} entries, as the images are named", flush=True)
    finally:
        aside.unlink(missing_ok=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python evaluate.py --checkpoint FILE --darkzurich DIR [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add, data = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--checkpoint", metavar="FILE", required=True, help="night.pt or last.pt of train.py")
    for layout in datasets.LAYOUTS:
        data.add_argument(f"--{layout}", metavar="DIR", help="predict and score its --split")
    data.add_argument("--images", nargs="+", metavar="PATH", help="predict pictures and folders of pictures")
    add("--split", help="of the data set (default: val; with --nighttime-driving or --submit test)")
    add("--model", choices=("night", "day"), default="night", help="of a last.pt: M_n or M_d")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--scales", type=float, nargs="+", default=[1.0], help="average over resized images")
    add("--json", metavar="FILE", help="write scores and confusion matrix")
    add("--out", metavar="DIR", help="write labelTrainIds/, labelIds/, color/ and overlay/ into a new folder")
    add("--submit", metavar="FILE", help="write a new zip for the test server of Dark Zurich or Cityscapes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=1, help="decoding threads")
    args = parser.parse_args(argv)
    given = [(name, root) for name in datasets.LAYOUTS if (root := getattr(args, name.replace("-", "_")))]
    args.layout, args.root = given[0] if given else (None, None)
    if args.images and not args.out:
        parser.error("--images has nothing to score: give --out DIR for the predictions")
    if args.submit and (args.layout not in SIZES or args.split not in (None, "test")):
        parser.error("--submit is for the test split of --darkzurich or --cityscapes")
    args.split = args.split or ("test" if args.submit or args.layout == "nighttime-driving" else "val")
    for path in filter(os.path.exists, filter(None, (args.out, args.json, args.submit))):
        if path != args.out or not os.path.isdir(path) or os.listdir(path):
            parser.error(f"{path} exists: give a new one")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.images:
        samples = datasets.pictures(args.images)
    else:
        samples = datasets.samples(args.layout, args.root, args.split)
    labelled = samples[0].label is not None
    print(f"{len(samples)} images, {'labelled' if labelled else 'no labels'}", flush=True)
    if not (labelled or args.out or args.submit):
        raise datasets.DataError(f"{args.root}: no labels of {args.split}: give --out or --submit")
    if labelled and (warning := datasets.label_warning(samples)):
        print(warning, flush=True)
    model, content = load_model(args.checkpoint, args.model, args.device)
    for path in filter(None, (args.json, args.submit, args.out and f"{args.out}/x")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    names = [Path(sample.image).stem for sample in samples]
    if len({*names}) < len(names):  # equal names in several folders
        names = [f"{n:05}_{name}" for n, name in enumerate(names)]
    with submission(args.submit, args.layout, samples) if args.submit else contextlib.nullcontext() as pack:

        def each(item, prediction, confidence):
            pictures, name = drawn(item["image"], prediction, confidence), names.pop(0)
            if args.out:
                for kind in ("labelTrainIds", "labelIds", "color", "overlay"):
                    Path(args.out, kind).mkdir(exist_ok=True)
                    pictures[kind].save(Path(args.out, kind, f"{name}.png"), compress_level=1)  # fast
            if pack:
                pack(item["name"], pictures)

        each = each if args.out or pack else None
        result = evaluate(model, samples, args.device, args.workers, each, scales=args.scales, flip=args.flip)
    if labelled:
        print(table(result))
    if args.json:
        result = (result if labelled else {}) | {"images": len(samples), "args": vars(args)}
        result["checkpoint"] = {name: content[name] for name in ("step", "args") if name in content}
        valid = json.loads(json.dumps(result), parse_constant=lambda _: None)  # nan is no JSON: null
        Path(args.json).write_text(json.dumps(valid, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (datasets.DataError, models.WeightsError, OSError) as error:  # a bug keeps its traceback
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
