"""Train a night segmenter from labelled days and unlabelled nights.

    python train.py --demo                                           no data needed, minutes on a laptop
    python train.py --cityscapes DIR --darkzurich DIR                the method
    python train.py --cityscapes DIR --darkzurich DIR --day-only     the baseline: labelled days alone
    python train.py --cityscapes DIR --darkzurich DIR --resume       go on from OUT/last.pt
    torchrun --nproc_per_node=N train.py ...                         on N devices
    python train.py --benchmark                                      what a step costs, part by part

Writes OUT/last.pt (everything, to resume from), OUT/best.pt (what inference needs; chosen on labelled nights,
so report last.pt), OUT/log.csv, OUT/args.json and OUT/samples.png (night image | prediction | label).
"""

import argparse
import collections
import contextlib
import csv
import io
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import ImageDraw
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

import ccdistill
import datasets
import evaluate
import losses
import models

TERMS = ("seg_day", "seg_night", "pseudo", "content", "style", "total")
DOMAINS = ("source_day", "target_day", "target_night")
COLUMNS = ("step", "lr", *TERMS, "miou", "miou_present", "skipped")
LR = {"adamw": 5e-4, "sgd": 2.5e-4}
DEMO = {"out": "runs/demo", "steps": 250, "batch_size": 4, "crop": (96, 192)}
DEMO |= {"eval_every": 250, "save_every": 50}
# What a resumed run may change: it is the same run still; data may have moved.
FREE = {"steps", "out", "device", "workers", "resume", "eval_every", "save_every", "log_every", "demo"}
FREE |= {"skip_broken", "cityscapes", "darkzurich", "acdc", "synthetic_night", "cache", "low_memory"}
FREE |= {"compile", "benchmark", "json"}


