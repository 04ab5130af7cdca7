"""Score a checkpoint, write its predictions, or pack them for a test server.

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
import collections
import concurrent.futures
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import uuid
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import distributed
from torchvision.transforms.v2 import functional as TF

import datasets
import models

FORMAT = 2  # of the checkpoints
LABEL_IDS = torch.tensor(datasets.LABEL_IDS, dtype=torch.uint8)
SIZES = {"darkzurich": (1920, 1080), "cityscapes": (2048, 1024)}  # what the test servers want
KINDS = ("labelTrainIds", "labelIds", "color", "overlay")
MARK = b"CCDistill"  # in predictions and zips, so that no file of somebody else is written over
MEANS = ("miou", "miou_present", "pixel_accuracy")

# ---- scores ------------------------------------------------------------------------------------------------


def evaluate(model, samples, device, workers=1, each=None, failed=None, **views):
    """Scores of a model on [Sample], an empty dict where they have no labels.

    each(item, prediction, confidence) is called for every image, in a thread, while the network goes on.
    failed: a list that takes the DataErrors of unreadable images; None: the first one is raised. views: see
    `predictions`.
    """
    classes = len(datasets.NAMES)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        last = background.submit(int)
        for result in predictions(model, samples, device, workers, failed, **views):
            item, prediction, _ = result
            if "label" in item:
                counts += count(item["label"], prediction, classes)
            last.result()  # raises what went wrong there; one image ahead at most
            last = background.submit(each, *result) if each else last
        last.result()
    return scores(counts) if samples[0].label else {}


def count(label, prediction, num_classes):
    """(K, K) integer pixel counts on the prediction's device, rows are labels, label 255 left out."""
    label = label.to(prediction.device).long()
    index = (label * num_classes + prediction)[label != datasets.IGNORE]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def scores(matrix):
    """(K, K) counts, rows are labels -> dict of miou, miou_present, iou, pixel_accuracy (percent, None where
    undefined) and confusion_matrix."""
    matrix = matrix.cpu()
    hits, labelled, predicted = matrix.diag().double(), matrix.sum(1), matrix.sum(0)
    iou = 100 * hits / (labelled + predicted - hits)  # 0 / 0 = nan: no label, no prediction

    def number(value):
        return None if value.isnan() else value.item()

    return {
        "miou": number(iou.nanmean()),
        "miou_present": number(iou[labelled > 0].mean()),
        "iou": {name: number(value) for name, value in zip(datasets.NAMES, iou, strict=True)},
        "pixel_accuracy": number(100 * hits.sum() / matrix.sum()),
        "confusion_matrix": matrix.tolist(),
    }


def percent(value):
    return "  n/a" if value is None else f"{value:5.1f}"


def table(*results):
    """Scores as aligned text, a column each."""
    columns = [result["iou"] | {name: result[name] for name in MEANS} for result in results]
    rows = ((name, *(column[name] for column in columns)) for name in columns[0])
    return "\n".join(f"{name:14} " + "      ".join(map(percent, values)) for name, *values in rows)


# ---- predictions -------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(model, samples, device, workers=1, failed=None, scales=(1.0,), flip=False):
    """Yield (item of datasets.load, prediction (H, W) int64, confidence (H, W)), the last two on the device,
    one image at a time. scales, flip: softmax averaged over resized and mirrored images. Raises ValueError
    where the network puts out nan."""
    training = model.training
    model.eval()

    def load(sample):
        try:
            return datasets.load(sample)
        except datasets.DataError as error:
            if failed is None:
                raise
            failed.append(error)

    for item in filter(None, datasets.ahead(load, samples, workers)):
        images = to_float(item["image"][None], device)
        try:
            if tuple(scales) == (1.0,) and not flip and min(images.shape[2:]) >= 32:
                # In strips, which stay in the processor's cache.
                strips = (strip.softmax(1).max(1) for strip in model(images)[1].split(32, 2))
                confidence, prediction = (torch.cat(parts, 1)[0] for parts in zip(*strips, strict=True))
            else:
                confidence, prediction = probabilities(model, images, scales, flip)[0].max(0)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = "{} x {}".format(*images.shape[:1:-1])
            error = datasets.DataError(f"{item['name']}: {size} is too large for the memory of {device}")
            if failed is None:
                raise error from None
            failed.append(error)
            continue
        if confidence.isnan().any():
            raise ValueError(f"{item['name']}: the network puts out nan, there is nothing to score")
        yield item, prediction, confidence
    model.train(training)


