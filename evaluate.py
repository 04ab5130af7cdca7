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
import itertools
import json
import math
import os
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks, make_grid

import datasets
import models

SIZES = {"darkzurich": (1920, 1080), "cityscapes": (2048, 1024)}  # what the test servers want
MEANS = ("miou", "miou_present", "pixel_accuracy")


def evaluate(model, samples, device, workers=1, scales=(1.0,), flip=False):
    """Scores of a model on labelled [Sample]; see `predictions`. The model's modules keep their modes."""
    classes = len(datasets.NAMES)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    with evaluating(model):
        for item, prediction, _ in predictions(model, samples, device, workers, scales, flip):
            counts += count(item["label"], prediction, classes)
    return scores(counts)


@torch.no_grad()
def predictions(model, samples, device, workers=1, scales=(1.0,), flip=False):
    """Yield (item of datasets.load, prediction (H, W) int64, confidence (H, W)) for each [Sample], of a model
    in eval mode; scales, flip: see `probabilities`. ValueError for another number of classes."""
    for item in datasets.prefetch(datasets.load, samples, workers):
        images = item["image"][None].to(device) / 255
        probability = probabilities(model, images, scales, flip)[0]
        if len(probability) != len(datasets.NAMES):
            expected = f"expected a network of {len(datasets.NAMES)} classes"
            raise ValueError(f"{expected}, not of {len(probability)}")
        confidence, prediction = probability.max(0)
        if confidence.isnan().any():
            raise models.WeightsError(f"{item['name']}: the network puts out nan")
        yield item, prediction, confidence


@contextlib.contextmanager
def evaluating(model):
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
    lines = []
    for name in (*datasets.NAMES, *MEANS):
        values = [result["iou"].get(name, result.get(name)) for result in results]
        lines.append(name.ljust(14) + "".join(f"{value:11.1f}" for value in values))
    return "\n".join(lines).replace("nan", "n/a")


def probabilities(model, images, scales=(1.0,), flip=False):
    """Softmax (B, K, H, W) of images (B, 3, H, W), averaged over scales and flips."""
    size = images.shape[2:]
    views = []
    for scale in scales:
        scaled = images
        if scale != 1:
            resized = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, resized, mode="bilinear", antialias=True)
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
    models.check_head(state, path)
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, dict) or not {"backbone", "output_stride"} <= args.keys():
        raise models.WeightsError(f"{path}: no night.pt or last.pt that train.py wrote")
    model = models.DeepLab(args["backbone"], len(datasets.NAMES), args["output_stride"])
    models.fit(model, state, path)
    return model.to(device, memory_format=torch.channels_last).eval(), content


def pictures_of(prediction, confidence):
    """{kind: Pillow image, at the image's own size} of what --out and --submit write."""
    ids = TF.to_pil_image(prediction.byte().cpu())
    levels = (confidence.cpu().double() * 65535).round()
    return {
        "labelTrainIds": ids,
        "labelIds": ids.point(datasets.TO_LABEL_ID),
        "color": TF.to_pil_image(datasets.colourise(prediction)),
        "confidence": TF.to_pil_image(levels.to(torch.uint16).view(torch.int16)),
    }


def overlay(image, prediction, label=None):
    """The Pillow image for people: the predicted classes over the image, beside it those of the label if there
    is one, and the names of the colours. image: (3, H, W) uint8, prediction and label: (H, W) trainIds."""
    maps = {"prediction": prediction.cpu().long()}
    if label is not None:
        maps["label"] = label.long()
    tiles = torch.stack([regions(image, classes) for classes in maps.values()])
    return captioned(tiles, [*maps], torch.stack([*maps.values()]).unique().tolist())


def regions(image, classes):
    """(3, H, W) uint8: a uint8 image under the colours of its (H, W) classes, with lines between them. A dark
    image is lifted first, or else its night and the colours would mix to mud."""
    mean = image.float().mean().item() / 255
    if 0 < mean < 0.4:
        image = TF.adjust_gamma(image, math.log(0.4) / math.log(mean))
    present = set(classes.unique().tolist()) - {datasets.IGNORE}
    if present:
        masks = torch.stack([classes == number for number in present])
        image = draw_segmentation_masks(image, masks, 0.45, [datasets.COLOURS[number] for number in present])
    line = 1 + image.shape[2] // 1500  # pixels
    ids = F.pad(classes[None].float(), (0, line, 0, line), mode="replicate")
    edges = F.max_pool2d(ids, line + 1, 1) != -F.max_pool2d(-ids, line + 1, 1)
    return draw_segmentation_masks(image, edges, 0.7, "white")