def parse_args(argv):
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=examples,
        usage="%(prog)s --cityscapes DIR (--darkzurich DIR | --acdc DIR | --day-only) [options], or --demo",
        formatter_class=evaluate.Help,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")

    number, whole, flag = {"type": float}, {"type": int}, {"action": "store_true"}
    add = parser.add_argument_group("data").add_argument
    add("--cityscapes", metavar="DIR", help="labelled days: holds leftImg8bit/ and gtFine/ (labelIds)")
    add("--darkzurich", metavar="DIR", help="unlabelled days and nights: holds rgb_anon/, corresp/, gt/val/")
    add("--acdc", metavar="DIR", help="ACDC night instead: rgb_anon/night/{train,train_ref}, gt/night/val/")
    add("--demo", **flag, help="draw a small city, compare; 250 steps, batch 4, crop 96 192, runs/demo")
    add("--pairs", metavar="FILE", default="corresp", help="csv of NIGHT,DAY lines; none: unrelated images")
    kinds = tuple(datasets.TABLES)
    add("--labels", choices=kinds, default="labelTrainIds", help="read if both kinds are there")
    add("--synthetic-night", metavar="DIR", help="ready-made nights (leftImg8bit's tree), no --night-style")
    add("--crop", **whole, nargs=2, metavar=("H", "W"), default=(512, 512), help="training crop")
    add("--scale", **number, nargs=2, metavar=("MIN", "MAX"), default=(0.5, 1.0), help="resizing before it")
    add("--cache", metavar="DIR", help="keep decoded images there (Cityscapes and Dark Zurich: 59 GB)")
    add("--workers", **whole, default=2, help="decoding processes")
    add("--skip-broken", **whole, default=0, help="times that a file that cannot be decoded is left out")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", choices=models.BACKBONES, default="resnet18", help="torchvision's ResNet")
    add("--output-stride", **whole, choices=(8, 16), default=16, help="image size over feature size")
    head = "DeepLab v3's, or v2's (a sum of dilated classifiers)"
    add("--head", choices=models.HEADS, default="aspp", help=head)
    add("--weights", default="none", help="none, imagenet (IMAGENET1K_V1, downloaded) or a state dict's file")
    formats, what = tuple(models.INPUT_FORMATS), "what --weights expect: RGB as torchvision, or BGR as Caffe"
    add("--input-format", choices=formats, default="imagenet", help=what)
    share = "what M_n (night) shares with M_d (day): all, all but norms, nothing"
    add("--night-weights", choices=ccdistill.NIGHT_WEIGHTS, default="norm", help=share)
    share = "batch statistics of source and target together (the figure's), or each its own (ours)"
    add("--batch-norm", choices=ccdistill.BATCH_NORMS, default="domain", help=share)

    add = parser.add_argument_group("method").add_argument
    add("--day-only", **flag, help="the baseline: labelled source days alone")
    how = "how synthetic nights are made of source days (ours)"
    add("--night-style", choices=ccdistill.NIGHT_STYLES, default="random", help=how)
    how = "fda: half-width of the exchanged band, 0.01 if not given; the others: 0 to 1, 1"
    add("--night-strength", **number, help=how)
    add("--content-weight", **number, default=1.0, help="of content distillation (CDC); 0: not computed")
    add("--style-weight", **number, default=1.0, help="of style distillation (CDS); 0: not computed")
    add("--js-weight", **number, default=0.1, help="of the divergences in CDC; 0: not computed")
    add("--pseudo-weight", **number, default=0.25, help="of the pseudo-labels' loss; 0: not computed")
    add("--pseudo-threshold", **number, default=0.6, help="softmax that makes a pseudo-label")
    add("--warmup", **number, default=0.75, help="share of --steps before the targets join (ours)")
    add("--no-projection", **flag, help="embeddings are average-pooled features")
    add("--embedding-dim", **whole, default=128, help="channels of the embeddings")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", **whole, default=50000, help="length of the run; --lr and --warmup go by it")
    add("--batch-size", **whole, default=2, help="images per domain (and process)")
    add("--optimizer", choices=tuple(LR), default="adamw", help="sgd: momentum 0.9")
    add("--lr", **number, help="learning rate; if not given 5e-4, with sgd 2.5e-4")
    add("--weight-decay", **number, default=5e-4, help="of every parameter")
    add("--power", **number, default=0.9, help="of the polynomial decay of the learning rate; 0: constant")
    add("--amp", choices=("off", "bf16"), default="off", help="autocast of the networks")
    add("--low-memory", **flag, help="compute activations again instead of keeping them")
    add("--compile", **flag, help="torch.compile the networks")
    add("--seed", **whole, default=0, help="of weights, samples, crops, dropout")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", default="runs/ccdistill", help="where everything is written")
    how = "go on from a last.pt; without FILE that of --out"
    add("--resume", nargs="?", const=True, metavar="FILE", help=how)
    add("--device", default=evaluate.best_device(), help="cuda, mps or cpu; the default is the best there is")
    add("--eval-every", **whole, default=500, help="steps between validations")
    add("--save-every", **whole, default=500, help="steps between checkpoints")
    add("--log-every", **whole, default=20, help="steps between progress lines")
    how = "time N steps (20); without data, of the demo"
    add("--benchmark", **whole, nargs="?", const=20, metavar="N", help=how)
    add("--json", metavar="FILE", help="write the benchmark's numbers")

    args = parser.parse_args(argv)
    if args.demo or (args.benchmark and not args.cityscapes):  # own defaults, overridden by what was given
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    args.crop, args.scale = tuple(args.crop), tuple(args.scale)
    args.processes = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun's
    if args.processes > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    args.lr = LR[args.optimizer] if args.lr is None else args.lr
    if problem := contradiction(args):
        parser.error(problem)
    return args