def probabilities(model, images, scales=(1.0,), flip=False):
    """Softmax (1, K, H, W) of one image (1, 3, H, W), averaged over scales and flips."""
    size, total = images.shape[2:], 0
    for scale in scales:
        resized = [max(1, round(side * scale)) for side in size]
        scaled = F.interpolate(images, resized, mode="bilinear", antialias=True) if scale != 1 else images
        height, width = scaled.shape[2:]
        # The network takes no less than 32 x 32.
        scaled = F.pad(scaled, (0, max(0, 32 - width), 0, max(0, 32 - height)), mode="replicate")
        for mirrored in (False, True) if flip else (False,):
            p = model(scaled.flip(3) if mirrored else scaled)[1].softmax(1)
            p = (p.flip(3) if mirrored else p)[:, :, :height, :width]
            total = total + (F.interpolate(p, size, mode="bilinear") if scale != 1 else p)
    return total / (len(scales) * (2 if flip else 1))


def is_out_of_memory(error):
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def to_float(images, device):
    """uint8 images on the CPU -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


# ---- checkpoints -------------------------------------------------------------------------------------------


def load_model(path, which="night", device="cpu"):
    """(DeepLab in eval mode, description): M_n ("night") or M_d ("day") of a last.pt or best.pt, or the
    network of one of torchvision's `deeplabv3_*` files. The projection head is neither built nor loaded.
    Raises ValueError in one line."""
    if which not in ("night", "day"):
        raise ValueError(f"which: night or day, not {which!r}")
    state = models.read_state(path)
    if isinstance(state, dict) and "architecture" in state:
        model = rebuilt(path, checked(path, state))
        with damaged_checkpoint(path):
            mine = {k: v for k, v in state["model"].items() if k.startswith(f"{which}.")}
            model.load_state_dict({k.removeprefix(f"{which}."): v for k, v in mine.items()})
        models.check_finite(model, path)
        description = {name: state.get(name) for name in ("architecture", "args", "step")}
    else:
        model = models.DeepLab(**models.architecture_of(path))
        models.load_weights(model, path, strict=True)
        description = {"architecture": model.architecture}
    if (classes := model.architecture["num_classes"]) != len(datasets.NAMES):
        raise ValueError(f"{path}: predicts {classes} classes, scores need the 19 of Cityscapes")
    return model.to(device, memory_format=torch.channels_last).eval(), description


def checked(path, state):
    """The state, if it is one that train.py saved. Raises ValueError in one line."""
    if not isinstance(state, dict) or "architecture" not in state or "model" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state.get("format") not in (1, FORMAT):  # 1 lacks what --resume needs
        raise ValueError(f"{path}: checkpoint format {state.get('format')}, this code reads {FORMAT}")
    return state


def rebuilt(path, state):
    """The DeepLab that a checked state describes, not yet with its weights."""
    with damaged_checkpoint(path):
        kind = dict(state["architecture"])
        earlier = [kind.pop(name, None) for name in ("head", "input_format", "branches")]  # no longer written
        if earlier[0] == "deeplabv2" or earlier[1] == "caffe":
            raise ValueError("DeepLab v2 and Caffe's input format are no longer read")
        return models.DeepLab(**kind)


@contextlib.contextmanager
def damaged_checkpoint(path):
    """What goes wrong inside, where a checkpoint's content does not fit, becomes one line."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})") from None


# ---- files -------------------------------------------------------------------------------------------------