def sheet(rows, headings):
    """A Pillow image of rows of tiles, (3, H, W) uint8 images or (H, W) trainIds, each in the shape of the
    first, at most 480 wide, with headings and the colours of all classes that occur."""
    height, width = rows[0][0].shape[-2:]
    size = [max(1, round(height * min(1, 480 / width))), min(width, 480)]
    tiles, classes = [], set()
    for tile in itertools.chain(*rows):
        if tile.ndim == 2:
            classes |= set(tile.unique().tolist())
            tile = datasets.colourise(tile)
        tiles.append(TF.resize(tile.cpu(), size, TF.InterpolationMode.NEAREST))
    return captioned(torch.stack(tiles), headings, classes)


def captioned(tiles, headings, classes):
    """A Pillow image of tiles (N, 3, H, W) uint8 in columns, with a heading over each column and below the
    names of the colours of the classes."""
    picture = TF.to_pil_image(make_grid(tiles, len(headings)))
    font = ImageFont.load_default(max(11, tiles.shape[3] // 28))
    line = int(1.5 * font.size)
    wide = max(picture.width, 12 * line)  # room for the longest name
    x, y, legend = 0, line + picture.height, []
    for number in sorted(classes):
        name = "no label" if number == datasets.IGNORE else datasets.NAMES[number]
        needed = int(2 * line + font.getlength(name))
        if x + needed > wide:
            x, y = 0, y + line
        legend.append((x, y, name, tuple(datasets.PALETTE[number].tolist())))
        x += needed

    page = Image.new("RGB", (wide, y + line), "white")
    page.paste(picture, (0, line))
    draw = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        middle = picture.width * (column + 0.5) / len(headings)
        draw.text((middle, line / 2), heading, "black", font, "mm")
    for x, y, name, colour in legend:
        draw.rectangle((x + line / 4, y + line / 4, x + line, y + line * 3 / 4), colour, "black")
        draw.text((x + 1.2 * line, y + line / 2), name, "black", font, "lm")
    return page


def entries(layout, name):
    """{entry of a test server's zip: what it holds} for the image of this name."""
    if layout == "cityscapes":
        return {f"{name}.png": "labelIds"}
    name = name.removesuffix("_rgb_anon")
    folders = ("labelTrainIds", "labelTrainIds_invalid", "confidence")
    return {f"{folder}/{name}.png": folder.removesuffix("_invalid") for folder in folders}


@contextlib.contextmanager
def submission(path, layout, samples):
    """A zip for a test server; yields add(name, the `pictures_of` it). Dark Zurich: labelTrainIds/,
    labelTrainIds_invalid/ (the same) and confidence/ (16 bit, 65535 times the largest softmax). Cityscapes:
    labelIds. It is written aside, compared with the images' names, and then gets its name."""
    wanted = []
    for sample in samples:
        wanted += entries(layout, Path(sample.image).stem)
    if alike(wanted):
        raise datasets.DataError(f"{path}: two images would have one name in it")

    def add(name, pictures):
        size = pictures["labelIds"].size
        if size != SIZES[layout]:
            raise datasets.DataError(f"{name}: the server wants {SIZES[layout]}, not {size}")
        for entry, kind in entries(layout, name).items():
            png = io.BytesIO()
            pictures[kind].save(png, format="PNG")
            archive.writestr(zipfile.ZipInfo(entry), png.getvalue())  # of 1980: a clock may say 1970

    aside = Path(f"{path}.tmp")
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            yield add
            odd = sorted({*archive.namelist()} ^ {*wanted})
            if odd:
                raise datasets.DataError(f"{path}: entries and images differ: {odd[:3]}")
        aside.replace(path)
        say(f"{path}: {len(wanted)} entries, as the images are named")
    finally:
        aside.unlink(missing_ok=True)


def alike(names):
    """Are there two names that a disk may not tell apart, as with capitals or accents?"""
    return len({unicodedata.normalize("NFC", name).casefold() for name in names}) < len(names)


def say(text):
    """Print a line. A closed terminal, or one that cannot show a name in it, ends no run."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def write_whole(path, content):
    """Write bytes beside `path`, and then let them take its place: `path` never holds half of them."""
    aside = Path(f"{path}.tmp")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error.strerror}); what it held is still whole") from None


def make_room(path):
    """Make the folder that a file will be written into, and see now, not in hours, that it can be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None


def check_device(parser, device):
    """End with a line that says what to do where torch cannot use this device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # without a driver; without CUDA
        reason = str(error).split("\n")[0]
        parser.error(f"--device {device}: {reason} (--device cpu works everywhere)")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python evaluate.py --checkpoint FILE --darkzurich DIR [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
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
    if args.images and not args.out:
        parser.error("--images has nothing to score: give --out DIR for the predictions")
    layout, _ = data_of(args)
    if args.submit and (layout not in SIZES or args.split not in (None, "test")):
        parser.error("--submit is for the test split of --darkzurich or --cityscapes")
    if min(args.scales) <= 0:
        parser.error("--scales are above 0")
    for path in filter(None, (args.out, args.json, args.submit)):
        empty_folder = path == args.out and os.path.isdir(path) and not os.listdir(path)
        if os.path.exists(path) and not empty_folder:
            parser.error(f"{path} exists: give a new one")
    check_device(parser, args.device)
    return args


def data_of(args):
    """(layout, its folder) of the data set that the arguments name; None, None with --images."""
    for layout in datasets.LAYOUTS:
        root = getattr(args, layout.replace("-", "_"))
        if root:
            return layout, root
    return None, None


def main(argv=None):
    args = parse_args(argv)
    layout, root = data_of(args)
    if args.images:
        samples = datasets.pictures(args.images)
    else:
        test = args.submit or layout == "nighttime-driving"
        split = args.split or ("test" if test else "val")
        samples = datasets.samples(layout, root, split)
    labelled = samples[0].label is not None
    say(f"{len(samples)} images, {'labelled' if labelled else 'no labels'}")
    if not (labelled or args.out or args.submit):
        raise datasets.DataError(f"{root}: no labels of {split}: give --out or --submit")
    warning = datasets.label_warning(samples) if labelled else None
    if warning:
        say(warning)
    model, content = load_model(args.checkpoint, args.model, args.device)
    for path in filter(None, (args.json, args.submit, args.out and f"{args.out}/x")):
        make_room(path)
    result = {"images": len(samples)}
    with submission(args.submit, layout, samples) if args.submit else contextlib.nullcontext() as add:
        counts = predict(model, samples, add, args)
    if labelled:
        result = scores(counts) | result
        say(table(result))
    if args.json:
        result |= {"args": vars(args)}
        run = content["args"]
        step = content.get("step")
        result["checkpoint"] = {"path": args.checkpoint, "step": step, "seed": run.get("seed"), "args": run}
        valid = json.loads(json.dumps(result), parse_constant=lambda _: None)  # nan is no JSON: null
        write_whole(args.json, json.dumps(valid, indent=1).encode())


def predict(model, samples, add, args):
    """Write the predictions that --out and --submit (by `add`) want. Returns the (19, 19) pixel counts."""
    names = [Path(sample.image).stem for sample in samples]
    if alike(names):  # of several folders
        names = [f"{n:05}_{name}" for n, name in enumerate(names)]
    classes = len(datasets.NAMES)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=args.device)
    views = predictions(model, samples, args.device, args.workers, args.scales, args.flip)
    for name, (item, prediction, confidence) in zip(names, views, strict=True):
        if "label" in item:
            counts += count(item["label"], prediction, classes)
        if not (args.out or add):
            continue
        pictures = pictures_of(prediction, confidence)
        if args.out:
            pictures["overlay"] = overlay(item["image"], prediction, item.get("label"))
            for kind in ("labelTrainIds", "labelIds", "color", "overlay"):
                Path(args.out, kind).mkdir(exist_ok=True)
                pictures[kind].save(Path(args.out, kind, f"{name}.png"), compress_level=1)  # fast
        if add:
            add(item["name"], pictures)
    return counts


if __name__ == "__main__":
    try:
        main()
    except (datasets.DataError, models.WeightsError, OSError) as error:  # a bug keeps its traceback
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