def contradiction(args):
    """What is wrong with the arguments, as one line, or None."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"--{name.replace('_', '-')} must be a finite number, got {value}"
    if os.path.isfile(args.out):
        return f"--out {args.out} is a file"
    if args.day_only and args.synthetic_night:
        return "--day-only sees no night: leave --synthetic-night out"
    positive = ("steps", "batch_size", "embedding_dim", "eval_every", "save_every", "log_every", "lr")
    for name in (*positive, "benchmark"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            return f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}"
    weights = ("content_weight", "style_weight", "js_weight", "pseudo_weight", "weight_decay")
    for name in ("workers", "skip_broken", "power", *weights):
        if (getattr(args, name) or 0) < 0:
            return f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}"
    if min(args.crop) < 32:
        return f"--crop must be at least 32 x 32, got {args.crop[0]} {args.crop[1]}"
    if not 0 < args.scale[0] <= args.scale[1] < math.inf:
        return f"--scale wants 0 < MIN <= MAX, got {args.scale[0]} {args.scale[1]}"
    if abs(args.seed) >= 2**63:
        return f"--seed wants 63 bits, got {args.seed}"
    for name in ("pseudo_threshold", "warmup", "night_strength"):
        if not 0 <= (getattr(args, name) or 0) <= 1:
            return f"--{name.replace('_', '-')} wants 0 to 1, got {getattr(args, name)}"
    if args.demo and (args.cityscapes or args.darkzurich or args.acdc or args.day_only):
        return "--demo draws its own data and trains day-only and the method on it: give it no other data"
    if (args.demo or args.benchmark) and (args.processes > 1 or args.resume):
        return "--demo and --benchmark start anew, in one process: no torchrun, no --resume"
    if args.demo and args.benchmark:
        return "--demo or --benchmark: one at a time (--benchmark without data times the demo city)"
    if args.benchmark and args.day_only:
        return "--benchmark compares the method with plain training: leave --day-only out"
    if args.json and not args.benchmark:
        return f"--json {args.json}: for --benchmark"
    if args.json and (not Path(args.json).absolute().parent.is_dir() or Path(args.json).is_dir()):
        return f"--json {args.json}: not a file in a folder that exists"
    if args.cache and Path(args.cache).is_file():
        return f"--cache {args.cache} is a file"
    if args.low_memory and args.compile:
        return "--compile cannot follow --low-memory: leave one out"
    if args.processes > 1 and args.device.startswith("mps"):
        return "--device mps: for one process; --device cpu for several"
    alone = args.demo or (args.benchmark and not (args.cityscapes or args.darkzurich or args.acdc))
    if not alone and not args.cityscapes:
        return "--cityscapes DIR is needed (or --demo)"
    if not alone and not args.day_only and not (args.darkzurich or args.acdc):
        return "--darkzurich DIR or --acdc DIR is needed (or --day-only, or --demo)"
    if args.darkzurich and args.acdc:
        return "--darkzurich and --acdc: one target at a time"
    if args.acdc and args.pairs not in ("corresp", "none"):
        return "--acdc pairs by name: --pairs corresp or none"
    if args.weights == "imagenet" and args.input_format == "caffe":
        return "--weights imagenet are RGB: --input-format imagenet"
    return evaluate.device_problem(args.device)


def load_data(args):
    """(training stream, labelled validation nights) as the arguments say. Raises DataError."""
    source = datasets.samples("cityscapes", args.cityscapes, "train", args.labels)
    if not source[0].label:
        raise datasets.DataError(f"{args.cityscapes}/gtFine/train: no such folder")
    layout, root = ("acdc", args.acdc) if args.acdc else ("darkzurich", args.darkzurich)
    days, nights, synthetic, validation = [], [], None, []
    print(f"source: {datasets.describe(source, args.cityscapes)}", flush=True)
    if not args.day_only:
        days, nights = datasets.targets(layout, root, args.pairs)
        how = "unpaired" if args.pairs == "none" else f"in pairs ({args.pairs})"
        print(f"target: {len(days)} days and {len(nights)} nights, {how}, in {root}", flush=True)
        if args.synthetic_night:
            synthetic = datasets.synthetic_nights(args.synthetic_night, source)
            print(f"synthetic nights: {len(synthetic)} in {args.synthetic_night}", flush=True)
    if root and not Path(root).is_dir():
        raise datasets.DataError(f"{root}: no such folder")
    if root and Path(root, datasets.LAYOUTS[layout][2].format("val")).is_dir():
        validation = datasets.samples(layout, root, "val", args.labels)
        print(f"validation: {datasets.describe(validation, root)}", flush=True)
    else:
        print("validation: none, the target has no labelled nights (gt/, val); no best.pt", flush=True)
    for image in [sample.image for sample in source] + days + nights:
        width, height = datasets.size_of(image)
        if height < args.crop[0] or width < args.crop[1]:
            crop = f"--crop {args.crop[0]} {args.crop[1]}"
            raise datasets.DataError(
                f"{image}: {width} x {height} (width x height) is smaller than {crop}; give a smaller one"
            )
    stream = datasets.FourDomains(
        source, days, nights, args.crop, args.pairs != "none", synthetic, args.scale, args.seed,
        length=args.steps * args.batch_size * args.processes,
        cache=datasets.Cache(args.cache, args.scale[1]) if args.cache else None,
    )  # fmt: skip
    return stream, validation


def batches(stream, start, args):
    """The stream from step `start` on, as dicts of device tensors: images float in [0, 1], labels int64. Of
    each step's samples every process takes its share."""
    size, (rank, processes) = args.batch_size, evaluate.ranks()
    firsts = range((start * processes + rank) * size, len(stream), processes * size)
    loader = torch.utils.data.DataLoader(
        stream,
        batch_sampler=[range(first, first + size) for first in firsts],
        num_workers=args.workers,
        worker_init_fn=evaluate.quiet_worker,
        pin_memory=args.device.startswith("cuda"),
        generator=torch.Generator(),  # of its own: a loader's start must not advance the global one
    )
    try:
        for batch in loader:
            label = batch.pop("source_label").to(args.device, non_blocking=True).long()
            broken = batch.pop("broken")
            images = {name: evaluate.to_float(image, args.device) for name, image in batch.items()}
            yield images | {"source_label": label, "broken": broken}
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise datasets.DataError(
            f"a loader worker died: {datasets.one_line(error)}"
        ) from None  # out of memory?