def write_prediction(folder, item, prediction):
    """FOLDER/{labelTrainIds,labelIds,color,overlay}/NAME.png, at the image's own size."""
    prediction = prediction.cpu()
    colours, image = TF.to_pil_image(datasets.colourise(prediction)), TF.to_pil_image(item["image"])
    written_by = PngImagePlugin.PngInfo()
    written_by.add_text("Software", MARK)
    ids = [TF.to_pil_image(pixels) for pixels in (prediction.to(torch.uint8), LABEL_IDS[prediction])]
    for kind, picture in zip(KINDS, [*ids, colours, Image.blend(image, colours, 0.5)], strict=True):
        path = Path(folder, kind, f"{item['name']}.png")
        with datasets.written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Level 1 takes a quarter of the default's time and a fifth more bytes.
            picture.save(path, compress_level=1, pnginfo=written_by)


def submission_entries(layout, name):
    """{entry of the zip: what it holds} for the image of this name."""
    if layout == "cityscapes":
        return {f"{name}.png": "labelIds"}
    kinds = ("labelTrainIds", "labelTrainIds_invalid", "confidence")
    return {f"{kind}/{name.removesuffix('_rgb_anon')}.png": kind for kind in kinds}


@contextlib.contextmanager
def submission(path, layout, samples):
    """A zip for a test server; yields add(item, prediction, confidence). Written aside, checked and named at
    the end, or removed.

    Dark Zurich: labelTrainIds/, labelTrainIds_invalid/ (the same) and confidence/ (16 bit, 65535 times the
    largest softmax) at its top, names beginning with SEQ_frame_NNNNNN. Cityscapes: labelIds, one PNG an
    image."""
    for sample in samples:
        if datasets.size_of(sample.image) != SIZES[layout]:
            wanted = f"the server wants {SIZES[layout]}, width and height"
            raise datasets.DataError(f"{sample.image}: {wanted}")
    wanted = [entry for s in samples for entry in submission_entries(layout, Path(s.image).stem)]
    if twice := [entry for entry, times in collections.Counter(wanted).items() if times > 1]:
        raise ValueError(f"{path}: two images would be {twice[0]} in it")

    def add(item, prediction, confidence):
        confidence = (confidence.cpu().double() * 65535).round().to(torch.uint16).view(torch.int16)
        pixels = {"confidence": confidence, "labelIds": LABEL_IDS[prediction.cpu()]}
        pixels["labelTrainIds"] = pixels["labelTrainIds_invalid"] = prediction.cpu().to(torch.uint8)
        for entry, kind in submission_entries(layout, item["name"]).items():
            TF.to_pil_image(pixels[kind]).save(file := io.BytesIO(), format="PNG")
            with datasets.written(path):
                packed.writestr(entry, file.getvalue())

    aside = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        packed = zipfile.ZipFile(aside, "w")
        packed.comment = MARK
        try:
            yield add
        finally:
            with datasets.written(path):
                packed.close()
        with zipfile.ZipFile(aside) as written:
            odd = sorted({*wanted} ^ {*written.namelist()})[:3]
            if written.testzip() or odd:
                raise ValueError(f"{path}: {odd} missing or too many")
        aside.replace(path)
        say(f"{path}: {len(wanted)} entries, checked")
    finally:
        aside.unlink(missing_ok=True)


