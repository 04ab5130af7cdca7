"""Score a checkpoint of train.py, or write its predictions.

    python evaluate.py --checkpoint runs/last.pt --darkzurich DIR            night validation, per class
    python evaluate.py --checkpoint runs/last.pt --cityscapes DIR            day validation
    python evaluate.py --checkpoint runs/last.pt --darkzurich DIR --json scores.json --out predictions

Scores come from one integer confusion matrix over all images, each at its own size. IoU, mIoU and pixel accuracy
are percentages; `miou` leaves out classes with neither label nor prediction, as cityscapesScripts does, and
`miou_present` also those without label. A class that does not occur has no IoU: n/a, not 0.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF

import datasets
import models

FORMAT = 1  # of the checkpoints


def best_device():
    for name in ("cuda", "mps"):
        if getattr(torch, name).is_available():
            return name
    return "cpu"


def device_problem(device):
    """Why torch cannot use a device, as one line, or None."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {device}: {str(error).splitlines()[0]}; cpu always works"
    return None


def to_float(images, device):
    """uint8 images on the CPU -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


def read_checkpoint(path):
    """The dict that train.py saved. Raises ValueError in one line for anything else."""
    state = models.read_state(path)
    if not isinstance(state, dict) or "architecture" not in state or "model" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {state.get('format')}, this code reads {FORMAT}")
    return state


def load_model(path, which="night", device="cpu"):
    """(DeepLab in eval mode, checkpoint dict): M_n ("night") or M_d ("day") of a last.pt or best.pt.

    The projection head is neither built nor loaded. Raises ValueError in one line."""
    state = read_checkpoint(path)
    try:
        model = models.DeepLab(**state["architecture"])
        prefix = f"{which}."
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        )
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})") from None
    return model.to(device).eval(), state


@torch.no_grad()
def predictions(model, samples, device, workers=0):
    """Yield (item of datasets.Labelled, (H, W) int64 prediction on the device), one image at a time, eval mode."""
    training = model.training
    model.eval()
    loader = torch.utils.data.DataLoader(
        datasets.Labelled(samples), batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    for item in loader:
        yield item, model(to_float(item["image"][None], device))[1][0].argmax(0)
    model.train(training)


def confusion(label, prediction, num_classes):
    """(K, K) int64 pixel counts, rows are labels, columns predictions; label 255 is left out."""
    label = label.to(prediction.device).long()
    valid = label != datasets.IGNORE
    index = label[valid] * num_classes + prediction[valid]
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


def evaluate(model, samples, device, workers=0, each=None):
    """Scores of a model on (image, label) paths; each(item, prediction) is called for every image."""
    matrix = torch.zeros(len(datasets.NAMES), len(datasets.NAMES), dtype=torch.int64, device=device)
    for item, prediction in predictions(model, samples, device, workers):
        matrix += confusion(item["label"], prediction, len(matrix))
        if each:
            each(item, prediction)
    return scores(matrix)


def percent(value):
    return "  n/a" if value is None else f"{value:5.1f}"


def summary(result):
    return "  ".join(
        f"{name} {percent(result[name]).strip()}" for name in ("miou", "miou_present", "pixel_accuracy")
    )


def table(result):
    """The scores as aligned text."""
    rows = [f"{name:14} {percent(value)}" for name, value in result["iou"].items()]
    rows += [f"{name:14} {percent(result[name])}" for name in ("miou", "miou_present", "pixel_accuracy")]
    return "\n".join(rows)


def write_prediction(folder, name, prediction):
    """labelTrainIds/NAME.png (8-bit trainIds) and color/NAME.png (RGB) under `folder`."""
    prediction = prediction.to("cpu", torch.uint8)
    for kind, pixels in (("labelTrainIds", prediction), ("color", datasets.colourise(prediction))):
        path = Path(folder, kind, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(pixels).save(path)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with every default, and the module's docstring as it stands."""


def parse_args(argv):
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=examples, formatter_class=Help)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", required=True, help="last.pt or best.pt of train.py")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--darkzurich", metavar="DIR", help="score on its labelled nights")
    data.add_argument("--cityscapes", metavar="DIR", help="score on its labelled days")
    add("--split", default="val", help="split to score")
    add("--model", choices=("night", "day"), default="night", help="M_n or M_d")
    add("--json", metavar="FILE", help="write the scores, the confusion matrix and the run's arguments")
    add("--out", metavar="DIR", help="write DIR/labelTrainIds/NAME.png and DIR/color/NAME.png")
    add(
        "--device",
        default=best_device(),
        help="cuda, mps or cpu; the default is the best there is",
    )
    add("--workers", type=int, default=1, help="decoding processes")
    args = parser.parse_args(argv)
    if problem := device_problem(args.device):
        parser.error(problem)
    return args


def run(args):
    if args.darkzurich:
        samples = datasets.darkzurich(args.darkzurich, args.split)
    else:
        samples = datasets.cityscapes(args.cityscapes, args.split)
    model, checkpoint = load_model(args.checkpoint, args.model, args.device)
    print(
        f"{len(samples)} labelled images of {args.darkzurich or args.cityscapes}, split {args.split}",
        flush=True,
    )

    def write(item, prediction):
        if args.out:
            write_prediction(args.out, item["name"], prediction)

    result = evaluate(model, samples, args.device, args.workers, write)
    result |= {"images": len(samples), "args": vars(args), "checkpoint": checkpoint["args"]}
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return result


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {datasets.one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