def save(state, path):
    """Write a checkpoint so that `path` always holds a whole one: aside, flushed, renamed. By one process."""
    if evaluate.ranks()[0]:
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        datasets.write_whole(path, f"{path}.tmp", buffer.getbuffer())
    except OSError as error:
        raise OSError(f"{path}: not saved ({error.strerror}); what it held before is still whole") from None


def validate(method, validation, args):
    """Score M_n on the labelled nights and draw the first four into OUT/samples.png."""
    tiles, (rank, processes) = [], evaluate.ranks()
    if processes > 1:  # all score the same network: the first one's statistics, which are saved
        for buffer in method.buffers():
            distributed.broadcast(buffer, 0)

    def draw(item, prediction, _):
        if len(tiles) < 12:
            tiles.extend([item["image"], datasets.colourise(prediction), datasets.colourise(item["label"])])

    result = evaluate.evaluate(method.night, validation, args.device, args.workers, draw)
    if rank == 0:
        picture(tiles, 3, Path(args.out, "samples.png"))
    return result


def picture(tiles, columns, path, titles=()):
    """Write (3, H, W) uint8 tiles as a grid, all in the first one's shape, at most 480 wide."""
    width = min(480, tiles[0].shape[2])
    size = [round(tiles[0].shape[1] * width / tiles[0].shape[2]), width]
    tiles = [TF.resize(tile, size, TF.InterpolationMode.NEAREST) for tile in tiles]
    image = TF.to_pil_image(TF.pad(make_grid(tiles, columns), [0, 14 if titles else 0, 0, 0]))
    for column, title in enumerate(titles):
        ImageDraw.Draw(image).text((6 + column * (width + 2), 2), title, fill="white")
    image.save(path)