# ---- the command -------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = command_parser(__doc__)
    add = parser.add_argument
    what = "last.pt or best.pt of train.py, or a state dict of torchvision's deeplabv3"
    add("--checkpoint", metavar="FILE", type=a_file, required=True, help=what)
    data = parser.add_mutually_exclusive_group(required=True)
    for layout in datasets.LAYOUTS:
        data.add_argument(f"--{layout}", metavar="DIR", type=a_path, help="predict and score its --split")
    how = "predict pictures and folders of pictures"
    data.add_argument("--images", nargs="+", metavar="PATH", type=a_path, help=how)
    how = "of the data set; if not given val, with --nighttime-driving or --submit test"
    add("--split", type=a_path, help=how)
    how = "which to read where a folder holds both kinds"
    add("--labels", choices=[*datasets.TABLES], default="labelTrainIds", help=how)
    add("--model", choices=("night", "day"), default="night", help="M_n or M_d")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--scales", type=number(0.1, 4), nargs="+", default=[1.0], help="average over resized images")
    add("--json", metavar="FILE", type=a_path, help="write scores, confusion matrix and descriptions")
    add("--out", metavar="DIR", type=a_path, help="write labelTrainIds/, labelIds/, color/ and overlay/")
    how = "write the zip for the test server of Dark Zurich or Cityscapes"
    add("--submit", metavar="FILE", type=a_path, help=how)
    add("--device", type=a_device, default=best_device(), help="cuda, mps or cpu; the default is the best")
    add("--workers", type=number(0, 64, int), default=1, help="decoding threads")
    args = parser.parse_args(argv)
    named = {layout: getattr(args, layout.replace("-", "_")) for layout in datasets.LAYOUTS}
    args.layout, args.root = next(((layout, root) for layout, root in named.items() if root), (None, None))
    if args.images and not args.out:
        parser.error("--images has nothing to score: give --out DIR for the predictions")
    if args.images and args.split:
        parser.error("--split is a data set's, not that of --images: leave one out")
    if args.submit and args.split not in (None, "test"):
        parser.error(f"--submit is for the test split, not --split {args.split}")
    if args.submit and args.layout not in SIZES:
        parser.error("--submit is for Dark Zurich's and Cityscapes' servers; elsewhere --out writes PNGs")
    return args


def run(args):
    """The command: what can be refused is refused before the first image goes through the network."""
    failed, skipped = None, []
    if args.images:
        (samples, skipped), failed = datasets.pictures(args.images), []
        say(f"{len(samples)} pictures")
        if skipped:
            say(f"skipped {len(skipped)}, not read here: {', '.join(map(str, skipped[:5]))}")
    else:
        split = args.split or ("test" if args.submit or args.layout == "nighttime-driving" else "val")
        samples = datasets.samples(args.layout, args.root, split, args.labels)
        say(f"{args.layout} {split}: {datasets.describe(samples, args.root)}")
        if not samples[0].label and not (args.out or args.submit):
            way_out = "give --out DIR or --submit FILE for the predictions"
            raise ValueError(f"{args.layout} {args.root}: no labels to score against; {way_out}")
    check_outputs(args, samples)
    model, description = load_model(args.checkpoint, args.model, args.device)
    if not args.images:
        datasets.check_sizes([[path for path in sample if path] for sample in samples], say=say)
        if samples[0].label and (warning := datasets.label_warning(samples)):
            say(warning)
    began, reported, done = time.monotonic(), time.monotonic(), []
    with submission(args.submit, args.layout, samples) if args.submit else contextlib.nullcontext() as pack:

        def each(item, prediction, confidence):
            nonlocal reported
            if args.out:
                write_prediction(args.out, item, prediction)
            if pack:
                pack(item, prediction, confidence)
            done.append(item["name"])
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                say(f"{len(done)} of {len(samples)}  {time_left(began, len(done), len(samples))}")

        views = {"scales": args.scales, "flip": args.flip}
        result = evaluate(model, samples, args.device, args.workers, each, failed, **views)
    if result:
        say(table(result))
    if args.json:
        result |= {"images": len(done), "args": vars(args), "checkpoint": description}
        text = json.dumps(result, indent=1)
        datasets.write_whole(args.json, lambda file: file.write(text.encode()))
    if args.out:
        say(f"{args.out}: {', '.join(KINDS)} of {len(done)} images")
    for error in failed or ():
        say(f"evaluate.py: error: {' '.join(str(error).split())}", sys.stderr)
    return 2 if failed else 0