def build(args, state=None):
    """The method on its device, with an optimizer over everything that learns; `state`: the checkpoint that is
    going to be restored, so that no initial weights are read again."""
    if state:
        model = evaluate.rebuilt(state, state["path"])
    else:
        classes, formats = len(datasets.NAMES), args.input_format
        model = models.DeepLab(args.backbone, classes, args.output_stride, args.head, args.weights, formats)
    model.low_memory = args.low_memory
    method = ccdistill.CCDistill(
        model, night_weights="shared" if args.day_only else args.night_weights,
        batch_norm=args.batch_norm, night_style=args.night_style, night_strength=args.night_strength,
        projection=not args.no_projection and not args.day_only and args.content_weight > 0,
        embedding_dim=args.embedding_dim, content_weight=args.content_weight, style_weight=args.style_weight,
        js_weight=args.js_weight, pseudo_weight=args.pseudo_weight, pseudo_threshold=args.pseudo_threshold,
        target_paired=args.pairs != "none",
    ).to(args.device, memory_format=torch.channels_last)  # fmt: skip
    if args.processes > 1 and args.device.startswith("cuda"):
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    if args.compile:
        method.day.compile()
        method.night.compile()
    if args.optimizer == "sgd":  # not fused: that fails where some parameters have moments and others not yet
        return method, torch.optim.SGD(method.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    return method, torch.optim.AdamW(method.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)


def inference_state(args, step, method):
    """What evaluate.py needs of a run: M_d and M_n, how to build them, and where they come from."""
    return {
        "format": evaluate.FORMAT,
        "architecture": method.day.architecture,
        "args": json.loads(json.dumps(vars(args))),
        "step": step,
        "model": {k: v for k, v in method.state_dict().items() if not k.startswith("projection.")},
    }


def full_state(args, step, method, optimizer, best, skipped):
    """All that the rest of a run depends on: what is random in a step depends on seed and step alone."""
    return inference_state(args, step, method) | {
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "skipped": skipped,
    }


def resumable(args):
    """The content of the last.pt that --resume names, if it is of this very run. Raises ValueError."""
    path = Path(args.out, "last.pt") if args.resume is True else Path(args.resume)
    if not path.is_file():
        raise ValueError(f"{path}: no such file to resume from; leave --resume out to begin")
    state = evaluate.checked(models.read_state(path), path)
    if "optimizer" not in state:
        raise ValueError(f"{path}: holds what inference needs only; resume from a last.pt")
    if (type(state.get("args")), type(state.get("step"))) != (dict, int):
        raise ValueError(f"{path}: damaged checkpoint (without args or step)")
    if Path(args.out, "last.pt").exists() and not path.samefile(Path(args.out, "last.pt")):
        raise ValueError(f"{args.out}: holds another run; choose another --out to go on from {path}")
    then, now = state["args"], json.loads(json.dumps(vars(args)))
    bound = set(now) - FREE | ({"cache"} if args.scale[1] < 1 else set())  # then the cache resizes
    differ = [name for name in now if name in bound and now[name] != then.get(name)]
    if differ:
        changes = (f"--{name.replace('_', '-')} {then.get(name)} there, {now[name]} here" for name in differ)
        raise ValueError(f"{path}: another run: {'; '.join(changes)}; give its arguments, or another --out")
    if args.steps < state["step"]:
        raise ValueError(f"{path}: is at step {state['step']} already, --steps is {args.steps}")
    return state | {"path": path}


def restore(state, method, optimizer):
    """Put a last.pt's content back into its places; returns its (step, best score, files skipped)."""
    try:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["best"], state["skipped"]
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise evaluate.damaged(state["path"], error) from None


def open_log(path, step):
    """OUT/log.csv for appending, its rows after `step` dropped. One process writes it."""
    if evaluate.ranks()[0]:
        return open(os.devnull, "w")
    rows = []
    if step and path.exists():
        with open(path, newline="", errors="replace") as file:
            found = list(csv.DictReader(file))
        rows = [row for row in found if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
    aside = Path(f"{path}.tmp")
    with open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)
    return open(path, "a", newline="", buffering=1)


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM put their number into the list that this yields; a second one interrupts at once."""
    stop = []

    def note(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        print("finishing this step, then saving (again: stop at once)", flush=True)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def report(args, step, rate, values):
    """The progress line."""
    left = int((args.steps - step) / rate)
    terms = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    left = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    print(f"step {step}/{args.steps}  {rate:.2f}/s  {left} left  {terms}", flush=True)


def train(args):
    """One run, to OUT/last.pt at step --steps."""
    out = Path(args.out)
    if (out / "last.pt").exists() and not args.resume:
        raise ValueError(f"{out / 'last.pt'}: exists; go on with --resume or choose another --out")
    state = resumable(args) if args.resume else None
    torch.manual_seed(args.seed)
    stream, validation = load_data(args)
    method, optimizer = build(args, state)
    start, best, skipped = restore(state, method, optimizer) if state else (0, -1.0, 0)
    best = best if (out / "best.pt").exists() else -1.0  # the score of a file that lies elsewhere
    rank, processes = evaluate.ranks()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    if start == args.steps:
        print(f"{out / 'last.pt'}: at step {start} of {args.steps} already, for evaluate.py", flush=True)
    method.train()
    parallel = method
    if processes > 1:
        rests = args.warmup > 0 and method.projection is not None  # in the warm-up, the projection head
        parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=rests)
    done, began = start, time.monotonic()
    with stop_signals() as stop, open_log(out / "log.csv", start) as log:
        writer = csv.DictWriter(log, COLUMNS)
        try:
            for step, batch in enumerate(held(batches(stream, start, args)), start + 1):
                failed = batch if isinstance(batch, datasets.DataError) else None
                broken = (
                    [] if failed else [line for lines in batch.pop("broken") for line in lines.splitlines()]
                )
                left_out, leave, lost = evaluate.summed([len(broken), bool(stop), bool(failed)], args.device)
                if lost:
                    raise failed or datasets.DataError("another process could not read its data")
                skipped = skip(broken, skipped, left_out, args)
                values = learn(method, parallel, optimizer, batch, step, args)
                lr = optimizer.param_groups[0]["lr"]
                row = {"step": step, "lr": lr, "skipped": skipped} | values
                if step % args.log_every == 0 or step == args.steps:
                    report(args, step, (step - start) / (time.monotonic() - began), values)
                try:
                    if validation and (step % args.eval_every == 0 or step == args.steps):
                        result = validate(method, validation, args)
                        row |= {name: result[name] for name in ("miou", "miou_present")}
                        print(f"step {step}  at night: {evaluate.summary(result)}", flush=True)
                        if (result["miou_present"] or 0.0) > best:
                            best = result["miou_present"] or 0.0
                            save(inference_state(args, step, method), out / "best.pt")
                finally:
                    writer.writerow(row)
                    done = step
                leave = leave or (processes == 1 and stop)  # several leave together, at their next step
                if leave or step % args.save_every == 0 or step == args.steps:
                    save(full_state(args, step, method, optimizer, best, skipped), out / "last.pt")
                if leave:
                    print(f"stopped at step {step}; the same command with --resume goes on", flush=True)
                    sys.exit(128 + (stop or [signal.SIGTERM])[0])
        except datasets.DataError:
            if done > start:
                save(full_state(args, done, method, optimizer, best, skipped), out / "last.pt")
                print(f"saved step {done} in {out / 'last.pt'}; --resume goes on from it", flush=True)
            raise


def learn(method, parallel, optimizer, batch, step, args):
    """One step on one batch; `parallel` is the method as torch's DistributedDataParallel wraps it, or itself.
    Returns the terms as numbers, means over processes. Raises ValueError where something is not finite."""
    rank, processes = evaluate.ranks()
    # Dropout and styles. The rest of a step's randomness is its samples', see datasets.FourDomains.
    torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))
    for group in optimizer.param_groups:
        group["lr"] = args.lr * (1 - (step - 1) / args.steps) ** args.power
    warm = step <= args.warmup * args.steps
    method.stage = "day" if args.day_only else "source" if warm else "target"
    with autocast(args):
        terms = parallel(batch)
    numbers = evaluate.summed(torch.stack(list(terms.values())).tolist(), args.device)
    values = {name: number / processes for name, number in zip(terms, numbers, strict=True)}
    check_finite(values, step, batch, method, Path(args.out))
    optimizer.zero_grad()
    terms["total"].backward()
    norm = nn.utils.clip_grad_norm_(method.parameters(), math.inf)  # measured, not clipped
    check_finite({"the gradient": norm.item()}, step, batch, method, Path(args.out))
    optimizer.step()
    return values


def held(feed):
    """The feed; a DataError becomes its last item, so that other processes can be told first."""
    try:
        yield from feed
    except datasets.DataError as error:
        yield error


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == "bf16")


def skip(broken, skipped, left_out, args):
    """How many files are left out by now, this step's told (broken: by this process, left_out: by all); more
    than --skip-broken raises DataError."""
    for number, line in enumerate(broken, skipped + 1):
        if number > args.skip_broken:
            raise datasets.DataError(f"{line}; --skip-broken {number} would leave it out")
        where = sys.stderr if evaluate.ranks()[0] else sys.stdout
        print(f"left out ({number} of {args.skip_broken}): {line}", file=where, flush=True)
    if skipped + left_out > args.skip_broken and left_out > len(broken):
        raise datasets.DataError(f"another process left out more than --skip-broken {args.skip_broken}")
    return int(skipped + left_out)


def check_finite(values, step, batch, method, out):
    """Raise ValueError, naming the first term that is inf or nan, and keep what is needed to look at it."""
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad:
        path = out / "nonfinite.pt"
        save({"step": step, "losses": values, "batch": batch, "model": method.state_dict()}, path)
        raise ValueError(
            f"step {step}: {bad} is {values[bad]}; batch and weights are in {path}; a lower --lr may help"
        )


def demo(args):
    """Draw the demo city, train day-only and CCDistill on it for the same number of steps, compare them at
    night."""
    out, results = Path(args.out), {}
    city = out / "city"
    if not any(city.glob("darkzurich/corresp/train/night/*/*.csv")):  # the last thing to be written
        print(f"drawing a city into {city}", flush=True)
        datasets.make_demo_city(city)
    args.demo, args.cityscapes, args.darkzurich = False, str(city / "cityscapes"), str(city / "darkzurich")
    for name in ("day-only", "ccdistill"):
        run = argparse.Namespace(**vars(args) | {"out": str(out / name), "day_only": name == "day-only"})
        run.resume = (out / name / "last.pt").exists() or None  # an interrupted demo goes on
        print(f"\n{name}: {args.steps} steps", flush=True)
        train(run)
    validation = datasets.samples("darkzurich", args.darkzurich)
    rows = {}

    def draw(item, prediction, _):
        row = rows.setdefault(item["name"], [item["image"], datasets.colourise(item["label"])])
        row.insert(-1, datasets.colourise(prediction))

    for name in ("day-only", "ccdistill"):
        model, _ = evaluate.load_model(out / name / "last.pt", device=args.device)
        results[name] = evaluate.evaluate(model, validation, args.device, each=draw)
    scored = [f"{name}: {result['miou']:.1f} mIoU" for name, result in results.items()]
    tiles = [tile for row in list(rows.values())[:4] for tile in row]
    picture(tiles, 4, out / "comparison.png", ["target night", *scored, "label"])
    print(f"\n{'at night':11} day-only  ccdistill")
    print(evaluate.table(*results.values()))
    print(f"picture: {out / 'comparison.png'}")


def join(args):
    """Take this process's place among those that torchrun started. The first one speaks."""
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(args.device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    if evaluate.ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# ---- the benchmark -----------------------------------------------------------------------------------------


def benchmark(args):
    """Time the method's steps and plain supervised steps of the same network on as many images, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.cityscapes:
            datasets.make_demo_city(folder, train=8 * args.batch_size, val=0)
            args.cityscapes, args.darkzurich = f"{folder}/cityscapes", f"{folder}/darkzurich"
        args.steps = 2 * (args.benchmark + 2) + 1
        stream, _ = load_data(args)
        method, optimizer = build(args)
        method.train()
        print(f"timing {args.benchmark} steps", flush=True)
        feed = batches(stream, 0, args)
        batch = next(feed)
        result = step_times(method, optimizer, feed, args) | sample_times(stream, min(args.benchmark, 10))
        result |= operations(method, optimizer, batch, args)
        result["teraflops"] = 1000 * result["teraflop_step"] / result["method_ms"]
        result["share_of_matmul"] = result["teraflops"] / result["matmul_teraflops"]
        result |= {"growth": growth(method, optimizer, args), "args": vars(args), "torch": torch.__version__}
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:24} {value:10.2f}   {result['spread'].get(name, '')}")
    print("\ngrowth: images a domain, crop, ms a step, microseconds a step and 1000 pixels")
    for row in result["growth"]:
        pixels = 4 * row["batch_size"] * math.prod(row["crop"])
        print(f"{row['batch_size']:6} {row['crop']!s:12} {row['ms']:10.1f} {1e6 * row['ms'] / pixels:10.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
        print(f"{args.json}: written")


def clock(device):
    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)
    return time.perf_counter() * 1000


def timed_step(method, optimizer, batch, args):
    """One step on a batch that is there, as a dict of milliseconds."""
    began = clock(args.device)
    with autocast(args):
        loss = method(batch)["total"]
    optimizer.zero_grad()
    loss.backward()
    middle = clock(args.device)
    optimizer.step()
    return {"forward_backward_ms": middle - began, "optimizer_ms": clock(args.device) - middle}


def step_times(method, optimizer, feed, args):
    """Milliseconds and memory of plain steps and steps of the method in turn, as a dict; README: Speed."""
    import resource  # not on Windows, where the rest runs

    unit = 2**20 if sys.platform == "darwin" else 2**10
    times, cuda, peak = collections.defaultdict(list), args.device.startswith("cuda"), {}
    for n in range(-2, args.benchmark):  # two rounds to warm up
        began = clock(args.device)
        batch = next(feed)
        waited = {"data_ms": clock(args.device) - began}
        next(feed)  # for a wait as long as in training; both steps see the same images
        images = torch.cat([batch[name] for name in ("source_day", *DOMAINS)])
        plain = {"source_day": images, "source_label": batch["source_label"].repeat(4, 1, 1)}
        turns, took = [("day", plain), ("target", batch)], {}
        for method.stage, given in turns if n % 2 else turns[::-1]:  # the first has the loader beside it
            if cuda:
                torch.cuda.reset_peak_memory_stats(args.device)
            took[method.stage] = timed_step(method, optimizer, given, args)
            if cuda:
                peak[method.stage] = torch.cuda.max_memory_allocated(args.device) / 2**20
        plain, full, method.stage = took["day"], took["target"], "target"
        if n >= 0:
            totals = {"plain_ms": sum(plain.values()), "method_ms": sum(full.values())}
            totals["ratio"] = totals["method_ms"] / totals["plain_ms"]
            for name, value in (totals | waited | full | terms(method, batch, args)).items():
                times[name].append(value)
    result = {name: statistics.median(values) for name, values in times.items()}
    result["ratio"] = result["method_ms"] / result["plain_ms"]
    result["images_per_second"] = 4000 * args.batch_size / (result["method_ms"] + result["data_ms"])
    result["process_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if cuda:
        result["device_memory_mb"] = peak["target"]
    result["peak_memory_mb"] = result.get("device_memory_mb", result["process_memory_mb"])
    result["spread"] = {name: f"{min(values):.2f} to {max(values):.2f}" for name, values in times.items()}
    return result


def operations(method, optimizer, batch, args):
    """Floating-point operations of a step, and what a large matrix product reaches, in 10^12 (a second)."""
    with FlopCounterMode(display=False) as counter:
        timed_step(method, optimizer, batch, args)
    size = 1024 if args.device.startswith("cpu") else 8192
    dtype = (torch.float32, torch.bfloat16)[args.amp == "bf16"]
    square, took = torch.rand(size, size, device=args.device).to(dtype), []
    for _ in range(6):
        began = clock(args.device)
        square @ square
        took.append(clock(args.device) - began)
    return {"teraflop_step": counter.get_total_flops() / 1e12, "matmul_teraflops": 2e-9 * size**3 / min(took)}


def growth(method, optimizer, args):
    """[{batch_size, crop, ms}] of steps with half the images, with half the sides, and as asked."""
    rows = []
    for size in sorted({max(1, args.batch_size // 2), args.batch_size}):
        for crop in sorted({tuple(max(32, length // 2) for length in args.crop), args.crop}):
            fake = {name: torch.rand(size, 3, *crop, device=args.device) for name in DOMAINS}
            fake["source_label"] = torch.randint(19, (size, *crop), device=args.device)
            took = [sum(timed_step(method, optimizer, fake, args).values()) for _ in range(4)]
            rows.append({"batch_size": size, "crop": crop, "ms": statistics.median(took[1:])})
    return rows


def terms(method, batch, args):
    """Milliseconds of each of the method's terms alone, forward and backward, from features and logits on."""
    source, nights, label = batch["source_day"], batch["target_night"], batch["source_label"]
    began = clock(args.device)
    ccdistill.night_style(source, nights, args.night_style, args.night_strength)
    took = {"night_style_ms": clock(args.device) - began}
    with torch.no_grad(), autocast(args):
        (f_s, p_s), (f_t, p_t) = method.networks([source], [nights])

    def content(*features):
        embeddings = map(method.embed, features)
        return losses.content_distill(*embeddings, args.js_weight, method.target_paired)

    for name, function, inputs in (
        ("seg_ms", lambda p: losses.segmentation_loss(p, label), [p_s]),
        ("pseudo_ms", method.pseudo, [p_t, p_t]),
        ("content_ms", content, [f_s, f_s, f_t, f_t]),
        ("style_ms", losses.style_distill, [f_s, f_s, f_t, f_t]),
    ):
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        began = clock(args.device)
        with autocast(args):
            function(*leaves).backward()
        took[name] = clock(args.device) - began
    return took


def sample_times(stream, count):
    """Milliseconds of one training sample: as this stream gets it, as by decoding, and by the usual chain."""
    cache, mean, std = stream.cache, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def usual(k):
        """Whole images to RGB, resized, to float tensors, normalised, and then cropped."""
        sample, factor = stream.source[k % len(stream.source)], random.Random(k).uniform(*stream.scale)
        for path in (sample.image, *(paths[k % len(paths)] for paths in (stream.days, stream.nights))):
            image = datasets.open_image(path)
            size = [max(stream.crop[n], round(image.size[1 - n] * factor)) for n in (0, 1)]
            image = TF.to_dtype(TF.pil_to_tensor(TF.resize(image, size)), torch.float32, scale=True)
            TF.center_crop(TF.normalize(image, mean, std), stream.crop)
        label = datasets.open_label(sample.label)
        size = [max(stream.crop[n], round(label.size[1 - n] * factor)) for n in (0, 1)]
        label = TF.resize(label, size, TF.InterpolationMode.NEAREST)
        TF.center_crop(TF.pil_to_tensor(label), stream.crop)

    took = collections.defaultdict(list)
    turns = [("chain", usual, None), ("decoded", stream.item, None), ("cached", stream.item, cache)]
    for k in range(count):  # all in the cache by now: the steps have had them
        for name, get, stream.cache in turns if cache else turns[:2]:
            began = clock("cpu")
            get(k)
            took[f"sample_{name}_ms"].append(clock("cpu") - began)
    stream.cache = cache
    return {name: statistics.median(values) for name, values in took.items()}


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.processes > 1:
            join(args)
        (demo if args.demo else benchmark if args.benchmark else train)(args)
    except (ValueError, OSError, RuntimeError) as error:
        if not evaluate.expected(error):
            raise
        where = f"{args.out}: " if isinstance(error, OSError) and error.errno and not error.filename else ""
        print(f"train.py: error: {where}{datasets.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved is whole", file=sys.stderr)
        return 130
    finally:
        if evaluate.ranks()[1] > 1:
            distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