def check_outputs(args, samples):
    """Raise ValueError where an output would be written twice, over a file that is read, or not at all."""

    def identity(path):  # the same for links to one file
        with contextlib.suppress(OSError):
            return os.stat(path).st_dev, os.stat(path).st_ino
        return os.path.normcase(os.path.realpath(path))

    outputs = [path for path in (args.json, args.submit) if path]
    if args.out:
        top = datasets.LAYOUTS[args.layout][0].split("/")[0] if args.layout else None
        images = [folder for folder in Path(samples[0].image).parents if folder.name == top]
        if images and Path(args.out).resolve().is_relative_to(images[0].resolve()):
            what = f"predictions there would become images of {args.root}"
            raise ValueError(f"{args.out}: {what}; choose another --out")
        check_writable(args.out, make=True)
        outputs += [Path(args.out, kind, f"{Path(s.image).stem}.png") for s in samples for kind in KINDS]
    for folder in {Path(path).absolute().parent for path in (args.json, args.submit) if path}:
        check_writable(folder)
    read = {identity(path) for sample in [(args.checkpoint,), *samples] for path in sample if path}
    seen = {identity(Path(args.out, kind)) for kind in KINDS} if args.out else set()
    for path in outputs:
        me = identity(path)
        folder = str(path).endswith("/") or (os.path.exists(path) and not os.path.isfile(path))
        if me in read or folder:
            what = "no regular file, or one that this command reads"
            raise ValueError(f"{path}: {what}; choose another output")
        if os.path.exists(path) and not is_result(path, args):
            raise ValueError(f"{path}: exists and is no result of this command; choose another output")
        if me in seen:
            raise ValueError(f"{path}: two outputs would be written there; rename an input or an output")
        seen.add(me)


def is_result(path, args):
    """Could an existing file be this command's own result, from before?"""
    with open(path, "rb") as file:
        content = file.read(None if path == args.json else 200)
        if path == args.submit:
            file.seek(max(0, os.path.getsize(path) - len(MARK)))
            content = file.read()
    ours = (
        b'"checkpoint": {' in content and b'"images": ' in content if path == args.json else MARK in content
    )
    return ours or not content


def check_writable(folder, make=False):
    """Raise ValueError if nothing can be written into a folder; `make` it first."""
    try:
        if make:
            Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror})") from None


# ---- what both commands share ------------------------------------------------------------------------------


def say(text, file=None):
    """Print, whatever becomes of the terminal: output never ends a run."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except (OSError, ValueError):  # a closed pipe or terminal: from now on nobody reads
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def time_left(began, done, total):
    left = int((total - done) * (time.monotonic() - began) / max(1, done))
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def ranks():
    """(rank, number of processes) that train together: (0, 1) unless torchrun started them."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def best_device():
    return next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")


def a_path(text):
    """argparse type: a path, ~ resolved."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: an unset variable?")
    return os.path.expanduser(text)


def a_file(text):
    if not os.path.isfile(a_path(text)):
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return a_path(text)


def a_device(text):
    if text != "cpu":
        try:
            torch.zeros(1, device=text if text.partition(":")[0] in ("cuda", "mps") else "none")
        except (RuntimeError, AssertionError):
            what = "cuda, mps or cpu, as far as torch has it here"
            raise argparse.ArgumentTypeError(f"{text}: {what}") from None
    return text


def number(least, most, kind=float):
    """argparse type: a number from least to most."""

    def number(text):
        value = kind(text)  # argparse words a ValueError
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    return number


class Help(argparse.RawDescriptionHelpFormatter):
    """The manual as it is written, and behind each option its default."""

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and "not given" not in action.help
        return action.help + (" (default: %(default)s)" if shown else "")


def command_parser(manual, **options):
    """A parser whose help is the module's docstring and whose errors are one line."""
    summary, examples = manual.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=examples, formatter_class=Help, **options)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    return parser


def status_of(program, run):
    """The exit status of run(). What a user can mend is named in one line, with status 2."""
    for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):
        # An exit cleans up, dying of a signal does not.
        if number and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return run() or 0
    except KeyboardInterrupt:
        say(f"{program}: interrupted; what was saved is whole", sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        known, text = isinstance(error, ValueError | OSError) or is_out_of_memory(error), str(error)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            known, text = True, f"torch.compile failed, leave --compile out: {text[:300]}"
        if not (known or type(error).__name__.startswith("Dist") or ranks()[1] > 1):  # another process's end
            raise
        say(f"{program}: error: {' '.join(text.split()) or type(error).__name__}", sys.stderr)
        return 2


def main(argv=None):
    return status_of("evaluate.py", lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
